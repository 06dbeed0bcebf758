"""Nested windows: what a history makes of its own end, and which damping that speaks for.

To forecast from K to qK steps, the same is done from K / q to K, where what came is known: the
damping that would have been best there is taken here, and the skill that there was there is told
of. No later step is looked at, and no weights but those of tensors without a sketch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
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
    best_damping,
    furthest_nested_cell,
    nested_cell,
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


@dataclass(frozen=True)
class Inner:
    """The forecast of a history's end that stands for one of a target.

    Attributes
    ----------
    cell : Cell
    shrunk : float
        1, or how much less far it goes than the target: the history is too short for as far.
    """

    cell: Cell
    shrunk: float


def inner_forecasts(method: Extrapolation) -> dict[int, Inner]:
    """Return the nested forecast of each target that lies ahead, where there can be one."""
    history, fit = method.history, method.fit
    least = max(LEAST_NESTED_STEPS, fit.least_points, fit.window or 0)
    found: dict[int, Inner] = {}
    for target in method.targets:
        if target <= history[-1]:
            continue
        cell = nested_cell(history, target, least)
        if cell is not None:
            found[target] = Inner(cell, 1.0)
            continue
        cell = furthest_nested_cell(history, least)
        if cell is not None:
            # A line goes on in proportion to how far: no further than was measured.
            reach = history[-1] / history[cell.rows - 1] - 1.0
            found[target] = Inner(cell, min(1.0, reach / (target / history[-1] - 1.0)))
    return found


class Hindsight:
    """The skill of an extrapolation's settings at forecasting the end of its history.

    Parameters
    ----------
    method : Extrapolation
    inner : dict of int to Inner
        By target.
    reader : GramReader
        Of the history.
    group_by : str

    Attributes
    ----------
    chosen : dict of (int, int) to float
        The damping of each target and rank, for anchor ``"latest"``.
    """

    def __init__(
        self, method: Extrapolation, inner: dict[int, Inner], reader: GramReader, group_by: str
    ) -> None:
        self._method = method
        self._inner = inner
        self._settings = [
            Setting(rank, method.fit, anchor)
            for rank in method.ranks
            for anchor in dict.fromkeys([*method.anchors, "latest"])
        ]
        self._cells = list(dict.fromkeys(each.cell for each in inner.values()))
        self._moments = self._read(reader, group_by)
        # Inside the history nothing is predicted that did not come.
        self.chosen = {(target, rank): 1.0 for target in method.targets for rank in method.ranks}
        for target, each in inner.items():
            for setting in self._settings:
                if setting.anchor == "latest":
                    best = float(best_damping(self._of(target, setting)))
                    best = best if math.isfinite(best) else 0.0
                    self.chosen[target, setting.rank] = each.shrunk * best

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

    def _of(self, target: int, setting: Setting) -> Float64:
        """Return the moments of the forecast that stands for a target."""
        found: Float64 = self._moments[
            self._cells.index(self._inner[target].cell), self._settings.index(setting)
        ]
        return found

    def tell(self) -> None:
        """Warn of the forecast that did worst, if one was worse than to stay, and of guesses."""
        asked = [
            (float(skill(self._of(target, setting), damping)), target, setting, damping)
            for target in self._inner
            for setting in self._settings
            for damping in self._method.dampings
            if setting.anchor in self._method.anchors and not isinstance(damping, str)
        ]
        worst = min(asked, key=lambda each: each[0], default=None)
        last = self._method.history[-1]
        if worst is not None and worst[0] < 0:
            value, target, setting, damping = worst
            begin = self._method.history[self._inner[target].cell.rows - 1]
            warnings.warn(
                f"from step {begin} to {last}, as far ahead as step {target} is now, --anchor "
                f"{setting.anchor} --damping {damping:g} had a skill of {value:.2f} (below 0: "
                f"staying at step {begin} was nearer to what came); --anchor latest --damping auto "
                f"takes {self.chosen[target, setting.rank]:.2f}; see relex-stream backtest",
                ForecastWarning,
                stacklevel=3,
            )
        short = [target for target, each in self._inner.items() if each.shrunk < 1]
        if AUTO in self._method.dampings and short:
            begin = self._method.history[self._inner[short[-1]].cell.rows - 1]
            warnings.warn(
                f"the history is too short to know how forecasts do as far ahead as step "
                f"{short[-1]}: it tells of {last / begin:.2f} times as far, and --damping auto "
                f"goes no further than that ({self.chosen[short[-1], self._method.ranks[0]]:.3f})",
                ForecastWarning,
                stacklevel=3,
            )
