"""Checkpoints into a store: match them to the base, ingest in batches, commit each batch.

Statistics of a tensor are summed over its blocks in a fixed order. Only when all blocks of a batch
are on the disk is it committed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from relex_stream import machine, planner
from relex_stream.base_weights import BaseWeights, check_base_layout
from relex_stream.blocks import BlockOf, float_pairs, model_shape
from relex_stream.cast_savings import cast_savings
from relex_stream.chains import in_order
from relex_stream.digests import check_digests
from relex_stream.errors import (
    OptionError,
    RelexStreamWarning,
    SourceError,
    StoreError,
    TrajectoryError,
)
from relex_stream.forks import is_stored
from relex_stream.graph import Executor, grouped, open_executor
from relex_stream.ingest import Ingest, TensorResult
from relex_stream.listing import read_file
from relex_stream.locations import Location, lies_in, location, relative_to
from relex_stream.matching import CheckpointPlaces, describe_tensors, kept_files, match_checkpoint
from relex_stream.patches import Patches
from relex_stream.sketch import SKETCH_MIN_ELEMENTS, SKETCH_WIDTH
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import (
    CheckpointReader,
    FoundRun,
    Naming,
    Phase,
    find_run,
    open_checkpoint,
    parse_steps,
)
from relex_stream.specs import BLOCK_BYTES, NoProgress, Progress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.store.read import describe_steps
from relex_stream.store.records import (
    MAX_BLOCK_BYTES,
    MAX_STEP,
    Commit,
    FileEntry,
    Manifest,
    StoredTensor,
    place_tensors,
)
from relex_stream.summaries import BuildSummary, CastSavings, Plan, StagePlan
from relex_stream.unpacking import unpack, unpacking_bytes
from relex_stream.warmup import warm_up_encoding

_Place = TypeVar("_Place")


def build(
    base: Location,
    checkpoints: Location,
    store: Location,
    *,
    pattern: str | None,
    steps: str | None,
    source: str = "auto",
    strip_prefix: str | None = None,
    map_names: Sequence[tuple[str, str]] = (),
    memory_limit: int | None,
    workers: int | None,
    include_base: bool,
    allow_nonfinite: bool,
    seed: int,
    cast: str | None = None,
    replace_from: int | None = None,
    step_offset: int = 0,
    then: Sequence[tuple[Location, int]] = (),
    scheduler: str | None = None,
    local_cluster: int | None = None,
    progress: Progress | None,
    block_bytes: int = BLOCK_BYTES,
    sketch_min_elements: int = SKETCH_MIN_ELEMENTS,
    commit_steps: int | None = None,
) -> BuildSummary:
    """Build a store or append to it; `relex_stream.api.build_store` says what the arguments are.

    Parameters
    ----------
    block_bytes : int
        Bytes of a block at one step, a multiple of 8 (new stores only).
    sketch_min_elements : int
        Tensors with fewer weights keep no sketch (new stores only).
    commit_steps : int, optional
        Steps per commit at most; the planner chooses if not given.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    _check_options(block_bytes, seed, workers, cast)
    if scheduler is not None or local_cluster is not None:
        # Workers have working directories of their own.
        base, checkpoints, store = base.absolute(), checkpoints.absolute(), store.absolute()
        then = [(path.absolute(), offset) for path, offset in then]
    _refuse_overlap(base, [checkpoints, *(path for path, _ in then)], store)
    selection = parse_steps(steps) if steps is not None else None
    base_checkpoint = open_checkpoint(base, 0)
    naming = Naming(frozenset(base_checkpoint.tensors), strip_prefix, tuple(map_names))
    phases = [Phase(checkpoints, step_offset), *(Phase(*phase) for phase in then)]
    found = find_run(phases, pattern, selection, source, replace_from, _stored_steps(store))
    with (
        StoreWriter(store) as writer,
        CheckpointReader() as reader,
        open_executor(
            scheduler=scheduler,
            local_cluster=local_cluster,
            workers=workers,
            memory_limit=memory_limit,
            progress=progress,
        ) as executor,
    ):
        todo, skipped = _steps_to_add(
            writer,
            found,
            partial(found.open, naming=naming),
            reader,
            base_checkpoint,
            cast=bool(cast),
            replace_from=replace_from,
            progress=progress,
        )
        committed = writer.store
        opened = in_order(
            (found.open(path, step, naming) for step, path in todo),
            committed.steps[-1] if committed and committed.steps else 0,
            found.there,
            cast=bool(cast),
            is_local=executor.is_local,
        )
        seed, include_base = _settled_options(committed, seed, include_base=include_base)
        if committed is not None:
            check_base_layout(committed, base_checkpoint)
            tensors, block_bytes = committed.manifest.tensors, committed.manifest.block_bytes
            sketch_width = committed.manifest.sketch_width
        elif todo:
            first = next(opened)
            opened = chain([first], opened)
            tensors, _ = place_tensors(
                describe_tensors(base_checkpoint, first, sketch_min_elements, cast=bool(cast)),
                block_bytes,
            )
            sketch_width = SKETCH_WIDTH
        else:
            raise SourceError(f"{checkpoints} holds no checkpoints to store")
        reader.expect(base_checkpoint)
        bytes_before = committed.stored_bytes() if committed else 0
        places: list[CheckpointPlaces] = []
        files = {}
        for checkpoint in opened:
            before = places[-1] if places else None
            name = _name_in(checkpoints, location(checkpoint.directory))
            matched = match_checkpoint(checkpoint, tensors, name, before, cast=bool(cast))
            places.append(matched)
            # Now, and not when its batch is committed: it would have to be opened again.
            files[checkpoint.step] = _keep_files(
                writer, checkpoint, is_cast=bool(matched.is_cast.any())
            )
            reader.expect(checkpoint)
        shape = model_shape(tensors, sketch_width)
        capacity = executor.prepare(
            warm_up_encoding if places else _warm_up_nothing, float_pairs(tensors), progress
        )
        last = [location(place.directory) for place in places[-1:]]
        executor.check_sees([base, *last, store])
        job = _Job(
            writer=writer,
            reader=reader,
            executor=executor,
            tensors=tensors,
            shape=shape,
            block_bytes=block_bytes,
            files=files,
            base_checkpoint=base_checkpoint,
            base_hint=_relative_hint(base, store),
            seed=seed,
            include_base=include_base,
            allow_nonfinite=allow_nonfinite,
            capacity=capacity,
            progress=progress,
        )
        plan = job.plan(places, commit_steps=commit_steps)
        if places and (idle := planner.idle_workers(plan, capacity)):
            progress.note(idle)
        added = job.run(places, plan, commit_steps)
        finished = writer.store
        assert finished is not None
        return _summary(
            finished,
            savings=cast_savings(finished, places, reader),
            layout=found.layout,
            added=added,
            skipped=skipped,
            places=places,
            plan=plan,
            bytes_before=bytes_before,
            peak_bytes=executor.peak_bytes(),
            elapsed_s=time.monotonic() - started,
        )


def _stored_steps(path: Location) -> tuple[int, ...]:
    """Return the steps of a store that may be there; whether it is one is for its writer to say."""
    try:
        return Store(path).steps
    except StoreError:
        return ()


def _check_options(block_bytes: int, seed: int, workers: int | None, cast: str | None) -> None:
    if cast not in (None, "bf16"):
        raise OptionError(f"--as must be bf16, not {cast}")
    if not 8 <= block_bytes <= MAX_BLOCK_BYTES or block_bytes % 8:
        raise OptionError(
            f"a block must be a multiple of 8 bytes up to {MAX_BLOCK_BYTES}, not {block_bytes}"
        )
    if not 0 <= seed < 1 << 63:
        raise OptionError(f"--seed must be from 0 to 2^63 - 1, not {seed}")
    if workers is not None:
        machine.wanted_workers(workers)


def _refuse_overlap(base: Location, checkpoints: Sequence[Location], store: Location) -> None:
    inside = store.resolve()
    for what, path in (("BASE", base), *(("CHECKPOINTS", path) for path in checkpoints)):
        source = path.resolve()
        if inside == source:
            raise OptionError(
                f"STORE and {what} are the same directory, {path}; name another STORE"
            )
    if lies_in(inside, base.resolve()):
        raise OptionError(f"STORE {store} lies inside BASE {base}; name a place outside it")


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


OpenStep = Callable[[Location, int], SourceCheckpoint]


def _steps_to_add(
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


def _settled_options(store: Store | None, seed: int, *, include_base: bool) -> tuple[int, bool]:
    """Return seed and include_base as the store has them; an append cannot change them."""
    if store is None:
        return seed, include_base
    if include_base and not store.manifest.base_included:
        warnings.warn(
            "--include-base is left out: the store was begun without the base's weights; "
            "build a new one to have them",
            RelexStreamWarning,
            stacklevel=2,
        )
    if seed not in (0, store.manifest.seed):
        warnings.warn(
            f"--seed {seed} is left out: the store was begun with {store.manifest.seed}",
            RelexStreamWarning,
            stacklevel=2,
        )
    return store.manifest.seed, store.manifest.base_included


def _name_in(checkpoints: Location, path: Location) -> str:
    return Path(relative_to(path, checkpoints)).as_posix()


def _keep_files(
    writer: StoreWriter, checkpoint: SourceCheckpoint, *, is_cast: bool = False
) -> tuple[FileEntry, ...]:
    """Keep recipes of weights files that can be put together again, and the side files."""
    weights_files, side_files = kept_files(checkpoint, is_cast=is_cast)
    entries = [writer.put_weights_file(file) for file in weights_files]
    for name in side_files:
        data = read_file(location(checkpoint.directory) / name)
        entries.append(writer.put_side_file(name, data))
    return tuple(entries)


def _relative_hint(base: Location, store: Location) -> str:
    return relative_to(base.resolve(), store.resolve())


def _warm_up_nothing(_: object, __: Progress) -> None:
    pass


class _Added(NamedTuple):
    """A step that was committed, and the sums over its blocks that the summary tells."""

    step: int
    changed: int
    frame_bytes: int

    @classmethod
    def of(cls, commit: Commit) -> _Added:
        return cls(
            commit.step,
            int(commit.changed.sum(dtype=np.int64)),
            int(commit.frame_bytes.sum(dtype=np.int64)),
        )


@dataclass(frozen=True)
class _Job:
    """A build with its options settled."""

    writer: StoreWriter
    reader: CheckpointReader
    executor: Executor
    tensors: tuple[StoredTensor, ...]
    shape: planner.ModelShape
    block_bytes: int
    files: Mapping[int, tuple[FileEntry, ...]]  # by step, as kept
    base_checkpoint: SourceCheckpoint
    base_hint: str
    seed: int
    include_base: bool
    allow_nonfinite: bool
    capacity: planner.Capacity
    progress: Progress

    @property
    def _rows(self) -> int:
        return len(self.writer.store.steps) if self.writer.store else 0

    def _batch_steps(
        self, places: Sequence[CheckpointPlaces], rows: int, commit_steps: int | None
    ) -> int:
        steps = planner.commit_batch(
            self.shape,
            places[0].nbytes,
            rows,
            len(places),
            planner.statistics_bytes(self.capacity.memory_limit_bytes),
            self.capacity.processes,
        )
        return min(steps, commit_steps) if commit_steps else steps

    def plan(self, places: Sequence[CheckpointPlaces], *, commit_steps: int | None) -> Plan:
        """Project the memory of the widest batch."""
        steps = self._batch_steps(places, self._rows, commit_steps) if places else 0
        later = self._batch_steps(places, 0, commit_steps) if places else 0
        widest = max(steps, later)
        stage = StagePlan(
            name="encode",
            tasks=self.shape.blocks,
            read_bytes=sum(place.nbytes for place in places) + self.base_checkpoint.nbytes,
            write_bytes=0,
            worker_bytes=max(
                planner.ingest_worker_bytes(self.shape, widest),
                unpacking_bytes(self.shape.largest_block_bytes),
            ),
        )
        shared = planner.ingest_shared_bytes(
            self.shape,
            widest,
            self._rows + len(places),
            max((tensor.blocks for tensor in self.tensors), default=0),
            max((place.table.file.size for place in places), default=0),
            sum(place.patch is not None for place in places),
        )
        shared += self.writer.transfer_bytes + self.reader.reading_bytes
        return planner.make_plan([stage], self.capacity, shared_bytes=shared)

    def run(
        self, places: Sequence[CheckpointPlaces], plan: Plan, commit_steps: int | None
    ) -> list[_Added]:
        """Ingest and commit batch by batch; return the steps added."""
        added: list[_Added] = []
        while places:
            steps = self._batch_steps(places, self._rows, commit_steps)
            batch, places = places[:steps], places[steps:]
            with self._unpack(batch, plan.workers) as patches:
                # What it has no room for comes next.
                places = [*batch[patches.steps :], *places]
                batch = batch[: patches.steps]
                added += map(_Added.of, self._ingest_batch(batch, patches, plan.workers))
        return added

    def _unpack(self, batch: Sequence[CheckpointPlaces], workers: int) -> Patches:
        reader = self.reader.limited_to({path for place in batch for path in place.files})
        return unpack(
            self.writer.path, batch, self.tensors, reader, workers=workers, progress=self.progress
        )

    def _ingest_batch(
        self, batch: Sequence[CheckpointPlaces], patches: Patches, workers: int
    ) -> list[Commit]:
        store, rows = self.writer.store, self._rows
        self.writer.allocate(self.tensors, rows + len(batch), include_base=self.include_base)
        files = {path for place in batch for path in place.files}
        files.update(self.base_checkpoint.weights_paths)
        with self.reader.limited_to(files) as reader:
            check_digests(
                self.executor,
                batch,
                self.tensors,
                SourceBlocks(reader, batch, patches),
                store=store,
                base=BaseWeights(store, self.base_checkpoint, reader),
                workers=workers,
                progress=self.progress,
            )
            results = self._encode(batch, patches, reader, workers)
            reader.verify_unchanged(files)
        manifest = store.manifest if store else self._manifest(results)
        commits = self._commits(batch, results)
        self.writer.commit(manifest, commits)
        for commit in commits:
            if not commit.changed.any():
                before = self.writer.store.steps[commit.row - 1] if commit.row else 0  # type: ignore[union-attr]
                warnings.warn(
                    f"step {commit.step} has the same weights as step {before}, bit for bit; "
                    "did training stop there? Leave such steps out of a fit with --history-steps",
                    RelexStreamWarning,
                    stacklevel=2,
                )
        return commits

    def _encode(
        self,
        batch: Sequence[CheckpointPlaces],
        patches: Patches,
        reader: CheckpointReader,
        workers: int,
    ) -> dict[int, TensorResult]:
        """Write the frames of a batch; return what is to be told of them, by tensor."""
        store = self.writer.store
        ingest = Ingest(
            root=self.writer.path,
            fence=self.writer.fence,
            store=store,
            base=BaseWeights(store, self.base_checkpoint, reader),
            reader=reader,
            checkpoints=batch,
            patches=patches if patches.nbytes else None,
            seed=self.seed,
            sketch_width=self.shape.sketch_width,
            allow_nonfinite=self.allow_nonfinite,
            include_base=self.include_base and store is None,
            tied_tensors=[tensor for tensor in self.tensors if tensor.kind == "tied"],
        )
        first = batch[0]
        # As they lie in the files: what the system reads ahead is then wanted next.
        by_place = sorted(
            (tensor for tensor in self.tensors if tensor.blocks),
            key=lambda tensor: first.table.first_place(tensor.index),
        )
        groups = grouped(
            (
                tensor.index,
                [BlockOf(tensor, block) for block in range(tensor.blocks)],
                lambda at: at.elements * at.tensor.itemsize * len(batch),
            )
            for tensor in by_place
        )
        steps = f"steps {batch[0].step} to {batch[-1].step}"
        results: dict[int, TensorResult] = self.executor.run(
            ingest,
            groups,
            workers=workers,
            name=f"encode {steps}" if len(batch) > 1 else f"encode step {batch[0].step}",
            progress=self.progress,
        )
        return results

    def _manifest(self, results: dict[int, TensorResult]) -> Manifest:
        blocks = self.shape.blocks
        base_crc, base_frame_bytes = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
        for tensor in self.tensors:
            if tensor.blocks:
                columns = slice(tensor.first_block, tensor.first_block + tensor.blocks)
                result = results[tensor.index]
                base_crc[columns] = result.base_crc
                base_frame_bytes[columns] = result.base_frame_bytes
        return Manifest(
            tensors=self.tensors,
            block_bytes=self.block_bytes,
            seed=self.seed,
            sketch_width=self.shape.sketch_width,
            base_hint=self.base_hint,
            base_files=_keep_files(self.writer, self.base_checkpoint),
            base_crc=base_crc,
            base_included=self.include_base,
            base_frame_bytes=base_frame_bytes,
        )

    def _commits(
        self,
        batch: Sequence[CheckpointPlaces],
        results: dict[int, TensorResult],
    ) -> list[Commit]:
        shape, rows, steps = self.shape, self._rows, len(batch)
        store = self.writer.store
        tables = {
            name: np.zeros((steps, shape.blocks), np.uint32)
            for name in ("frame_bytes", "frame_crc", "changed", "source_crc")
        }
        change_sq = np.zeros((steps, shape.tensors))
        growth = np.zeros((steps, shape.tensors))
        sketch = np.zeros((steps, shape.sketched, shape.sketch_width), np.float16)
        scale = np.zeros((steps, shape.sketched), np.float32)
        nonfinite = np.zeros(steps, np.bool_)
        # All steps of a tensor at once: tensors may be very many.
        for tensor in self.tensors:
            if not tensor.blocks:
                continue
            result = results[tensor.index]
            columns = slice(tensor.first_block, tensor.first_block + tensor.blocks)
            for name, table in tables.items():
                table[:, columns] = getattr(result, name)
            change_sq[:, tensor.index] = result.change_sq
            growth[:, tensor.index] = result.delta_sq_growth
            nonfinite |= result.nonfinite
            if result.packed_sketch is not None:
                sketch[:, tensor.sketch_row] = result.packed_sketch
                scale[:, tensor.sketch_row] = result.sketch_scale
        delta_sq = store.delta_sq[rows - 1] if store and rows else np.zeros(shape.tensors)
        commits = []
        for index, place in enumerate(batch):
            # A sum of growths may end a rounding below zero where all deltas went back to zero.
            delta_sq = np.maximum(delta_sq + growth[index], 0.0)
            commits.append(
                Commit(
                    step=place.step,
                    row=rows + index,
                    previous="",
                    source=place.name,
                    source_bytes=place.nbytes,
                    files=self.files[place.step],
                    nonfinite=bool(nonfinite[index]),
                    change_sq=change_sq[index],
                    delta_sq=delta_sq,
                    sketch=sketch[index],
                    sketch_scale=scale[index],
                    **{name: table[index] for name, table in tables.items()},
                )
            )
        return commits


def _summary(
    store: Store,
    *,
    savings: CastSavings | None,
    layout: str,
    added: Sequence[_Added],
    skipped: tuple[int, ...],
    places: Sequence[CheckpointPlaces],
    plan: Plan,
    bytes_before: int,
    peak_bytes: int,
    elapsed_s: float,
) -> BuildSummary:
    changed = sum(step.changed for step in added)
    frame_bytes = sum(step.frame_bytes for step in added)
    bytes_in = sum(place.nbytes for place in places)
    base_bytes = int(store.manifest.base_frame_bytes.sum(dtype=np.int64))
    store_bytes = store.stored_bytes()
    bytes_stored = store_bytes - (bytes_before or base_bytes)
    return BuildSummary(
        store=str(store.path),
        layout=layout,
        steps_added=tuple(step.step for step in added),
        steps_skipped=skipped,
        steps_total=len(store.steps),
        bytes_in=bytes_in,
        bytes_stored=bytes_stored,
        base_bytes_stored=base_bytes,
        store_bytes=store_bytes,
        ratio=bytes_in / bytes_stored if bytes_stored else 0.0,
        changed_weights=changed,
        bits_per_changed_weight=8 * frame_bytes / changed if changed else 0.0,
        skipped_files=tuple(sorted({name for place in places for name in place.skipped_files})),
        cast_savings=savings,
        peak_memory_bytes=peak_bytes,
        elapsed_s=elapsed_s,
        plan=plan,
    )
