"""CRC-32C inside compiled kernels.

The same checksum as google_crc32c's, which Python code uses: that library cannot be called from a
kernel, and it holds the GIL. The polynomial's tables are made with it. On x86 the processor's
instruction does the work, on three runs of bytes at a time, because one instruction waits for the
one before it (Gopal et al., Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction,
2011); elsewhere a table does, a byte at a time.
"""

from __future__ import annotations

import google_crc32c
import llvmlite.binding
import numpy as np
from numba import config, njit
from numpy.typing import NDArray

from relex_stream.intrinsics import crc32c_word_sse42, load_word
from relex_stream.kernels import kernel

_RUN_WORDS = 512
_ONES = 0xFFFFFFFF

IN_HARDWARE = (
    "+sse4.2" in config.CPU_FEATURES.split(",")
    if config.CPU_FEATURES is not None  # what kernels are compiled for, whatever this machine has
    else bool(llvmlite.binding.get_host_cpu_features().get("sse4.2"))
)
"""Whether kernels may use the instruction."""


def _table(zero_bytes: int) -> NDArray[np.uint32]:
    """Return what `zero_bytes` zeros make of a register, by each of its four bytes.

    The map is linear: the four entries of a register's bytes are joined by exclusive or.
    """
    zeros = bytes(zero_bytes)
    entries = [
        _ONES ^ google_crc32c.extend(_ONES ^ (value << 8 * byte), zeros)
        for byte in range(4)
        for value in range(256)
    ]
    return np.array(entries, np.uint32).reshape(4, 256)


_AFTER_BYTE = _table(1)
_AFTER_RUN = _table(8 * _RUN_WORDS)


@njit(inline="always")
def _after_run(crc):  # type: ignore[no-untyped-def]
    return np.uint64(
        _AFTER_RUN[0, crc & np.uint64(255)]
        ^ _AFTER_RUN[1, (crc >> np.uint64(8)) & np.uint64(255)]
        ^ _AFTER_RUN[2, (crc >> np.uint64(16)) & np.uint64(255)]
        ^ _AFTER_RUN[3, (crc >> np.uint64(24)) & np.uint64(255)]
    )


@njit(inline="always")
def _after_byte(crc, byte):  # type: ignore[no-untyped-def]
    return np.uint64(_AFTER_BYTE[0, (crc ^ np.uint64(byte)) & np.uint64(255)]) ^ (
        crc >> np.uint64(8)
    )


@njit
def _words_by_instruction(crc, raw, words):  # type: ignore[no-untyped-def]
    done = 0
    while words - done >= 3 * _RUN_WORDS:
        second = third = np.uint64(0)
        for i in range(8 * done, 8 * (done + _RUN_WORDS), 8):
            crc = crc32c_word_sse42(crc, load_word(raw, i))
            second = crc32c_word_sse42(second, load_word(raw, i + 8 * _RUN_WORDS))
            third = crc32c_word_sse42(third, load_word(raw, i + 16 * _RUN_WORDS))
        crc = _after_run(_after_run(crc) ^ second) ^ third
        done += 3 * _RUN_WORDS
    for i in range(8 * done, 8 * words, 8):
        crc = crc32c_word_sse42(crc, load_word(raw, i))
    return crc


@njit
def _words_by_table(crc, raw, words):  # type: ignore[no-untyped-def]
    for i in range(8 * words):
        crc = _after_byte(crc, raw[i])
    return crc


_words = _words_by_instruction if IN_HARDWARE else _words_by_table


@kernel
def extend(crc, raw):  # type: ignore[no-untyped-def]
    """Return the CRC-32C of bytes `raw` (uint8) behind those that gave `crc` (0 for none)."""
    register = np.uint64(np.uint32(crc) ^ np.uint32(_ONES))
    register = _words(register, raw, raw.size // 8)
    for i in range(raw.size // 8 * 8, raw.size):
        register = _after_byte(register, raw[i])
    return np.uint32(register) ^ np.uint32(_ONES)


@kernel
def extend_each(raw, bounds, crcs):  # type: ignore[no-untyped-def]
    """Write the CRC-32C of each ``raw[bounds[i] : bounds[i + 1]]`` to `crcs` (uint32)."""
    for i in range(crcs.size):
        crcs[i] = extend(np.uint32(0), raw[bounds[i] : bounds[i + 1]])
