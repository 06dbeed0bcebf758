"""Runs in phases: directories of checkpoints that follow one another, joined by their steps.

A run that was taken up again in another directory often counts its steps from the start again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import SourceError, TrajectoryError
from ..locations import Location
from ..specs import SourceCheckpoint
from .directories import summarise
from .layout import FoundCheckpoints, find_checkpoints, list_steps
from .naming import Naming
from .steps import StepSelection


class Phase(NamedTuple):
    """A directory of checkpoints, and what is added to the numbers of its steps."""

    directory: Location
    offset: int = 0


@dataclass(frozen=True)
class FoundRun:
    """Checkpoints of all phases of a run, in ascending order of their steps.

    Attributes
    ----------
    layout : str
        As in `FoundCheckpoints`; of all phases, if they differ.
    checkpoints : tuple of (int, Path or Url)
        Step number in the run, and weights directory, as `open` takes it.
    there : tuple of int
        As in `FoundCheckpoints`, of the run's numbers.
    """

    layout: str
    checkpoints: tuple[tuple[int, Location], ...]
    there: tuple[int, ...]
    _found_in: Mapping[Location, FoundCheckpoints]

    def open(self, path: Location, step: int, naming: Naming) -> SourceCheckpoint:
        """Open one of the checkpoints, its tensors under the base's names.

        Raises
        ------
        SourceError
            If it is not what its format asks for.
        """
        return self._found_in[path].open(path, step, naming)


def find_run(
    phases: Sequence[Phase],
    pattern: str | None = None,
    steps: StepSelection | None = None,
    source: str = "auto",
    replace_from: int | None = None,
    may_lack: Collection[int] = (),
) -> FoundRun:
    """Find the checkpoints of a run that lie in one or several directories.

    Parameters
    ----------
    phases : sequence of Phase
        In the order in which they were trained.
    pattern, source
        As in `find_checkpoints`, for each of them.
    steps : StepSelection, optional
        Of the run's numbers, offsets added.
    replace_from : int, optional
        From this step on, what a later phase has counts and not what an earlier one has.
    may_lack : collection of int
        As in `find_checkpoints`, of the run's numbers.

    Returns
    -------
    FoundRun

    Raises
    ------
    SourceError, OptionError
        As in `find_checkpoints`.
    TrajectoryError
        If a phase does not begin behind the last step of those before it.
    """
    if len(phases) == 1 and phases[0].offset == 0:
        found = find_checkpoints(phases[0].directory, pattern, steps, source, may_lack)
        return FoundRun(
            found.layout,
            found.checkpoints,
            found.there,
            {path: found for _, path in found.checkpoints},
        )
    joined: dict[int, Location] = {}
    found_in: dict[Location, FoundCheckpoints] = {}
    there: list[int] = []
    chosen = False
    for phase in phases:
        listed = list_steps(phase.directory, pattern, source=source).directories
        there += [step + phase.offset for step in listed]
        own = [step for step in listed if steps is None or steps.selects(step + phase.offset)]
        if listed and not own:
            continue
        chosen = True
        # As ranges: of steps named one by one each would have to be complete in every phase.
        selection = StepSelection(ranges=tuple((step, step, 1) for step in own)) if own else None
        stored = {step - phase.offset for step in may_lack}
        found = find_checkpoints(phase.directory, pattern, selection, source, stored)
        here = {step + phase.offset: path for step, path in found.checkpoints}
        if not here:
            continue
        joined = {**_kept(joined, here, phase, replace_from), **here}
        found_in |= dict.fromkeys(here.values(), found)
    explicit = steps.explicit if steps else ()
    missing = [step for step in explicit if step not in joined and step not in may_lack]
    if missing or not chosen:
        wanted = (
            f"no checkpoint of step {summarise([*map(str, missing)])}" if missing else "no step"
        )
        places = ", ".join(str(phase.directory) for phase in phases)
        raise SourceError(
            f"{places}: {wanted} is selected; steps there: {summarise([*map(str, sorted(there))])}"
        )
    layouts = dict.fromkeys(found_in[path].layout for path in joined.values())
    return FoundRun("; ".join(layouts), tuple(joined.items()), tuple(sorted(there)), found_in)


def _kept(
    before: dict[int, Location],
    here: Mapping[int, Location],
    phase: Phase,
    replace_from: int | None,
) -> dict[int, Location]:
    """Return the steps of earlier phases that stay; refuse those that `here` does not follow."""
    if replace_from is not None:
        before = {step: path for step, path in before.items() if step < replace_from}
    first = min(here)
    last = max(before, default=0)
    if first <= last:
        raise TrajectoryError(
            f"{phase.directory} begins at step {first}, with {phase.offset} added, but "
            f"{before[last]} is step {last} already (a fork): give --replace-from {first} to leave "
            "out what is there from that step on, or another offset"
        )
    return before
