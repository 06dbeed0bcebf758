"""What forecasts from the first steps would have been worth at later ones: from Gram matrices.

A forecast is a combination a of the first K steps' deltas, what came is another, b: so the squared
norm of their difference, ``(a - b)^T G (a - b)``, needs the Gram matrix and no weight. Summed over
tensors it is that of the model. A damping lambda of the forecast makes it a parabola in lambda,
which three sums have all of: `Moments`.

Skill compares with staying where one is: ``1 - |predicted - true|^2 / |last observed - true|^2``.
1 is a perfect forecast; 0 is no better than the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from relex_stream.analysis import nearby_subspace
from relex_stream.fit import Fit, Forecast
from relex_stream.sketch import subspace_of_deltas

Float64 = NDArray[np.float64]

MOMENTS = 4
"""Numbers of a forecast: see `Backtest.moments`."""


@dataclass(frozen=True)
class Setting:
    """How is forecast.

    Attributes
    ----------
    rank : int
    fit : Fit
    anchor : str
        As in `methods.Extrapolation`.
    """

    rank: int
    fit: Fit
    anchor: str


@dataclass(frozen=True, order=True)
class Cell:
    """From where to where: rows of the store.

    Attributes
    ----------
    rows : int
        K: the forecast sees the first so many.
    target : int
        Row of the step that is forecast; K or later.
    """

    rows: int
    target: int


class Backtest:
    """Forecasts of some cells by some settings.

    Parameters
    ----------
    steps : sequence of int
        All N stored steps.
    cells : sequence of Cell
    settings : sequence of Setting

    Raises
    ------
    FitError
        If a history is too short for a fit.
    """

    def __init__(
        self, steps: Sequence[int], cells: Sequence[Cell], settings: Sequence[Setting]
    ) -> None:
        self.steps = tuple(steps)
        self.cells = tuple(cells)
        self.settings = tuple(settings)
        self._rank = max((setting.rank for setting in settings), default=1)
        self._histories = [
            _History(self.steps, rows, list(numbers), self.cells, self.settings)
            for rows, numbers in groupby(
                sorted(range(len(self.cells)), key=lambda number: self.cells[number].rows),
                key=lambda number: self.cells[number].rows,
            )
        ]

    def moments(self, gram: Float64, replicates: Float64 | None = None) -> Float64:
        """Return the moments of every cell by every setting.

        Parameters
        ----------
        gram : ndarray of float64, shape (N, N)
        replicates : ndarray of float64, shape (n, N, N), optional
            Of an estimate.

        Returns
        -------
        ndarray of float64, shape (1 + n, cells, settings, 4)
            First those of `gram`, then those of the replicates: ``|a|^2``, ``a b``, ``|b|^2`` and
            ``|c|^2``, where a is the forecast before damping, b what came and c how far the model
            went on from its last observed step. With anchor ``"base"`` a and b are deltas from the
            base, with ``"latest"`` from the last observed step. They add up over tensors.
        """
        count = 0 if replicates is None else len(replicates)
        out = np.zeros((1 + count, len(self.cells), len(self.settings), MOMENTS))
        for history in self._histories:
            rows = history.rows
            vectors = subspace_of_deltas(gram[:rows, :rows], self._rank).vectors
            history.fill(out[0], gram, vectors)
            if replicates is not None:
                nearby, _ = nearby_subspace(replicates[:, :rows, :rows], vectors)
                for number, (each, its_vectors) in enumerate(
                    zip(replicates, nearby, strict=True), start=1
                ):
                    history.fill(out[number], each, its_vectors)
        return out


class _History:
    """The cells of one history."""

    def __init__(
        self,
        steps: Sequence[int],
        rows: int,
        numbers: Sequence[int],
        cells: Sequence[Cell],
        settings: Sequence[Setting],
    ) -> None:
        self.rows = rows
        self._numbers = list(numbers)
        self._targets = np.array([cells[number].target for number in numbers])
        places = [*(steps[row] for row in self._targets.tolist()), steps[rows - 1]]
        self._settings = settings
        self._forecasts = {
            setting.fit: Forecast(steps[:rows], places, setting.fit) for setting in settings
        }

    def fill(self, out: Float64, gram: Float64, vectors: Float64) -> None:
        """Write the moments of these cells to `out` (cells, settings, 4)."""
        last = self.rows - 1
        seen = gram[: self.rows, : self.rows]
        there = gram[: self.rows, self._targets]
        squares = gram[self._targets, self._targets]
        onward = squares - 2 * gram[last, self._targets] + gram[last, last]
        for column, setting in enumerate(self._settings):
            weights = self._forecasts[setting.fit].weights(vectors[:, : setting.rank])
            forecast = weights[:, :-1]
            came, came_square = there, squares
            if setting.anchor == "latest":
                forecast = forecast - weights[:, -1:]
                came, came_square = there - seen[:, last:], onward
            square = (forecast * (seen @ forecast)).sum(axis=0)
            product = (forecast * came).sum(axis=0)
            out[self._numbers, column] = np.stack([square, product, came_square, onward], axis=1)


def skill(moments: Float64, damping: Float64 | float) -> Float64:
    """Return the skill of forecasts that are damped; NaN where the model did not go on.

    Parameters
    ----------
    moments : ndarray of float64, shape (..., 4)
        Of one tensor, or added up over several.
    damping : float or ndarray, shape of the rest
    """
    square, product, came, onward = np.moveaxis(moments, -1, 0)
    missed = came - 2 * damping * product + damping**2 * square
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(onward > 0, 1.0 - missed / onward, np.nan)


def best_damping(moments: Float64) -> Float64:
    """Return the damping of most skill, known afterwards; NaN where nothing was forecast."""
    square, product, _, _ = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > 0, product / square, np.nan)


# --- nested windows ------------------------------------------------------------------------------

HORIZONS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""How many times as far forecasts go by which others are judged, and as far as these go."""

LEAST_NESTED_STEPS = 3
"""A history of fewer checkpoints says nothing of what a forecast from it is worth."""

DOUBTED_SKILL = -0.15
"""Undamped forecasts of this mean skill, or less, are not trusted beyond the best damping.

Settled by the reward of extrapolated models, not by their distance: docs/findings.md.
"""


def nested_cells(
    history: Sequence[int], target_step: int, least: int = LEAST_NESTED_STEPS
) -> list[Cell]:
    """Return the forecasts of its end that a history can make, to judge one of a target by.

    From K to qK steps: from K / h to K, for q and each of `HORIZONS` up to q, or to 2 if that is
    further. Where no such history has `least` checkpoints, from the first `least`.

    Returns
    -------
    list of Cell
        The furthest first; empty if the history has no more than `least` checkpoints.

    Examples
    --------
    >>> nested_cells(range(1, 41), 80)  # twice as far as step 40: from step 20
    [Cell(rows=20, target=39), Cell(rows=26, target=39), Cell(rows=32, target=39)]
    """
    last = history[-1]
    limit = max(2 * last, target_step)
    ends = {last / horizon for horizon in HORIZONS if horizon * last <= limit}
    ends.add(last * last / target_step)
    found = {int(np.searchsorted(history, end, side="right")) for end in ends}
    rows = sorted(each for each in found if least <= each < len(history))
    if not rows and len(history) > least:
        rows = [least]
    return [Cell(each, len(history) - 1) for each in rows]


def mean_moments(moments: Float64) -> Float64:
    """Return moments whose skill, for any damping, is the mean of the skills of several forecasts.

    Parameters
    ----------
    moments : ndarray of float64, shape (forecasts, ..., 4)
        Over the whole model. Forecasts of a model that did not go on do not count.

    Returns
    -------
    ndarray of float64, shape (..., 4)
        In units of how far the model went on; zeros if it never did.
    """
    onward = moments[..., 3:]
    shares = np.divide(moments, onward, out=np.zeros_like(moments), where=onward > 0)
    counts = np.maximum((onward > 0).sum(axis=0), 1)
    found: Float64 = shares.sum(axis=0) / counts
    return found


def chosen_damping(moments: Float64) -> float:
    """Return the damping that nested forecasts speak for.

    That of the highest mean skill, and the nearer to 1 the better they did undamped::

        lambda + (1 - lambda) * min(1, max(0, 1 + S(1) / 0.15))

    with S(1) their mean skill undamped. The best damping in weights is too careful by reward where
    forecasts do well: what is right of them is what the reward is about (docs/findings.md).

    Parameters
    ----------
    moments : ndarray of float64, shape (4,)
        Of `mean_moments`, with anchor ``"latest"``.

    Returns
    -------
    float
        From 0 to 1; 0 if nothing was forecast.
    """
    best = float(best_damping(moments))
    if not np.isfinite(best):
        return 0.0
    best = min(1.0, max(0.0, best))
    trust = min(1.0, max(0.0, 1.0 - float(skill(moments, 1.0)) / DOUBTED_SKILL))
    return best + (1.0 - best) * trust
