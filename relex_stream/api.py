"""What Python callers and the commands use; everything else is inside.

All functions take paths as ``str`` or ``Path`` and raise `RelexStreamError` for what the user can
mend. Sizes are bytes. `progress` is any object with the methods of `specs.Progress`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from relex_stream import analyzing as _analyzing
from relex_stream import backtesting as _backtesting
from relex_stream import build as _build
from relex_stream import exporting as _exporting
from relex_stream import verification as _verification
from relex_stream.models import RunOptions, make_models
from relex_stream.opened import OpenStore
from relex_stream.request import check_combination, check_extrapolation, check_reconstruction
from relex_stream.specs import Progress
from relex_stream.store import Store, StoreWriter
from relex_stream.store.records import FORMAT_VERSION
from relex_stream.summaries import (
    AnalyzeSummary,
    BacktestSummary,
    BuildSummary,
    DropSummary,
    ExportSummary,
    ModelsSummary,
    StepInfo,
    StoreInfo,
    VerifySummary,
)

AnyPath = str | os.PathLike[str]

__all__ = [
    "OpenStore",
    "RunArguments",
    "analyze",
    "backtest",
    "build_store",
    "combine",
    "drop",
    "export",
    "extrapolate",
    "info",
    "open_store",
    "reconstruct",
    "verify",
]


class RunArguments(TypedDict, total=False):
    """How models are made, which changes none of them but by rounding: keyword arguments.

    Attributes
    ----------
    base : path
        The base's directory, when it has moved.
    memory_limit, workers
        As in `build_store`.
    overwrite : bool
        Replace an output, if nothing was added to it since relex-stream wrote it.
    dry_run : bool
        Only plan.
    scheduler, local_cluster
        As in `build_store`; the machines see store, base and output. The output has the bits it
        would have without.
    devices : str
        What works on blocks: ``"cpu"``, ``"cuda"`` (all GPUs), ``"cuda:0,cuda:2"``, or ``"auto"``,
        the default: what is projected to be faster; `ModelsSummary.plan` says why. On a cluster,
        workers with the resource ``GPU`` use their own. Statistics made on a GPU differ by
        rounding.
    device_memory_limit : int
        Bytes to take of each GPU; default 0.8 of what is free.
    progress : Progress
        Any object with the methods of `specs.Progress`.
    """

    base: AnyPath | None
    memory_limit: int | None
    workers: int | None
    overwrite: bool
    dry_run: bool
    scheduler: AnyPath | None
    local_cluster: int | None
    devices: str
    device_memory_limit: int | None
    progress: Progress | None


def build_store(
    base: AnyPath,
    checkpoints: AnyPath,
    store: AnyPath,
    *,
    pattern: str | None = None,
    steps: str | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    include_base: bool = False,
    allow_nonfinite: bool = False,
    seed: int = 0,
    scheduler: AnyPath | None = None,
    local_cluster: int | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build a lossless delta store from checkpoints, or append new ones to it.

    Parameters
    ----------
    base : path
        Hugging Face model directory the run began from.
    checkpoints : path
        Directory of ``global_step_N/``, ``checkpoint-N/``, ``step_N/`` or ``iter_N/``.
    store : path
        The store, made if it is not there. Steps in it already are skipped.
    pattern : str, optional
        Other names of checkpoint directories, with ``{step}`` for the number.
    steps : str, optional
        ``"1:75"`` (75 included), ``"1:75:5"``, ``"1,5,10"`` or one number; default all.
    memory_limit : int, optional
        Bytes this process may hold; default 768 MiB or what is free.
    workers : int, optional
        Threads; default one per core, fewer if they do not fit in the memory limit.
    include_base : bool
        Keep the base's weights in the store too.
    allow_nonfinite : bool
        Store values that are not finite where the base's are, instead of refusing them. Such
        values count as 0 in every statistic.
    seed : int
        Seed of the sketches (new stores only).
    scheduler : str or path, optional
        Do the work on a dask.distributed cluster: the address of its scheduler
        (``"tcp://host:8786"``) or the path of its scheduler file. Every machine of it sees base,
        checkpoints and store under the same paths. `memory_limit` is then of each of its processes.
        See docs/clusters.md.
    local_cluster : int, optional
        Do the work in so many processes of this machine, started for it.

    Returns
    -------
    BuildSummary

    Raises
    ------
    SourceError, TrajectoryError
        If base or checkpoints cannot be used or do not belong together.
    StoreError
        If the store is locked, damaged or not a store.
    MemoryLimitError, OptionError
        If the arguments cannot be met. Whatever was committed before an error stays committed.
    ClusterError, MissingDependencyError
        If the cluster cannot be reached or does not do the work.
    """
    return _build.build(
        Path(base),
        Path(checkpoints),
        Path(store),
        pattern=pattern,
        steps=steps,
        memory_limit=memory_limit,
        workers=workers,
        include_base=include_base,
        allow_nonfinite=allow_nonfinite,
        seed=seed,
        scheduler=None if scheduler is None else os.fspath(scheduler),
        local_cluster=local_cluster,
        progress=progress,
    )


def open_store(path: AnyPath, *, base: AnyPath | None = None) -> OpenStore:
    """Open a store for reading.

    Parameters
    ----------
    path : path
    base : path, optional
        The base's directory, when it is neither in the store nor where it was.

    Raises
    ------
    StoreError
        If there is no store of a known format.
    """
    return OpenStore(Path(path), None if base is None else Path(base))


def extrapolate(
    store: AnyPath,
    out: AnyPath,
    *,
    target_steps: Sequence[int],
    history_steps: int | None = None,
    rank: int | Sequence[int] = 1,
    svd: str = "randomized",
    power_iterations: int = 1,
    fit: str = "linear",
    window: int | None = None,
    refit_every: int | None = None,
    damping: float | str | Sequence[float | str] = 1.0,
    anchor: str | Sequence[str] = "base",
    group_by: str = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
    compat: str | None = None,
    step_scale: float = 1.0,
    **run: Unpack[RunArguments],
) -> ModelsSummary:
    """Write the models that fits in a rank-r subspace of the stored checkpoints predict (RELEX).

    Every combination of target, rank, damping and anchor is a model; all are written in the same
    passes.

    Parameters
    ----------
    store : path
    out : path
        One model: its directory. Several: a directory of directories such as
        ``step_500/rank_1/damping_0.3/anchor_base``, without the levels that have one value, and an
        index, ``relex_stream.json``. Appears only when complete.
    target_steps : sequence of int
    history_steps : int, optional
        Use checkpoints up to this step; default all.
    rank : int or sequence of int
        Components of the subspace.
    svd : str
        ``"randomized"`` or ``"exact"``.
    power_iterations : int
        Passes over the store for the randomized route.
    fit : str
        ``"linear"``; ``"linear-origin"``, a line that is 0 at the base; ``"polynomial:2"`` (or
        another degree up to 9); ``"sinusoid"``. Over the real step numbers.
    window : int, optional
        Fit through the last so many checkpoints; the subspace is still that of all.
    refit_every : int, optional
        Predict so many steps, then fit again through as many of the last coefficients, observed or
        predicted, and so on.
    damping : float or "auto", or sequence of them
        What the predicted delta is multiplied by, or the predicted change with anchor ``"latest"``.
        ``"auto"``, with that anchor: what would have been best for forecasting the end of the
        history, as far ahead, from its beginning.
    anchor : str or sequence of str
        ``"base"``: base + predicted delta. ``"latest"``: last checkpoint + predicted change since
        it, which keeps what lies outside the subspace.
    group_by : str
        What has a subspace of its own: each ``"tensor"``, ``"run"`` of 1 Mi weights of a tensor,
        ``"layer"``, ``"module"`` (the same tensor of all layers), or the ``"model"``.
    include, exclude : sequence of str
        Patterns of tensor names, as in the shell. Tensors that match none of `include` (if there
        are any), or one of `exclude`, are not predicted.
    excluded_from : str
        Those are copied from the ``"base"`` or from the ``"latest"`` checkpoint of the history.
    compat : str, optional
        ``"relex"``: as the scripts of its authors do it, with deltas in half precision and a fit
        over rows 0 to T - 1.
    step_scale : float
        With `compat`: rows per step of the targets.
    **run
        How it is run; see `RunArguments`.

    Returns
    -------
    ModelsSummary

    Raises
    ------
    SourceError
        If the base is missing or not the one the store was built over.
    CorruptionError
        If bytes of the store do not match their checksums.
    FitError, OptionError, MemoryLimitError, OutputError
        If the arguments cannot be met; the output is then absent or as it was.
    DeviceError
        If there is no such device.
    ClusterError, MissingDependencyError
        As in `build_store`.
    """
    ask = partial(
        check_extrapolation,
        target_steps=target_steps,
        history_steps=history_steps,
        rank=rank,
        svd=svd,
        power_iterations=power_iterations,
        fit=fit,
        window=window,
        refit_every=refit_every,
        damping=damping,
        anchor=anchor,
        group_by=group_by,
        include=include,
        exclude=exclude,
        excluded_from=excluded_from,
        compat=compat,
        step_scale=step_scale,
    )
    return make_models(Path(store), Path(out), ask, RunOptions(**run))


def reconstruct(
    store: AnyPath,
    out: AnyPath,
    *,
    steps: Sequence[int],
    history_steps: int | None = None,
    rank: int | Sequence[int] = 1,
    svd: str = "randomized",
    power_iterations: int = 1,
    fitted: bool = False,
    fit: str = "linear",
    window: int | None = None,
    group_by: str = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
    **run: Unpack[RunArguments],
) -> ModelsSummary:
    """Write stored steps projected into their rank-r subspace and back (RELEX, finding 1).

    Parameters
    ----------
    store, out : path
        As in `extrapolate`; several models lie in ``step_N/rank_R``.
    steps : sequence of int
        Steps of the history.
    fitted : bool
        The point of the fitted curve at each step, instead of the step's own coefficients.
    history_steps, rank, svd, power_iterations, fit, window, group_by
        As in `extrapolate`.
    include, exclude, excluded_from
        As in `extrapolate`.
    **run
        How it is run; see `RunArguments`.

    Returns
    -------
    ModelsSummary

    Raises
    ------
    RelexStreamError
        As in `extrapolate`.
    """
    ask = partial(
        check_reconstruction,
        steps=steps,
        history_steps=history_steps,
        rank=rank,
        svd=svd,
        power_iterations=power_iterations,
        fitted=fitted,
        fit=fit,
        window=window,
        group_by=group_by,
        include=include,
        exclude=exclude,
        excluded_from=excluded_from,
    )
    return make_models(Path(store), Path(out), ask, RunOptions(**run))


def combine(
    store: AnyPath,
    out: AnyPath,
    *,
    recipes: Sequence[str] = (),
    weights: Sequence[str] = (),
    history_steps: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
    **run: Unpack[RunArguments],
) -> ModelsSummary:
    """Write weighted sums of stored steps: published recipes, or weights given.

    Parameters
    ----------
    store, out : path
        As in `extrapolate`; several models lie in ``recipe_NAME``.
    recipes : sequence of str
        ``"two-point:target=500"`` (RLVR-Linearity, arXiv 2601.04537), ``"expo:alpha=0.3"``
        (arXiv 2404.16792), ``"first-update:scale=50"``, ``"ema:decay=0.9"``, ``"lawa:last=5"``
        (arXiv 2306.03241); docs/cli.md has all of their settings.
    weights : sequence of str
        ``"100=0.5,200=0.75"``: the weight of each step; the base has what is left of 1.
    history_steps : int, optional
        Recipes see checkpoints up to this step; default all.
    include, exclude, excluded_from
        As in `extrapolate`.
    **run
        How it is run; see `RunArguments`.

    Returns
    -------
    ModelsSummary
        ``outputs[i].what["weights"]`` are the effective weights.

    Raises
    ------
    RelexStreamError
        As in `extrapolate`.
    """
    ask = partial(
        check_combination,
        recipes=recipes,
        weights=weights,
        history_steps=history_steps,
        include=include,
        exclude=exclude,
        excluded_from=excluded_from,
    )
    return make_models(Path(store), Path(out), ask, RunOptions(**run))


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
    return _analyzing.analyze_store(
        Path(store),
        history_steps=history_steps,
        rank=rank,
        fit=fit,
        window=window,
        exact=exact,
        base=None if base is None else Path(base),
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
    anchor: str | Sequence[str] = ("base", "latest"),
    damping: float | Sequence[float] = (0.1, 0.3, 0.5, 1.0),
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
    grid = _backtesting.Grid(
        history_steps=history_steps,
        target_steps=target_steps,
        ranks=_several(rank),
        fits=_several(fit),
        windows=_several(window) or (None,),
        anchors=_several(anchor),
        dampings=_several(damping),
    )
    return _backtesting.backtest_store(
        Path(store),
        grid,
        exact=exact,
        base=None if base is None else Path(base),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def _several(value: Any) -> Sequence[Any]:
    """Return several values as they are, one as a sequence of it."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def export(
    store: AnyPath,
    out: AnyPath,
    *,
    step: int,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a stored checkpoint as it was: every ingested file, byte for byte.

    Parameters
    ----------
    store, out : path
    step : int
        A committed step, or 0 for the base.
    base : path, optional
        The base's directory, when it has moved.
    memory_limit, workers
        As in `build_store`.

    Returns
    -------
    ExportSummary
        With the SHA-256 of each file. The CRC-32C taken at ingest is checked block by block.

    Raises
    ------
    CorruptionError, SourceError, OptionError, OutputError
        As in `extrapolate`; nothing is written then.
    """
    return _exporting.export_step(
        Path(store),
        Path(out),
        step=step,
        base=None if base is None else Path(base),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def info(store: AnyPath) -> StoreInfo:
    """Say what a store holds.

    Raises
    ------
    StoreError
        If there is no store of a known format, or its records are damaged.
    """
    opened = Store(Path(store))
    manifest = opened.manifest
    tracked = [tensor for tensor in manifest.tensors if tensor.kind == "tracked"]
    weights = sum(tensor.elements for tensor in tracked)
    steps = []
    for row, step in enumerate(opened.steps):
        commit = opened.commit(row)
        changed = int(commit.changed.sum(dtype=np.int64))
        steps.append(
            StepInfo(
                step=step,
                changed_weights=changed,
                changed_share=changed / weights if weights else 0.0,
                frame_bytes=int(commit.frame_bytes.sum(dtype=np.int64)),
                record_bytes=opened.record_path(opened.head.commits[row]).stat().st_size,
                source_bytes=commit.source_bytes,
            )
        )
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in tracked:
        count, size = dtypes.get(tensor.dtype.code, (0, 0))
        dtypes[tensor.dtype.code] = (count + 1, size + tensor.elements)
    bytes_in = sum(step.source_bytes for step in steps)
    store_bytes = opened.stored_bytes()
    base_bytes = int(manifest.base_frame_bytes.sum(dtype=np.int64))
    stored = store_bytes - base_bytes
    changed_total = sum(step.changed_weights for step in steps)
    return StoreInfo(
        store=str(store),
        format_version=FORMAT_VERSION,
        steps=tuple(steps),
        tensors=len(manifest.tensors),
        weights=weights,
        dtypes=dtypes,
        constant_tensors=sum(tensor.kind == "constant" for tensor in manifest.tensors),
        seed=manifest.seed,
        base=manifest.base_hint,
        base_included=manifest.base_included,
        bytes_in=bytes_in,
        store_bytes=store_bytes,
        base_bytes_stored=base_bytes,
        ratio=bytes_in / stored if steps else 0.0,
        bits_per_changed_weight=(
            8 * sum(step.frame_bytes for step in steps) / changed_total if changed_total else 0.0
        ),
    )


def verify(
    store: AnyPath,
    *,
    base: AnyPath | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifySummary:
    """Check every checksum of a store.

    Parameters
    ----------
    store : path
    base : path, optional
        Also check that this directory holds the base the store was built over.
    workers
        As in `build_store`.

    Returns
    -------
    VerifySummary
        ``problems`` names each damaged record, blob or frame (tensor, step, block).

    Raises
    ------
    StoreError
        If there is no store, or HEAD or the manifest is damaged.
    """
    return _verification.verify_store(
        Path(store),
        base=None if base is None else Path(base),
        workers=workers,
        progress=progress,
    )


def drop(store: AnyPath, *, after: int) -> DropSummary:
    """Take back the steps after `after`.

    Raises
    ------
    StoreError
        If there is no store, or another process writes to it.
    """
    Store(Path(store))  # refuses what is not a store before anything is made there
    with StoreWriter(Path(store)) as writer:
        assert writer.store is not None
        before = writer.store.stored_bytes()
        dropped = writer.drop_after(after)
        return DropSummary(
            store=str(store),
            steps_dropped=dropped,
            steps_left=writer.store.steps,
            bytes_freed=before - writer.store.stored_bytes(),
        )
