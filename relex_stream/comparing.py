"""A stored step beside the checkpoint it was made from, compared bit by bit.

The step is decoded from the store, the checkpoint read anew, and what the system has in memory of
either is dropped first, so that it is the disks that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from relex_stream import planner
from relex_stream.base_weights import BaseWeights, open_base
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.blocks import (
    BlockOf,
    Blocks,
    Workspace,
    float_formats,
    float_pairs,
    model_shape,
    work_on_strips,
)
from relex_stream.errors import CorruptionError, SourceError, TrajectoryError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.locations import Location
from relex_stream.matching import CheckpointPlaces, kept_files, match_checkpoint
from relex_stream.pagecache import forget
from relex_stream.patches import Patches
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import (
    STEP_GROUP,
    NoProgress,
    Progress,
    SourceCheckpoint,
    WeightsFile,
)
from relex_stream.store import Store, arrays
from relex_stream.store.records import FileEntry, StoredTensor
from relex_stream.store.write import blob_name, recipe_of
from relex_stream.summaries import StagePlan
from relex_stream.ulp import Bits
from relex_stream.unpacking import unpack, unpacking_bytes
from relex_stream.warmup import warm_up_decoding


@dataclass
class _Found:
    compared_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @staticmethod
    def combine(parts: Iterable[_Found]) -> _Found:
        total = _Found()
        for part in parts:
            total.compared_bytes += part.compared_bytes
            total.problems += part.problems
        return total


@dataclass(frozen=True)
class Comparison:
    """What comparing a step with a checkpoint found.

    Attributes
    ----------
    step : int
    compared_bytes : int
        Bytes of the checkpoint's tensors and side files that were looked at.
    problems : tuple of str
        Empty if all of the checkpoint can be had from the store; else a line for each block, tensor
        or file that differs.
    """

    step: int
    compared_bytes: int
    problems: tuple[str, ...]


def compare_step(
    store: Store,
    source: SourceCheckpoint,
    *,
    base: Location | None = None,
    cast: bool = False,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a stored step with a checkpoint, bit for bit.

    Parameters
    ----------
    store : Store
    source : SourceCheckpoint
        Of a step that is in the store; opened just now, so that its headers are as they are, with
        the base's names.
    base : Path or Url, optional
        The base's directory, when it has moved.
    cast : bool
        Compare F32 weights that the store has in BF16 as rounded; else that is a difference.
    memory_limit : int, optional
        Bytes this process may hold.
    workers : int, optional
        Threads; one per core if not given.
    progress : Progress, optional

    Returns
    -------
    Comparison

    Raises
    ------
    OptionError
        If the step is not in the store.
    SourceError
        If the checkpoint changes meanwhile or cannot be read, or the base is not to be had.
    MemoryLimitError
        If the work does not fit in the memory limit.
    """
    progress = progress or NoProgress()
    row = store.row_of(source.step)
    commit = store.commit(row)
    problems: list[str] = []
    try:
        places = match_checkpoint(source, store.manifest.tensors, source.directory, cast=cast)
    except TrajectoryError as error:
        return Comparison(source.step, 0, (str(error),))
    side_bytes = _compare_files(
        store, source, commit.files, problems, is_cast=bool(places.is_cast.any())
    )
    executor = Threads(workers, memory_limit)
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    stage = StagePlan(
        name="compare",
        tasks=shape.blocks,
        read_bytes=source.nbytes + int(store.frame_bytes[: row + 1].sum(dtype=np.int64)),
        write_bytes=0,
        worker_bytes=planner.compare_worker_bytes(shape)
        if places.patch is None
        else max(
            planner.compare_worker_bytes(shape) + shape.largest_block_bytes,
            unpacking_bytes(shape.largest_block_bytes),
        ),
    )
    capacity = executor.prepare(warm_up_decoding, float_pairs(store.manifest.tensors), progress)
    plan = planner.make_plan(
        [stage], capacity, shared_bytes=planner.export_shared_bytes(shape, row + 1)
    )
    for path in source.weights_paths:
        forget(path)
    _forget_frames(store, row)
    with CheckpointReader() as reader:
        reader.expect(source)
        weights = open_base(store, base, reader)
        with unpack(
            store.path,
            [places],
            store.manifest.tensors,
            reader,
            workers=plan.workers,
            progress=progress,
        ) as patches:
            results: dict[Hashable, _Found] = executor.run(
                BlockComparison(store, weights, places, row, reader, patches),
                grouped(
                    (
                        tensor.index,
                        [BlockOf(tensor, block) for block in range(tensor.blocks)],
                        lambda at: at.elements * at.tensor.itemsize,
                    )
                    for tensor in _in_file_order(store, places)
                ),
                workers=plan.workers,
                name=f"compare step {source.step}",
                progress=progress,
            )
        reader.verify_unchanged(source.weights_paths)
    found = _Found.combine(results.values())
    return Comparison(
        source.step, side_bytes + found.compared_bytes, tuple(problems + found.problems)
    )


class BlockComparison(Stage[tuple[BlockOf, ...], None, _Found]):
    """Decodes blocks of one step and compares them with a checkpoint's.

    Parameters
    ----------
    store : Store
    base : BaseWeights
    places : CheckpointPlaces
        Of the checkpoint.
    row : int
        Of the step in the store.
    reader : CheckpointReader
        What the checkpoint is read with.
    patches : Patches
        What it changes of the one before, where it holds no more.
    """

    fetches = True

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        places: CheckpointPlaces,
        row: int,
        reader: CheckpointReader,
        patches: Patches,
    ) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._places = places
        self._row = row
        self._source = SourceBlocks(reader, [places], patches)
        self._heads_of: dict[str, list[StoredTensor]] = {}
        for tensor in store.manifest.tensors:
            if tensor.tied_to is not None and places.table.holds(tensor.index):
                self._heads_of.setdefault(tensor.tied_to, []).append(tensor)

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._store, self._base, self._row + 1, tasks)
        for at in (at for task in tasks for at in task):
            if self._places.table.holds(at.tensor.index):
                self._source.advise(at, 0)

    def work(self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]) -> list[_Found]:
        """Compare the blocks of each task; small tensors together."""
        compared = work_on_strips(tasks, float_formats, self._compare)
        return [_Found.combine(parts) for parts in compared]

    def combine(self, partials: list[_Found]) -> _Found:
        """Put together what was found."""
        return _Found.combine(partials)

    def finish(self, key: Hashable, value: None, total: _Found, *, last: bool) -> _Found:
        """Return what was found in a tensor."""
        return total

    def _compare(self, at: Blocks) -> list[_Found]:
        try:
            before = self._before(at)
            stored = self._decode(at, self._row + 1)
        except CorruptionError as error:
            if len(at.blocks) == 1:
                return [_Found(problems=[str(error)])]
            return [found for block in at.blocks for found in self._compare(block)]
        return [
            self._compare_block(
                block, stored[low:high], None if before is None else before[low:high]
            )
            for block, (low, high) in zip(at.blocks, pairwise(at.bounds), strict=True)
        ]

    def _before(self, at: Blocks) -> Bits | None:
        """Return the bits at the step before, where the checkpoint is made of that."""
        if self._places.patch is None:
            return None
        bits = self._decode(at, self._row)
        kept: Bits = self.of_thread(Workspace).array("before", bits.shape, bits.dtype)
        kept[:] = bits
        return kept

    def _decode(self, at: Blocks, rows: int) -> Bits:
        reader = BlockReader(self._store, self._base, self.of_thread(Workspace))
        bits = reader.base_bits(at)
        if at.blocks[0].tensor.kind == "tracked":
            bits = reader.bits_at(at, bits, rows)
        return bits

    def _compare_block(self, at: BlockOf, stored: Bits, before: Bits | None) -> _Found:
        """Compare a block with its tensor, with what is tied to that, and with copies."""
        found = _Found()
        workspace = self.of_thread(Workspace)
        there = workspace.array("compared", at.elements, stored.dtype)
        is_told = before is not None or self._places.table.holds(at.tensor.index)
        held = [at.tensor] if is_told else []
        for tensor in (*held, *self._heads_of.get(at.tensor.name, ())):
            self._source.read(at, 0, there, workspace, tensor, before)
            self._note(found, at, tensor, 0, stored, there)
        for first, bits in self._source.copies(at, 0, workspace):
            self._note(found, at, at.tensor, first, stored[first : first + bits.size], bits)
        return found

    def _note(
        self,
        found: _Found,
        at: BlockOf,
        tensor: StoredTensor,
        first: int,
        stored: Bits,
        there: Bits,
    ) -> None:
        """Note what was compared, from element `first` of the block on, and how it differs."""
        found.compared_bytes += there.nbytes
        if np.array_equal(stored, there):
            return
        differ = np.flatnonzero(stored != there)
        path = self._source.path_of(tensor, 0)
        found.problems.append(
            f"step {self._places.step}: tensor {tensor.name}, block {at.block}: {differ.size} of "
            f"{at.elements} elements are not as in {path}, the first is "
            f"element {at.start + first + int(differ[0])}"
        )


def _in_file_order(store: Store, places: CheckpointPlaces) -> list[StoredTensor]:
    """Return the tensors that have blocks, as they lie in the checkpoint."""

    def place_of(tensor: StoredTensor) -> tuple[int, int]:
        held = places.table.holds(tensor.index)
        return places.table.first_place(tensor.index) if held else (-1, tensor.index)

    return sorted((tensor for tensor in store.manifest.tensors if tensor.blocks), key=place_of)


def _compare_files(
    store: Store,
    source: SourceCheckpoint,
    entries: Sequence[FileEntry],
    problems: list[str],
    *,
    is_cast: bool,
) -> int:
    """Compare side files by content, weights files by what they are put together from."""
    stored = {entry.path: entry for entry in entries}
    where = f"step {source.step}: {source.directory}"
    compared = 0

    def check(path: str, same: Callable[[FileEntry], bool]) -> None:
        entry = stored.pop(path, None)
        if entry is None:
            problems.append(f"{where} has file {path}, which is not in the store")
            return
        try:
            if not same(entry):
                problems.append(f"{where}: file {path} differs from the one in the store")
        except CorruptionError as error:
            problems.append(f"step {source.step}: file {path}: {error}")

    weights_files, side_files = kept_files(source, is_cast=is_cast)
    for file in weights_files:
        check(file.relative_path, partial(_is_made_of, store, file))
    for name in side_files:
        path = Path(source.directory) / name
        forget(str(path))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(
                f"{path}: cannot be read: {error.strerror}; check that it is still there"
            ) from error
        compared += len(data)
        check(name, partial(_has_content, store, data))
    problems += [f"{where} has no file {path}, which is in the store" for path in sorted(stored)]
    return compared


def _has_content(store: Store, data: bytes, entry: FileEntry) -> bool:
    return entry.recipe is None and entry.blob is not None and store.blob(entry.blob) == data


def _is_made_of(store: Store, file: WeightsFile, entry: FileEntry) -> bool:
    """Say whether the store puts a weights file together from the same parts."""
    if entry.recipe is None or entry.size != file.size:
        return False
    parts, literals = recipe_of(file, blob_name)
    if store.recipe(entry) != parts or (literals is None) != (entry.blob is None):
        return False
    for part in parts:
        if part.blob is not None:
            store.blob(part.blob)  # is there, and has that checksum
    # By what is packed, not how: another version of zlib may pack the same in other bytes.
    return literals is None or store.literals(entry) == literals


def _forget_frames(store: Store, row: int) -> None:
    """Have the frames that were written for a row read from the disk."""
    sizes = store.frame_bytes[row]
    for tensor in store.manifest.tensors:
        for block in range(tensor.blocks):
            if sizes[tensor.first_block + block]:
                key = arrays.chunk_key(arrays.DELTAS, tensor, row // STEP_GROUP, block)
                forget(f"{store.path}/{key}")
