"""How trainers lay out checkpoints: which directory is which step, and where its weights are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError, RelexStreamWarning, SourceError
from ..listing import is_directory, list_names
from ..locations import Location, relative_to
from ..paths import check_relative_path
from .checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    holds_weights,
    recognise_weights,
    summarise,
)

FAMILIES = ("global_step_{step}", "checkpoint-{step}", "step_{step}", "iter_{step}")
"""Directory names that are known without a pattern: verl; Hugging Face trainers; others."""

WEIGHTS_DIRECTORIES = (".", "huggingface", "actor/huggingface")
"""Where the weights may lie inside a step's directory, first match first."""

_STEPS_EXAMPLES = "such as 1:75 (75 included), 1:75:5, 10: or 1,5,10"


@dataclass(frozen=True)
class StepSelection:
    """Which steps to use: single steps, and ranges that take whatever exists.

    Attributes
    ----------
    explicit : tuple of int
        Steps listed one by one, ascending. Each of them must exist.
    ranges : tuple of (int, int or None, int)
        First step, last step (included; None: no end) and stride.

    Examples
    --------
    >>> selection = StepSelection(explicit=(3,), ranges=((10, 20, 5),))
    >>> [step for step in range(30) if selection.selects(step)]
    [3, 10, 15, 20]
    """

    explicit: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int | None, int], ...] = ()

    def selects(self, step: int) -> bool:
        """Return whether a step is one of those meant."""
        return step in self.explicit or any(
            first <= step and (last is None or step <= last) and (step - first) % stride == 0
            for first, last, stride in self.ranges
        )


@dataclass(frozen=True)
class FoundCheckpoints:
    """Checkpoints of one run, in ascending order of their steps.

    Attributes
    ----------
    layout : str
        Where each step's weights lie, with ``N`` for the step: ``global_step_N/huggingface``.
    checkpoints : tuple of (int, Path or Url)
        Step number and weights directory, as `open_checkpoint` takes it.
    """

    layout: str
    checkpoints: tuple[tuple[int, Location], ...]


def parse_steps(text: str) -> StepSelection:
    """Parse a selection of steps as a user writes it.

    Parameters
    ----------
    text : str
        Parts joined by commas: a step, ``first:last`` (last included) or ``first:last:stride``.
        ``first`` may be left out (then 1), and so may ``last`` (then no end).

    Returns
    -------
    StepSelection
        What `find_checkpoints` takes.

    Raises
    ------
    OptionError
        If a part is none of these, ends before it starts, or holds a 0: step 0 is the base.

    Examples
    --------
    >>> parse_steps("1:75:5,80")
    StepSelection(explicit=(80,), ranges=((1, 75, 5),))
    >>> parse_steps("10:1")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    relex_stream.errors.OptionError: steps '10:1': the range ends before it starts; ...
    """
    explicit: set[int] = set()
    ranges: list[tuple[int, int | None, int]] = []
    for part in text.split(","):
        match = re.fullmatch(
            r"([0-9]{1,18})|([0-9]{1,18})?:([0-9]{1,18})?(?::([0-9]{1,18}))?", part.strip()
        )
        if match is None:
            raise _bad_steps(part, "not a step, a range, or a range with a stride")
        single, first, last, stride = (
            None if number is None else int(number) for number in match.groups()
        )
        if 0 in (single, first, last):
            raise _bad_steps(part, "steps start at 1, step 0 is the base")
        if stride == 0:
            raise _bad_steps(part, "the stride is 0")
        if single is not None:
            explicit.add(single)
            continue
        if last is not None and last < (first or 1):
            raise _bad_steps(part, "the range ends before it starts")
        ranges.append((first or 1, last, stride or 1))
    return StepSelection(tuple(sorted(explicit)), tuple(ranges))


def _bad_steps(part: str, problem: str) -> OptionError:
    shown = part if len(part) <= 100 else part[:100] + "..."
    return OptionError(f"steps {shown!r}: {problem}; write steps {_STEPS_EXAMPLES}")


def find_checkpoints(
    directory: Location, pattern: str | None = None, steps: StepSelection | None = None
) -> FoundCheckpoints:
    """Find the checkpoints of a run and the directory of each one's weights.

    Without a pattern, the directories ``global_step_N``, ``checkpoint-N``, ``step_N`` or ``iter_N``
    count (leading zeros allowed), as long as only one of these families is present. The weights are
    looked for in each such directory, then in ``huggingface`` and ``actor/huggingface`` inside it.
    Other entries, temporary names (``tmp_step_5``, ``step_5.tmp``) and files are passed over.

    Parameters
    ----------
    directory : Path or Url
        What the trainer wrote its checkpoints into.
    pattern : str, optional
        Path of a checkpoint below `directory` with ``{step}`` for the digits, exactly once. ``*``
        stands for any text within a name (but not for a leading dot); all else is literal.
    steps : StepSelection, optional
        Which steps to use; all if not given. Directories of other steps are not looked into.

    Returns
    -------
    FoundCheckpoints
        At least one checkpoint.

    Raises
    ------
    OptionError
        If the pattern is malformed.
    SourceError
        If the directory is missing or not one, nothing in it matches or is selected, a step listed
        explicitly is not there, two directories stand for one step, several families are present,
        or a selected checkpoint has no safetensors weights where the others have theirs.

    Warns
    -----
    RelexStreamWarning
        If a checkpoint of step 0 is left out: the base stands for that step.
    """
    directory = directory.absolute()
    if pattern is None:
        pattern, matches = _match_families(directory)
    else:
        parts = _compile_pattern(pattern)
        matches = list(_match(directory, parts))
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
    selected = _select(directory, by_step, steps)
    inside = _find_weights(selected)
    layout = pattern.strip("/").replace("{step}", "N")
    return FoundCheckpoints(
        layout if inside == "." else f"{layout}/{inside}",
        tuple((step, path / inside) for step, path in selected.items()),
    )


def _match_families(directory: Location) -> tuple[str, list[tuple[int, Location]]]:
    """Return the one known family present in a directory, with its steps."""
    names = list_names(directory)
    found = {
        family: matches
        for family in FAMILIES
        if (matches := list(_match(directory, _compile_pattern(family))))
    }
    if len(found) > 1:
        examples = [f"{family} ({matches[0][1].name})" for family, matches in found.items()]
        raise SourceError(
            f"{directory}: checkpoints of several kinds: {' and '.join(examples)}; choose one "
            f"with --pattern, e.g. --pattern '{next(iter(found))}'"
        )
    if found:
        return next(iter(found.items()))
    if holds_weights(directory):
        raise SourceError(
            f"{directory}: this is one model; give the directory that holds the checkpoints"
        )
    wanted = ", ".join(family.replace("{step}", "N") for family in FAMILIES)
    raise SourceError(
        f"{directory}: no checkpoints: looked for directories {wanted}; there are: "
        f"{summarise(names)}; check the path, or say with --pattern how they are called"
    )


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


def _select(
    directory: Location, by_step: dict[int, Location], steps: StepSelection | None
) -> dict[int, Location]:
    """Return the steps that are selected; explicit ones must be there."""
    there = f"steps there: {_summarise(list(by_step))}"
    if steps is None:
        selected = by_step
    else:
        missing = [step for step in steps.explicit if step not in by_step]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise SourceError(
                f"{directory}: no checkpoint of step{plural} {_summarise(missing)}; {there}"
            )
        selected = {step: path for step, path in by_step.items() if steps.selects(step)}
    if not selected:
        raise SourceError(f"{directory}: no step is selected; {there}")
    return selected


def _summarise(steps: list[int]) -> str:
    if not steps:
        return "none"
    if len(steps) <= 8:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:5]))}, ..., {steps[-1]} ({len(steps)} in all)"


def _find_weights(selected: dict[int, Location]) -> str:
    """Return where the weights lie inside every one of the selected directories."""
    places = {
        step: [inside for inside in WEIGHTS_DIRECTORIES if holds_weights(path / inside)]
        for step, path in selected.items()
    }
    for inside in WEIGHTS_DIRECTORIES:
        if all(inside in found for found in places.values()):
            return inside
    for step, found in places.items():
        if not found:
            raise _no_weights(selected[step])
    (step, found), *others = places.items()
    other = next(other for other, found_there in others if found[0] not in found_there)
    raise SourceError(
        f"weights lie in {selected[step] / found[0]} but in "
        f"{selected[other] / places[other][0]}: the steps of one run must agree; choose with "
        "--pattern or --steps"
    )


def _no_weights(path: Location) -> SourceError:
    """Name weights in other formats, if there are any where trainers put theirs."""
    looked = ", ".join(inside for inside in WEIGHTS_DIRECTORIES)
    start = f"{path}: no {SINGLE_FILE} or {INDEX_FILE} in {looked}; found "
    for inside in (".", "actor", *WEIGHTS_DIRECTORIES[1:]):
        recognised = recognise_weights(path / inside)
        if recognised is not None:
            what, remedy = recognised
            return SourceError(f"{start}{what}{'' if inside == '.' else f' in {inside}'}; {remedy}")
    return SourceError(f"{start}{summarise(list_names(path))}; save the checkpoint with weights")
