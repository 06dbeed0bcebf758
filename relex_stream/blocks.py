"""One block of one tensor, across all its steps: what every stage of the pipeline works on.

A block starts from the base's bits and takes each step's frame in turn. `BlockReader` gives the
bits at any step, or the changes in weight units as rows of the sparse matrix D, in buffers that a
worker keeps from block to block: a fresh page of memory costs more than the work on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.codec import Changes, FrameCodec
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.pages import PAGE_BYTES, page_lead
from relex_stream.sketch import ChangeRows
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import STEP_GROUP, SourceCheckpoint, TensorPlace
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


def base_bits_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    """Return the unsigned integer dtype of a tensor's stored elements in the base."""
    return np.dtype(f"u{tensor.base_itemsize}")


def model_shape(tensors: Sequence[StoredTensor], sketch_width: int) -> planner.ModelShape:
    """Return what the planner needs to know of a store's tensors."""
    kept = [tensor for tensor in tensors if tensor.blocks]
    largest = max((min(t.elements, t.block_elements) for t in kept), default=1)
    widest = max(
        (min(t.elements, t.block_elements) * max(t.itemsize, t.base_itemsize) for t in kept),
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

    def read(self, at: BlockOf, workspace: Workspace) -> tuple[Bits, int]:
        """Return the base's bit patterns of a block (in a buffer of `workspace`) and their CRC.

        Raises
        ------
        SourceError
            If the base's files are not the ones the store was built over.
        CorruptionError
            If an included base is damaged.
        """
        dtype = base_bits_dtype(at.tensor)
        if self._places is not None:
            assert self._reader is not None
            place = self._places[at.tensor.name]
            offset = place.offset + at.start * at.tensor.base_itemsize
            out = workspace.array("base", at.elements, dtype, offset)
            self._reader.read(place.path, offset, out.view(np.uint8))
        else:
            assert self._store is not None
            out = workspace.array("base", at.elements, dtype)
            self._decode_included(at, out, workspace)
        raw = out.view(np.uint8)
        crc: int = google_crc32c.value(raw)
        if self._expected_crc is not None and crc != int(self._expected_crc[at.column]):
            if self._places is None:
                raise CorruptionError(
                    f"the base weights in {self.where} do not match their checksum: "
                    f"tensor {at.tensor.name}, block {at.block}"
                )
            raise SourceError(
                f"the base has changed: tensor {at.tensor.name} in "
                f"{self._places[at.tensor.name].path} is not what the store was "
                "built over; give the original with --base"
            )
        return out, crc

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

    def base_bits(self, at: BlockOf) -> Bits:
        """Return the base's bit patterns in the base's dtype."""
        return self.base.read(at, self.workspace)[0]

    def start_state(self, at: BlockOf, base_bits: Bits) -> Bits:
        """Return a copy of the base's patterns in the dtype of the checkpoints."""
        state = self.workspace.array("state", at.elements, at.format.bits_dtype)
        widen(base_bits, at.base_format, at.format, state)
        return state

    def bits_at(self, at: BlockOf, base_bits: Bits, rows: int) -> Bits:
        """Return the block's exact bit patterns after `rows` steps, in the checkpoints' dtype."""
        state = self.start_state(at, base_bits)
        for _, _, changes in self.decoded(at, rows):
            # A step after the other: the order in which they lie there.
            advance(state, changes.positions, changes.zigzags, changes.count)
        return state

    def entries(self, at: BlockOf, rows: int) -> int:
        """Return how many changes the block has in its first `rows` rows."""
        return int(self.store.changed[:rows, at.column].sum(dtype=np.int64))

    def change_rows(self, at: BlockOf, base_bits: Bits, rows: int) -> BlockChanges:
        """Return the block's rows of D for the first `rows` steps."""
        return BlockChanges(self, at, base_bits, rows)

    def decoded(self, at: BlockOf, stop: int) -> Iterator[tuple[list[int], list[int], Changes]]:
        """Yield the changes of rows below `stop`, some rows at a time, in one buffer.

        Yields
        ------
        rows : list of int
            Rows in which the block changed, ascending.
        counts : list of int
            Changes of each.
        changes : Changes
            Theirs, one row behind the other.
        """
        codec, changes = frame_tools(self.workspace, at.tensor.block_elements, at.tensor.itemsize)
        # Lists: of few steps, arrays cost more than the work, and tensors may be very many.
        counts = self.store.changed[:stop, at.column].tolist()
        sizes = self.store.frame_bytes[:stop, at.column].tolist()
        checksums = self.store.frame_crc[:stop, at.column].tolist()
        for rows in self._runs(at, counts, sizes):
            frames = self.workspace.array("frames", sum(sizes[row] for row in rows), np.uint8)
            expected = [
                [row % STEP_GROUP for row in rows],
                [counts[row] for row in rows],
                [checksums[row] for row in rows],
            ]
            each = np.array([sizes[row] for row in rows], np.int64)
            low, high = rows[0], rows[-1] + 1
            try:
                self.store.read_run(at.tensor, at.block, low, sizes[low:high], frames)
                found = codec.decode_frames(frames, each, at.elements, changes).tolist()
            except CorruptionError:
                found = []
            if found != expected:
                # One by one, which finds the frame that is wrong and names it.
                for row, frame in self.store.read_frames(at.tensor, at.block, low, high):
                    decode_committed(self.store, at, row, frame, self.workspace)
                raise CorruptionError(
                    f"{self.store.path}: tensor {at.tensor.name}, block {at.block} was damaged "
                    "when it was first read, and a moment later it was not; verify the store"
                )
            yield rows, expected[1], changes

    @staticmethod
    def _runs(at: BlockOf, counts: list[int], sizes: list[int]) -> Iterator[list[int]]:
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
    """Some columns of a block's rows of D."""

    first: int
    columns: int
    _batches: Callable[[], Iterator[ChangeRows]]

    def batches(self) -> Iterator[ChangeRows]:
        """Yield all rows, cut to these columns, in batches; each is valid until the next."""
        return self._batches()


class BlockChanges:
    """The rows of D of one block, to be swept any number of times.

    If all fit the reader's capacity they are decoded once and kept, else decoded again for
    every sweep: memory depends on the capacity, not on the number of steps.

    Attributes
    ----------
    fits : bool
        Whether they are kept.
    """

    def __init__(self, reader: BlockReader, at: BlockOf, base_bits: Bits, rows: int) -> None:
        self._reader = reader
        self._at = at
        self._base_bits = base_bits
        self._rows = rows
        self.entries = reader.entries(at, rows)
        self.fits = self.entries <= reader.entry_capacity

    def at_hand(self) -> BlockRows:
        """Decode all changes, for the kernels of `sweep`; they must fit."""
        ((changes, zigzags),) = self._decode()
        return BlockRows(
            state=self._reader.start_state(self._at, self._base_bits),
            format_number=self._at.format.number,
            rows=changes.rows,
            starts=changes.starts,
            ends=changes.ends,
            positions=changes.positions,
            zigzags=zigzags,
            values=changes.values,
        )

    def batches(self) -> Iterator[ChangeRows]:
        """Sweep the block: yield all rows, some at a time, each valid until the next."""
        return self._sweep(0, self._at.elements)

    def tiles(self, columns: int) -> Iterator[Tile]:
        """Cut the block into tiles of `columns`, from left to right."""
        elements = self._at.elements
        if not self.fits:
            for first in range(0, elements, columns):
                width = min(columns, elements - first)
                yield Tile(first, width, partial(self._sweep, first, width))
            return
        state = self._reader.start_state(self._at, self._base_bits)
        for changes, zigzags in self._decode():
            rest = changes
            for first in range(0, elements, columns):
                width = min(columns, elements - first)
                rest, here = rest.split(first + width)
                self._measure(state, here, zigzags)
                yield Tile(first, width, partial(_once, here))

    def _sweep(self, first: int, columns: int) -> Iterator[ChangeRows]:
        state = self._reader.start_state(self._at, self._base_bits)
        for changes, zigzags in self._decode():
            self._measure(state, changes, zigzags)
            right, _ = changes.split(first)
            yield right.split(first + columns)[1]

    def _measure(self, state: Bits, changes: ChangeRows, zigzags: Bits) -> None:
        """Make the changes to `state`, in order, and fill in their values."""
        advance_rows(
            state,
            changes.starts,
            changes.ends,
            changes.positions,
            zigzags,
            self._at.format.number,
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
        for some_rows, some_counts, changes in self._reader.decoded(at, self._rows):
            if used + changes.count > capacity:
                yield ChangeRows.of(rows, counts, positions, values), zigzags
                rows, counts, used = [], [], 0
            end = used + changes.count
            positions[used:end] = changes.positions[: changes.count]
            zigzags[used:end] = changes.zigzags[: changes.count]
            rows += some_rows
            counts += some_counts
            used = end
        yield ChangeRows.of(rows, counts, positions, values), zigzags


def _once(rows: ChangeRows) -> Iterator[ChangeRows]:
    yield rows
