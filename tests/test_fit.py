"""Fits against least squares written out, on the steps themselves and column by column."""

from __future__ import annotations

import warnings
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream.errors import FitError
from relex_stream.fit import FITS, Fit, Forecast, fit_sinusoid, fit_sinusoid_as_relex, hat_vectors

histories = st.lists(st.integers(0, 100_000), min_size=4, max_size=40, unique=True).map(sorted)
gaps = st.lists(st.integers(1, 30), min_size=4, max_size=40)
LINEAR = ("linear", "linear-origin", "polynomial:2", "polynomial:3")


def by_lstsq(curve, steps, values, targets):
    """Predict with numpy's least squares on a centred and scaled regressor."""
    steps, targets = np.asarray(steps, np.float64), np.asarray(targets, np.float64)
    if curve == "linear-origin":
        slope = (steps @ values) / (steps @ steps)
        return np.outer(targets, slope) if values.ndim == 2 else targets * slope
    degree = 1 if curve == "linear" else int(curve.split(":")[1])
    middle, width = steps.mean(), np.ptp(steps) / 2
    design = np.vander((steps - middle) / width, degree + 1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return np.vander((targets - middle) / width, degree + 1) @ solution


def hat(steps, target, curve="linear"):
    return Forecast(steps, [target], Fit(curve)).hats[:, 0]


def r_squared(steps, values, fit=None):
    return Forecast(steps, [], fit or Fit()).r_squared(values)


# --- curves that are linear in the values --------------------------------------------------------


@pytest.mark.parametrize("curve", LINEAR)
@settings(max_examples=60, deadline=None)
@given(gaps=gaps, ahead=st.integers(-50, 300), seed=st.integers(0, 2**32 - 1))
def test_hat_vectors_predict_as_least_squares_does(curve, gaps, ahead, seed):
    steps = np.cumsum(gaps)
    target = steps[-1] + ahead
    values = np.random.default_rng(seed).standard_normal((len(steps), 3))
    forecast = Forecast(steps, [target, steps[0]], Fit(curve))
    expected = by_lstsq(curve, steps, values, [target, steps[0]])
    room = 1e-9 * np.abs(forecast.hats).sum()
    np.testing.assert_allclose(forecast.predict(values), expected, rtol=1e-9, atol=room)
    np.testing.assert_allclose(forecast.hats.T @ values, expected, rtol=1e-9, atol=room)


@settings(max_examples=60, deadline=None)
@given(steps=histories, target=st.integers(0, 200_000), seed=st.integers(0, 2**32 - 1))
def test_lines_through_uneven_steps_are_those_of_least_squares(steps, target, seed):
    values = np.random.default_rng(seed).standard_normal((len(steps), 3))
    expected = by_lstsq("linear", steps, values, [target])
    room = 1e-9 * np.abs(hat(steps, target)).sum()
    np.testing.assert_allclose(hat(steps, target) @ values, expected[0], rtol=1e-9, atol=room)


@settings(max_examples=100, deadline=None)
@given(
    steps=histories,
    target=st.integers(0, 200_000),
    intercept=st.floats(-100, 100),
    slope=st.floats(-10, 10),
)
def test_lines_are_reproduced(steps, target, intercept, slope):
    values = intercept + slope * np.array(steps, np.float64)
    found = hat(steps, target)
    largest = np.abs(found).sum() * np.abs(values).max(initial=1)
    assert found @ values == pytest.approx(intercept + slope * target, rel=0, abs=1e-13 * largest)


def test_the_regressor_is_the_step_not_the_row():
    # On rows 0, 1, 2 the answer would be another.
    assert hat([0, 10, 100], 100) @ np.array([0.0, 10.0, 100.0]) == pytest.approx(100)
    assert hat([5, 7], 6).tolist() == [0.5, 0.5]


def test_at_the_mean_of_the_steps_the_hat_vector_is_the_mean():
    np.testing.assert_allclose(hat([1, 2, 6], 3), np.full(3, 1 / 3), atol=1e-15)


@pytest.mark.parametrize("curve", ["linear", "polynomial:2"])
@pytest.mark.parametrize("start", [0, 2**40, 2**52])
def test_huge_steps_lose_nothing(start, curve):
    steps = [start, start + 1, start + 3, start + 4]
    expected = hat([0, 1, 3, 4], 10, curve)
    np.testing.assert_allclose(hat(steps, start + 10, curve), expected, rtol=1e-13)


def test_widely_spread_steps():
    steps = [1, 2, 2**40]
    for curve in ("linear", "linear-origin"):
        assert hat(steps, 2**41, curve) @ np.array(steps, float) == pytest.approx(2**41)


def test_a_line_through_the_origin_takes_one_checkpoint():
    assert hat([20], 60, "linear-origin").tolist() == [3.0]


@pytest.mark.parametrize(
    ("curve", "least"),
    [("linear", 2), ("linear-origin", 1), ("polynomial:2", 3), ("sinusoid", 5)],
)
def test_a_fit_needs_as_many_points_as_it_has_parameters(curve, least):
    Forecast(range(1, least + 1), [100], Fit(curve))
    with pytest.raises(
        FitError, match=rf"at least {least} checkpoints, the history has {least - 1}"
    ):
        Forecast(range(1, least), [100], Fit(curve))


@pytest.mark.parametrize("name", ["cubic", "polynomial", "polynomial:0", "polynomial:10", "poly:x"])
def test_an_unknown_fit_is_refused(name):
    with pytest.raises(FitError, match=rf"{', '.join(FITS)} .*not '{name}'"):
        Fit(name)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", LINEAR)
@pytest.mark.parametrize("window", [4, 6, 9])
def test_a_window_is_a_fit_of_the_last_checkpoints_alone(curve, window):
    steps = np.array([1, 2, 4, 7, 11, 16, 17, 25, 40])
    values = np.random.default_rng(0).standard_normal((9, 2))
    forecast = Forecast(steps, [50, 3], Fit(curve, window))
    expected = by_lstsq(curve, steps[-window:], values[-window:], [50, 3])
    np.testing.assert_allclose(forecast.predict(values), expected, rtol=1e-9)
    assert not forecast.hats[:-window].any()


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(FitError, match="--window is 6 checkpoints, the history has 5"):
        Forecast(range(5), [9], Fit("linear", 6))
    with pytest.raises(FitError, match="--window must be at least 3 for --fit polynomial:2, not 2"):
        Fit("polynomial:2", 2)


# --- refits --------------------------------------------------------------------------------------


def refitted(curve, steps, values, target, window, every, gap):
    """Predict `every` steps, slide the window, fit again: a loop over one column."""
    steps, values = list(steps[-window:]), list(values[-window:])
    while target > steps[-1] + every:
        new = [steps[-1] + gap * i for i in range(1, every // gap + 1)]
        made = by_lstsq(curve, steps, np.array(values), new)
        steps, values = (steps + new)[-window:], (values + list(made))[-window:]
    return by_lstsq(curve, steps, np.array(values), [target])[0]


@pytest.mark.parametrize("curve", LINEAR)
@pytest.mark.parametrize(("window", "every"), [(None, 4), (5, 2), (5, 6), (8, 20)])
def test_refits_go_on_from_what_was_predicted(curve, window, every):
    steps = np.arange(2, 22, 2)  # every second step
    values = np.random.default_rng(1).standard_normal(10)
    targets = [21, 22, 25, 31, 60]
    forecast = Forecast(steps, targets, Fit(curve, window, every))
    expected = [
        refitted(curve, steps, values, target, window or 10, every, gap=2) for target in targets
    ]
    found = forecast.predict(values[:, None])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(forecast.hats.T @ values, found, rtol=1e-12)


def test_refits_between_checkpoints_predict_one_place_each():
    # Checkpoints are 10 steps apart, a fit is good for 4.
    steps, values = np.array([10, 20, 30, 40]), np.array([1.0, 3.0, 2.0, 5.0])
    window = list(zip(steps.tolist(), values.tolist(), strict=True))
    for begin in (40, 44, 48):
        places, seen = zip(*window[-4:], strict=True)
        made = by_lstsq("linear", places, np.array(seen), [begin + 4])[0]
        window.append((begin + 4, made))
    found = Forecast(steps, [52], Fit("linear", None, 4)).predict(values[:, None])
    assert found[0, 0] == pytest.approx(window[-1][1])


def test_a_line_goes_on_as_itself_whatever_is_fitted_again():
    steps = np.arange(1, 9)
    values = np.stack([3.0 * steps + 1, -steps], axis=1)
    found = Forecast(steps, [100], Fit("linear", 4, 3)).predict(values)
    np.testing.assert_allclose(found, [[301.0, -100.0]], rtol=1e-9)


def test_the_authors_hold_the_first_prediction_of_each_fit():
    # svd_extrapolation.py: target_t is the window's length whatever the step.
    rng = np.random.default_rng(2)
    values, window, every = rng.standard_normal(12), 6, 4
    targets = list(range(12, 24))
    buffer, expected = list(values[-window:]), {}
    since, held = every, 0.0
    for step in targets:
        if since >= every:
            slope, intercept = np.polyfit(np.arange(window), buffer[-window:], 1)
            held, since = slope * window + intercept, 0
        expected[step] = held
        buffer.append(held)
        since += 1
    forecast = Forecast(range(12), targets, Fit("linear", window, every, as_relex=True))
    found = forecast.predict(values[:, None])[:, 0]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-9)


def test_refits_that_are_none_or_too_many_are_refused():
    with pytest.raises(FitError, match="--refit-every must be above 0"):
        Fit("linear", None, 0)
    with pytest.raises(FitError, match="would fit 1000000 times"):
        Forecast([1, 2], [1_000_002], Fit("linear", None, 1))


# --- the sinusoid --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    cycles=st.floats(0.9, 6),
    phase=st.floats(0, 6.28),
    amplitude=st.floats(0.1, 10),
    offset=st.floats(-5, 5),
    even=st.booleans(),
)
def test_a_sinusoid_is_found_again(cycles, phase, amplitude, offset, even):
    steps = np.arange(40.0) if even else np.sort(np.arange(40) + 0.2 * np.sin(np.arange(40)))

    def curve(at):
        return amplitude * np.sin(2 * np.pi * cycles / 40 * at + phase) + offset

    found, refined = fit_sinusoid(steps, curve(steps))
    assert refined
    ahead = np.array([45.0, 60.0])
    np.testing.assert_allclose(found(ahead), curve(ahead), atol=2e-3 * amplitude)


def test_no_frequency_near_the_peak_fits_better():
    rng = np.random.default_rng(3)
    steps = np.arange(30.0)
    values = np.sin(0.7 * steps) + 0.3 * rng.standard_normal(30)
    found, refined = fit_sinusoid(steps, values)
    assert refined
    ours = ((values - found(steps)) ** 2).sum()
    peak = np.argmax(np.abs(np.fft.rfft(values - values.mean()))[1:]) + 1
    for cycles in np.linspace(peak - 1, peak + 1, 2001):
        angle = 2 * np.pi * cycles / 30 * steps
        design = np.stack([np.ones(30), np.sin(angle), np.cos(angle)], axis=1)
        residual = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        assert ours <= residual @ residual * (1 + 1e-6)


def test_a_line_has_no_frequency_and_says_so():
    steps = np.arange(20.0)
    forecast = Forecast(steps, [25], Fit("sinusoid"))
    assert np.isfinite(forecast.predict(np.stack([steps, np.sin(steps)], axis=1))).all()
    assert forecast.unrefined == 1


def test_values_that_do_not_vary_are_carried_on():
    found, _ = fit_sinusoid(np.arange(8.0), np.full(8, 2.5))
    np.testing.assert_allclose(found(np.array([100.0])), [2.5])


def test_a_sinusoid_does_not_depend_on_the_unit_of_values_or_places():
    steps = np.arange(25.0)
    values = np.random.default_rng(4).standard_normal(25)
    expected = fit_sinusoid(steps, values)[0](np.array([30.0]))
    scaled = fit_sinusoid(1000 + 10 * steps, 1e-6 * values)[0](np.array([1300.0]))
    np.testing.assert_allclose(scaled, 1e-6 * expected, rtol=1e-5)


def test_the_authors_sinusoid_is_found_from_their_guess():
    def curve(t):
        return 2 * np.sin(2 * np.pi * 0.102 * t + 0.3) + 0.5

    rows = np.arange(30.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, converged = fit_sinusoid_as_relex(rows + 7, curve(rows))
    assert converged
    # The places are rows of a window: only how far they are from its first counts.
    np.testing.assert_allclose(found(np.array([40.0])), curve(33.0), rtol=1e-6)
    forecast = Forecast(rows, [33.0], Fit("sinusoid", as_relex=True))
    np.testing.assert_allclose(forecast.predict(curve(rows)[:, None]), [[curve(33.0)]], rtol=1e-6)


def test_where_the_authors_sinusoid_does_not_converge_their_guess_stands():
    # A spike: nothing that oscillates.
    values = np.zeros(12)
    values[-1] = 1e9
    with mock.patch("scipy.optimize.curve_fit", side_effect=RuntimeError):
        found, converged = fit_sinusoid_as_relex(np.arange(12.0), values)
    assert not converged
    amplitude, offset = 3 * values.std() / np.sqrt(2), values.mean()
    expected = amplitude * np.sin(2 * np.pi / 12 * 5) + offset
    np.testing.assert_allclose(found(np.array([5.0])), [expected])


def test_sinusoids_are_refitted_too():
    steps = np.arange(1.0, 41.0)
    values = np.sin(0.5 * steps)
    found = Forecast(steps, [60], Fit("sinusoid", 20, 5)).predict(values[:, None])
    np.testing.assert_allclose(found[0, 0], np.sin(30.0), atol=0.02)


# --- the coefficient of determination ------------------------------------------------------------


@pytest.mark.parametrize("curve", LINEAR)
@pytest.mark.parametrize("window", [None, 4])
@settings(max_examples=40, deadline=None)
@given(gaps=gaps, seed=st.integers(0, 2**32 - 1))
def test_r_squared_is_the_share_the_curve_explains(curve, window, gaps, seed):
    steps = np.cumsum(gaps)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((len(steps), 4)) + rng.standard_normal(4) * np.linspace(
        0, 3, len(steps)
    ).reshape(-1, 1)
    here, seen = steps[-(window or 0) :], values[-(window or 0) :]
    residual = ((seen - by_lstsq(curve, here, seen, here)) ** 2).sum(axis=0)
    total = ((seen - seen.mean(axis=0)) ** 2).sum(axis=0)
    found = r_squared(steps, values, Fit(curve, window))
    np.testing.assert_allclose(found, 1 - residual / total, rtol=1e-7, atol=1e-7)


def test_r_squared_of_a_line_and_of_no_line():
    steps = [1, 2, 4, 9]
    columns = np.array([[3.0, 1.0], [5.0, -1.0], [9.0, 1.0], [19.0, -1.0]])
    found = r_squared(steps, columns)
    assert found[0] == pytest.approx(1, abs=1e-14)
    assert found[1] < 0.5
    assert r_squared(range(10), np.sin(np.arange(10.0))[:, None], Fit("sinusoid")) > 0.999


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e-20, 1e30])
@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_a_column_that_does_not_vary_is_hit(constant, count):
    # The mean of equal numbers need not be the number: 0.1 three times is off in the last bit.
    assert r_squared(range(count), np.full((count, 1), constant)).tolist() == [1.0]


def test_r_squared_does_not_depend_on_the_unit():
    steps = [0, 1, 2, 5]
    column = np.array([[1.0], [2.0], [2.0], [4.0]])
    expected = r_squared(steps, column)
    for unit in (1e-12, 1e12):
        np.testing.assert_allclose(r_squared(steps, column * unit), expected, rtol=1e-12)


# --- the weights of rows -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("curve", [*LINEAR, "sinusoid"])
def test_weights_give_the_rank_r_curve(rank, curve):
    rng = np.random.default_rng(0)
    steps, targets = [2, 3, 5, 8, 13, 20], [13, 21, 100]
    deltas = rng.standard_normal((6, 40))
    left, values, right = np.linalg.svd(deltas, full_matrices=False)
    forecast = Forecast(steps, targets, Fit(curve))
    weights = forecast.weights(left[:, :rank])
    assert weights.shape == (6, 3)
    # The definition: fit each coefficient on the steps, predict it, and expand in V.
    coefficients = left[:, :rank] * values[:rank]
    predicted = forecast.predict(coefficients) @ right[:rank]
    np.testing.assert_allclose(deltas.T @ weights, predicted.T, rtol=1e-5, atol=1e-9)
    if curve in LINEAR:
        expected = by_lstsq(curve, steps, coefficients, targets) @ right[:rank]
        np.testing.assert_allclose(deltas.T @ weights, expected.T, atol=1e-9)


def test_weights_do_not_depend_on_signs_and_rotations():
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    turned = vectors @ np.linalg.qr(rng.standard_normal((2, 2)))[0]
    forecast = Forecast(range(6), [9, 20], Fit())
    np.testing.assert_allclose(forecast.weights(vectors), forecast.weights(turned), atol=1e-13)


def test_weights_of_full_rank_are_the_hat_vectors():
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
    found = Forecast([1, 2, 3, 4], [9], Fit()).weights(vectors)
    expected = hat_vectors(np.arange(1.0, 5.0), np.array([9.0]), Fit())
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("curve", ["linear", "sinusoid"])
def test_weights_of_what_never_changed_are_zero(curve):
    found = Forecast(range(6), [9], Fit(curve)).weights(np.zeros((6, 0)))
    assert found.tolist() == [[0.0]] * 6
