"""One block across its steps: its bits at any of them, or its changes as rows of D.

A block starts from the base's bits and takes each step's frame in turn. `BlockReader` gives the
bits at any step, or the changes in weight units as rows of the sparse matrix D, in buffers that a
worker keeps from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.base_weights import BaseWeights
from relex_stream.block_sweep import BlockRows
from relex_stream.blocks import BlockOf, Blocks, Workspace, frame_tools, run_capacity
from relex_stream.codec import Changes
from relex_stream.errors import CorruptionError
from relex_stream.sketch import ChangeRows
from relex_stream.specs import STEP_GROUP
from relex_stream.store import Store
from relex_stream.ulp import Bits, advance, advance_rows, advance_rows_half, widen

DEFAULT_ENTRY_CAPACITY = 2 << 20
"""Changes of one block that a worker keeps between two sweeps; more are decoded again."""


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
    absent = base.advise(first)
    if absent:
        for at in rest:
            base.advise(at)
    if absent or not store.storage.is_local:
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


class FrameReader:
    """Reads and decodes the committed frames of blocks.

    Parameters
    ----------
    store : Store
    workspace : Workspace
        This worker's buffers; what is returned lies in them until the next block.
    """

    def __init__(self, store: Store, workspace: Workspace) -> None:
        self.store = store
        self.workspace = workspace

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
        capacity = run_capacity(at.elements)
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


class BlockReader(FrameReader):
    """Reads one block of a store across its rows.

    Parameters
    ----------
    store, workspace
        As in `FrameReader`.
    base : BaseWeights
    entry_capacity : int
        Changes held at a time.
    half_deltas : bool
        Take weight deltas as the scripts of RELEX's authors do: in half precision.
    """

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        workspace: Workspace,
        entry_capacity: int = DEFAULT_ENTRY_CAPACITY,
        *,
        half_deltas: bool = False,
    ) -> None:
        super().__init__(store, workspace)
        self.base = base
        self.entry_capacity = entry_capacity
        self.half_deltas = half_deltas

    def base_bits(self, at: Blocks) -> Bits:
        """Return the base's bit patterns in the base's dtype."""
        return self.base.read(at, self.workspace)[0]

    def start_state(self, at: Blocks, base_bits: Bits, buffer: str = "state") -> Bits:
        """Return a copy of the base's patterns in the dtype of the checkpoints, in a buffer."""
        state = self.workspace.array(buffer, at.elements, at.format.bits_dtype)
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
    tiled : bool
        Whether `at_hand` gives them to kernels that take them tile by tile, and measure them
        themselves: if they are kept, and deltas are not in half precision.
    """

    def __init__(self, reader: BlockReader, at: Blocks, base_bits: Bits, rows: int) -> None:
        self._reader = reader
        self._at = at
        self._base_bits = base_bits
        self._rows = rows
        self.entries = reader.entries(at, rows)
        self.fits = self.entries <= reader.entry_capacity
        self.tiled = self.fits and not reader.half_deltas

    def at_hand(self) -> BlockRows:
        """Decode all changes, for the kernels of `block_sweep`; see `tiled`."""
        assert self.tiled
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
        rows = (changes.starts, changes.ends, changes.positions, zigzags, self._at.format.tag)
        if self._reader.half_deltas:
            origin = self._reader.start_state(self._at, self._base_bits, "origin")
            advance_rows_half(state, origin, *rows, changes.values)
        else:
            advance_rows(state, *rows, changes.values)

    def _decode(self) -> Iterator[tuple[ChangeRows, Bits]]:
        """Yield rows without their values yet, and the differences those are made from."""
        at, workspace = self._at, self._reader.workspace
        at_least = run_capacity(at.elements)
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
