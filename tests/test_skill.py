"""Skill from Gram matrices against errors computed the long way, from the deltas themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream.errors import FitError
from relex_stream.fit import Fit, Forecast
from relex_stream.skill import (
    Backtest,
    Cell,
    Setting,
    best_damping,
    chosen_damping,
    mean_moments,
    nested_cells,
    skill,
)
from tests.test_analysis import STEPS, sketched, trajectory

CELLS = (Cell(4, 5), Cell(7, 9), Cell(4, 9), Cell(5, 5), Cell(9, 9))
SETTINGS = tuple(
    Setting(rank, fit, anchor)
    for rank in (1, 3)
    for fit in (Fit(), Fit("polynomial:2"), Fit(window=3), Fit("linear", 3, 4))
    for anchor in ("base", "latest")
)


def forecast(deltas: np.ndarray, cell: Cell, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Return what is forecast and what came, as deltas from where the anchor is."""
    seen = deltas[: cell.rows]
    right = np.linalg.svd(seen, full_matrices=False)[2][: setting.rank]
    steps = STEPS[: cell.rows]
    places = [STEPS[cell.target], steps[-1]]
    there, here = Forecast(steps, places, setting.fit).predict(seen @ right.T) @ right
    if setting.anchor == "base":
        return there, deltas[cell.target]
    return there - here, deltas[cell.target] - seen[-1]


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_skill_is_that_of_the_weights(number: int) -> None:
    deltas, cell = trajectory(noise=1.0), CELLS[number]
    moments = Backtest(STEPS, CELLS, SETTINGS).moments(deltas @ deltas.T)
    assert moments.shape == (1, len(CELLS), len(SETTINGS), 4)
    stay = ((deltas[cell.target] - deltas[cell.rows - 1]) ** 2).sum()
    for column, setting in enumerate(SETTINGS):
        predicted, came = forecast(deltas, cell, setting)
        for damping in (0.0, 0.3, 1.0):
            missed = ((damping * predicted - came) ** 2).sum()
            found = skill(moments[0, number, column], damping)
            assert found == pytest.approx(1 - missed / stay, rel=1e-8, abs=1e-9)
        best = best_damping(moments[0, number, column])
        assert best == pytest.approx((predicted @ came) / (predicted @ predicted), rel=1e-8)
        for other in (best - 0.01, best + 0.01):
            assert skill(moments[0, number, column], other) < skill(
                moments[0, number, column], best
            )


def test_moments_of_tensors_add_up_to_those_of_the_model() -> None:
    deltas = trajectory(elements=300)
    parts = np.split(deltas, [100, 180], axis=1)
    settings_ = [Setting(1, Fit(), "latest")]
    backtest = Backtest(STEPS, CELLS, settings_)
    total = sum(backtest.moments(part @ part.T) for part in parts)
    for number, cell in enumerate(CELLS):
        pieces = [forecast(part, cell, settings_[0]) for part in parts]
        predicted, came = (np.concatenate(each) for each in zip(*pieces, strict=True))
        stay = ((deltas[cell.target] - deltas[cell.rows - 1]) ** 2).sum()
        expected = 1 - ((predicted - came) ** 2).sum() / stay
        assert skill(total[0, number, 0], 1.0) == pytest.approx(expected)


def test_staying_has_no_skill_and_a_model_that_stays_no_figure() -> None:
    deltas = trajectory()
    moments = Backtest(STEPS, CELLS[:1], [Setting(1, Fit(), "latest")]).moments(deltas @ deltas.T)
    assert skill(moments, 0.0).item() == pytest.approx(0)
    stopped = deltas.copy()
    stopped[4:] = stopped[3]
    moments = Backtest(STEPS, CELLS[:1], [Setting(1, Fit(), "latest")]).moments(stopped @ stopped.T)
    assert np.isnan(skill(moments, 1.0)).all()
    assert np.isnan(best_damping(np.zeros((1, 4)))).all()


def test_replicates_are_near_what_each_gives_alone() -> None:
    deltas = trajectory(elements=2000)
    grams = [s @ s.T for s in (sketched(deltas, seed) for seed in range(4))]
    backtest = Backtest(STEPS, CELLS, [Setting(1, Fit(), "latest")])
    together = backtest.moments(grams[0], np.stack(grams[1:]))
    for number, gram in enumerate(grams):
        alone = backtest.moments(gram)[0]
        np.testing.assert_allclose(together[number], alone, rtol=0.02, atol=0.02 * alone.max())


def test_a_straight_run_is_forecast_without_a_miss() -> None:
    deltas = np.outer(STEPS, np.arange(1.0, 9.0))
    moments = Backtest(STEPS, CELLS, [Setting(1, Fit(), "base"), Setting(1, Fit(), "latest")])
    found = moments.moments(deltas @ deltas.T)[0]
    np.testing.assert_allclose(skill(found, 1.0), 1, rtol=1e-9)
    np.testing.assert_allclose(best_damping(found), 1, rtol=1e-9)


def test_a_history_too_short_for_a_fit_is_refused() -> None:
    with pytest.raises(FitError, match="needs at least 3 checkpoints"):
        Backtest(STEPS, [Cell(2, 4)], [Setting(1, Fit("polynomial:2"), "base")])


# --- nested windows ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 9), min_size=5, max_size=40),
    least=st.integers(3, 6),
    data=st.data(),
)
def test_nested_forecasts_are_of_the_last_step_and_go_as_far_in_proportion(
    gaps: list[int], least: int, data: st.DataObject
) -> None:
    steps = np.cumsum(gaps).tolist()
    rows = data.draw(st.integers(2, len(steps) - 1))
    history, last = steps[:rows], steps[rows - 1]
    target = data.draw(st.integers(last + 1, 9 * last))
    found = nested_cells(history, target, least)
    assert bool(found) == (rows > least)
    assert found == sorted(found)
    assert all(cell.target == rows - 1 and least <= cell.rows < rows for cell in found)
    # The one that stands for the target: the last checkpoint that is as far before the end.
    inside = sum(step <= last * last / target for step in history)
    if found and least <= inside < rows:
        assert found[0].rows <= inside
        assert Cell(inside, rows - 1) in found
    # Others are no further, but up to twice as far.
    limit = max(2.0, target / last)
    least_further = [step for step in history if step * limit <= last]
    if len(least_further) >= least:
        assert found[0].rows == len(least_further)


def moments_of(*skills: tuple[float, float], onward: float = 1.0) -> np.ndarray:
    """Return moments of forecasts with a best damping and the skill that it has."""
    rows = [
        (value / damping**2 * onward, value / damping * onward, onward, onward)
        for damping, value in skills
    ]
    return np.array(rows)


def test_mean_moments_have_the_mean_skill_at_any_damping() -> None:
    rng = np.random.default_rng(0)
    moments = rng.random((5, 3, 4)) + 0.1
    moments[1, 2, 3] = 0.0  # there the model did not go on
    found = mean_moments(moments)
    for damping in (0.0, 0.4, 1.0):
        expected = np.nanmean(skill(moments, damping), axis=0)
        np.testing.assert_allclose(skill(found, damping), expected)
    assert chosen_damping(mean_moments(np.zeros((2, 4)))) == 0.0


def test_the_chosen_damping_is_the_best_or_more_as_undamped_forecasts_did_well() -> None:
    # S(1) of a best damping l with skill s is s (2 / l - 1 / l^2).
    doubted = moments_of((0.3, 0.06))[0]
    assert skill(doubted, 1.0) < -0.2
    assert chosen_damping(doubted) == pytest.approx(0.3)
    half = moments_of((0.3, 0.075 / (1 / 0.09 - 2 / 0.3)))[0]
    assert skill(half, 1.0) == pytest.approx(-0.075)
    assert chosen_damping(half) == pytest.approx((0.3 + 1) / 2)
    good = moments_of((0.6, 0.2))[0]
    assert skill(good, 1.0) > 0
    assert chosen_damping(good) == 1.0
    assert chosen_damping(moments_of((1.7, 0.2))[0]) == 1.0
    assert chosen_damping(moments_of((-0.4, 0.2))[0]) == 0.0
