"""Which of the steps that were found go into a store: those that follow what it has, of its run.

Steps are only ever put behind the stored ones. That they belong there is checked before anything is
written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from relex_stream.chains import in_order
from relex_stream.errors import OptionError, RelexStreamWarning, TrajectoryError
from relex_stream.forks import is_stored
from relex_stream.locations import Location
from relex_stream.matching import match_checkpoint
from relex_stream.sources import CheckpointReader, FoundRun
from relex_stream.specs import Progress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.store.read import describe_steps
from relex_stream.store.records import MAX_STEP

OpenStep = Callable[[Location, int], SourceCheckpoint]

_Place = TypeVar("_Place")


def split_found(
    found: Sequence[tuple[int, _Place]], stored: tuple[int, ...]
) -> tuple[list[tuple[int, _Place]], tuple[int, ...]]:
    """Split what was found into steps to add and steps stored already; warn of what is neither."""
    known = set(stored)
    last = stored[-1] if stored else -1
    if found and found[-1][0] > MAX_STEP:
        raise OptionError(
            f"step {found[-1][0]} is larger than {MAX_STEP}; leave it out with --steps"
        )
    todo = [(step, path) for step, path in found if step > last]
    late = [step for step, _ in found if step <= last and step not in known]
    if late:
        before = max((step for step in stored if step < late[0]), default=0)
        warnings.warn(
            f"left out, because the store already goes to step {last}: "
            f"{describe_steps(tuple(late))}; to take them in, first drop --after {before}, "
            "then build again",
            RelexStreamWarning,
            stacklevel=2,
        )
    return todo, tuple(step for step, _ in found if step in known)


def steps_to_add(
    writer: StoreWriter,
    found: FoundRun,
    open_step: OpenStep,
    reader: CheckpointReader,
    base: SourceCheckpoint,
    *,
    cast: bool,
    replace_from: int | None,
    progress: Progress,
) -> tuple[list[tuple[int, Location]], tuple[int, ...]]:
    """Split what was found into steps to add and steps stored already, those replaced taken back.

    Raises
    ------
    TrajectoryError
        If stored steps are other ones than those found, and are not to be replaced.
    """
    store = writer.store
    if store is None:
        return split_found(found.checkpoints, ())
    kept = tuple(step for step in store.steps if replace_from is None or step < replace_from)
    todo, skipped = split_found(found.checkpoints, kept)
    if todo and skipped:
        again = [(step, path) for step, path in found.checkpoints if step in skipped]
        _refuse_fork(store, again, open_step, reader, base, cast=cast)
    if len(kept) == len(store.steps):
        return todo, skipped
    if not todo:
        raise OptionError(
            f"--replace-from {replace_from}: there are no steps from there on to put in the place "
            "of those stored; to take them back alone, use drop"
        )
    # Those that come instead must be ones that can: what is taken back is gone.
    last = kept[-1] if kept else 0
    opened = (open_step(path, step) for step, path in todo)
    for checkpoint in in_order(opened, last, found.there, cast=cast):
        match_checkpoint(checkpoint, store.manifest.tensors, "", cast=cast)
    dropped = writer.drop_after(last)
    progress.note(f"taken back, to be replaced: {describe_steps(dropped)}")
    return todo, skipped


def _refuse_fork(
    store: Store,
    again: Sequence[tuple[int, Location]],
    open_step: OpenStep,
    reader: CheckpointReader,
    base: SourceCheckpoint,
    *,
    cast: bool,
) -> None:
    """Refuse to go on where stored steps that are there `again` are other ones.

    The last of them is looked at: what is appended follows it.

    Raises
    ------
    TrajectoryError
        Naming the first step that differs.
    """

    def differs(step: int, path: Location) -> bool:
        return not is_stored(store, open_step(path, step), reader, base, cast=cast)

    if not differs(*again[-1]):
        return
    step, path = next((step, path) for step, path in again if differs(step, path))
    raise TrajectoryError(
        f"step {step} in {path} is not the one that is stored: the run was taken up again before "
        f"it (a fork). Give --replace-from {step} to take back the stored steps from there on and "
        "store these instead, or name another STORE"
    )
