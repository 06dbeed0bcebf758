"""The work of a build on blocks: read them from every checkpoint, encode, measure, write frames.

Each block task reads its block in step order, so a checkpoint byte is read once. What comes back
are tables of the block and its share of the tensor's statistics, which add up over blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.blocks import (
    BlockOf,
    Blocks,
    Workspace,
    float_formats,
    frame_tools,
    work_on_strips,
)
from relex_stream.errors import SourceError, TrajectoryError
from relex_stream.graph import Stage
from relex_stream.locations import Location
from relex_stream.matching import CheckpointPlaces
from relex_stream.patches import Patches
from relex_stream.scan import (
    UNREADABLE,
    ScanBlocks,
    ScanBuffers,
    ScanTables,
    scan_buffers,
    scan_steps,
    scan_tables,
)
from relex_stream.sketch import pack_sketch, sketch_key
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import STEP_GROUP
from relex_stream.store import Store, arrays
from relex_stream.store.records import StoredTensor
from relex_stream.store.write import Fence, sync_frames, write_frames
from relex_stream.ulp import Bits, widen

_MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class BlockStatistics:
    """What ingesting some blocks of one tensor gives; per step of the batch where it says steps.

    Tables have one column per block; sums are over the blocks.
    """

    frame_bytes: NDArray[np.uint32]
    frame_crc: NDArray[np.uint32]
    changed: NDArray[np.uint32]
    source_crc: NDArray[np.uint32]
    base_crc: NDArray[np.uint32]
    base_frame_bytes: NDArray[np.uint32]
    nonfinite: NDArray[np.bool_]
    change_sq: NDArray[np.float64]
    delta_sq_growth: NDArray[np.float64]
    sketch: NDArray[np.float64] | None

    @classmethod
    def of_blocks(
        cls,
        tables: ScanTables,
        base_crc: NDArray[np.uint32],
        base_frame_bytes: NDArray[np.uint32],
    ) -> list[BlockStatistics]:
        """Return the statistics of each block of the tables."""
        changed = tables.changed.astype(np.uint32)
        nonfinite = tables.nonfinite_at >= 0
        sketched = tables.sketch.shape[2] > 0
        return [
            cls(
                frame_bytes=tables.frame_bytes[block, :, None],
                frame_crc=tables.frame_crc[block, :, None],
                changed=changed[block, :, None],
                source_crc=tables.source_crc[block, :, None],
                base_crc=base_crc[block : block + 1],
                base_frame_bytes=base_frame_bytes[block : block + 1],
                nonfinite=nonfinite[block],
                change_sq=tables.change_sq[block],
                delta_sq_growth=tables.delta_sq_growth[block],
                sketch=tables.sketch[block] if sketched else None,
            )
            for block in range(len(changed))
        ]

    @staticmethod
    def combine(parts: list[BlockStatistics]) -> BlockStatistics:
        """Put neighbouring blocks together, in the order given."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str, axis: int) -> Any:
            return np.concatenate([getattr(part, name) for part in parts], axis=axis)

        def added(name: str) -> Any:
            total = getattr(parts[0], name).copy()
            for part in parts[1:]:
                total += getattr(part, name)
            return total

        return BlockStatistics(
            frame_bytes=joined("frame_bytes", 1),
            frame_crc=joined("frame_crc", 1),
            changed=joined("changed", 1),
            source_crc=joined("source_crc", 1),
            base_crc=joined("base_crc", 0),
            base_frame_bytes=joined("base_frame_bytes", 0),
            nonfinite=np.logical_or.reduce([part.nonfinite for part in parts]),
            change_sq=added("change_sq"),
            delta_sq_growth=added("delta_sq_growth"),
            sketch=None if parts[0].sketch is None else added("sketch"),
        )


class Ingest(Stage[tuple[BlockOf, ...], None, BlockStatistics]):
    """Ingests blocks of one batch of steps; a group is a tensor."""

    def __init__(
        self,
        *,
        root: Location,
        fence: Fence,
        store: Store | None,
        base: BaseWeights,
        reader: CheckpointReader,
        checkpoints: Sequence[CheckpointPlaces],
        patches: Patches | None = None,
        seed: int,
        sketch_width: int,
        allow_nonfinite: bool,
        include_base: bool,
        tied_tensors: Sequence[StoredTensor],
    ) -> None:
        super().__init__()
        self._root = root
        self._fence = fence
        self._fenced = False
        self._store = store
        self._base = base
        self._reader = reader
        self._checkpoints = checkpoints
        self._seed = seed
        self._sketch_width = sketch_width
        self._allow_nonfinite = allow_nonfinite
        self._include_base = include_base
        self._rows = len(store.steps) if store else 0
        self._heads_of: dict[str, list[StoredTensor]] = {}
        for tensor in tied_tensors:
            assert tensor.tied_to is not None
            self._heads_of.setdefault(tensor.tied_to, []).append(tensor)
        self._source = SourceBlocks(reader, checkpoints, patches)
        # With many checkpoints the system's own reading ahead is faster: 16 took 10.1 to 12.0 s
        # from a disk, and 13.0 to 14.7 s where they were asked for.
        self.fetches = len(checkpoints) == 1 or self._is_remote

    @property
    def _is_remote(self) -> bool:
        """Whether anything is read from object storage, where nobody else reads ahead."""
        stored = self._store is not None and not self._store.storage.is_local
        return stored or self._reader.reading_bytes > 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, which does not hold the lock itself.
        self._fenced = True

    def work(
        self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]
    ) -> list[BlockStatistics]:
        """Ingest neighbouring blocks, those of a task of one tensor."""
        results = work_on_strips(tasks, self._kind_of, self._ingest)
        return [BlockStatistics.combine(result) for result in results]

    def combine(self, partials: list[BlockStatistics]) -> BlockStatistics:
        """Put neighbouring blocks together."""
        return BlockStatistics.combine(partials)

    def finish(
        self, key: Hashable, value: None, total: BlockStatistics, *, last: bool
    ) -> TensorResult:
        """Round the sketch of a tensor."""
        return TensorResult.of(total)

    def settle(self) -> None:
        """As in `Stage`."""
        written = self.of_thread(_Paths)
        if written:
            sync_frames(self._root, written)
            written.clear()

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        if self._store is not None:
            fetch_blocks(self._store, self._base, self._rows, tasks)
        if len(self._checkpoints) > 1 and not self._reader.reading_bytes:
            return  # only the store's are on object storage
        first, *rest = [at for task in tasks for at in task]
        for index in range(len(self._checkpoints)):
            # As in `fetch_blocks`: one look for all that is read together.
            if not self._source.advise(first, index) and index == 0:
                return
            for at in rest:
                self._source.advise(at, index)

    def _kind_of(self, at: BlockOf) -> Hashable:
        """Keep in one strip what lies in the same file of every checkpoint, sketched or not."""
        formats = float_formats(at)
        if formats is None or self._is_held_again(at.tensor):
            return None
        return formats, at.tensor.sketch_row >= 0, self._source.kind_of(at.tensor)

    def _is_held_again(self, tensor: StoredTensor) -> bool:
        """Say whether its bits must equal others at every step: of a tied head, or of replicas."""
        return tensor.name in self._heads_of or self._source.has_copies(tensor)

    @property
    def _workspace(self) -> Workspace:
        return self.of_thread(Workspace)

    def _ingest(self, at: Blocks) -> list[BlockStatistics]:
        base_bits, base_crc = self._base.read(at, self._workspace)
        base_frame_bytes = np.zeros(len(at.blocks), np.uint32)
        if self._include_base:
            for number, (low, high) in enumerate(pairwise(at.bounds)):
                base_frame_bytes[number] = self._keep_base(at.blocks[number], base_bits[low:high])
        if isinstance(at, BlockOf) and at.tensor.kind == "constant":
            tables = self._compare_constant(at, base_bits, base_crc)
        else:
            tables = self._encode_steps(at, base_bits)
        return BlockStatistics.of_blocks(tables, base_crc, base_frame_bytes)

    def _keep_base(self, at: BlockOf, base_bits: Bits) -> int:
        zero = self._workspace.array("state", at.elements, base_bits.dtype)
        zero[:] = 0
        codec, changes = frame_tools(self._workspace, at.tensor.block_elements, base_bits.itemsize)
        if not changes.find(zero, base_bits):
            return 0
        frame = codec.encode(0, changes, at.elements)
        self._write(arrays.BASE, at, 0, 0, frame)
        return len(frame)

    def _write(
        self, group: str, at: BlockOf, chunk_row: int, start: int, data: bytes | memoryview
    ) -> None:
        fence = self._fence if self._fenced else None
        path = write_frames(self._root, group, at.tensor, chunk_row, at.block, start, data, fence)
        if self._fenced:
            self.of_thread(_Paths).append(path)

    def _read_step(self, at: BlockOf, index: int, buffer: str, tensor: StoredTensor) -> Bits:
        out = self._workspace.array(buffer, at.elements, np.dtype(f"u{tensor.itemsize}"))
        self._source.read(at, index, out, self._workspace, tensor)
        return out

    def _compare_constant(
        self, at: BlockOf, base_bits: Bits, base_crc: NDArray[np.uint32]
    ) -> ScanTables:
        for index, checkpoint in enumerate(self._checkpoints):
            if self._source.is_made_of_the_one_before(index, at.tensor):
                continue  # it cannot change
            now = self._read_step(at, index, "other", at.tensor)
            if not np.array_equal(now, base_bits):
                raise TrajectoryError(
                    f"step {checkpoint.step}: tensor {at.tensor.name} ({at.tensor.dtype.code}) in "
                    f"{self._source.path_of(at.tensor, index)} differs from the "
                    "base; only BF16, F16 and F32 tensors may change. Leave that step out with "
                    "--steps"
                )
        tables = scan_tables(1, len(self._checkpoints), 0)
        tables.source_crc[:] = base_crc
        return tables

    def _encode_steps(self, at: Blocks, base_bits: Bits) -> ScanTables:
        workspace = self._workspace
        base = workspace.array("wide base", at.elements, at.format.bits_dtype)
        widen(base_bits, at.base_format, at.format, base)
        first = at.blocks[0]
        if first.tensor.name in self._heads_of:
            self._check_tied_base(first, base_bits)
        if self._store is not None and self._rows:
            reader = BlockReader(self._store, self._base, workspace)
            state = reader.bits_at(at, base_bits, self._rows)
        else:
            state = workspace.array("state", at.elements, at.format.bits_dtype)
            np.copyto(state, base)
        steps = len(self._checkpoints)
        sketched = first.tensor.sketch_row >= 0
        tables = scan_tables(len(at.blocks), steps, self._sketch_width if sketched else 0)
        frames = [_Frames(self, block) for block in at.blocks]
        # What must be equal is compared with the state after every single step.
        held_again = self._is_held_again(first.tensor)
        run = 1 if held_again else self._source.steps_at_a_time(at)
        for low in range(0, steps, run):
            high = min(steps, low + run)
            self._scan_run(at, low, high, base, state, tables, frames)
            if held_again:
                self._check_tied_step(first, low, state)
                self._check_copies(first, low, state)
            if not self._allow_nonfinite and (tables.nonfinite_at[:, low:high] >= 0).any():
                self._refuse_nonfinite(at, low, high, tables, state)
        return tables

    def _refuse_nonfinite(
        self, at: Blocks, low: int, high: int, tables: ScanTables, state: Bits
    ) -> NoReturn:
        """Name the first value among the steps ``low : high`` that is not finite."""
        number, index = map(int, np.argwhere(tables.nonfinite_at[:, low:high] >= 0)[0])
        block, index = at.blocks[number], low + index
        position = int(tables.nonfinite_at[number, index])
        # What is made of the step before cannot be read again; then it is the state.
        bits = (
            state[at.bounds[number] :]
            if high - low == 1
            else self._read_step(block, index, "other", block.tensor)
        )
        raise self._nonfinite_error(block, index, position, int(bits[position]))

    def _scan_run(
        self,
        at: Blocks,
        low: int,
        high: int,
        base: Bits,
        state: Bits,
        tables: ScanTables,
        frames: Sequence[_Frames],
    ) -> None:
        """Take blocks through the steps ``low : high`` of the batch, all files open at once."""
        starts = np.array([block.start for block in at.blocks], np.int64)
        keys = np.zeros(len(at.blocks), np.uint64)
        if tables.sketch.shape[2] > 0:
            keys[:] = [sketch_key(self._seed, block.tensor.name) for block in at.blocks]
        blocks = ScanBlocks(at.bounds, base, state, at.format.tag, starts, keys)
        buffers = self._scan_buffers(at)
        done = attempts = 0
        while done < len(at.blocks) * (high - low):
            before = done
            with self._source.lent(at, low, high, self._workspace, state) as reads:
                done, reason = scan_steps(
                    reads,
                    done,
                    low,
                    (self._rows + low) % STEP_GROUP,
                    blocks,
                    buffers,
                    tables,
                )
            self._keep_frames(before, done, low, high, tables, frames, buffers.frames)
            if reason == UNREADABLE:
                # Names what is wrong; if nothing is any more, the step is taken up again.
                number, step = divmod(done, high - low)
                self._read_step(at.blocks[number], low + step, "other", at.blocks[number].tensor)
                attempts += 1
                if attempts > _MOST_ATTEMPTS:
                    path = self._source.path_of(at.blocks[number].tensor, low + step)
                    raise SourceError(f"{path}: reading fails again and again")

    @staticmethod
    def _keep_frames(
        before: int,
        done: int,
        low: int,
        high: int,
        tables: ScanTables,
        frames: Sequence[_Frames],
        data: NDArray[np.uint8],
    ) -> None:
        """Write what one call of the kernel packed: pairs of blocks and steps ``before : done``."""
        steps = high - low
        used = 0
        for number in range(before // steps, -(-done // steps)):
            first = low + max(0, before - number * steps)
            stop = low + min(steps, done - number * steps)
            sizes = tables.frame_bytes[number, first:stop]
            end = used + int(sizes.sum())
            frames[number].write(first, sizes, data[used:end])
            used = end

    def _scan_buffers(self, at: Blocks) -> ScanBuffers:
        elements = at.blocks[0].tensor.block_elements
        codec, changes = frame_tools(self._workspace, elements, at.format.itemsize)
        kept = self.of_thread(_Buffers)
        if kept.scan is None or kept.scan.zigzags is not changes.zigzags:
            kept.scan = scan_buffers(codec, changes)
        return kept.scan

    def _nonfinite_error(
        self, at: BlockOf, index: int, position: int, pattern: int
    ) -> TrajectoryError:
        checkpoint = self._checkpoints[index]
        return TrajectoryError(
            f"step {checkpoint.step}: tensor {at.tensor.name} holds a value that is not finite "
            f"(bits {pattern:#x}) at element {at.start + position}, where the base is finite, in "
            f"{self._source.path_of(at.tensor, index)}; leave that step out with "
            "--steps, or store it exactly with --allow-nonfinite"
        )

    def _check_tied_base(self, at: BlockOf, base_bits: Bits) -> None:
        for head in self._heads_of.get(at.tensor.name, ()):
            if not self._base.holds(head.name):
                continue
            if self._base.read_raw_crc(head.name, at, self._workspace) != google_crc32c.value(
                base_bits.view(np.uint8)
            ):
                raise TrajectoryError(
                    f"the base holds {head.name}, which the checkpoints lack, and it differs from "
                    f"{at.tensor.name}; give checkpoints that hold it"
                )

    def _check_tied_step(self, at: BlockOf, index: int, bits: Bits) -> None:
        checkpoint = self._checkpoints[index]
        for head in self._heads_of.get(at.tensor.name, ()):
            if not checkpoint.table.holds(head.index):
                continue
            if not np.array_equal(self._read_step(at, index, "tied", head), bits):
                raise TrajectoryError(
                    f"step {checkpoint.step}: {head.name} in {checkpoint.directory} differs from "
                    f"{at.tensor.name}, but the base has only one of them; give a base with both"
                )

    def _check_copies(self, at: BlockOf, index: int, bits: Bits) -> None:
        for first, copy in self._source.copies(at, index, self._workspace):
            if not np.array_equal(copy, bits[first : first + copy.size]):
                checkpoint = self._checkpoints[index]
                raise TrajectoryError(
                    f"step {checkpoint.step}: {checkpoint.directory} holds parts of "
                    f"{at.tensor.name} several times, and they differ (replicas of ranks that "
                    "fell out of step?); merge it with the trainer's own tool, or leave the step "
                    "out with --steps"
                )

    def write_frames(self, at: BlockOf, chunk_row: int, written: int, data: memoryview) -> None:
        """Put frames behind those committed and those of this batch, `written` bytes of them."""
        committed = (
            self._store.committed_bytes(at.tensor, at.block, chunk_row) if self._store else 0
        )
        self._write(arrays.DELTAS, at, chunk_row, committed + written, data)

    @property
    def first_row(self) -> int:
        """Row of the batch's first step in the store."""
        return self._rows


class _Paths(list[str]):
    """Chunks that a thread wrote and that may not be on the disk yet."""


class _Buffers:
    """Of the kernel, for a thread."""

    scan: ScanBuffers | None = None


class _Frames:
    """Puts a block's frames of one batch into its chunks, as they come."""

    def __init__(self, ingest: Ingest, at: BlockOf) -> None:
        self._ingest = ingest
        self._at = at
        self._chunk_row = -1
        self._written = 0

    def write(self, first: int, sizes: NDArray[np.uint32], frames: NDArray[np.uint8]) -> None:
        """Write the frames of the steps from `first` on, which lie one behind the other."""
        at = end = 0
        row = self._ingest.first_row + first
        chunk_row = row // STEP_GROUP
        for size in (*sizes.tolist(), 0):
            if row // STEP_GROUP != chunk_row:
                self._append(chunk_row, frames[at:end])
                at, chunk_row = end, row // STEP_GROUP
            end += size
            row += 1
        self._append(chunk_row, frames[at:end])

    def _append(self, chunk_row: int, frames: NDArray[np.uint8]) -> None:
        if chunk_row != self._chunk_row:
            self._chunk_row, self._written = chunk_row, 0
        if frames.size:
            self._ingest.write_frames(self._at, chunk_row, self._written, frames.data)
            self._written += frames.size


@dataclass(frozen=True)
class TensorResult(BlockStatistics):
    """The statistics of a whole tensor, its sketch rounded as it is stored (``sketch`` is None)."""

    packed_sketch: NDArray[np.float16] | None
    sketch_scale: NDArray[np.float32]

    @classmethod
    def of(cls, statistics: BlockStatistics) -> TensorResult:
        """Round the sketch; all else is kept."""
        packed, scale = None, np.zeros(len(statistics.change_sq), np.float32)
        if statistics.sketch is not None:
            packed, scale = pack_sketch(statistics.sketch)
        kept = statistics.__dict__ | {"sketch": None}
        return cls(**kept, packed_sketch=packed, sketch_scale=scale)
