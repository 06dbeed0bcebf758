"""How kernels are compiled: without the GIL, cached on disk where the disk allows it."""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable
from typing import Any

from numba import njit

SOURCES = (
    *("kernels", "intrinsics", "pages", "checksum", "zstd"),
    *("ulp", "codec", "sketch", "scan", "block_sweep"),
)
"""Modules whose code is compiled into kernels."""


def _digest() -> str:
    texts = [pkgutil.get_data("relex_stream", f"{name}.py") or b"" for name in SOURCES]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


_DIGEST = _digest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called; other threads run meanwhile and after.

    The result is cached beside the source or in the user's cache directory. Where neither can be
    written numba refuses at import; then kernels are compiled anew in each process.
    """
    # numba looks for changes in the kernel's own file only; what is compiled into it from other
    # modules would stay as it was. The name of a cache file begins with the function's.
    function.__qualname__ += f"-{_DIGEST}"
    try:
        compiled: Callable[..., Any] = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        compiled = njit(nogil=True)(function)
    return compiled
