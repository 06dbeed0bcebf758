"""zstd frames piece by piece, whole, cut off, too long and made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from numpy.typing import NDArray

from relex_stream import zstd_stream
from relex_stream.zstd_stream import ZstdStream


def stream_of(packed: bytes) -> ZstdStream:
    data = np.frombuffer(packed, np.uint8)

    def read(offset: int, out: NDArray[np.uint8]) -> None:
        assert offset + out.size <= data.size
        out[:] = data[offset : offset + out.size]

    return ZstdStream(read, data.size)


def unpacked(packed: bytes, nbytes: int, piece: int) -> bytes:
    out = np.empty(nbytes, np.uint8)
    with stream_of(packed) as stream:
        for start in range(0, nbytes, piece):
            stream.fill(out[start : start + piece])
        stream.finish()
    return out.tobytes()


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 400), st.integers(1, 40), st.integers(1, 9))
def test_pieces_of_any_size(data: bytes, piece: int, read_bytes: int, times: int) -> None:
    data *= times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstd_stream, "_READ_BYTES", read_bytes)
        assert unpacked(zstd.compress(data, 1), len(data), piece) == data


DATA = np.random.default_rng(0).integers(0, 4, 50_000).astype(np.uint8).tobytes()
PACKED = zstd.compress(DATA, 1)


@pytest.mark.parametrize(
    ("packed", "nbytes", "problem"),
    [
        (PACKED, len(DATA) + 1, "it ends 1 bytes too early"),
        (PACKED, len(DATA) - 1, "it holds more than it should"),
        (PACKED[:-1], len(DATA), "too early|cut off"),
        (PACKED[: len(PACKED) // 2], len(DATA), "too early"),
        (b"", 1, "it ends 1 bytes too early"),
        (b"", 0, "cut off"),
        (PACKED + b"x", len(DATA), "something follows its end"),
        (PACKED + PACKED, len(DATA), "something follows its end"),
        (b"no zstd at all", 3, "it is no zstd frame, or damaged"),
        (PACKED[:6] + bytes(20) + PACKED[26:], len(DATA), "damaged|too early"),
    ],
)
def test_what_is_wrong_is_told(packed: bytes, nbytes: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        unpacked(packed, nbytes, 1000)


def test_what_looks_back_too_far_is_refused() -> None:
    # A window of 16 MiB, which zstd would take by itself: magic number, descriptor, window.
    frame = bytes.fromhex("28b52ffd") + bytes([0x00, (24 - 10) << 3]) + bytes(3)
    with pytest.raises(ValueError, match=r"too much memory|Frame requires"):
        unpacked(frame, 1, 1)
