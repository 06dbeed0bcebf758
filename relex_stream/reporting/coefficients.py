"""Coefficients over steps, the curve through them, and a band from errors of past forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relex_stream.fit import Fit, Forecast
from relex_stream.reporting.numbers import Coefficients, ForecastPoint
from relex_stream.sketch import subspace_of_deltas
from relex_stream.skill import LEAST_NESTED_STEPS

Float64 = NDArray[np.float64]

BAND = 2.0
"""Half the width of a band, in root mean squares of past errors."""

LEAST_SHARE = 0.25
"""Of the last step of the history: earlier histories are not asked, they tell of another time."""

MOST_HISTORIES = 24
"""Earlier histories that forecasts are made from, evenly spread."""

_POINTS = 160
"""Places at which a curve is drawn, about."""


def coefficients_of(gram: Float64, rows: int, rank: int) -> Float64:
    """Return the coefficients of all steps in the subspace of the first ones.

    Parameters
    ----------
    gram : ndarray of float64, shape (N, N)
    rows : int
        K: the subspace is that of the first so many steps.
    rank : int

    Returns
    -------
    ndarray of float64, shape (N, r), r at most `rank`
        ``M V = G[:, :K] U / S``, in weight units. Signs, which a decomposition leaves open, are
        such that the history's largest coefficient of each component is above 0.

    Examples
    --------
    >>> straight = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    >>> coefficients_of(straight, 2, 1).round(9).tolist()
    [[1.0], [2.0], [3.0]]
    """
    subspace = subspace_of_deltas(gram[:rows, :rows], rank)
    values = gram[:, :rows] @ subspace.vectors / subspace.singular_values
    history = values[:rows]
    largest = np.take_along_axis(history, np.abs(history).argmax(axis=0)[None], axis=0)
    signed: Float64 = values * np.where(largest < 0, -1.0, 1.0)
    return signed


@dataclass(frozen=True)
class PastErrors:
    """How far forecasts from earlier histories were off.

    Attributes
    ----------
    relative : ndarray of float64, shape (n, r)
        At each horizon, for each component: root mean square, and no less than at any nearer
        horizon; NaN where no history reached as far.
    histories : int
        Forecasts were made from so many.
    """

    relative: Float64
    histories: int


def past_errors(
    gram: Float64, steps: Sequence[int], rank: int, fit: Fit, horizons: Float64
) -> PastErrors:
    """Return the errors of a history's own past forecasts of its coefficients.

    For each earlier history, of k steps, and each later step s of the history: the subspace of
    those k steps alone, the curve through their coefficients in it, and
    ``e(s / s_k) = (predicted(s) - c(s)) / max |c(s_1) ... c(s_k)|``, a share of the largest
    coefficient so far. Between steps e is interpolated. Squares are averaged over the histories
    that reach a horizon.

    Parameters
    ----------
    gram : ndarray of float64, shape (K, K)
        Of the history; nothing later is looked at.
    steps : sequence of int
        K of them.
    rank : int
        Components.
    fit : Fit
    horizons : ndarray of float64, shape (n,)
        Multiples of the last step of a history, ascending, from 1.
    """
    rows = len(steps)
    places = np.asarray(steps, np.float64)
    least = max(LEAST_NESTED_STEPS, fit.least_points, fit.window or 0)
    first = max(least, int(np.searchsorted(places, LEAST_SHARE * places[-1], side="right")))
    count = min(MOST_HISTORIES, rows - first)
    ends = np.unique(np.linspace(first, rows - 1, max(0, count)).round().astype(int))
    found = []
    for end in ends.tolist():
        values = coefficients_of(gram, end, rank)
        later = places[end - 1 :]
        predicted = Forecast(places[:end].tolist(), later.tolist(), fit).predict(values[:end])
        errors = (predicted - values[end - 1 :]) / np.abs(values[:end]).max(axis=0)
        reached = np.full((len(horizons), rank), np.nan)
        for component in range(values.shape[1]):
            reached[:, component] = np.interp(
                horizons, later / places[end - 1], errors[:, component], right=np.nan
            )
        found.append(reached)
    relative = np.full((len(horizons), rank), np.nan)
    if found:
        squares = np.stack(found) ** 2
        known = np.isfinite(squares)
        reaching = known.sum(axis=0)
        total = np.where(known, squares, 0.0).sum(axis=0)
        mean = np.sqrt(total / np.maximum(reaching, 1))
        relative = np.where(reaching > 0, np.maximum.accumulate(mean, axis=0), np.nan)
    return PastErrors(relative, len(found))


def describe_coefficients(
    name: str,
    gram: Float64,
    steps: Sequence[int],
    rows: int,
    *,
    rank: int,
    fit: Fit | None,
    targets: Sequence[int],
    until: float,
) -> list[Coefficients]:
    """Return the first components of a group of weights, as far as there are any.

    The band around the curve at step s is ``BAND * e(s / s_K) * max |c|``, with the errors e of
    `past_errors` and the largest coefficient of the history: it is as wide as past forecasts, as
    far ahead in proportion, would have had it. It is zero for a trajectory that is a curve of the
    fit exactly. It says nothing of the deltas outside the subspace.

    Parameters
    ----------
    name : str
    gram : ndarray of float64, shape (N, N)
    steps : sequence of int
        N of them.
    rows : int
        K, of the history.
    rank : int
        Components to return at most.
    fit : Fit, optional
        None: no curve.
    targets : sequence of int
        Steps to forecast.
    until : float
        The curve is drawn up to that step.
    """
    values = coefficients_of(gram, rows, rank)
    history = np.asarray(steps[:rows], np.float64)
    places = np.zeros(0)
    curve = np.zeros((0, values.shape[1]))
    widths = np.zeros((0, values.shape[1]))
    histories = 0
    if fit is not None:
        begin = history[0] if fit.window is None else history[-fit.window]
        # The last step is among them: there the forecast begins.
        inside = np.linspace(begin, history[-1], _POINTS // 2, endpoint=False)
        ahead = np.linspace(history[-1], max(until, history[-1]), _POINTS // 2)
        wanted = np.asarray(targets, np.float64)
        places = np.unique(np.concatenate([inside, ahead, wanted]))
        curve = Forecast(history.tolist(), places.tolist(), fit).predict(values[:rows])
        forward = places >= history[-1]
        errors = past_errors(
            gram[:rows, :rows], steps[:rows], values.shape[1], fit, places[forward] / history[-1]
        )
        widths = np.full_like(curve, np.nan)
        widths[forward] = BAND * errors.relative * np.abs(values[:rows]).max(axis=0)
        histories = errors.histories
    at: list[int] = []
    if fit is not None:
        at = np.searchsorted(places, np.asarray(targets, np.float64)).tolist()
    return [
        Coefficients(
            name=name,
            component=number + 1,
            steps=tuple(steps),
            values=tuple(values[:, number].tolist()),
            history=rows,
            places=tuple(places.tolist()),
            fitted=tuple(curve[:, number].tolist()),
            half_widths=tuple(widths[:, number].tolist()),
            past_histories=histories,
            forecasts=tuple(
                ForecastPoint(step, float(curve[place, number]), float(widths[place, number]))
                for step, place in zip(targets, at, strict=False)
            ),
        )
        for number in range(values.shape[1])
    ]
