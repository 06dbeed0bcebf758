"""Every kernel run once on a few numbers, before memory is measured and work begins.

The first run after an installation compiles them (seconds, and some 100 MB that the compiler
keeps); later runs load them from numba's cache. Either way it has happened when the planner asks
what the process holds, and no worker waits for another's compilation.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from relex_stream.codec import Changes, FrameCodec
from relex_stream.sketch import (
    SKETCH_WIDTH,
    ChangeRows,
    add_gram,
    add_products,
    add_weighted_rows,
    scatter_columns,
    sketch_changes,
)
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import (
    FORMATS,
    FloatFormat,
    add_rounded,
    advance,
    advance_with_values,
    change_values,
)

_ELEMENTS = 64


def warm_up_encoding(tensors: Iterable[StoredTensor]) -> None:
    """Prepare what a build of these tensors runs."""
    for fmt in _formats(tensors):
        before, after, changes = _round_trip(fmt)
        values = np.zeros(_ELEMENTS)
        change_values(before, before, after, changes.positions, changes.count, fmt.number, values)
        sketch_changes(changes.positions, values, changes.count, 0, 1, np.zeros(SKETCH_WIDTH))


def warm_up_decoding(tensors: Iterable[StoredTensor]) -> None:
    """Prepare what an export, a verification or an opened store runs."""
    for fmt in _formats(tensors):
        before, _, changes = _round_trip(fmt)
        advance(before, changes.positions, changes.zigzags, changes.count)


def warm_up_extrapolation(tensors: Iterable[StoredTensor]) -> None:
    """Prepare what an extrapolation runs."""
    tensors = list(tensors)
    for fmt in _formats(tensors):
        before, _, changes = _round_trip(fmt)
        values = np.zeros(_ELEMENTS)
        advance_with_values(
            before, changes.positions, changes.zigzags, changes.count, fmt.number, values
        )
    for code in {tensor.base_dtype.code for tensor in tensors if tensor.kind == "tracked"}:
        bits = np.zeros(_ELEMENTS, FORMATS[code].bits_dtype)
        add_rounded(bits, np.ones((_ELEMENTS, 1))[:, 0], FORMATS[code], bits)
    # One row is sparse enough for the pairs of the Gram matrix, one is not.
    for entries in (1, _ELEMENTS):
        rows = ChangeRows(
            np.zeros(1, np.int64),
            np.array([0, entries], np.int64),
            np.arange(entries, dtype=np.uint32),
            np.ones(entries),
        )
        projected = np.zeros((_ELEMENTS, 1), np.float32)
        add_weighted_rows(rows, np.ones((1, 1)), projected)
        add_weighted_rows(rows, np.ones((1, 1)), np.zeros((_ELEMENTS, 1)))
        add_products(rows, projected, np.zeros((1, 1)))
        add_gram(rows, _ELEMENTS, np.zeros((1, 1)))
        scatter_columns(rows, 0, np.zeros((1, _ELEMENTS)))


def _formats(tensors: Iterable[StoredTensor]) -> list[FloatFormat]:
    codes = {tensor.dtype.code for tensor in tensors if tensor.kind == "tracked"}
    return [FORMATS[code] for code in sorted(codes)]


def _round_trip(fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray, Changes]:
    """Encode and decode a sparse and a dense frame; return the last one's bits and changes."""
    codec = FrameCodec(_ELEMENTS, fmt.itemsize)
    changes, decoded = Changes(_ELEMENTS, fmt.itemsize), Changes(_ELEMENTS, fmt.itemsize)
    before = np.zeros(_ELEMENTS, fmt.bits_dtype)
    after = before.copy()
    for changed in (1, _ELEMENTS):
        after[:changed] += fmt.bits_dtype.type(1)
        changes.find(before, after)
        frame = codec.encode(0, changes, _ELEMENTS)
        codec.decode(memoryview(frame), _ELEMENTS, decoded)
    return before, after, decoded
