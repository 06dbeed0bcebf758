"""zstd for compiled kernels: the library inside numcodecs, by its C interface.

Calling it through Python costs more than the work on a frame of a few kilobytes, and lets only one
worker go on at a time. The contexts that the library works in are made once per worker.
"""

from __future__ import annotations

import ctypes
import weakref

import llvmlite.binding
import numcodecs.zstd
import numpy as np
from numba import njit, types

_LIBRARY = ctypes.CDLL(numcodecs.zstd.__file__)


def _external(name: str, *arguments: types.Type) -> types.ExternalFunction:
    # Under a name of our own: another zstd in the process must not take its place.
    symbol = f"relex_stream_{name}"
    address = ctypes.cast(getattr(_LIBRARY, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, types.uint64(*arguments))


_BYTES = (types.voidptr, types.uint64)
_compress = _external("ZSTD_compressCCtx", types.uint64, *_BYTES, *_BYTES, types.int32)
_decompress = _external("ZSTD_decompressDCtx", types.uint64, *_BYTES, *_BYTES)
_content_bytes = _external("ZSTD_getFrameContentSize", *_BYTES)


class Contexts:
    """A compressor and a decompressor for one thread.

    Attributes
    ----------
    handles : ndarray of uint64, shape (2,)
        Their addresses, for `compress` and `decompress`; valid while this array lives.
    """

    def __init__(self) -> None:
        self.handles = np.empty(2, np.uint64)
        for i, kind in enumerate(("C", "D")):
            create = getattr(_LIBRARY, f"ZSTD_create{kind}Ctx")
            free = getattr(_LIBRARY, f"ZSTD_free{kind}Ctx")
            create.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            handle = create()
            if not handle:
                raise MemoryError("no memory for a zstd context")
            # Not at exit: a thread that is not waited for may still be at work.
            weakref.finalize(self.handles, free, handle).atexit = False
            self.handles[i] = handle


@njit
def compress(handles, raw, level, out):  # type: ignore[no-untyped-def]
    """Compress `raw` into `out`; return the bytes written, -1 if they would not fit."""
    size = _compress(
        handles[0],
        out.ctypes,
        np.uint64(out.size),
        raw.ctypes,
        np.uint64(raw.size),
        np.int32(level),
    )
    if size > np.uint64(out.size):
        return -1
    return np.int64(size)


@njit
def decompress(handles, packed, out):  # type: ignore[no-untyped-def]
    """Decompress what declares to fill `out`; return the bytes written, -1 if it is not so."""
    if _content_bytes(packed.ctypes, np.uint64(packed.size)) != np.uint64(out.size):
        return -1
    size = _decompress(
        handles[1], out.ctypes, np.uint64(out.size), packed.ctypes, np.uint64(packed.size)
    )
    if size > np.uint64(out.size):
        return -1
    return np.int64(size)
