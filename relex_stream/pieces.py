"""Tensors that lie in pieces: which elements of a tensor are where. Arithmetic only.

A piece is a box of a tensor whose elements lie one after the other in some file. In the tensor they
are runs, one per row of the box: a `Span`. A block of a tensor, a range of its elements, is made of
the runs of pieces that meet it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream.specs import Box


class Span(NamedTuple):
    """Runs of a tensor's elements, evenly apart, that lie one after the other in a piece.

    Attributes
    ----------
    first : int
        First element of the first run, in row-major order.
    rows, row_elements : int
        How many runs, and elements of each.
    stride : int
        From the start of one run to that of the next, in elements; at least `row_elements`.
    """

    first: int
    rows: int
    row_elements: int
    stride: int

    @property
    def elements(self) -> int:
        """Elements of all runs."""
        return self.rows * self.row_elements

    def scaled(self, factor: int) -> Span:
        """Return the same span counted in smaller units, `factor` of them in each element."""
        first, rows, row_elements, stride = self
        return Span(first * factor, rows, row_elements * factor, stride * factor)


def is_inside(box: Box, shape: Sequence[int]) -> bool:
    """Say whether a box lies within a tensor.

    Examples
    --------
    >>> is_inside(Box((2,), (1,)), (3,)), is_inside(Box((2,), (2,)), (3,))
    (True, False)
    """
    return len(box.start) == len(box.shape) == len(shape) and all(
        0 <= start <= start + length <= size
        for start, length, size in zip(box.start, box.shape, shape, strict=True)
    )


def spans_of(box: Box, shape: Sequence[int]) -> list[Span]:
    """Return the spans of a box of a tensor, in the order of their elements.

    One, unless the box is narrower than the tensor in three dimensions or more.

    Parameters
    ----------
    box : Box
        Inside the tensor.
    shape : sequence of int
        The tensor's.

    Examples
    --------
    >>> spans_of(Box((2, 0), (1, 4)), (3, 4))
    [Span(first=8, rows=1, row_elements=4, stride=4)]
    >>> spans_of(Box((0, 1), (3, 2)), (3, 4))
    [Span(first=1, rows=3, row_elements=2, stride=4)]
    """
    if 0 in box.shape:
        return []
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Rows run along the last axis in which the box is narrower; what is behind it is whole.
    narrow = [axis for axis in range(len(shape)) if box.shape[axis] != shape[axis]]
    inner = narrow[-1] if narrow else 0
    row_elements = math.prod(box.shape[inner:])
    origin = sum(start * stride for start, stride in zip(box.start, strides, strict=True))
    # Axes before it, from the innermost, are one even sequence of rows as far as they are whole.
    split, rows = inner, 1
    while split > 0:
        split -= 1
        rows *= box.shape[split]
        if box.shape[split] != shape[split]:
            break
    stride = strides[inner - 1] if inner else row_elements
    return [
        Span(
            origin + sum(i * step for i, step in zip(index, strides, strict=False)),
            rows,
            row_elements,
            stride,
        )
        for index in product(*(range(n) for n in box.shape[:split]))
    ]


class Runs(NamedTuple):
    """Runs of elements of a range of a tensor, each in one file; ascending, as they lie in it.

    Attributes
    ----------
    file : ndarray of int32
        Number of the file.
    offset : ndarray of int64
        Byte offset in the file.
    first : ndarray of int64
        First element, counted from the start of the range.
    elements : ndarray of int64
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    first: NDArray[np.int64]
    elements: NDArray[np.int64]


@dataclass(frozen=True)
class PieceTable:
    """Where many tensors lie, as columns: there may be 500 checkpoints of 30,000 tensors.

    Attributes
    ----------
    bounds : ndarray of int64, shape (tensors + 1,)
        Tensor i has the pieces ``bounds[i] : bounds[i + 1]``; none where it is not held.
    file : ndarray of int32, shape (pieces,)
    offset : ndarray of int64, shape (pieces,)
        In bytes.
    spans : ndarray of int64, shape (pieces, 4)
        Fields of `Span`.
    """

    bounds: NDArray[np.int64]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    spans: NDArray[np.int64]

    @classmethod
    def of(cls, tensors: Iterable[Sequence[tuple[int, int, Span]]]) -> PieceTable:
        """Make a table of each tensor's pieces: number of the file, byte offset, span."""
        bounds, files, offsets, spans = [0], [], [], []
        for pieces in tensors:
            for file, offset, span in pieces:
                files.append(file)
                offsets.append(offset)
                spans.append(span)
            bounds.append(len(files))
        return cls(
            np.array(bounds, np.int64),
            np.array(files, np.int32),
            np.array(offsets, np.int64),
            np.array(spans, np.int64).reshape(-1, 4),
        )

    def sharing(self, other: PieceTable) -> PieceTable:
        """Return the same with the other's columns where they are equal: mostly all are."""
        columns: dict[str, Any] = {}
        for name in ("bounds", "file", "offset", "spans"):
            mine, theirs = getattr(self, name), getattr(other, name)
            same = mine is theirs or np.array_equal(mine, theirs)
            columns[name] = theirs if same else mine
        table = PieceTable(**columns)
        return (
            other
            if all(column is getattr(other, name) for name, column in columns.items())
            else table
        )

    @cached_property
    def file_class(self) -> NDArray[np.int64]:
        """A number for each tensor, equal for two that lie in the same files; -1 for nowhere."""
        classes = np.full(len(self.bounds) - 1, -1, np.int64)
        known: dict[tuple[int, ...], int] = {}
        for tensor in np.flatnonzero(np.diff(self.bounds)).tolist():
            classes[tensor] = known.setdefault(self.files_of(tensor), len(known))
        return classes

    @cached_property
    def are_whole(self) -> NDArray[np.bool_]:
        """Whether each tensor lies in one run: all of it, or nothing."""
        lie_whole: NDArray[np.bool_] = np.diff(self.bounds) <= 1
        split = np.flatnonzero(self.spans[:, 1] > 1)
        lie_whole[np.searchsorted(self.bounds, split, side="right") - 1] = False
        return lie_whole

    def holds(self, tensor: int) -> bool:
        """Say whether there is anything of a tensor."""
        return bool(self.bounds[tensor] < self.bounds[tensor + 1])

    def files_of(self, tensor: int) -> tuple[int, ...]:
        """Return the numbers of the files that hold a tensor, ascending."""
        return tuple(sorted(set(self.file[self.bounds[tensor] : self.bounds[tensor + 1]].tolist())))

    def first_place(self, tensor: int) -> tuple[int, int]:
        """Return file and offset of a tensor's first piece; ``(-1, 0)`` where there is none."""
        if not self.holds(tensor):
            return -1, 0
        piece = self.bounds[tensor]
        return int(self.file[piece]), int(self.offset[piece])

    def pieces(self, tensor: int) -> Iterator[tuple[int, int, Span]]:
        """Yield file, offset and span of each piece of a tensor."""
        for piece in range(int(self.bounds[tensor]), int(self.bounds[tensor + 1])):
            yield int(self.file[piece]), int(self.offset[piece]), Span(*self.spans[piece].tolist())

    def runs(self, tensor: int, start: int, stop: int, itemsize: int) -> Runs:
        """Return the runs that elements ``start : stop`` of a tensor are made of.

        Parameters
        ----------
        tensor, start, stop : int
        itemsize : int
            Bytes per element in the files.

        Returns
        -------
        Runs
            Without gaps where the pieces cover the tensor; elements held twice come twice.
        """
        parts = []
        for file, offset, span in self.pieces(tensor):
            columns = span_runs(span, offset, start, stop, itemsize)
            if columns[0].size:
                parts.append(Runs(np.full(columns[0].size, file, np.int32), *columns))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            none = np.zeros(0, np.int64)
            return Runs(none.astype(np.int32), none, none, none)
        first = np.concatenate([part.first for part in parts])
        order = np.argsort(first, kind="stable")
        return Runs(
            file=np.concatenate([part.file for part in parts])[order],
            offset=np.concatenate([part.offset for part in parts])[order],
            first=first[order],
            elements=np.concatenate([part.elements for part in parts])[order],
        )


def span_runs(
    span: Span, offset: int, start: int, stop: int, itemsize: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return where a span that begins at `offset` of a file has elements ``start : stop``.

    Returns
    -------
    offset, first, elements : ndarray of int64
        Of each run, as in `Runs`.
    """
    first_row = max(0, (start - span.first - span.row_elements) // span.stride + 1)
    stop_row = min(span.rows, -((span.first - stop) // span.stride))
    rows = np.arange(first_row, stop_row, dtype=np.int64)
    begin = span.first + rows * span.stride
    low = np.maximum(begin, start)
    elements = np.minimum(begin + span.row_elements, stop) - low
    return offset + (rows * span.row_elements + low - begin) * itemsize, low - start, elements
