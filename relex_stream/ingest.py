"""The work of a build on one block: read it from every checkpoint, encode, measure, write frames.

Each block task reads its block in step order, so a checkpoint byte is read once. What comes back
are tables of the block and its share of the tensor's statistics, which add up over blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.blocks import BaseWeights, BlockOf, BlockReader, Workspace, frame_tools
from relex_stream.codec import Changes, frame_crc
from relex_stream.errors import TrajectoryError
from relex_stream.matching import CheckpointPlaces
from relex_stream.sketch import pack_sketch, sketch_changes, sketch_key
from relex_stream.sources import CheckpointReader
from relex_stream.specs import STEP_GROUP
from relex_stream.store import Store, arrays
from relex_stream.store.records import StoredTensor
from relex_stream.store.write import write_frames
from relex_stream.ulp import Bits, change_values, widen


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


class Ingest:
    """Ingests blocks of one batch of steps; safe to call from several threads."""

    def __init__(
        self,
        *,
        root: Path,
        store: Store | None,
        base: BaseWeights,
        reader: CheckpointReader,
        checkpoints: Sequence[CheckpointPlaces],
        seed: int,
        sketch_width: int,
        allow_nonfinite: bool,
        include_base: bool,
        tied_tensors: Sequence[StoredTensor],
    ) -> None:
        self._root = root
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
        self._local = threading.local()

    def run(self, blocks: tuple[BlockOf, ...]) -> BlockStatistics:
        """Ingest neighbouring blocks of one tensor."""
        return BlockStatistics.combine([self._ingest(at) for at in blocks])

    @property
    def _workspace(self) -> Workspace:
        workspace: Workspace | None = getattr(self._local, "workspace", None)
        if workspace is None:
            workspace = self._local.workspace = Workspace()
        return workspace

    def _ingest(self, at: BlockOf) -> BlockStatistics:
        base_bits, base_crc = self._base.read(at, self._workspace)
        base_frame_bytes = self._keep_base(at, base_bits) if self._include_base else 0
        if at.tensor.kind == "constant":
            return self._compare_constant(at, base_bits, base_crc, base_frame_bytes)
        return self._encode_steps(at, base_bits, base_crc, base_frame_bytes)

    def _keep_base(self, at: BlockOf, base_bits: Bits) -> int:
        zero = self._workspace.array("before", at.elements, base_bits.dtype)
        zero[:] = 0
        codec, changes = frame_tools(self._workspace, at.tensor.block_elements, base_bits.itemsize)
        if not changes.find(zero, base_bits):
            return 0
        frame = codec.encode(0, changes, at.elements)
        write_frames(self._root, arrays.BASE, at.tensor, 0, at.block, 0, frame)
        return len(frame)

    def _statistics(self, at: BlockOf, base_crc: int, base_frame_bytes: int) -> BlockStatistics:
        steps = len(self._checkpoints)
        sketched = at.tensor.sketch_row >= 0
        return BlockStatistics(
            frame_bytes=np.zeros((steps, 1), np.uint32),
            frame_crc=np.zeros((steps, 1), np.uint32),
            changed=np.zeros((steps, 1), np.uint32),
            source_crc=np.zeros((steps, 1), np.uint32),
            base_crc=np.array([base_crc], np.uint32),
            base_frame_bytes=np.array([base_frame_bytes], np.uint32),
            nonfinite=np.zeros(steps, np.bool_),
            change_sq=np.zeros(steps),
            delta_sq_growth=np.zeros(steps),
            sketch=np.zeros((steps, self._sketch_width)) if sketched else None,
        )

    def _read_step(self, at: BlockOf, index: int, buffer: str, tensor: StoredTensor) -> Bits:
        checkpoint = self._checkpoints[index]
        out = self._workspace.array(buffer, at.elements, np.dtype(f"u{tensor.itemsize}"))
        path = checkpoint.files[checkpoint.file_of[tensor.index]]
        offset = int(checkpoint.offset_of[tensor.index]) + at.start * tensor.itemsize
        self._reader.read(path, offset, out.view(np.uint8))
        return out

    def _compare_constant(
        self, at: BlockOf, base_bits: Bits, base_crc: int, base_frame_bytes: int
    ) -> BlockStatistics:
        statistics = self._statistics(at, base_crc, base_frame_bytes)
        for index, checkpoint in enumerate(self._checkpoints):
            now = self._read_step(at, index, "after", at.tensor)
            if not np.array_equal(now, base_bits):
                raise TrajectoryError(
                    f"step {checkpoint.step}: tensor {at.tensor.name} ({at.tensor.dtype.code}) in "
                    f"{checkpoint.files[checkpoint.file_of[at.tensor.index]]} differs from the "
                    "base; only BF16, F16 and F32 tensors may change. Leave that step out with "
                    "--steps"
                )
            statistics.source_crc[index, 0] = base_crc
        return statistics

    def _encode_steps(
        self, at: BlockOf, base_bits: Bits, base_crc: int, base_frame_bytes: int
    ) -> BlockStatistics:
        workspace, tensor = self._workspace, at.tensor
        statistics = self._statistics(at, base_crc, base_frame_bytes)
        base = workspace.array("wide base", at.elements, at.format.bits_dtype)
        widen(base_bits, at.base_format, at.format, base)
        self._check_tied_base(at, base_bits)
        before = workspace.array("before", at.elements, at.format.bits_dtype)
        if self._store is not None and self._rows:
            reader = BlockReader(self._store, self._base, workspace)
            np.copyto(before, reader.bits_at(at, base_bits, self._rows))
        else:
            np.copyto(before, base)
        codec, changes = frame_tools(workspace, tensor.block_elements, at.format.itemsize)
        key = sketch_key(self._seed, tensor.name)
        pending: list[bytes] = []
        pending_bytes = written = 0
        spare, other = "after", "before"
        for index in range(len(self._checkpoints)):
            row = self._rows + index
            after = self._read_step(at, index, spare, tensor)
            statistics.source_crc[index, 0] = google_crc32c.value(after.view(np.uint8))
            self._check_tied_step(at, index, after)
            if changes.find(before, after):
                self._measure(at, index, base, before, after, changes, key, statistics)
                frame = codec.encode(row % STEP_GROUP, changes, at.elements)
                statistics.frame_bytes[index, 0] = len(frame)
                statistics.frame_crc[index, 0] = frame_crc(frame)
                statistics.changed[index, 0] = changes.count
                pending.append(frame)
                pending_bytes += len(frame)
                del frame
            group_ends = row % STEP_GROUP == STEP_GROUP - 1 or index == len(self._checkpoints) - 1
            if pending and (group_ends or pending_bytes >= planner.FRAMES_AT_HAND_BYTES):
                self._write_frames(at, row // STEP_GROUP, written, b"".join(pending))
                pending.clear()
                written, pending_bytes = written + pending_bytes, 0
            if group_ends:
                written = 0
            before, spare, other = after, other, spare
        return statistics

    def _measure(
        self,
        at: BlockOf,
        index: int,
        base: Bits,
        before: Bits,
        after: Bits,
        changes: Changes,
        key: int,
        statistics: BlockStatistics,
    ) -> None:
        values = self._workspace.array("values", at.elements, np.float64)
        change_sq, growth, nonfinite_at = change_values(
            base, before, after, changes.positions, changes.count, at.format.number, values
        )
        if nonfinite_at >= 0:
            if not self._allow_nonfinite:
                raise self._nonfinite_error(at, index, int(nonfinite_at), after)
            statistics.nonfinite[index] = True
        statistics.change_sq[index] = change_sq
        statistics.delta_sq_growth[index] = growth
        if statistics.sketch is not None:
            sketch_changes(
                changes.positions, values, changes.count, at.start, key, statistics.sketch[index]
            )

    def _nonfinite_error(
        self, at: BlockOf, index: int, position: int, after: Bits
    ) -> TrajectoryError:
        checkpoint = self._checkpoints[index]
        pattern = int(after[position])
        return TrajectoryError(
            f"step {checkpoint.step}: tensor {at.tensor.name} holds a value that is not finite "
            f"(bits {pattern:#x}) at element {at.start + position}, where the base is finite, in "
            f"{checkpoint.files[checkpoint.file_of[at.tensor.index]]}; leave that step out with "
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
            if checkpoint.file_of[head.index] < 0:
                continue
            if not np.array_equal(self._read_step(at, index, "tied", head), bits):
                raise TrajectoryError(
                    f"step {checkpoint.step}: {head.name} in {checkpoint.directory} differs from "
                    f"{at.tensor.name}, but the base has only one of them; give a base with both"
                )

    def _write_frames(self, at: BlockOf, chunk_row: int, written: int, data: bytes) -> None:
        """Put frames behind those committed and those of this batch, `written` bytes of them."""
        committed = (
            self._store.committed_bytes(at.tensor, at.block, chunk_row) if self._store else 0
        )
        start = committed + written
        write_frames(self._root, arrays.DELTAS, at.tensor, chunk_row, at.block, start, data)


@dataclass(frozen=True)
class TensorResult(BlockStatistics):
    """The statistics of a whole tensor, its sketch rounded as it is stored (``sketch`` is None)."""

    packed_sketch: NDArray[np.float16] | None
    sketch_scale: NDArray[np.float32]

    @classmethod
    def of(cls, statistics: BlockStatistics) -> TensorResult:
        """Round the sketch; all else is kept."""
        packed = None
        scale = np.zeros(len(statistics.change_sq), np.float32)
        if statistics.sketch is not None:
            packed = np.zeros(statistics.sketch.shape, np.float16)
            for row, values in enumerate(statistics.sketch):
                packed[row], scale[row] = pack_sketch(values)
        kept = statistics.__dict__ | {"sketch": None}
        return cls(**kept, packed_sketch=packed, sketch_scale=scale)
