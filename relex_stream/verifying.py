"""Verify: the checksums of a store, its steps beside their checkpoints, and repair from those."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from relex_stream.base_weights import base_directory, check_base_layout
from relex_stream.comparing import compare_step
from relex_stream.errors import CorruptionError, OptionError, SourceError, TrajectoryError
from relex_stream.listing import is_directory
from relex_stream.locations import Location
from relex_stream.matching import CheckpointPlaces, match_checkpoint
from relex_stream.repairing import Remains, Repairs, repair_store
from relex_stream.sources import (
    CheckpointReader,
    FoundRun,
    Naming,
    Phase,
    find_run,
    open_checkpoint,
)
from relex_stream.specs import NoProgress, Progress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.summaries import VerifySummary
from relex_stream.verification import Damage, check_store

_ROUNDS = 3
"""Of repairs: what a damaged recipe names is known only once it is there again."""


@dataclass(frozen=True)
class Against:
    """Checkpoints that are still there, and how they are to be read, as for `build`."""

    phases: tuple[Phase, ...]
    pattern: str | None = None
    source: str = "auto"
    strip_prefix: str | None = None
    map_names: Sequence[tuple[str, str]] = ()
    cast: bool = False


@dataclass(frozen=True)
class _Options:
    base: Location | None
    memory_limit: int | None
    workers: int | None
    progress: Progress


def verify(
    path: Location,
    *,
    base: Location | None = None,
    against: Against | None = None,
    repair: bool = False,
    dry_run: bool = False,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifySummary:
    """Check a store; `relex_stream.api.verify` says what the arguments are."""
    if dry_run and not repair:
        raise OptionError("--dry-run says what --repair would do; give --repair too")
    started = time.monotonic()
    options = _Options(base, memory_limit, workers, progress or NoProgress())
    store = Store(path)
    sources = _Sources(store, against) if against is not None else None
    if repair:
        checked = _repair(path, sources, options, dry_run=dry_run)
    else:
        checked, _ = _check(store, options)
    if sources is not None:
        checked = _compare(Store(path), sources, options, checked)
    return replace(checked, elapsed_s=time.monotonic() - started)


class _Sources:
    """The checkpoints of stored steps that are there."""

    def __init__(self, store: Store, against: Against) -> None:
        self.cast = against.cast
        self.notes: list[str] = []
        self._found: FoundRun = find_run(
            against.phases, against.pattern, None, against.source, None, may_lack=store.steps
        )
        names = frozenset(tensor.name for tensor in store.manifest.tensors)
        self._naming = Naming(names, against.strip_prefix, tuple(against.map_names))
        self._stored = store.steps

    def opened(self) -> Iterator[SourceCheckpoint]:
        """Yield them in the order of steps, each opened just then; note those that cannot be."""
        for step, where in self._found.checkpoints:
            if step not in self._stored:
                continue
            try:
                yield self._found.open(where, step, self._naming)
            except SourceError as error:
                self.note(step, error)

    def note(self, step: int, error: Exception) -> None:
        """Say of a step why its checkpoint is of no use."""
        text = f"the checkpoint of step {step} is left out: {error}"
        if text not in self.notes:
            self.notes.append(text)


def _check(store: Store, options: _Options) -> tuple[VerifySummary, Damage]:
    return check_store(store, base=options.base, workers=options.workers, progress=options.progress)


def _compare(
    store: Store, sources: _Sources, options: _Options, checked: VerifySummary
) -> VerifySummary:
    """Compare all steps whose checkpoints are there."""
    compared: list[int] = []
    problems = list(checked.problems)
    compared_bytes = 0
    for source in sources.opened():
        try:
            comparison = compare_step(
                store,
                source,
                base=options.base,
                cast=sources.cast,
                memory_limit=options.memory_limit,
                workers=options.workers,
                progress=options.progress,
            )
        except CorruptionError as error:
            problems.append(f"step {source.step} was not compared: {error}")
            continue
        compared.append(source.step)
        compared_bytes += comparison.compared_bytes
        problems += comparison.problems
    return replace(
        checked,
        # A damaged frame is met again by each step behind it.
        problems=tuple(dict.fromkeys(problems)),
        compared=tuple(compared),
        not_compared=tuple(step for step in store.steps if step not in compared),
        compared_bytes=compared_bytes,
        notes=tuple(sources.notes),
    )


def _repair(
    path: Location, sources: _Sources | None, options: _Options, *, dry_run: bool
) -> VerifySummary:
    """Repair until nothing more can be; return what is found then, and all that was done."""
    total = Repairs()
    with StoreWriter(path, sweep=False) as writer:
        for _ in range(_ROUNDS):
            assert writer.store is not None
            checked, damage = _check(writer.store, options)
            if not damage:
                break
            with _remains(writer.store, sources, options) as remains:
                done = repair_store(
                    writer,
                    damage,
                    remains,
                    workers=options.workers,
                    progress=options.progress,
                    dry_run=dry_run,
                )
            total = Repairs(total.rebuilt | done.rebuilt, done.failed)
            if dry_run or not done.rebuilt:
                break
        else:
            assert writer.store is not None
            checked, _ = _check(writer.store, options)
        if writer.unswept and not dry_run:
            writer.sweep()
    return replace(
        checked,
        problems=(*checked.problems, *total.failed),
        repaired=tuple(sorted(total.rebuilt)),
    )


@contextlib.contextmanager
def _remains(store: Store, sources: _Sources | None, options: _Options) -> Iterator[Remains]:
    """Open what is left of the base and of the checkpoints of stored steps."""
    with CheckpointReader() as reader:
        checkpoints: list[SourceCheckpoint] = []
        places: list[CheckpointPlaces] = []
        for checkpoint in sources.opened() if sources is not None else ():
            assert sources is not None
            try:
                matched = match_checkpoint(
                    checkpoint,
                    store.manifest.tensors,
                    checkpoint.directory,
                    places[-1] if places else None,
                    cast=sources.cast,
                )
            except (SourceError, TrajectoryError) as error:
                sources.note(checkpoint.step, error)
                continue
            reader.expect(checkpoint)
            checkpoints.append(checkpoint)
            places.append(matched)
        yield Remains(reader, _base(store, options.base, reader), checkpoints, places)


def _base(store: Store, base: Location | None, reader: CheckpointReader) -> SourceCheckpoint | None:
    """Open the base's directory, where there is one."""
    directory = base_directory(store, base)
    if directory is None or not is_directory(directory):
        if base is not None:
            raise SourceError(f"no base at {base} (given with --base); give its directory")
        return None
    checkpoint = open_checkpoint(directory, 0)
    check_base_layout(store, checkpoint)
    reader.expect(checkpoint)
    return checkpoint
