"""From a store to the numbers of a report: one look at its Gram matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from relex_stream import machine, planner
from relex_stream.analyzing import Analysis
from relex_stream.assemble import Assembly
from relex_stream.backtesting import ANCHORS_TESTED, DAMPINGS_TESTED, Backtesting, Grid
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.errors import FitError, MemoryLimitError, OptionError
from relex_stream.fit import Fit
from relex_stream.grams import GramReader
from relex_stream.graph import Threads, one_blas_thread
from relex_stream.locations import Location
from relex_stream.outline import Outline
from relex_stream.reporting.coefficients import Float64, describe_coefficients
from relex_stream.reporting.modules import module_grid
from relex_stream.reporting.numbers import Coefficients, ReportNumbers
from relex_stream.request import Batch, check_extrapolation, history_of
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.store_info import info_of
from relex_stream.subspaces import changed_tensors
from relex_stream.summaries import Plan

TENSORS_DRAWN = 3
"""Tensors whose coefficients are told of beside the model's: those that moved most."""

TARGETS = (1.5, 2.0)
"""Multiples of the last step of the history that are forecast, unless others are asked for."""

NOMINAL_PROCESS_BYTES = 184 << 20
"""Of interpreter and libraries. Not measured, so that a report of a store is the same each time."""


def gather(
    store_path: Location,
    *,
    history_steps: int | None,
    target_steps: Sequence[int],
    rank: int,
    fit: str,
    window: int | None,
    exact: bool,
    title: str | None,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> ReportNumbers:
    """Return the numbers of a report; `relex_stream.api.report` says what the arguments are."""
    started = time.monotonic()
    executor = Threads(workers, memory_limit)
    store = Store(store_path)
    history = history_of(store, history_steps)
    rows = len(history)
    if rank < 1:
        raise OptionError(f"--rank must be at least 1, not {rank}")
    if target_steps and min(target_steps) < 1:
        raise OptionError(f"--target-step must be at least 1, not {min(target_steps)}")
    asked = Fit(fit, window)
    usable = asked if rows >= asked.least_points else None
    analysis = Analysis(store, history, rank=min(rank, rows), fit=usable)
    backtesting, reason = _backtesting(store, usable)
    moved_most = _moved_most(store, rows)
    reader = GramReader(
        store, exact=exact, base=base, executor=executor, progress=progress or NoProgress()
    )
    plan = reader.plan(groups=analysis.groups + len(moved_most))
    analysis.begin(plan)
    kept: dict[str, Float64] = {}
    with one_blas_thread():
        for found in reader.grams(plan.workers):
            analysis.add(found)
            if backtesting is not None:
                backtesting.add(found)
            if found.tensor.name in moved_most:
                kept[found.tensor.name] = found.gram
        analyzed = analysis.summary(exact=exact, reader=reader, plan=plan, started=started)
        backtested = None
        if backtesting is not None:
            backtested = backtesting.summary(exact=exact, reader=reader, plan=plan, started=started)
        if not np.trace(analysis.model.gram[:rows, :rows]) > 0:
            raise OptionError(
                f"no step of {store.path} up to step {history[-1]} changed any weight; "
                "take a later --history-steps"
            )
        groups = {"model": analysis.model.gram}
        groups |= {name: kept[name] for name in moved_most if name in kept}
        coefficients = _coefficients(
            groups, store.steps, rows, fit=usable, target_steps=target_steps
        )
    memory, fits = _memory(store, history_steps, memory_limit, workers)
    return ReportNumbers(
        title=title or f"Trajectory in {store_path}",
        info=info_of(store_path),
        analysis=analyzed,
        backtest=backtested,
        backtest_reason=reason,
        coefficients=coefficients,
        grid=module_grid(analyzed.tensors),
        memory=memory,
        memory_fits=fits,
        least_points=asked.least_points,
        asked_fit=fit,
    )


def _backtesting(store: Store, fit: Fit | None) -> tuple[Backtesting | None, str]:
    """Return the backtest that `backtest` makes of this fit, or why there is none."""
    if fit is None:
        return None, "the history is too short for the fit"
    grid = Grid(
        history_steps=(),
        target_steps=(),
        ranks=(1,),
        fits=(fit.curve,),
        windows=(fit.window,),
        anchors=ANCHORS_TESTED,
        dampings=DAMPINGS_TESTED,
    )
    try:
        return Backtesting(store, grid), ""
    except FitError as error:
        return None, str(error)


def _moved_most(store: Store, rows: int) -> list[str]:
    """Return the names of the tensors furthest from the base at the end of the history."""
    squares = store.delta_sq[rows - 1]
    changed = changed_tensors(store, rows)
    ordered = sorted(changed, key=lambda tensor: -float(squares[tensor.index]))
    return [tensor.name for tensor in ordered[:TENSORS_DRAWN] if squares[tensor.index] > 0]


def _coefficients(
    groups: dict[str, Float64],
    steps: Sequence[int],
    rows: int,
    *,
    fit: Fit | None,
    target_steps: Sequence[int],
) -> tuple[Coefficients, ...]:
    last = steps[rows - 1]
    targets = sorted(set(target_steps))
    if not targets:
        targets = sorted({max(last + 1, round(ratio * last)) for ratio in TARGETS})
    found: list[Coefficients] = []
    for name, gram in groups.items():
        found += describe_coefficients(
            name,
            gram,
            steps,
            rows,
            rank=2 if name == "model" else 1,
            fit=fit,
            targets=targets,
            until=max(targets[-1], steps[-1]),
        )
    return tuple(found)


def _memory(
    store: Store, history_steps: int | None, memory_limit: int | None, workers: int | None
) -> tuple[Plan, bool]:
    """Project what `extrapolate` holds, and say whether the limit allows for it."""
    # Of all fits the same; this one takes a single checkpoint.
    job = check_extrapolation(
        store,
        target_steps=[2 * store.steps[-1]],
        history_steps=history_steps,
        fit="linear-origin",
    )
    outline = Outline(store, Batch((job,)), 1, DEFAULT_ENTRY_CAPACITY)
    assembly = Assembly(store, store.manifest.base_files, prefix="", in_base_dtype=True)
    limit = memory_limit or planner.DEFAULT_LIMIT_BYTES
    here = planner.Capacity(
        processes=1,
        workers=machine.wanted_workers(workers),
        workers_fixed=workers is not None,
        reserved_bytes=NOMINAL_PROCESS_BYTES,
        memory_limit_bytes=limit,
    )
    try:
        return outline.plan([assembly], here, None)[0], True
    except MemoryLimitError:
        alone = replace(here, workers=1, workers_fixed=False, memory_limit_bytes=1 << 62)
        return outline.plan([assembly], alone, None)[0], False
