"""The ``ablations`` command: rank, fit, window, anchor and cut-off of extrapolations, by reward.

One setting at a time is changed from plain RELEX. Histories end at a sixth, a third and a half of a
run, targets lie at a half, two thirds, five sixths and the end of it. Each model is measured on the
same held-out problems as the last observed checkpoint and the true one of the target step,
greedily. Beside the reward stands the skill of the very forecast, and that of the nested one, which
is known beforehand. All of it by the exact SVD, so that nothing but the setting differs.

Reconstructions (the paper's first finding) are measured beside the true checkpoints of their steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

import relex_stream as rs
from benchmarks.coefficients import exact_grams, kept_of
from benchmarks.commands import work_directory
from benchmarks.report import Report, publish
from benchmarks.rewards import (
    SKILL_BOUNDS,
    Rewards,
    Solved,
    lines_by_skill,
    nested_cell,
    reward_options,
    standard_error,
)
from benchmarks.rlvr.runs import Run, load_run
from relex_stream.fit import Fit
from relex_stream.skill import LEAST_NESTED_STEPS, Backtest, Cell, Setting, skill

Float64 = NDArray[np.float64]

HISTORY_SHARES = (1 / 6, 1 / 3, 1 / 2)
"""Of the run: where histories end."""

TARGET_SHARES = (1 / 2, 2 / 3, 5 / 6, 1.0)
"""Of the run: what is forecast, where it lies ahead."""

RECONSTRUCTED_SHARES = (1 / 3, 2 / 3, 1.0)
RECONSTRUCTED_RANKS = (1, 2, 5)

LINE = Fit()


@dataclass(frozen=True)
class Ablation:
    """A setting; the damping is 1 in all of them."""

    name: str
    rank: int = 1
    fit: Fit = LINE
    anchor: str = "base"

    @property
    def setting(self) -> Setting:
        """As `relex_stream.backtest` takes it."""
        return Setting(self.rank, self.fit, self.anchor)

    def takes(self, checkpoints: int) -> bool:
        """Say whether a history is long enough."""
        return checkpoints >= max(self.fit.least_points, self.fit.window or 0)

    def repeats(self, checkpoints: int) -> bool:
        """Say whether its window is the whole of a history, as without one."""
        return self.fit.window == checkpoints


PLAIN = Ablation("plain RELEX")

ABLATIONS = (
    PLAIN,
    Ablation("anchor latest", anchor="latest"),
    Ablation("rank 2", rank=2),
    Ablation("rank 5", rank=5),
    Ablation("linear-origin", fit=Fit("linear-origin")),
    Ablation("polynomial:2", fit=Fit("polynomial:2")),
    Ablation("polynomial:3", fit=Fit("polynomial:3")),
    Ablation("sinusoid", fit=Fit("sinusoid")),
    Ablation("window 20", fit=Fit(window=20)),
    Ablation("window 10", fit=Fit(window=10)),
    Ablation("refit every 10", fit=Fit(refit_every=10)),
    Ablation("rank 5, polynomial:2", rank=5, fit=Fit("polynomial:2")),
)
"""The first is what the others are held against."""


def nearest(steps: Sequence[int], shares: Iterable[float]) -> list[int]:
    """Return the stored steps nearest to shares of the run.

    Examples
    --------
    >>> nearest(range(2, 122, 2), (1 / 6, 1 / 3, 1.0))
    [20, 40, 120]
    """
    stored = np.asarray(steps)
    found = (stored[np.argmin(np.abs(stored - share * stored[-1]))] for share in shares)
    return list(dict.fromkeys(int(step) for step in found))


def cells_of(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return last observed steps and targets.

    Examples
    --------
    >>> len(cells_of(range(1, 121))), cells_of(range(1, 121))[-3:]
    (11, [(60, 80), (60, 100), (60, 120)])
    """
    return [
        (last, target)
        for last in nearest(steps, HISTORY_SHARES)
        for target in nearest(steps, TARGET_SHARES)
        if target > last
    ]


@dataclass(frozen=True)
class Outcome:
    """What came of a forecast.

    Attributes
    ----------
    name : str
        Of its `Ablation`.
    last, target : int
        Last observed step, and the one that was forecast.
    observed : float
        Accuracy of the last observed step.
    gains, true_gains : ndarray, shape (problems,)
        Of the forecast and of the true checkpoint over the last observed one, by problem.
    skill : float
        Of this forecast.
    nested_skill : float or None
        Of the history's forecast of its own end, as far ahead; None where it is too short.
    explained, r2 : float
        Explained variance of the history in the components used, and R2 of the first one's fit.
    repeats : bool
        Whether it is the same model as without its window, and no forecast of its own.
    """

    name: str
    last: int
    target: int
    observed: float
    gains: Solved
    true_gains: Solved
    skill: float
    nested_skill: float | None
    explained: float
    r2: float
    repeats: bool = False

    @property
    def gain(self) -> float:
        return float(self.gains.mean())

    @property
    def error(self) -> float:
        return standard_error(self.gains)

    @property
    def won(self) -> bool:
        return self.gain > 2 * self.error

    @property
    def lost(self) -> bool:
        return self.gain < -2 * self.error

    def as_row(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "setting": self.name,
            "from": self.last,
            "to": self.target,
            "observed": self.observed,
            "true gain": float(self.true_gains.mean()),
            "gain": self.gain,
            "error": self.error,
            "skill": self.skill,
            "nested skill": self.nested_skill,
            "explained variance": self.explained,
            "r2": self.r2,
            "repeats": self.repeats,
        }


class Skills:
    """Skills of all forecasts of a run by all settings, from its exact Gram matrices.

    What `relex_stream.backtest` does, and refits too, which it does not offer.

    Parameters
    ----------
    steps : sequence of int
    grams : dict of str to ndarray
        By tensor.
    """

    def __init__(self, steps: Sequence[int], grams: dict[str, Float64]) -> None:
        self._steps = tuple(steps)
        self._grams = grams

    def of(self, ablation: Ablation, cells: Sequence[Cell]) -> list[float]:
        """Return the skill of each forecast over the whole model."""
        backtest = Backtest(self._steps, cells, [ablation.setting])
        total = sum(backtest.moments(gram)[0, :, 0] for gram in self._grams.values())
        return [float(one) for one in skill(np.asarray(total), 1.0)]

    def nested(self, ablation: Ablation, cells: Sequence[Cell]) -> list[float | None]:
        """Return that of the history's forecast of its own end, as far ahead in proportion."""
        least = max(LEAST_NESTED_STEPS, ablation.fit.least_points, ablation.fit.window or 0)
        inner = [
            nested_cell(self._steps[: cell.rows], self._steps[cell.target], least) for cell in cells
        ]
        known = list(dict.fromkeys(cell for cell in inner if cell is not None))
        found = dict(zip(known, self.of(ablation, known), strict=True)) if known else {}
        return [None if cell is None else found[cell] for cell in inner]


def models_of(
    run: Run, place: Path, last: int, targets: Sequence[int], ablations: Sequence[Ablation]
) -> Iterator[tuple[Ablation, int, Path]]:
    """Write the models of a history; yield each setting and target with its directory.

    Those with the same fit come out of one call.
    """
    by_fit = sorted(ablations, key=lambda one: repr(one.fit))
    for fit, grouped in groupby(by_fit, key=lambda one: one.fit):
        alike = list(grouped)
        with warnings.catch_warnings():
            # Which settings failed before, and which sinusoids do not oscillate, the table tells.
            warnings.simplefilter("ignore", rs.RelexStreamWarning)
            outputs = rs.extrapolate(
                run.store,
                place / "models",
                target_steps=targets,
                history_steps=last,
                rank=list(dict.fromkeys(one.rank for one in alike)),
                anchor=list(dict.fromkeys(one.anchor for one in alike)),
                svd="exact",
                fit=fit.curve,
                window=fit.window,
                refit_every=None if fit.refit_every is None else int(fit.refit_every),
                overwrite=True,
            ).outputs
        for one in alike:
            for output in outputs:
                if (output.what["rank"], output.what["anchor"]) == (one.rank, one.anchor):
                    yield one, output.target_step, Path(output.path)


def measure(
    run: Run,
    rewards: Rewards,
    place: Path,
    skills: Skills,
    last: int,
    targets: Sequence[int],
    ablations: Sequence[Ablation],
) -> list[Outcome]:
    """Return what came of the forecasts of a history, by setting and target."""
    steps = rs.open_store(run.store).steps
    rows = steps.index(last) + 1
    possible = [one for one in ablations if one.takes(rows)]
    observed = rewards.at(last)
    figures = {one: described(run, last, one) for one in possible}
    cells = [Cell(rows, steps.index(target)) for target in targets]
    here = {one: skills.of(one, cells) for one in possible}
    nested = {one: skills.nested(one, cells) for one in possible}
    found = []
    for one, target, directory in models_of(run, place, last, targets, possible):
        column = targets.index(target)
        found.append(
            Outcome(
                name=one.name,
                last=last,
                target=target,
                observed=float(observed.mean()),
                gains=rewards.of(directory) - observed,
                true_gains=rewards.at(target) - observed,
                skill=here[one][column],
                nested_skill=nested[one][column],
                explained=figures[one][0],
                r2=figures[one][1],
                repeats=one.repeats(rows),
            )
        )
    names = [one.name for one in ablations]
    return sorted(found, key=lambda outcome: (names.index(outcome.name), outcome.target))


def described(run: Run, last: int, ablation: Ablation) -> tuple[float, float]:
    """Return explained variance of the model's history, and R2 of its first component's fit."""
    model = rs.analyze(
        run.store,
        history_steps=last,
        rank=ablation.rank,
        fit=ablation.fit.curve,
        window=ablation.fit.window,
        exact=True,
    ).model
    return model.explained_variance[-1], model.r2[0]


# --- sums ----------------------------------------------------------------------------------------


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each setting, training on above them: mean gains, losses in brackets.

    The mean over forecasts, and its difference to plain RELEX over those that both made, stand with
    standard errors; these count what is by chance of the problems, not of the run.
    """
    names = list(dict.fromkeys(outcome.name for outcome in outcomes))
    by_name = {name: [one for one in outcomes if one.name == name] for name in names}
    most = max(by_name.values(), key=len)
    rows = [_row("true checkpoints", most, lambda one: one.true_gains)]
    rows[0] |= {"to plain RELEX": None, "skill, median": None}
    plain = {(one.last, one.target): one for one in by_name.get(PLAIN.name, [])}
    for name, some in by_name.items():
        row = _row(name, some, lambda one: one.gains)
        paired = [
            one.gains - plain[one.last, one.target].gains
            for one in some
            if (one.last, one.target) in plain
        ]
        if name != PLAIN.name and paired:
            row["to plain RELEX"] = _with_error(np.mean(paired, axis=0))
        row["skill, median"] = f"{np.median([one.skill for one in some]):.2f}"
        rows.append(row)
    return rows


def _row(
    name: str, outcomes: Sequence[Outcome], gains_of: Callable[[Outcome], Solved]
) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": name}
    for last, grouped in groupby(outcomes, key=lambda one: one.last):
        gains = [gains_of(one) for one in grouped]
        losses = sum(each.mean() < -2 * standard_error(each) for each in gains)
        mean = f"{np.mean(gains):+.3f}"
        row[f"from {last}"] = f"{mean} ({losses})" if losses else mean
    every = [gains_of(one) for one in outcomes]
    row["all"] = _with_error(np.mean(every, axis=0))
    won = sum(each.mean() > 2 * standard_error(each) for each in every)
    lost = sum(each.mean() < -2 * standard_error(each) for each in every)
    row["gains, losses"] = f"{won}, {lost} of {len(every)}"
    worst = min(outcomes, key=lambda one: gains_of(one).mean())
    row["worst"] = f"{gains_of(worst).mean():+.3f} ({worst.last} to {worst.target})"
    return row


def _with_error(difference: Solved) -> str:
    return f"{difference.mean():+.3f} +- {standard_error(difference):.3f}"


KNOWN: dict[str, Callable[[Outcome], float | None]] = {
    "skill": lambda one: one.skill,
    "nested skill": lambda one: one.nested_skill,
    "horizon": lambda one: one.target / one.last,
    "explained variance": lambda one: one.explained,
    "R2": lambda one: one.r2,
}
"""What the gain of a forecast is held against."""


FAR_BOUNDS = (-np.inf, -10.0, -2.0, *SKILL_BOUNDS[1:])
"""Parabolas and cubics miss by more than lines do."""


@dataclass(frozen=True)
class Told:
    """What something known tells of gains.

    Attributes
    ----------
    correlation : float
        Spearman's, with the gain.
    losses_lower : float
        How often a forecast that lost has a lower value than one that did not, of all such pairs,
        a tie counting half: 0.5 tells nothing. NaN where none lost, or all did.
    forecasts : int
        Over how many.
    """

    correlation: float
    losses_lower: float
    forecasts: int


def told(outcomes: Iterable[Outcome]) -> dict[str, Told]:
    """Return what each of `KNOWN` tells of gains.

    Forecasts that repeat another do not count, nor those of which something is not known.
    """
    found = {}
    own = [one for one in outcomes if not one.repeats]
    for name, value_of in KNOWN.items():
        some = [one for one in own if value_of(one) is not None]
        values = np.array([value_of(one) for one in some], np.float64)
        gains = np.array([one.gain for one in some])
        if len(set(values)) < 2 or len(set(gains)) < 2:
            continue
        lost = np.array([one.lost for one in some])
        higher = values[~lost] - values[lost][:, None]
        lower = float(((np.sign(higher) + 1) / 2).mean()) if higher.size else float("nan")
        found[name] = Told(float(spearmanr(values, gains).statistic), lower, len(some))
    return found


def notes_on(outcomes: Sequence[Outcome]) -> list[str]:
    """Return sentences on whether gains and losses were seen coming."""
    own = [one for one in outcomes if not one.repeats]
    gains, errors = [one.gain for one in own], [one.error for one in own]
    lines = []
    for name, key in (("all settings", "skill"), ("all settings, nested", "nested skill")):
        values = [KNOWN[key](one) for one in own]
        lines += lines_by_skill(name, values, gains, errors, FAR_BOUNDS)
    lines += [
        f"{name}: rank correlation with the gain {each.correlation:.2f}, lower for a loss than for "
        f"others in {each.losses_lower:.0%} of pairs ({each.forecasts} forecasts)"
        for name, each in told(outcomes).items()
    ]
    return lines


# --- reconstructions -----------------------------------------------------------------------------


def reconstructions(
    run: Run, rewards: Rewards, place: Path, grams: dict[str, Float64]
) -> list[dict[str, Any]]:
    """Return a row for each step and rank: its projection beside the true checkpoint."""
    steps = rs.open_store(run.store).steps
    rows = []
    outputs = rs.reconstruct(
        run.store,
        place / "projected",
        steps=nearest(steps, RECONSTRUCTED_SHARES),
        rank=RECONSTRUCTED_RANKS,
        svd="exact",
    ).outputs
    for output in outputs:
        step, rank = output.what["step"], output.what["rank"]
        true, solved = rewards.at(step), rewards.of(output.path)
        rows.append(
            {
                "step": step,
                "rank": rank,
                "true": f"{true.mean():.3f}",
                "projected": f"{solved.mean():.3f}",
                "difference": _with_error(solved - true),
                "of the squared delta": f"{kept_of(grams, steps.index(step), rank).share:.0%}",
            }
        )
    return rows


@click.command("ablations")
@reward_options(("addition",), "addition")
def command(
    names: tuple[str, ...],
    problems: int,
    work: Path | None,
    json_path: Path | None,
    *,
    markdown: bool,
) -> None:
    """Change rank, fit, window, anchor and cut-off of RELEX one by one; measure by reward."""
    settings = {"runs": list(names), "problems": problems}
    report = Report("Gain over the last observed step, in accuracy", "ablations", settings)
    projected = Report("Steps projected into the subspace of all", "ablations", settings)
    forecasts: list[dict[str, Any]] = []
    with work_directory(work) as place:
        for name in names:
            run = load_run(name)
            rewards = Rewards(run, place, problems)
            steps, grams = exact_grams(run.store)
            skills = Skills(steps, grams)
            outcomes: list[Outcome] = []
            for last, cells in groupby(cells_of(steps), key=lambda cell: cell[0]):
                targets = [target for _, target in cells]
                outcomes += measure(run, rewards, place, skills, last, targets, ABLATIONS)
                click.echo(f"{name}: from step {last} measured", err=True)
            outcomes.sort(key=lambda one: [each.name for each in ABLATIONS].index(one.name))
            for row in summarize(outcomes):
                report.add({"run": name, **row} if len(names) > 1 else row)
            for line in notes_on(outcomes):
                report.note(f"{name}: {line}")
            forecasts += [{"run": name, **one.as_row()} for one in outcomes]
            for row in reconstructions(run, rewards, place, grams):
                projected.add({"run": name, **row} if len(names) > 1 else row)
    report.settings["forecasts"] = forecasts
    report.settings["reconstructions"] = projected.rows
    report.note("Losses: forecasts worse than the last observed step by two standard errors.")
    publish(report, json_path=json_path, markdown=markdown)
    click.echo("")
    publish(projected, json_path=None, markdown=markdown)
