"""Models from a store: statistics, the weights of each step, one weighted sum per block.

Every model is the base plus a linear combination of stored changes in each tensor, ``theta_0 +
M^T w`` (docs/design.md); a method (`methods`) says which w. Models with the
same statistics are written in the same passes; all of a command appear together.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relex_stream import machine, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights, base_directory, open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.blocks import float_pairs
from relex_stream.devices import parse_devices, wants_gpu_processes
from relex_stream.documents import OWN_FILES, Made, common_settings, write_index
from relex_stream.errors import DeviceError, RelexStreamWarning
from relex_stream.graph import Executor, open_executor
from relex_stream.locations import Location, Url, location
from relex_stream.methods import product_paths
from relex_stream.mixing import figures_of, medians, mixes_of
from relex_stream.model_writes import Mix, Source, write_blocks
from relex_stream.nested import with_dampings
from relex_stream.offload import Offload
from relex_stream.outline import Outline, output_passes
from relex_stream.paths import refuse_inside
from relex_stream.request import Batch, Job, batches_of
from relex_stream.sketch import Subspace
from relex_stream.sources import CheckpointReader
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.subspaces import changed_tensors, fetching_first_blocks, solve_subspaces
from relex_stream.summaries import ModelsSummary, Output, Plan
from relex_stream.warmup import Pairs, warm_up_extrapolation, warm_up_half_deltas
from relex_stream.writer import OutputDirectory


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

    base: str | os.PathLike[str] | Url | None = None
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
    store_path: Location, out: Path, ask: Callable[[Store], Sequence[Job]], options: RunOptions
) -> ModelsSummary:
    """Make the models of some jobs.

    Parameters
    ----------
    store_path : Path or Url
    out : Path
    ask : callable
        Returns the jobs, or raises what is wrong with them.
    options : RunOptions
    """
    started = time.monotonic()
    progress = options.progress or NoProgress()
    if options.workers is not None:
        machine.wanted_workers(options.workers)
    base = None if options.base is None else location(options.base)
    if options.on_cluster:
        # Workers have working directories of their own.
        store_path, base = store_path.absolute(), base and base.absolute()
    store = Store(store_path)
    jobs = with_dampings(
        store, ask(store), base=base, memory_limit=options.memory_limit, progress=progress
    )
    _warn_inside(jobs)
    batches = batches_of(jobs)
    refuse_inside(out, store.path, "OUT", "STORE")
    directory = base_directory(store, base)
    if directory is not None:
        refuse_inside(out, directory, "OUT", "the base")
    paths = product_paths([product for batch in batches for product in batch.products])
    left = iter(path + "/" if path else "" for path in paths)
    prefixes = [[next(left) for _ in batch.products] for batch in batches]
    assemblies = [[_assembly(store, prefix) for prefix in each] for each in prefixes]
    output = OutputDirectory(out, overwrite=options.overwrite)
    output.check(sum(assembly.nbytes for each in assemblies for assembly in each))
    made: list[Made] = []
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
        planned = [
            _Planned(
                batch,
                prefixes[number],
                assemblies[number],
                Outline(store, batch, len(batch.products), options.entry_capacity, base),
                options,
                executor,
            )
            for number, batch in enumerate(batches)
        ]
        # The disk has something to do while kernels are loaded.
        fetching: AbstractContextManager[Any] = nullcontext()
        first = batches[0].subspaces
        if executor.is_local and not options.dry_run and first is not None:
            fetching = fetching_first_blocks(store, weights_of_base, first)
        with fetching:
            capacity = planned[0].prepare(store, progress)
        executor.check_sees([store.path, *([directory] if directory is not None else [])])
        plans = [each.plan(capacity) for each in planned]
        plan = planner.joint_plan([each for each, _ in plans])
        if idle := planner.idle_workers(plan, capacity):
            progress.note(idle)
        if not options.dry_run:
            with output:
                executor.check_sees([output.filler.directory])
                for number, each in enumerate(planned):
                    if number:
                        each.prepare(store, progress)
                    run = _Run(store, weights_of_base, each, plans[number][0].workers, progress)
                    found = run.make(output, plans[number][1])
                    # Of one job they are told of; those of many could be very many.
                    made += found if len(jobs) == 1 else [each.without_figures() for each in found]
                write_index(made, output)
                output.finish()
        peak_bytes = executor.peak_bytes()
    return _summary(
        store,
        [out / path for path in paths],
        [job for batch in batches for job in batch.jobs],
        plan,
        made,
        dry_run=options.dry_run,
        peak_bytes=peak_bytes,
        elapsed_s=time.monotonic() - started,
    )


def _assembly(store: Store, prefix: str) -> Assembly:
    return Assembly(
        store, store.manifest.base_files, prefix=prefix, in_base_dtype=True, replaced=OWN_FILES
    )


class _Planned:
    """A batch, where its models go, and what works on it.

    Parameters
    ----------
    batch : Batch
    prefixes : sequence of str
        Directory of each model below the output.
    assemblies : sequence of Assembly
    outline : Outline
    options : RunOptions
    executor : Executor
    """

    def __init__(
        self,
        batch: Batch,
        prefixes: Sequence[str],
        assemblies: Sequence[Assembly],
        outline: Outline,
        options: RunOptions,
        executor: Executor,
    ) -> None:
        self.batch = batch
        self.prefixes = prefixes
        self.assemblies = assemblies
        self.options = options
        self.executor = executor
        self._outline = outline
        self.offload, self._devices_reason = outline.choose_devices(
            options.devices, options.device_memory_limit, executor.places()
        )

    def prepare(self, store: Store, progress: Progress) -> planner.Capacity:
        """Get ready what will work on it, and say what a plan may count on there."""
        pairs = float_pairs(store.manifest.tensors)
        what = (pairs, self.offload, self.batch.half_deltas)
        return self.executor.prepare(_warm_up, what, progress)

    def plan(self, capacity: planner.Capacity) -> tuple[Plan, int]:
        """Return the plan, and how many models to write in one pass."""
        plan, at_once = self._outline.plan(self.assemblies, capacity, self.offload)
        devices = self.offload.plan if self.offload is not None else None
        return replace(plan, devices=devices, devices_reason=self._devices_reason), at_once


@dataclass(frozen=True)
class _Run:
    """The stages of a batch, and what they run on."""

    store: Store
    base: BaseWeights
    planned: _Planned
    workers: int
    progress: Progress

    def make(self, output: OutputDirectory, at_once: int) -> list[Made]:
        """Make the models of the batch, so many in a pass, with their documents."""
        batch, assemblies = self.planned.batch, self.planned.assemblies
        subspaces = self._subspaces()
        made = [
            Made(self.store, job, tuple(prefixes), tuple(figures_of(self.store, job, subspaces)))
            for job, prefixes in self._by_job()
        ]
        mixes = mixes_of(self.store, batch, subspaces)
        del subspaces
        for assembly in assemblies:
            assembly.begin(output)
        self._write(output, mixes, at_once)
        for each in made:
            each.write_documents(output)
        return made

    def _by_job(self) -> Iterator[tuple[Job, list[str]]]:
        left = iter(self.planned.prefixes)
        for job in self.planned.batch.jobs:
            yield job, [next(left) for _ in job.products]

    def _subspaces(self) -> dict[str, Subspace]:
        """Return the subspace of every group, by name; none if the weights need none."""
        options = self.planned.batch.subspaces
        if options is None:
            return {}
        return solve_subspaces(
            self.store,
            self.base,
            options,
            executor=self.planned.executor,
            workers=self.workers,
            progress=self.progress,
            entry_capacity=self.planned.options.entry_capacity,
            offload=self.planned.offload,
        )

    def _write(self, output: OutputDirectory, mixes: Mapping[int, Mix], at_once: int) -> None:
        """Write the blocks of all models, so many models in a pass."""
        batch, assemblies = self.planned.batch, self.planned.assemblies
        source = Source(
            self.store,
            self.base,
            batch.rows,
            self.planned.options.entry_capacity,
            batch.half_deltas,
        )
        for (first, stop), name in output_passes(len(assemblies), at_once):
            write_blocks(
                source,
                output,
                assemblies[first:stop],
                {column: mix.part(first, stop) for column, mix in mixes.items()},
                group_by=batch.group_by,
                name=name,
                executor=self.planned.executor,
                workers=self.workers,
                progress=self.progress,
                offload=self.planned.offload,
            )


def _warn_inside(jobs: Sequence[Job]) -> None:
    inside = {
        (product.facts["target_step"], job.method.history[-1])
        for job in jobs
        for product in job.products
        if product.facts.get("target_step", math.inf) <= job.method.history[-1]
    }
    for target, last in sorted(inside):
        warnings.warn(
            f"target step {target} lies inside the history (up to step {last}): "
            "the output is the fitted line there, not the stored checkpoint "
            "(relex-stream export gives that)",
            RelexStreamWarning,
            stacklevel=3,
        )


def _summary(
    store: Store,
    paths: Sequence[Path],
    jobs: Sequence[Job],
    plan: Plan,
    made: Sequence[Made],
    *,
    dry_run: bool,
    peak_bytes: int,
    elapsed_s: float,
) -> ModelsSummary:
    common, differing = common_settings(jobs)
    outputs = [
        Output(
            str(path),
            {**differing[number], **product.facts},
            product.facts.get("target_step", math.inf) <= job.method.history[-1],
        )
        for (number, job, product), path in zip(
            ((n, job, product) for n, job in enumerate(jobs) for product in job.products),
            paths,
            strict=True,
        )
    ]
    # Medians over one subspace per group: of several jobs each model's record has its own.
    figures = made[0].figures if len(made) == 1 else ()
    highest = max((output.what.get("rank", 1) for output in outputs), default=1)
    explained, r2 = medians(figures, highest)
    longest = max(jobs, key=lambda job: job.rows)
    changed = changed_tensors(store, longest.rows)
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    selection = jobs[0].selection
    return ModelsSummary(
        store=str(store.path),
        dry_run=dry_run,
        outputs=tuple(outputs),
        history=longest.method.history,
        settings=common,
        tensors=len(store.manifest.tensors),
        unchanged_tensors=len(tracked) - len(changed),
        excluded_tensors=(
            sum(not selection.takes(tensor.name) for tensor in tracked)
            if all(job.selection == selection for job in jobs)
            else 0
        ),
        median_explained_variance=explained,
        median_r2=r2,
        bytes_read=sum(stage.read_bytes for stage in plan.stages),
        bytes_written=sum(stage.write_bytes for stage in plan.stages),
        peak_memory_bytes=peak_bytes,
        elapsed_s=elapsed_s,
        plan=plan,
        figures=figures,
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
