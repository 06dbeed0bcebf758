"""How trainers lay out checkpoints: which directory is which step, and where its weights are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ..errors import OptionError, RelexStreamWarning, SourceError
from ..listing import is_directory, list_names
from ..locations import Location, relative_to
from ..paths import check_relative_path
from ..specs import SourceCheckpoint
from .directories import summarise
from .families import FAMILIES, RUN_DIRECTORIES, Family
from .formats import FORMATS, Format
from .naming import Naming
from .recognised import recognise_inside
from .steps import StepSelection

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class FoundCheckpoints:
    """Checkpoints of one run, in ascending order of their steps.

    Attributes
    ----------
    layout : str
        Where each step's weights lie, with ``N`` for the step, and in what format where that is
        not safetensors: ``global_step_N/huggingface``, ``step_N/trainer, PyTorch DCP``.
    format : Format
        What they are in.
    checkpoints : tuple of (int, Path or Url)
        Step number and weights directory, as `open` takes it.
    unfinished : dict of int to str
        Steps selected but left out, because the trainer has not finished them: what shows it.
    there : tuple of int
        All steps in the directory, selected and finished or not.
    """

    layout: str
    format: Format
    checkpoints: tuple[tuple[int, Location], ...]
    unfinished: Mapping[int, str]
    there: tuple[int, ...]

    def open(self, path: Location, step: int, naming: Naming) -> SourceCheckpoint:
        """Open one of the checkpoints, its tensors under the base's names.

        Raises
        ------
        SourceError
            If it is not what its format asks for.
        """
        return self.format.open(path, step, naming)


def find_checkpoints(
    directory: Location,
    pattern: str | None = None,
    steps: StepSelection | None = None,
    source: str = "auto",
    may_lack: Collection[int] = (),
) -> FoundCheckpoints:
    """Find the checkpoints of a run, the directory of each one's weights, and their format.

    Without a pattern, the directories of `FAMILIES` count (``global_step_N``, ``checkpoint-N``,
    ...; leading zeros allowed), as long as one family alone is present or has weights that are
    read. They lie in `directory` or in one of `RUN_DIRECTORIES` inside it. Steps that the trainer
    has not finished are left out. Other entries, temporary names (``tmp_step_5``, ``step_5.tmp``)
    and files are passed over.

    In each step's directory, every format is looked for in the places where trainers put it; the
    first format and place that all steps share counts.

    Parameters
    ----------
    directory : Location
        What the trainer wrote its checkpoints into, or the directory of its run.
    pattern : str, optional
        Path of a checkpoint below `directory` with ``{step}`` for the digits, exactly once. ``*``
        stands for any text within a name (but not for a leading dot); all else is literal. All
        directories that match are taken for complete.
    steps : StepSelection, optional
        Which steps to use; all if not given. Directories of other steps are not looked into.
    source : str
        The name of a format: no other is looked for. ``auto`` for all.
    may_lack : collection of int
        Steps that are left out without a word where no weights are left of them: the store has
        them.

    Returns
    -------
    FoundCheckpoints
        At least one checkpoint, but for what `may_lack` leaves out.

    Raises
    ------
    OptionError
        If the pattern is malformed, or there is no such format.
    SourceError
        If the directory is missing or not one, nothing in it matches, is selected or is complete, a
        step listed explicitly is not there or not complete, two directories stand for one step,
        several families are present, or a selected checkpoint has no weights where the others have
        theirs.

    Warns
    -----
    RelexStreamWarning
        If a checkpoint of step 0 is left out, because the base stands for that step, or steps are
        left out that are not complete.
    """
    directory = directory.absolute()
    formats = _formats(source)
    unfinished: dict[int, str] = {}
    if pattern is None:
        root, family, matches = _match_families(directory, formats)
        pattern = family.pattern
        if root != directory:
            pattern = f"{relative_to(root, directory)}/{pattern}"
        by_step = _by_step(root, matches)
        unfinished = family.unfinished(root, by_step)
    else:
        matches = list(_match(directory, _compile_pattern(pattern)))
        if not matches:
            raise SourceError(
                f"{directory}: no directory matches --pattern {pattern}; there are: "
                f"{summarise(list_names(directory))}"
            )
        by_step = _by_step(directory, matches)
    if 0 in by_step:
        warnings.warn(
            f"{by_step.pop(0)} is left out: the base stands for step 0",
            RelexStreamWarning,
            stacklevel=2,
        )
    selected = select_steps(directory, by_step, steps)
    # Of what the store has, marks may be gone with the weights.
    gone = {
        step for step in may_lack if step in selected and _held(selected[step], formats) is None
    }
    unfinished = {
        step: reason for step, reason in unfinished.items() if step in selected and step not in gone
    }
    if unfinished:
        explicit = steps.explicit if steps is not None else ()
        warnings.warn(
            _check_unfinished(selected, unfinished, explicit), RelexStreamWarning, stacklevel=2
        )
        selected = {step: path for step, path in selected.items() if step not in unfinished}
    layout = pattern.strip("/").replace("{step}", "N")
    selected = {step: path for step, path in selected.items() if step not in gone}
    if not selected:
        return FoundCheckpoints(layout, formats[0], (), unfinished, tuple(by_step))
    chosen, inside = _find_weights(selected, formats)
    if inside != ".":
        layout = f"{layout}/{inside}"
    if chosen is not FORMATS[0]:
        layout = f"{layout}, {chosen.title}"
    return FoundCheckpoints(
        layout,
        chosen,
        tuple((step, path / inside) for step, path in selected.items()),
        unfinished,
        tuple(by_step),
    )


class ListedSteps(NamedTuple):
    """Directories that stand for steps, ascending, and those that the trainer has not finished."""

    directories: dict[int, Location]
    unfinished: dict[int, str]
    """What shows it, by step."""


def list_steps(
    directory: Location,
    pattern: str | None = None,
    steps: StepSelection | None = None,
    source: str = "auto",
) -> ListedSteps:
    """Return the directories that stand for steps, whatever is in them so far.

    For those who wait for checkpoints: nothing need be there yet.

    Parameters
    ----------
    directory, pattern, steps, source
        As in `find_checkpoints`, but neither the directory nor any step need exist.

    Returns
    -------
    ListedSteps
        Without step 0. With a pattern, all are taken for finished.

    Raises
    ------
    OptionError, SourceError
        As in `find_checkpoints`, where waiting would not help: a malformed pattern, two directories
        for one step, several families.
    """
    directory = directory.absolute()
    formats = _formats(source)
    parts = None if pattern is None else _compile_pattern(pattern)
    unfinished: dict[int, str] = {}
    by_step: dict[int, Location] = {}
    if parts is not None:
        if is_directory(directory):
            by_step = _by_step(directory, list(_match(directory, parts)))
    elif found := _family_in(directory, formats):
        root, family, matches = found
        by_step = _by_step(root, matches)
        unfinished = family.unfinished(root, by_step)
    wanted = {
        step: path
        for step, path in by_step.items()
        if step and (steps is None or steps.selects(step))
    }
    return ListedSteps(wanted, {step: unfinished[step] for step in unfinished if step in wanted})


def _formats(source: str) -> Sequence[Format]:
    if source == "auto":
        return [format_ for format_ in FORMATS if format_.is_detected]
    chosen = [format_ for format_ in FORMATS if format_.name == source]
    if not chosen:
        names = ", ".join(format_.name for format_ in FORMATS)
        raise OptionError(f"--source {source}: there is no such format; choose auto, {names}")
    return chosen


def _match_families(
    directory: Location, formats: Sequence[Format]
) -> tuple[Location, Family, list[tuple[int, Location]]]:
    """Return the one known family present in a run's directory, where it is, and its steps."""
    names = list_names(directory)
    present = _family_in(directory, formats)
    if present is not None:
        return present
    if any(format_.holds(directory) for format_ in formats):
        raise SourceError(
            f"{directory}: this is one model; give the directory that holds the checkpoints"
        )
    wanted = ", ".join(family.shown for family in FAMILIES)
    raise SourceError(
        f"{directory}: no checkpoints: looked for directories {wanted}, here and in "
        f"{', '.join(RUN_DIRECTORIES[1:])}; there are: {summarise(names)}; check the path, or say "
        "with --pattern how they are called"
    )


def _family_in(
    directory: Location, formats: Sequence[Format]
) -> tuple[Location, Family, list[tuple[int, Location]]] | None:
    """Return the one known family in a run's directory, where it is, and its steps, if any."""
    for inside in RUN_DIRECTORIES:
        root = directory / inside
        if not is_directory(root):
            continue
        found = {
            family: matches
            for family in FAMILIES
            if (matches := list(_match(root, _compile_pattern(family.pattern))))
        }
        if len(found) > 1:
            found = _with_weights(found, formats) or found
        if len(found) > 1:
            examples = [f"{family.pattern} ({found[family][0][1].name})" for family in found]
            raise SourceError(
                f"{root}: checkpoints of several kinds: {' and '.join(examples)}; choose one "
                f"with --pattern, e.g. --pattern '{next(iter(found)).pattern}'"
            )
        for family, matches in found.items():
            return root, family, matches
    return None


def _with_weights(
    found: Mapping[Family, list[tuple[int, Location]]], formats: Sequence[Format]
) -> dict[Family, list[tuple[int, Location]]]:
    """Return the families that have a step with weights that are read.

    The state that some trainers write beside the weights has directories of its own.
    """
    return {
        family: matches
        for family, matches in found.items()
        if any(_held(path, formats) is not None for _, path in matches)
    }


def _check_unfinished(
    selected: Mapping[int, Location], unfinished: Mapping[int, str], explicit: Sequence[int]
) -> str:
    """Return what is left out, unless it must not or is all there is."""
    examples = [f"{selected[step].name} ({reason})" for step, reason in unfinished.items()]
    told = f"not complete: {summarise(examples)}"
    root = next(iter(selected.values())).parent
    remedy = "wait for the trainer, or take them as they are with --pattern"
    if any(step in unfinished for step in explicit):
        raise SourceError(f"{root}: {told}; {remedy}")
    if len(unfinished) == len(selected):
        raise SourceError(f"{root}: no checkpoint is complete; {told}; {remedy}")
    return f"{root}: left out, because {told}"


def _compile_pattern(pattern: str) -> list[re.Pattern[str]]:
    """Return one regular expression per part of a pattern; the step is the only group."""
    if pattern.count("{step}") != 1:
        raise OptionError(
            f"--pattern {pattern}: {{step}} must occur exactly once, as in 'epoch-{{step}}'"
        )
    try:
        check_relative_path(pattern.rstrip("/"))
    except ValueError as error:
        raise OptionError(
            f"--pattern {pattern}: {error}; give a path below the directory of the checkpoints"
        ) from None
    parts = []
    for part in pattern.rstrip("/").split("/"):
        pieces = {"*": ".*", "{step}": "([0-9]+)"}
        expression = "".join(
            pieces.get(piece, re.escape(piece))
            for piece in re.split(r"(\*|\{step\})", re.sub(r"\*+", "*", part))
        )
        parts.append(re.compile(r"(?!\.)" + expression if part[0] == "*" else expression, re.S))
    return parts


def step_finder(pattern: str) -> Callable[[str], int | None]:
    """Return what finds the step in a path that matches a pattern, and None in all others.

    For paths that are text only, such as names of branches; `find_checkpoints` says what a pattern
    may hold.

    Raises
    ------
    OptionError
        If the pattern is malformed.

    Examples
    --------
    >>> step_of = step_finder("runs/*-step{step}")
    >>> step_of("runs/a-step0040"), step_of("runs/a-step40/x"), step_of("runs/a-step")
    (40, None, None)
    """
    parts = _compile_pattern(pattern)

    def step_of(path: str) -> int | None:
        names = path.split("/")
        if len(names) != len(parts):
            return None
        matches = [part.fullmatch(name) for part, name in zip(parts, names, strict=True)]
        # Exactly one part has a group.
        steps = [int(match[1]) for match in matches if match is not None and match.re.groups]
        return steps[0] if all(matches) else None

    return step_of


def _match(
    directory: Location, parts: list[re.Pattern[str]], step: int = 0
) -> Iterable[tuple[int, Location]]:
    """Yield every directory below `directory` that matches the parts, with its step.

    Exactly one part has a group, so `step` is always replaced on the way down.
    """
    if not parts:
        yield step, directory
        return
    for name in list_names(directory):
        match = parts[0].fullmatch(name)
        if match is not None and is_directory(directory / name):
            found = int(match[1]) if parts[0].groups else step
            yield from _match(directory / name, parts[1:], found)


def _by_step(directory: Location, matches: list[tuple[int, Location]]) -> dict[int, Location]:
    """Return the directory of each step, ascending."""
    by_step: dict[int, Location] = {}
    for step, path in sorted(matches):
        if step in by_step:
            raise SourceError(
                f"{directory}: both {relative_to(by_step[step], directory)} and "
                f"{relative_to(path, directory)} are step {step}; remove one of them"
            )
        by_step[step] = path
    return by_step


def select_steps(
    where: object, by_step: Mapping[int, _Found], steps: StepSelection | None
) -> dict[int, _Found]:
    """Return what was found of the steps that are selected, at least one.

    Parameters
    ----------
    where : object
        What was searched, as a message names it.
    by_step : mapping
        What was found, by step, ascending.
    steps : StepSelection, optional
        All if not given.

    Raises
    ------
    SourceError
        If a step that is listed explicitly is not there, or none is selected.
    """
    there = f"steps there: {_summarise(list(by_step))}"
    if steps is None:
        selected = dict(by_step)
    else:
        missing = [step for step in steps.explicit if step not in by_step]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise SourceError(
                f"{where}: no checkpoint of step{plural} {_summarise(missing)}; {there}"
            )
        selected = {step: found for step, found in by_step.items() if steps.selects(step)}
    if not selected:
        raise SourceError(f"{where}: no step is selected; {there}")
    return selected


def _summarise(steps: list[int]) -> str:
    if not steps:
        return "none"
    if len(steps) <= 8:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:5]))}, ..., {steps[-1]} ({len(steps)} in all)"


def _find_weights(
    selected: Mapping[int, Location], formats: Sequence[Format]
) -> tuple[Format, str]:
    """Return the format of the weights and where they lie inside every selected directory."""
    for format_ in formats:
        for inside in format_.places:
            if all(format_.holds(path / inside) for path in selected.values()):
                return format_, inside
    held: dict[Location, tuple[Format, str]] = {}
    for path in selected.values():
        place = _held(path, formats)
        if place is None:
            raise _no_weights(path, formats)
        held[path] = place
    (first, (wanted, inside)), *others = held.items()
    other, (format_, elsewhere) = next(
        (path, place) for path, place in others if not wanted.holds(path / inside)
    )
    raise SourceError(
        f"weights lie in {first / inside} ({wanted.title}) but in {other / elsewhere} "
        f"({format_.title}): the steps of one run must agree; choose with --source, --pattern or "
        "--steps"
    )


def _held(path: Location, formats: Sequence[Format]) -> tuple[Format, str] | None:
    """Return the first format and place that a step's directory has weights in."""
    for format_ in formats:
        for inside in format_.places:
            if format_.holds(path / inside):
                return format_, inside
    return None


def _other_format(path: Location) -> tuple[str, str] | None:
    """Say what weights a step has in a format that was not asked for, and what to do."""
    held = _held(path, FORMATS)
    if held is None:
        return None
    format_, inside = held
    return f"{format_.title} in {inside}", f"choose --source {format_.name} or auto"


def _no_weights(path: Location, formats: Sequence[Format]) -> SourceError:
    """Say what was looked for and what is there: other weights, if there are any."""
    looked = "; ".join(format_.looked_for for format_ in formats)
    found, remedy = (
        _other_format(path)
        or recognise_inside(path)
        or (
            summarise(list_names(path)),
            "save the checkpoint with weights, or say with --pattern where they are",
        )
    )
    return SourceError(
        f"{path}: no weights: found {found}; {remedy} (looked for {looked}; there and where "
        "trainers put them)"
    )
