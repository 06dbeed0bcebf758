"""Rebuilding what is damaged in a store, bit for bit, from checkpoints that are still there.

A block at a step is known where a checkpoint of that step is there, or the base; from there frames
that are whole lead to other steps, forwards and backwards. So a frame can be made again if both of
its ends can be reached. Nothing is taken on trust: bits must have the checksum that was recorded
when they were stored, and a frame must be, byte for byte, the one that was committed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream import machine
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import decode_committed
from relex_stream.blocks import BlockOf, Workspace, frame_tools
from relex_stream.codec import Changes, frame_crc
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.listing import read_file
from relex_stream.locations import location
from relex_stream.matching import CheckpointPlaces, kept_files
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import STEP_GROUP, Progress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter, arrays
from relex_stream.store.read import blob_key
from relex_stream.store.records import StoredTensor
from relex_stream.store.write import blob_name, keep_weights_file
from relex_stream.ulp import Bits, advance, retreat, widen
from relex_stream.verification import BASE_ROW, Damage


@dataclass(frozen=True)
class Remains:
    """What is left of what a store was made from.

    Attributes
    ----------
    reader : CheckpointReader
        What all of it is read with.
    base : SourceCheckpoint or None
        The base's directory.
    checkpoints : sequence of SourceCheckpoint
        Of stored steps, ascending.
    places : sequence of CheckpointPlaces
        Theirs, as they match the store.
    """

    reader: CheckpointReader
    base: SourceCheckpoint | None
    checkpoints: Sequence[SourceCheckpoint] = ()
    places: Sequence[CheckpointPlaces] = ()


@dataclass
class Repairs:
    """What was rebuilt, by the key it has in the store, and what could not be, and why."""

    rebuilt: dict[str, bytes] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @staticmethod
    def combine(parts: Iterable[Repairs]) -> Repairs:
        """Put together what was found."""
        total = Repairs()
        for part in parts:
            total.rebuilt |= part.rebuilt
            total.failed += part.failed
        return total


def repair_store(
    writer: StoreWriter,
    damage: Damage,
    remains: Remains,
    *,
    workers: int | None,
    progress: Progress,
    dry_run: bool = False,
) -> Repairs:
    """Rebuild what is damaged, as far as what remains of the checkpoints allows, and put it back.

    Each file is put in the place of the damaged one whole; a crash leaves the one or the other.

    Parameters
    ----------
    writer : StoreWriter
        Of the store, open.
    damage : Damage
        As `verification.check_store` found it.
    remains : Remains
    workers : int or None
        Threads; one per core if None.
    progress : Progress
    dry_run : bool
        Put nothing back.

    Returns
    -------
    Repairs
        ``rebuilt`` has the keys that were put back.

    Raises
    ------
    SourceError
        If a checkpoint changes meanwhile.
    """
    store = writer.store
    assert store is not None
    total = Repairs(dict(damage.documents))
    total = Repairs.combine([total, _rebuild_blobs(store, damage.blobs, remains)])
    if not dry_run:
        writer.restore(total.rebuilt)
    done = Repairs(dict.fromkeys(total.rebuilt, b""), total.failed)
    if damage.frames:
        stage = BlockRepair(writer, damage.frames, remains, dry_run=dry_run)
        blocks = sorted(damage.frames, key=lambda at: at.column)
        results: dict[Hashable, Repairs] = Threads(machine.wanted_workers(workers)).run(
            stage,
            grouped(
                (at.column, [at], lambda at: at.elements * at.tensor.itemsize) for at in blocks
            ),
            workers=machine.wanted_workers(workers),
            name="rebuild frames",
            progress=progress,
        )
        done = Repairs.combine([done, *results.values()])
    return done


class BlockRepair(Stage[tuple[BlockOf, ...], None, Repairs]):
    """Rebuilds the damaged chunks of blocks and puts each back once it is whole."""

    def __init__(
        self,
        writer: StoreWriter,
        damaged: Mapping[BlockOf, Sequence[int]],
        remains: Remains,
        *,
        dry_run: bool,
    ) -> None:
        super().__init__()
        assert writer.store is not None
        self._writer = writer
        self._store = writer.store
        self._damaged = damaged
        self._dry_run = dry_run
        self._remains = remains
        rows = range(len(self._store.steps))
        self._source_crc: NDArray[np.uint32] = np.array(
            [self._store.commit(row).source_crc for row in rows]
        )

    def work(self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]) -> list[Repairs]:
        """Repair the blocks of each task."""
        return [Repairs.combine(map(self._repair, task)) for task in tasks]

    def combine(self, partials: list[Repairs]) -> Repairs:
        """Put together what was done."""
        return Repairs.combine(partials)

    def finish(self, key: Hashable, value: None, total: Repairs, *, last: bool) -> Repairs:
        """Return what was done in a block."""
        return total

    def _repair(self, at: BlockOf) -> Repairs:
        repairs = Repairs()
        history = BlockHistory(
            self._store,
            at,
            self._remains,
            self._damaged[at],
            self._source_crc[:, at.column],
            self.of_thread(Workspace),
        )
        for key, chunk in history.chunks(repairs.failed):
            if not self._dry_run:
                self._writer.restore({key: chunk})
            repairs.rebuilt[key] = b""
        return repairs


class BlockHistory:
    """One block across its rows: which of its bits are known, and what leads from row to row.

    Parameters
    ----------
    store : Store
    at : BlockOf
    remains : Remains
    damaged : sequence of int
        Rows whose frame is not as it was committed; `BASE_ROW` for the included base.
    source_crc : ndarray of uint32, shape (T,)
        CRC-32C of the block's bytes at each row, as recorded.
    workspace : Workspace
        This worker's buffers.
    """

    def __init__(
        self,
        store: Store,
        at: BlockOf,
        remains: Remains,
        damaged: Sequence[int],
        source_crc: NDArray[np.uint32],
        workspace: Workspace,
    ) -> None:
        self._store = store
        self._at = at
        self._remains = remains
        self._damaged = sorted(damaged)
        self._source_crc = source_crc
        self._workspace = workspace
        self._sources = SourceBlocks(remains.reader, remains.places)
        self._index = {store.row_of(one.step): i for i, one in enumerate(remains.places)}
        self._frames: dict[int, bytes] = {}  # made anew, by row
        self._base: Bits | None = None  # whose frame was made anew
        self._lost = set(self._damaged)
        self._unlike: list[str] = []  # sources that are not what was stored

    def chunks(self, failed: list[str]) -> Iterator[tuple[str, bytes]]:
        """Yield key and bytes of each damaged chunk that can be made whole; tell of the others."""
        reasons: dict[int, str] = {}
        for row in self._damaged:
            try:
                frame = self._base_frame() if row == BASE_ROW else self._frame(row)
            except _NotPossibleError as error:
                reasons[row] = str(error)
            else:
                self._frames[row] = frame
                self._lost.discard(row)
        tensor, block = self._at.tensor, self._at.block
        if BASE_ROW in reasons:
            failed.append(
                f"the base's tensor {tensor.name}, block {block}, cannot be rebuilt: "
                f"{reasons[BASE_ROW]}"
            )
        elif BASE_ROW in self._frames:
            yield arrays.chunk_key(arrays.BASE, tensor, 0, block), self._frames[BASE_ROW]
        for chunk_row in sorted({row // STEP_GROUP for row in self._damaged if row != BASE_ROW}):
            start = chunk_row * STEP_GROUP
            rows = range(start, min(start + STEP_GROUP, len(self._store.steps)))
            lost = sorted(self._lost.intersection(rows))
            key = arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)
            if not lost:
                yield key, b"".join(map(self._stored_frame, rows))
                continue
            others = f" (and {len(lost) - 1} more of it)" if len(lost) > 1 else ""
            failed.append(
                f"chunk {key} cannot be rebuilt: step {self._store.steps[lost[0]]}, tensor "
                f"{tensor.name}, block {block}{others}: {reasons[lost[0]]}"
            )

    # --- frames ---------------------------------------------------------------------------------

    def _frame(self, row: int) -> bytes:
        """Make the frame of a row again."""
        before = self._bits(row - 1, "before")
        if before is None:
            raise _NotPossibleError(self._lacking(row - 1))
        after = self._bits(row, "after")
        if after is None:
            after = self._patched(row, before)
        if after is None:
            raise _NotPossibleError(self._lacking(row))
        frame = self._encoded(row % STEP_GROUP, before, after)
        column = self._at.column
        if (len(frame), frame_crc(frame)) != (
            int(self._store.frame_bytes[row, column]),
            int(self._store.frame_crc[row, column]),
        ):
            raise _NotPossibleError(_OTHER_BYTES)
        return frame

    def _base_frame(self) -> bytes:
        """Make the frame of the base's weights again."""
        bits = self._base_bits()
        if bits is None:
            raise _NotPossibleError("give the base it was built over (--base)")
        frame = self._encoded(0, np.zeros_like(bits), bits)
        # There is no checksum of the frame itself; what it decodes to was just checked.
        if len(frame) != int(self._store.manifest.base_frame_bytes[self._at.column]):
            raise _NotPossibleError(_OTHER_BYTES)
        self._base = bits.copy()
        return frame

    def _encoded(self, row: int, before: Bits, after: Bits) -> bytes:
        codec, changes = frame_tools(
            self._workspace, self._at.tensor.block_elements, after.itemsize
        )
        if not changes.find(before, after):
            raise _NotPossibleError(_OTHER_BYTES)
        return codec.encode(row, changes, self._at.elements)

    def _stored_frame(self, row: int) -> bytes:
        """Return the frame of a row, whole or made anew; nothing where nothing changed."""
        if row in self._frames:
            return self._frames[row]
        frames = self._store.read_frames(self._at.tensor, self._at.block, row, row + 1)
        return bytes(frames[0][1]) if frames else b""

    def _changes(self, row: int) -> Changes | None:
        frame = self._stored_frame(row)
        if not frame:
            return None
        return decode_committed(self._store, self._at, row, memoryview(frame), self._workspace)

    # --- bits -----------------------------------------------------------------------------------

    def _bits(self, row: int, buffer: str) -> Bits | None:
        """Return the block's bits at a row, in a buffer; None if no way leads there."""
        # Along frames that are whole: from the last damaged one below to the next above.
        lowest = max((lost for lost in self._lost if lost <= row), default=BASE_ROW)
        highest = min((lost for lost in self._lost if lost > row), default=len(self._source_crc))
        starts = [known for known in self._index if lowest <= known < highest]
        if lowest == BASE_ROW:
            starts.append(BASE_ROW)
        for start in sorted(starts, key=lambda known: abs(known - row)):
            bits = self._known_bits(start, buffer)
            if bits is None:
                continue
            self._walk(bits, start, row)
            if row == BASE_ROW or self._is_as_stored(row, bits):
                return bits
        return None

    def _walk(self, bits: Bits, start: int, row: int) -> None:
        for step in range(start + 1, row + 1):
            if changes := self._changes(step):
                advance(bits, changes.positions, changes.zigzags, changes.count)
        for step in range(start, row, -1):
            if changes := self._changes(step):
                retreat(bits, changes.positions, changes.zigzags, changes.count)

    def _known_bits(self, row: int, buffer: str) -> Bits | None:
        """Return the bits where a checkpoint has them, or the base, checked."""
        tensor = self._at.tensor
        if row == BASE_ROW:
            base = self._read_base()
            if base is None:
                return None
            if tensor.kind != "tracked":
                return base
            bits: Bits = self._workspace.array(buffer, base.shape, self._at.format.bits_dtype)
            widen(base, self._at.base_format, self._at.format, bits)
            return bits
        index = self._index[row]
        holder = self._holder(index)
        if holder is None or self._sources.is_made_of_the_one_before(index, holder):
            return None
        bits = self._workspace.array(buffer, self._at.elements, f"u{tensor.itemsize}")
        self._sources.read(self._at, index, bits, self._workspace, holder)
        return bits if self._is_as_stored(row, bits) else None

    def _patched(self, row: int, before: Bits) -> Bits | None:
        """Return the bits at a row where the checkpoint holds what changed since the row before."""
        index = self._index.get(row)
        if index is None or self._remains.places[index].patch is None:
            return None
        after: Bits = self._workspace.array("after", before.shape, before.dtype)
        self._sources.read(self._at, index, after, self._workspace, self._at.tensor, before)
        return after if self._is_as_stored(row, after) else None

    def _holder(self, index: int) -> StoredTensor | None:
        """Return the tensor that a checkpoint holds the block's weights in: its own, or a tied."""
        table = self._remains.places[index].table
        own = self._at.tensor
        tied = (one for one in self._store.manifest.tensors if one.tied_to == own.name)
        if self._remains.places[index].patch is not None:
            return own
        return next((one for one in (own, *tied) if table.holds(one.index)), None)

    def _base_bits(self) -> Bits | None:
        """Return the base's bits: of its directory, or led back to from a checkpoint."""
        bits = self._read_base()
        if bits is not None:
            return bits
        tensor = self._at.tensor
        if tensor.kind == "tracked" and self._at.format != self._at.base_format:
            return None
        bits = self._bits(BASE_ROW, "before")
        if bits is None or google_crc32c.value(bits.view(np.uint8)) != int(
            self._store.manifest.base_crc[self._at.column]
        ):
            return None
        return bits

    def _read_base(self) -> Bits | None:
        """Return the base's bits, of the store if they are whole there, else of its directory."""
        if self._base is not None:
            return self._base
        included = self._store.manifest.base_included and BASE_ROW not in self._lost
        directory = None if included else self._remains.base
        if directory is None and not included:
            return None
        try:
            weights = BaseWeights(self._store, directory, self._remains.reader)
            return weights.read(self._at, self._workspace)[0]
        except SourceError as error:
            self._unlike.append(str(error))
            return None

    def _is_as_stored(self, row: int, bits: Bits) -> bool:
        if google_crc32c.value(bits.view(np.uint8)) == int(self._source_crc[row]):
            return True
        index = self._index.get(row)
        if index is not None:
            self._unlike.append(
                f"{self._remains.checkpoints[index].directory} is not what was stored"
            )
        return False

    def _lacking(self, row: int) -> str:
        """Say what would be needed to know the bits at a row."""
        if self._unlike:
            return self._unlike[-1]
        highest = min((lost for lost in self._lost if lost > row), default=len(self._source_crc))
        lowest = max((lost for lost in self._lost if lost <= row), default=BASE_ROW)
        if highest - 1 == BASE_ROW:
            return "the base is needed (--base)"
        last = self._store.steps[highest - 1]
        if lowest == BASE_ROW:
            return f"the base is needed (--base), or a checkpoint up to step {last} (--against)"
        first = self._store.steps[lowest]
        which = (
            f"the checkpoint of step {first}"
            if first == last
            else (f"a checkpoint of one of the steps {first} to {last}")
        )
        return f"{which} is needed (--against)"


_OTHER_BYTES = (
    "the same weights make another frame here, so another version of "
    "relex-stream or numcodecs wrote it; take the steps from there on anew with "
    "build-store --replace-from"
)


class _NotPossibleError(Exception):
    """A frame cannot be made again; says why."""


def _rebuild_blobs(store: Store, names: Iterable[str], remains: Remains) -> Repairs:
    """Rebuild blobs from the files of checkpoints and base; those that are whole are left out."""
    missing = {name for name in names if not _is_whole(store, name)}
    repairs = Repairs()

    def put(data: bytes) -> str:
        name = blob_name(data)
        if name in missing:
            missing.discard(name)
            repairs.rebuilt[blob_key(name)] = data
        return name

    casts = [bool(places.is_cast.any()) for places in remains.places]
    sources = list(zip(remains.checkpoints, casts, strict=True))
    if remains.base is not None:
        sources.insert(0, (remains.base, False))
    for checkpoint, is_cast in sources:
        if not missing:
            break
        weights_files, side_files = kept_files(checkpoint, is_cast=is_cast)
        for file in weights_files:
            keep_weights_file(file, put)
        for data in map(partial(_read_side_file, checkpoint), side_files):
            put(data)
    repairs.failed += [
        f"blob {name} cannot be rebuilt: no file of a checkpoint or the base that is there has "
        "these bytes (--against, --base)"
        for name in sorted(missing)
    ]
    return repairs


def _read_side_file(checkpoint: SourceCheckpoint, name: str) -> bytes:
    return read_file(location(checkpoint.directory) / name)


def _is_whole(store: Store, name: str) -> bool:
    try:
        store.blob(name)
    except CorruptionError:
        return False
    return True
