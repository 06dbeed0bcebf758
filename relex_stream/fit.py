"""Curves through coefficients, and what they predict.

A fit that is linear in the observed values predicts by a fixed combination of them: ``c(target) =
C^T h`` with a hat vector h that depends on the places of the observations alone. So it is worked
out once, for all tensors. The sinusoid is the only one that is not.

Places are numbers on the axis that the fit runs over: step numbers (`request` says which others).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import FitError

Float64 = NDArray[np.float64]

Curve: TypeAlias = Callable[[Float64], Float64]
"""From places to the values there."""

FITS = ("linear", "linear-origin", "polynomial:2", "sinusoid")
"""What a fit may be called; other degrees than 2 are ``polynomial:N``."""

MAX_DEGREE = 9

MAX_REFITS = 100_000

_ROUNDING = 1e-13
"""Variation of values below this share of their size is rounding."""

_SINUSOID_POINTS = 5
"""A sinusoid has four parameters."""

_LEAST_CYCLES = 0.25
"""Of the window, at least: a slower sinusoid cannot be told from a parabola."""

_EDGE = 1e-3
"""A minimum as near to the end of where it is looked for, in cycles, is none."""


@dataclass(frozen=True)
class Fit:
    """How values are carried on.

    Attributes
    ----------
    curve : str
        One of `FITS`: ``"linear"``, an intercept and a slope (RELEX, arXiv 2605.21468);
        ``"linear-origin"``, a slope alone, through 0 at place 0 (the base, which has no delta);
        ``"polynomial:N"``; ``"sinusoid"``, ``A sin(2 pi f x + phi) + B``.
    window : int, optional
        Fit through the last so many observations; default all.
    refit_every : float, optional
        Predict so far, then fit again through as many of the last values as before, observed or
        predicted; default never.
    as_relex : bool
        Do both as the scripts of RELEX's authors do: of all that is predicted between two fits they
        take the first, and a sinusoid is fitted by Levenberg-Marquardt from the spectrum's peak.

    Raises
    ------
    FitError
        If there is no such fit.
    """

    curve: str = "linear"
    window: int | None = None
    refit_every: float | None = None
    as_relex: bool = False

    def __post_init__(self) -> None:
        if self.curve not in FITS and not self._degree_of_name:
            raise FitError(
                f"--fit must be one of {', '.join(FITS)} (or polynomial:N with N from 1 to "
                f"{MAX_DEGREE}), not {self.curve!r}"
            )
        if self.window is not None and self.window < self.least_points:
            raise FitError(
                f"--window must be at least {self.least_points} for --fit {self.curve}, "
                f"not {self.window}"
            )
        if self.refit_every is not None and not self.refit_every > 0:
            raise FitError(f"--refit-every must be above 0, not {self.refit_every}")

    @property
    def _degree_of_name(self) -> int:
        name, _, degree = self.curve.partition(":")
        if name != "polynomial" or not degree.isascii() or not degree.isdigit():
            return 0
        return int(degree) if 1 <= int(degree) <= MAX_DEGREE else 0

    @property
    def degree(self) -> int:
        """Degree of the polynomial: 1 for lines."""
        return self._degree_of_name or 1

    @property
    def is_linear(self) -> bool:
        """Whether predictions are linear in the observed values."""
        return self.curve != "sinusoid"

    @property
    def least_points(self) -> int:
        """Observations that the curve takes."""
        if not self.is_linear:
            return _SINUSOID_POINTS
        return 1 if self.curve == "linear-origin" else self.degree + 1


def hat_vectors(places: Float64, targets: Float64, fit: Fit) -> Float64:
    """Return H (T, n): the weights with which observed values predict those at `targets`.

    Parameters
    ----------
    places : ndarray of float64, shape (T,)
        Of the observations; distinct, as many as the fit takes.
    targets : ndarray of float64, shape (n,)
    fit : Fit
        Linear; its window and refits do not count here.

    Examples
    --------
    >>> hat_vectors(np.array([10.0, 20.0]), np.array([30.0]), Fit()).T.tolist()
    [[-1.0, 2.0]]
    >>> slope_alone = Fit("linear-origin")
    >>> hat_vectors(np.array([10.0, 20.0]), np.array([30.0]), slope_alone).T.round(9).tolist()
    [[0.6, 1.2]]
    """
    hats: Float64
    if fit.curve == "linear-origin":
        scale = np.abs(places).max()
        scaled = places / scale
        hats = np.outer(scaled / (scaled @ scaled), targets / scale)
        return hats
    mean = places.mean()
    centred = places - mean
    if fit.degree == 1:
        slope_weights = centred / (centred @ centred)
        hats = 1.0 / len(places) + np.outer(slope_weights, targets - mean)
        return hats
    # Powers of numbers up to 1, made orthonormal: the normal equations square the condition.
    width = np.abs(centred).max()
    powers = np.vander(centred / width, fit.degree + 1, increasing=True)
    basis, triangle = np.linalg.qr(powers)
    wanted = np.vander((targets - mean) / width, fit.degree + 1, increasing=True)
    hats = basis @ np.linalg.solve(triangle.T, wanted.T)
    return hats


class Forecast:
    """Predicts values at target places from observed ones.

    Parameters
    ----------
    places : sequence of float
        Where the values were observed, ascending.
    targets : sequence of float
        Where they are wanted.
    fit : Fit

    Raises
    ------
    FitError
        If there are too few observations for the fit, or very many refits.

    Examples
    --------
    >>> forecast = Forecast([1, 2, 3], [10], Fit())
    >>> forecast.predict(np.array([[0.0], [2.0], [4.0]])).round(9).tolist()
    [[18.0]]
    """

    def __init__(self, places: Sequence[float], targets: Sequence[float], fit: Fit) -> None:
        self.fit = fit
        self.places = np.asarray(places, np.float64)
        self.targets = np.asarray(targets, np.float64)
        self._unrefined = 0
        self._window = len(self.places) if fit.window is None else fit.window
        if len(self.places) < fit.least_points:
            raise FitError(
                f"--fit {fit.curve} needs at least {fit.least_points} checkpoints, the history has "
                f"{len(self.places)}; add checkpoints with build-store or raise --history-steps"
            )
        if self._window > len(self.places):
            raise FitError(
                f"--window is {self._window} checkpoints, the history has {len(self.places)}"
            )
        if fit.refit_every is not None:
            ahead = float(self.targets.max(initial=-math.inf)) - self.places[-1]
            if ahead > MAX_REFITS * fit.refit_every:
                raise FitError(
                    f"--refit-every {fit.refit_every:g} would fit {ahead / fit.refit_every:.0f} "
                    f"times up to the last target; at most {MAX_REFITS} are made"
                )

    @property
    def unrefined(self) -> int:
        """Sinusoids so far whose frequency is the spectrum's: no better one was near it."""
        return self._unrefined

    @cached_property
    def hats(self) -> Float64:
        """H (T, n) of a fit that is linear, its window and refits included."""
        assert self.fit.is_linear
        if self.fit.refit_every is not None:
            # What it makes of the observations' unit vectors.
            return np.ascontiguousarray(self._refitted(np.eye(len(self.places))).T)
        hats = np.zeros((len(self.places), len(self.targets)))
        hats[-self._window :] = hat_vectors(self.places[-self._window :], self.targets, self.fit)
        return hats

    def predict(self, values: Float64) -> Float64:
        """Return what is predicted (n, k) from observed values (T, k), column by column."""
        if self.fit.is_linear:
            predicted: Float64 = self.hats.T @ values
            return predicted
        if self.fit.refit_every is not None:
            return self._refitted(values)
        window = slice(-self._window, None)
        return self._curve(self.places[window], values[window], self.targets)

    def weights(self, vectors: Float64) -> Float64:
        """Return W (T, n), which weigh the rows of M so that they sum to the predicted deltas.

        Parameters
        ----------
        vectors : ndarray of float64, shape (T, r)
            Orthonormal left singular vectors U of M.

        Notes
        -----
        The coefficients are ``C = U S``, and the delta is ``V c = M^T U S^-1 c``. Fits do not
        depend on the unit of what they fit, so ``S^-1 c`` is what they predict from U itself; for
        linear ones that is ``U^T h``, hence ``w = U U^T h`` (docs/design.md).
        """
        if self.fit.is_linear:
            weights: Float64 = vectors @ (vectors.T @ self.hats)
            return weights
        predicted: Float64 = vectors @ self.predict(vectors).T
        return predicted

    def r_squared(self, values: Float64) -> Float64:
        """Return the coefficient of determination (k,) of the fit through each column of values.

        In the window: 1 less the squared residuals' share of the squares about the mean, which a
        line through the origin may exceed. A column that does not vary, but for float64's
        rounding, has 1: the curve hits it.
        """
        here, window = self.places[-self._window :], values[-self._window :]
        varied = window - window.mean(axis=0)
        total = (varied**2).sum(axis=0)
        varies = total > _ROUNDING**2 * (window**2).sum(axis=0)
        fitted = self._curve(here, window, here)
        residual = ((window - fitted) ** 2).sum(axis=0)
        return np.where(varies, 1.0 - residual / np.where(varies, total, 1.0), 1.0)

    def _curve(self, places: Float64, values: Float64, targets: Float64) -> Float64:
        """Fit once; return predictions (targets, columns)."""
        if self.fit.is_linear:
            predicted: Float64 = hat_vectors(places, targets, self.fit).T @ values
            return predicted
        predictions = np.empty((len(targets), values.shape[1]))
        for number, column in enumerate(values.T):
            predictions[:, number] = self._sinusoid(places, column)(targets)
        return predictions

    def _sinusoid(self, places: Float64, values: Float64) -> Curve:
        fitted = fit_sinusoid_as_relex if self.fit.as_relex else fit_sinusoid
        curve, refined = fitted(places, values)
        self._unrefined += not refined
        return curve

    def _refitted(self, values: Float64) -> Float64:
        """Predict and fit again in turn; return predictions (n, k)."""
        every = self.fit.refit_every
        assert every is not None
        places, values = self.places[-self._window :], values[-self._window :]
        # What is predicted lies as far apart as what was observed.
        gap = float(np.median(np.diff(self.places))) if len(self.places) > 1 else every
        gap = min(gap, every)
        ahead = gap * np.arange(1, math.floor(every / gap * (1 + 1e-12)) + 1)
        predicted = np.empty((len(self.targets), values.shape[1]))
        left = np.ones(len(self.targets), np.bool_)
        begin = float(places[-1])
        while left.any():
            wanted = left & (self.targets <= begin + every)
            asked = np.concatenate([begin + ahead, self.targets[wanted]])
            if self.fit.as_relex:
                asked[asked > begin] = begin + gap
            made = self._curve(places, values, asked)
            predicted[wanted] = made[len(ahead) :]
            places = np.concatenate([places, begin + ahead])[-self._window :]
            values = np.concatenate([values, made[: len(ahead)]])[-self._window :]
            left &= ~wanted
            begin += every
        return predicted


def fit_sinusoid(places: Float64, values: Float64) -> tuple[Curve, bool]:
    """Fit ``A sin(2 pi f x + phi) + B`` by least squares; say whether f could be refined.

    Parameters
    ----------
    places, values : ndarray of float64, shape (T,)

    Returns
    -------
    curve : callable
    refined : bool
        Whether the best frequency lies within one bin of the spectrum's peak. If not, the peak's is
        taken: the squares fall on towards slower and larger sinusoids, as they do for a line.

    Notes
    -----
    f is the only parameter that the curve is not linear in: for each f the best others are a
    linear least-squares problem (variable projection, Golub and Pereyra 1973), and what is left is
    a search in one dimension around the peak of the discrete Fourier transform of the values,
    interpolated where places are not evenly spaced.
    """
    from scipy.optimize import minimize_scalar

    start, span = places[0], places[-1] - places[0]
    even = np.linspace(start, places[-1], len(places))
    spectrum = np.abs(np.fft.rfft(np.interp(even, places, values) - values.mean()))[1:]
    # In cycles of the window, which is one spacing longer than what it spans.
    window = span * len(places) / (len(places) - 1)
    peak = float(np.argmax(spectrum)) + 1.0

    def design(at: Float64, cycles: float) -> Float64:
        angle = (2 * np.pi * cycles / window) * (at - start)
        return np.stack([np.ones_like(at), np.sin(angle), np.cos(angle)], axis=1)

    def parameters(cycles: float) -> Float64:
        return np.asarray(np.linalg.lstsq(design(places, cycles), values, rcond=None)[0])

    def squares(cycles: float) -> float:
        residual = values - design(places, cycles) @ parameters(cycles)
        return float(residual @ residual)

    low, high = max(_LEAST_CYCLES, peak - 1.0), peak + 1.0
    best = float(minimize_scalar(squares, bounds=(low, high), method="bounded").x)
    refined = low + _EDGE < best < high - _EDGE
    cycles = best if refined else peak
    found = parameters(cycles)
    return (lambda at: design(at, cycles) @ found), refined


def fit_sinusoid_as_relex(places: Float64, values: Float64) -> tuple[Curve, bool]:
    """Fit a sinusoid as the scripts of RELEX's authors do; say whether that converged.

    All four parameters by Levenberg-Marquardt from the spectrum's peak; that guess itself where it
    does not converge. Arguments and results as in `fit_sinusoid`; places are numbers of rows.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    def sinusoid(
        t: Float64, amplitude: float, frequency: float, phase: float, offset: float
    ) -> Any:
        return amplitude * np.sin(2 * np.pi * frequency * t + phase) + offset

    rows = np.arange(len(values), dtype=np.float64)
    offset = float(values.mean())
    peak = np.argmax(np.abs(np.fft.rfft(values - offset)[1:])) + 1
    guess = [3 * float(values.std()) / 2**0.5, np.fft.rfftfreq(len(rows))[peak], 0.0, offset]
    converged = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
            found = curve_fit(sinusoid, rows, values, p0=guess, maxfev=10_000)[0]
    except RuntimeError:
        found, converged = guess, False
    return (lambda at: sinusoid(at - places[0], *found)), converged
