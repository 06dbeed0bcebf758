"""Reading a store: what HEAD reaches, and nothing else.

A `Store` never changes the disk and may be shared between threads and pickled into tasks. It
shows the commits that HEAD named when it was opened; later appends do not disturb it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream.codec import HEADER, frame_crc
from relex_stream.errors import CorruptionError, OptionError, RemoteError, StoreError
from relex_stream.locations import Location, location
from relex_stream.specs import STEP_GROUP
from relex_stream.store import arrays
from relex_stream.store.records import (
    Commit,
    FileEntry,
    Head,
    Manifest,
    RecipePart,
    RecordName,
    StoredTensor,
    decode_commit,
    decode_head,
    decode_manifest,
    unpack_literals,
)
from relex_stream.store.spool import Spool
from relex_stream.store.storage import Storage, storage_at

HEAD_NAME = "HEAD"

SKETCHES_AT_HAND_BYTES = 8 << 20
"""Sketches read together, of as many tensors as that holds (at least one)."""

_BATCHES_KEPT = 2
"""Batches of sketches: threads are in two at a time, at most, where they go through tensors."""


@dataclass(frozen=True)
class _Tables:
    """Columns of all commits, one row per step."""

    frame_bytes: NDArray[np.uint32]
    frame_crc: NDArray[np.uint32]
    changed: NDArray[np.uint32]
    delta_sq: NDArray[np.float64]


class RecordReader(Protocol):
    """Reads records: from a store's directory, or once fetched from object storage."""

    def read(self, key: str) -> bytes:
        """As in `Storage`."""

    def read_into(self, key: str, pieces: Sequence[tuple[int, NDArray[np.uint8]]]) -> bool:
        """As in `Storage`."""

    def size(self, key: str) -> int:
        """As in `Storage`."""


class Store:
    """A committed trajectory: base, steps, and for every step how it differs from the one before.

    Parameters
    ----------
    path : Path or Url
        The store's directory, or where it is on object storage.
    head : Head, optional
        What HEAD holds, if it was read already.
    records : RecordReader, optional
        One that has read records of this store already.

    Raises
    ------
    StoreError
        If `path` is not a store or of a newer format.
    CorruptionError
        If HEAD or the manifest is damaged.
    """

    def __init__(
        self,
        path: Location | str,
        *,
        head: Head | None = None,
        records: RecordReader | None = None,
    ) -> None:
        self.path = location(path)
        self.storage: Storage = storage_at(self.path)
        self.records: RecordReader = records or (
            self.storage if self.storage.is_local else Spool(self.storage)
        )
        self._records_checked = False
        self.head: Head = head or read_head(self.path)
        self.manifest: Manifest = decode_manifest(self._record_bytes(self.head.manifest))
        self.tensors: dict[str, StoredTensor] = {
            tensor.name: tensor for tensor in self.manifest.tensors
        }

    def __getstate__(self) -> dict[str, Any]:
        # Tables are read again where they are needed; a task must stay small. But whole records
        # are checked here, so that copies need only read the columns.
        self._tables  # noqa: B018
        return {"path": self.path, "rows": len(self.steps), "last": self._last_record()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        self._records_checked = True
        rows = state["rows"]
        # It shows what it showed before, whatever was appended meanwhile.
        self.head = replace(self.head, steps=self.steps[:rows], commits=self.head.commits[:rows])
        if self._last_record() != state["last"]:
            raise StoreError(f"{self.path} is not the store it was: run this again")

    def _last_record(self) -> RecordName:
        return self.head.commits[-1] if self.head.commits else self.head.manifest

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self.steps)} steps, {len(self.tensors)} tensors)"

    @property
    def steps(self) -> tuple[int, ...]:
        """Committed steps, ascending; row t of every table is ``steps[t]``."""
        return self.head.steps

    def row_of(self, step: int) -> int:
        """Return the row of a committed step.

        Raises
        ------
        OptionError
            If the step is not in the store; the message names those that are.
        """
        try:
            return self.steps.index(step)
        except ValueError:
            raise OptionError(
                f"step {step} is not in {self.path}; it holds {describe_steps(self.steps)}"
            ) from None

    # --- records --------------------------------------------------------------------------------

    def commit(self, row: int) -> Commit:
        """Return the commit of a row, its checksum checked."""
        name = self.head.commits[row]
        what = f"the record of step {self.steps[row]} ({name.path})"
        commit = decode_commit(self._record_bytes(name), self.manifest, what)
        before = self.head.commits[row - 1] if row else self.head.manifest
        if (commit.step, commit.row) != (self.steps[row], row) or commit.previous != before.path:
            raise CorruptionError(f"{what} does not follow the one before it")
        return commit

    def record_bytes(self, row: int) -> int:
        """Return the size of a row's record."""
        return self.records.size(self.head.commits[row].path)

    def _record_bytes(self, name: RecordName) -> bytes:
        try:
            data = self.records.read(name.path)
        except RemoteError:
            raise
        except OSError as error:
            raise CorruptionError(f"{self.path}: record {name.path} is missing: {error}") from error
        if google_crc32c.value(data) != name.crc32c:
            raise CorruptionError(f"{self.path}: record {name.path} does not match its checksum")
        return data

    @cached_property
    def _tables(self) -> _Tables:
        shape = (len(self.steps), self.manifest.blocks)
        frame_bytes, frame_crc, changed = (np.zeros(shape, np.uint32) for _ in range(3))
        delta_sq = np.zeros((len(self.steps), len(self.tensors)))
        tables = _Tables(frame_bytes, frame_crc, changed, delta_sq)
        if isinstance(self.records, Spool):
            self.records.fetch(name.path for name in self.head.commits)
        for row in range(len(self.steps)):
            columns = {name: table[row] for name, table in tables.__dict__.items()}
            if self._records_checked:
                self._read_columns(row, {name: (0, column) for name, column in columns.items()})
                continue
            commit = self.commit(row)
            for name, column in columns.items():
                column[:] = getattr(commit, name)
        return tables

    @property
    def frame_bytes(self) -> NDArray[np.uint32]:
        """Bytes of every frame, shape (T, blocks); 0 where a block did not change."""
        return self._tables.frame_bytes

    @property
    def frame_crc(self) -> NDArray[np.uint32]:
        """CRC-32C of every frame, shape (T, blocks); 0 where there is none."""
        return self._tables.frame_crc

    @property
    def changed(self) -> NDArray[np.uint32]:
        """Changed elements of every block, shape (T, blocks)."""
        return self._tables.changed

    @property
    def delta_sq(self) -> NDArray[np.float64]:
        """Squared norm of every tensor's weight delta, shape (T, tensors)."""
        return self._tables.delta_sq

    def read_sketches(
        self, first: int, count: int, rows: int
    ) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Read sketches of the first `rows` changes, of neighbouring tensors.

        Slices of the records, which may be large.

        Parameters
        ----------
        first, count : int
            Their sketch rows are ``first`` to ``first + count - 1``.
        rows : int

        Returns
        -------
        sketches : ndarray of float16, shape (rows, count, width)
        scales : ndarray of float32, shape (rows, count)
        """
        width = self.manifest.sketch_width
        sketches = np.empty((rows, count, width), np.float16)
        scales = np.empty((rows, count), np.float32)
        for row in range(rows):
            wanted = {
                "sketch": (2 * width * first, sketches[row]),
                "sketch_scale": (4 * first, scales[row]),
            }
            self._read_columns(row, wanted)
        return sketches, scales

    def _read_columns(self, row: int, wanted: Mapping[str, tuple[int, NDArray[Any]]]) -> None:
        """Fill arrays from columns of a record, each from an offset in bytes on; unchecked."""
        key = self.head.commits[row].path
        starts = self._column_starts.get(row)
        if starts is None:
            starts = self._column_starts[row] = self._column_starts_of(key)
        pieces = [
            (starts[name] + offset, out.reshape(-1).view(np.uint8))
            for name, (offset, out) in wanted.items()
        ]
        if not self.records.read_into(key, pieces):
            raise CorruptionError(f"{self.path}: record {key} is cut short")

    def _column_starts_of(self, key: str) -> dict[str, int]:
        """Return where the columns of a record begin."""
        length = np.empty(1, "<u8")
        whole = self.records.read_into(key, [(0, length.view(np.uint8))])
        if not whole or int(length[0]) > self.records.size(key):
            raise CorruptionError(f"{self.path}: record {key} is cut short")
        header = np.empty(int(length[0]), np.uint8)
        self.records.read_into(key, [(8, header)])
        return {
            name: 8 + header.size + place["data_offsets"][0]
            for name, place in json.loads(header.tobytes()).items()
            if name != "__metadata__"
        }

    @cached_property
    def _column_starts(self) -> dict[int, dict[str, int]]:
        return {}  # by row

    # --- chunks ---------------------------------------------------------------------------------

    def committed_bytes(self, tensor: StoredTensor, block: int, chunk_row: int) -> int:
        """Return how many bytes of a chunk are committed."""
        rows = slice(chunk_row * STEP_GROUP, (chunk_row + 1) * STEP_GROUP)
        return int(self.frame_bytes[rows, tensor.first_block + block].sum(dtype=np.int64))

    def read_frames(
        self, tensor: StoredTensor, block: int, first_row: int, stop_row: int
    ) -> list[tuple[int, memoryview]]:
        """Read the committed frames of a block for rows ``first_row : stop_row``.

        Returns
        -------
        list of (row, frame)
            Ascending; rows in which the block did not change are left out. Each is the frame
            that was committed by the checksum it carries; decoding checks that its bytes agree.

        Raises
        ------
        CorruptionError
            If a chunk is missing or shorter than what is committed, or holds other frames.
        """
        sizes = self.frame_bytes[:, tensor.first_block + block]
        checksums = self.frame_crc[:, tensor.first_block + block]
        where = f"tensor {tensor.name}, block {block}"
        frames: list[tuple[int, memoryview]] = []
        for chunk_row in range(first_row // STEP_GROUP, -(-stop_row // STEP_GROUP)):
            start = chunk_row * STEP_GROUP
            low, high = max(start, first_row), min(start + STEP_GROUP, stop_row)
            wanted = int(sizes[low:high].sum(dtype=np.int64))
            if not wanted:
                continue
            offset = int(sizes[start:low].sum(dtype=np.int64))
            key = arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)
            chunk = np.empty(wanted, np.uint8)
            self._read_chunk(key, offset, chunk, where)
            data = chunk.data
            at = 0
            for row in range(low, high):
                if not sizes[row]:
                    continue
                frame = data[at : at + int(sizes[row])]
                at += len(frame)
                if len(frame) < HEADER.size or frame_crc(frame) != checksums[row]:
                    raise CorruptionError(
                        f"{self.path}: step {self.steps[row]}, {where}: "
                        f"chunk {key} does not hold the frame that was committed"
                    )
                frames.append((row, frame))
        return frames

    def read_run(
        self,
        tensor: StoredTensor,
        block: int,
        first_row: int,
        sizes: Sequence[int],
        out: NDArray[np.uint8],
    ) -> None:
        """Read the bytes that `read_frames` cuts into frames, unchecked, into `out`.

        `sizes` are those of the committed frames from `first_row` on, 0 for none.

        Raises
        ------
        CorruptionError
            If a chunk is missing or shorter than what is committed.
        """
        before = self.frame_bytes[
            first_row // STEP_GROUP * STEP_GROUP : first_row, tensor.first_block + block
        ]
        offset = int(before.sum(dtype=np.int64)) if before.size else 0
        where = f"tensor {tensor.name}, block {block}"
        row, done, stop_row = first_row, 0, first_row + len(sizes)
        while row < stop_row:
            chunk_row = row // STEP_GROUP
            end = min(stop_row, (chunk_row + 1) * STEP_GROUP)
            wanted = sum(sizes[row - first_row : end - first_row])
            if wanted:
                key = arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)
                self._read_chunk(key, offset, out[done : done + wanted], where)
                done += wanted
            row, offset = end, 0

    def advise(self, tensor: StoredTensor, block: int, stop_row: int) -> bool:
        """Ask the system for a block's frames of the rows below `stop_row`, without waiting.

        Returns
        -------
        bool
            False if they are in memory already, as far as the first byte of each chunk says.
            True also where there are none.
        """
        asked = []
        sizes = self.frame_bytes[:stop_row, tensor.first_block + block]
        for chunk_row in range(-(-stop_row // STEP_GROUP)):
            rows = slice(chunk_row * STEP_GROUP, (chunk_row + 1) * STEP_GROUP)
            wanted = int(sizes[rows].sum(dtype=np.int64))
            if not wanted:
                continue
            key = arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)
            asked.append(self.storage.advise(key, 0, wanted))
        return any(asked) or not asked

    def read_base_frame(self, tensor: StoredTensor, block: int) -> memoryview | None:
        """Return the frame of an included base block; None when the block is all zero bits."""
        size = int(self.manifest.base_frame_bytes[tensor.first_block + block])
        if not size:
            return None
        key = arrays.chunk_key(arrays.BASE, tensor, 0, block)
        where = f"base weights of tensor {tensor.name}, block {block}"
        frame = np.empty(size, np.uint8)
        self._read_chunk(key, 0, frame, where)
        return frame.data

    def _read_chunk(self, key: str, offset: int, out: NDArray[np.uint8], where: str) -> None:
        try:
            whole = self.storage.read_into(key, ((offset, out),))
        except FileNotFoundError:
            raise CorruptionError(
                f"{self.path}: {where}: chunk {key} is committed but missing"
            ) from None
        if not whole:
            raise CorruptionError(
                f"{self.path}: {where}: chunk {key} is cut short: it ends at byte "
                f"{self.storage.size(key)}, committed frames go on"
            )

    # --- blobs ----------------------------------------------------------------------------------

    def blob_size(self, sha256: str) -> int:
        """Return the bytes of a blob.

        Raises
        ------
        CorruptionError
            If it is missing.
        """
        try:
            return self.storage.size(blob_key(sha256))
        except FileNotFoundError as error:
            raise CorruptionError(f"{self.path}: blob {sha256} is missing: {error}") from error

    def blob(self, sha256: str) -> bytes:
        """Return a blob's bytes, checked against its name.

        Raises
        ------
        CorruptionError
            If it is missing or does not match.
        """
        try:
            data = self.storage.read(blob_key(sha256))
        except RemoteError:
            raise
        except OSError as error:
            raise CorruptionError(f"{self.path}: blob {sha256} is missing: {error}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptionError(f"{self.path}: blob {sha256} does not match its name")
        return data

    def recipe(self, entry: FileEntry) -> list[RecipePart]:
        """Return the parts of a weights file, in order."""
        assert entry.recipe is not None
        return _parse_recipe(self.blob(entry.recipe), entry)

    def literals(self, entry: FileEntry) -> bytes:
        """Return the bytes that the literal parts of a recipe are, one behind the other.

        Raises
        ------
        CorruptionError
            If the blob that they are packed in is missing, or holds others.
        """
        nbytes = sum(part.nbytes or 0 for part in self.recipe(entry))
        if entry.blob is None:
            if nbytes:
                raise CorruptionError(f"the recipe of {entry.path} has bytes of no blob")
            return b""
        try:
            return unpack_literals(self.blob(entry.blob), nbytes)
        except ValueError as error:
            raise CorruptionError(
                f"{self.path}: blob {entry.blob} of {entry.path} is damaged: {error}"
            ) from error

    def blobs_of(self, entries: Iterable[FileEntry]) -> set[str]:
        """Return the names of all blobs that files need, those inside recipes included."""
        needed: set[str] = set()
        for entry in entries:
            if entry.blob is not None:
                needed.add(entry.blob)
            if entry.recipe is not None and entry.recipe not in needed:
                needed.add(entry.recipe)
                needed.update(part.blob for part in self.recipe(entry) if part.blob is not None)
        return needed

    # --- the whole ------------------------------------------------------------------------------

    def stored_bytes(self) -> int:
        """Return the bytes of all files of the store."""
        return self.storage.total_bytes()


class SketchReader:
    """Reads sketches tensor by tensor, many neighbours at a time; for any number of threads.

    Memory does not grow with the number of tensors: no more than `SKETCHES_AT_HAND_BYTES` are read
    at a time.

    Parameters
    ----------
    store : Store
    rows : int
        Of how many steps, from the first.
    """

    def __init__(self, store: Store, rows: int) -> None:
        self._store = store
        self._rows = rows
        sketched = sum(tensor.sketch_row >= 0 for tensor in store.manifest.tensors)
        per_tensor = max(1, rows * (2 * store.manifest.sketch_width + 4))
        self._count = max(1, min(sketched, SKETCHES_AT_HAND_BYTES // per_tensor))
        self._sketched = sketched
        self._lock = threading.Lock()
        self._batches: OrderedDict[int, tuple[NDArray[np.float16], NDArray[np.float32]]]
        self._batches = OrderedDict()

    def __reduce__(self) -> Any:
        return SketchReader, (self._store, self._rows)

    def read(self, tensor: StoredTensor) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Return a tensor's sketch (rows, width) and its scales (rows,)."""
        number, here = divmod(tensor.sketch_row, self._count)
        with self._lock:
            batch = self._batches.get(number)
            if batch is None:
                first = number * self._count
                count = min(self._count, self._sketched - first)
                batch = self._store.read_sketches(first, count, self._rows)
                self._batches[number] = batch
                if len(self._batches) > _BATCHES_KEPT:
                    self._batches.popitem(last=False)
        sketches, scales = batch
        return sketches[:, here], scales[:, here]


def read_head(path: Location) -> Head:
    """Read HEAD of the store at `path`.

    Raises
    ------
    StoreError
        If there is no store there.
    """
    try:
        data = storage_at(path).read(HEAD_NAME)
    except (FileNotFoundError, NotADirectoryError):
        if not storage_at(path).exists():
            raise StoreError(f"no store at {path}: nothing is there") from None
        raise StoreError(
            f"{path} is not a relex-stream store, or its first build never finished: "
            "it has no HEAD; make one with relex-stream build-store"
        ) from None
    except RemoteError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read the store at {path}: {error}") from error
    return head_at(path, data)


def head_at(path: Location, data: bytes) -> Head:
    """Take apart the HEAD of the store at `path`.

    Raises
    ------
    CorruptionError, StoreError
        If it is damaged, or of a newer format.
    """
    try:
        return decode_head(data)
    except StoreError as error:
        raise type(error)(f"{path}: {error}") from error


def blob_key(sha256: str) -> str:
    """Return where a blob is kept."""
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise CorruptionError(f"{sha256!r} is no blob's name")
    return f"blobs/{sha256}"


@lru_cache(maxsize=64)
def _cached_recipe(data: bytes) -> tuple[int, tuple[RecipePart, ...]]:
    body = json.loads(data)
    return int(body["size"]), tuple(map(RecipePart.decode, body["parts"]))


def _parse_recipe(data: bytes, entry: FileEntry) -> list[RecipePart]:
    try:
        size, parts = _cached_recipe(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"the recipe of {entry.path} is damaged: {error}") from error
    if size != entry.size:
        raise CorruptionError(f"the recipe of {entry.path} is for another size of file")
    return list(parts)


def describe_steps(steps: tuple[int, ...]) -> str:
    """Say which steps there are in a few words.

    Examples
    --------
    >>> describe_steps((1, 2, 3, 10))
    '4 steps from 1 to 10'
    """
    if not steps:
        return "no steps"
    if len(steps) <= 3:
        return "step " + ", ".join(map(str, steps))
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
