"""zstd frames piece by piece: of things larger than there is memory, and not to be trusted.

The library inside numcodecs, by its C interface: numcodecs itself unpacks whole frames only, at the
size that they say they have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Self

import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray

_LIBRARY = ctypes.CDLL(numcodecs.zstd.__file__)

_READ_BYTES = 256 << 10
"""Packed bytes taken at a time."""

_WINDOW_LOG = 23
"""Frames may look back 8 MiB, as far as the levels up to 19 do: what decides on the memory."""

MEMORY_BYTES = (1 << _WINDOW_LOG) + (2 << 20)
"""What a `ZstdStream` takes, about."""

_WINDOW_LOG_MAX = 100  # ZSTD_d_windowLogMax


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer are alike."""

    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t), ("done", ctypes.c_size_t))


def _declared(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return function


_create = _declared("ZSTD_createDCtx", ctypes.c_void_p)
_free = _declared("ZSTD_freeDCtx", ctypes.c_size_t, ctypes.c_void_p)
_set = _declared(
    "ZSTD_DCtx_setParameter", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int
)
_stream = _declared(
    "ZSTD_decompressStream",
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.POINTER(_Buffer),
    ctypes.POINTER(_Buffer),
)
_is_error = _declared("ZSTD_isError", ctypes.c_uint, ctypes.c_size_t)
_error_name = _declared("ZSTD_getErrorName", ctypes.c_char_p, ctypes.c_size_t)


class ZstdStream:
    """One zstd frame, unpacked from front to back into buffers of the caller's.

    Parameters
    ----------
    read : callable
        ``read(offset, out)`` fills an array of bytes from an offset of the packed bytes on.
    nbytes : int
        Packed bytes: all of them are the frame's.

    Examples
    --------
    >>> packed = np.frombuffer(numcodecs.zstd.compress(b"weights", 1), np.uint8)
    >>> def read(offset, out):
    ...     out[:] = packed[offset : offset + out.size]
    >>> out = np.empty(7, np.uint8)
    >>> with ZstdStream(read, packed.size) as stream:
    ...     stream.fill(out)
    ...     stream.finish()
    >>> out.tobytes()
    b'weights'
    """

    def __init__(self, read: Callable[[int, NDArray[np.uint8]], None], nbytes: int) -> None:
        self._read = read
        self._left = nbytes
        self._taken = 0
        self._packed = np.empty(min(_READ_BYTES, nbytes), np.uint8)
        self._input = _Buffer(None, 0, 0)
        self._ended = False
        self._context = _create()
        if not self._context:
            raise MemoryError("no memory for a zstd context")
        _set(self._context, _WINDOW_LOG_MAX, _WINDOW_LOG)

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give its memory back."""
        _free(self._context)
        self._context = 0

    def fill(self, out: NDArray[np.uint8]) -> None:
        """Fill an array with what comes next.

        Raises
        ------
        ValueError
            With a clause: if there is less, or it is damaged.
        """
        filled = self._take(out)
        if filled < out.size:
            raise ValueError(f"it ends {out.size - filled} bytes too early")

    def finish(self) -> None:
        """Check that all has been taken.

        Raises
        ------
        ValueError
            With a clause: if more comes, or the frame does not end here.
        """
        if self._take(np.empty(1, np.uint8)):
            raise ValueError("it holds more than it should")
        if not self._ended:
            raise ValueError("it is cut off")
        if self._left or self._input.done < self._input.size:
            raise ValueError("something follows its end")

    def _take(self, out: NDArray[np.uint8]) -> int:
        """Fill an array as far as the frame goes; return how far."""
        output = _Buffer(out.ctypes.data, out.size, 0)
        while output.done < out.size and not self._ended:
            if self._input.done == self._input.size:
                self._fetch()
            before = output.done, self._input.done
            hint = _stream(self._context, ctypes.byref(output), ctypes.byref(self._input))
            if _is_error(hint):
                reason = _error_name(hint).decode()
                raise ValueError(f"it is no zstd frame, or damaged ({reason})")
            self._ended = hint == 0
            if before == (output.done, self._input.done) and not self._left:
                break
        done: int = output.done
        return done

    def _fetch(self) -> None:
        """Have the next packed bytes at hand; none at the end."""
        here = self._packed[: min(self._packed.size, self._left)]
        self._read(self._taken, here)
        self._taken += here.size
        self._left -= here.size
        self._input = _Buffer(self._packed.ctypes.data, here.size, 0)
