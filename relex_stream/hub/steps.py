"""Which step is where in a repository: a revision of its own, or a directory of one revision."""

from __future__ import annotations

import fnmatch
import posixpath
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from relex_stream.errors import OptionError, RelexStreamWarning, SourceError
from relex_stream.sources import StepSelection
from relex_stream.sources.checkpoint import INDEX_FILE, SINGLE_FILE
from relex_stream.sources.directories import summarise
from relex_stream.sources.families import FAMILIES as TRAINERS
from relex_stream.sources.formats import FORMATS
from relex_stream.sources.layout import select_steps, step_finder
from relex_stream.sources.recognised import recognise_names
from relex_stream.sources.side_files import is_kept, sort_listed
from relex_stream.urls import HubUrl

from .client import HubClient, HubFile, Ref

PATTERNS = (*(family.pattern for family in TRAINERS), "step{step}")
"""Names of revisions and directories that are known without a pattern."""

_PLACES = FORMATS[0].places
"""Where safetensors may lie inside a step: no other format is fetched."""

_READ_LOCALLY = (
    *("model_world_size_*_rank_*.pt", "*.distcp", "shard-*-model-*-of-*.safetensors"),
    "delta_sparse.bin.zst",
)
"""Names of files in the other formats."""

_REMEDY = "upload it anew, or name another model or other --steps"

MAIN = "main"
"""The branch that every repository of the Hub has."""


@dataclass(frozen=True)
class HubStep:
    """Where a step's checkpoint is.

    Attributes
    ----------
    step : int
    name : str
        Of the branch or tag, or path of the directory in the repository.
    commit : str
    directory : str
        Path of the step in the repository, empty where it is all of the commit.
    """

    step: int
    name: str
    commit: str
    directory: str


@dataclass(frozen=True)
class HubSteps:
    """The steps of one run, ascending.

    ``layout`` is a URL of each, with ``{step}`` in it.
    """

    layout: str
    steps: tuple[HubStep, ...]


@dataclass(frozen=True)
class WeightsPlace:
    """The files of a directory that holds weights, by name, and its path in the repository.

    ``below`` are those of its subdirectories, by their paths in it.
    """

    directory: str
    files: Mapping[str, HubFile]
    below: Mapping[str, HubFile]

    @property
    def holds_weights(self) -> bool:
        """Whether `open_checkpoint` would find a file to start from."""
        return SINGLE_FILE in self.files or INDEX_FILE in self.files


def find_steps(
    client: HubClient,
    url: HubUrl,
    pattern: str | None = None,
    selection: StepSelection | None = None,
) -> HubSteps:
    """Find the steps of a run in a repository.

    A URL of a repository alone means its branches and tags, or else the directories of its branch
    ``main``, whichever have names of steps. With a revision or a directory it means directories
    there; but a revision with ``{step}`` in it is a pattern of revisions.

    Parameters
    ----------
    client : HubClient
    url : HubUrl
    pattern : str, optional
        What revisions or directories are called, with ``{step}`` for the digits; by default any one
        of `PATTERNS`.
    selection : StepSelection, optional
        Which steps to use; all if not given.

    Returns
    -------
    HubSteps
        At least one, none of them 0, with the commits that branches and tags stand for now.

    Raises
    ------
    SourceError
        If nothing is called or selected so, or it is not clear what is meant.
    OptionError
        If the pattern is malformed, or there are two of them.
    HubError
        If the Hub does not give its listings.
    """
    if url.revision is not None and "{step}" in url.revision:
        if pattern is not None:
            raise OptionError(f"{url}: {{step}} is in the URL already; leave --pattern out")
        found = _in_revisions(url, client.refs(url.repository), url.revision)
    elif url.revision is not None or url.directory:
        found = _in_directories(url, client, pattern)
    else:
        found = _in_either(url, client, pattern)
    if not found.steps:
        _refuse(url, pattern or url.revision, found)
    by_step = _by_step(url, found.steps)
    if 0 in by_step:
        warnings.warn(
            f"{url}: {by_step.pop(0).name} is left out: the base stands for step 0",
            RelexStreamWarning,
            stacklevel=2,
        )
    return HubSteps(found.layout, tuple(select_steps(url, by_step, selection).values()))


class _Search(NamedTuple):
    """What has names of steps among some names, perhaps nothing."""

    layout: str
    steps: list[HubStep]
    names: list[str]
    what: str


def _in_either(url: HubUrl, client: HubClient, pattern: str | None) -> _Search:
    refs = client.refs(url.repository)
    revisions = _in_revisions(url, refs, pattern)
    main = replace(url, revision=MAIN)
    if not any(ref.name == MAIN for ref in refs):
        return revisions
    directories = _in_directories(main, client, pattern)
    if revisions.steps and directories.steps:
        raise SourceError(
            f"{url}: both revisions and directories of {MAIN} are called like steps; choose the "
            f"revisions with {revisions.layout} in its place, the directories with {main}"
        )
    return directories if directories.steps else revisions


def _in_revisions(url: HubUrl, refs: list[Ref], pattern: str | None) -> _Search:
    names = [ref.name for ref in refs]
    family, matches = _matches(url, names, pattern)
    # A name may be a branch's and a tag's.
    steps = [
        HubStep(matches[ref.name], ref.name, ref.commit, url.directory)
        for ref in refs
        if ref.name in matches
    ]
    return _Search(str(replace(url, revision=family)), steps, names, "branches and tags")


def _in_directories(url: HubUrl, client: HubClient, pattern: str | None) -> _Search:
    revision = url.revision or MAIN
    commit = client.commit_of(url.repository, revision)
    start = f"{url.directory}/" if url.directory else ""
    paths = [
        file.path.removeprefix(start)
        for file in client.files(url.repository, commit)
        if file.path.startswith(start)
    ]
    directories = {above for path in paths for above in _above(path)}
    family, matches = _matches(url, sorted(directories), pattern)
    return _Search(
        str(HubUrl(url.repository, revision, start + family)),
        [HubStep(step, start + path, commit, start + path) for path, step in matches.items()],
        sorted({path.partition("/")[0] for path in paths}),
        "files and directories",
    )


def _above(path: str) -> Iterable[str]:
    """Yield the directories above a file, all that there are.

    Examples
    --------
    >>> list(_above("a/b/c.json"))
    ['a', 'a/b']
    """
    parts = path.split("/")[:-1]
    return ("/".join(parts[: end + 1]) for end in range(len(parts)))


def _matches(url: HubUrl, names: Iterable[str], pattern: str | None) -> tuple[str, dict[str, int]]:
    """Return the pattern that names match, and the steps by names."""
    names = list(names)
    found = {}
    for family in PATTERNS if pattern is None else (pattern.strip("/"),):
        step_of = step_finder(family)
        matches = {name: step for name in names if (step := step_of(name)) is not None}
        if matches:
            found[family] = matches
    if len(found) > 1:
        examples = [f"{family} ({next(iter(matches))})" for family, matches in found.items()]
        raise SourceError(
            f"{url}: steps are called in several ways: {' and '.join(examples)}; choose one with "
            f"--pattern, e.g. --pattern '{next(iter(found))}'"
        )
    return next(iter(found.items()), ("", {}))


def _refuse(url: HubUrl, pattern: str | None, found: _Search) -> NoReturn:
    if {SINGLE_FILE, INDEX_FILE} & set(found.names):
        raise SourceError(
            f"{url}: this is one model; name the repository, or the directory of the checkpoints"
        )
    looked = pattern if pattern and "{step}" in pattern else ", ".join(PATTERNS)
    raise SourceError(
        f"{url}: no checkpoints: looked for {looked.replace('{step}', 'N')}; its {found.what}: "
        f"{summarise(found.names)}; say with --pattern how the steps are called"
    )


def _by_step(url: HubUrl, steps: Iterable[HubStep]) -> dict[int, HubStep]:
    by_step: dict[int, HubStep] = {}
    for found in sorted(steps, key=lambda found: (found.step, found.name)):
        other = by_step.setdefault(found.step, found)
        if (other.commit, other.directory) != (found.commit, found.directory):
            raise SourceError(
                f"{url}: both {other.name} and {found.name} are step {found.step}; choose with "
                "--pattern"
            )
    return by_step


def find_weights(
    url: HubUrl, steps: Iterable[HubStep], files_of: Callable[[HubStep], Iterable[HubFile]]
) -> dict[int, WeightsPlace]:
    """Find the directory of each step's weights, by the names of its files alone.

    Parameters
    ----------
    url : HubUrl
    steps : iterable of HubStep
    files_of : callable
        Returns all files of a step's commit.

    Returns
    -------
    dict of int to WeightsPlace
        In the order of `steps`; for all of them the same place inside the step.

    Raises
    ------
    SourceError
        If a step has no safetensors weights where the others have theirs; the message names what
        it has.
    """
    inside: dict[int, dict[str, WeightsPlace]] = {}
    for step in steps:
        files = list(files_of(step))
        places = {place: _place(step, place, files) for place in _PLACES}
        inside[step.step] = {name: place for name, place in places.items() if place.holds_weights}
        if not inside[step.step]:
            raise _no_weights(url, step, places, files)
    for name in _PLACES:
        if all(name in places for places in inside.values()):
            return {step: places[name] for step, places in inside.items()}
    (first, places), *others = inside.items()
    place = next(iter(places))
    other = next(step for step, there in others if place not in there)
    raise SourceError(
        f"{url}: weights lie in {place} at step {first} but in {next(iter(inside[other]))} at "
        f"step {other}: the steps of one run must agree; choose with --steps"
    )


def _place(step: HubStep, inside: str, files: Iterable[HubFile]) -> WeightsPlace:
    directory = posixpath.normpath(posixpath.join(step.directory, inside))
    directory = "" if directory == "." else directory
    above = f"{directory}/" if directory else ""
    inner = {file.path[len(above) :]: file for file in files if file.path.startswith(above)}
    return WeightsPlace(
        directory,
        {name: file for name, file in inner.items() if "/" not in name},
        {name: file for name, file in inner.items() if "/" in name},
    )


def _no_weights(
    url: HubUrl, step: HubStep, places: Mapping[str, WeightsPlace], files: Iterable[HubFile]
) -> SourceError:
    """Say what was looked for and what is there: other weights, if there are any."""
    # Step 0 is a base.
    which = f"{url}: step {step.step} ({step.name})" if step.step else str(url)
    start = f"{which} has no {SINGLE_FILE} or {INDEX_FILE} in {', '.join(places)}; found "
    for inside, place in places.items():
        names = sorted(place.files)
        recognised = recognise_names(names)
        if recognised is not None:
            what, remedy = recognised
            if any(fnmatch.filter(names, pattern) for pattern in _READ_LOCALLY):
                remedy = "fetch the files yourself and give their directory: there they are read"
            return SourceError(f"{start}{what}{'' if inside == '.' else f' in {inside}'}; {remedy}")
    above = f"{step.directory}/" if step.directory else ""
    names = sorted(file.path for file in files if file.path.startswith(above))
    return SourceError(f"{start}{summarise(names)}; {_REMEDY}")


def needed_files(
    place: WeightsPlace, shards: Collection[str] | None
) -> tuple[list[HubFile], list[str]]:
    """Return the files of a place that a checkpoint consists of, and names of those left out.

    Parameters
    ----------
    place : WeightsPlace
    shards : collection of str or None
        What its index names; None if there is no index.

    Raises
    ------
    SourceError
        If a shard is missing, and there is no single file either.
    """
    files = place.files
    weights = {SINGLE_FILE} if shards is None else set(shards)
    missing = sorted(weights - set(files))
    if missing and SINGLE_FILE in files:
        weights, missing = {SINGLE_FILE}, []
    if missing:
        raise SourceError(
            f"{place.directory or 'the repository'}: shard {missing[0]}, named by {INDEX_FILE}, "
            f"is missing; {_REMEDY}"
        )
    needed = {name for name, file in files.items() if name in weights or is_kept(name, file.size)}
    below = sort_listed({name: file.size for name, file in place.below.items()})
    left_out = sorted({*files} - needed) + [name for name in below if name.endswith("/")]
    inner = [place.below[name] for name in below if not name.endswith("/")]
    return [files[name] for name in sorted(needed)] + inner, left_out
