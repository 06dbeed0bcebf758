"""Lazy dask arrays whose chunks are made by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from dask.array import Array

    DaskArray: TypeAlias = Array


class _ChunkCall:
    """One chunk of a lazy array: a function and the ranges it is called with."""

    def __init__(self, function: Callable[..., Any], *ranges: tuple[int, int]) -> None:
        self._function = function
        self._ranges = ranges

    def __call__(self) -> Any:
        return self._function(*self._ranges)


def lazy_array(
    function: Callable[[tuple[int, int], tuple[int, int]], Any],
    *,
    token: str,
    shape: tuple[int, ...],
    chunk: tuple[int, int],
    dtype: Any,
) -> DaskArray:
    """Return a dask array cut along its first two axes.

    Parameters
    ----------
    function : callable
        Called with the ranges of the first and the second axis; returns that chunk.
    token : str
        Equal for equal content.
    shape : tuple of int
        At least two axes.
    chunk : tuple of int
        Lengths of a chunk along the first two axes.
    """
    import dask.array
    from dask.base import tokenize

    name = "relex-" + tokenize(token, shape, chunk)
    cuts = [
        [(low, min(low + size, length)) for low in range(0, length, size)] or [(0, 0)]
        for length, size in zip(shape, chunk, strict=False)
    ]
    rest = (0,) * (len(shape) - 2)
    graph: dict[Any, Any] = {
        (name, i, j, *rest): (_ChunkCall(function, rows, slab),)
        for i, rows in enumerate(cuts[0])
        for j, slab in enumerate(cuts[1])
    }
    chunks = (
        tuple(high - low for low, high in cuts[0]),
        tuple(high - low for low, high in cuts[1]),
        *((length,) for length in shape[2:]),
    )
    return dask.array.Array(graph, name, chunks, dtype=dtype)
