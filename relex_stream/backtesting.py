"""From a store to what forecasts from its first steps would have been worth at its later ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import machine
from relex_stream.analysis import REPLICATES, jackknife
from relex_stream.errors import FitError, OptionError
from relex_stream.fit import Fit
from relex_stream.grams import GramReader, GramSum, TensorGram, is_estimated
from relex_stream.graph import Threads, one_blas_thread
from relex_stream.grouping import group_name
from relex_stream.locations import Location
from relex_stream.methods import ANCHORS, AUTO
from relex_stream.skill import (
    HORIZONS,
    LEAST_NESTED_STEPS,
    Backtest,
    Cell,
    Setting,
    best_damping,
    chosen_damping,
    mean_moments,
    nested_cells,
    skill,
)
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.subspaces import changed_tensors
from relex_stream.summaries import (
    BacktestGroup,
    BacktestSummary,
    ForecastSkill,
    Plan,
    Recommendation,
    SkillOfDamping,
)

Float64 = NDArray[np.float64]

HISTORY_SHARES = (0.25, 1 / 3, 0.5, 2 / 3)
"""Of the last step: where histories end, unless others are asked for."""

GROUPINGS_TESTED = ("tensor", "layer", "module", "model")
"""What may have a subspace of its own."""

ANCHORS_TESTED = ("base", "latest")
DAMPINGS_TESTED = (0.1, 0.3, 0.5, 1.0)
"""Of a backtest that is asked for no others."""

_TIE = 1e-6
"""Mean skills that are as near are taken for equal."""


@dataclass(frozen=True)
class Grid:
    """What is asked of a backtest."""

    history_steps: Sequence[int]
    target_steps: Sequence[int]
    ranks: Sequence[int]
    fits: Sequence[str]
    windows: Sequence[int | None]
    anchors: Sequence[str]
    dampings: Sequence[float]
    group_by: str = "tensor"


class Backtesting:
    """What forecasts of a store were worth, as Gram matrices come in, tensor by tensor.

    Parameters
    ----------
    store : Store
    grid : Grid

    Raises
    ------
    OptionError, FitError
        If what is asked for cannot be forecast.
    """

    def __init__(self, store: Store, grid: Grid) -> None:
        self._store = store
        self._grid = grid
        self._settings = _settings(grid)
        steps = store.steps
        least = _least(self._settings)
        self._cells = _cells(steps, grid, least)
        self._nested = [
            nested_cells(steps[: cell.rows], steps[cell.target], least) for cell in self._cells
        ]
        inner = (cell for cells in self._nested for cell in cells)
        every = list(dict.fromkeys([*self._cells, *inner]))
        self._backtest = Backtest(steps, every, self._settings)
        self._place = {cell: number for number, cell in enumerate(every)}
        self._total: Float64 | None = None
        self._by_group: dict[str, Float64] = {}
        self._sums: dict[str, GramSum] = {}
        self._with_errors = True

    @property
    def groups(self) -> int:
        """Sums of Gram matrices that are kept: room for `GramReader.plan`."""
        if self._grid.group_by == "tensor":
            return 0
        changed = changed_tensors(self._store, len(self._store.steps))
        return len({group_name(tensor.name, self._grid.group_by) for tensor in changed})

    def begin(self, plan: Plan) -> None:
        """Make ready for the tensors that were planned."""
        needed = REPLICATES * 8 * len(self._store.steps) ** 2 * self.groups
        self._with_errors = needed <= plan.memory_limit_bytes - plan.projected_bytes

    def add(self, found: TensorGram) -> None:
        """Take a tensor in."""
        if self._grid.group_by == "tensor":
            self._take(found.tensor.name, found.gram, found.replicates)
            return
        name = group_name(found.tensor.name, self._grid.group_by)
        self._sums.setdefault(name, GramSum(self._with_errors)).add(found)

    def _take(self, name: str, gram: Float64, replicates: Float64 | None) -> None:
        """Forecast a tensor, or a group of them."""
        moments = self._backtest.moments(gram, replicates)
        self._by_group[name] = moments[0, [self._place[cell] for cell in self._cells]]
        # One that is exact is the same in every replicate.
        self._total = moments if self._total is None else self._total + moments

    def summary(
        self, *, exact: bool, reader: GramReader, plan: Plan, started: float
    ) -> BacktestSummary:
        """Return all that was found; arguments as in `analyzing.Analysis.summary`.

        Raises
        ------
        OptionError
            If there was no tensor.
        """
        for name, each in self._sums.items():
            self._take(name, each.gram, each.replicates)
        self._sums.clear()
        store, total = self._store, self._total
        if total is None:
            reader.refuse_nothing("test")
        rows = [
            _forecast(
                store.steps, total, cell, inner, number, setting, self._place, self._grid.dampings
            )
            for cell, inner in zip(self._cells, self._nested, strict=True)
            for number, setting in enumerate(self._settings)
        ]
        advice = _recommendation(rows)
        changed = changed_tensors(store, len(store.steps))
        return BacktestSummary(
            store=str(store.path),
            steps=store.steps,
            exact=not any(is_estimated(tensor, exact=exact) for tensor in changed),
            forecasts=tuple(rows),
            recommendation=advice,
            group_by=self._grid.group_by,
            groups=tuple(_groups(self._by_group, self._settings, rows, advice)),
            left_out_tensors=reader.left_out,
            bytes_read=plan.stages[0].read_bytes,
            peak_memory_bytes=machine.peak_bytes(),
            elapsed_s=time.monotonic() - started,
        )


def backtest_store(
    store_path: Location,
    grid: Grid,
    *,
    exact: bool,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> BacktestSummary:
    """Backtest; `relex_stream.api.backtest` says what the arguments are."""
    started = time.monotonic()
    executor = Threads(workers, memory_limit)
    store = Store(store_path)
    backtesting = Backtesting(store, grid)
    reader = GramReader(
        store, exact=exact, base=base, executor=executor, progress=progress or NoProgress()
    )
    plan = reader.plan(groups=backtesting.groups)
    backtesting.begin(plan)
    with one_blas_thread():
        for found in reader.grams(plan.workers):
            backtesting.add(found)
        return backtesting.summary(exact=exact, reader=reader, plan=plan, started=started)


def _settings(grid: Grid) -> list[Setting]:
    if grid.group_by not in GROUPINGS_TESTED:
        raise OptionError(
            f"--group-by must be one of {', '.join(GROUPINGS_TESTED)}, not {grid.group_by!r}: "
            "sketches are of whole tensors"
        )
    for anchor in grid.anchors:
        if anchor not in ANCHORS:
            raise OptionError(f"--anchor must be one of {', '.join(ANCHORS)}, not {anchor!r}")
    for rank in grid.ranks:
        if rank < 1:
            raise OptionError(f"--rank must be at least 1, not {rank}")
    for damping in grid.dampings:
        if not math.isfinite(damping):
            raise OptionError(f"--damping must be a number, not {damping}")
    return [
        Setting(rank, Fit(fit, window), anchor)
        for rank, fit, window, anchor in product(grid.ranks, grid.fits, grid.windows, grid.anchors)
    ]


def _least(settings: Iterable[Setting]) -> int:
    """Return how many checkpoints a history has at least, for every fit."""
    fits = [setting.fit for setting in settings]
    return max(LEAST_NESTED_STEPS, *(max(fit.least_points, fit.window or 0) for fit in fits))


def _cells(steps: Sequence[int], grid: Grid, least: int) -> list[Cell]:
    """Return the forecasts to make, by history and then by target."""
    if grid.history_steps:
        for step in grid.history_steps:
            if step < steps[0]:
                raise FitError(f"no checkpoint is at step {step} or before")
        ends = [int(np.searchsorted(steps, step, side="right")) for step in grid.history_steps]
    else:
        if len(steps) <= least:
            raise FitError(
                f"there is no step to forecast: the store has {len(steps)} checkpoints, and a "
                f"forecast takes {least} before the step that it is of"
            )
        ends = [
            max(least, int(np.searchsorted(steps, share * steps[-1], side="right")))
            for share in HISTORY_SHARES
        ]
    cells: dict[Cell, None] = {}
    for rows in ends:
        if rows < least:
            raise FitError(
                f"a history up to step {steps[rows - 1]} has {rows} checkpoints, the fits need "
                f"{least}; take a later --history-steps"
            )
        if grid.target_steps:
            targets = [row for row, step in enumerate(steps) if step in grid.target_steps]
            unknown = sorted(set(grid.target_steps) - set(steps))
            if unknown:
                raise OptionError(
                    f"--target-step {unknown[0]} is not stored: what came there is not known"
                )
        else:
            wanted = [ratio * steps[rows - 1] for ratio in HORIZONS]
            targets = [_nearest(steps, step) for step in wanted if step < steps[-1]]
            targets.append(len(steps) - 1)
        cells |= dict.fromkeys(Cell(rows, target) for target in targets if target >= rows)
    if not cells:
        raise FitError(
            f"there is no step to forecast: {len(steps)} checkpoints up to step {steps[-1]}, and "
            f"the first history ends with step {steps[min(ends) - 1]}"
        )
    return list(cells)


def _nearest(steps: Sequence[int], step: float) -> int:
    return int(np.argmin(np.abs(np.asarray(steps, np.float64) - step)))


def _forecast(
    steps: Sequence[int],
    total: Float64,
    cell: Cell,
    inner: Sequence[Cell],
    number: int,
    setting: Setting,
    place: dict[Cell, int],
    dampings: Sequence[float],
) -> ForecastSkill:
    here = total[:, place[cell], number]
    onward = float(here[0, 3])
    own = None
    if inner and setting.anchor == "latest":
        nested = total[0, [place[each] for each in inner], number]
        own = chosen_damping(mean_moments(nested))
    found = [_skill(here, damping) for damping in dampings]
    best = float(best_damping(here[0]))
    history, target = steps[cell.rows - 1], steps[cell.target]
    return ForecastSkill(
        history_step=history,
        target_step=target,
        horizon=target / history,
        rank=setting.rank,
        fit=setting.fit.curve,
        window=setting.fit.window,
        anchor=setting.anchor,
        moved=math.sqrt(max(0.0, onward)),
        skills=tuple(found),
        best=_skill(here, best),
        auto=None if own is None else _skill(here, own),
    )


def _skill(moments: Float64, damping: float) -> SkillOfDamping:
    """Return the skill with a damping; `moments` has those of replicates behind the first."""
    values = skill(moments, damping)
    error = float(jackknife(values[1:])) if len(values) > 1 else None
    missed = (1.0 - float(values[0])) * float(moments[0, 3])
    return SkillOfDamping(damping, float(values[0]), error, math.sqrt(max(0.0, missed)))


def _recommendation(rows: Sequence[ForecastSkill]) -> Recommendation | None:
    """Return what had most skill on average, ties to what comes first; None if nothing helped."""
    choices: dict[tuple[Any, ...], dict[tuple[int, int], ForecastSkill]] = {}
    values: dict[tuple[Any, ...], dict[tuple[int, int], float]] = {}
    for row in rows:
        offered: list[tuple[float | str, SkillOfDamping]] = [
            (each.damping, each) for each in row.skills
        ]
        if row.auto is not None:
            offered.append((AUTO, row.auto))
        for damping, each in offered:
            if not math.isfinite(each.skill):
                continue  # the model did not go on: nothing to forecast
            key = (row.rank, row.fit, row.window, row.anchor, damping)
            cell = (row.history_step, row.target_step)
            choices.setdefault(key, {})[cell] = row
            values.setdefault(key, {})[cell] = each.skill
    if not values:
        return None
    # What is compared is compared over the same forecasts: those that all can make.
    common = set.intersection(*(set(found) for found in values.values()))
    means = {key: float(np.mean([found[cell] for cell in common])) for key, found in values.items()}
    most = max(means.values())
    best = next(key for key in means if means[key] >= most - _TIE)
    if not most > 0:
        return None
    rank, fit, window, anchor, damping = best
    found = values[best]
    by_horizon = sorted((row.horizon, found[cell]) for cell, row in choices[best].items())
    failing = [horizon for horizon, value in by_horizon if value <= 0]
    within = [horizon for horizon, _ in by_horizon if not failing or horizon < failing[0]]
    return Recommendation(
        rank=rank,
        fit=fit,
        window=window,
        anchor=anchor,
        damping=damping,
        mean_skill=means[best],
        least_skill=min(found[cell] for cell in common),
        forecasts=len(common),
        reach=max(within, default=0.0),
        reach_is_known=bool(failing),
    )


def _groups(
    by_group: dict[str, Float64],
    settings: Sequence[Setting],
    rows: Sequence[ForecastSkill],
    advice: Recommendation | None,
) -> Iterable[BacktestGroup]:
    """Yield each group's figures over all forecasts, with the recommended settings."""
    number = 0
    if advice is not None:
        wanted = (advice.rank, advice.fit, advice.window, advice.anchor)
        names = [(each.rank, each.fit.curve, each.fit.window, each.anchor) for each in settings]
        number = names.index(wanted)
    mine = rows[number :: len(settings)]
    if advice is None:
        dampings = np.ones(len(mine))
    elif advice.damping == AUTO:
        dampings = np.array([0.0 if row.auto is None else row.auto.damping for row in mine])
    else:
        dampings = np.full(len(mine), float(advice.damping))
    for name, moments in by_group.items():
        square, product_, came, onward = moments[:, number].T
        missed = (came - 2 * dampings * product_ + dampings**2 * square).sum()
        yield BacktestGroup(
            name=name,
            skill=float(1.0 - missed / onward.sum()) if onward.sum() > 0 else math.nan,
            best_damping=float(best_damping(moments[:, number].sum(axis=0))),
            moved=math.sqrt(max(0.0, float(onward.sum()))),
        )
