"""A stored step beside the checkpoint it was made from, compared bit by bit.

The step is decoded from the store, the checkpoint read anew, and what the system has in memory of
either is dropped first, so that it is the disks that are compared.
"""

from __future__ import annotations

import hashlib
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
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.pagecache import forget
from relex_stream.sources import CheckpointReader
from relex_stream.specs import (
    STEP_GROUP,
    NoProgress,
    Progress,
    SourceCheckpoint,
    TensorPlace,
    WeightsFile,
    joined_pieces,
)
from relex_stream.store import Store, arrays
from relex_stream.store.records import FileEntry, StoredTensor
from relex_stream.summaries import StagePlan
from relex_stream.ulp import Bits
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
    base: Path | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a stored step with a checkpoint, bit for bit.

    Parameters
    ----------
    store : Store
    source : SourceCheckpoint
        Of a step that is in the store; opened just now, so that its headers are as they are.
    base : Path, optional
        The base's directory, when it has moved.
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
    side_bytes = _compare_files(store, source, commit.files, problems)
    tensors = _comparable(store, source, problems)
    executor = Threads(workers, memory_limit)
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    stage = StagePlan(
        name="compare",
        tasks=shape.blocks,
        read_bytes=source.nbytes + int(store.frame_bytes[: row + 1].sum(dtype=np.int64)),
        write_bytes=0,
        worker_bytes=planner.compare_worker_bytes(shape),
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
        results: dict[Hashable, _Found] = executor.run(
            BlockComparison(store, open_base(store, base, reader), source, row, reader),
            grouped(
                (
                    tensor.index,
                    [BlockOf(tensor, block) for block in range(tensor.blocks)],
                    lambda at: at.elements * at.tensor.itemsize,
                )
                for tensor in tensors
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
    source : SourceCheckpoint
        Holds each block's tensor, in the store's dtype, or one that is tied to it.
    row : int
        Of the step in the store.
    reader : CheckpointReader
        What the checkpoint is read with.
    """

    fetches = True

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        source: SourceCheckpoint,
        row: int,
        reader: CheckpointReader,
    ) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._source = source
        self._row = row
        self._reader = reader
        self._heads_of = _heads_in(store, source)

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._store, self._base, self._row + 1, tasks)

    def work(self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]) -> list[_Found]:
        """Compare the blocks of each task; small tensors together."""
        compared = work_on_strips(tasks, self._kind_of, self._compare)
        return [_Found.combine(parts) for parts in compared]

    def combine(self, partials: list[_Found]) -> _Found:
        """Put together what was found."""
        return _Found.combine(partials)

    def finish(self, key: Hashable, value: None, total: _Found, *, last: bool) -> _Found:
        """Return what was found in a tensor."""
        return total

    def _compare(self, at: Blocks) -> list[_Found]:
        try:
            stored = self._decode(at)
        except CorruptionError as error:
            if len(at.blocks) == 1:
                return [_Found(problems=[str(error)])]
            return [found for block in at.blocks for found in self._compare(block)]
        found = [_Found() for _ in at.blocks]
        for names in self._names_of(at):
            self._compare_with(at, stored, names, found)
        return found

    def _kind_of(self, at: BlockOf) -> Hashable:
        # What is compared with another tensor than its own must be alone.
        return None if at.tensor.name in self._heads_of else float_formats(at)

    def _names_of(self, at: Blocks) -> list[list[str]]:
        """Return lists of tensors in the checkpoint, one for each block, to compare with."""
        own = [block.tensor.name for block in at.blocks]
        heads = [[head] for head in self._heads_of.get(own[0], ())]
        return [own, *heads] if own[0] in self._source.tensors else heads

    def _decode(self, at: Blocks) -> Bits:
        reader = BlockReader(self._store, self._base, self.of_thread(Workspace))
        bits = reader.base_bits(at)
        if at.blocks[0].tensor.kind == "tracked":
            bits = reader.bits_at(at, bits, self._row + 1)
        return bits

    def _compare_with(
        self, at: Blocks, stored: Bits, names: Sequence[str], found: Sequence[_Found]
    ) -> None:
        places = [self._source.tensors[name] for name in names]
        there = self._read(at, places, stored.dtype)
        if np.array_equal(stored, there):
            for here, block in zip(found, at.blocks, strict=True):
                here.compared_bytes += block.elements * stored.itemsize
            return
        for here, block, place, (low, high) in zip(
            found, at.blocks, places, pairwise(at.bounds), strict=True
        ):
            here.compared_bytes += block.elements * stored.itemsize
            differ = np.flatnonzero(stored[low:high] != there[low:high])
            if differ.size:
                here.problems.append(
                    f"step {self._source.step}: tensor {place.spec.name}, block {block.block}: "
                    f"{differ.size} of {block.elements} elements are not as in {place.path}, the "
                    f"first is element {block.start + int(differ[0])}"
                )

    def _read(
        self, at: Blocks, places: Sequence[TensorPlace], dtype: np.dtype[np.unsignedinteger]
    ) -> Bits:
        """Read the same elements of the checkpoint."""
        pieces = joined_pieces(
            (
                place.path,
                place.offset + block.start * dtype.itemsize,
                block.elements * dtype.itemsize,
            )
            for block, place in zip(at.blocks, places, strict=True)
        )
        workspace = self.of_thread(Workspace)
        out = workspace.array("compared", at.elements, dtype, pieces[0][1])
        raw, done = out.view(np.uint8), 0
        for path, offset, nbytes in pieces:
            self._reader.read(path, offset, raw[done : done + nbytes])
            done += nbytes
        return out


def _heads_in(store: Store, source: SourceCheckpoint) -> dict[str, list[str]]:
    """Return tensors of the checkpoint that are tied to others, by the others' names."""
    heads: dict[str, list[str]] = {}
    for tensor in store.manifest.tensors:
        if tensor.tied_to is not None and tensor.name in source.tensors:
            heads.setdefault(tensor.tied_to, []).append(tensor.name)
    return heads


def _comparable(store: Store, source: SourceCheckpoint, problems: list[str]) -> list[StoredTensor]:
    """Return the tensors whose blocks can be compared, as they lie in the checkpoint."""
    heads = _heads_in(store, source)
    where = f"step {source.step}: {source.directory}"
    comparable = []
    for tensor in store.manifest.tensors:
        names = [tensor.name, *heads.get(tensor.name, ())]
        held = [name for name in names if name in source.tensors]
        if not held:
            if tensor.kind != "tied":
                problems.append(f"{where} has no tensor {tensor.name}, which is in the store")
            continue
        different = [name for name in held if not _is_alike(tensor, source.tensors[name])]
        for name in different:
            spec = source.tensors[name].spec
            problems.append(
                f"{where} has tensor {name} as {spec.dtype.code} {list(spec.shape)}, the store as "
                f"{tensor.dtype.code} {list(tensor.shape)}"
            )
        if not different and tensor.kind != "tied":
            comparable.append(tensor)
    problems += [
        f"{where} has tensor {name}, which is not in the store"
        for name in source.tensors
        if name not in store.tensors
    ]

    def place_of(tensor: StoredTensor) -> tuple[str, int]:
        names = (tensor.name, *heads.get(tensor.name, ()))
        place = next(source.tensors[name] for name in names if name in source.tensors)
        return place.path, place.offset

    return sorted(comparable, key=place_of)


def _is_alike(tensor: StoredTensor, place: TensorPlace) -> bool:
    return place.spec.shape == tensor.shape and place.spec.dtype == tensor.dtype


def _compare_files(
    store: Store, source: SourceCheckpoint, entries: Sequence[FileEntry], problems: list[str]
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

    for file in source.weights_files:
        # What else is in the file is not in the store, and the file cannot be had from it.
        if file.parts is not None:
            check(file.relative_path, partial(_is_made_of, store, file))
    for name in source.side_files:
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
    return entry.blob is not None and store.blob(entry.blob) == data


def _is_made_of(store: Store, file: WeightsFile, entry: FileEntry) -> bool:
    """Say whether the store puts a weights file together from the same parts."""
    if entry.recipe is None or entry.size != file.size:
        return False
    assert file.parts is not None
    expected = [
        ("tensor", part.tensor)
        if part.literal is None
        else ("blob", hashlib.sha256(part.literal).hexdigest())
        for part in file.parts
    ]
    recipe = store.recipe(entry)
    for kind, name in recipe:
        if kind == "blob":
            store.blob(name)  # is there, and has that checksum
    return recipe == expected


def _forget_frames(store: Store, row: int) -> None:
    """Have the frames that were written for a row read from the disk."""
    sizes = store.frame_bytes[row]
    for tensor in store.manifest.tensors:
        for block in range(tensor.blocks):
            if sizes[tensor.first_block + block]:
                key = arrays.chunk_key(arrays.DELTAS, tensor, row // STEP_GROUP, block)
                forget(f"{store.path}/{key}")
