"""What models are worth: which held-out problems they solve, and how that goes with skill."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
from numpy.typing import NDArray

import relex_stream as rs
from benchmarks.report import output_options
from benchmarks.rlvr.runs import RUNS, Run, accuracy
from relex_stream.skill import LEAST_NESTED_STEPS, Cell

Command = TypeVar("Command", bound=Callable[..., Any])

PROBLEMS = 2000
"""Held-out problems that a model is asked, always the same ones."""

Solved = NDArray[np.float64]
"""1 for each problem that a model solves, 0 for others; or the difference of two models."""

SKILL_BOUNDS = (-np.inf, -0.5, -0.3, -0.2, -0.1, 0.0, np.inf)


def reward_options(runs: Sequence[str], shown: str) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--run``, ``--problems``, ``--work`` and what a report has.

    Parameters
    ----------
    runs : sequence of str
        Measured unless others are named.
    shown : str
        What these are called.
    """

    def add(command: Command) -> Command:
        for option in (
            output_options,
            click.option(
                "--work",
                type=click.Path(path_type=Path, file_okay=False),
                help="Where to put models.",
            ),
            click.option("--problems", type=click.IntRange(min=1), default=PROBLEMS),
            click.option(
                "--run",
                "names",
                type=click.Choice(list(RUNS)),
                multiple=True,
                default=tuple(runs),
                show_default=shown,
                help="Which run. May be given several times.",
            ),
        ):
            command = option(command)
        return command

    return add


class Rewards:
    """Measures the models of a run, each stored step once.

    Parameters
    ----------
    run : Run
    place : Path
        Where models are put meanwhile.
    problems : int
    """

    def __init__(self, run: Run, place: Path, problems: int) -> None:
        self._run = run
        self._place = place
        self._problems = problems
        self._stored: dict[int, Solved] = {}

    def of(self, directory: Path | str) -> Solved:
        """Return 1 for each problem that a model solves, 0 for others."""
        return accuracy(directory, self._run.task, self._problems).astype(np.float64)

    def at(self, step: int) -> Solved:
        """Return the same of a stored step."""
        if step not in self._stored:
            directory = self._place / f"step_{step}"
            rs.export(self._run.store, directory, step=step)
            self._stored[step] = self.of(directory)
            shutil.rmtree(directory)
        return self._stored[step]


def standard_error(difference: Solved) -> float:
    """Return the standard error of the mean of a difference, problem by problem.

    Examples
    --------
    >>> standard_error(np.array([1.0, -1.0, 1.0, -1.0]))
    0.5
    """
    return float(difference.std() / np.sqrt(difference.size))


def lines_by_skill(
    name: str,
    skills: Sequence[float | None],
    gains: Sequence[float],
    errors: Sequence[float],
    bounds: Sequence[float] = SKILL_BOUNDS,
) -> list[str]:
    """Return a line for each range of skill: how many forecasts gained or lost two errors or more.

    Examples
    --------
    >>> lines_by_skill("x", [-0.4, -0.4, None], [-0.05, -0.05, 0.1], [0.01, 0.01, 0.01])
    ['x, skill -0.5 to -0.3: 2 forecasts, 0 gains, 2 losses, mean -0.050']
    """
    # None compares as NaN: in no range.
    skill, gain, error = (np.array(values, np.float64) for values in (skills, gains, errors))
    lines = []
    for low, high in pairwise(bounds):
        some = (low <= skill) & (skill < high)
        if some.any():
            lines.append(
                f"{name}, skill {low:g} to {high:g}: {int(some.sum())} forecasts, "
                f"{int((gain > 2 * error)[some].sum())} gains, "
                f"{int((gain < -2 * error)[some].sum())} losses, mean {gain[some].mean():.3f}"
            )
    return lines


def nested_cell(
    history: Sequence[int], target_step: int, least: int = LEAST_NESTED_STEPS
) -> Cell | None:
    """Return the forecast of its end that a history can make, as far in proportion as a target.

    From K to qK steps: from K / q to K. None if that leaves fewer than `least` checkpoints.

    Examples
    --------
    >>> nested_cell(range(1, 41), 80)  # twice as far as step 40: from step 20
    Cell(rows=20, target=39)
    """
    last = history[-1]
    rows = int(np.searchsorted(history, last * last / target_step, side="right"))
    return Cell(rows, len(history) - 1) if least <= rows < len(history) else None
