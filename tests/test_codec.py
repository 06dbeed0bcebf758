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
    HEADER,
    Changes,
    FrameCodec,
    checked_header,
    read_header,
    split_frames,
)
from relex_stream.errors import CorruptionError

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


def test_between_the_kinds_the_smaller_one_wins():
    rng = np.random.default_rng(3)
    seen = set()
    for share in (0.15, 0.25, 0.35, 0.45):
        for largest_value in (1, 255):
            changes = random_changes(rng, 4000, 2, share, largest_value)
            frames = FrameCodec(4000, 2)
            sizes = {
                SPARSE: len(frames._encode_sparse(0, changes, 4000)),
                DENSE: len(frames._encode_dense(0, changes, 4000)),
            }
            frame = frames.encode(0, changes, 4000)
            assert len(frame) == min(sizes.values())
            seen.add(frame[1])
    assert seen == {SPARSE, DENSE}


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
    with pytest.raises(CorruptionError, match="100 elements in a block of 101"):
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
    with pytest.raises(CorruptionError):
        decode(sealed(stream, count=100, flags=MAIN_ZSTD))
    with pytest.raises(CorruptionError):
        decode(sealed(stream, kind=DENSE, count=100, flags=MAIN_ZSTD), 100, 1)
    # The same as the extra stream: 100 values of 16, one zero byte each.
    symbols = bytes([0x0F] * 100)
    with pytest.raises(CorruptionError):
        decode(sealed(symbols, extra=stream, count=100, flags=EXTRA_ZSTD, extra_raw_bytes=100))


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
    with pytest.raises(CorruptionError, match="does not hold the 100 bytes"):
        frames.decode(memoryview(short), 100, back)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_under_a_sound_checksum_never_leaves_the_block(data):
    name = data.draw(st.sampled_from(sorted(frames_to_damage())))
    row, elements, itemsize, changes = frames_to_damage()[name]
    frames = FrameCodec(elements, itemsize)
    frame = bytearray(frames.encode(row, changes, elements))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    struct.pack_into("<I", frame, 20, google_crc32c.value(bytes(frame[:20] + frame[24:])))
    # Room beyond the block, to see that nothing is written there.
    back = Changes(elements + 8, itemsize)
    back.positions[:], back.zigzags[:] = 0xDEADBEEF, 0xAA
    try:
        frames.decode(memoryview(frame), elements, back)
    except CorruptionError:
        pass
    else:
        positions = back.positions[: back.count].astype(np.int64)
        assert np.all(np.diff(positions) > 0)
        assert 0 <= positions[0] <= positions[-1] < elements
        assert np.all(back.zigzags[: back.count] > 0)
    assert np.all(back.positions[elements:] == 0xDEADBEEF)
    assert np.all(back.zigzags[elements:] == 0xAA)


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
