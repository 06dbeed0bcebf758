"""One block through its stored changes in one compiled call: to statistics, or to output.

The counterpart of `scan` for reading. The block is taken in tiles of columns, so that its state and
what is summed per column stay in the processor's cache: over the whole block at once the same sums
take several times as long. For blocks whose changes are all at hand, as
`block_reader.BlockChanges` has them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream.intrinsics import trailing_zeros
from relex_stream.kernels import kernel
from relex_stream.sketch import add_scaled, contract, project
from relex_stream.ulp import Bits, advance_one, finite_one, rounded_sum_one

TILE_COLUMNS = 1 << 13
"""Columns of a tile."""


class BlockRows(NamedTuple):
    """All changes of a block, before they are made.

    Attributes
    ----------
    origin : ndarray of uint16 or uint32, shape (b,)
        Bit patterns at the base, in the checkpoints' dtype.
    tag : tuple of int
        `FloatFormat.tag` of these patterns.
    rows, starts, ends : ndarray of int64, shape (n,)
        Row ``rows[i]`` of D has entries ``starts[i]:ends[i]``.
    positions, zigzags : ndarray
        As in `codec.Changes`.
    values : ndarray of float64
        Room for the changes in weight units.
    """

    origin: Bits
    tag: tuple[int, ...]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    positions: NDArray[np.uint32]
    zigzags: Bits
    values: NDArray[np.float64]


@kernel
def _measure_tile(block, cursors, cuts, first, state):  # type: ignore[no-untyped-def]
    """Take the tile's `state` through its changes from `cursors` on; write their ends to `cuts`.

    Column 0 of `state` is `first` of the block.
    """
    for i in range(cursors.size):
        entry, end = cursors[i], block.ends[i]
        while entry < end:
            column = np.int64(block.positions[entry]) - first
            if column >= state.size:
                break
            block.values[entry] = advance_one(state, column, block.zigzags[entry], block.tag)
            entry += 1
        cuts[i] = entry


@kernel
def sweep_products(block, coefficients, projected, out):  # type: ignore[no-untyped-def]
    """Add ``D (D^T C)`` to `out`.

    Parameters
    ----------
    block : BlockRows
    coefficients : ndarray of float64, shape (T, k)
    projected : ndarray of float32, shape (columns, k)
        Room for a tile of ``D^T C``.
    out : ndarray of float64, shape (T, k)
        Summed into.
    """
    cursors, cuts = block.starts.copy(), np.empty_like(block.starts)
    for first in range(0, block.origin.size, projected.shape[0]):
        # A copy: it comes into the cache in one stream, not where the first changes happen to be.
        state = block.origin[first : first + projected.shape[0]].copy()
        _measure_tile(block, cursors, cuts, first, state)
        tile = projected[: state.size]
        tile[:] = 0.0
        rows = (block.rows, cursors, cuts, block.positions, block.values, first)
        project(*rows, coefficients, tile)
        contract(*rows, tile, out)
        for i in range(cursors.size):
            cursors[i] = cuts[i]


@kernel
def _add_tile(block, cursors, first, state, weights, sums, touched):  # type: ignore[no-untyped-def]
    """Take the tile's `state` through its changes from `cursors` on, and `cursors` to their ends.

    What each of them adds to the outputs is added to its column of `sums`, whose bit is set in
    `touched`. Column 0 of all three is `first` of the block.
    """
    for i in range(cursors.size):
        row, entry, end = block.rows[i], cursors[i], block.ends[i]
        while entry < end:
            column = np.int64(block.positions[entry]) - first
            if column >= state.size:
                break
            change = advance_one(state, column, block.zigzags[entry], block.tag)
            add_scaled(sums, column, change, weights, row)
            touched[column >> 6] |= np.uint64(1) << np.uint64(column & 63)
            entry += 1
        cursors[i] = entry


@kernel
def _round_touched(base, first, tag, touched, sums, out):  # type: ignore[no-untyped-def]
    """Write the marked columns of a tile, and leave its marks and sums at zero."""
    overflowed = 0
    for word in range(touched.size):
        marks = touched[word]
        touched[word] = 0
        while marks != np.uint64(0):
            column = 64 * word + np.int64(trailing_zeros(marks))
            marks &= marks - np.uint64(1)
            before = base[first + column]
            for output in range(sums.shape[1]):
                total = sums[column, output]
                sums[column, output] = 0.0
                # What adds up to nothing keeps its exact bits (a negative zero, a NaN's payload).
                if total != 0.0:
                    after = rounded_sum_one(before, total, tag)
                    overflowed += not finite_one(after, tag)
                    out[output, first + column] = after
    return overflowed


@kernel
def sweep_outputs(block, weights, base, base_tag, sums, out):  # type: ignore[no-untyped-def]
    """Write ``base + D^T W``, rounded once, for each column of W.

    Parameters
    ----------
    block : BlockRows
    weights : ndarray of float64, shape (T, outputs)
        W.
    base : ndarray of uint16 or uint32, shape (b,)
        Bit patterns in the base's own dtype.
    base_tag : tuple of int
        `FloatFormat.tag` of that dtype.
    sums : ndarray of float64, shape (columns, outputs)
        Room for a tile.
    out : ndarray, dtype of `base`, shape (outputs, >= b)
        Out.

    Returns
    -------
    int
        How many results overflowed.
    """
    overflowed = 0
    cursors = block.starts.copy()
    touched = np.zeros((sums.shape[0] + 63) // 64, np.uint64)
    sums[:] = 0.0
    for first in range(0, base.size, sums.shape[0]):
        stop = min(base.size, first + sums.shape[0])
        state = block.origin[first:stop].copy()
        _add_tile(block, cursors, first, state, weights, sums, touched)
        for output in range(weights.shape[1]):
            for column in range(first, stop):
                out[output, column] = base[column]
        # Most columns have no entry: only those that have one are looked at again.
        overflowed += _round_touched(base, first, base_tag, touched, sums, out)
    return overflowed
