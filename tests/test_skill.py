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
    furthest_nested_cell,
    nested_cell,
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
    data=st.data(),
)
def test_a_nested_forecast_goes_as_far_in_proportion(gaps: list[int], data: st.DataObject) -> None:
    steps = np.cumsum(gaps).tolist()
    rows = data.draw(st.integers(2, len(steps) - 1))
    target = data.draw(st.integers(rows, len(steps) - 1))
    found = nested_cell(steps[:rows], steps[target])
    last = steps[rows - 1]
    limit = last * last / steps[target]
    inside = sum(step <= limit for step in steps[:rows])
    furthest = furthest_nested_cell(steps[:rows])
    assert furthest == (Cell(3, rows - 1) if rows > 3 else None)
    if found is None:
        assert inside < 3 or inside >= rows
        return
    assert found == Cell(inside, rows - 1)
    # As far, or further by less than the distance of two checkpoints.
    assert last / steps[found.rows - 1] >= steps[target] / last - 1e-9
