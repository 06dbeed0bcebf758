"""How kernels are compiled: without the GIL, cached on disk where the disk allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called; other threads run meanwhile and after.

    The result is cached beside the source or in the user's cache directory. Where neither can be
    written numba refuses at import; then kernels are compiled anew in each process.
    """
    try:
        compiled: Callable[..., Any] = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        compiled = njit(nogil=True)(function)
    return compiled
