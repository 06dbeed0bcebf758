"""zstd called from kernels does what numcodecs' own binding of the same library does."""

from __future__ import annotations

import ctypes
import gc
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd as by_numcodecs

from relex_stream import zstd

GUARD = 32


def as_array(data):
    return np.frombuffer(bytes(data), np.uint8)


def compressed(contexts, raw, room):
    """Compress into `room` bytes; return None where they do not suffice."""
    out = np.full(room + GUARD, 0xEE, np.uint8)
    size = zstd.compress(contexts.handles, raw, 1, out[:room])
    assert np.all(out[room:] == 0xEE)
    assert -1 <= size <= room
    return None if size < 0 else out[:size].tobytes()


def decompressed(contexts, packed, room):
    """Decompress to `room` bytes; return None where that is not what there is."""
    out = np.full(room + GUARD, 0xEE, np.uint8)
    size = zstd.decompress(contexts.handles, as_array(packed), out[:room])
    assert np.all(out[room:] == 0xEE)
    assert size in {-1, room}
    return None if size < 0 else out[:room].tobytes()


raws = st.one_of(
    st.binary(max_size=300),
    st.tuples(st.binary(min_size=1, max_size=9), st.integers(1, 3000)).map(lambda p: p[0] * p[1]),
)


@settings(max_examples=150, deadline=None)
@given(raw=raws)
def test_the_bytes_are_those_of_numcodecs_and_come_back(raw):
    contexts = zstd.Contexts()
    expected = bytes(by_numcodecs.compress(raw, 1))
    assert compressed(contexts, as_array(raw), len(raw) + 1000) == expected
    assert decompressed(contexts, expected, len(raw)) == raw


def test_contexts_are_used_again_after_anything():
    contexts = zstd.Contexts()
    rng = np.random.default_rng(0)
    for size in (100_000, 3, 0, 5000, 20):
        raw = (rng.integers(0, 4, size) ** 3).astype(np.uint8).tobytes()
        expected = bytes(by_numcodecs.compress(raw, 1))
        assert compressed(contexts, as_array(raw), 3) is None
        assert decompressed(contexts, b"not zstd at all", size) is None
        assert compressed(contexts, as_array(raw), size + 1000) == expected
        assert decompressed(contexts, expected[:-1], size) is None
        assert decompressed(contexts, expected, size) == raw


def test_no_room_is_an_answer_and_nothing_is_written_behind_it():
    contexts = zstd.Contexts()
    raw = as_array(np.random.default_rng(1).bytes(500))
    whole = bytes(by_numcodecs.compress(raw.tobytes(), 1))
    for room in range(len(whole)):
        assert compressed(contexts, raw, room) is None


@pytest.mark.parametrize("size", [0, 1, 100, 70_000])
def test_only_content_of_exactly_the_size_asked_for_is_taken(size):
    contexts = zstd.Contexts()
    raw = bytes(i % 7 for i in range(size))
    packed = bytes(by_numcodecs.compress(raw, 1))
    assert decompressed(contexts, packed, size) == raw
    for other in {0, 1, size - 1, size + 1, 2 * size} - {size, -1}:
        assert decompressed(contexts, packed, other) is None


def frame(declared, content, *, repeat=0):
    """Write a zstd frame by hand (RFC 8878): a declared size and a raw or repeated block."""
    head = b"\x28\xb5\x2f\xfd"
    head += bytes([0, 0]) if declared is None else b"\xe0" + struct.pack("<Q", declared)
    kind, size = (1, repeat) if repeat else (0, len(content))
    return head + struct.pack("<I", size << 3 | kind << 1 | 1)[:3] + content


LIES = {
    "no declared size": frame(None, bytes(100)),
    "declares more than it has": frame(100, bytes(50)),
    "declares less than it has": frame(100, bytes(150)),
    "a bomb": frame(100, b"\0", repeat=1 << 17),
    "an honest bomb": frame(1 << 62, b"\0", repeat=1 << 17),
    "the largest size there is": frame(2**64 - 1, b"\0"),
    "the second largest": frame(2**64 - 2, b"\0"),
    "two halves": bytes(by_numcodecs.compress(bytes(50), 1)) * 2,
    "one more behind it": bytes(by_numcodecs.compress(bytes(100), 1)) + frame(None, b"abc"),
    "nothing": b"",
    "zeros": bytes(40),
}


@pytest.mark.parametrize("name", LIES)
def test_streams_that_are_not_what_they_declare_are_refused(name):
    assert decompressed(zstd.Contexts(), LIES[name], 100) is None


def test_damage_never_leaves_the_room():
    contexts = zstd.Contexts()
    rng = np.random.default_rng(2)
    raw = (rng.integers(0, 30, 2000) ** 2 % 251).astype(np.uint8).tobytes()
    packed = bytes(by_numcodecs.compress(raw, 1))
    for _ in range(3000):
        damaged = bytearray(packed)
        for place in rng.integers(0, len(packed), int(rng.integers(1, 4))):
            damaged[place] = rng.integers(256)
        decompressed(contexts, damaged[: int(rng.integers(1, len(packed) + 1))], len(raw))


def test_threads_with_contexts_of_their_own_do_not_disturb_each_other():
    def work(seed):
        contexts, rng = zstd.Contexts(), np.random.default_rng(seed)
        for _ in range(100):
            raw = rng.integers(0, 5, int(rng.integers(1, 20_000))).astype(np.uint8)
            packed = compressed(contexts, raw, raw.size + 1000)
            assert packed == bytes(by_numcodecs.compress(raw.tobytes(), 1))
            assert decompressed(contexts, packed, raw.size) == raw.tobytes()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_contexts_live_as_long_as_their_handles_and_no_longer(monkeypatch):
    library = ctypes.CDLL(by_numcodecs.__file__)
    made, freed = [], []

    class Recording:
        """The library, with a record of the contexts that it makes and frees."""

        def __getattr__(self, name):
            def call(*addresses):
                function = getattr(library, name)
                function.restype = ctypes.c_void_p
                result = function(*map(ctypes.c_void_p, addresses))
                (freed if addresses else made).append(addresses[0] if addresses else result)
                return result

            return call

    monkeypatch.setattr(zstd, "_LIBRARY", Recording())
    handles = zstd.Contexts().handles
    part = handles[1:]
    del handles
    gc.collect()
    assert len(made) == 2
    assert not freed
    del part
    gc.collect()
    assert sorted(freed) == sorted(made)
