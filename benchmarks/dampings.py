"""The ``dampings`` command: rules by which a history might choose its damping, by reward.

``--damping auto`` is one of them (`relex_stream.skill.chosen_damping`); this is how it was chosen.
Rules were thought out on the runs of `DEVELOPMENT`, whose rewards were known. `DECIDING` runs were
named, with all their settings, before any of them was trained, and the decision was fixed before
any extrapolation of theirs was made: the rule with the highest mean gain over those runs, among
those with at most one loss more than ``mean``. That was ``trust 0.15``.

Anchor ``latest``, rank 1 and a line in all of them; forecasts as in ``findings``.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import relex_stream as rs
from benchmarks.commands import work_directory
from benchmarks.findings import cells_of
from benchmarks.report import Report, publish
from benchmarks.rewards import Rewards, nested_cell, reward_options, standard_error
from benchmarks.rlvr.runs import RUNS, Run, load_run
from relex_stream.fit import Fit, Forecast
from relex_stream.sketch import subspace_of_deltas
from relex_stream.skill import (
    Backtest,
    Setting,
    best_damping,
    mean_moments,
    nested_cells,
    skill,
)

Float64 = NDArray[np.float64]

DEVELOPMENT = (
    "addition",
    "addition-seed1",
    "addition-fast",
    "addition-wide",
    "sorting",
    "product",
    "brackets",
)
DECIDING = tuple(name for name in RUNS if name not in DEVELOPMENT)

SETTING = Setting(1, Fit(), "latest")


@dataclass(frozen=True)
class Nested:
    """What a history makes of its own end, as moments: see `relex_stream.skill.Backtest`.

    Attributes
    ----------
    one : ndarray of float64, shape (4,), optional
        As far ahead, in proportion, as the target; None if too few checkpoints are before that.
    mean : ndarray of float64, shape (4,)
        Over several windows, as `nested_cells` has them.
    """

    one: Float64 | None
    mean: Float64


def best(moments: Float64) -> float:
    """Return the damping of most skill, from 0 to 1."""
    found = float(best_damping(moments))
    return min(1.0, max(0.0, found)) if np.isfinite(found) else 0.0


def trusting(moments: Float64, doubted: float) -> float:
    """Return the best damping, moved to 1 as undamped skill is above `doubted`."""
    trust = min(1.0, max(0.0, 1.0 - float(skill(moments, 1.0)) / doubted))
    return best(moments) + (1.0 - best(moments)) * trust


Rule = Callable[[Nested], float]

RULES: Mapping[str, Rule] = {
    "one": lambda nested: best(nested.mean if nested.one is None else nested.one),
    "mean": lambda nested: best(nested.mean),
    "trust 0.15": lambda nested: trusting(nested.mean, -0.15),
    "trust 0.2": lambda nested: trusting(nested.mean, -0.2),
    "x 0.5": lambda _: 0.5,
    "x 1": lambda _: 1.0,
}
"""By name, what a rule makes of the nested forecasts of a model."""

TENSOR_RULES: Mapping[str, Rule] = {
    "mean, by tensor": RULES["mean"],
    "trust 0.2, by tensor": RULES["trust 0.2"],
}
"""The same of each tensor by itself."""

NAMES = (*RULES, *TENSOR_RULES)


class Trajectory:
    """A run's deltas and their Gram matrices, tensor by tensor, in memory."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.store = rs.open_store(run.store)
        self.steps = self.store.steps
        self._deltas: dict[str, NDArray[np.float32]] = {}
        for name, tensor in self.store.tensors.items():
            if tensor.kind == "tracked":
                rows = [self.store.delta(name, step).reshape(-1) for step in self.steps]
                self._deltas[name] = np.stack(rows)
        self._grams = {
            name: deltas.astype(np.float64) @ deltas.T.astype(np.float64)
            for name, deltas in self._deltas.items()
        }

    def nested(self, last: int, target: int) -> tuple[Nested, dict[str, Nested]]:
        """Return the nested forecasts of a target: of the model, and of each tensor."""
        rows = self.steps.index(last) + 1
        history = self.steps[:rows]
        cells = nested_cells(history, target)
        one = nested_cell(history, target)
        backtest = Backtest(history, cells, [SETTING])
        by_tensor = {
            name: backtest.moments(gram[:rows, :rows])[0, :, 0]
            for name, gram in self._grams.items()
        }
        place = None if one is None else cells.index(one)

        def of(moments: Float64) -> Nested:
            return Nested(None if place is None else moments[place], mean_moments(moments))

        total = np.sum(list(by_tensor.values()), axis=0)
        return of(total), {name: of(moments) for name, moments in by_tensor.items()}

    def write(self, model: Path, last: int, target: int, dampings: Mapping[str, float]) -> None:
        """Write the last observed checkpoint plus each tensor's damped change."""
        rows = self.steps.index(last) + 1
        rs.export(self.run.store, model, step=last)
        weights = load_file(model / "model.safetensors")
        forecast = Forecast(self.steps[:rows], [target, last], SETTING.fit)
        for name, damping in dampings.items():
            left = subspace_of_deltas(self._grams[name][:rows, :rows], 1).vectors
            there, here = forecast.weights(left).T
            change = (damping * (there - here)) @ self._deltas[name][:rows]
            new = weights[name].to(torch.float64) + torch.from_numpy(change).view_as(weights[name])
            weights[name] = new.to(weights[name].dtype)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def measure_cell(
    trajectory: Trajectory, rewards: Rewards, place: Path, last: int, target: int
) -> dict[str, Any]:
    """Return the row of one forecast: dampings, gains over the last observed step, their errors."""
    observed, true = rewards.at(last), rewards.at(target)
    model, tensors = trajectory.nested(last, target)
    chosen = {name: rule(model) for name, rule in RULES.items()}
    gains: dict[str, Any] = {}
    measured: dict[float, Any] = {}
    for name, damping in chosen.items():
        if damping not in measured:
            measured[damping] = _gain(trajectory, rewards, place, last, target, damping) - observed
        gains[name] = measured[damping]
    for name, rule in TENSOR_RULES.items():
        out = place / "model"
        trajectory.write(out, last, target, {each: rule(of) for each, of in tensors.items()})
        gains[name] = rewards.of(out) - observed
        shutil.rmtree(out)
    return {
        "run": trajectory.run.name,
        "from": last,
        "to": target,
        "true": float((true - observed).mean()),
        "undamped skill": float(skill(model.mean, 1.0)),
        "dampings": chosen,
        "gains": {name: float(gain.mean()) for name, gain in gains.items()},
        "errors": {name: standard_error(gain) for name, gain in gains.items()},
    }


def _gain(
    trajectory: Trajectory, rewards: Rewards, place: Path, last: int, target: int, damping: float
) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rs.ForecastWarning)
        (output,) = rs.extrapolate(
            trajectory.run.store,
            place / "model",
            target_steps=[target],
            history_steps=last,
            svd="exact",
            anchor="latest",
            damping=damping,
        ).outputs
    solved = rewards.of(output.path)
    shutil.rmtree(output.path)
    return solved


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run and one for all: mean gains, and losses of two errors or more."""
    found = []
    for name in dict.fromkeys(row["run"] for row in rows):
        here = [row for row in rows if row["run"] == name]
        found.append(
            {"run": name, "forecasts": len(here), "true": _mean(row["true"] for row in here)}
            | {rule: _mean(row["gains"][rule] for row in here) for rule in NAMES}
            | {f"{rule}, losses": _losses(here, rule) for rule in NAMES}
        )
    total: dict[str, Any] = {"run": "mean of runs", "forecasts": len(rows)}
    for key in ("true", *NAMES):
        total[key] = _mean(each[key] for each in found)
    for rule in NAMES:
        total[f"{rule}, losses"] = _losses(rows, rule)
    return [*found, total]


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _losses(rows: Sequence[Mapping[str, Any]], rule: str) -> int:
    return sum(row["gains"][rule] < -2 * row["errors"][rule] for row in rows)


@click.command("dampings")
@reward_options(DECIDING, "those that decided")
def command(
    names: tuple[str, ...],
    problems: int,
    work: Path | None,
    json_path: Path | None,
    *,
    markdown: bool,
) -> None:
    """Measure rules for the damping by reward, on small runs."""
    report = Report(
        "Gain over the last observed step, in accuracy, by rule for the damping",
        "dampings",
        {"runs": list(names), "problems": problems},
    )
    rows: list[dict[str, Any]] = []
    with work_directory(work) as place:
        for name in names:
            trajectory = Trajectory(load_run(name))
            rewards = Rewards(trajectory.run, place, problems)
            for last, target in cells_of(trajectory.steps):
                rows.append(measure_cell(trajectory, rewards, place, last, target))
                click.echo(f"{name}: {last} to {target} measured", err=True)
    for row in summarize(rows):
        report.add(row)
    report.settings["forecasts"] = rows
    report.note("Losses: forecasts worse than the last observed step by two standard errors.")
    publish(report, json_path=json_path, markdown=markdown)
