from __future__ import annotations

import math
import struct
import tracemalloc
from typing import NamedTuple

import google_crc32c
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from relex_stream.codec import (
    BAD_CHANGES,
    BAD_CHECKSUM,
    BAD_HEADER,
    BAD_STREAM,
    GOOD,
    HEADER,
    NO_ROOM,
    Changes,
    FrameCodec,
    checked_header,
    frame_crc,
    frame_room,
    put_frame,
    read_header,
    split_frames,
    stream_bytes,
    take_frames,
)
from relex_stream.errors import CorruptionError
from relex_stream.zstd import Contexts

SPARSE, DENSE = 1, 2
MAIN_ZSTD, EXTRA_ZSTD = 1, 2


def changes_of(positions, zigzags, elements, itemsize):
    changes = Changes(elements, itemsize)
    changes.count = len(positions)
    changes.positions[: changes.count] = positions
    changes.zigzags[: changes.count] = zigzags
    return changes


def random_changes(rng, elements, itemsize, share, largest_value):
    count = max(1, round(share * elements))
    positions = np.sort(rng.choice(elements, count, replace=False))
    top = min(largest_value, (1 << (8 * itemsize)) - 1)
    zigzags = rng.integers(1, top, count, np.uint64, endpoint=True)
    return changes_of(positions, zigzags, elements, itemsize)


class Guarded:
    """An array with known values behind it, which a kernel that minds its room leaves alone."""

    def __init__(self, size, dtype=np.uint8):
        self._whole = np.full(size + 64, 0xA5, dtype)
        self.room = self._whole[:size]

    @property
    def intact(self):
        return bool(np.all(self._whole[self.room.size :] == 0xA5))


def take(frames, elements=100, itemsize=2, capacity=None, sizes=None):
    """Decode frames by the kernel alone, which believes nothing, and watch where it writes.

    Returns what it found, and for each good frame row, positions and zigzags.
    """
    capacity = elements * max(1, len(frames)) if capacity is None else capacity
    sizes = [len(frame) for frame in frames] if sizes is None else sizes
    positions, zigzags = Guarded(capacity, np.uint32), Guarded(capacity, f"u{itemsize}")
    streams, table = Guarded(stream_bytes(elements)), Guarded(3 * len(sizes), np.int64)
    contexts = Contexts()
    good, finding = take_frames(
        np.frombuffer(b"".join(frames), np.uint8).copy(),
        np.array(sizes, np.int64),
        *(np.full(len(sizes), elements), np.zeros(len(sizes), np.int64)),
        *(streams.room, contexts.handles, positions.room, zigzags.room),
        table.room.reshape(3, len(sizes)),
    )
    assert positions.intact
    assert zigzags.intact
    assert streams.intact
    assert table.intact
    decoded = []
    at = 0
    for frame, row, count, crc in zip(frames, *table.room.reshape(3, -1)[:, :good], strict=False):
        here = slice(at, at + count)
        decoded.append((int(row), positions.room[here].tolist(), zigzags.room[here].tolist()))
        assert crc == frame_crc(frame)
        at += count
    assert (finding == GOOD) == (good == len(sizes))
    return finding, decoded


def check_round_trip(changes, row, elements, itemsize):
    frame = FrameCodec(elements, itemsize).encode(row, changes, elements)
    back = Changes(elements, itemsize)
    back.positions[:] = 0xDEADBEEF
    assert FrameCodec(elements, itemsize).decode(memoryview(frame), elements, back) == row
    assert back.count == changes.count
    assert np.array_equal(back.positions[: back.count], changes.positions[: changes.count])
    assert np.array_equal(back.zigzags[: back.count], changes.zigzags[: changes.count])
    return frame


# --- round trips -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    elements=st.integers(1, 3000),
    itemsize=st.sampled_from([1, 2, 4]),
    share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.005, 0.125, 0.5, 1.0])),
    magnitude=st.integers(0, 32),
    row=st.integers(0, 15),
    seed=st.integers(0, 2**32 - 1),
)
@example(elements=1, itemsize=1, share=1.0, magnitude=0, row=0, seed=0)
@example(elements=3000, itemsize=4, share=0.5, magnitude=32, row=15, seed=0)
def test_frames_give_their_changes_back(elements, itemsize, share, magnitude, row, seed):
    rng = np.random.default_rng(seed)
    changes = random_changes(rng, elements, itemsize, share, 1 << magnitude)
    frame = check_round_trip(changes, row, elements, itemsize)
    header = read_header(memoryview(frame), elements, itemsize)
    assert header.row == row
    assert header.frame_bytes == len(frame)
    assert header.count == (elements if header.dense else changes.count)


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 1 << 20)), min_size=1, max_size=40),
    behind=st.integers(0, 1 << 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_sparse_frames_hold_any_gaps(gaps, behind, seed):
    positions = np.cumsum(np.array(gaps) + 1) - 1
    elements = int(positions[-1]) + 1 + behind
    zigzags = np.random.default_rng(seed).integers(1, 1 << 16, len(gaps), np.uint16)
    check_round_trip(changes_of(positions, zigzags, elements, 2), 3, elements, 2)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_all_values_of_a_width_come_back(itemsize):
    largest = (1 << (8 * itemsize)) - 1
    edges = {1, 14, 15, 16, 17, 142, 143, 144, 255, 256, largest - 1, largest}
    zigzags = np.array(sorted(v for v in edges if v <= largest), np.uint64)
    if itemsize == 2:
        zigzags = np.arange(1, largest + 1)
    for elements in (zigzags.size, 100 * zigzags.size):
        step = elements // zigzags.size
        changes = changes_of(np.arange(zigzags.size) * step, zigzags, elements, itemsize)
        check_round_trip(changes, 1, elements, itemsize)


@pytest.mark.parametrize("share", [0.005, 1.0])
def test_a_block_of_full_size_comes_back(share):
    elements = 1 << 20
    rng = np.random.default_rng(0)
    changes = random_changes(rng, elements, 2, share, 6)
    frame = check_round_trip(changes, 7, elements, 2)
    if share < 1:
        # Entropy of a geometric gap and a uniform value, with 6 % for what Huffman and Rice waste.
        entropy = (-math.log2(share) - (1 - share) / share * math.log2(1 - share)) + math.log2(6)
        assert 8 * len(frame) / changes.count < 1.06 * entropy


def test_the_only_change_may_be_the_last_of_a_large_block():
    elements = 5 << 20
    check_round_trip(changes_of([elements - 1], [1], elements, 2), 0, elements, 2)


def test_a_codec_may_be_used_again_for_smaller_and_other_blocks():
    rng = np.random.default_rng(1)
    frames = FrameCodec(2000, 4)
    back = Changes(2000, 4)
    for elements in (2000, 3, 1999, 500, 1):
        for share in (1.0, 0.3, 0.01):
            changes = random_changes(rng, elements, 4, share, 1 << 32)
            frame = frames.encode(0, changes, elements)
            frames.decode(memoryview(frame), elements, back)
            count = changes.count
            assert back.count == count
            assert np.array_equal(back.positions[:count], changes.positions[:count])
            assert np.array_equal(back.zigzags[:count], changes.zigzags[:count])


# --- the choice of the kind --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "kinds"),
    [
        (0.01, {SPARSE}),
        (0.125, {SPARSE}),
        (0.2, {SPARSE, DENSE}),
        (0.5, {SPARSE, DENSE}),
        (0.51, {DENSE}),
        (1.0, {DENSE}),
    ],
)
@pytest.mark.parametrize("largest_value", [1, 100, 1 << 16])
def test_the_kind_follows_the_share_of_changes(share, kinds, largest_value):
    rng = np.random.default_rng(2)
    changes = random_changes(rng, 4000, 2, share, largest_value)
    frame = check_round_trip(changes, 0, 4000, 2)
    assert frame[1] in kinds


def varint(number):
    digits = []
    while number >= 128:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def packed(raw):
    """Return a stream as it is stored, and whether that is compressed."""
    smaller = bytes(zstd.compress(raw, 1)) if len(raw) > 16 else raw
    return (smaller, True) if len(smaller) < len(raw) else (raw, False)


def sparse_by_the_text(row, changes, elements):
    """Write a sparse frame from docs/store-format.md, a number at a time."""
    count = changes.count
    k = min(15, max(0, math.floor(math.log2(max((elements - count) / count * math.log(2), 1)))))
    symbols, low, low_bits, extra = bytearray(), 0, 0, bytearray()
    following = 0
    for position, zigzag in zip(
        changes.positions[:count].tolist(), changes.zigzags[:count].tolist(), strict=True
    ):
        gap, value = position - following, zigzag - 1
        following = position + 1
        high = gap >> k
        symbols.append(min(high, 15) << 4 | min(value, 15))
        low |= (gap & ((1 << k) - 1)) << low_bits
        low_bits += k
        extra += b"".join(varint(part - 15) for part in (high, value) if part >= 15)
    main, main_packed = packed(bytes(symbols))
    stored, extra_packed = packed(bytes(extra))
    return sealed(
        *(main, low.to_bytes((low_bits + 7) // 8, "little"), stored),
        row=row,
        rice_bits=k,
        flags=main_packed | extra_packed << 1,
        count=count,
        extra_raw_bytes=len(extra),
    )


def dense_by_the_text(row, changes, elements):
    """Write a dense frame likewise."""
    codes = np.zeros(elements, changes.zigzags.dtype)
    codes[changes.positions[: changes.count]] = changes.zigzags[: changes.count]
    planes = codes.view(np.uint8).reshape(elements, -1).T
    main, is_packed = packed(planes.tobytes())
    return sealed(main, row=row, kind=DENSE, flags=int(is_packed), count=elements)


@settings(max_examples=150, deadline=None)
@given(
    elements=st.integers(1, 1500),
    itemsize=st.sampled_from([1, 2, 4]),
    share=st.one_of(st.floats(0, 0.125), st.floats(0.501, 1)),
    magnitude=st.integers(0, 32),
    row=st.integers(0, 15),
    seed=st.integers(0, 2**32 - 1),
)
@example(elements=1000, itemsize=2, share=0.125, magnitude=3, row=0, seed=0)
def test_frames_are_those_of_the_format_byte_by_byte(
    elements, itemsize, share, magnitude, row, seed
):
    rng = np.random.default_rng(seed)
    changes = random_changes(rng, elements, itemsize, share, 1 << magnitude)
    frame = FrameCodec(elements, itemsize).encode(row, changes, elements)
    if 8 * changes.count <= elements:
        assert frame == sparse_by_the_text(row, changes, elements)
    elif 2 * changes.count > elements:
        assert frame == dense_by_the_text(row, changes, elements)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_between_the_kinds_the_smaller_one_wins(itemsize):
    rng = np.random.default_rng(3)
    seen = set()
    for share in (0.13, 0.15, 0.25, 0.35, 0.45, 0.5):
        for largest_value in (1, 255):
            changes = random_changes(rng, 4000, itemsize, share, largest_value)
            frame = FrameCodec(4000, itemsize).encode(5, changes, 4000)
            sparse = sparse_by_the_text(5, changes, 4000)
            dense = dense_by_the_text(5, changes, 4000)
            assert frame == min(sparse, dense, key=len)
            seen.add(frame[1])
    assert seen == {SPARSE, DENSE}


def test_a_kind_with_longer_streams_wins_if_they_compress():
    # Raw, the streams of the sparse frame are longer than the planes; compressed they are not.
    positions = np.sort(np.random.default_rng(9).choice(286, 140, replace=False))
    changes = changes_of(positions, [255] * 140, 286, 1)
    frame = FrameCodec(286, 1).encode(0, changes, 286)
    sparse = sparse_by_the_text(0, changes, 286)
    dense = dense_by_the_text(0, changes, 286)
    assert len(sparse) < len(dense)
    assert frame == sparse


@settings(max_examples=100, deadline=None)
@given(
    elements=st.integers(1, 600),
    itemsize=st.sampled_from([1, 2, 4]),
    share=st.floats(0, 1),
    magnitude=st.integers(0, 32),
    seed=st.integers(0, 2**32 - 1),
)
@example(elements=8, itemsize=1, share=0.125, magnitude=8, seed=0)
@example(elements=16, itemsize=1, share=0.125, magnitude=8, seed=0)
@example(elements=600, itemsize=1, share=0.5, magnitude=8, seed=0)
def test_a_frame_stays_in_its_room(elements, itemsize, share, magnitude, seed):
    rng = np.random.default_rng(seed)
    changes = random_changes(rng, elements, itemsize, share, 1 << magnitude)
    # Few changes with gaps and values as long as they can be.
    changes.positions[: changes.count] += np.uint32(
        elements - 1 - changes.positions[: changes.count].max()
    )
    room, streams = Guarded(frame_room(elements, itemsize)), Guarded(stream_bytes(elements))
    contexts = Contexts()
    size = put_frame(
        *(3, changes.positions, changes.zigzags, changes.count, elements),
        *(streams.room, contexts.handles, room.room),
    )
    assert room.intact
    assert streams.intact
    frame = room.room[:size].tobytes()
    assert frame == FrameCodec(elements, itemsize).encode(3, changes, elements)
    assert frame_crc(frame) == google_crc32c.value(frame[:20] + frame[24:])


# --- damage ------------------------------------------------------------------------------------


def frames_to_damage():
    rng = np.random.default_rng(4)
    return {
        "sparse, stored raw": (3, 40, 2, random_changes(rng, 40, 2, 0.1, 1 << 16)),
        "sparse, compressed": (5, 3000, 2, random_changes(rng, 3000, 2, 0.03, 3)),
        "sparse, extra compressed": (
            *(0, 2000, 4),
            changes_of(np.arange(50) * 40, np.full(50, 1 << 31), 2000, 4),
        ),
        "dense, compressed": (15, 300, 4, random_changes(rng, 300, 4, 1.0, 3)),
        "dense, stored raw": (0, 9, 1, random_changes(rng, 9, 1, 1.0, 255)),
    }


@pytest.mark.parametrize("name", frames_to_damage())
def test_every_flipped_byte_is_noticed(name):
    row, elements, itemsize, changes = frames_to_damage()[name]
    frames = FrameCodec(elements, itemsize)
    frame = frames.encode(row, changes, elements)
    back = Changes(elements, itemsize)
    for place in range(len(frame)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(frame)
            damaged[place] ^= flip
            with pytest.raises(CorruptionError):
                frames.decode(memoryview(damaged), elements, back)


@pytest.mark.parametrize("name", frames_to_damage())
def test_a_cut_or_longer_frame_is_noticed(name):
    row, elements, itemsize, changes = frames_to_damage()[name]
    frames = FrameCodec(elements, itemsize)
    frame = frames.encode(row, changes, elements)
    back = Changes(elements, itemsize)
    for length in range(len(frame)):
        with pytest.raises(CorruptionError):
            frames.decode(memoryview(frame)[:length], elements, back)
    for more in (b"\0", frame):
        with pytest.raises(CorruptionError, match="its header says"):
            frames.decode(memoryview(frame + more), elements, back)


def test_a_frame_of_a_larger_block_is_refused():
    changes = changes_of([99], [1], 100, 2)
    frame = FrameCodec(100, 2).encode(0, changes, 100)
    with pytest.raises(CorruptionError, match="inside its block"):
        FrameCodec(100, 2).decode(memoryview(frame), 99, changes)
    dense = changes_of(range(100), range(1, 101), 100, 2)
    frame = FrameCodec(100, 2).encode(0, dense, 100)
    with pytest.raises(CorruptionError):
        FrameCodec(100, 2).decode(memoryview(frame), 99, dense)
    with pytest.raises(CorruptionError, match="impossible fields"):
        FrameCodec(101, 2).decode(memoryview(frame), 101, Changes(101, 2))


# --- frames made to harm: the checksum holds ---------------------------------------------------


def sealed(
    main=b"",
    low=b"",
    extra=b"",
    *,
    row=0,
    kind=SPARSE,
    rice_bits=0,
    flags=0,
    count=0,
    main_bytes=None,
    extra_bytes=None,
    extra_raw_bytes=None,
):
    """Build a frame from the format's description alone, with a checksum that holds."""
    head = struct.pack(
        "<BBBBIIII",
        *(row, kind, rice_bits, flags, count),
        len(main) if main_bytes is None else main_bytes,
        len(extra) if extra_bytes is None else extra_bytes,
        len(extra) if extra_raw_bytes is None else extra_raw_bytes,
    )
    payload = main + low + extra
    return head + struct.pack("<I", google_crc32c.value(head + payload)) + payload


def decode(frame, elements=100, itemsize=2):
    changes = Changes(elements, itemsize)
    row = FrameCodec(elements, itemsize).decode(memoryview(frame), elements, changes)
    count = changes.count
    return row, changes.positions[:count].tolist(), changes.zigzags[:count].tolist()


def test_the_builder_of_hostile_frames_can_build_sound_ones():
    # Gaps 3, 0, 96 with values 1, 2 and 16: symbols, no low bits, and two varints.
    frame = sealed(bytes([0x30, 0x01, 0xFF]), b"", bytes([96 - 4 - 15, 0]), count=3)
    assert decode(frame, 101) == (0, [3, 4, 97], [1, 2, 16])
    frame = sealed(bytes([1, 0, 2, 3, 0, 4]), kind=DENSE, count=3, row=9)
    assert decode(frame, 3) == (9, [0, 2], [0x0301, 0x0402])


ONE = bytes([0x00])
HOSTILE_HEADERS = {
    "row": sealed(ONE, count=1, row=16),
    "kind 0": sealed(ONE, count=1, kind=0),
    "kind 3": sealed(ONE, count=1, kind=3),
    "rice_bits": sealed(ONE, bytes(2), count=1, rice_bits=16),
    "flags": sealed(ONE, count=1, flags=4),
    "no changes": sealed(count=0),
    "more changes than elements": sealed(bytes(101), count=101),
    "count of 2^32 - 1": sealed(ONE, count=2**32 - 1),
    "main_bytes beyond the block": sealed(bytes(201), count=1),
    "huge main_bytes": sealed(ONE, count=1, main_bytes=2**32 - 1),
    "huge extra_raw_bytes": sealed(ONE, extra=ONE, count=1, extra_raw_bytes=2**32 - 1),
    "extra_raw_bytes beyond two varints": sealed(bytes([0xF0]), extra=bytes(11), count=1),
    "extra longer than its raw bytes": sealed(ONE, extra=bytes(3), count=1, extra_raw_bytes=2),
    "dense with rice_bits": sealed(bytes(200), bytes(100), kind=DENSE, count=100, rice_bits=8),
    "dense with extra": sealed(bytes(200), extra=ONE, kind=DENSE, count=100),
    "dense beyond the block": sealed(bytes(200), kind=DENSE, count=101),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_impossible_headers_are_refused(name):
    with pytest.raises(CorruptionError, match="impossible fields"):
        decode(HOSTILE_HEADERS[name])
    assert take([HOSTILE_HEADERS[name]]) == (BAD_HEADER, [])


HOSTILE_STREAMS = {
    "position after the last": sealed(bytes([0xE0] * 7), count=7),
    "gap to 100 exactly": sealed(bytes([0xF0]), extra=bytes([85]), count=1),
    "gap of 2^35": sealed(bytes([0xF0]), extra=bytes([0xFF] * 4 + [0x7F]), count=1),
    "gap of 2^50": sealed(
        bytes([0xF0]), bytes([0xFF] * 2), bytes([0xFF] * 4 + [0x7F]), count=1, rice_bits=15
    ),
    "low bits beyond the block": sealed(ONE, bytes([100]), count=1, rice_bits=8),
    "value of 2^16": sealed(bytes([0x0F]), extra=bytes([0xF0, 0xFF, 0x03]), count=1),
    "value of 2^35": sealed(bytes([0x0F]), extra=bytes([0xFF] * 4 + [0x7F]), count=1),
    "varint of six bytes": sealed(bytes([0x0F]), extra=bytes([0x80] * 5 + [0]), count=1),
    "varint without an end": sealed(bytes([0x0F]), extra=bytes([0x80]), count=1),
    "missing extra": sealed(bytes([0xFF]), count=1),
    "extra left over": sealed(ONE, extra=ONE, count=1),
    "fewer symbols than the count": sealed(bytes(2), count=3),
    "more symbols than the count": sealed(bytes(4), count=3),
    "raw extra shorter than it says": sealed(bytes([0x0F]), extra=ONE, count=1, extra_raw_bytes=2),
    "dense planes too short": sealed(bytes(199), kind=DENSE, count=100),
    "dense of a shorter block": sealed(bytes(198), kind=DENSE, count=99),
}


@pytest.mark.parametrize("name", HOSTILE_STREAMS)
def test_streams_that_describe_no_such_block_are_refused(name):
    with pytest.raises(CorruptionError):
        decode(HOSTILE_STREAMS[name])
    finding, decoded = take([HOSTILE_STREAMS[name]])
    assert finding in {BAD_HEADER, BAD_STREAM, BAD_CHANGES}
    assert not decoded


def test_the_largest_value_of_the_width_is_the_limit():
    # 15 + 0xFFEF + 1 = 2^16 - 1, one below the hostile frame above.
    largest = sealed(bytes([0x0F]), extra=bytes([0xEF, 0xFF, 0x03]), count=1)
    assert decode(largest) == (0, [0], [0xFFFF])


def zstd_of(raw):
    return zstd.compress(bytes(raw), 1)


def zstd_frame(declared, content, *, repeat=0):
    """Write a zstd frame by hand (RFC 8878): a declared size and a raw or repeated block."""
    head = b"\x28\xb5\x2f\xfd"
    if declared is None:
        head += bytes([0, 0])  # a window descriptor and no size
    else:
        head += bytes([0b11100000]) + struct.pack("<Q", declared)
    kind, size = (1, repeat) if repeat else (0, len(content))
    return head + struct.pack("<I", size << 3 | kind << 1 | 1)[:3] + content


ZSTD_LIES = {
    "smaller content": zstd_of(bytes(50)),
    "larger content": zstd_of(bytes(101)),
    "declares more than it has": zstd_frame(100, bytes(50)),
    "declares less than it has": zstd_frame(100, bytes(150)),
    "declares its true, smaller size": zstd_frame(50, bytes(50)),
    "a bomb that declares 100 bytes": zstd_frame(100, b"\0", repeat=1 << 17),
    "a bomb that says so": zstd_frame(1 << 62, b"\0", repeat=1 << 17),
    "the largest size there is": zstd_frame(2**64 - 1, b"\0"),
    "no declared size": zstd_frame(None, bytes(100)),
    "two frames": zstd_of(bytes(50)) * 2,
    "a second frame behind a whole one": zstd_of(bytes(100)) + zstd_frame(None, b"abc"),
    "empty content": zstd_frame(0, b""),
    "cut off in its header": zstd_of(bytes(100))[:5],
    "cut off": zstd_of(bytes(100))[:-1],
    "not zstd": bytes(20),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ZSTD_LIES)
def test_compressed_streams_hold_exactly_what_the_frame_says(name):
    stream = ZSTD_LIES[name]
    # As the extra stream it would be that of 100 values of 16: one zero byte each.
    symbols = bytes([0x0F] * 100)
    for frame, itemsize in (
        (sealed(stream, count=100, flags=MAIN_ZSTD), 2),
        (sealed(stream, kind=DENSE, count=100, flags=MAIN_ZSTD), 1),
        (sealed(symbols, extra=stream, count=100, flags=EXTRA_ZSTD, extra_raw_bytes=100), 2),
    ):
        with pytest.raises(CorruptionError):
            decode(frame, 100, itemsize)
        finding, _ = take([frame], 100, itemsize)
        # Some are longer than any stream of such a block.
        assert finding == BAD_STREAM or (finding == BAD_HEADER and len(stream) > 100)


def test_compressed_streams_of_the_right_size_are_taken():
    expected = (0, list(range(100)), [1] * 100)
    for stream in (
        zstd_of(bytes(100)),
        zstd_frame(100, bytes(100)),
        zstd_frame(100, b"\0", repeat=100),
    ):
        assert decode(sealed(stream, count=100, flags=MAIN_ZSTD)) == expected
    for size in (255, 256, 257, 65_791, 65_792, 70_000):
        # zstd writes the size in 1, 2 or 4 bytes.
        frame = sealed(zstd_of(bytes(size)), count=size, flags=MAIN_ZSTD)
        assert decode(frame, size)[2] == [1] * size


def test_what_an_earlier_frame_left_behind_is_not_read():
    frames = FrameCodec(100, 1)
    back = Changes(100, 1)
    frames.decode(
        memoryview(sealed(zstd_of([7] * 100), kind=DENSE, count=100, flags=MAIN_ZSTD)), 100, back
    )
    assert back.count == 100
    short = sealed(zstd_of([7] * 50), kind=DENSE, count=100, flags=MAIN_ZSTD)
    with pytest.raises(CorruptionError, match="does not decompress to the bytes it should"):
        frames.decode(memoryview(short), 100, back)


# --- the kernel that decodes, alone ------------------------------------------------------------


def resealed(frame):
    """Return a frame with the checksum that its other bytes have."""
    return frame[:20] + struct.pack("<I", google_crc32c.value(frame[:20] + frame[24:])) + frame[24:]


def declared_bytes(stored):
    """Return the content size that a zstd frame declares; None for none (RFC 8878, 3.1.1.1)."""
    if len(stored) < 5 or stored[:4] != b"\x28\xb5\x2f\xfd":
        return None
    single_segment = stored[4] >> 5 & 1
    width = (single_segment, 2, 4, 8)[stored[4] >> 6]
    start = 6 - single_segment + (0, 1, 2, 4)[stored[4] & 3]
    number = stored[start : start + width]
    if not number or len(number) < width:
        return None
    return int.from_bytes(number, "little") + (256 if width == 2 else 0)


def stream_by_the_text(stored, size, is_packed):
    if not is_packed:
        assert len(stored) == size
        return stored
    assert declared_bytes(stored) == size
    out = bytearray(size)
    try:
        zstd.decompress(stored, out)
    except (RuntimeError, ValueError) as error:
        raise AssertionError from error
    return bytes(out)


def read_by_the_text(frame, elements, itemsize):
    """Read a frame with every check that docs/store-format.md asks for; None if one fails."""
    try:
        return checked_by_the_text(frame, elements, itemsize)
    except AssertionError:
        return None


def checked_by_the_text(frame, elements, itemsize):
    assert len(frame) >= 24
    head = struct.unpack("<BBBBIIIII", frame[:24])
    row, kind, k, flags, count, main_bytes, extra_bytes, extra_raw_bytes, crc = head
    assert row < 16
    assert kind in {SPARSE, DENSE}
    assert k < 16
    assert flags < 4
    assert main_bytes <= elements * itemsize
    assert crc == google_crc32c.value(frame[:20] + frame[24:])
    main, rest = frame[24 : 24 + main_bytes], frame[24 + main_bytes :]
    assert len(main) == main_bytes
    found = {}
    if kind == DENSE:
        assert count == elements
        assert flags < 2
        assert k == extra_bytes == extra_raw_bytes == len(rest) == 0
        planes = stream_by_the_text(main, count * itemsize, flags & 1)
        for position in range(count):
            if zigzag := int.from_bytes(planes[position::count], "little"):
                found[position] = zigzag
        return row, list(found), list(found.values())
    assert 0 < count <= elements
    assert extra_bytes <= extra_raw_bytes <= 10 * count
    low_bytes = -(-count * k // 8)
    assert len(rest) == low_bytes + extra_bytes
    low = int.from_bytes(rest[:low_bytes], "little")
    symbols = stream_by_the_text(main, count, flags & 1)
    extra = iter(stream_by_the_text(rest[low_bytes:], extra_raw_bytes, flags & 2))

    def more(part):
        if part < 15:
            return part
        for place in range(5):
            digit = next(extra, None)
            assert digit is not None
            part += (digit & 127) << 7 * place
            if digit < 128:
                return part
        raise AssertionError

    position = -1
    for symbol in symbols:
        high = more(symbol >> 4)
        zigzag = more(symbol & 15) + 1
        position += 1 + (high << k) + (low & ((1 << k) - 1))
        low >>= k
        assert position < elements
        assert zigzag < 1 << 8 * itemsize
        found[position] = zigzag
    assert next(extra, None) is None
    return row, list(found), list(found.values())


def agrees_with_the_text(frame, elements, itemsize):
    """Check that the kernel takes what the text allows, no more and no less; return if it did."""
    expected = read_by_the_text(frame, elements, itemsize)
    finding, decoded = take([frame], elements, itemsize)
    if expected is None:
        assert finding != GOOD
    else:
        assert (finding, decoded) == (GOOD, [expected])
    return expected is not None


def test_frames_lie_one_behind_the_other_and_so_do_their_changes():
    rng = np.random.default_rng(5)
    elements, itemsize = 500, 2
    codec = FrameCodec(elements, itemsize)
    frames, expected = [], []
    for row, share in enumerate((0.002, 1.0, 0.02, 0.3, 0.002)):
        changes = random_changes(rng, elements, itemsize, share, 1 << 16)
        frames.append(codec.encode(3 * row, changes, elements))
        some = slice(changes.count)
        expected.append((3 * row, changes.positions[some].tolist(), changes.zigzags[some].tolist()))
    in_all = sum(len(positions) for _, positions, _ in expected)
    assert take(frames, elements, itemsize, capacity=in_all) == (GOOD, expected)
    assert take([], elements) == (GOOD, [])
    # Through the class that owns the buffers, as if of neighbouring blocks.
    sizes = np.array([len(frame) for frame in frames])
    firsts = np.array([0, 0, 500, 1000, 70_000])
    places = np.full(5, elements), firsts
    back = Changes(in_all, itemsize)
    table = codec.decode_frames(
        np.frombuffer(b"".join(frames), np.uint8).copy(), sizes, *places, back
    )
    assert table[0].tolist() == [row for row, _, _ in expected]
    assert table[1].tolist() == [len(positions) for _, positions, _ in expected]
    assert table[2].tolist() == [frame_crc(frame) for frame in frames]
    assert back.count == in_all
    assert back.positions.tolist() == [
        first + p
        for first, (_, positions, _) in zip(firsts, expected, strict=True)
        for p in positions
    ]
    assert back.zigzags.tolist() == [z for _, _, zigzags in expected for z in zigzags]
    # One that is wrong: those before it are given, it and those behind it are not.
    for place in range(5):
        damaged = [*frames]
        damaged[place] = damaged[place][:-1] + bytes([damaged[place][-1] ^ 1])
        finding, decoded = take(damaged, elements, itemsize)
        assert (finding, decoded) == (BAD_CHECKSUM, expected[:place])
        with pytest.raises(CorruptionError, match="checksum"):
            codec.decode_frames(
                np.frombuffer(b"".join(damaged), np.uint8).copy(), sizes, *places, back
            )


def test_more_changes_than_there_is_room_for_are_refused():
    rng = np.random.default_rng(6)
    codec = FrameCodec(400, 2)
    for share in (0.05, 0.9):
        changes = random_changes(rng, 400, 2, share, 1 << 16)
        frame = codec.encode(0, changes, 400)
        count = changes.count
        for room in (0, 1, count - 1):
            assert take([frame], 400, capacity=room) == (NO_ROOM, [])
            finding, decoded = take([frame, frame], 400, capacity=count + room)
            assert (finding, len(decoded)) == (NO_ROOM, 1)
        assert take([frame], 400, capacity=count)[0] == GOOD
        with pytest.raises(CorruptionError, match="more changes than are committed"):
            codec.decode(frame, 400, Changes(count - 1, 2))


def test_counts_that_lie_are_found_out():
    rng = np.random.default_rng(7)
    for name, (row, elements, itemsize, changes) in frames_to_damage().items():
        frame = FrameCodec(elements, itemsize).encode(row, changes, elements)
        count = struct.unpack_from("<I", frame, 4)[0]
        for lie in {0, 1, count - 1, count + 1, elements + 1, 2**31, 2**32 - 1} - {count}:
            lying = resealed(frame[:4] + struct.pack("<I", lie) + frame[8:])
            assert take([lying], elements, itemsize)[0] != GOOD, (name, lie)
        for field in (8, 12, 16):
            true = struct.unpack_from("<I", frame, field)[0]
            for lie in {0, true - 1, true + 1, 2**31, 2**32 - 1, int(rng.integers(2**32))} - {
                true,
                -1,
            }:
                lying = resealed(frame[:field] + struct.pack("<I", lie) + frame[field + 4 :])
                assert take([lying], elements, itemsize)[0] != GOOD, (name, field, lie)


def test_sizes_that_lie_are_found_out():
    changes = changes_of([5, 70], [3, 400], 100, 2)
    frame = FrameCodec(100, 2).encode(1, changes, 100)
    for size in (0, 1, 23, 24, len(frame) - 1, len(frame) + 1, 10 * len(frame)):
        finding, decoded = take([frame, frame], sizes=[size, 2 * len(frame) - size])
        assert finding in {BAD_HEADER, BAD_CHECKSUM}
        assert not decoded


@pytest.mark.parametrize("name", frames_to_damage())
def test_every_cut_with_a_sound_checksum_is_noticed(name):
    row, elements, itemsize, changes = frames_to_damage()[name]
    frame = FrameCodec(elements, itemsize).encode(row, changes, elements)
    for length in range(len(frame)):
        cut = frame[:length] if length < 24 else resealed(frame[:length])
        assert take([cut], elements, itemsize)[0] != GOOD
    assert take([resealed(frame + b"\0")], elements, itemsize)[0] != GOOD
    assert take([resealed(frame + frame)], elements, itemsize)[0] != GOOD


@pytest.mark.parametrize("name", frames_to_damage())
def test_damage_under_a_sound_checksum_is_read_as_the_text_says(name):
    row, elements, itemsize, changes = frames_to_damage()[name]
    frame = FrameCodec(elements, itemsize).encode(row, changes, elements)
    assert agrees_with_the_text(frame, elements, itemsize)
    rng = np.random.default_rng(8)
    taken = 0
    for _ in range(600):
        damaged = bytearray(frame)
        # Half of the time where the fields are.
        reach = len(frame) if rng.random() < 0.5 else min(len(frame), 40)
        for place in rng.integers(0, reach, int(rng.integers(1, 4))):
            damaged[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
        taken += agrees_with_the_text(resealed(bytes(damaged)), elements, itemsize)
    assert 0 < taken < 600  # some damage makes another sound frame


fields = st.one_of(st.integers(0, 60), st.sampled_from([2**31, 2**32 - 1]))


@settings(max_examples=400, deadline=None)
@given(
    elements=st.integers(1, 40),
    itemsize=st.sampled_from([1, 2, 4]),
    head=st.tuples(
        st.integers(0, 17), st.integers(0, 3), st.integers(0, 17), st.integers(0, 5), fields
    ),
    main=st.binary(max_size=60),
    low=st.binary(max_size=20),
    extra=st.binary(max_size=40),
    lengths=st.one_of(st.none(), st.tuples(fields, fields, fields)),
    compressed=st.booleans(),
)
def test_frames_of_any_content_are_read_as_the_text_says(
    elements, itemsize, head, main, low, extra, lengths, compressed
):
    if compressed:
        main, extra = (bytes(zstd.compress(stream, 1)) for stream in (main, extra))
    row, kind, rice_bits, flags, count = head
    main_bytes, extra_bytes, extra_raw_bytes = lengths or (None, None, None)
    frame = sealed(
        *(main, low, extra),
        row=row,
        kind=kind,
        rice_bits=rice_bits,
        flags=flags,
        count=count,
        main_bytes=main_bytes,
        extra_bytes=extra_bytes,
        extra_raw_bytes=extra_raw_bytes,
    )
    agrees_with_the_text(frame, elements, itemsize)


@settings(max_examples=300, deadline=None)
@given(
    symbols=st.lists(st.sampled_from([0x00, 0x01, 0x0F, 0xF0, 0xFF, 0x35]), min_size=1, max_size=8),
    rice_bits=st.integers(0, 15),
    low=st.binary(min_size=15, max_size=15),
    extra=st.lists(st.sampled_from([0, 1, 9, 127, 128, 129, 255]), max_size=24),
    elements=st.sampled_from([8, 30, 300, 100_000]),
    itemsize=st.sampled_from([1, 2, 4]),
)
@example([0xFF] * 8, 15, b"\xff" * 15, [255, 255, 255, 255, 127] * 16, 100_000, 4)
def test_varints_and_low_bits_of_any_content_are_read_as_the_text_says(
    symbols, rice_bits, low, extra, elements, itemsize
):
    low_bytes = (len(symbols) * rice_bits + 7) // 8
    frame = sealed(
        *(bytes(symbols), low[:low_bytes], bytes(extra)), rice_bits=rice_bits, count=len(symbols)
    )
    agrees_with_the_text(frame, elements, itemsize)


def test_the_longest_streams_there_can_be_fit_the_scratch():
    # Every element with 15 low bits and two varints of five bytes: 13 bytes each, one element to 9.
    for count in range(1, 10):
        extra = bytes([128, 128, 128, 128, 0] * 2 * count)
        frame = sealed(
            *(bytes([0xFF] * count), bytes(-(-15 * count // 8)), extra),
            rice_bits=15,
            count=count,
        )
        assert take([frame], count)[0] == BAD_CHANGES  # the first position is 15 << 15
        small = sealed(bytes([0x0F] * count), extra=extra[: 5 * count], count=count)
        assert take([small], count) == (GOOD, [(0, list(range(count)), [16] * count)])


def test_decoding_takes_memory_by_the_block_not_by_the_frame():
    elements = 10_000
    frames, back = FrameCodec(elements, 4), Changes(elements, 4)
    hostile = [
        sealed(zstd_frame(1 << 40, b"\0", repeat=1 << 17), count=elements, flags=MAIN_ZSTD),
        sealed(
            bytes([0xFF] * elements),
            extra=zstd_frame(10 * elements, b"\0", repeat=1 << 17),
            count=elements,
            flags=EXTRA_ZSTD,
            extra_raw_bytes=10 * elements,
        ),
        sealed(ONE, count=1, extra_bytes=2**31, extra_raw_bytes=2**32 - 1),
    ]
    tracemalloc.start()
    try:
        for frame in hostile:
            with pytest.raises(CorruptionError):
                frames.decode(memoryview(frame), elements, back)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * elements


# --- chunks ------------------------------------------------------------------------------------


def chunk_of(rows):
    frames = FrameCodec(100, 2)
    return [frames.encode(row, changes_of([row], [row + 1], 100, 2), 100) for row in rows]


def test_split_frames_gives_the_frames_of_a_chunk():
    parts = chunk_of([0, 1, 5, 15])
    split = split_frames(memoryview(b"".join(parts)), 100, 2)
    assert [bytes(frame) for frame in split] == parts
    assert list(split_frames(memoryview(b""), 100, 2)) == []


@pytest.mark.parametrize("rows", [(3, 3), (3, 2), (0, 15, 1)])
def test_split_frames_wants_ascending_rows(rows):
    with pytest.raises(CorruptionError, match=rf"row {rows[-1]} comes after row {rows[-2]}"):
        list(split_frames(memoryview(b"".join(chunk_of(rows))), 100, 2))


def test_split_frames_notices_where_a_chunk_is_cut():
    parts = chunk_of([2, 9])
    chunk = b"".join(parts)
    for length in range(1, len(chunk)):
        if length == len(parts[0]):
            assert len(list(split_frames(memoryview(chunk[:length]), 100, 2))) == 1
            continue
        with pytest.raises(CorruptionError, match="cut off"):
            list(split_frames(memoryview(chunk[:length]), 100, 2))


def test_split_frames_does_not_trust_headers():
    with pytest.raises(CorruptionError, match="impossible"):
        list(split_frames(memoryview(HOSTILE_HEADERS["huge main_bytes"]), 100, 2))


def test_checked_header_checks_the_whole_frame():
    frame = bytearray(chunk_of([4])[0])
    assert checked_header(memoryview(frame), 100, 2).row == 4
    frame[-1] ^= 1
    assert read_header(memoryview(frame), 100, 2).row == 4
    with pytest.raises(CorruptionError, match="checksum"):
        checked_header(memoryview(frame), 100, 2)


# --- frozen bytes ------------------------------------------------------------------------------


# The format is frozen: these bytes mean this for ever. Only add to the lists.
class Frozen(NamedTuple):
    frame: str
    row: int
    elements: int
    itemsize: int
    positions: list[int]
    zigzags: list[int]


FROZEN_RAW = [
    Frozen(
        "05010700040000000400000005000000050000009422566c00013f3f00035b0eefff039c02",
        5,
        1000,
        2,
        [0, 7, 500, 999],
        [1, 2, 65535, 300],
    ),
    Frozen(
        "00010e0002000000020000000600000006000000647cb4e00f4f03c05a04efffffff0f00",
        0,
        70_000,
        4,
        [3, 69_999],
        [2**32 - 1, 16],
    ),
    Frozen(
        "0f01020001000000010000000200000002000000899f03c32f00ef01",
        15,
        9,
        1,
        [8],
        [255],
    ),
    Frozen(
        "02020000040000000800000000000000000000002fb64aad020300ff010000ff",
        2,
        4,
        2,
        [0, 1, 3],
        [0x0102, 3, 65535],
    ),
    Frozen(
        "0702000003000000030000000000000000000000ce97b4fa0102ff",
        7,
        3,
        1,
        [0, 1, 2],
        [1, 2, 255],
    ),
]
FROZEN_COMPRESSED = [
    Frozen(
        (
            "0101050140000000120000000000000000000000475b72e328b52ffd20404d00001800111001004a7243"
            "e0ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
        ),
        1,
        4096,
        2,
        list(range(0, 4096, 64)),
        [1, 2] * 32,
    ),
    Frozen(
        (
            "010200012800000015000000000000000000000066556cb428b52ffd205065000020030100000200c183"
            "f7382c"
        ),
        1,
        40,
        2,
        list(range(40)),
        [3, 1] * 20,
    ),
    Frozen(
        (
            "01010603280000001100000013000000780000000e179b1928b52ffd2028450000100f1f01001f8005c0"
            "388ee3388ee3388ee3388ee3388ee3388ee3388ee3388ee3388ee3388e28b52ffd207855000018b0b802"
            "0100d2d40d01"
        ),
        1,
        4000,
        2,
        list(range(0, 4000, 100)),
        [40_000] * 40,
    ),
]


@pytest.mark.parametrize("frozen", FROZEN_RAW + FROZEN_COMPRESSED, ids=lambda f: f[0][:24])
def test_frozen_frames_decode(frozen):
    frame, row, elements, itemsize, positions, zigzags = frozen
    assert decode(bytes.fromhex(frame), elements, itemsize) == (row, positions, zigzags)


@pytest.mark.parametrize("frozen", FROZEN_RAW, ids=lambda f: f[0][:24])
def test_frozen_frames_are_still_written(frozen):
    # Not the compressed ones: another zstd may compress otherwise.
    frame, row, elements, itemsize, positions, zigzags = frozen
    changes = changes_of(positions, zigzags, elements, itemsize)
    assert FrameCodec(elements, itemsize).encode(row, changes, elements).hex() == frame


def test_the_header_is_24_bytes():
    assert HEADER.size == 24
    assert HEADER.format == "<BBBBIIIII"
