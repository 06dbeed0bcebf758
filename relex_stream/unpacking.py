"""What feeds of changes pack, taken apart: which bits of which weights become what.

Nothing in such files is believed. Sizes are checked against the store's tensors before anything is
unpacked, and no more than they allow is.

An encoding is one of

- ``xor``: per tensor, a zstd frame of its bytes, to be put upon those before by exclusive or;
- ``overwrite``: per tensor, a zstd frame of the number of bytes that change, their positions (both
  32-bit) and what they become;
- ``sparse_codec_v2``, ``sparse_codec_v3``, ``sparse_codec_v3.1``: a zstd frame with a JSON header
  and, per tensor, positions, each less the one before, and the values there. The later two have
  rows and columns (a column counts from 0 in each row), the last in as few bytes as they take.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import SourceError
from relex_stream.locations import Location
from relex_stream.matching import CheckpointPlaces
from relex_stream.patches import ENTRIES, Patches, Units, read_all, write_all
from relex_stream.sources import CheckpointReader
from relex_stream.sources.strict_json import parse_object, shown
from relex_stream.specs import NoProgress, Progress
from relex_stream.store.records import StoredTensor
from relex_stream.zstd_stream import MEMORY_BYTES, ZstdStream

MOST_BYTES = 8 << 30
"""Unpacked changes that are at hand at a time, beside those of one step more."""

_PIECE_BYTES = 1 << 20
_LARGEST_HEADER = 100_000_000
_LENGTH_BYTES = 4

_VALUE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_INDEX_DTYPES = {"uint8": "<u1", "uint16": "<u2", "int32": "<i4"}
_VERSIONS = {"sparse_codec_v2": 2, "sparse_codec_v3": 3, "sparse_codec_v3.1": 31}


def unpacking_bytes(largest_block_bytes: int) -> int:
    """Return what a thread of `unpack` holds: a window of zstd, a block, where it is not 0."""
    return MEMORY_BYTES + _PIECE_BYTES + 6 * largest_block_bytes + 64 * ENTRIES


def unpack(
    where: Location,
    checkpoints: Sequence[CheckpointPlaces],
    tensors: Sequence[StoredTensor],
    reader: CheckpointReader,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Patches:
    """Unpack the changes of some checkpoints, as many of them as may be at hand.

    Parameters
    ----------
    where : Path or Url
        As `Patches` takes it.
    checkpoints : sequence of CheckpointPlaces
        Those that hold no changes take no room.
    tensors : sequence of StoredTensor
    reader : CheckpointReader
    workers : int
        Threads.
    progress : Progress, optional

    Returns
    -------
    Patches
        Of the first checkpoints, at least one (``steps``); to be closed.

    Raises
    ------
    SourceError
        If a file cannot be read, is not what its encoding asks for, or changes what is not there.
    StoreError
        If the disk is full.
    """
    progress = progress or NoProgress()
    blocks = sum(tensor.blocks for tensor in tensors)
    patches = Patches(where)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="relex-unpack") as pool:
            for places in checkpoints:
                if patches.steps and patches.nbytes > MOST_BYTES:
                    break
                patches.begin_step(blocks if places.patch is not None else 0)
                if places.patch is None or not places.patch.tensor.size:
                    continue
                progress.start(f"unpack step {places.step}", int(places.patch.nbytes.sum()))
                unpacker = _Unpacker(patches, places, tensors, reader)
                for nbytes in pool.map(lambda task: task(), unpacker.tasks()):
                    progress.advance(nbytes)
                progress.finish()
    except BaseException:
        patches.__exit__()
        raise
    return patches


class _Entry(NamedTuple):
    """A tensor of a file of many: how many weights change, and where in the unpacked file."""

    tensor: StoredTensor
    changes: int
    rows_at: int
    rows: np.dtype[Any]
    columns_at: int
    columns: np.dtype[Any] | None  # None where positions are in the tensor
    values_at: int


class _Unpacker:
    """Takes one checkpoint's changes apart, a tensor at a time."""

    def __init__(
        self,
        patches: Patches,
        places: CheckpointPlaces,
        tensors: Sequence[StoredTensor],
        reader: CheckpointReader,
    ) -> None:
        assert places.patch is not None
        self._patches = patches
        self._places = places
        self._patch = places.patch
        self._tensors = tensors
        self._reader = reader

    def tasks(self) -> Iterator[Callable[[], int]]:
        """Yield what can be done side by side; each returns the packed bytes that it did."""
        for entry, tensor in enumerate(self._patch.tensor.tolist()):
            if tensor < 0:
                yield partial(self._together, entry)
            else:
                yield partial(self._tensor, entry, self._tensors[tensor])

    def _path(self, entry: int) -> str:
        return self._places.files[int(self._patch.file[entry])]

    def _error(self, entry: int, what: str, error: ValueError) -> SourceError:
        return SourceError(
            f"step {self._places.step}: {self._path(entry)}: {what}: {error}; copy it again, or "
            "leave this step and those after it out with --steps"
        )

    def _stream(self, entry: int, digest: Any = None) -> ZstdStream:
        path, start = self._path(entry), int(self._patch.offset[entry])

        def read(offset: int, out: NDArray[np.uint8]) -> None:
            self._reader.read(path, start + offset, out)
            if digest is not None:
                digest.update(out)

        return ZstdStream(read, int(self._patch.nbytes[entry]))

    # --- each tensor on its own -------------------------------------------------------------------

    def _tensor(self, entry: int, tensor: StoredTensor) -> int:
        unpack_it = self._xor if self._patch.encoding == "xor" else self._overwrite
        try:
            with self._stream(entry) as stream:
                unpack_it(stream, tensor)
        except ValueError as error:
            raise self._error(entry, f"changes of tensor {tensor.name}", error) from None
        return int(self._patch.nbytes[entry])

    def _xor(self, stream: ZstdStream, tensor: StoredTensor) -> None:
        units = Units(tensor.itemsize, is_xor=True)
        buffer = np.empty(tensor.block_elements, f"u{tensor.itemsize}")
        for block in range(tensor.blocks):
            start, stop = tensor.block_range(block)
            here = buffer[: stop - start]
            stream.fill(here.view(np.uint8))
            changed = np.flatnonzero(here)
            part = self._patches.add(tensor, units, changed.size)
            for first, size in _runs(changed.size):
                run = changed[first : first + size]
                part.write(start + run, here[run].view(np.uint8))
        stream.finish()

    def _overwrite(self, stream: ZstdStream, tensor: StoredTensor) -> None:
        nbytes = tensor.elements * tensor.itemsize
        counted = np.empty(1, "<u4")
        stream.fill(counted.view(np.uint8))
        count = int(counted[0])
        if count > nbytes:
            raise ValueError(f"{count} bytes are said to change, of {nbytes}")
        with self._patches.scratch() as scratch:
            _spill(stream, scratch, count * 5)
            stream.finish()
            part = self._patches.add(tensor, Units(1, is_xor=False), count)
            for first, size in _runs(count):
                positions = _array(scratch, 4 * first, size, np.dtype("<u4"))
                values = _array(scratch, 4 * count + first, size, np.dtype("u1"))
                part.write(positions.astype(np.int64), values)

    # --- all tensors in one -----------------------------------------------------------------------

    def _together(self, entry: int) -> int:
        """Keep the changes of a file of many tensors."""
        digest = hashlib.sha256()
        with self._patches.scratch() as scratch:
            try:
                with self._stream(entry, digest) as stream:
                    entries = self._unpacked(stream, scratch)
                    stream.finish()
                if digest.digest() != self._patch.digest[entry]:
                    raise ValueError("its SHA-256 is not that of metadata.json")
                for each in entries:
                    self._sparse(each, scratch)
            except ValueError as error:
                raise self._error(entry, "its changes", error) from None
        return int(self._patch.nbytes[entry])

    def _unpacked(self, stream: ZstdStream, scratch: IO[bytes]) -> list[_Entry]:
        """Unpack all that the header tells of; return where in the scratch file it is."""
        length = np.empty(1, "<u4")
        stream.fill(length.view(np.uint8))
        if length[0] > _LARGEST_HEADER:
            raise ValueError(f"its header is said to have {length[0]} bytes")
        raw = np.empty(int(length[0]), np.uint8)
        stream.fill(raw)
        header = parse_object(raw.tobytes())
        version = _VERSIONS[self._patch.encoding]
        if header.get("version") != version:
            raise ValueError(f"it is of version {shown(header.get('version'))}, not {version}")
        listed = header.get("tensors")
        if not isinstance(listed, list):
            raise ValueError("its header has no list 'tensors'")
        entries: list[_Entry] = []
        end = 0
        for told in listed:
            entry, end = self._entry(told, end)
            entries.append(entry)
        if len({entry.tensor.index for entry in entries}) < len(entries):
            raise ValueError("a tensor is there twice")
        _spill(stream, scratch, end)
        return entries

    def _entry(self, told: Any, start: int) -> tuple[_Entry, int]:
        """Return where a tensor's changes are, which begin at `start`, and their end."""
        name = told.get("name") if isinstance(told, dict) else None
        number = self._patch.names.get(name) if isinstance(name, str) else None
        if number is None:
            raise ValueError(f"it changes {shown(name)}, which delta_metadata.json does not name")
        tensor = self._tensors[number]
        count, shape = told.get("num_nonzero"), told.get("shape")
        if shape != list(tensor.shape):
            raise ValueError(f"tensor {tensor.name} has shape {shown(shape)} there")
        if _VALUE_DTYPES.get(str(told.get("value_dtype"))) != tensor.dtype.code:
            raise ValueError(
                f"tensor {tensor.name} has values of {shown(told.get('value_dtype'))}, not of "
                f"{tensor.dtype.code}"
            )
        if type(count) is not int or not 0 <= count <= tensor.elements:
            raise ValueError(f"{shown(count)} weights of tensor {tensor.name} are said to change")
        rows = columns = np.dtype("<i4")
        if self._patch.encoding == "sparse_codec_v3.1":
            rows, columns = (
                np.dtype(_INDEX_DTYPES.get(str(told.get(key, "int32")), "V0"))
                for key in ("row_dtype", "col_dtype")
            )
            if not rows.itemsize or not columns.itemsize:
                raise ValueError(f"positions of tensor {tensor.name} are of an unknown type")
        flat = self._patch.encoding == "sparse_codec_v2"
        sizes = {"indices_size": count * rows.itemsize}
        if not flat:
            sizes = {
                "rows_size": count * rows.itemsize,
                "cols_size": count * columns.itemsize,
                "indices_size": count * (rows.itemsize + columns.itemsize),
            }
        values_at = start + sizes["indices_size"]
        sizes |= {"values_size": count * tensor.itemsize}
        sizes |= {"indices_offset": start, "values_offset": values_at}
        wrong = [key for key, value in sizes.items() if told.get(key) != value]
        if wrong:
            raise ValueError(
                f"tensor {tensor.name} has {wrong[0]} {shown(told.get(wrong[0]))} where "
                f"{sizes[wrong[0]]} belongs"
            )
        columns_at = start + count * rows.itemsize
        entry = _Entry(tensor, count, start, rows, columns_at, None if flat else columns, values_at)
        return entry, values_at + sizes["values_size"]

    def _sparse(self, entry: _Entry, scratch: IO[bytes]) -> None:
        """Keep the changes of a tensor of a file of many."""
        tensor = entry.tensor
        part = self._patches.add(tensor, Units(tensor.itemsize, is_xor=False), entry.changes)
        values = np.dtype(f"u{tensor.itemsize}")
        try:
            for first, positions in _positions(entry, scratch):
                offset = entry.values_at + first * values.itemsize
                here = _array(scratch, offset, positions.size, values)
                part.write(positions, here.view(np.uint8))
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name}: {error}") from None


def _positions(entry: _Entry, scratch: IO[bytes]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield positions in a tensor, some at a time, with the number of the first of them."""
    shape = entry.tensor.shape
    width = math.prod(shape[1:])
    height = shape[0] if shape else 1
    row = column = 0
    for first, size in _runs(entry.changes):
        steps = _array(scratch, entry.rows_at + first * entry.rows.itemsize, size, entry.rows)
        rows = row + np.cumsum(steps, dtype=np.int64)
        if (steps < 0).any():
            raise ValueError("its positions are not in ascending order")
        row = int(rows[-1])
        if entry.columns is None:
            yield first, rows
            continue
        if row >= height:
            raise ValueError(f"it changes row {row} of {height}")
        offset = entry.columns_at + first * entry.columns.itemsize
        along = np.cumsum(_array(scratch, offset, size, entry.columns), dtype=np.int64)
        # A column counts from 0 where a row begins; before the first that does, from the last.
        begins = np.flatnonzero(steps) if first else np.union1d(0, np.flatnonzero(steps))
        passed = np.zeros(size, np.int64)
        passed[:] = -column
        before = np.where(begins, along[begins - 1], 0)
        lengths = np.diff(begins, append=size)
        if begins.size:
            passed[begins[0] :] = np.repeat(before, lengths)
        columns = along - passed
        if columns.min() < 0 or columns.max() >= width:
            raise ValueError(f"it changes column {columns.max()} of {width}")
        column = int(columns[-1])
        yield first, rows * width + columns


def _runs(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, ENTRIES):
        yield first, min(ENTRIES, count - first)


def _array(scratch: IO[bytes], offset: int, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    out = np.empty(size, dtype)
    read_all(scratch, offset, out.view(np.uint8))
    return out


def _spill(stream: ZstdStream, scratch: IO[bytes], nbytes: int) -> None:
    """Unpack bytes to a temporary file, from its start on."""
    piece = np.empty(min(_PIECE_BYTES, nbytes), np.uint8)
    for start in range(0, nbytes, _PIECE_BYTES):
        here = piece[: min(piece.size, nbytes - start)]
        stream.fill(here)
        write_all(scratch, start, here)
