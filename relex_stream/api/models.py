"""Models from a store: predicted, projected, combined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from relex_stream.api.arguments import AnyPath, RunArguments, base_path
from relex_stream.grid import Entry, jobs_of, read_grid
from relex_stream.locations import local_directory, location
from relex_stream.models import RunOptions, make_models
from relex_stream.request import (
    Job,
    check_combination,
    check_extrapolation,
    check_reconstruction,
)
from relex_stream.store import Store
from relex_stream.summaries import ModelsSummary


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
        ``"auto"``, with that anchor: chosen by what forecasts of the end of the history
        from its earlier steps were worth (`skill.chosen_damping`).
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

    def ask(opened: Store) -> list[Job]:
        job = check_extrapolation(
            opened,
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
        return [job]

    return make_models(location(store), local_directory(out, "OUT"), ask, _options(run))


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

    def ask(opened: Store) -> list[Job]:
        job = check_reconstruction(
            opened,
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
        return [job]

    return make_models(location(store), local_directory(out, "OUT"), ask, _options(run))


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
        (arXiv 2306.03241); docs/commands/combine.md has all of their
        settings.
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

    def ask(opened: Store) -> list[Job]:
        job = check_combination(
            opened,
            recipes=recipes,
            weights=weights,
            history_steps=history_steps,
            include=include,
            exclude=exclude,
            excluded_from=excluded_from,
        )
        return [job]

    return make_models(location(store), local_directory(out, "OUT"), ask, _options(run))


def sweep(
    store: AnyPath,
    out: AnyPath,
    *,
    grid: str | os.PathLike[str] | Sequence[Entry],
    **run: Unpack[RunArguments],
) -> ModelsSummary:
    """Write the models of a grid of settings, with one index.

    Models with the same history and subspaces share their statistics and are written in the same
    passes; all appear together.

    Parameters
    ----------
    store : path
    out : path
        A directory of directories such as ``fit_linear/window_20/step_500/damping_0.3``, without
        the levels that have one value, and an index, ``relex_stream.json``.
    grid : path or sequence of mapping
        Entries, or a YAML file that has them. An entry's ``method`` is ``"extrapolate"``, which is
        the default, ``"reconstruct"`` or ``"combine"``; its other keys are the options of that
        command, with a value or a list of values: every combination is made. ``name`` tells apart
        entries that differ in nothing but `include` and `exclude`.
    **run
        How it is run; see `RunArguments`.

    Returns
    -------
    ModelsSummary
        ``settings`` has what all outputs have in common, each output's ``what`` the rest.

    Raises
    ------
    RelexStreamError
        As in `extrapolate`, naming the entry.
    """
    entries = read_grid(Path(grid)) if isinstance(grid, str | os.PathLike) else list(grid)

    def ask(opened: Store) -> list[Job]:
        return jobs_of(opened, entries)

    return make_models(location(store), local_directory(out, "OUT"), ask, _options(run))


def _options(run: RunArguments) -> RunOptions:
    options = RunOptions(**run)
    return replace(options, base=base_path(options.base, options.progress))
