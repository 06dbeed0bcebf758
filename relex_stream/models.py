"""Models from a store: statistics, the weights of each step, one weighted sum per block.

Every model is the base plus a linear combination of stored changes in each tensor, ``theta_0 +
M^T w`` (docs/design.md); a method (`methods`) says which w. All models of a job are written in the
same passes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import cards, machine, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights, base_directory, open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.blocks import float_pairs
from relex_stream.devices import parse_devices, wants_gpu_processes
from relex_stream.errors import DeviceError, RelexStreamWarning
from relex_stream.fit import Forecast
from relex_stream.graph import Executor, open_executor
from relex_stream.methods import product_paths
from relex_stream.model_writes import Mix, Source, pieces, write_blocks
from relex_stream.nested import with_dampings
from relex_stream.offload import Offload
from relex_stream.outline import Outline, output_passes
from relex_stream.paths import refuse_inside
from relex_stream.request import Job
from relex_stream.sketch import Subspace, cumulate_transposed
from relex_stream.sources import CheckpointReader
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.subspaces import (
    changed_tensors,
    fetching_first_blocks,
    predicted_tensors,
    solve_subspaces,
    subspace_name,
)
from relex_stream.summaries import ModelsSummary, Output, Plan, SubspaceFigures
from relex_stream.warmup import Pairs, warm_up_extrapolation, warm_up_half_deltas
from relex_stream.writer import MARKER, OutputDirectory

Float64 = NDArray[np.float64]

_OWN_FILES = ("README.md", MARKER)

_GROUPS_AT_ONCE = 1024


@dataclass(frozen=True)
class RunOptions:
    """How a job is run, which changes none of what it makes.

    Attributes
    ----------
    entry_capacity : int
        Changes of a block that a worker keeps between sweeps.
    base, memory_limit, workers, overwrite, dry_run, scheduler, local_cluster, devices, \
    device_memory_limit, progress
        As in `api.extrapolate`.
    """

    base: str | os.PathLike[str] | None = None
    memory_limit: int | None = None
    workers: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    scheduler: str | os.PathLike[str] | None = None
    local_cluster: int | None = None
    devices: str = "auto"
    device_memory_limit: int | None = None
    progress: Progress | None = None
    entry_capacity: int = DEFAULT_ENTRY_CAPACITY

    @property
    def on_cluster(self) -> bool:
        """Whether other processes do the work."""
        return self.scheduler is not None or self.local_cluster is not None


def make_models(
    store_path: Path, out: Path, ask: Callable[[Store], Job], options: RunOptions
) -> ModelsSummary:
    """Make the models of a job.

    Parameters
    ----------
    store_path, out : Path
    ask : callable
        Returns the job, or raises what is wrong with it.
    options : RunOptions
    """
    started = time.monotonic()
    progress = options.progress or NoProgress()
    if options.workers is not None:
        machine.wanted_workers(options.workers)
    base = None if options.base is None else Path(options.base)
    if options.on_cluster:
        # Workers have working directories of their own.
        store_path, base = store_path.absolute(), base and base.absolute()
    store = Store(store_path)
    job = with_dampings(
        store,
        ask(store),
        base=base,
        memory_limit=options.memory_limit,
        progress=progress,
    )
    _warn_inside(job)
    refuse_inside(out, store.path, "OUT", "STORE")
    directory = base_directory(store, base)
    if directory is not None:
        refuse_inside(out, directory, "OUT", "the base")
    prefixes = [path + "/" if path else "" for path in product_paths(job.method.products)]
    assemblies = [
        Assembly(
            store,
            store.manifest.base_files,
            prefix=prefix,
            in_base_dtype=True,
            replaced=_OWN_FILES,
        )
        for prefix in prefixes
    ]
    output = OutputDirectory(out, overwrite=options.overwrite)
    output.check(sum(assembly.nbytes for assembly in assemblies))
    figures: list[SubspaceFigures] = []
    with (
        CheckpointReader() as reader,
        open_executor(
            scheduler=None if options.scheduler is None else os.fspath(options.scheduler),
            local_cluster=options.local_cluster,
            local_gpus=wants_gpu_processes(parse_devices(options.devices)),
            workers=options.workers,
            memory_limit=options.memory_limit,
            progress=progress,
        ) as executor,
    ):
        weights_of_base = open_base(store, base, reader)
        outline = Outline(store, job, len(assemblies), options.entry_capacity)
        offload, devices_reason = outline.choose_devices(
            options.devices, options.device_memory_limit, executor.places()
        )
        # The disk has something to do while kernels are loaded.
        fetching: AbstractContextManager[Any] = nullcontext()
        if executor.is_local and not options.dry_run and job.subspaces is not None:
            fetching = fetching_first_blocks(store, weights_of_base, job.subspaces)
        with fetching:
            pairs = float_pairs(store.manifest.tensors)
            capacity = executor.prepare(_warm_up, (pairs, offload, job.half_deltas), progress)
        executor.check_sees([store.path, *([directory] if directory is not None else [])])
        plan, outputs_at_once = outline.plan(assemblies, capacity, offload)
        plan = replace(
            plan,
            devices=offload.plan if offload is not None else None,
            devices_reason=devices_reason,
        )
        if idle := planner.idle_workers(plan, capacity):
            progress.note(idle)
        if not options.dry_run:
            with output:
                executor.check_sees([output.filler.directory])
                run = _Run(
                    store, weights_of_base, job, options, executor, plan.workers, progress, offload
                )
                subspaces = run.subspaces()
                figures = _figures(store, job, subspaces)
                mixes = _mixes(store, job, subspaces)
                del subspaces
                for assembly in assemblies:
                    assembly.begin(output)
                run.write(output, assemblies, mixes, outputs_at_once)
                _write_documents(store, job, prefixes, figures, output)
                output.finish()
        peak_bytes = executor.peak_bytes()
    return _summary(
        store,
        [str(out / prefix.rstrip("/")) for prefix in prefixes],
        job,
        plan,
        figures,
        dry_run=options.dry_run,
        peak_bytes=peak_bytes,
        elapsed_s=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Run:
    """Stages of a job, and what they run on."""

    store: Store
    base: BaseWeights
    job: Job
    options: RunOptions
    executor: Executor
    workers: int
    progress: Progress
    offload: Offload | None

    def subspaces(self) -> dict[str, Subspace]:
        """Return the subspace of every group, by name; none if the weights need none."""
        if self.job.subspaces is None:
            return {}
        return solve_subspaces(
            self.store,
            self.base,
            self.job.subspaces,
            executor=self.executor,
            workers=self.workers,
            progress=self.progress,
            entry_capacity=self.options.entry_capacity,
            offload=self.offload,
        )

    def write(
        self,
        output: OutputDirectory,
        assemblies: Sequence[Assembly],
        mixes: Mapping[int, Mix],
        at_once: int,
    ) -> None:
        """Write the blocks of all models, so many models in a pass."""
        source = Source(
            self.store,
            self.base,
            self.job.rows,
            self.options.entry_capacity,
            self.job.half_deltas,
        )
        for (first, stop), name in output_passes(len(assemblies), at_once):
            write_blocks(
                source,
                output,
                assemblies[first:stop],
                {column: mix.part(first, stop) for column, mix in mixes.items()},
                group_by=self.job.group_by,
                name=name,
                executor=self.executor,
                workers=self.workers,
                progress=self.progress,
                offload=self.offload,
            )


def _warn_inside(job: Job) -> None:
    last = job.method.history[-1]
    targets = {product.facts.get("target_step", math.inf) for product in job.method.products}
    for target in sorted(targets):
        if target <= last:
            warnings.warn(
                f"target step {target} lies inside the history (up to step {last}): "
                "the output is the fitted line there, not the stored checkpoint "
                "(relex-stream export gives that)",
                RelexStreamWarning,
                stacklevel=3,
            )


# --- from subspaces to weights -------------------------------------------------------------------


def _figures(store: Store, job: Job, subspaces: Mapping[str, Subspace]) -> list[SubspaceFigures]:
    recorded = _recorded_squares(store, job) if subspaces else {}
    r2 = _r_squared_of_all(job.method.forecast, subspaces.values())
    figures = []
    for name, subspace in subspaces.items():
        total = recorded[name] if subspace.total_sq is None else subspace.total_sq
        singular_values = subspace.singular_values.tolist()
        explained = np.cumsum(subspace.singular_values**2).tolist()
        figures.append(
            SubspaceFigures(
                name=name,
                singular_values=tuple(singular_values),
                explained_variance=tuple(
                    min(1.0, each / total) if total > 0 else 1.0 for each in explained
                ),
                r2=tuple(islice(r2, len(singular_values))),
            )
        )
    return sorted(figures, key=lambda figure: figure.name)


def _recorded_squares(store: Store, job: Job) -> dict[str, float]:
    """Return ``|M|^2`` of each group of whole tensors, from the store's records."""
    assert job.subspaces is not None
    by_tensor = store.delta_sq[: job.rows].sum(axis=0).tolist()
    squares: dict[str, list[float]] = {}
    for tensor in predicted_tensors(store, job.subspaces):
        name = subspace_name(pieces(tensor, "tensor")[0][0], job.group_by)
        squares.setdefault(name, []).append(by_tensor[tensor.index])
    return {name: math.fsum(each) for name, each in squares.items()}


def _r_squared_of_all(forecast: Forecast | None, subspaces: Iterable[Subspace]) -> Iterator[float]:
    """Yield the R2 of each column of each group."""
    if forecast is None:
        return
    # Columns of many groups at once, one behind the other: they may be very many.
    left = iter(subspaces)
    while some := list(islice(left, _GROUPS_AT_ONCE)):
        columns = [subspace.vectors * subspace.singular_values for subspace in some]
        yield from forecast.r_squared(np.concatenate(columns, axis=1)).tolist()


def _mixes(store: Store, job: Job, subspaces: Mapping[str, Subspace]) -> dict[int, Mix]:
    """Return how the outputs of each piece come about, by the column of its first block."""
    method, products = job.method, len(job.method.products)
    row_after = {step: row + 1 for row, step in enumerate(method.history)}
    row_after[0] = 0
    shared: dict[str, Float64] = {
        name: cumulate_transposed(method.weights(subspace.vectors))
        for name, subspace in subspaces.items()
        if subspace.singular_values.size
    }
    if job.subspaces is None:
        alike = cumulate_transposed(method.weights(np.zeros((job.rows, 0))))
    nothing = np.zeros((job.rows, products))
    mixes: dict[int, Mix] = {}
    for tensor in changed_tensors(store, job.rows):
        copies = {number: row_after[step] for number, step in method.copies(tensor.name).items()}
        if not job.selection.takes(tensor.name):
            rows = job.rows if job.selection.excluded_from == "latest" else 0
            copies = dict.fromkeys(range(products), rows)
        for blocks in pieces(tensor, job.group_by):
            if job.subspaces is None:
                changes: Float64 | None = alike
            else:
                changes = shared.get(subspace_name(blocks[0], job.group_by))
            if copies:
                changes = nothing.copy() if changes is None else changes.copy()
                changes[:, list(copies)] = 0.0
            if changes is not None:
                mixes[blocks[0].column] = Mix(changes, tuple(copies.items()))
    forecast = method.forecast
    if forecast is not None and forecast.unrefined:
        warnings.warn(
            f"the frequency of {forecast.unrefined} sinusoids could not be refined, and is that of "
            "the Fourier transform's peak: those coefficients do not oscillate; --fit linear "
            "describes them as well",
            RelexStreamWarning,
            stacklevel=3,
        )
    return mixes


# --- documents -----------------------------------------------------------------------------------


def _write_documents(
    store: Store,
    job: Job,
    prefixes: Sequence[str],
    figures: Sequence[SubspaceFigures],
    output: OutputDirectory,
) -> None:
    outputs = list(zip(job.method.products, prefixes, strict=True))
    for product, prefix in outputs:
        explained, r2 = _medians(figures, product.facts.get("rank"))
        card = cards.model_card(
            store,
            settings=job.settings,
            facts=product.facts,
            median_explained_variance=explained,
            median_r2=r2,
        )
        output.write_file(prefix + "README.md", card)
    for product, prefix in outputs:
        written = [name.removeprefix(prefix) for name in output.files if name.startswith(prefix)]
        record = cards.record(
            store,
            settings=job.settings,
            facts=product.facts,
            figures=figures,
            files=[*written, MARKER],
        )
        output.write_file(prefix + MARKER, record)
    if len(outputs) > 1:
        index = {
            "outputs": [
                {"path": prefix.rstrip("/"), **product.facts} for product, prefix in outputs
            ],
            **job.settings,
            "files": [*output.files, MARKER],
        }
        output.write_file(MARKER, (json.dumps(index, indent=1) + "\n").encode())


def _medians(
    figures: Sequence[SubspaceFigures], rank: int | None
) -> tuple[float | None, float | None]:
    explained = [figure.explained_of(rank) for figure in figures]
    r2 = [figure.r2[0] for figure in figures if figure.r2]
    return (
        statistics.median(explained) if explained else None,
        statistics.median(r2) if r2 else None,
    )


def _summary(
    store: Store,
    paths: Sequence[str],
    job: Job,
    plan: Plan,
    figures: Sequence[SubspaceFigures],
    *,
    dry_run: bool,
    peak_bytes: int,
    elapsed_s: float,
) -> ModelsSummary:
    last = job.method.history[-1]
    products = job.method.products
    explained, r2 = _medians(figures, max((p.facts.get("rank", 1) for p in products), default=1))
    changed = changed_tensors(store, job.rows)
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    return ModelsSummary(
        store=str(store.path),
        dry_run=dry_run,
        outputs=tuple(
            Output(path, dict(product.facts), product.facts.get("target_step", math.inf) <= last)
            for product, path in zip(products, paths, strict=True)
        ),
        history=job.method.history,
        settings={name: value for name, value in job.settings.items() if name != "history"},
        tensors=len(store.manifest.tensors),
        unchanged_tensors=len(tracked) - len(changed),
        excluded_tensors=sum(not job.selection.takes(tensor.name) for tensor in tracked),
        median_explained_variance=explained,
        median_r2=r2,
        bytes_read=sum(stage.read_bytes for stage in plan.stages),
        bytes_written=sum(stage.write_bytes for stage in plan.stages),
        peak_memory_bytes=peak_bytes,
        elapsed_s=elapsed_s,
        plan=plan,
        figures=tuple(figures),
    )


def _warm_up(what: tuple[Pairs, Offload | None, bool], progress: Progress) -> None:
    """Prepare a process: kernels, and the device if it has one."""
    pairs, offload, half_deltas = what
    warm_up_extrapolation(pairs, progress)
    if half_deltas:
        warm_up_half_deltas(pairs)
    if offload is not None:
        # A worker of a cluster may have none; it gets no such tasks.
        with suppress(DeviceError):
            offload.open()
