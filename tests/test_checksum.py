"""The kernels' CRC-32C is google_crc32c's, for every length, place and start."""

from __future__ import annotations

import os
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import checksum

ONES = 0xFFFFFFFF
RUN_BYTES = 8 * checksum._RUN_WORDS
AROUND_RUNS = [
    whole + more for whole in (RUN_BYTES, 3 * RUN_BYTES, 6 * RUN_BYTES) for more in range(-9, 10)
]


def some_bytes(size, seed=0):
    return np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)


def by_words(words_of, crc, raw):
    """Compute what `extend` does of whole words by one of its two ways."""
    return int(words_of(np.uint64(crc ^ ONES), raw, raw.size // 8)) ^ ONES


def test_the_check_value_of_the_polynomial():
    assert checksum.extend(np.uint32(0), np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert checksum.extend(np.uint32(0), np.zeros(0, np.uint8)) == 0
    assert checksum.extend(np.uint32(0), np.zeros(32, np.uint8)) == 0x8A9136AA  # RFC 3720, B.4
    assert checksum.extend(np.uint32(0), np.full(32, 255, np.uint8)) == 0x62A8AB43


@pytest.mark.parametrize("sizes", [range(130), AROUND_RUNS], ids=["short", "around runs"])
def test_every_length_at_every_alignment(sizes):
    raw = some_bytes(max(sizes) + 8)
    for size in sizes:
        for start in range(8):
            part = raw[start : start + size]
            assert checksum.extend(np.uint32(0), part) == google_crc32c.value(part.tobytes())


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(0, 40_000),
    start=st.integers(0, 15),
    crc=st.integers(0, ONES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bytes_behind_any_others(size, start, crc, seed):
    part = some_bytes(size + start, seed)[start:]
    assert checksum.extend(np.uint32(crc), part) == google_crc32c.extend(crc, part.tobytes())


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 60_000), max_size=5), seed=st.integers(0, 2**32 - 1))
def test_pieces_give_the_checksum_of_the_whole(cuts, seed):
    raw = some_bytes(60_000, seed)
    crc = np.uint32(0)
    for piece in np.split(raw, sorted(cuts)):
        crc = checksum.extend(crc, piece)
    assert crc == google_crc32c.value(raw.tobytes())


def test_every_bit_counts():
    raw = some_bytes(3 * RUN_BYTES + 20).copy()
    whole = checksum.extend(np.uint32(0), raw)
    for place in (0, RUN_BYTES - 1, RUN_BYTES, 2 * RUN_BYTES + 7, 3 * RUN_BYTES, raw.size - 1):
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert checksum.extend(np.uint32(0), raw) != whole
            raw[place] ^= 1 << bit


WAYS = {"table": checksum._words_by_table} | (
    {"instruction": checksum._words_by_instruction} if checksum.IN_HARDWARE else {}
)


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_to_take_words_agree_with_the_library(way):
    raw = some_bytes(7 * RUN_BYTES + 1)[1:]
    for words in (0, 1, 2, 511, 512, 513, 1535, 1536, 1537, 3071, 3072, 3073, 3584):
        for crc in (0, 1, 0xE3069283, ONES):
            part = raw[: 8 * words]
            expected = google_crc32c.extend(crc, part.tobytes())
            assert by_words(WAYS[way], crc, part) == expected


GENERIC = """
import google_crc32c, numpy as np
from relex_stream import checksum
assert not checksum.IN_HARDWARE
raw = np.frombuffer(bytes(range(251)) * 60, np.uint8)
for part in (raw, raw[3:], raw[:9], raw[:0]):
    assert checksum.extend(np.uint32(7), part) == google_crc32c.extend(7, part.tobytes())
"""


def test_kernels_for_any_processor_do_without_the_instruction(tmp_path):
    # The compiler ends the process at an instruction that it was told the processor lacks.
    done = subprocess.run(
        [sys.executable, "-c", GENERIC],
        env=os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
