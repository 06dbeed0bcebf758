"""Coefficients against a dense decomposition; bands against forecasts made the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from relex_stream.fit import Fit
from relex_stream.reporting.coefficients import (
    BAND,
    coefficients_of,
    describe_coefficients,
    past_errors,
)
from relex_stream.reporting.numbers import Coefficients


def gram_of(curve: np.ndarray) -> np.ndarray:
    """Return the Gram matrix of a movement along one direction."""
    return np.outer(curve, curve)


def first(
    curve: np.ndarray, steps: list[int], rows: int, fit: str = "linear", window: int | None = None
) -> Coefficients:
    return describe_coefficients(
        "model",
        gram_of(curve),
        steps,
        rows,
        rank=1,
        fit=Fit(fit, window),
        targets=[steps[-1]],
        until=steps[-1],
    )[0]


def test_coefficients_are_those_of_a_dense_decomposition() -> None:
    deltas = np.random.default_rng(0).standard_normal((9, 200)).cumsum(axis=0)
    rows = 6
    found = coefficients_of(deltas @ deltas.T, rows, 3)
    _, _, vectors = np.linalg.svd(deltas[:rows], full_matrices=False)
    expected = deltas @ vectors[:3].T
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-9)
    for column, true in zip(found.T, expected.T, strict=True):
        assert abs(column @ true) == pytest.approx(float(true @ true))
        assert column[:rows][np.abs(column[:rows]).argmax()] > 0


@pytest.mark.parametrize(
    ("fit", "curve"),
    [
        ("linear", lambda steps: 3.0 * steps + 2.0),
        ("linear-origin", lambda steps: 3.0 * steps),
        ("polynomial:2", lambda steps: steps - 0.004 * steps**2),
    ],
)
def test_a_trajectory_that_is_its_fit_has_a_band_of_no_width(fit: str, curve: object) -> None:
    steps = list(range(5, 105, 5))
    values = curve(np.array(steps, np.float64))  # type: ignore[operator]
    found = first(values, steps, 10, fit)
    widths = np.array(found.half_widths)
    ahead = np.array(found.places) >= steps[9]
    assert found.past_histories > 0
    # Up to the horizon that the shortest of the earlier histories reached.
    assert np.isfinite(widths[ahead]).any()
    assert np.nanmax(widths[ahead]) < 1e-9 * np.abs(values).max()
    assert found.forecasts[0].value == pytest.approx(values[-1])


@pytest.mark.parametrize("power", [0.5, 0.8, 1.5])
def test_the_band_of_a_trajectory_that_bends_holds_what_came(power: float) -> None:
    steps = list(range(1, 101))
    values = np.array(steps, np.float64) ** power
    rows = 50
    found = first(values, steps, rows)
    fitted = np.interp(steps[rows:], found.places, found.fitted)
    widths = np.interp(steps[rows:], found.places, found.half_widths)
    missed = np.abs(fitted - values[rows:])
    assert (missed > 0).all()
    assert (missed <= widths).all()
    # And it is not so wide that it says nothing.
    assert (widths < 6 * missed).all()


def test_the_band_is_by_the_formula() -> None:
    rng = np.random.default_rng(1)
    steps = [2, 3, 5, 8, 9, 12]
    deltas = rng.standard_normal((6, 40)).cumsum(axis=0)
    gram = deltas @ deltas.T
    horizons = np.array([1.0, 1.2, 1.5])
    found = past_errors(gram, steps, 1, Fit(), horizons)
    # A quarter of step 12 is step 3; a history has three checkpoints at least.
    assert found.histories == 3
    squares = []
    for count in (3, 4, 5):
        _, _, vectors = np.linalg.svd(deltas[:count], full_matrices=False)
        values = deltas @ vectors[0]
        line = np.polyfit(steps[:count], values[:count], 1)
        later = np.array(steps[count - 1 :], np.float64)
        errors = (np.polyval(line, later) - values[count - 1 :]) / np.abs(values[:count]).max()
        squares.append(np.interp(horizons, later / steps[count - 1], errors, right=np.nan) ** 2)
    expected = np.maximum.accumulate(np.sqrt(np.nanmean(squares, axis=0)))
    np.testing.assert_allclose(found.relative[:, 0], expected, rtol=1e-9)


def test_the_band_grows_and_ends_where_no_past_forecast_reached() -> None:
    steps = list(range(1, 41))
    values = np.sqrt(np.array(steps, np.float64))
    found = first(values, steps, 8)
    places, widths = np.array(found.places), np.array(found.half_widths)
    # From step 3, the earliest history, to 8.
    known = np.isfinite(widths)
    assert places[known].min() == 8
    assert places[known].max() <= 8 * 8 / 3
    assert places[known].max() > 20
    assert (np.diff(widths[known]) >= 0).all()
    assert math.isnan(found.forecasts[0].half_width)


def test_nothing_later_than_the_history_is_looked_at() -> None:
    steps = list(range(1, 21))
    values = np.array(steps, np.float64) ** 0.7
    other = values.copy()
    other[12:] *= 5
    one, two = first(values, steps, 12), first(other, steps, 12)
    np.testing.assert_array_equal(one.fitted, two.fitted)
    np.testing.assert_array_equal(one.half_widths, two.half_widths)
    assert one.values != two.values


def test_a_short_history_has_no_band_and_a_shorter_one_no_curve() -> None:
    steps = [1, 2, 3, 4]
    values = np.array([1.0, 2.0, 2.5, 3.5])
    short = first(values, steps, 3)
    assert short.past_histories == 0
    assert len(short.fitted) > 0
    assert np.isnan(short.half_widths).all()
    [none] = describe_coefficients(
        "w", gram_of(values), steps, 1, rank=2, fit=None, targets=[9], until=9
    )
    assert (none.places, none.fitted, none.forecasts) == ((), (), ())
    assert none.values == pytest.approx(tuple(values))


def test_a_window_begins_the_curve_and_bounds_the_histories() -> None:
    steps = list(range(1, 21))
    values = np.array(steps, np.float64) ** 0.7
    found = first(values, steps, 16, window=6)
    assert found.places[0] == 11
    line = np.polyfit(steps[10:16], values[10:16], 1)
    assert found.forecasts[0].value == pytest.approx(np.polyval(line, 20))
    # From 6 checkpoints to 15.
    assert found.past_histories == 10


def test_a_sinusoid_can_be_drawn() -> None:
    steps = list(range(1, 31))
    values = 5 + np.sin(np.array(steps) / 3)
    found = first(values, steps, 24, "sinusoid")
    assert found.forecasts[0].value == pytest.approx(values[-1], abs=0.05)
    assert BAND == 2
