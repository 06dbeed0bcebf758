"""The ``findings`` command: what extrapolations of the small runs are worth, by reward.

For each run of `benchmarks.rlvr`: histories that end near a quarter, a third and a half of it, and
targets at 1.5, 2, 3 and 4 times their last step. Each model is measured on the same held-out
problems as the last observed checkpoint and the true one of the target step, greedily. Beside the
reward stands the skill that `relex_stream.backtest` tells of the forecast.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import relex_stream as rs
from benchmarks.commands import work_directory
from benchmarks.report import Report, publish
from benchmarks.rewards import Rewards, lines_by_skill, reward_options, standard_error
from benchmarks.rlvr.runs import RUNS, Run, load_run

HISTORY_SHARES = (0.25, 1 / 3, 0.5)
HORIZONS = (1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Variant:
    """How is extrapolated: rank 1 and a line, all of them."""

    name: str
    anchor: str
    damping: float | str


VARIANTS = (
    Variant("plain RELEX", "base", 1.0),
    Variant("latest x 1", "latest", 1.0),
    Variant("latest x 0.5", "latest", 0.5),
    Variant("latest, auto", "latest", "auto"),
)


def cells_of(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return last observed steps and targets: of those that are stored, the nearest.

    Examples
    --------
    >>> cells_of(range(10, 130, 10))[:3]
    [(30, 40), (30, 60), (30, 90)]
    """
    stored = np.asarray(steps)
    found: dict[tuple[int, int], None] = {}
    for share in HISTORY_SHARES:
        last = int(stored[stored <= share * steps[-1] + 1e-9][-1])
        for horizon in HORIZONS:
            wanted = horizon * last
            if wanted <= steps[-1] + 1e-9:
                target = int(stored[np.argmin(np.abs(stored - wanted))])
                found[last, target] = None
    return list(found)


def measure_cell(run: Run, rewards: Rewards, place: Path, last: int, target: int) -> dict[str, Any]:
    """Return the row of one forecast: accuracies, gains over the last observed step, skills."""
    observed, true = rewards.at(last), rewards.at(target)
    row: dict[str, Any] = {
        "run": run.name,
        "from": last,
        "to": target,
        "observed": float(observed.mean()),
        "true": float(true.mean()),
        "gains": {},
        "errors": {},
        "dampings": {},
        "skills": {},
    }
    skills = rs.backtest(
        run.store, history_steps=[last], target_steps=[target], damping=[0.5, 1.0], exact=True
    ).forecasts
    by_anchor = {each.anchor: each for each in skills}
    for variant in VARIANTS:
        out = place / "model"
        with warnings.catch_warnings():
            # Which settings failed before is told by the skills.
            warnings.simplefilter("ignore", rs.ForecastWarning)
            try:
                (output,) = rs.extrapolate(
                    run.store,
                    out,
                    target_steps=[target],
                    history_steps=last,
                    svd="exact",
                    anchor=variant.anchor,
                    damping=variant.damping,
                    overwrite=True,
                ).outputs
            except rs.FitError:
                continue  # too short a history to choose
        gain = rewards.of(output.path) - observed
        row["gains"][variant.name] = float(gain.mean())
        row["errors"][variant.name] = standard_error(gain)
        forecast = by_anchor[variant.anchor]
        if variant.damping == "auto":
            row["dampings"][variant.name] = output.what["damping_chosen"]
            found = forecast.auto
        else:
            found = next(each for each in forecast.skills if each.damping == variant.damping)
        row["skills"][variant.name] = None if found is None else found.skill
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run, and for all runs: mean gains, and losses of two errors or more."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    found = [_summary(name, [row for row in rows if row["run"] == name]) for name in names]
    if len(found) > 1:
        total: dict[str, Any] = {"run": "mean of runs", "forecasts": len(rows)}
        for key in found[0]:
            if key in total:
                continue
            values = [each[key] for each in found]
            losses = key.endswith("losses")
            total[key] = sum(values) if losses else float(np.mean(values))
        found.append(total)
    return found


def _summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # Compared over what every variant could do.
    common = [row for row in rows if len(row["gains"]) == len(VARIANTS)]
    summary: dict[str, Any] = {"run": name, "forecasts": len(common)}
    true = [row["true"] - row["observed"] for row in common]
    summary["true gain"] = float(np.mean(true)) if common else 0.0
    for variant in VARIANTS:
        gains = [row["gains"][variant.name] for row in common]
        summary[variant.name] = float(np.mean(gains)) if common else 0.0
        summary[f"{variant.name}, losses"] = sum(
            row["gains"][variant.name] < -2 * row["errors"][variant.name] for row in common
        )
    return summary


def by_skill(rows: Sequence[dict[str, Any]], variant: str) -> list[str]:
    """Return a line for each range of skill: how many forecasts gained or lost two errors or more.

    Examples
    --------
    >>> row = {"skills": {"x": -0.4}, "gains": {"x": -0.05}, "errors": {"x": 0.01}}
    >>> by_skill([row, row], "x")
    ['x, skill -0.5 to -0.3: 2 forecasts, 0 gains, 2 losses, mean -0.050']
    """
    return lines_by_skill(
        variant,
        *([row[key].get(variant) for row in rows] for key in ("skills", "gains", "errors")),
    )


@click.command("findings")
@reward_options(tuple(RUNS), "all")
def command(
    names: tuple[str, ...],
    problems: int,
    work: Path | None,
    json_path: Path | None,
    *,
    markdown: bool,
) -> None:
    """Measure extrapolations of the small runs by reward, beside what backtest says of them."""
    report = Report(
        "Gain over the last observed step, in accuracy",
        "findings",
        {"runs": list(names), "problems": problems},
    )
    rows: list[dict[str, Any]] = []
    with work_directory(work) as place:
        for name in names:
            run = load_run(name)
            rewards = Rewards(run, place, problems)
            for last, target in cells_of(rs.open_store(run.store).steps):
                rows.append(measure_cell(run, rewards, place, last, target))
                click.echo(f"{name}: {last} to {target} measured", err=True)
    for row in summarize(rows):
        report.add(row)
    report.settings["forecasts"] = rows
    for line in by_skill(rows, VARIANTS[0].name):
        report.note(line)
    report.note("Losses: forecasts worse than the last observed step by two standard errors.")
    publish(report, json_path=json_path, markdown=markdown)
