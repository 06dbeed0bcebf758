"""What a history says of itself, from Gram matrices alone.

The Gram matrix ``G = M M^T`` (N, N) of a tensor's weight deltas at all N stored steps has all in it
that RELEX computes: the subspace of the first K steps comes from the leading K x K part, the
coefficients of any step in it from that step's row. Those of several tensors add up to that of the
tensors side by side.

Where G is estimated from sketches, so are the figures; `jackknife` says how far off they may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relex_stream.fit import Fit, Forecast
from relex_stream.sketch import subspace_of_deltas

Float64 = NDArray[np.float64]

REPLICATES = 8
"""Parts into which the columns of a sketch are split, to see what figures owe to chance."""


def estimated_gram(sketch: Float64, squares: Float64) -> Float64:
    """Return an estimate of ``M M^T`` (N, N) from a sketch of M.

    Parameters
    ----------
    sketch : ndarray of float64, shape (N, width)
        ``M Omega``, a CountSketch of M's rows.
    squares : ndarray of float64, shape (N,)
        ``|M_t|^2``, exact: only the angles are estimated.

    Notes
    -----
    An inner product of the sketch is right on average, with a deviation of the product of norms by
    the square root of the width at most (Charikar, Chen, Farach-Colton 2002). Taken as a cosine,
    times exact norms, it errs less where rows are nearly parallel, as those of a trajectory are: by
    about ``(1 - cos^2) / sqrt(width)``.
    """
    raw = sketch @ sketch.T
    lengths = np.sqrt(raw.diagonal())
    scale = np.divide(np.sqrt(squares), lengths, out=np.zeros_like(lengths), where=lengths > 0)
    gram: Float64 = raw * np.outer(scale, scale)
    # A step that the sketch does not see has its norm all the same.
    gram[np.diag_indices_from(gram)] = squares
    return gram


def replicated_grams(sketch: Float64, squares: Float64) -> Float64:
    """Return what `estimated_gram` gives without each of `REPLICATES` parts of the columns.

    Shape (replicates, N, N).
    """
    part = np.arange(sketch.shape[1]) % REPLICATES
    return np.stack(
        [estimated_gram(sketch[:, part != left_out], squares) for left_out in range(REPLICATES)]
    )


def jackknife(figures: Float64) -> Float64:
    """Return the standard error of figures from those of the replicates, along the first axis.

    ``sqrt((g - 1) / g * sum (x_i - mean)^2)`` (Efron and Stein 1981).
    """
    count = len(figures)
    spread = ((figures - figures.mean(axis=0)) ** 2).sum(axis=0)
    error: Float64 = np.sqrt((count - 1) / count * spread)
    return error


def nearby_subspace(grams: Float64, vectors: Float64) -> tuple[Float64, Float64]:
    """Return the singular vectors and values of replicates, from the vectors of the whole.

    One power step and Rayleigh-Ritz: right to second order in the difference, for a tenth of an
    eigendecomposition.

    Parameters
    ----------
    grams : ndarray of float64, shape (..., K, K)
    vectors : ndarray of float64, shape (K, r)

    Returns
    -------
    vectors : ndarray of float64, shape (..., K, r)
    singular_values : ndarray of float64, shape (..., r)
    """
    basis = np.linalg.qr(grams @ vectors)[0]
    values, turned = np.linalg.eigh(np.swapaxes(basis, -1, -2) @ grams @ basis)
    return basis @ turned[..., ::-1], np.sqrt(np.maximum(values[..., ::-1], 0.0))


@dataclass(frozen=True)
class Figures:
    """What describes a group of weights: a number per component, NaN where there is none.

    Attributes
    ----------
    singular_values : ndarray, shape (r,)
        Of the history's M, in weight units.
    explained_variance : ndarray, shape (r,)
        Share of ``|M|^2`` in the first component, the first two, and so on.
    r2 : ndarray, shape (r,)
        Coefficient of determination of the fit through each component's coefficients, over the
        steps that it is made from.
    r2_elsewhere : ndarray, shape (r,)
        The same fit, over the stored steps that it is not made from; may be far below zero.
    bend : float
        How far the middle of a parabola through the first component's coefficients lies above the
        line between its ends, as a share of the rise between them: above 0 where the movement
        slows down, below where it speeds up.
    """

    singular_values: Float64
    explained_variance: Float64
    r2: Float64
    r2_elsewhere: Float64
    bend: float

    def packed(self) -> Float64:
        """Return all figures behind each other."""
        return np.concatenate(
            [self.singular_values, self.explained_variance, self.r2, self.r2_elsewhere, [self.bend]]
        )

    @classmethod
    def unpacked(cls, numbers: Float64) -> Figures:
        """Undo `packed`."""
        singular_values, explained, r2, elsewhere = np.split(numbers[:-1], 4)
        return cls(singular_values, explained, r2, elsewhere, float(numbers[-1]))


@dataclass(frozen=True)
class Described:
    """Figures and their standard errors, which are None where the Gram matrix is exact."""

    figures: Figures
    errors: Figures | None


class Describer:
    """Makes figures of Gram matrices.

    Parameters
    ----------
    steps : sequence of int
        All N of them, ascending.
    rows : int
        K: the history is the first so many.
    rank : int
    fit : Fit, optional
        None: nothing is said of a fit.
    """

    def __init__(self, steps: Sequence[int], rows: int, rank: int, fit: Fit | None) -> None:
        self._rows = rows
        self._rank = rank
        places = np.asarray(steps, np.float64)
        history = places[:rows].tolist()
        self._fit: Forecast | None = None
        if fit is not None:
            window = rows if fit.window is None else fit.window
            self._elsewhere = np.r_[0 : rows - window, rows : len(steps)]
            self._fit = Forecast(history, places[self._elsewhere].tolist(), fit)
        middle, half = (places[0] + places[rows - 1]) / 2, (places[rows - 1] - places[0]) / 2
        self._powers = (
            np.vander((places[:rows] - middle) / half, 3) if rows >= 3 and half > 0 else None
        )

    def describe(self, gram: Float64, replicates: Float64 | None = None) -> Described:
        """Return the figures of a Gram matrix (N, N), and their errors from its replicates."""
        history = gram[: self._rows, : self._rows]
        subspace = subspace_of_deltas(history, self._rank)
        figures = self._figures(gram, subspace.vectors, subspace.singular_values)
        if replicates is None:
            return Described(figures, None)
        nearby = nearby_subspace(replicates[:, : self._rows, : self._rows], subspace.vectors)
        others = [self._figures(*each) for each in zip(replicates, *nearby, strict=True)]
        errors = jackknife(np.stack([other.packed() for other in others]))
        return Described(figures, Figures.unpacked(errors))

    def _figures(self, gram: Float64, vectors: Float64, singular_values: Float64) -> Figures:
        rows, rank = self._rows, self._rank
        total = float(np.trace(gram[:rows, :rows]))
        found = singular_values.size
        nothing = np.full(rank, np.nan)
        if not found or total <= 0:
            return Figures(nothing, nothing, nothing, nothing, float("nan"))

        def filled(numbers: Float64) -> Float64:
            return np.concatenate([numbers, nothing[found:]])

        coefficients = vectors * singular_values
        explained = np.minimum(np.cumsum(singular_values**2) / total, 1.0)
        return Figures(
            filled(singular_values),
            # Beyond the rank of M nothing is left to explain.
            np.concatenate([explained, np.full(rank - found, explained[-1])]),
            nothing if self._fit is None else filled(self._fit.r_squared(coefficients)),
            filled(self._r_squared_elsewhere(gram, vectors, singular_values)),
            self._bend(coefficients[:, 0]),
        )

    def _r_squared_elsewhere(
        self, gram: Float64, vectors: Float64, singular_values: Float64
    ) -> Float64:
        if self._fit is None or len(self._elsewhere) < 2:
            return np.full(singular_values.size, np.nan)
        # M_h V, and V = M^T U / S.
        there = gram[self._elsewhere, : self._rows] @ vectors / singular_values
        predicted = self._fit.predict(vectors * singular_values)
        squares = ((there - there.mean(axis=0)) ** 2).sum(axis=0)
        missed = ((there - predicted) ** 2).sum(axis=0)
        return np.where(squares > 0, 1.0 - missed / np.where(squares > 0, squares, 1.0), np.nan)

    def _bend(self, coefficients: Float64) -> float:
        if self._powers is None:
            return float("nan")
        square, slope, _ = np.linalg.lstsq(self._powers, coefficients, rcond=None)[0]
        return float(-square / (2 * slope)) if slope else float("nan")


# --- steps ---------------------------------------------------------------------------------------

JUMP = 4.0
"""A change of so many times the median, for as many steps, is a jump."""

_REPEAT = 1e-3
"""A step nearer to an earlier one than this share of the way from the base repeats it."""


def suspicious_steps(
    steps: Sequence[int], change_squares: Float64, gram: Float64
) -> dict[int, str]:
    """Return what is odd about steps, by step.

    Parameters
    ----------
    steps : sequence of int
        N of them, ascending.
    change_squares : ndarray of float64, shape (N,)
        ``|D_t|^2`` of the whole model: how far it moved since the step before.
    gram : ndarray of float64, shape (N, N)
        Of the whole model; may be an estimate.
    """
    found: dict[int, str] = {}
    gaps = np.diff(np.array([0, *steps], np.float64))
    speeds = np.sqrt(change_squares) / gaps
    usual = float(np.median(speeds[speeds > 0])) if (speeds > 0).any() else 0.0
    squares = gram.diagonal()
    for row, step in enumerate(steps):
        if change_squares[row] == 0:
            before = steps[row - 1] if row else 0
            found[step] = f"has the weights of {f'step {before}' if before else 'the base'}"
            continue
        if speeds[row] > JUMP * usual:
            found[step] = f"moved {speeds[row] / usual:.1f} times as far as is usual"
        if squares[row] <= 0:
            found[step] = "is back at the base"
            continue
        distances = squares[row] + squares[:row] - 2 * gram[row, :row]
        near = np.flatnonzero(distances <= _REPEAT**2 * squares[row])
        if near.size:
            found[step] = f"repeats step {steps[near[0]]}"
    return found
