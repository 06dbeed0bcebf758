"""Frames: the differences of one block between two steps, as bytes, and back.

A frame holds one row (step) of a chunk. It is *sparse* (Rice-split gaps between changed elements
joined with their zigzag differences) or *dense* (the zigzag differences of all elements, split
into byte planes), whichever is smaller, and carries its own length, count and CRC-32C. A chunk is
frames one after the other, in ascending rows; a row without a frame did not change. The layout is
frozen in ``docs/store-format.md``. Nothing here knows a file or zarr.

Sparse code. With n changed elements in a block of b, ``gap`` is the number of unchanged elements
before each and ``value = zigzag - 1``; k is the Rice parameter. Per element one symbol byte
``min(gap >> k, 15) << 4 | min(value, 15)``, then k raw bits ``gap mod 2^k``; what exceeds 15 goes
to a byte stream of varints. Gaps of independent changes are geometric, for which the Rice split is
within 0.03 bits of the entropy; one Huffman table (zstd's) over the joint symbols costs less than
one per plane, because no plane then pays for symbols shorter than a bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from relex_stream.errors import CorruptionError
from relex_stream.kernels import kernel
from relex_stream.ulp import Bits, find_changes

HEADER = struct.Struct("<BBBBIIIII")
"""row, kind, rice_bits, flags, count, main_bytes, extra_bytes, extra_raw_bytes, crc32c."""

_CRC_FIELD = struct.Struct("<I")
_SPARSE, _DENSE = 1, 2
_MAIN_ZSTD, _EXTRA_ZSTD = 1, 2
_ZSTD_LEVEL = 1
_MAX_VARINT = 5  # bytes of a 32-bit varint; an element has at most two of them


@dataclass(frozen=True)
class FrameHeader:
    """The fixed fields in front of every frame; see ``docs/store-format.md``."""

    row: int
    kind: int
    rice_bits: int
    flags: int
    count: int
    main_bytes: int
    extra_bytes: int
    extra_raw_bytes: int
    crc32c: int

    @property
    def dense(self) -> bool:
        """Whether the frame lists every element."""
        return self.kind == _DENSE

    @property
    def low_bytes(self) -> int:
        """Bytes of the raw low bits of the gaps."""
        return (self.count * self.rice_bits + 7) // 8

    @property
    def frame_bytes(self) -> int:
        """Bytes of the whole frame, header included."""
        return HEADER.size + self.main_bytes + self.low_bytes + self.extra_bytes


@kernel
def _pack_sparse(positions, zigzags, count, rice_bits, symbols, low, extra):  # type: ignore[no-untyped-def]
    """Write the three streams of a sparse frame; return the bytes used of `extra`."""
    next_position = np.int64(0)
    extra_used = 0
    pending = np.uint64(0)  # bits of `low` not yet written, the oldest lowest
    pending_bits = 0
    low_used = 0
    rice_mask = np.uint64((1 << rice_bits) - 1)
    for i in range(count):
        gap = np.uint64(np.int64(positions[i]) - next_position)
        next_position = np.int64(positions[i]) + 1
        high = gap >> np.uint64(rice_bits)
        value = np.uint64(zigzags[i]) - np.uint64(1)
        pending |= (gap & rice_mask) << np.uint64(pending_bits)
        pending_bits += rice_bits
        while pending_bits >= 8:
            low[low_used] = pending & np.uint64(0xFF)
            low_used += 1
            pending >>= np.uint64(8)
            pending_bits -= 8
        symbols[i] = (min(high, np.uint64(15)) << np.uint64(4)) | min(value, np.uint64(15))
        for excess in (high, value):
            if excess >= np.uint64(15):
                rest = excess - np.uint64(15)
                while rest >= np.uint64(128):
                    extra[extra_used] = (rest & np.uint64(127)) | np.uint64(128)
                    extra_used += 1
                    rest >>= np.uint64(7)
                extra[extra_used] = rest
                extra_used += 1
    if pending_bits > 0:
        low[low_used] = pending & np.uint64(0xFF)
    return extra_used


@kernel
def _unpack_sparse(symbols, low, extra, count, rice_bits, elements, positions, zigzags):  # type: ignore[no-untyped-def]
    """Undo `_pack_sparse`; return False when the streams do not describe a block of `elements`.

    The caller has checked the lengths of `symbols` and `low`; `extra`, positions and values are
    checked here, because a varint can say anything.
    """
    next_position = np.uint64(0)
    extra_used = 0
    pending = np.uint64(0)
    pending_bits = 0
    low_used = 0
    rice_mask = np.uint64((1 << rice_bits) - 1)
    limit = np.uint64(1) << np.uint64(8 * zigzags.itemsize)
    for i in range(count):
        while pending_bits < rice_bits:
            pending |= np.uint64(low[low_used]) << np.uint64(pending_bits)
            low_used += 1
            pending_bits += 8
        gap = pending & rice_mask
        pending >>= np.uint64(rice_bits)
        pending_bits -= rice_bits
        symbol = np.uint64(symbols[i])
        high = symbol >> np.uint64(4)
        value = symbol & np.uint64(15)
        for part in range(2):
            if (high if part == 0 else value) == np.uint64(15):
                rest = np.uint64(0)
                shift = np.uint64(0)
                while True:
                    if extra_used >= extra.size or shift > np.uint64(28):
                        return False
                    byte = np.uint64(extra[extra_used])
                    extra_used += 1
                    rest |= (byte & np.uint64(127)) << shift
                    shift += np.uint64(7)
                    if byte < np.uint64(128):
                        break
                if part == 0:
                    high += rest
                else:
                    value += rest
        position = next_position + ((high << np.uint64(rice_bits)) | gap)
        value += np.uint64(1)
        if position >= elements or value >= limit:
            return False
        positions[i] = position
        zigzags[i] = value
        next_position = position + np.uint64(1)
    return extra_used == extra.size


@kernel
def _split_dense(positions, zigzags, count, planes):  # type: ignore[no-untyped-def]
    """Scatter `count` differences into byte planes, shape (itemsize, b); the rest is zero."""
    planes[:] = 0
    for i in range(count):
        code = np.uint32(zigzags[i])
        for byte in range(planes.shape[0]):
            planes[byte, positions[i]] = (code >> np.uint32(8 * byte)) & np.uint32(0xFF)


@kernel
def _join_dense(planes, positions, zigzags):  # type: ignore[no-untyped-def]
    """Gather the nonzero differences of byte planes; return their number."""
    found = 0
    for i in range(planes.shape[1]):
        code = np.uint32(0)
        for byte in range(planes.shape[0]):
            code |= np.uint32(planes[byte, i]) << np.uint32(8 * byte)
        if code != np.uint32(0):
            positions[found] = i
            zigzags[found] = code
            found += 1
    return found


class Changes:
    """Room for the changes of one block at one step: positions and zigzag differences.

    Parameters
    ----------
    elements : int
        Elements of the largest block it must hold.
    itemsize : int
        Bytes per element: 1, 2 or 4.

    Attributes
    ----------
    count : int
        How many changes it holds now.
    positions : ndarray of uint32
        The first `count` ascend and lie inside the block.
    zigzags : ndarray of uint8, uint16 or uint32
        Zigzag code of each modular ordered difference; never 0.
    """

    def __init__(self, elements: int, itemsize: int) -> None:
        self.count = 0
        self.positions = np.empty(elements, np.uint32)
        self.zigzags: Bits = np.empty(elements, f"u{itemsize}")

    def find(self, before: Bits, after: Bits) -> int:
        """Hold the changes from `before` to `after`; both (b,), 8-byte aligned, contiguous."""
        whole = before.size * before.itemsize // 8 * 8 // before.itemsize
        self.count = int(
            find_changes(
                before[:whole].view(np.uint64),
                after[:whole].view(np.uint64),
                before,
                after,
                self.positions,
                self.zigzags,
            )
        )
        return self.count


class FrameCodec:
    """Encodes and decodes frames of one dtype width, in buffers it keeps.

    Not thread-safe: one per thread.

    Parameters
    ----------
    elements : int
        Elements of the largest block.
    itemsize : int
        Bytes per element: 1, 2 or 4.
    """

    def __init__(self, elements: int, itemsize: int) -> None:
        self.elements = elements
        self.itemsize = itemsize
        self._main = np.empty(elements * itemsize, np.uint8)
        self._extra = np.empty(elements, np.uint8)
        self._low = np.empty(elements * 2, np.uint8)

    def _rice_bits(self, count: int, elements: int) -> int:
        # The split that minimises the cost for geometric gaps: k = floor(log2(mean * ln 2)).
        mean_gap = (elements - count) / count
        return min(15, max(0, math.floor(math.log2(max(mean_gap * math.log(2), 1.0)))))

    def encode(self, row: int, changes: Changes, elements: int) -> bytes:
        """Return the frame of `changes` (at least one) in a block of `elements`.

        Parameters
        ----------
        row : int
            Row within the chunk, 0 to 15.

        Returns
        -------
        bytes
            Header and payload.
        """
        share = changes.count / elements
        # Between these shares either code may win; outside them only one can.
        sparse = self._encode_sparse(row, changes, elements) if share <= 0.5 else None
        dense = self._encode_dense(row, changes, elements) if share > 0.125 else None
        if sparse is None or (dense is not None and len(dense) < len(sparse)):
            assert dense is not None
            return dense
        return sparse

    def _encode_sparse(self, row: int, changes: Changes, elements: int) -> bytes:
        count = changes.count
        rice_bits = self._rice_bits(count, elements)
        most_extra = 2 * _MAX_VARINT * count
        if self._extra.size < most_extra:
            self._extra = np.empty(most_extra, np.uint8)
        extra_raw_bytes = int(
            _pack_sparse(
                changes.positions,
                changes.zigzags,
                count,
                rice_bits,
                self._main,
                self._low,
                self._extra,
            )
        )
        flags = 0
        main, packed = _smaller(self._main[:count])
        flags |= _MAIN_ZSTD * packed
        extra, packed = _smaller(self._extra[:extra_raw_bytes])
        flags |= _EXTRA_ZSTD * packed
        low = self._low[: (count * rice_bits + 7) // 8].tobytes()
        head = (row, _SPARSE, rice_bits, flags, count, len(main), len(extra), extra_raw_bytes)
        return _sealed(head, main + low + extra)

    def _encode_dense(self, row: int, changes: Changes, elements: int) -> bytes:
        planes = self._main[: elements * self.itemsize].reshape(self.itemsize, elements)
        _split_dense(changes.positions, changes.zigzags, changes.count, planes)
        main, packed = _smaller(planes.reshape(-1))
        head = (row, _DENSE, 0, _MAIN_ZSTD * packed, elements, len(main), 0, 0)
        return _sealed(head, main)

    def decode(self, frame: memoryview, elements: int, changes: Changes) -> int:
        """Decode one whole frame into `changes`; return its row.

        Parameters
        ----------
        frame : memoryview
            Exactly one frame.
        elements : int
            Elements of the block it belongs to.

        Raises
        ------
        CorruptionError
            If the checksum does not hold or the frame does not describe such a block. Nothing is
            allocated on the word of the frame beyond this object's buffers.
        """
        header = checked_header(frame, elements, self.itemsize)
        if header.kind == _DENSE and header.count != elements:
            raise CorruptionError(
                f"dense frame of {header.count} elements in a block of {elements}"
            )
        view = np.frombuffer(frame, np.uint8)[HEADER.size :]
        main = view[: header.main_bytes]
        if header.kind == _DENSE:
            planes = self._inflate(
                main, elements * self.itemsize, self._main, packed=bool(header.flags & _MAIN_ZSTD)
            ).reshape(self.itemsize, elements)
            changes.count = int(_join_dense(planes, changes.positions, changes.zigzags))
            return header.row
        low = view[header.main_bytes : header.main_bytes + header.low_bytes]
        stored_extra = view[header.main_bytes + header.low_bytes :]
        if self._extra.size < header.extra_raw_bytes:
            self._extra = np.empty(header.extra_raw_bytes, np.uint8)
        symbols = self._inflate(
            main, header.count, self._main, packed=bool(header.flags & _MAIN_ZSTD)
        )
        extra = self._inflate(
            stored_extra,
            header.extra_raw_bytes,
            self._extra,
            packed=bool(header.flags & _EXTRA_ZSTD),
        )
        whole = _unpack_sparse(
            symbols,
            low,
            extra,
            header.count,
            header.rice_bits,
            elements,
            changes.positions,
            changes.zigzags,
        )
        if not whole:
            raise CorruptionError("frame does not describe changes inside its block")
        changes.count = header.count
        return header.row

    @staticmethod
    def _inflate(
        stored: NDArray[np.uint8], size: int, room: NDArray[np.uint8], *, packed: bool
    ) -> NDArray[np.uint8]:
        if not packed:
            if stored.size != size:
                raise CorruptionError(f"frame stream holds {stored.size} bytes, not {size}")
            return stored
        # zstd.decompress refuses content larger than `out`, but takes smaller content and leaves
        # the rest of `out` as it was.
        if _zstd_content_bytes(stored) != size:
            raise CorruptionError(f"frame stream does not hold the {size} bytes it should")
        out = room[:size]
        try:
            zstd.decompress(stored, out)
        except (RuntimeError, ValueError) as error:
            raise CorruptionError(f"frame stream does not decompress: {error}") from error
        return out


def _zstd_content_bytes(stored: NDArray[np.uint8]) -> int:
    """Return the content size that a zstd frame declares; -1 for none (RFC 8878, 3.1.1.1)."""
    head = stored[:18].tobytes()
    if len(head) < 5 or head[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    single_segment = head[4] >> 5 & 1
    width = (single_segment, 2, 4, 8)[head[4] >> 6]
    start = 6 - single_segment + (0, 1, 2, 4)[head[4] & 3]
    field = head[start : start + width]
    if not field or len(field) < width:
        return -1
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def _smaller(raw: NDArray[np.uint8]) -> tuple[bytes, bool]:
    packed: bytes = zstd.compress(raw, _ZSTD_LEVEL) if raw.size > 16 else b""
    if packed and len(packed) < raw.size:
        return packed, True
    return raw.tobytes(), False


def _sealed(head: tuple[int, ...], payload: bytes) -> bytes:
    unsigned = HEADER.pack(*head, 0)[: -_CRC_FIELD.size]
    crc = google_crc32c.extend(google_crc32c.value(unsigned), payload)
    return unsigned + _CRC_FIELD.pack(crc) + payload


def frame_crc(frame: bytes | memoryview) -> int:
    """Return the CRC-32C that a frame carries, for the record of its commit."""
    crc: int = HEADER.unpack_from(frame)[-1]
    return crc


def read_header(data: memoryview, elements: int, itemsize: int) -> FrameHeader:
    """Read the header at the start of `data` and check that its fields agree with the block.

    Raises
    ------
    CorruptionError
        If `data` is shorter than a header, or the fields are impossible for a block of
        `elements` weights of `itemsize` bytes.
    """
    if len(data) < HEADER.size:
        raise CorruptionError(f"frame header is cut off after {len(data)} bytes")
    header = FrameHeader(*HEADER.unpack_from(data))
    possible = (
        header.row < 16
        and header.flags < 4
        and header.rice_bits < 16
        and header.main_bytes <= elements * itemsize
        and (
            (
                header.kind == _SPARSE
                and 0 < header.count <= elements
                and header.extra_bytes <= header.extra_raw_bytes <= 2 * _MAX_VARINT * header.count
            )
            or (
                header.kind == _DENSE
                and header.count <= elements
                and header.flags < _EXTRA_ZSTD
                and header.rice_bits == header.extra_bytes == header.extra_raw_bytes == 0
            )
        )
    )
    if not possible:
        raise CorruptionError("frame header has impossible fields")
    return header


def checked_header(frame: memoryview, elements: int, itemsize: int) -> FrameHeader:
    """Return the header of exactly one frame after checking its length and CRC-32C.

    Raises
    ------
    CorruptionError
        If anything does not hold.
    """
    header = read_header(frame, elements, itemsize)
    if header.frame_bytes != len(frame):
        raise CorruptionError(f"frame has {len(frame)} bytes, its header says {header.frame_bytes}")
    crc = google_crc32c.value(bytes(frame[: HEADER.size - _CRC_FIELD.size]))
    crc = google_crc32c.extend(crc, np.frombuffer(frame, np.uint8)[HEADER.size :])
    if crc != header.crc32c:
        raise CorruptionError("frame does not match its checksum")
    return header


def split_frames(chunk: memoryview, elements: int, itemsize: int) -> Iterator[memoryview]:
    """Yield the frames of a chunk that holds nothing else.

    Raises
    ------
    CorruptionError
        If the chunk does not end with a frame, or rows do not ascend.
    """
    at, last_row = 0, -1
    while at < len(chunk):
        header = read_header(chunk[at:], elements, itemsize)
        if header.row <= last_row:
            raise CorruptionError(f"frame of row {header.row} comes after row {last_row}")
        if at + header.frame_bytes > len(chunk):
            raise CorruptionError(f"frame of row {header.row} is cut off")
        yield chunk[at : at + header.frame_bytes]
        at += header.frame_bytes
        last_row = header.row
