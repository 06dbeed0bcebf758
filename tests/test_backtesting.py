"""Backtests of stores against forecasts made, and missed, the long way: from the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relex_stream as rs
from relex_stream.grouping import group_name
from relex_stream.skill import chosen_damping
from relex_stream.summaries import ForecastSkill
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory, raw, round_to, write_model
from tests.make_stores import build_store
from tests.test_analyzing import KEPT, SHAPES

STEPS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 30, 40)
CURVES: Mapping[str, oracle.Curve] = {
    "linear": oracle.line,
    "linear-origin": oracle.line_from_base,
    "polynomial:2": oracle.polynomial(2),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("backtesting")
    return make_trajectory(root, steps=STEPS, tensors=SHAPES, change_share=0.05)


@pytest.fixture(scope="module")
def store(run: Trajectory) -> Path:
    path = run.base.parent / "store"
    build_store(run.base, run.checkpoints, path, sketch_min_elements=KEPT)
    return path


_HISTORIES: dict[tuple[Path, str, int], oracle.History] = {}


def history(run: Trajectory, name: str, last: int) -> oracle.History:
    key = run.base, name, last
    if key not in _HISTORIES:
        _HISTORIES[key] = _history(run, name, last)
    return _HISTORIES[key]


def _history(run: Trajectory, name: str, last: int) -> oracle.History:
    steps = [step for step in STEPS if step <= last]
    checkpoints = [run.bits[step][name] for step in steps]
    return oracle.History(run.bits[0][name], "BF16", checkpoints, "BF16", steps)


def long_way(
    run: Trajectory, row: ForecastSkill, last: int, target: int, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a tensor's forecast before damping, what came, and how far it went on."""
    seen, known = history(run, name, last), history(run, name, STEPS[-1]).deltas
    curve = CURVES[row.fit]
    if row.window is not None:
        curve = oracle.windowed(curve, row.window)
    there = seen.predict(target, row.rank, curve=curve).delta
    here = seen.predict(last, row.rank, curve=curve).delta
    came = known[STEPS.index(target)]
    onward = came - known[STEPS.index(last)]
    return (there, came, onward) if row.anchor == "base" else (there - here, onward, onward)


def model(run: Trajectory, row: ForecastSkill, last: int, target: int) -> list[np.ndarray]:
    parts = [long_way(run, row, last, target, name) for name in SHAPES]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": [1, 3], "fit": ["linear", "polynomial:2"]},
        {"window": [4, 5], "anchor": "latest", "fit": "linear-origin", "damping": 0.25},
        {"history_steps": [8, 16], "target_steps": [16, 40]},
    ],
)
def test_skill_is_that_of_errors_computed_from_the_weights(
    run: Trajectory, store: Path, options: dict[str, Any]
) -> None:
    summary = rs.backtest(store, exact=True, **options)
    assert summary.exact
    for row in summary.forecasts:
        last, target = row.history_step, row.target_step
        forecast, came, onward = model(run, row, last, target)
        stay = float(onward @ onward)
        assert row.moved == pytest.approx(math.sqrt(stay), rel=1e-6)
        assert row.horizon == target / last
        best = float(forecast @ came) / float(forecast @ forecast)
        assert row.best.damping == pytest.approx(best, rel=1e-5)
        for each in (*row.skills, row.best):
            missed = each.damping * forecast - came
            assert each.skill == pytest.approx(1 - float(missed @ missed) / stay, abs=1e-5)
            assert each.missed == pytest.approx(np.linalg.norm(missed), rel=1e-4)
            assert each.error is None
        before = nested_steps(last, target, 5 if row.window else 3)
        if row.anchor == "base" or not before:
            assert row.auto is None
            continue
        moments = []
        for step in before:
            forecast, came, _ = model(run, row, step, last)
            stay = float(came @ came)
            moments.append((forecast @ forecast / stay, forecast @ came / stay, 1.0, 1.0))
        assert row.auto is not None
        own = chosen_damping(np.mean(moments, axis=0))
        assert row.auto.damping == pytest.approx(own, rel=1e-5, abs=1e-6)


def nested_steps(last: int, target: int, least: int) -> list[int]:
    """Return where the histories end whose forecasts of the last step stand for a target."""
    horizon = target / last
    horizons = {h for h in (1.25, 1.5, 2, 3, 4, 6, 8) if h <= max(2, horizon)} | {horizon}
    counts = {sum(step <= last / h for step in STEPS) for h in horizons}
    known = STEPS.index(last) + 1
    counts = {rows for rows in counts if rows >= least} or ({least} if known > least else set())
    return [STEPS[rows - 1] for rows in counts]


def test_the_default_grid_is_by_shares_and_horizons(store: Path) -> None:
    found = {(row.history_step, row.target_step) for row in rs.backtest(store).forecasts}
    # A quarter, a third (13.3), a half and two thirds of step 40; nearest stored multiples.
    assert {last for last, _ in found} == {8, 11, 16, 22}
    assert {target for last, target in found if last == 8} == {11, 16, 22, 30, 40}
    assert {target for last, target in found if last == 22} == {30, 40}


def test_asking_for_steps_gives_those(store: Path) -> None:
    summary = rs.backtest(store, history_steps=[8, 30], target_steps=[16, 40], anchor="latest")
    found = [(row.history_step, row.target_step) for row in summary.forecasts]
    assert found == [(8, 16), (8, 40), (30, 40)]


def test_estimates_are_within_their_errors(store: Path) -> None:
    exact, estimated = rs.backtest(store, exact=True), rs.backtest(store)
    assert not estimated.exact
    for one, other in zip(exact.forecasts, estimated.forecasts, strict=True):
        for true, found in zip(one.skills, other.skills, strict=True):
            assert found.error is not None
            assert abs(found.skill - true.skill) <= 6 * found.error + 1e-6
            assert found.error < 0.2 * max(1.0, abs(true.skill))


def test_tensors_have_their_own_skill(run: Trajectory, store: Path) -> None:
    summary = rs.backtest(store, exact=True, anchor="latest", damping=[0.5, 1.0])
    assert summary.recommendation is not None
    row = summary.forecasts[0]
    advice = summary.recommendation
    for tensor in summary.groups:
        missed = stay = 0.0
        for each in summary.forecasts:
            damping = advice.damping
            if damping == "auto":
                damping = 0.0 if each.auto is None else each.auto.damping
            parts = long_way(run, row, each.history_step, each.target_step, tensor.name)
            missed += float(((float(damping) * parts[0] - parts[1]) ** 2).sum())
            stay += float((parts[2] ** 2).sum())
        assert tensor.skill == pytest.approx(1 - missed / stay, abs=1e-5)
        assert tensor.moved == pytest.approx(math.sqrt(stay), rel=1e-5)
    assert {tensor.name for tensor in summary.groups} == {
        name for name in SHAPES if "norm" not in name
    }


@pytest.mark.parametrize("group_by", ["layer", "module", "model"])
def test_groups_have_subspaces_of_their_own(run: Trajectory, store: Path, group_by: str) -> None:
    groups: dict[str, list[str]] = {}
    for name in SHAPES:
        groups.setdefault(group_name(name, group_by), []).append(name)
    summary = rs.backtest(
        store, history_steps=[16], target_steps=[30], group_by=group_by, damping=1.0, exact=True
    )
    assert summary.group_by == group_by
    for row in summary.forecasts:
        missed = stay = 0.0
        for names in groups.values():
            forecast, came, onward = beside(run, names, row.anchor)
            missed += float(((forecast - came) ** 2).sum())
            stay += float((onward**2).sum())
        assert row.skills[0].skill == pytest.approx(1 - missed / stay, abs=1e-5)
    changed = {name for name, members in groups.items() if any("norm" not in m for m in members)}
    assert {group.name for group in summary.groups} == changed
    estimated = rs.backtest(
        store, history_steps=[16], target_steps=[30], group_by=group_by, damping=1.0
    )
    for one, other in zip(summary.forecasts, estimated.forecasts, strict=True):
        found = other.skills[0]
        assert found.error is not None
        assert abs(found.skill - one.skills[0].skill) <= 6 * found.error + 1e-6


def beside(
    run: Trajectory, names: list[str], anchor: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a forecast of step 30 from 16, what came, and the way on, of tensors side by side."""

    def bits(step: int) -> np.ndarray:
        return np.concatenate([run.bits[step][name].reshape(-1) for name in names])

    steps = [step for step in STEPS if step <= 16]
    seen = oracle.History(bits(0), "BF16", [bits(step) for step in steps], "BF16", steps)
    known = oracle.History(
        bits(0), "BF16", [bits(step) for step in STEPS], "BF16", list(STEPS)
    ).deltas
    came = known[STEPS.index(30)]
    onward = came - known[STEPS.index(16)]
    there, here = seen.predict(30, 1).delta, seen.predict(16, 1).delta
    return (there, came, onward) if anchor == "base" else (there - here, onward, onward)


# --- what is recommended -------------------------------------------------------------------------


def write_run(root: Path, at: Mapping[int, np.ndarray]) -> Path:
    for step, values in at.items():
        directory = root / (f"run/step_{step}" if step else "base")
        write_model(directory, {"w": raw(round_to(values.astype(np.float32), "F32"), "F32")})
    rs.build_store(root / "base", root / "run", root / "store")
    return root / "store"


def test_a_straight_run_is_to_be_extrapolated_as_far_as_is_known(tmp_path: Path) -> None:
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    store = write_run(tmp_path, {step: drift * step for step in range(13)})
    advice = rs.backtest(store, damping=[0.5, 1.0]).recommendation
    assert advice is not None
    assert (advice.damping, advice.rank, advice.fit) == (1.0, 1, "linear")
    assert advice.mean_skill == pytest.approx(1)
    assert (advice.reach, advice.reach_is_known) == (4.0, False)


def test_a_run_that_turns_is_not_to_be_extrapolated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moves = rng.integers(-9, 9, (13, 20, 30)).astype(np.float64)
    store = write_run(tmp_path, {step: moves[: step + 1].sum(axis=0) for step in range(13)})
    summary = rs.backtest(store, damping=[1.0], anchor="base")
    if summary.recommendation is not None:
        assert summary.recommendation.damping == "auto"
    with pytest.warns(rs.RelexStreamWarning, match="same weights"):
        stopped = write_run(
            tmp_path / "stopped", {step: moves[0] + min(step, 6) * moves[1] for step in range(13)}
        )
    found = rs.backtest(stopped, damping=[1.0], anchor="base", target_steps=[12])
    skills = {row.history_step: row.skills[0].skill for row in found.forecasts}
    assert skills[3] < 0.1
    assert math.isnan(skills[8])


def test_reach_ends_before_the_first_horizon_without_skill(tmp_path: Path) -> None:
    # Straight up to step 8, and back, twice as quickly.
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    store = write_run(
        tmp_path, {step: drift * (min(step, 8) - 2 * max(0, step - 8)) for step in range(15)}
    )
    summary = rs.backtest(
        store,
        history_steps=[4],
        target_steps=[5, 6, 7, 8, 12],
        anchor="latest",
        damping=[1.0, 0.2],
    )
    skills = {row.horizon: [each.skill for each in row.skills] for row in summary.forecasts}
    assert skills[2.0] == pytest.approx([1, 1 - 0.8**2])
    assert max(skills[3.0]) < 0
    advice = summary.recommendation
    assert advice is not None
    assert advice.damping == 0.2
    assert advice.reach == 2.0
    assert advice.reach_is_known


# --- what cannot be tested -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_too_few_checkpoints_are_told_of(tmp_path: Path, steps: int) -> None:
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    store = write_run(tmp_path, {step: drift * step for step in range(steps + 1)})
    with pytest.raises(rs.FitError, match=f"the store has {steps} checkpoints"):
        rs.backtest(store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 11}, "there is no step to forecast: the store has 11 checkpoints"),
        ({"history_steps": [40]}, "there is no step to forecast"),
        ({"history_steps": [2]}, "a history up to step 2 has 2 checkpoints, the fits need 3"),
        ({"history_steps": [0]}, "no checkpoint is at step 0 or before"),
        ({"target_steps": [50]}, "--target-step 50 is not stored"),
        ({"fit": ["linear", "cubic"]}, "--fit must be one of"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"anchor": "last"}, "--anchor must be one of"),
        ({"group_by": "run"}, "--group-by must be one of tensor, layer, module, model, not 'run'"),
        ({"damping": math.inf}, "--damping must be a number"),
        ({"window": 1}, "--window must be at least 2"),
        ({"window": 9, "history_steps": [8]}, "has 6 checkpoints, the fits need 9"),
    ],
)
def test_what_cannot_be_tested(store: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(rs.RelexStreamError, match=message):
        rs.backtest(store, **options)
