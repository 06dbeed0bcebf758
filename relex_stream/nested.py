"""Nested windows: what a history makes of its own end, and which damping that speaks for.

To judge a forecast from K to qK steps, forecasts are made from K / h to K, for several h up to q:
what came is known there. Their mean skill is told of, and the damping that they speak for is taken
(`skill.chosen_damping`). No later step is looked at, and no weights but those of tensors without a
sketch.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import FitError, ForecastWarning, MemoryLimitError
from relex_stream.grams import GramReader
from relex_stream.graph import Threads
from relex_stream.grouping import group_name
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
    store: Store, job: Job, *, base: Path | None, memory_limit: int | None, progress: Progress
) -> Job:
    """Return a job with its dampings chosen where they are to be; warn of what speaks against it.

    Parameters
    ----------
    store : Store
    job : Job
        Of any method; but for extrapolations it is returned as it is.
    base, memory_limit, progress
        As in `models.RunOptions`.

    Raises
    ------
    FitError
        If a damping is to be chosen and the history is too short for any choice.
    """
    method, options = job.method, job.subspaces
    if not isinstance(method, Extrapolation) or options is None or options.half_deltas:
        return job
    wanted = AUTO in method.dampings
    inner = inner_forecasts(method)
    ahead = [target for target in method.targets if target > method.history[-1]]
    if wanted and len(inner) < len(ahead):
        raise FitError(
            f"--damping auto needs a longer history: {len(method.history)} checkpoints are too few "
            f"to forecast the last of them from at least {LEAST_NESTED_STEPS} before; name a "
            "damping (0.3 is a careful one)"
        )
    if not inner:
        return job
    try:
        reader = _reader(store, options, base, memory_limit, progress, small_too=wanted)
        hindsight = Hindsight(method, inner, reader, options.group_by)
    except MemoryLimitError:
        if wanted:
            raise
        return job  # it was only to tell
    hindsight.tell()
    if not wanted:
        return job
    return replace(job, method=replace(method, chosen=hindsight.chosen))


def _reader(
    store: Store,
    options: SubspaceOptions,
    base: Path | None,
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
    reader : GramReader
        Of the history.
    group_by : str

    Attributes
    ----------
    chosen : dict of (int, int) to float
        The damping of each target and rank, for anchor ``"latest"``.
    """

    def __init__(
        self, method: Extrapolation, inner: dict[int, list[Cell]], reader: GramReader, group_by: str
    ) -> None:
        self._method = method
        self._inner = inner
        self._settings = [
            Setting(rank, method.fit, anchor)
            for rank in method.ranks
            for anchor in dict.fromkeys([*method.anchors, "latest"])
        ]
        self._cells = list(dict.fromkeys(cell for cells in inner.values() for cell in cells))
        self._moments = self._read(reader, group_by)
        # Inside the history nothing is predicted that did not come.
        self.chosen = {(target, rank): 1.0 for target in method.targets for rank in method.ranks}
        for target in inner:
            for setting in self._settings:
                if setting.anchor == "latest":
                    chosen = chosen_damping(self._mean(target, setting))
                    self.chosen[target, setting.rank] = chosen

    def _read(self, reader: GramReader, group_by: str) -> Float64:
        """Return the moments of the model: of the subspace of each group, added up."""
        backtest = Backtest(self._method.history, self._cells, self._settings)
        total = np.zeros((len(self._cells), len(self._settings), 4))
        alone = group_by in ("tensor", "run")  # a run has no sketch: its tensor stands for it
        sums: dict[str, Float64] = {}
        plan = reader.plan(groups=0 if alone else 64)
        for found in reader.grams(plan.workers):
            if alone:
                total += backtest.moments(found.gram)[0]
                continue
            name = group_name(found.tensor.name, group_by)
            sums[name] = sums[name] + found.gram if name in sums else found.gram
        for gram in sums.values():
            total += backtest.moments(gram)[0]
        return total

    def _mean(self, target: int, setting: Setting) -> Float64:
        """Return moments whose skill is the mean of the nested forecasts of a target."""
        cells = [self._cells.index(cell) for cell in self._inner[target]]
        return mean_moments(self._moments[cells, self._settings.index(setting)])

    def tell(self) -> None:
        """Warn of settings that did worse than to stay, and of targets too far ahead to know."""
        asked = [
            (float(skill(self._mean(target, setting), damping)), target, setting, damping)
            for target in self._inner
            for setting in self._settings
            for damping in self._method.dampings
            if setting.anchor in self._method.anchors and not isinstance(damping, str)
        ]
        worst = min(asked, key=lambda each: each[0], default=None)
        if worst is not None and worst[0] < 0:
            value, target, setting, damping = worst
            warnings.warn(
                f"{self._forecasts(target)} with --anchor {setting.anchor} --damping {damping:g} "
                f"had a mean skill of {value:.2f} (below 0: staying was nearer to what came); "
                f"--anchor latest --damping auto takes {self.chosen[target, setting.rank]:.2f}; "
                "see relex-stream backtest",
                ForecastWarning,
                stacklevel=3,
            )
        last = self._method.history[-1]
        far = [target for target in self._inner if target / last > self._reach(target)]
        if AUTO in self._method.dampings and far:
            warnings.warn(
                f"the history is too short to know how forecasts do as far ahead as step "
                f"{max(far)}, {max(far) / last:.2f} times as far: --damping auto "
                f"({self.chosen[max(far), self._method.ranks[0]]:.2f}) goes by "
                f"{self._forecasts(max(far))}",
                ForecastWarning,
                stacklevel=3,
            )

    def _reach(self, target: int) -> float:
        """Return how many times as far the furthest nested forecast goes."""
        history = self._method.history
        return history[-1] / history[self._inner[target][0].rows - 1]

    def _forecasts(self, target: int) -> str:
        """Return the nested forecasts of a target in words."""
        history = self._method.history
        begins = [history[cell.rows - 1] for cell in self._inner[target]]
        several = (
            f"{', '.join(map(str, begins[:-1]))} and {begins[-1]}" if begins[1:] else begins[0]
        )
        return (
            f"forecasts of step {history[-1]} from {several} (up to {self._reach(target):.2f} "
            "times as far)"
        )
