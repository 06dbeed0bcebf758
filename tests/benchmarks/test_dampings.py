"""Rules for the damping: what they make of nested forecasts, and how their models are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

import relex_stream as rs
from benchmarks import dampings, rewards
from benchmarks.__main__ import cli
from benchmarks.dampings import (
    DECIDING,
    DEVELOPMENT,
    NAMES,
    RULES,
    Nested,
    Trajectory,
    measure_cell,
    summarize,
)
from benchmarks.report import Report
from benchmarks.rewards import Rewards
from benchmarks.rlvr.runs import RUNS, load_run
from relex_stream.skill import chosen_damping, skill
from tests.benchmarks.test_findings import fake_accuracy


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return Trajectory(load_run("addition-small"))


def test_the_runs_that_decide_are_not_those_that_were_known() -> None:
    assert set(DEVELOPMENT) | set(DECIDING) == set(RUNS)
    assert len(DECIDING) == 6


def test_the_rule_that_won_is_the_packages() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        square, product, came = rng.random(3) * (2, 1, 1) + (0.1, -0.2, 0.2)
        moments = np.array([square, product, came, came]) / came
        nested = Nested(None, moments)
        assert RULES["trust 0.15"](nested) == pytest.approx(chosen_damping(moments))
        assert RULES["mean"](nested) == RULES["one"](nested)
        assert RULES["mean"](nested) <= RULES["trust 0.15"](nested) <= RULES["trust 0.2"](nested)
        if skill(moments, 1.0) > 0:
            assert RULES["trust 0.2"](nested) == 1


def test_nested_forecasts_are_those_that_extrapolate_chooses_by(trajectory: Trajectory) -> None:
    nested, by_tensor = trajectory.nested(39, 78)
    assert nested.one is not None
    summary = rs.extrapolate(
        trajectory.run.store,
        "unused",
        target_steps=[78],
        history_steps=39,
        damping="auto",
        anchor="latest",
        dry_run=True,
    )
    chosen = summary.outputs[0].what["damping_chosen"]
    assert RULES["trust 0.15"](nested) == pytest.approx(chosen, rel=1e-5)
    assert len(by_tensor) > 20


def test_a_damping_for_each_tensor_is_the_packages_where_all_are_alike(
    trajectory: Trajectory, tmp_path: Path
) -> None:
    _, by_tensor = trajectory.nested(39, 78)
    trajectory.write(tmp_path / "own", 39, 78, dict.fromkeys(by_tensor, 0.3))
    rs.extrapolate(
        trajectory.run.store,
        tmp_path / "theirs",
        target_steps=[78],
        history_steps=39,
        svd="exact",
        damping=0.3,
        anchor="latest",
    )
    own = load_file(tmp_path / "own" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    differing = sum(int((own[name] != theirs[name]).sum()) for name in theirs)
    # Deltas are float32 here, and weights are rounded once: ties may tip.
    assert differing <= 5
    moved = tmp_path / "moved"
    trajectory.write(
        moved, 39, 78, {name: float(name.endswith("up_proj.weight")) for name in by_tensor}
    )
    found = load_file(moved / "model.safetensors")
    rs.export(trajectory.run.store, tmp_path / "last", step=39)
    last = load_file(tmp_path / "last" / "model.safetensors")
    changed = {name for name in last if (found[name] != last[name]).any()}
    assert changed
    assert all(name.endswith("up_proj.weight") for name in changed)


def test_a_forecast_is_measured_by_every_rule(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "accuracy", fake_accuracy)
    row = measure_cell(trajectory, Rewards(trajectory.run, tmp_path, 50), tmp_path, 39, 78)
    assert list(row["gains"]) == list(row["errors"]) == list(NAMES)
    assert row["dampings"]["x 0.5"] == 0.5
    rs.export(trajectory.run.store, tmp_path / "last", step=39)
    rs.extrapolate(
        trajectory.run.store,
        tmp_path / "half",
        target_steps=[78],
        history_steps=39,
        svd="exact",
        damping=0.5,
        anchor="latest",
    )
    gain = (
        fake_accuracy(tmp_path / "half", "", 50).mean()
        - fake_accuracy(tmp_path / "last", "", 50).mean()
    )
    assert row["gains"]["x 0.5"] == pytest.approx(gain)


def row_of(run: str, gains: dict[str, float]) -> dict[str, Any]:
    every = dict.fromkeys(NAMES, 0.01) | gains
    return {"run": run, "true": 0.05, "gains": every, "errors": dict.fromkeys(NAMES, 0.005)}


def test_summaries_are_means_over_runs_and_counts_of_losses() -> None:
    rows = [row_of("a", {"one": -0.02}), row_of("a", {}), row_of("b", {"one": 0.03})]
    first, second, total = summarize(rows)
    assert first["one"] == pytest.approx(-0.005)
    assert (first["one, losses"], second["one, losses"], total["one, losses"]) == (1, 0, 1)
    assert total["one"] == pytest.approx((-0.005 + 0.03) / 2)
    assert total["forecasts"] == 3


def test_the_report_has_every_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "accuracy", fake_accuracy)
    monkeypatch.setattr(dampings, "cells_of", lambda steps: [(39, 57)])
    path = tmp_path / "report.json"
    result = CliRunner().invoke(
        cli,
        ["dampings", "--run", "addition-small", "--problems", "20", "--json", str(path)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    report = Report.read(path)
    assert [row["run"] for row in report.settings["forecasts"]] == ["addition-small"]
    assert [row["run"] for row in report.rows] == ["addition-small", "mean of runs"]
