"""Which of the steps that were found go into a store: those that follow what it has, of its run.

Steps are only ever put behind the stored ones. That they belong there is checked before anything is
written.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from relex_stream.chains import in_order
from relex_stream.errors import OptionError, RelexStreamWarning, SourceError, TrajectoryError
from relex_stream.forks import is_stored, refuse_other_base
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
    SourceError
        If steps are to be replaced over another base than the store's.
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
    refuse_other_base(store, base, reader)
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

    The last of them that can be opened is looked at: what is appended follows it. Of the others the
    weights are gone, and perhaps not all that lay beside them.

    Raises
    ------
    TrajectoryError
        Naming the first step that differs.
    """

    def opened(steps: Iterable[tuple[int, Location]]) -> Iterator[SourceCheckpoint]:
        for step, path in steps:
            with contextlib.suppress(SourceError):
                yield open_step(path, step)

    def differs(checkpoint: SourceCheckpoint) -> bool:
        return not is_stored(store, checkpoint, reader, base, cast=cast)

    last = next(opened(reversed(again)), None)
    if last is None or not differs(last):
        return
    first = next(checkpoint for checkpoint in opened(again) if differs(checkpoint))
    step = first.step
    raise TrajectoryError(
        f"step {step} in {first.directory} is not the one that is stored: the run was taken up "
        f"again before it (a fork). Give --replace-from {step} to take back the stored steps from "
        "there on and store these instead, or name another STORE"
    )
