"""One block of one tensor, across all its steps: what every stage of the pipeline works on.

A block starts from the base's bits and takes each step's frame in turn. `BlockReader` gives the
bits at any step, or the changes in weight units as rows of the sparse matrix D, in buffers that a
worker keeps from block to block: a fresh page of memory costs more than the work on it. Small
tensors are worked on several at a time, as a `Strip`: a call costs more than the work on one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.checksum import extend_each
from relex_stream.codec import Changes, FrameCodec
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.pages import PAGE_BYTES, page_lead
from relex_stream.sketch import ChangeRows
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import STEP_GROUP, SourceCheckpoint, TensorPlace, joined_pieces
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.sweep import BlockRows
from relex_stream.ulp import FORMATS, Bits, FloatFormat, advance, advance_rows, widen

DEFAULT_ENTRY_CAPACITY = 2 << 20
"""Changes of one block that a worker keeps between two sweeps; more are decoded again."""

_RUN_CHANGES = 1 << 16
"""Changes decoded at a time where a block has fewer elements: many steps of a small tensor."""


class Workspace:
    """Named buffers that grow to the largest size asked for and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(
        self, name: str, shape: int | tuple[int, ...], dtype: Any, file_offset: int | None = None
    ) -> NDArray[Any]:
        """Return an uninitialised array in the buffer called `name`.

        If it is to be read from or written to a file at `file_offset`, say so: see `pages`.
        """
        size = (shape if isinstance(shape, int) else math.prod(shape)) * np.dtype(dtype).itemsize
        room = size if file_offset is None else size + PAGE_BYTES
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < room:
            # Whole 64-bit words, so that blocks can be compared as such.
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(-(-room // 8) * 8, np.uint8)
        start = 0 if file_offset is None else page_lead(buffer.ctypes.data, file_offset)
        array: NDArray[Any] = buffer[start : start + size].view(dtype).reshape(shape)
        return array


@dataclass(frozen=True)
class BlockOf:
    """A block: a tensor and the number of the block in it."""

    tensor: StoredTensor
    block: int

    @cached_property
    def start(self) -> int:
        """First element."""
        return self.tensor.block_range(self.block)[0]

    @cached_property
    def elements(self) -> int:
        """Number of elements."""
        start, stop = self.tensor.block_range(self.block)
        return stop - start

    @property
    def column(self) -> int:
        """Column in the per-block tables of records."""
        return self.tensor.first_block + self.block

    @property
    def format(self) -> FloatFormat:
        """Float format of the checkpoints' weights (tracked tensors only)."""
        return FORMATS[self.tensor.dtype.code]

    @property
    def base_format(self) -> FloatFormat:
        """Float format of the base's weights (tracked tensors only)."""
        return FORMATS[self.tensor.base_dtype.code]

    @property
    def blocks(self) -> tuple[BlockOf, ...]:
        """The block: it is the narrowest of strips."""
        return (self,)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """As in `Strip`."""
        return np.array([0, self.elements], np.int64)


@dataclass(frozen=True)
class Strip:
    """Whole small tensors side by side, worked on as one block: same formats, in one buffer.

    Where rows of D are counted for a strip, those of its second block follow those of the first.
    """

    blocks: tuple[BlockOf, ...]

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Block i has the elements ``bounds[i] : bounds[i + 1]``."""
        return np.cumsum([0, *(at.elements for at in self.blocks)], dtype=np.int64)

    @cached_property
    def elements(self) -> int:
        """Number of elements."""
        return int(self.bounds[-1])

    @property
    def format(self) -> FloatFormat:
        """Float format of the checkpoints' weights."""
        return self.blocks[0].format

    @property
    def base_format(self) -> FloatFormat:
        """Float format of the base's weights."""
        return self.blocks[0].base_format


Blocks: TypeAlias = BlockOf | Strip
"""One block, or several worked on as one."""

BlockResult = TypeVar("BlockResult")


def work_on_strips(
    tasks: Sequence[tuple[BlockOf, ...]],
    kind_of: Callable[[BlockOf], Hashable],
    work: Callable[[Blocks], Iterable[BlockResult]],
) -> list[list[BlockResult]]:
    """Work on the blocks of some tasks, as few strips as there can be; return results by task.

    Parameters
    ----------
    tasks : sequence of tuples of BlockOf
    kind_of : callable
        Blocks of equal kind may share a strip; None for one that must be alone.
    work : callable
        Returns a result for each block of a strip.
    """
    strips = _strips((at for task in tasks for at in task), kind_of)
    results = chain.from_iterable(map(work, strips))
    return [list(islice(results, len(task))) for task in tasks]


def float_formats(at: BlockOf) -> Hashable:
    """Return a kind for `work_on_strips`: tracked tensors of the same formats."""
    tensor = at.tensor
    return (tensor.base_dtype.code, tensor.dtype.code) if tensor.kind == "tracked" else None


def _strips(blocks: Iterable[BlockOf], kind_of: Callable[[BlockOf], Hashable]) -> Iterator[Blocks]:
    """Join neighbours that are whole tensors, up to the elements of a large tensor's block."""
    run: list[BlockOf] = []
    size, kind = 0, None
    for at in blocks:
        kind_here = kind_of(at) if at.tensor.blocks == 1 else None
        fits = size + at.elements <= at.tensor.block_elements
        if run and (kind_here is None or kind_here != kind or not fits):
            yield Strip(tuple(run)) if len(run) > 1 else run[0]
            run, size = [], 0
        run.append(at)
        size, kind = size + at.elements, kind_here
    if run:
        yield Strip(tuple(run)) if len(run) > 1 else run[0]


def base_bits_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    """Return the unsigned integer dtype of a tensor's stored elements in the base."""
    return np.dtype(f"u{tensor.base_itemsize}")


def model_shape(tensors: Sequence[StoredTensor], sketch_width: int) -> planner.ModelShape:
    """Return what the planner needs to know of a store's tensors."""
    kept = [tensor for tensor in tensors if tensor.blocks]
    # Small tensors may share a strip as large as a block.
    elements = sum(tensor.elements for tensor in kept)
    largest = max((min(elements, t.block_elements) for t in kept), default=1)
    widest = max(
        (min(elements, t.block_elements) * max(t.itemsize, t.base_itemsize) for t in kept),
        default=8,
    )
    return planner.ModelShape(
        tensors=len(tensors),
        sketched=sum(tensor.sketch_row >= 0 for tensor in tensors),
        blocks=sum(tensor.blocks for tensor in tensors),
        largest_block=largest,
        largest_block_bytes=widest,
        sketch_width=sketch_width,
    )


class BaseWeights:
    """The base's weights, from its directory or from the store, checked as they are read.

    Parameters
    ----------
    expected_crc : ndarray of uint32 or None
        CRC-32C per block; None while a new store is being built.
    places : mapping of name to TensorPlace, or None
        Where the tensors are; None to read the frames in `store`.
    where : str
        The base's directory, for messages.
    """

    def __init__(
        self,
        *,
        expected_crc: NDArray[np.uint32] | None,
        places: Mapping[str, TensorPlace] | None,
        reader: CheckpointReader | None = None,
        store: Store | None = None,
        where: str,
    ) -> None:
        self._expected_crc = expected_crc
        self._places = places
        self._reader = reader
        self._store = store
        self.where = where

    def read(self, at: Blocks, workspace: Workspace) -> tuple[Bits, NDArray[np.uint32]]:
        """Return the base's bit patterns (in a buffer of `workspace`) and each block's CRC-32C.

        Raises
        ------
        SourceError
            If the base's files are not the ones the store was built over.
        CorruptionError
            If an included base is damaged.
        """
        dtype = base_bits_dtype(at.blocks[0].tensor)
        if self._places is not None:
            out = self._read_files(at, dtype, workspace, self._places)
        else:
            out = workspace.array("base", at.elements, dtype)
            for block, (low, high) in zip(at.blocks, pairwise(at.bounds), strict=True):
                self._decode_included(block, out[low:high], workspace)
        crcs = np.empty(len(at.blocks), np.uint32)
        extend_each(out.view(np.uint8), at.bounds * dtype.itemsize, crcs)
        if self._expected_crc is not None:
            for block, crc in zip(at.blocks, crcs.tolist(), strict=True):
                if crc != int(self._expected_crc[block.column]):
                    raise self._mismatch(block)
        return out, crcs

    def _read_files(
        self,
        at: Blocks,
        dtype: np.dtype[Any],
        workspace: Workspace,
        places: Mapping[str, TensorPlace],
    ) -> Bits:
        assert self._reader is not None
        itemsize = dtype.itemsize
        pieces = joined_pieces(
            (place.path, place.offset + block.start * itemsize, block.elements * itemsize)
            for block in at.blocks
            for place in (places[block.tensor.name],)
        )
        out = workspace.array("base", at.elements, dtype, pieces[0][1])
        raw, done = out.view(np.uint8), 0
        for path, offset, nbytes in pieces:
            self._reader.read(path, offset, raw[done : done + nbytes])
            done += nbytes
        return out

    def _mismatch(self, at: BlockOf) -> SourceError | CorruptionError:
        if self._places is None:
            return CorruptionError(
                f"the base weights in {self.where} do not match their checksum: "
                f"tensor {at.tensor.name}, block {at.block}"
            )
        return SourceError(
            f"the base has changed: tensor {at.tensor.name} in "
            f"{self._places[at.tensor.name].path} is not what the store was "
            "built over; give the original with --base"
        )

    def advise(self, at: BlockOf) -> bool:
        """Ask the system for a block's bytes; say whether any of them had to be asked for.

        True also where nothing can be said.
        """
        if self._places is None or self._reader is None:
            return True
        place = self._places[at.tensor.name]
        itemsize = at.tensor.base_itemsize
        return self._reader.advise(
            place.path, place.offset + at.start * itemsize, at.elements * itemsize
        )

    def holds(self, name: str) -> bool:
        """Say whether the base's directory has a tensor of this name."""
        return self._places is not None and name in self._places

    def in_file_order(self, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
        """Return tensors in the order of their bytes in the base's files: the order to work in."""
        if self._places is None:
            return sorted(tensors, key=lambda tensor: tensor.index)
        places = self._places
        return sorted(tensors, key=lambda t: (places[t.name].path, places[t.name].offset))

    def read_raw_crc(self, name: str, at: BlockOf, workspace: Workspace) -> int:
        """Return the CRC-32C of the block's range in another tensor of the same shape and dtype."""
        assert self._places is not None
        assert self._reader is not None
        raw = workspace.array("tied", at.elements * at.tensor.base_itemsize, np.uint8)
        place = self._places[name]
        self._reader.read(place.path, place.offset + at.start * at.tensor.base_itemsize, raw)
        crc: int = google_crc32c.value(raw)
        return crc

    def _decode_included(self, at: BlockOf, out: Bits, workspace: Workspace) -> None:
        assert self._store is not None
        out[:] = 0
        frame = self._store.read_base_frame(at.tensor, at.block)
        if frame is None:
            return
        codec, changes = frame_tools(workspace, at.tensor.block_elements, out.itemsize)
        try:
            codec.decode(frame, at.elements, changes)
        except CorruptionError as error:
            raise CorruptionError(
                f"{self.where}: base weights of tensor {at.tensor.name}, block {at.block}: {error}"
            ) from error
        advance(out, changes.positions, changes.zigzags, changes.count)


def base_directory(store: Store, base: Path | None) -> Path | None:
    """Return where the base is read from: `base` if given, None if in the store, else the hint."""
    if base is not None:
        return base
    if store.manifest.base_included:
        return None
    return Path(os.path.normpath(store.path / store.manifest.base_hint))


def open_base(store: Store, base: Path | None, reader: CheckpointReader) -> BaseWeights:
    """Return the base of a store: at `base` if given, else in the store, else where it was.

    Raises
    ------
    SourceError
        If it is not there, or is another model.
    """
    manifest = store.manifest
    directory = base_directory(store, base)
    if directory is None:
        return BaseWeights(
            expected_crc=manifest.base_crc, places=None, store=store, where=str(store.path)
        )
    if not directory.is_dir():
        origin = (
            "given with --base" if base is not None else "where it was when the store was built"
        )
        raise SourceError(f"no base at {directory} ({origin}); give its directory with --base")
    checkpoint = open_checkpoint(directory, 0)
    check_base_layout(store, checkpoint)
    return BaseWeights(
        expected_crc=manifest.base_crc,
        places=checkpoint.tensors,
        reader=reader,
        where=str(directory),
    )


def check_base_layout(store: Store, checkpoint: SourceCheckpoint) -> None:
    """Check that a directory has the tensors the store's base had.

    Raises
    ------
    SourceError
        Naming the first tensor that is missing or different.
    """
    for tensor in store.manifest.tensors:
        if tensor.kind == "tied":
            continue
        place = checkpoint.tensors.get(tensor.name)
        if place is None:
            raise SourceError(
                f"{checkpoint.directory} is not the base of {store.path}: it has no tensor "
                f"{tensor.name}; give the original with --base"
            )
        if place.spec.shape != tensor.shape or place.spec.dtype != tensor.base_dtype:
            raise SourceError(
                f"{checkpoint.directory} is not the base of {store.path}: tensor {tensor.name} is "
                f"{place.spec.dtype.code} {list(place.spec.shape)}, the store was built over "
                f"{tensor.base_dtype.code} {list(tensor.shape)}; give the original with --base"
            )


def frame_tools(workspace: Workspace, elements: int, itemsize: int) -> tuple[FrameCodec, Changes]:
    """Return this workspace's codec and changes for blocks of up to `elements`."""
    kept: dict[int, tuple[FrameCodec, Changes]] = workspace.__dict__.setdefault("_frame_tools", {})
    tools = kept.get(itemsize)
    if tools is None or tools[0].elements < elements:
        changes = Changes(max(elements, _RUN_CHANGES), itemsize)
        tools = kept[itemsize] = (FrameCodec(elements, itemsize), changes)
    return tools


def decode_committed(
    store: Store, at: BlockOf, row: int, frame: memoryview, workspace: Workspace
) -> Changes:
    """Decode a block's frame of a row and check that it is what the commit says.

    Raises
    ------
    CorruptionError
        Naming step, tensor and block.
    """
    codec, changes = frame_tools(workspace, at.tensor.block_elements, at.tensor.itemsize)
    try:
        found = codec.decode(frame, at.elements, changes)
        # Buffers for a block's changes are sized by the committed counts.
        if found != row % STEP_GROUP or changes.count != int(store.changed[row, at.column]):
            raise CorruptionError(f"frame is of row {found} with {changes.count} changes")
    except CorruptionError as error:
        raise CorruptionError(
            f"{store.path}: step {store.steps[row]}, tensor {at.tensor.name}, block {at.block}: "
            f"{error}"
        ) from error
    return changes


def fetch_blocks(
    store: Store, base: BaseWeights, rows: int, tasks: Sequence[tuple[BlockOf, ...]]
) -> None:
    """Ask the system for what will be read of tasks: the base, and frames of the first `rows`."""
    first, *rest = [at for task in tasks for at in task]
    # Where the first is in memory the others are too, most often, and there may be very many.
    if base.advise(first):
        for at in rest:
            base.advise(at)
        for at in (first, *rest):
            store.advise(at.tensor, at.block, rows)


@dataclass(frozen=True)
class Run:
    """Rows of a block or a strip whose frames are read and decoded together.

    Attributes
    ----------
    at : BlockOf or Strip
    stop : int
        Rows of a strip's block i count on from ``i * stop``.
    rows : list of int
        Rows that changed, ascending.
    counts, sizes, checksums : list of int
        Of each row: its changes, its frame's bytes and CRC-32C, as they were committed.
    """

    at: Blocks
    stop: int
    rows: list[int]
    counts: list[int]
    sizes: list[int]
    checksums: list[int]

    def by_block(self) -> Iterator[tuple[BlockOf, int, list[int]]]:
        """Yield each block, the first of its own rows, and the bytes of frames from there on.

        Rows in between that have none have 0 bytes.
        """
        pairs = zip(self.rows, self.sizes, strict=True)
        for number, some in groupby(pairs, lambda pair: pair[0] // self.stop):
            here = dict(some)
            first, last = min(here), max(here)
            sizes = [here.get(row, 0) for row in range(first, last + 1)]
            yield self.at.blocks[number], first - number * self.stop, sizes


class BlockReader:
    """Reads one block of a store across its rows.

    Parameters
    ----------
    store : Store
    base : BaseWeights
    workspace : Workspace
        This worker's buffers; what is returned lies in them until the next block.
    entry_capacity : int
        Changes held at a time.
    """

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        workspace: Workspace,
        entry_capacity: int = DEFAULT_ENTRY_CAPACITY,
    ) -> None:
        self.store = store
        self.base = base
        self.workspace = workspace
        self.entry_capacity = entry_capacity

    def base_bits(self, at: Blocks) -> Bits:
        """Return the base's bit patterns in the base's dtype."""
        return self.base.read(at, self.workspace)[0]

    def start_state(self, at: Blocks, base_bits: Bits) -> Bits:
        """Return a copy of the base's patterns in the dtype of the checkpoints."""
        state = self.workspace.array("state", at.elements, at.format.bits_dtype)
        widen(base_bits, at.base_format, at.format, state)
        return state

    def bits_at(self, at: Blocks, base_bits: Bits, rows: int) -> Bits:
        """Return the exact bit patterns after `rows` steps, in the checkpoints' dtype."""
        state = self.start_state(at, base_bits)
        for _, changes in self.decoded(at, rows):
            # A step after the other: the order in which they lie there.
            advance(state, changes.positions, changes.zigzags, changes.count)
        return state

    def entries(self, at: Blocks, rows: int) -> int:
        """Return how many changes there are in the first `rows` rows."""
        columns = [block.column for block in at.blocks]
        return int(self.store.changed[:rows, columns].sum(dtype=np.int64))

    def change_rows(self, at: Blocks, base_bits: Bits, rows: int) -> BlockChanges:
        """Return the rows of D for the first `rows` steps."""
        return BlockChanges(self, at, base_bits, rows)

    def decoded(self, at: Blocks, stop: int) -> Iterator[tuple[Run, Changes]]:
        """Yield the changes of rows below `stop`, some rows at a time, in one buffer."""
        tensor = at.blocks[0].tensor
        _, changes = frame_tools(self.workspace, tensor.block_elements, tensor.itemsize)
        for run in self.runs(at, stop):
            self.decode(run, changes)
            yield run, changes

    def runs(self, at: Blocks, stop: int) -> Iterator[Run]:
        """Yield the rows below `stop` that changed, as many at a time as buffers hold."""
        columns = [block.column for block in at.blocks]

        # Lists: of few steps, arrays cost more than the work, and tensors may be very many.
        def committed(table: NDArray[np.uint32]) -> list[int]:
            rows: list[int] = table[:stop, columns].T.reshape(-1).tolist()
            return rows

        counts = committed(self.store.changed)
        sizes = committed(self.store.frame_bytes)
        checksums = committed(self.store.frame_crc)
        for rows in self._cut(at, counts, sizes):
            yield Run(
                at,
                stop,
                rows,
                [counts[row] for row in rows],
                [sizes[row] for row in rows],
                [checksums[row] for row in rows],
            )

    def decode(self, run: Run, changes: Changes) -> None:
        """Decode the changes of a run, one row behind the other.

        Raises
        ------
        CorruptionError
            Naming step, tensor and block.
        """
        tensor = run.at.blocks[0].tensor
        codec, _ = frame_tools(self.workspace, tensor.block_elements, tensor.itemsize)
        frames = self.workspace.array("frames", sum(run.sizes), np.uint8)
        block_of = np.array(run.rows) // run.stop
        bounds = run.at.bounds
        expected = [
            [row % run.stop % STEP_GROUP for row in run.rows],
            run.counts,
            run.checksums,
        ]
        try:
            self._read_frames(run, frames)
            found = codec.decode_frames(
                frames,
                np.array(run.sizes, np.int64),
                np.diff(bounds)[block_of],
                bounds[:-1][block_of],
                changes,
            ).tolist()
        except CorruptionError:
            found = []
        if found != expected:
            self._name_damage(run)

    def _read_frames(self, run: Run, out: NDArray[np.uint8]) -> None:
        done = 0
        for block, first, sizes in run.by_block():
            end = done + sum(sizes)
            self.store.read_run(block.tensor, block.block, first, sizes, out[done:end])
            done = end

    def _name_damage(self, run: Run) -> None:
        """Decode frames one by one, which finds the one that is wrong and names it."""
        for block, first, sizes in run.by_block():
            stop = first + len(sizes)
            for row, frame in self.store.read_frames(block.tensor, block.block, first, stop):
                decode_committed(self.store, block, row, frame, self.workspace)
        damaged = run.at.blocks[run.rows[0] // run.stop]
        raise CorruptionError(
            f"{self.store.path}: tensor {damaged.tensor.name}, block {damaged.block}"
            f"{' or one behind it' if len(run.at.blocks) > 1 else ''} was damaged "
            "when it was first read, and a moment later it was not; verify the store"
        )

    @staticmethod
    def _cut(at: Blocks, counts: list[int], sizes: list[int]) -> Iterator[list[int]]:
        """Cut rows with frames into runs at hand together: by bytes of frames, and by changes."""
        capacity = max(at.elements, _RUN_CHANGES)
        run: list[int] = []
        size = count = 0
        for row, frame_bytes in enumerate(sizes):
            if not frame_bytes:
                continue
            if run and (
                size + frame_bytes > planner.FRAMES_AT_HAND_BYTES or count + counts[row] > capacity
            ):
                yield run
                run, size, count = [], 0, 0
            run.append(row)
            size += frame_bytes
            count += counts[row]
        if run:
            yield run


@dataclass(frozen=True)
class Tile:
    """Some columns of the rows of D of the block number `block` of a strip."""

    block: int
    first: int
    columns: int
    _batches: Callable[[], Iterator[ChangeRows]]

    def batches(self) -> Iterator[ChangeRows]:
        """Yield all rows, cut to these columns, in batches; each is valid until the next."""
        return self._batches()


class BlockChanges:
    """The rows of D of a block or a strip, to be swept any number of times.

    If all fit the reader's capacity they are decoded once and kept, else decoded again for
    every sweep: memory depends on the capacity, not on the number of steps.

    Attributes
    ----------
    fits : bool
        Whether they are kept.
    """

    def __init__(self, reader: BlockReader, at: Blocks, base_bits: Bits, rows: int) -> None:
        self._reader = reader
        self._at = at
        self._base_bits = base_bits
        self._rows = rows
        self.entries = reader.entries(at, rows)
        self.fits = self.entries <= reader.entry_capacity

    def at_hand(self) -> BlockRows:
        """Decode all changes, for the kernels of `sweep`; they must fit."""
        ((changes, zigzags),) = self._decode()
        origin = self._base_bits
        if self._at.format != self._at.base_format:
            origin = self._reader.start_state(self._at, origin)
        return BlockRows(
            origin=origin,
            tag=self._at.format.tag,
            rows=changes.rows,
            starts=changes.starts,
            ends=changes.ends,
            positions=changes.positions,
            zigzags=zigzags,
            values=changes.values,
        )

    def batches(self) -> Iterator[ChangeRows]:
        """Sweep the block: yield all rows, some at a time, each valid until the next."""
        state = self._reader.start_state(self._at, self._base_bits)
        for changes, zigzags in self._decode():
            self._measure(state, changes, zigzags)
            yield changes

    def tiles(self, columns: int) -> Iterator[Tile]:
        """Cut each block into tiles of `columns`, from left to right; rows are counted by block."""
        if not self.fits:
            for block, first, width in self._cuts(columns):
                yield Tile(block, first, width, partial(self._sweep, block, first, width))
            return
        state = self._reader.start_state(self._at, self._base_bits)
        ((changes, zigzags),) = self._decode()
        bounds = self._at.bounds.tolist()
        by_block = self._by_block(changes)
        rest = changes
        for block, first, width in self._cuts(columns):
            if first == bounds[block]:
                rest = next(by_block)
            if first + width == bounds[block + 1]:
                here = rest
            else:
                rest, here = rest.split(first + width)
            self._measure(state, here, zigzags)
            yield Tile(block, first, width, partial(_once, here))

    def _cuts(self, columns: int) -> Iterator[tuple[int, int, int]]:
        for block, (low, high) in enumerate(pairwise(self._at.bounds.tolist())):
            for first in range(low, high, columns):
                yield block, first, min(columns, high - first)

    def _sweep(self, block: int, first: int, columns: int) -> Iterator[ChangeRows]:
        for changes in self.batches():
            right, _ = next(islice(self._by_block(changes), block, None)).split(first)
            yield right.split(first + columns)[1]

    def _by_block(self, changes: ChangeRows) -> Iterator[ChangeRows]:
        """Yield the rows of each block of a strip, counted by block."""
        if len(self._at.blocks) == 1:
            yield changes
            return
        block_starts = np.arange(len(self._at.blocks) + 1) * self._rows
        cuts = np.searchsorted(changes.rows, block_starts).tolist()
        rows = changes.rows % self._rows
        for low, high in pairwise(cuts):
            yield ChangeRows(
                rows[low:high],
                changes.starts[low:high],
                changes.ends[low:high],
                changes.positions,
                changes.values,
            )

    def _measure(self, state: Bits, changes: ChangeRows, zigzags: Bits) -> None:
        """Make the changes to `state`, in order, and fill in their values."""
        advance_rows(
            state,
            changes.starts,
            changes.ends,
            changes.positions,
            zigzags,
            self._at.format.tag,
            changes.values,
        )

    def _decode(self) -> Iterator[tuple[ChangeRows, Bits]]:
        """Yield rows without their values yet, and the differences those are made from."""
        at, workspace = self._at, self._reader.workspace
        at_least = max(at.elements, _RUN_CHANGES)
        capacity = min(max(self.entries, 1), max(self._reader.entry_capacity, at_least))
        positions = workspace.array("positions", capacity, np.uint32)
        zigzags = workspace.array("zigzags", capacity, at.format.bits_dtype)
        values = workspace.array("values", capacity, np.float64)
        rows: list[int] = []
        counts: list[int] = []
        used = 0
        for run in self._reader.runs(at, self._rows):
            end = used + sum(run.counts)
            if end > capacity:
                yield ChangeRows.of(rows, counts, positions, values), zigzags
                end -= used
                rows, counts, used = [], [], 0
            self._reader.decode(run, Changes.over(positions[used:end], zigzags[used:end]))
            rows += run.rows
            counts += run.counts
            used = end
        yield ChangeRows.of(rows, counts, positions, values), zigzags


def _once(rows: ChangeRows) -> Iterator[ChangeRows]:
    yield rows
