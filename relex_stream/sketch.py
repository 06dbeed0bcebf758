"""Small statistics of a tensor's weight deltas, and the top left singular vectors from them.

M is (T, d): row t is the weight delta ``theta_t - theta_0``. ``M = L D`` with D the change from
each step to the next and L the lower triangle of ones; D is sparse when weights are 16-bit.
Everything that touches weights here is a sum over blocks of columns of D: add the partial results
of disjoint blocks, then finish with T x T algebra in float64.

Two routes to the top-r left singular vectors U of M:

* exact: the Gram matrix ``M M^T = L (D D^T) L^T`` and an eigendecomposition (the method of
  snapshots, Sirovich 1987);
* randomized (Halko, Martinsson, Tropp 2011, algorithm 4.4 with a CountSketch as test matrix):
  the sketch ``Y = M Omega`` gives a basis Q, each pass over the blocks the exact
  ``Z = M (M^T Q)``, and Rayleigh-Ritz on Q the vectors.

Nothing here opens a file or knows a scheduler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from relex_stream.intrinsics import (
    SUM_LANES,
    add_scaled_lanes,
    bits_from_float64,
    float64_from_bits,
)
from relex_stream.kernels import kernel
from relex_stream.ulp import F16_TAG, number_one

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

SKETCH_WIDTH = 256
"""Columns of the CountSketch kept per tensor and step."""

SKETCH_MIN_ELEMENTS = 64 << 10
"""Tensors with fewer weights keep no sketch: their Gram matrix costs less than a pass."""

OVERSAMPLING = 7
"""Extra basis vectors beside the rank (Halko et al. advise 5 to 10)."""

_DENSE_SHARE = 0.15
"""Above this share of nonzeros a matrix product beats pairing the nonzeros of each column."""

_RANK_TOLERANCE = 1e-13
"""Components below this share of the largest eigenvalue are noise of float64, not directions."""


@kernel
def split_rows(positions, starts, ends, column, cuts):  # type: ignore[no-untyped-def]
    """Write where each row's entries left of `column` end; positions ascend in each row."""
    for i in range(starts.size):
        low, high = starts[i], ends[i]
        while low < high:
            middle = (low + high) >> 1
            if positions[middle] < column:
                low = middle + 1
            else:
                high = middle
        cuts[i] = low


@dataclass(frozen=True)
class ChangeRows:
    """Some rows of D in compressed form: for each row the changed columns and by how much.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Row numbers (0 is the first step), ascending.
    starts, ends : ndarray of int64, shape (n,)
        Row ``rows[i]`` has entries ``starts[i]:ends[i]``.
    positions : ndarray of uint32
        Columns within the block, ascending in each row.
    values : ndarray of float64
        Changes, in weight units.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    positions: NDArray[np.uint32]
    values: Float64

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        counts: Sequence[int],
        positions: NDArray[np.uint32],
        values: Float64,
    ) -> ChangeRows:
        """Return rows whose entries lie one row behind the other, `counts` of them each."""
        ends = np.cumsum(np.array(counts, np.int64))
        starts = ends - np.array(counts, np.int64)
        return cls(np.array(rows, np.int64), starts, ends, positions, values)

    @property
    def entries(self) -> int:
        """Number of entries."""
        return int((self.ends - self.starts).sum())

    def split(self, column: int) -> tuple[ChangeRows, ChangeRows]:
        """Return the entries from `column` on, and those left of it."""
        cuts = np.empty_like(self.starts)
        split_rows(self.positions, self.starts, self.ends, column, cuts)
        return replace(self, starts=cuts), replace(self, ends=cuts)


def sketch_key(seed: int, name: str) -> np.uint64:
    """Return the 64-bit key from which a tensor's test matrix is hashed."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


@kernel
def add_to_sketch(positions, values, count, first_element, key, row):  # type: ignore[no-untyped-def]
    """Add one block's share of ``D_t Omega`` to `row`.

    Omega (d, width) has one nonzero per row, +1 or -1, at a column hashed from `key` and the
    element's offset in its tensor (CountSketch: Charikar, Chen, Farach-Colton 2002; as a
    subspace embedding: Clarkson, Woodruff 2013). The same for any cut into blocks.

    Parameters
    ----------
    positions, values : ndarray of uint32, of float64
        Changed elements within the block and their changes; the first `count` count.
    first_element : int
        Offset of the block in its tensor.
    key : uint64
        From `sketch_key`.
    row : ndarray of float64, shape (width,)
        Summed into; its width is a power of two.
    """
    # The width is a power of two: a mask is the remainder, without a division per element.
    bucket = np.uint64(row.size - 1)
    for i in range(count):
        # splitmix64 of (key + element): 8 bits choose the bucket, one the sign.
        x = key + (np.uint64(first_element) + np.uint64(positions[i])) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        # By the sign bit: a branch would be foreseen half of the time.
        value = bits_from_float64(values[i]) ^ (~x & np.uint64(1 << 63))
        row[x & bucket] += float64_from_bits(value)


def pack_sketch(rows: Float64) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Round sketch rows (T, width) to float16, a scale each; `unpack_sketch` multiplies back.

    The rounding (5e-4 of the largest entry) only moves the starting basis of the power passes.
    """
    with np.errstate(over="ignore"):  # beyond float32: no scale, as below
        scales = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32)
    scales[~np.isfinite(scales)] = 0
    divisors = np.where(scales > 0, scales, np.inf).astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is not finite has no scale and gives 0
        scaled = rows / divisors[:, None]
    scaled[scales == 0] = 0
    return scaled.astype(np.float16), scales


def unpack_sketch(rows: NDArray[np.float16], scales: NDArray[np.float32]) -> Float64:
    """Return sketch rows (T, width) as float64."""
    out = np.empty(rows.shape)
    # Columns of a larger array, usually; one memory layout, one compiled kernel.
    patterns = np.ascontiguousarray(rows).view(np.uint16)
    _unpack_kernel(patterns, np.ascontiguousarray(scales), out)
    return out


@kernel
def _unpack_kernel(patterns, scales, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        scale = np.float64(scales[row])
        for column in range(out.shape[1]):
            out[row, column] = number_one(patterns[row, column], F16_TAG) * scale


# --- products with D, block by block -----------------------------------------------------------


@njit(inline="always")
def add_scaled(out, row, scale, weights, weights_row):  # type: ignore[no-untyped-def]
    """Add ``scale * weights[weights_row]`` to ``out[row]``; C-ordered matrices of equal width."""
    whole = out.shape[1] // SUM_LANES * SUM_LANES
    for column in range(0, whole, SUM_LANES):
        add_scaled_lanes(out, row, scale, weights, weights_row, column)
    for column in range(whole, out.shape[1]):
        out[row, column] += scale * weights[weights_row, column]


@kernel
def project(rows, starts, ends, positions, values, first, coefficients, out):  # type: ignore[no-untyped-def]
    """`add_weighted_rows`, for kernels."""
    for i in range(rows.size):
        row = rows[i]
        for entry in range(starts[i], ends[i]):
            p = np.int64(positions[entry]) - first
            add_scaled(out, p, values[entry], coefficients, row)


def add_weighted_rows(
    changes: ChangeRows, first: int, coefficients: Float64, out: Float64 | Float32
) -> None:
    """Add ``D^T C`` to `out`: for each element the weighted sum of its changes.

    Parameters
    ----------
    changes : ChangeRows
        Rows of D, cut to the columns of `out`.
    first : int
        Column of the block that row 0 of `out` belongs to.
    coefficients : ndarray of float64, shape (T, k)
        C; row t weighs row t of D.
    out : ndarray of float32 or float64, shape (columns, k)
        Summed into.
    """
    project(
        changes.rows,
        changes.starts,
        changes.ends,
        changes.positions,
        changes.values,
        first,
        coefficients,
        out,
    )


@kernel
def contract(rows, starts, ends, positions, values, first, projected, out):  # type: ignore[no-untyped-def]
    """`add_products`, for kernels."""
    for i in range(rows.size):
        row = rows[i]
        for entry in range(starts[i], ends[i]):
            p = np.int64(positions[entry]) - first
            add_scaled(out, row, values[entry], projected, p)


def add_products(
    changes: ChangeRows, first: int, projected: Float32 | Float64, out: Float64
) -> None:
    """Add ``D P`` to `out` (T, k) for the rows in `changes`; `projected` is P (columns, k).

    `changes` is cut to the columns of P, which begin at column `first` of the block.
    """
    contract(
        changes.rows,
        changes.starts,
        changes.ends,
        changes.positions,
        changes.values,
        first,
        projected,
        out,
    )


@kernel
def _columns_kernel(rows, starts, ends, positions, values, first, heads, row_of, value_of):  # type: ignore[no-untyped-def]
    """Regroup entries by column; `first` is the column of ``heads[0]``.

    heads (columns + 1) comes zeroed and ends as starts of columns.
    """
    for i in range(rows.size):
        for entry in range(starts[i], ends[i]):
            heads[positions[entry] - first + 1] += 1
    for column in range(heads.size - 1):
        heads[column + 1] += heads[column]
    fill = heads[:-1].copy()
    for i in range(rows.size):
        for entry in range(starts[i], ends[i]):
            column = positions[entry] - first
            row_of[fill[column]] = rows[i]
            value_of[fill[column]] = values[entry]
            fill[column] += 1


@kernel
def _pairs_kernel(heads, row_of, value_of, gram):  # type: ignore[no-untyped-def]
    """Add the lower triangle of ``D D^T``, column by column; rows ascend in each column."""
    for column in range(heads.size - 1):
        for a in range(heads[column], heads[column + 1]):
            row, value = row_of[a], value_of[a]
            for b in range(heads[column], a + 1):
                gram[row, row_of[b]] += value * value_of[b]


@kernel
def _scatter_kernel(rows, starts, ends, positions, values, first, dense):  # type: ignore[no-untyped-def]
    for i in range(rows.size):
        for entry in range(starts[i], ends[i]):
            dense[rows[i], np.int64(positions[entry]) - first] = values[entry]


def scatter_columns(changes: ChangeRows, first: int, dense: Float64) -> None:
    """Write the rows in `changes` into `dense` (T, columns), whose columns begin at `first`.

    `changes` is cut to those columns.
    """
    _scatter_kernel(
        changes.rows,
        changes.starts,
        changes.ends,
        changes.positions,
        changes.values,
        first,
        dense,
    )


def add_gram(changes: ChangeRows, first: int, columns: int, gram: Float64) -> None:
    """Add the share of some columns in ``D D^T`` (lower triangle) to `gram`.

    Parameters
    ----------
    changes : ChangeRows
        Every row of D that the Gram matrix is over, cut to the columns.
    first, columns : int
        First column in the block, and how many; the room taken is up to 8 T bytes for each.
    gram : ndarray of float64, shape (T, T)
        Summed into; only the lower triangle is meant.

    Notes
    -----
    Costs the sum over columns of (nonzeros in the column)^2 while D is sparse, T^2 per column
    by matrix product when it is not.
    """
    entries = changes.entries
    if entries > _DENSE_SHARE * gram.shape[0] * columns:
        dense = np.zeros((gram.shape[0], columns))
        scatter_columns(changes, first, dense)
        gram += dense @ dense.T
    elif entries:
        heads = np.zeros(columns + 1, np.int64)
        row_of = np.empty(entries, np.int64)
        value_of = np.empty(entries)
        _columns_kernel(
            changes.rows,
            changes.starts,
            changes.ends,
            changes.positions,
            changes.values,
            first,
            heads,
            row_of,
            value_of,
        )
        _pairs_kernel(heads, row_of, value_of, gram)


# --- T x T algebra -----------------------------------------------------------------------------


def cumulate(rows: Float64) -> Float64:
    """Return ``L A``: running sums down the first axis."""
    total = rows.copy()
    # By rows: np.cumsum down the first axis takes several times as long.
    for row in range(1, len(total)):
        total[row] += total[row - 1]
    return total


def cumulate_transposed(rows: Float64) -> Float64:
    """Return ``L^T A``: sums from each row to the last."""
    return np.cumsum(rows[::-1], axis=0)[::-1].copy()


@kernel
def _cumulate_gram(lower, out):  # type: ignore[no-untyped-def]
    """Write ``L G L^T`` to the lower triangle of `out`, for G symmetric of which one is given."""
    for row in range(out.shape[0]):
        total = 0.0
        for column in range(row + 1):
            # What row - 1 and column has is above the diagonal there, and the same mirrored.
            total += lower[row, column]
            above = 0.0
            if row > 0:
                above = out[row - 1, column] if column < row else out[row, column - 1]
            out[row, column] = total + above


@dataclass(frozen=True)
class Subspace:
    """Top left singular vectors of M.

    Attributes
    ----------
    vectors : ndarray of float64, shape (T, r)
        Orthonormal columns; r may be less than asked for when M has lower rank (0 if M = 0).
    singular_values : ndarray of float64, shape (r,)
        Descending, weight units.
    total_sq : float, optional
        ``|M|^2``, where the route finds it.
    """

    vectors: Float64
    singular_values: Float64
    total_sq: float | None = None


def subspace_of_gram(changes_gram: Float64, rank: int) -> Subspace:
    """Solve the exact route.

    Parameters
    ----------
    changes_gram : ndarray of float64, shape (T, T)
        ``D D^T``; only the lower triangle is read.
    rank : int
        Components wanted.

    Returns
    -------
    Subspace

    Notes
    -----
    Singular values below about 1e-7 of the largest are lost in the squares.
    """
    return subspace_of_deltas(gram_of_deltas(changes_gram), rank)


def gram_of_deltas(changes_gram: Float64) -> Float64:
    """Return ``M M^T`` (T, T), whole, from the lower triangle of ``D D^T``."""
    gram = np.zeros_like(changes_gram)
    _cumulate_gram(changes_gram, gram)
    return gram + np.tril(gram, -1).T


def subspace_of_deltas(gram: Float64, rank: int) -> Subspace:
    """Return the top left singular vectors of M from ``M M^T`` (T, T)."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    found = _leading(vectors[:, ::-1], eigenvalues[::-1], rank)
    return replace(found, total_sq=float(np.trace(gram)))


def sketch_gram(sketch_rows: Float64) -> Float64:
    """Return an estimate of ``M M^T`` (T, T) from the sketch of D's rows.

    Those of several tensors may be added: sketches of different tensors share no randomness.
    """
    sketch = cumulate(sketch_rows)
    # Squaring loses singular values below 1e-8 of the largest; the sketch itself, kept in
    # float16, knows none of them.
    gram: Float64 = sketch @ sketch.T
    return gram


def sketch_basis(gram: Float64, rank: int) -> Float64:
    """Return an orthonormal basis Q (T, min(T, rank + 7)) from what `sketch_gram` estimates."""
    _, left = np.linalg.eigh(gram)
    return np.ascontiguousarray(left[:, ::-1][:, : min(gram.shape[0], rank + OVERSAMPLING)])


def products_of_changes(changes_products: Float64) -> Float64:
    """Turn the sum over blocks of ``D P``, with ``P = D^T L^T Q``, into ``Z = M M^T Q``."""
    return cumulate(changes_products)


def next_basis(products: Float64) -> Float64:
    """Return the basis for another power pass: an orthonormal basis of the range of Z."""
    return np.linalg.qr(products)[0]


def subspace_of_products(basis: Float64, products: Float64, rank: int) -> Subspace:
    """Solve the randomized route from the last pass.

    Parameters
    ----------
    basis : ndarray of float64, shape (T, k)
        Q, orthonormal.
    products : ndarray of float64, shape (T, k)
        ``Z = M M^T Q``.
    rank : int

    Returns
    -------
    Subspace

    Notes
    -----
    Rayleigh-Ritz: ``eigh(Q^T Z)`` gives v and lambda; the vector returned is Z v normalised, not
    Q v: one power step more for nothing, two digits when measured.
    """
    projected = basis.T @ products
    eigenvalues, vectors = np.linalg.eigh((projected + projected.T) / 2)
    subspace = _leading(vectors[:, ::-1], eigenvalues[::-1], rank)
    if not subspace.singular_values.size:
        return Subspace(np.zeros((basis.shape[0], 0)), subspace.singular_values)
    left = np.linalg.qr(products @ subspace.vectors)[0]
    return Subspace(left, subspace.singular_values)


def _leading(vectors: Float64, eigenvalues: Float64, rank: int) -> Subspace:
    if not eigenvalues.size or eigenvalues[0] <= 0:
        return Subspace(np.zeros((vectors.shape[0], 0)), np.zeros(0))
    kept = int((eigenvalues[:rank] > _RANK_TOLERANCE * eigenvalues[0]).sum())
    return Subspace(np.ascontiguousarray(vectors[:, :kept]), np.sqrt(eigenvalues[:kept]))
