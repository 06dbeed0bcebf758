"""What a stored trajectory is like, and what forecasts from it are worth."""

from __future__ import annotations

from collections.abc import Sequence

from relex_stream.analyzing import analyze_store
from relex_stream.api.arguments import AnyPath, base_path, optional_path, several
from relex_stream.backtesting import ANCHORS_TESTED, DAMPINGS_TESTED, Grid, backtest_store
from relex_stream.locations import local_directory, location
from relex_stream.specs import Progress
from relex_stream.summaries import AnalyzeSummary, BacktestSummary, ReportSummary


def analyze(
    store: AnyPath,
    *,
    history_steps: int | None = None,
    rank: int = 3,
    fit: str = "linear",
    window: int | None = None,
    exact: bool = False,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> AnalyzeSummary:
    """Say how low-rank and how straight a stored trajectory is, down to single tensors.

    Parameters
    ----------
    store : path
    history_steps : int, optional
        The subspace is that of the stored steps up to this one, and the later ones show what it is
        worth; default all.
    rank : int
        Components to tell of.
    fit, window
        As in `extrapolate`.
    exact : bool
        From the weights; else from the sketches and norms in the store, with the standard error
        beside each figure. Tensors under 65,536 weights, which have no sketch, are exact anyway.
    base : path, optional
        The base's directory, when it has moved.
    memory_limit, workers
        As in `build_store`.

    Returns
    -------
    AnalyzeSummary

    Raises
    ------
    FitError, OptionError, MemoryLimitError
        If the arguments cannot be met.
    StoreError, CorruptionError, SourceError
        As in `extrapolate`.
    """
    return analyze_store(
        location(store),
        history_steps=history_steps,
        rank=rank,
        fit=fit,
        window=window,
        exact=exact,
        base=base_path(base, progress),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def backtest(
    store: AnyPath,
    *,
    history_steps: Sequence[int] = (),
    target_steps: Sequence[int] = (),
    rank: int | Sequence[int] = 1,
    fit: str | Sequence[str] = "linear",
    window: int | Sequence[int] = (),
    anchor: str | Sequence[str] = ANCHORS_TESTED,
    damping: float | Sequence[float] = DAMPINGS_TESTED,
    group_by: str = "tensor",
    exact: bool = False,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> BacktestSummary:
    """Say what forecasts from a store's first steps would have been worth at its later ones.

    Each combination of history, target, rank, fit, window, anchor and damping is a forecast of a
    stored step. Its skill, ``1 - |predicted - true|^2 / |last observed - true|^2`` over the whole
    model, is above 0 where it is nearer to what came than the last observed step.

    Parameters
    ----------
    store : path
    history_steps : sequence of int
        Where histories end; default a quarter, a third, a half and two thirds of the last step.
    target_steps : sequence of int
        Stored steps to forecast; default those nearest to 1.25, 1.5, 2, 3, 4, 6 and 8 times the
        last step of the history, and the last one.
    rank, fit, anchor, damping
        As in `extrapolate`.
    window : int or sequence of int
        As in `extrapolate`; none: all.
    group_by : str
        As in `extrapolate`, but for ``"run"``.
    exact, base, memory_limit, workers
        As in `analyze`.

    Returns
    -------
    BacktestSummary

    Raises
    ------
    FitError, OptionError, MemoryLimitError
        If the arguments cannot be met.
    StoreError, CorruptionError, SourceError
        As in `extrapolate`.
    """
    grid = Grid(
        history_steps=history_steps,
        target_steps=target_steps,
        ranks=several(rank),
        fits=several(fit),
        windows=several(window) or (None,),
        anchors=several(anchor),
        dampings=several(damping),
        group_by=group_by,
    )
    return backtest_store(
        location(store),
        grid,
        exact=exact,
        base=base_path(base, progress),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def report(
    store: AnyPath,
    out: AnyPath,
    *,
    history_steps: int | None = None,
    target_steps: Sequence[int] = (),
    rank: int = 10,
    fit: str = "linear",
    window: int | None = None,
    exact: bool = False,
    title: str | None = None,
    pictures: AnyPath | None = None,
    picture_format: str | Sequence[str] = "png",
    csv: AnyPath | None = None,
    overwrite: bool = False,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ReportSummary:
    """Write a page of HTML about a store that needs nothing but itself, from one look at it.

    What `analyze` finds, and what `backtest` makes of this fit with rank 1, drawn and in figures.
    The same store gives the same page, byte for byte, with the same versions of this package and
    of matplotlib. Where there are too few steps for a part, it says so.

    Parameters
    ----------
    store : path
    out : path
        The page. Appears only when complete, after the other files.
    history_steps : int, optional
        The subspace and the fit are those of the stored steps up to this one; default all.
    target_steps : sequence of int
        Steps to forecast coefficients for; default 1.5 and 2 times the last step of the history.
    rank : int
        Components to tell of; fewer where the history has fewer checkpoints.
    fit, window
        As in `extrapolate`. A history that is too short for the fit has none on the page.
    exact : bool
        As in `analyze`.
    title : str, optional
        Heading; default the store's name.
    pictures : path, optional
        A directory, made if need be, for each chart as a file.
    picture_format : str or sequence of str
        ``"png"`` or ``"svg"``.
    csv : path, optional
        A directory, made if need be, for all numbers as CSV tables.
    overwrite : bool
        Replace files that are there.
    base, memory_limit, workers
        As in `build_store`; the limit and the number are also those that `extrapolate` is
        projected with.

    Returns
    -------
    ReportSummary

    Raises
    ------
    FitError, OptionError, MemoryLimitError, OutputError
        If the arguments cannot be met.
    StoreError, CorruptionError, SourceError
        As in `extrapolate`.
    """
    # What draws takes half a second to import, and no other function needs it.
    from relex_stream.reporting.making import Outputs, make_report

    outputs = Outputs(
        page=local_directory(out, "OUT"),
        pictures=optional_path(pictures),
        picture_formats=several(picture_format),
        tables=optional_path(csv),
        overwrite=overwrite,
    )
    return make_report(
        location(store),
        outputs,
        history_steps=history_steps,
        target_steps=target_steps,
        rank=rank,
        fit=fit,
        window=window,
        exact=exact,
        title=title,
        base=base_path(base, progress),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )
