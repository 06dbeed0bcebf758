"""Boxes of tensors, as runs of elements."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.pieces import PieceTable, Span, is_inside, spans_of
from relex_stream.specs import Box

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    start, length = [], []
    for n in shape:
        low = draw(st.integers(0, n))
        start.append(low)
        length.append(draw(st.integers(0, n - low)))
    return Box(tuple(start), tuple(length))


@st.composite
def shape_and_box(draw):
    shape = draw(shapes)
    return shape, draw(boxes_in(shape))


@st.composite
def cut_tensor(draw):
    """A shape, and boxes that cuts from edge to edge make of it, in any order."""
    shape = draw(shapes)

    def cut(start, length, axis):
        if axis == len(shape):
            return [Box(start, length)]
        marks = draw(st.lists(st.integers(0, shape[axis]), max_size=2))
        edges = [0, *sorted(marks), shape[axis]]
        return [
            box
            for low, high in pairwise(edges)
            for box in cut((*start, low), (*length, high - low), axis + 1)
        ]

    return shape, draw(st.permutations(cut((), (), 0)))


def elements_of(box, shape):
    """The box's elements by numpy's own indexing."""
    index = tuple(slice(low, low + n) for low, n in zip(box.start, box.shape, strict=True))
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)[index].reshape(-1)


@given(shape_and_box())
def test_spans_are_the_elements_of_the_box_in_its_order(case):
    shape, box = case
    found = [
        span.first + row * span.stride + i
        for span in spans_of(box, shape)
        for row in range(span.rows)
        for i in range(span.row_elements)
    ]
    assert found == elements_of(box, shape).tolist()


@pytest.mark.parametrize(
    ("start", "length", "spans"),
    [
        ((0, 0, 0), (4, 5, 6), 1),
        ((1, 0, 0), (2, 5, 6), 1),
        ((0, 1, 0), (4, 3, 6), 1),
        ((0, 0, 1), (4, 5, 2), 1),
        ((1, 0, 1), (2, 5, 2), 1),
        ((1, 1, 0), (2, 2, 6), 1),
        ((1, 1, 1), (2, 2, 2), 2),
    ],
)
def test_a_box_is_one_span_unless_narrower_in_three_dimensions(start, length, spans):
    assert len(spans_of(Box(start, length), (4, 5, 6))) == spans


@given(cut_tensor(), st.integers(1, 8), st.data())
def test_runs_of_a_range_read_back_what_the_pieces_hold(case, itemsize, data):
    shape, boxes = case
    numel = int(np.prod(shape, dtype=int))
    # One file per box, each with something in front; an element is its own number.
    places, files = [], []
    for number, box in enumerate(boxes):
        offset = 3 * number
        for span in spans_of(box, shape):
            places.append((number, offset, span))
            offset += span.elements * itemsize
        here = np.repeat(elements_of(box, shape), itemsize)
        files.append(np.concatenate([np.full(3 * number, -1), here]))
    table = PieceTable.of([[], places, []])
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    runs = table.runs(1, start, stop, itemsize)
    read = [
        files[file][offset : offset + elements * itemsize]
        for file, offset, _, elements in zip(*runs, strict=True)
    ]
    expected = np.repeat(np.arange(start, stop), itemsize)
    np.testing.assert_array_equal(np.concatenate([*read, np.zeros(0, int)]), expected)
    ends = np.cumsum([0, *runs.elements])
    np.testing.assert_array_equal(runs.first, ends[:-1])
    assert not table.holds(0)
    assert table.runs(2, 0, 0, itemsize).elements.size == 0


@pytest.mark.parametrize(
    ("start", "length", "inside"),
    [
        ((0, 0), (4, 3), True),
        ((4, 3), (0, 0), True),
        ((1, 2), (3, 1), True),
        ((1, 2), (3, 2), False),
        ((-1, 0), (2, 1), False),
        ((2, 0), (-1, 1), False),
        ((0,), (4,), False),
        ((0, 0), (4,), False),
        ((0, 0, 0), (1, 1, 1), False),
    ],
)
def test_boxes_inside_a_tensor(start, length, inside):
    assert is_inside(Box(start, length), (4, 3)) == inside


@given(shape_and_box(), st.integers(1, 8))
def test_a_span_in_smaller_units_is_the_same_elements(case, factor):
    shape, box = case
    for span in spans_of(box, shape):
        large = [span.first + row * span.stride for row in range(span.rows)]
        small = span.scaled(factor)
        assert [small.first + row * small.stride for row in range(small.rows)] == [
            factor * first for first in large
        ]
        assert small.elements == factor * span.elements


def test_tables_know_which_tensors_lie_in_one_run():
    whole, split = Span(0, 1, 8, 8), Span(0, 2, 2, 4)
    halves = [(0, 0, Span(0, 1, 4, 4)), (1, 0, Span(4, 1, 4, 4))]
    table = PieceTable.of([[(0, 0, whole)], [], [(0, 8, split)], halves, [(2, 5, whole)]])
    assert table.are_whole.tolist() == [True, True, False, False, True]
    assert [table.files_of(i) for i in range(5)] == [(0,), (), (0,), (0, 1), (2,)]
    assert table.file_class.tolist() == [0, -1, 0, 1, 2]
    assert table.first_place(4) == (2, 5)
    assert table.first_place(1) == (-1, 0)


def test_files_of_a_tensor_ascend_however_its_pieces_lie():
    row = [Span(i, 1, 1, 1) for i in range(3)]
    orders = [(9, 8, 1), (1, 8, 9)]
    table = PieceTable.of(
        [[(file, 0, span) for file, span in zip(files, row, strict=True)] for files in orders]
    )
    assert [table.files_of(i) for i in range(2)] == [(1, 8, 9), (1, 8, 9)]
    assert table.file_class.tolist() == [0, 0]


def test_equal_columns_are_shared():
    one = PieceTable.of([[(0, 0, Span(0, 1, 8, 8))]])
    other = PieceTable.of([[(0, 16, Span(0, 1, 8, 8))]])
    shared = other.sharing(one)
    assert shared.spans is one.spans
    assert shared.bounds is one.bounds
    assert shared.offset is other.offset
    assert PieceTable.of([[(0, 0, Span(0, 1, 8, 8))]]).sharing(one) is one
