"""Do boxes cover a tensor, each element once?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.sources.pieces import check_cover, hull, join_pieces
from relex_stream.specs import DTYPES, Box, Piece, TensorSpec
from tests.split_checkpoints import range_of


@st.composite
def cut_tensors(draw):
    """A shape and boxes that cover it: cut, and each half cut again, along any dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        cuttable = [d for d, count in enumerate(extent) if count > 1]
        if not cuttable:
            boxes.append(Box(start, extent))
            continue
        d = draw(st.sampled_from(cuttable))
        at = draw(st.integers(1, extent[d] - 1))
        first = (*extent[:d], at, *extent[d + 1 :])
        rest = (*extent[:d], extent[d] - at, *extent[d + 1 :])
        boxes += [Box(start, first), Box((*start[:d], start[d] + at, *start[d + 1 :]), rest)]
    return shape, tuple(draw(st.permutations(boxes)))


@given(cut_tensors())
def test_what_is_cut_covers(cut):
    shape, boxes = cut
    check_cover(boxes, shape)
    assert hull(boxes) == shape


@given(cut_tensors(), st.data())
def test_what_does_not_cover_is_told(cut, data):
    shape, boxes = cut
    index = data.draw(st.integers(0, len(boxes) - 1))
    start, extent = boxes[index]
    moved = tuple(data.draw(st.integers(0, first + 1)) for first in start)
    other = Box(moved, tuple(data.draw(st.integers(1, count + 1)) for count in extent))
    boxes = (*boxes[:index], *((other,) if data.draw(st.booleans()) else ()), *boxes[index + 1 :])
    times = np.zeros([count + 9 for count in shape], int)
    for box in boxes:
        times[range_of(box)] += 1
    inside = tuple(slice(count) for count in shape)
    covered = (times[inside] == 1).all() and times.sum() == math.prod(shape)
    if covered:
        check_cover(boxes, shape)
        return
    with pytest.raises(ValueError, match=r"overlap|elements|does not lie within"):
        check_cover(boxes, shape)


def test_a_scalar_has_one_part():
    box = Box((), ())
    check_cover((box,), ())
    assert hull([box]) == ()
    with pytest.raises(ValueError, match="overlap"):
        check_cover((box, box), ())
    with pytest.raises(ValueError, match="hold 0 of its 1"):
        check_cover((), ())


def test_boxes_of_other_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"part of shape \[2\] at \[0\] does not lie within \[2,"):
        check_cover((Box((0,), (2,)),), (2, 2))


def test_cuts_that_would_take_much_memory_are_refused():
    # Each box has borders of its own in all dimensions: a grid of 400 by 400 by 400 cells.
    boxes = tuple(Box((9 * n, 9 * n, 9 * n), (1, 1, 1)) for n in range(200))
    with pytest.raises(ValueError, match="200 parts are cut too irregularly"):
        check_cover(boxes, (2000, 2000, 2000))


def test_many_ranks_are_quick():
    check_cover(tuple(Box((7 * n, 0), (7, 5)) for n in range(4096)), (7 * 4096, 5))


SPEC = TensorSpec("w", DTYPES["F32"], (3, 2))


def piece(path, start, extent, offset=0):
    return Piece(path, offset, Box(start, extent))


def test_pieces_come_in_the_order_of_their_elements_and_empty_ones_are_left_out():
    top, bottom = piece("b", (0, 0), (2, 2), 8), piece("a", (2, 0), (1, 2), 4)
    place, copies = join_pieces(SPEC, [bottom, piece("c", (3, 0), (0, 2)), top])
    assert (place.path, place.offset, place.pieces, copies) == ("b", 8, (top, bottom), ())


def test_one_piece_is_the_whole_tensor():
    place, copies = join_pieces(SPEC, [piece("c", (3, 0), (0, 2)), piece("a", (0, 0), (3, 2), 4)])
    assert (place.path, place.offset, place.pieces, copies) == ("a", 4, (), ())


def test_a_part_that_is_there_again_is_a_copy():
    first, again = piece("a", (0, 0), (3, 2), 4), piece("b", (0, 0), (3, 2))
    place, copies = join_pieces(SPEC, [first, again])
    assert (place.path, place.pieces, copies) == ("a", (), (again,))


def test_a_tensor_without_elements():
    spec = TensorSpec("w", DTYPES["F32"], (0, 2))
    place, copies = join_pieces(spec, [piece("a", (0, 0), (0, 2), 4), piece("b", (0, 0), (0, 2))])
    assert (place.path, place.offset, place.pieces, copies) == ("a", 4, (), ())


def test_a_gap_is_told():
    with pytest.raises(ValueError, match="hold 4 of its 6 elements"):
        join_pieces(SPEC, [piece("a", (0, 0), (2, 2))])
