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
from numba import njit
from numpy.typing import NDArray

from relex_stream import checksum, zstd
from relex_stream.errors import CorruptionError
from relex_stream.intrinsics import load_word
from relex_stream.kernels import kernel
from relex_stream.ulp import MASKS_SHAPE, Bits, find_changes

HEADER = struct.Struct("<BBBBIIIII")
"""row, kind, rice_bits, flags, count, main_bytes, extra_bytes, extra_raw_bytes, crc32c."""

HEADER_BYTES = HEADER.size

_CRC_AT = HEADER.size - 4
_SPARSE, _DENSE = 1, 2
_MAIN_ZSTD, _EXTRA_ZSTD = 1, 2
_ZSTD_LEVEL = 1
_ZSTD_FROM_BYTES = 17  # fewer are never worth a zstd frame

_SPARSE_SHARE = 0.125
"""Up to this share of changed elements no dense frame is smaller than a sparse one."""

_MAX_VARINT = 5  # bytes of a 32-bit varint; an element has at most two of them
_STREAM_BYTES = 1 + 2 + 2 * _MAX_VARINT
"""Most bytes of a changed element in the three streams: symbol, low bits, varints."""

_SPARE = 8  # bytes behind the streams: low bits are read a word at a time


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


@njit(inline="always")
def _copy(source, out):  # type: ignore[no-untyped-def]
    # A slice assigned would have seconds spent on compiling the message for unequal shapes.
    for i in range(source.size):
        out[i] = source[i]


@njit
def _rice_parameter(count, elements):  # type: ignore[no-untyped-def]
    # The split that minimises the cost for geometric gaps: k = floor(log2(mean gap * ln 2)).
    mean_gap = (elements - count) / count
    return min(15, max(0, math.floor(math.log2(max(mean_gap * math.log(2.0), 1.0)))))


@njit
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


@njit
def _unpack_sparse(symbols, low, extra, rice_bits, elements, positions, zigzags):  # type: ignore[no-untyped-def]
    """Undo `_pack_sparse`; return False when the streams do not describe a block of `elements`.

    `low` has 8 bytes more than the low bits fill, of any content. `extra`, positions and values
    are checked here, because a varint can say anything.
    """
    next_position = np.uint64(0)
    extra_used = 0
    bit = np.int64(0)
    rice_mask = np.uint64((1 << rice_bits) - 1)
    limit = np.uint64(1) << np.uint64(8 * zigzags.itemsize)
    for i in range(symbols.size):
        gap = (load_word(low, bit >> 3) >> np.uint64(bit & 7)) & rice_mask
        bit += rice_bits
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
                    digit = np.uint64(extra[extra_used])
                    extra_used += 1
                    rest |= (digit & np.uint64(127)) << shift
                    shift += np.uint64(7)
                    if digit < np.uint64(128):
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


@njit
def _split_dense(positions, zigzags, count, planes):  # type: ignore[no-untyped-def]
    """Scatter `count` differences into byte planes, shape (itemsize, b); the rest is zero."""
    planes[:] = 0
    byte = np.uint32(0xFF)
    # A loop for each width: with one over the bytes inside, it takes twice as long.
    if planes.shape[0] == 4:
        low, second, third, high = planes[0], planes[1], planes[2], planes[3]
        for i in range(count):
            code, at = np.uint32(zigzags[i]), positions[i]
            low[at] = code & byte
            second[at] = (code >> np.uint32(8)) & byte
            third[at] = (code >> np.uint32(16)) & byte
            high[at] = code >> np.uint32(24)
    elif planes.shape[0] == 2:
        low, high = planes[0], planes[1]
        for i in range(count):
            code, at = np.uint32(zigzags[i]), positions[i]
            low[at] = code & byte
            high[at] = (code >> np.uint32(8)) & byte
    else:
        for i in range(count):
            planes[0, positions[i]] = zigzags[i]


@njit
def _join_planes(low, second, third, high, positions, zigzags):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(low.size):
        code = np.uint32(low[i]) | (np.uint32(second[i]) << np.uint32(8))
        code |= (np.uint32(third[i]) << np.uint32(16)) | (np.uint32(high[i]) << np.uint32(24))
        # Always written and sometimes counted: whether an element changed cannot be foreseen.
        if found < positions.size:
            positions[found] = i
            zigzags[found] = code
        found += code != np.uint32(0)
    return found


@njit
def _join_dense(planes, positions, zigzags):  # type: ignore[no-untyped-def]
    """Gather the nonzero differences of byte planes; return their number, -1 if too many."""
    itemsize = planes.shape[0]
    if itemsize == 4:
        found = _join_planes(planes[0], planes[1], planes[2], planes[3], positions, zigzags)
    else:
        # What is not there is above the width of a difference, and cut off with it.
        high = planes[itemsize - 1]
        found = _join_planes(planes[0], high, high, high, positions, zigzags)
    return found if found <= positions.size else -1


@njit
def _put_number(out, at, value):  # type: ignore[no-untyped-def]
    for byte in range(4):
        out[at + byte] = (np.uint32(value) >> np.uint32(8 * byte)) & np.uint32(0xFF)


@njit
def _get_number(raw, at):  # type: ignore[no-untyped-def]
    value = np.uint32(0)
    for byte in range(4):
        value |= np.uint32(raw[at + byte]) << np.uint32(8 * byte)
    return np.int64(value)


@njit
def _put_stream(handles, raw, out):  # type: ignore[no-untyped-def]
    """Write a stream, compressed where that is smaller; return its bytes and whether it was."""
    if raw.size >= _ZSTD_FROM_BYTES:
        # With room for more than `raw`: zstd gives up where its result might not fit.
        size = zstd.compress(handles, raw, _ZSTD_LEVEL, out)
        if 0 <= size < raw.size:
            return size, True
    _copy(raw, out)
    return raw.size, False


@njit
def _seal(row, kind, rice_bits, flags, count, sizes, out):  # type: ignore[no-untyped-def]
    """Write the header before a payload that is in place; return the bytes of the frame."""
    main_bytes, low_bytes, extra_bytes, extra_raw_bytes = sizes
    out[0], out[1], out[2], out[3] = row, kind, rice_bits, flags
    _put_number(out, 4, count)
    _put_number(out, 8, main_bytes)
    _put_number(out, 12, extra_bytes)
    _put_number(out, 16, extra_raw_bytes)
    end = HEADER_BYTES + main_bytes + low_bytes + extra_bytes
    crc = checksum.extend(np.uint32(0), out[:_CRC_AT])
    crc = checksum.extend(crc, out[HEADER_BYTES:end])
    _put_number(out, _CRC_AT, crc)
    return end


@njit
def _put_sparse(row, positions, zigzags, count, elements, streams, handles, out):  # type: ignore[no-untyped-def]
    rice_bits = _rice_parameter(count, elements)
    low_bytes = (count * rice_bits + 7) // 8
    extra_at = count + low_bytes
    extra_raw_bytes = _pack_sparse(
        positions,
        zigzags,
        count,
        rice_bits,
        streams[:count],
        streams[count:extra_at],
        streams[extra_at:],
    )
    main_bytes, main_packed = _put_stream(handles, streams[:count], out[HEADER_BYTES:])
    at = HEADER_BYTES + main_bytes
    _copy(streams[count:extra_at], out[at:])
    at += low_bytes
    extra = streams[extra_at : extra_at + extra_raw_bytes]
    extra_bytes, extra_packed = _put_stream(handles, extra, out[at:])
    flags = _MAIN_ZSTD * main_packed | _EXTRA_ZSTD * extra_packed
    sizes = (main_bytes, low_bytes, extra_bytes, extra_raw_bytes)
    return _seal(row, _SPARSE, rice_bits, flags, count, sizes, out)


@njit
def _put_dense(row, positions, zigzags, count, elements, streams, handles, out):  # type: ignore[no-untyped-def]
    planes = streams[: elements * zigzags.itemsize]
    _split_dense(positions, zigzags, count, planes.reshape(zigzags.itemsize, elements))
    main_bytes, packed = _put_stream(handles, planes, out[HEADER_BYTES:])
    return _seal(row, _DENSE, 0, _MAIN_ZSTD * packed, elements, (main_bytes, 0, 0, 0), out)


@kernel
def put_frame(row, positions, zigzags, count, elements, streams, handles, out):  # type: ignore[no-untyped-def]
    """Write the frame of some changes.

    Parameters
    ----------
    row : int
        Row within the chunk, 0 to 15.
    positions, zigzags : ndarray
        As in `Changes`; the first `count` (at least one) count.
    elements : int
        Of the block.
    streams : ndarray of uint8, shape (>= stream_bytes(elements),)
        Scratch.
    handles : ndarray of uint64
        Of `zstd.Contexts`.
    out : ndarray of uint8, shape (>= frame_room(elements, itemsize),)

    Returns
    -------
    int
        Bytes of the frame.
    """
    crowded = count > _SPARSE_SHARE * elements
    size = 0
    if 2 * count <= elements:
        # Between the two shares either code may win; outside them only one can.
        size = _put_sparse(row, positions, zigzags, count, elements, streams, handles, out)
    if crowded:
        dense = out[size:]
        dense_size = _put_dense(row, positions, zigzags, count, elements, streams, handles, dense)
        if size == 0 or dense_size < size:
            for i in range(dense_size):
                out[i] = dense[i]
            size = dense_size
    return size


@njit
def crc_of_frame(frame):  # type: ignore[no-untyped-def]
    """Return the CRC-32C that a frame (uint8) carries: `frame_crc` for kernels."""
    return _get_number(frame, _CRC_AT)


GOOD, BAD_CHECKSUM, BAD_HEADER, BAD_STREAM, BAD_CHANGES, NO_ROOM = range(6)
"""What `take_frame` found; see `_PROBLEMS`."""

_PROBLEMS = {
    BAD_CHECKSUM: "frame does not match its checksum",
    BAD_HEADER: "frame header has impossible fields",
    BAD_STREAM: "frame stream does not decompress to the bytes it should",
    BAD_CHANGES: "frame does not describe changes inside its block",
    NO_ROOM: "frame has more changes than are committed",
}


@njit
def _get_stream(handles, stored, packed, out):  # type: ignore[no-untyped-def]
    if packed:
        return zstd.decompress(handles, stored, out) == out.size
    if stored.size != out.size:
        return False
    _copy(stored, out)
    return True


@njit
def take_frame(frame, elements, streams, handles, positions, zigzags):  # type: ignore[no-untyped-def]  # noqa: PLR0911
    """Decode exactly one frame; return what was found and how many changes it has.

    Nothing in the frame is believed: every field is checked before it is used.
    """
    itemsize = zigzags.itemsize
    if frame.size < HEADER_BYTES:
        return BAD_HEADER, 0
    crc = checksum.extend(np.uint32(0), frame[:_CRC_AT])
    crc = checksum.extend(crc, frame[HEADER_BYTES:])
    if np.int64(crc) != _get_number(frame, _CRC_AT):
        return BAD_CHECKSUM, 0
    kind, rice_bits, flags = frame[1], np.int64(frame[2]), frame[3]
    count, main_bytes = _get_number(frame, 4), _get_number(frame, 8)
    extra_bytes, extra_raw_bytes = _get_number(frame, 12), _get_number(frame, 16)
    main_end = HEADER_BYTES + main_bytes
    if (
        frame[0] >= 16
        or flags >= 4
        or rice_bits >= 16
        or main_bytes > elements * itemsize
        or main_end > frame.size
    ):
        return BAD_HEADER, 0
    main = frame[HEADER_BYTES:main_end]
    packed = (flags & _MAIN_ZSTD) != 0
    if kind == _DENSE:
        if (
            count != elements
            or flags >= _EXTRA_ZSTD
            or rice_bits + extra_bytes + extra_raw_bytes != 0
            or main_end != frame.size
        ):
            return BAD_HEADER, 0
        planes = streams[: elements * itemsize]
        if not _get_stream(handles, main, packed, planes):
            return BAD_STREAM, 0
        found = _join_dense(planes.reshape(itemsize, elements), positions, zigzags)
        return (NO_ROOM, 0) if found < 0 else (GOOD, found)
    low_bytes = (count * rice_bits + 7) // 8
    if (
        kind != _SPARSE
        or not 0 < count <= elements
        or not extra_bytes <= extra_raw_bytes <= 2 * _MAX_VARINT * count
        or main_end + low_bytes + extra_bytes != frame.size
    ):
        return BAD_HEADER, 0
    if count > positions.size:
        return NO_ROOM, 0
    low_end, extra_end = count + low_bytes, count + low_bytes + extra_raw_bytes
    _copy(frame[main_end : main_end + low_bytes], streams[count:])
    if not (
        _get_stream(handles, main, packed, streams[:count])
        and _get_stream(
            handles,
            frame[main_end + low_bytes :],
            (flags & _EXTRA_ZSTD) != 0,
            streams[low_end:extra_end],
        )
    ):
        return BAD_STREAM, 0
    whole = _unpack_sparse(
        streams[:count],
        streams[count:],
        streams[low_end:extra_end],
        rice_bits,
        np.uint64(elements),
        positions,
        zigzags,
    )
    return (GOOD, count) if whole else (BAD_CHANGES, 0)


@kernel
def take_frames(  # type: ignore[no-untyped-def]
    frames, sizes, elements, firsts, streams, handles, positions, zigzags, table
):
    """Decode frames that lie one behind the other; what they hold is put so too.

    Parameters
    ----------
    frames : ndarray of uint8
    sizes : ndarray of int64, shape (n,)
        Bytes of each frame; in all those of `frames`.
    elements : ndarray of int64, shape (n,)
        Of the block that each belongs to.
    firsts : ndarray of int64, shape (n,)
        Added to the positions of each.
    streams, handles
        As in `put_frame`.
    positions, zigzags : ndarray
        Out, as in `Changes`.
    table : ndarray of int64, shape (3, n)
        Out: row, number of changes and CRC-32C of each frame.

    Returns
    -------
    good : int
        Frames decoded before the first that is wrong; n if none is.
    finding : int
        What is wrong with that one.
    """
    at = used = 0
    for i in range(sizes.size):
        finding, count = take_frame(
            frames[at : at + sizes[i]],
            elements[i],
            streams,
            handles,
            positions[used:],
            zigzags[used:],
        )
        if finding != GOOD:
            return i, finding
        table[0, i], table[1, i] = frames[at], count
        table[2, i] = crc_of_frame(frames[at:])
        if firsts[i] > 0:
            for change in range(used, used + count):
                positions[change] += np.uint32(firsts[i])
        at += sizes[i]
        used += count
    return sizes.size, GOOD


def stream_bytes(elements: int) -> int:
    """Return the bytes of scratch that frames of blocks of up to `elements` need."""
    return _STREAM_BYTES * elements + _SPARE


def frame_room(elements: int, itemsize: int) -> int:
    """Return the bytes within which `put_frame` stays: a frame of either kind to choose from.

    zstd is given 8 bytes more than the stream it is to make smaller; of most of the room no page
    is ever touched.
    """
    dense = HEADER_BYTES + elements * itemsize + 8
    sparse = HEADER_BYTES + _STREAM_BYTES * (elements // 2) + 8
    return dense + max(dense, sparse)


class Changes:
    """Room for the changes of one block at one step, or at several steps one after the other.

    Parameters
    ----------
    capacity : int
        Most changes: no fewer than the largest block has elements.
    itemsize : int
        Bytes per element: 1, 2 or 4.

    Attributes
    ----------
    count : int
        How many changes it holds now.
    positions : ndarray of uint32
        The first `count` lie inside the block; they ascend within each step.
    zigzags : ndarray of uint8, uint16 or uint32
        Zigzag code of each modular ordered difference; never 0.
    """

    def __init__(self, capacity: int, itemsize: int) -> None:
        self.count = 0
        self.positions = np.empty(capacity, np.uint32)
        self.zigzags: Bits = np.empty(capacity, f"u{itemsize}")

    @classmethod
    def over(cls, positions: NDArray[np.uint32], zigzags: Bits) -> Changes:
        """Return changes that are kept in these arrays."""
        changes = cls(0, zigzags.itemsize)
        changes.positions, changes.zigzags = positions, zigzags
        return changes

    def find(self, before: Bits, after: Bits) -> int:
        """Hold the changes from `before` to `after`, both (b,)."""
        masks = np.empty(MASKS_SHAPE, np.uint64)
        self.count = int(find_changes(before, after, masks, self.positions, self.zigzags))
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

    Attributes
    ----------
    streams : ndarray of uint8
    contexts : zstd.Contexts
        What `put_frame` and `take_frames` work in.
    """

    def __init__(self, elements: int, itemsize: int) -> None:
        self.elements = elements
        self.itemsize = itemsize
        # Of most bytes no page is ever touched.
        self.streams = np.empty(stream_bytes(elements), np.uint8)
        self.contexts = zstd.Contexts()

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
        out = np.empty(frame_room(elements, self.itemsize), np.uint8)
        size = put_frame(
            row,
            changes.positions,
            changes.zigzags,
            changes.count,
            elements,
            self.streams,
            self.contexts.handles,
            out,
        )
        return out[:size].tobytes()

    def decode(self, frame: bytes | memoryview, elements: int, changes: Changes) -> int:
        """Decode one whole frame into `changes`; return its row.

        Raises
        ------
        CorruptionError
            If the checksum does not hold or the frame does not describe such a block. Nothing is
            allocated on the word of the frame beyond this object's buffers.
        """
        checked_header(memoryview(frame), elements, self.itemsize)
        size, elements_of, first = np.array([[len(frame)], [elements], [0]], np.int64)
        raw = np.frombuffer(frame, np.uint8).copy()
        table = self.decode_frames(raw, size, elements_of, first, changes)
        return int(table[0, 0])

    def decode_frames(
        self,
        frames: NDArray[np.uint8],
        sizes: NDArray[np.int64],
        elements: NDArray[np.int64],
        firsts: NDArray[np.int64],
        changes: Changes,
    ) -> NDArray[np.int64]:
        """Decode frames of neighbouring blocks into `changes`, one behind the other.

        Parameters
        ----------
        frames : ndarray of uint8
            Whole frames, one behind the other.
        sizes, elements, firsts : ndarray of int64
            Of each: its bytes, the elements of its block, and where among the elements of all
            blocks that one begins.
        changes : Changes
            With room for all of them.

        Returns
        -------
        ndarray of int64, shape (3, frames)
            Row, number of changes and CRC-32C of each frame.

        Raises
        ------
        CorruptionError
            As in `decode`.
        """
        table = np.zeros((3, len(sizes)), np.int64)
        good, finding = take_frames(
            frames,
            sizes,
            elements,
            firsts,
            self.streams,
            self.contexts.handles,
            changes.positions,
            changes.zigzags,
            table,
        )
        if good < len(sizes):
            raise CorruptionError(_PROBLEMS[finding])
        changes.count = int(table[1].sum())
        return table


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
        raise CorruptionError(_PROBLEMS[BAD_HEADER])
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
    crc = google_crc32c.value(bytes(frame[:_CRC_AT]))
    crc = google_crc32c.extend(crc, np.frombuffer(frame, np.uint8)[HEADER.size :])
    if crc != header.crc32c:
        raise CorruptionError(_PROBLEMS[BAD_CHECKSUM])
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
