"""Tensors that trainers have split: their pieces put together, and checked to be all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..specs import Box, Piece, TensorPlace, TensorSpec

_MOST_CELLS = 1 << 22
"""Trainers cut along a grid; what would take more cells than this is not theirs."""


def hull(boxes: Sequence[Box]) -> tuple[int, ...]:
    """Return the shape of the smallest tensor that all boxes fit in.

    Parameters
    ----------
    boxes : sequence of Box
        At least one; all of as many dimensions.

    Examples
    --------
    >>> hull([Box((0, 0), (2, 3)), Box((2, 0), (1, 3))])
    (3, 3)
    """
    ends = [tuple(map(sum, zip(*box, strict=True))) for box in boxes]
    return tuple(map(max, zip(*ends, strict=True)))


def join_pieces(spec: TensorSpec, pieces: Sequence[Piece]) -> tuple[TensorPlace, tuple[Piece, ...]]:
    """Return where a tensor lies that is split into pieces, and the pieces that are there again.

    Parameters
    ----------
    spec : TensorSpec
        The whole tensor.
    pieces : sequence of Piece
        In any order, at least one.

    Returns
    -------
    TensorPlace
        Its pieces in the order of their first elements; none where one of them is all of it.
    tuple of Piece
        Those that hold the same part as one before them.

    Raises
    ------
    ValueError
        If they do not cover the tensor, each element once, with a clause that says so.
    """
    of_box: dict[Box, Piece] = {}
    copies = [
        piece
        for piece in pieces
        if math.prod(piece.box.shape) and of_box.setdefault(piece.box, piece) is not piece
    ]
    boxes = tuple(sorted(of_box))
    check_cover(boxes, spec.shape)
    if not boxes:
        return TensorPlace(spec, pieces[0].path, pieces[0].offset), ()
    first = of_box[boxes[0]]
    if len(boxes) == 1:
        return TensorPlace(spec, first.path, first.offset), tuple(copies)
    parts = tuple(of_box[box] for box in boxes)
    return TensorPlace(spec, first.path, first.offset, parts), tuple(copies)


@lru_cache(maxsize=1 << 16)  # the steps of a run are split alike
def check_cover(boxes: tuple[Box, ...], shape: tuple[int, ...]) -> None:
    """Check that boxes cover a tensor, each element exactly once.

    Parameters
    ----------
    boxes : tuple of Box
        In any order, none of them empty.
    shape : tuple of int
        The tensor's.

    Raises
    ------
    ValueError
        If they do not, with a clause that says so.

    Examples
    --------
    >>> check_cover((Box((0,), (2,)), Box((2,), (3,))), (5,))
    >>> check_cover((Box((0,), (2,)), Box((1,), (3,))), (5,))
    Traceback (most recent call last):
    ...
    ValueError: its parts overlap
    """
    for start, extent in boxes:
        if len(start) != len(shape) or any(
            first + count > size for first, count, size in zip(start, extent, shape, strict=True)
        ):
            raise ValueError(
                f"its part of shape {list(extent)} at {list(start)} does not lie within "
                f"{list(shape)}"
            )
    if _overlap(boxes, len(shape)):
        raise ValueError("its parts overlap")
    covered = sum(math.prod(box.shape) for box in boxes)
    if covered != math.prod(shape):
        raise ValueError(f"its parts hold {covered} of its {math.prod(shape)} elements")


def _overlap(boxes: tuple[Box, ...], dimensions: int) -> bool:
    """Return whether any two boxes share an element: mark them on the grid of their borders."""
    if len(boxes) < 2 or not dimensions:
        return len(boxes) > 1
    borders = [
        sorted({edge for start, extent in boxes for edge in (start[d], start[d] + extent[d])})
        for d in range(dimensions)
    ]
    cells = [len(edges) - 1 for edges in borders]
    if math.prod(cells) > _MOST_CELLS:
        raise ValueError(f"its {len(boxes)} parts are cut too irregularly")
    at = [{edge: index for index, edge in enumerate(edges)} for edges in borders]
    taken: NDArray[np.bool_] = np.zeros(cells, np.bool_)
    for start, extent in boxes:
        own = taken[
            tuple(slice(at[d][start[d]], at[d][start[d] + extent[d]]) for d in range(dimensions))
        ]
        if own.any():
            return True
        own[...] = True
    return False
