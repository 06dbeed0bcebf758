"""Cells, sums and one forecast of the findings, measured by a stand-in for the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import findings, rewards
from benchmarks.__main__ import cli
from benchmarks.findings import VARIANTS, cells_of, measure_cell, summarize
from benchmarks.report import Report
from benchmarks.rewards import Rewards
from benchmarks.rlvr.runs import load_run


def test_cells_are_of_stored_steps() -> None:
    assert cells_of(range(1, 121))[:4] == [(30, 45), (30, 60), (30, 90), (30, 120)]
    for last, target in cells_of(range(4, 164, 4)):
        assert last % 4 == target % 4 == 0
        assert last < target <= 160


def row(run: str, gains: dict[str, float], *, error: float = 0.01) -> dict[str, Any]:
    errors = dict.fromkeys(gains, error)
    return {"run": run, "observed": 0.5, "true": 0.6, "gains": gains, "errors": errors}


def test_summaries_are_means_and_counts_of_losses() -> None:
    names = [variant.name for variant in VARIANTS]
    rows = [
        row("a", dict.fromkeys(names, 0.04)),
        row("a", {**dict.fromkeys(names, 0.0), names[0]: -0.03}),
        row("a", {names[0]: -0.9}),  # a history too short for one of them does not count
        row("b", {**dict.fromkeys(names, 0.02), names[0]: -0.0199}),
    ]
    first, second, mean = summarize(rows)
    assert (first["run"], first["forecasts"], second["forecasts"]) == ("a", 2, 1)
    assert first[names[0]] == pytest.approx(0.005)
    assert first[f"{names[0]}, losses"] == 1
    assert second[f"{names[0]}, losses"] == 0
    assert mean[names[1]] == pytest.approx((0.02 + 0.02) / 2)
    assert mean[f"{names[0]}, losses"] == 1
    assert mean["true gain"] == pytest.approx(0.1)


def fake_accuracy(directory: Path | str, task: str, problems: int) -> np.ndarray:
    """Solve as many problems as the model's name and length say; the same for the same bits."""
    data = (Path(directory) / "model.safetensors").read_bytes()
    return np.random.default_rng(list(data[-64:])).random(problems) < 0.5


def test_a_forecast_is_measured_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "accuracy", fake_accuracy)
    run = load_run("product")
    found = measure_cell(run, Rewards(run, tmp_path, 50), tmp_path, 40, 80)
    names = [variant.name for variant in VARIANTS]
    assert list(found["gains"]) == list(found["errors"]) == list(found["skills"]) == names
    out = tmp_path / "again"
    rs.export(run.store, out, step=40)
    observed = fake_accuracy(out, "", 50).astype(float)
    assert found["observed"] == observed.mean()
    rs.extrapolate(run.store, tmp_path / "plain", target_steps=[80], history_steps=40, svd="exact")
    plain = fake_accuracy(tmp_path / "plain", "", 50)
    assert found["gains"]["plain RELEX"] == pytest.approx((plain - observed).mean())
    (forecast,) = rs.backtest(
        run.store, history_steps=[40], target_steps=[80], damping=1.0, anchor="base"
    ).forecasts
    assert found["skills"]["plain RELEX"] == pytest.approx(forecast.skills[0].skill)
    assert found["dampings"]["latest, auto"] == pytest.approx(0.27, abs=0.01)


def test_the_report_has_every_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "accuracy", fake_accuracy)
    monkeypatch.setattr(findings, "HISTORY_SHARES", (0.5,))
    monkeypatch.setattr(findings, "HORIZONS", (1.5,))
    file = tmp_path / "findings.json"
    arguments = ["findings", "--run", "product", "--run", "sorting", "--problems", "20"]
    result = CliRunner().invoke(
        cli, [*arguments, "--work", str(tmp_path), "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = Report.read(file)
    assert [each["run"] for each in report.rows] == ["product", "sorting", "mean of runs"]
    assert [(each["from"], each["to"]) for each in report.settings["forecasts"]] == [
        (80, 120),
        (60, 90),
    ]
