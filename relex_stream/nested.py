"""Nested windows: what a history makes of its own end, and which damping that speaks for.

To judge a forecast from K to qK steps, forecasts are made from K / h to K, for several h up to q:
what came is known there. Their mean skill is told of, and the damping that they speak for is taken
(`skill.chosen_damping`). No later step is looked at, and no weights but those of tensors without a
sketch.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import FitError, ForecastWarning, MemoryLimitError
from relex_stream.grams import GramReader
from relex_stream.graph import Threads, one_blas_thread
from relex_stream.grouping import group_name
from relex_stream.locations import Location
from relex_stream.methods import AUTO, Extrapolation
from relex_stream.request import Job
from relex_stream.skill import (
    LEAST_NESTED_STEPS,
    Backtest,
    Cell,
    Setting,
    chosen_damping,
    mean_moments,
    nested_cells,
    skill,
)
from relex_stream.specs import Progress
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.subspaces import SubspaceOptions, predicted_tensors

Float64 = NDArray[np.float64]


def with_dampings(
    store: Store,
    jobs: Sequence[Job],
    *,
    base: Location | None,
    memory_limit: int | None,
    progress: Progress,
) -> list[Job]:
    """Return jobs with their dampings chosen where they are to be; warn of what speaks against.

    Parameters
    ----------
    store : Store
    jobs : sequence of Job
        Of any method; but for extrapolations they are returned as they are.
    base, memory_limit, progress
        As in `models.RunOptions`.

    Raises
    ------
    FitError
        If a damping is to be chosen and the history is too short for any choice.
    """
    hindsights: dict[int, Hindsight] = {}
    looks: dict[Hashable, list[int]] = {}
    for number, job in enumerate(jobs):
        hindsight = _hindsight(job)
        if hindsight is not None:
            hindsights[number] = hindsight
        if hindsight is not None and hindsight.inner:
            # One look at the Gram matrices serves all that are judged by the same.
            looks.setdefault((job.rows, job.group_by, job.selection), []).append(number)
    for numbers in looks.values():
        some = [hindsights[number] for number in numbers]
        options = jobs[numbers[0]].subspaces
        assert options is not None
        wanted = any(each.wanted for each in some)
        reader = _reader(store, options, base, memory_limit, progress, small_too=wanted)
        try:
            _look(reader, some, options.group_by)
        except MemoryLimitError:
            if wanted:
                raise
            for number in numbers:
                del hindsights[number]  # it was only to tell
    _tell(list(hindsights.values()))
    found = list(jobs)
    for number, hindsight in hindsights.items():
        if hindsight.wanted:
            method = replace(hindsight.method, chosen=hindsight.chosen)
            found[number] = replace(jobs[number], method=method)
    return found


def _hindsight(job: Job) -> Hindsight | None:
    """Return what will judge a job by its history; None if nothing can or needs to."""
    method, options = job.method, job.subspaces
    if not isinstance(method, Extrapolation) or options is None or options.half_deltas:
        return None
    inner = inner_forecasts(method)
    ahead = [target for target in method.targets if target > method.history[-1]]
    if AUTO in method.dampings and len(inner) < len(ahead):
        raise FitError(
            f"--damping auto needs a longer history: {len(method.history)} checkpoints are too few "
            f"to forecast the last of them from at least {LEAST_NESTED_STEPS} before; name a "
            "damping (0.3 is a careful one)"
        )
    if not inner and AUTO not in method.dampings:
        return None
    return Hindsight(method, inner)


def _look(reader: GramReader, hindsights: Sequence[Hindsight], group_by: str) -> None:
    """Show every Gram matrix of a history: those of tensors, or summed over groups."""
    alone = group_by in ("tensor", "run")  # a run has no sketch: its tensor stands for it
    sums: dict[str, Float64] = {}
    plan = reader.plan(groups=0 if alone else 64)
    with one_blas_thread():
        for found in reader.grams(plan.workers):
            if alone:
                for hindsight in hindsights:
                    hindsight.add(found.gram)
                continue
            name = group_name(found.tensor.name, group_by)
            sums[name] = sums[name] + found.gram if name in sums else found.gram
        for gram in sums.values():
            for hindsight in hindsights:
                hindsight.add(gram)


def _reader(
    store: Store,
    options: SubspaceOptions,
    base: Location | None,
    memory_limit: int | None,
    progress: Progress,
    *,
    small_too: bool,
) -> GramReader:
    predicted = predicted_tensors(store, options)
    # Only to tell what speaks against a forecast, tensors with a sketch will do.
    every = small_too or all(tensor.sketch_row < 0 for tensor in predicted)

    def takes(tensor: StoredTensor) -> bool:
        return (every or tensor.sketch_row >= 0) and options.selection.takes(tensor.name)

    return GramReader(
        store,
        exact=False,
        base=base,
        executor=Threads(None, memory_limit),
        progress=progress,
        rows=options.rows,
        takes=takes,
        errors=False,
    )


def inner_forecasts(method: Extrapolation) -> dict[int, list[Cell]]:
    """Return the nested forecasts of each target that lies ahead, where there can be any."""
    fit = method.fit
    least = max(LEAST_NESTED_STEPS, fit.least_points, fit.window or 0)
    found = {
        target: nested_cells(method.history, target, least)
        for target in method.targets
        if target > method.history[-1]
    }
    return {target: cells for target, cells in found.items() if cells}


class Hindsight:
    """The skill of an extrapolation's settings at forecasting the end of its history.

    Parameters
    ----------
    method : Extrapolation
    inner : dict of int to list of Cell
        By target; the furthest first.
    """

    def __init__(self, method: Extrapolation, inner: dict[int, list[Cell]]) -> None:
        self.method = method
        self.inner = inner
        self.settings = [
            Setting(rank, method.fit, anchor)
            for rank in method.ranks
            for anchor in dict.fromkeys([*method.anchors, "latest"])
        ]
        self._cells = list(dict.fromkeys(cell for cells in inner.values() for cell in cells))
        self._backtest = Backtest(method.history, self._cells, self.settings)
        self._moments = np.zeros((len(self._cells), len(self.settings), 4))

    @property
    def wanted(self) -> bool:
        """Whether a damping is to be chosen."""
        return AUTO in self.method.dampings

    def add(self, gram: Float64) -> None:
        """Take in what has a subspace of its own."""
        self._moments += self._backtest.moments(gram)[0]

    def mean(self, target: int, setting: Setting) -> Float64:
        """Return moments whose skill is the mean of the nested forecasts of a target."""
        cells = [self._cells.index(cell) for cell in self.inner[target]]
        return mean_moments(self._moments[cells, self.settings.index(setting)])

    @property
    def chosen(self) -> dict[tuple[int, int], float]:
        """The damping of each target and rank, for anchor ``"latest"``."""
        # Inside the history nothing is predicted that did not come.
        method = self.method
        found = {(target, rank): 1.0 for target in method.targets for rank in method.ranks}
        for target in self.inner:
            for setting in self.settings:
                if setting.anchor == "latest":
                    found[target, setting.rank] = chosen_damping(self.mean(target, setting))
        return found

    def asked(self) -> Iterator[tuple[float, str]]:
        """Yield the mean skill of each setting that is asked for, and what to say if it is low."""
        method = self.method
        for target in self.inner:
            for setting in self.settings:
                if setting.anchor not in method.anchors:
                    continue
                for damping in method.dampings:
                    if isinstance(damping, str):
                        continue
                    value = float(skill(self.mean(target, setting), damping))
                    text = (
                        f"{self.forecasts(target)} with {_options(setting)} --damping {damping:g} "
                        f"had a mean skill of {value:.2f} (below 0: staying was nearer to what "
                        "came); --anchor latest --damping auto takes "
                        f"{self.chosen[target, setting.rank]:.2f}"
                    )
                    yield value, text

    def too_far(self) -> Iterator[tuple[float, str]]:
        """Yield how many times as far a target is that is too far to know, and what to say."""
        last = self.method.history[-1]
        for target in self.inner:
            if target / last > self._reach(target):
                text = (
                    "the history is too short to know how forecasts do as far ahead as step "
                    f"{target}, {target / last:.2f} times as far: --damping auto "
                    f"({self.chosen[target, self.method.ranks[0]]:.2f}) goes by "
                    f"{self.forecasts(target)}"
                )
                yield target / last, text

    def _reach(self, target: int) -> float:
        """Return how many times as far the furthest nested forecast goes."""
        history = self.method.history
        return history[-1] / history[self.inner[target][0].rows - 1]

    def forecasts(self, target: int) -> str:
        """Return the nested forecasts of a target in words."""
        history = self.method.history
        begins = [history[cell.rows - 1] for cell in self.inner[target]]
        several = (
            f"{', '.join(map(str, begins[:-1]))} and {begins[-1]}" if begins[1:] else begins[0]
        )
        return (
            f"forecasts of step {history[-1]} from {several} (up to {self._reach(target):.2f} "
            "times as far)"
        )


def _options(setting: Setting) -> str:
    """Return how a setting is asked for, without what is so by default."""
    fit = setting.fit
    parts = [
        f"--rank {setting.rank}" if setting.rank != 1 else "",
        f"--fit {fit.curve}" if fit.curve != "linear" else "",
        f"--window {fit.window}" if fit.window else "",
        f"--refit-every {fit.refit_every}" if fit.refit_every else "",
        f"--anchor {setting.anchor}",
    ]
    return " ".join(part for part in parts if part)


def _tell(hindsights: Sequence[Hindsight]) -> None:
    """Warn of the setting that did worst, if worse than to stay, and of the target too far off."""
    asked = [each for hindsight in hindsights for each in hindsight.asked()]
    low = [each for each in asked if each[0] < 0]
    if low:
        text = min(low)[1]
        if len(low) > 1:
            text += f"; {len(low)} of {len(asked)} settings were below 0, and this most"
        warnings.warn(f"{text}; see relex-stream backtest", ForecastWarning, stacklevel=4)
    far = [each for hindsight in hindsights if hindsight.wanted for each in hindsight.too_far()]
    if far:
        warnings.warn(max(far)[1], ForecastWarning, stacklevel=4)
