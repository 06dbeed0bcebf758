"""From a store to extrapolated models: statistics, a fit per tensor, one weighted sum per block.

Every output is the base plus a linear combination of stored changes, ``theta_0 + M^T w`` with
``w = U U^T h`` per tensor (docs/design.md), so all targets are written in one pass.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream import cards, costs, machine, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights, base_directory, open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY, BlockReader, fetch_blocks
from relex_stream.blocks import (
    BlockOf,
    Blocks,
    Workspace,
    float_pairs,
    model_shape,
    work_on_strips,
)
from relex_stream.devices import parse_devices, wants_gpu_processes
from relex_stream.errors import DeviceError, RelexStreamWarning
from relex_stream.fit import hat_vector, output_weights, r_squared
from relex_stream.graph import Executor, Stage, grouped, open_executor
from relex_stream.offload import Offload, choose_offload, kind_for
from relex_stream.pages import PAGE_BYTES
from relex_stream.paths import refuse_inside
from relex_stream.request import Request, check_request
from relex_stream.sketch import Subspace, add_weighted_rows, cumulate_transposed
from relex_stream.sources import CheckpointReader
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.subspaces import (
    BlockTotals,
    SubspaceOptions,
    basis_columns,
    changed_tensors,
    fetching_first_blocks,
    solve_subspaces,
    split_routes,
)
from relex_stream.summaries import ExtrapolateSummary, Output, Plan, StagePlan, TensorFigures
from relex_stream.sweep import TILE_COLUMNS, sweep_outputs
from relex_stream.ulp import Bits, add_rounded
from relex_stream.warmup import Pairs, warm_up_extrapolation
from relex_stream.writer import MARKER, Filler, OutputDirectory

Float64 = NDArray[np.float64]

_OWN_FILES = ("README.md", MARKER)

_TENSORS_AT_ONCE = 1024


class Written(NamedTuple):
    """What writing some blocks did: values that overflowed, and bytes by file."""

    overflowed: int
    nbytes: Counter[str]


class BlockWrite(Stage[tuple[BlockOf, ...], Float64, Written]):
    """Writes blocks of all outputs.

    A group is a tensor. It is given ``L^T w``, of float64 and shape (T, outputs); one that is given
    none is copied from the base.
    """

    fetches = True

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        filler: Filler,
        assemblies: Sequence[Assembly],
        rows: int,
        entry_capacity: int,
        offload: Offload | None,
    ) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._filler = filler
        self._assemblies = assemblies
        self._rows = rows
        self._entry_capacity = entry_capacity
        self._offload = offload
        self.device_share = offload.share if offload is not None else 0.0

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._store, self._base, self._rows, tasks)

    def work(
        self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[Float64 | None]
    ) -> list[Written]:
        """Write neighbouring blocks."""
        workspace = self.of_thread(Workspace)
        reader = BlockReader(self._store, self._base, workspace, self._entry_capacity)
        weights = {
            task[0].tensor.index: value
            for task, value in zip(tasks, values, strict=True)
            if value is not None
        }

        def write(at: Blocks) -> list[int]:
            return self._write(reader, at, _weights_of(at, weights), workspace)

        kind_of = partial(kind_for, self._offload)
        overflowed = [sum(counts) for counts in work_on_strips(tasks, kind_of, write)]
        # Neighbours are one write: which task's it was nobody asks.
        nbytes = [self._filler.take_written(), *(Counter[str]() for _ in tasks[1:])]
        return [Written(*each) for each in zip(overflowed, nbytes, strict=True)]

    def combine(self, partials: list[Written]) -> Written:
        """Add up."""
        total = Counter[str]()
        for each in partials:
            total.update(each.nbytes)
        return Written(sum(each.overflowed for each in partials), total)

    def finish(
        self, key: Hashable, value: Float64 | None, total: Written, *, last: bool
    ) -> Written:
        """Return what was written of a tensor."""
        return total

    def settle(self) -> None:
        """As in `Stage`."""
        self._filler.sync()

    def _write(
        self, reader: BlockReader, at: Blocks, weights: Float64 | None, workspace: Workspace
    ) -> list[int]:
        base_bits = reader.base_bits(at)
        if weights is None or not reader.entries(at, self._rows):
            for assembly in self._assemblies:
                assembly.put(self._filler, at, base_bits)
            return [0] * len(at.blocks)
        outputs = weights.shape[1]
        # Every output has the base's files: the same offsets. Rows that begin a page apart.
        first = at.blocks[0]
        offset = self._assemblies[0].offset_of(first.tensor, first.start)
        stride = -(-at.elements * base_bits.itemsize // PAGE_BYTES) * PAGE_BYTES
        shape = (outputs, stride // base_bits.itemsize)
        rounded = workspace.array("rounded", shape, base_bits.dtype, offset)
        overflowed = None
        if self._offload is not None:
            overflowed = self._offload.outputs(reader, at, base_bits, self._rows, weights, rounded)
        if overflowed is None:
            overflowed = self._sweep(reader, at, base_bits, weights, rounded)
        if overflowed and len(at.blocks) > 1:
            # One by one, which tells whose they are.
            each = np.split(weights, len(at.blocks))
            return [
                count
                for block, own in zip(at.blocks, each, strict=True)
                for count in self._write(reader, block, own, workspace)
            ]
        for assembly, bits in zip(self._assemblies, rounded, strict=True):
            assembly.put(self._filler, at, bits[: at.elements])
        return [overflowed] * len(at.blocks)

    def _sweep(
        self, reader: BlockReader, at: Blocks, base_bits: Bits, weights: Float64, rounded: Bits
    ) -> int:
        """Write to `rounded` what blocks are to have; return how many values overflowed."""
        changes = reader.change_rows(at, base_bits, self._rows)
        outputs = weights.shape[1]
        columns = min(TILE_COLUMNS, at.elements) if changes.fits else at.elements
        sums = reader.workspace.array("sums", (columns, outputs), np.float64)
        fmt = at.base_format
        if changes.fits:
            block = changes.at_hand()
            return int(sweep_outputs(block, weights, base_bits, fmt.tag, sums, rounded))
        sums[:] = 0
        for batch in changes.batches():
            add_weighted_rows(batch, 0, weights, sums)
        return sum(
            add_rounded(base_bits, sums[:, output], fmt, rounded[output, : at.elements])
            for output in range(outputs)
        )


def _weights_of(at: Blocks, weights: Mapping[int, Float64]) -> Float64 | None:
    """Return the weights of all rows of D; None if there are none but zeros."""
    each = [weights.get(block.tensor.index) for block in at.blocks]
    given = [some for some in each if some is not None]
    if len(given) in (0, len(each)):
        return np.concatenate(given) if given else None
    zeros = np.zeros_like(given[0])
    return np.concatenate([zeros if some is None else some for some in each])


def extrapolate_steps(
    store_path: Path,
    out: Path,
    *,
    target_steps: Sequence[int],
    history_steps: int | None,
    rank: int,
    svd: str,
    power_iterations: int,
    fit: str,
    base: Path | None,
    memory_limit: int | None,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    scheduler: str | None = None,
    local_cluster: int | None = None,
    devices: str = "auto",
    device_memory_limit: int | None = None,
    progress: Progress | None,
    entry_capacity: int = DEFAULT_ENTRY_CAPACITY,
) -> ExtrapolateSummary:
    """Extrapolate; `relex_stream.api.extrapolate` says what the arguments are.

    Parameters
    ----------
    entry_capacity : int
        Changes of a block that a worker keeps between sweeps.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    if workers is not None:
        machine.wanted_workers(workers)
    if scheduler is not None or local_cluster is not None:
        # Workers have working directories of their own.
        store_path, base = store_path.absolute(), base and base.absolute()
    store = Store(store_path)
    request = check_request(
        store,
        target_steps=target_steps,
        history_steps=history_steps,
        rank=rank,
        svd=svd,
        power_iterations=power_iterations,
        fit=fit,
    )
    _warn_inside(request)
    refuse_inside(out, store.path, "OUT", "STORE")
    directory = base_directory(store, base)
    if directory is not None:
        refuse_inside(out, directory, "OUT", "the base")
    assemblies = [
        Assembly(
            store,
            store.manifest.base_files,
            prefix=prefix,
            in_base_dtype=True,
            replaced=_OWN_FILES,
        )
        for prefix in _prefixes(request.targets)
    ]
    output = OutputDirectory(out, overwrite=overwrite)
    output.check(sum(assembly.nbytes for assembly in assemblies))
    figures: list[TensorFigures] = []
    with (
        CheckpointReader() as reader,
        open_executor(
            scheduler=scheduler,
            local_cluster=local_cluster,
            local_gpus=wants_gpu_processes(parse_devices(devices)),
            workers=workers,
            memory_limit=memory_limit,
            progress=progress,
        ) as executor,
    ):
        weights_of_base = open_base(store, base, reader)
        offload, devices_reason = _choose_devices(
            store, request, executor.places(), devices, device_memory_limit, entry_capacity
        )
        # The disk has something to do while kernels are loaded.
        fetching: AbstractContextManager[Any] = nullcontext()
        if executor.is_local and not dry_run:
            fetching = fetching_first_blocks(store, weights_of_base, request.options)
        with fetching:
            pairs = float_pairs(store.manifest.tensors)
            capacity = executor.prepare(_warm_up, (pairs, offload), progress)
        executor.check_sees([store.path, *([directory] if directory is not None else [])])
        plan = replace(
            _plan(store, request, assemblies, capacity, offload, entry_capacity=entry_capacity),
            devices=offload.plan if offload is not None else None,
            devices_reason=devices_reason,
        )
        if idle := planner.idle_workers(plan, capacity):
            progress.note(idle)
        if not dry_run:
            with output:
                executor.check_sees([output.filler.directory])
                subspaces = solve_subspaces(
                    store,
                    weights_of_base,
                    request.options,
                    executor=executor,
                    workers=plan.workers,
                    progress=progress,
                    entry_capacity=entry_capacity,
                    offload=offload,
                )
                figures = _figures(store, request, subspaces)
                weights = _weights(store, request, subspaces)
                del subspaces
                for assembly in assemblies:
                    assembly.begin(output)
                _write_blocks(
                    store,
                    weights_of_base,
                    output,
                    assemblies,
                    weights,
                    executor=executor,
                    workers=plan.workers,
                    progress=progress,
                    rows=len(request.history),
                    entry_capacity=entry_capacity,
                    offload=offload,
                )
                _write_documents(store, request, figures, output)
                output.finish()
        peak_bytes = executor.peak_bytes()
    return _summary(
        store,
        out,
        request,
        plan,
        figures,
        dry_run=dry_run,
        peak_bytes=peak_bytes,
        elapsed_s=time.monotonic() - started,
    )


def _prefixes(targets: Sequence[int]) -> list[str]:
    return [""] if len(targets) == 1 else [f"step_{target}/" for target in targets]


def _warn_inside(request: Request) -> None:
    for target in request.targets:
        if target <= request.history[-1]:
            warnings.warn(
                f"target step {target} lies inside the history (up to step {request.history[-1]}): "
                "the output is the fitted line there, not the stored checkpoint "
                "(relex-stream export gives that)",
                RelexStreamWarning,
                stacklevel=3,
            )


def _figures(store: Store, request: Request, subspaces: dict[str, Subspace]) -> list[TensorFigures]:
    totals = store.delta_sq[: len(request.history)].sum(axis=0).tolist()
    r2 = _r_squared_of_all(request.history, subspaces.values())
    figures = []
    for name, subspace in subspaces.items():
        total = totals[store.tensors[name].index]
        singular_values = subspace.singular_values.tolist()
        explained = math.fsum(value**2 for value in singular_values)
        figures.append(
            TensorFigures(
                name=name,
                singular_values=tuple(singular_values),
                explained_variance=min(1.0, explained / total) if total > 0 else 1.0,
                r2=tuple(islice(r2, len(singular_values))),
            )
        )
    return sorted(figures, key=lambda figure: figure.name)


def _r_squared_of_all(history: Sequence[int], subspaces: Iterable[Subspace]) -> Iterator[float]:
    """Yield the R2 of each column of each tensor."""
    # Columns of many tensors at once, one behind the other: tensors may be very many.
    left = iter(subspaces)
    while some := list(islice(left, _TENSORS_AT_ONCE)):
        columns = [subspace.vectors * subspace.singular_values for subspace in some]
        yield from r_squared(history, np.concatenate(columns, axis=1)).tolist()


def _weights(store: Store, request: Request, subspaces: dict[str, Subspace]) -> dict[int, Float64]:
    """Return ``L^T w`` for every tensor that changed: how much each stored change weighs."""
    hats = np.stack(
        [hat_vector(request.history, target, request.fit) for target in request.targets], axis=1
    )
    return {
        store.tensors[name].index: cumulate_transposed(output_weights(subspace.vectors, hats))
        for name, subspace in subspaces.items()
        if subspace.singular_values.size
    }


def _write_blocks(
    store: Store,
    base: BaseWeights,
    output: OutputDirectory,
    assemblies: Sequence[Assembly],
    weights: Mapping[int, Float64],
    *,
    executor: Executor,
    workers: int,
    progress: Progress,
    rows: int,
    entry_capacity: int,
    offload: Offload | None,
) -> None:
    outputs = len(assemblies)
    totals = BlockTotals.of(store, rows)

    def worked_on(at: BlockOf) -> int:
        return totals.work(at) + at.elements * at.tensor.base_itemsize * outputs

    written: dict[int, Written] = executor.run(
        BlockWrite(store, base, output.filler, assemblies, rows, entry_capacity, offload),
        grouped(
            (
                (
                    tensor.index,
                    [BlockOf(tensor, block) for block in range(tensor.blocks)],
                    worked_on,
                )
                for tensor in assemblies[0].tensors
            ),
            given=weights.get,
        ),
        workers=workers,
        name="write outputs",
        progress=progress,
    )
    for each in written.values():
        output.add_written(each.nbytes)
    overflowed = {index: each.overflowed for index, each in written.items()}
    names = [t.name for t in store.manifest.tensors if overflowed.get(t.index)]
    if names:
        warnings.warn(
            f"{sum(overflowed.values())} extrapolated values overflow their dtype (first in tensor "
            f"{names[0]}) and were written as infinities; a nearer --target-step avoids that",
            RelexStreamWarning,
            stacklevel=3,
        )


def _write_documents(
    store: Store, request: Request, figures: Sequence[TensorFigures], output: OutputDirectory
) -> None:
    explained, r2 = _medians(figures)
    outputs = list(zip(request.targets, _prefixes(request.targets), strict=True))
    for target, prefix in outputs:
        card = cards.model_card(
            store,
            settings=request.settings,
            target_step=target,
            median_explained_variance=explained,
            median_r2=r2,
        )
        output.write_file(prefix + "README.md", card)
    for target, prefix in outputs:
        written = [name.removeprefix(prefix) for name in output.files if name.startswith(prefix)]
        record = cards.record(
            store,
            settings=request.settings,
            target_step=target,
            figures=figures,
            files=[*written, MARKER],
        )
        output.write_file(prefix + MARKER, record)
    if len(outputs) > 1:
        index = {
            "outputs": [
                {"target_step": target, "path": prefix.rstrip("/")} for target, prefix in outputs
            ],
            **request.settings,
            "files": [*output.files, MARKER],
        }
        output.write_file(MARKER, (json.dumps(index, indent=1) + "\n").encode())


def _medians(figures: Sequence[TensorFigures]) -> tuple[float | None, float | None]:
    explained = [figure.explained_variance for figure in figures]
    r2 = [figure.r2[0] for figure in figures if figure.r2]
    return (
        statistics.median(explained) if explained else None,
        statistics.median(r2) if r2 else None,
    )


# --- the plan ------------------------------------------------------------------------------------


def _plan(
    store: Store,
    request: Request,
    assemblies: Sequence[Assembly],
    capacity: planner.Capacity,
    offload: Offload | None,
    *,
    entry_capacity: int,
) -> Plan:
    options = request.options
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    totals = BlockTotals.of(store, options.rows)
    exact, randomized = split_routes(changed_tensors(store, options.rows), options)
    basis = basis_columns(options) if randomized else 0
    stages = [
        _statistics_stage(
            totals,
            shape,
            options,
            randomized + (exact if number == 0 else []),
            number,
            entry_capacity,
        )
        for number in range(options.power_iterations if randomized else min(1, len(exact)))
    ]
    tensor_bytes = assemblies[0].tensor_bytes
    stages.append(
        StagePlan(
            name="write outputs",
            tasks=shape.blocks,
            read_bytes=tensor_bytes + sum(totals.frame_bytes),
            write_bytes=sum(assembly.nbytes for assembly in assemblies),
            worker_bytes=planner.write_worker_bytes(shape, entry_capacity, len(assemblies)),
        )
    )
    if offload is not None:
        staging = planner.device_staging_bytes(
            shape.largest_block, *_itemsizes(store), len(assemblies)
        )
        stages = [replace(each, worker_bytes=each.worker_bytes + staging) for each in stages]
    return planner.make_plan(
        stages,
        capacity,
        shared_bytes=planner.extrapolate_shared_bytes(
            shape, options.rows, options.rank, basis, len(assemblies), len(exact)
        ),
    )


def _warm_up(what: tuple[Pairs, Offload | None], progress: Progress) -> None:
    """Prepare a process: kernels, and the device if it has one."""
    pairs, offload = what
    warm_up_extrapolation(pairs, progress)
    if offload is not None:
        # A worker of a cluster may have none; it gets no such tasks.
        with suppress(DeviceError):
            offload.open()


def _choose_devices(
    store: Store,
    request: Request,
    places: planner.Places,
    asked: str,
    memory_limit_bytes: int | None,
    entry_capacity: int,
) -> tuple[Offload | None, str]:
    options, outputs = request.options, len(request.targets)
    changed = changed_tensors(store, options.rows)
    exact, randomized = split_routes(changed, options)
    basis = basis_columns(options) if randomized else 0
    itemsize, base_itemsize = _itemsizes(store)
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    work = costs.DeviceWork(
        elements=sum(tensor.elements for tensor in changed),
        changes=int(store.changed[: options.rows].sum(dtype=np.int64)),
        rows=options.rows,
        itemsize=itemsize,
        base_itemsize=base_itemsize,
        basis=basis,
        passes=options.power_iterations if randomized else 1,
        outputs=outputs,
        sweeps=_sweeps(store, options.rows, shape.largest_block, entry_capacity),
    )
    block_bytes = planner.device_block_bytes(
        shape.largest_block,
        options.rows,
        itemsize,
        base_itemsize,
        basis=basis,
        gram=bool(exact),
        outputs=outputs,
    )
    return choose_offload(
        asked, work, places, block_bytes=block_bytes, memory_limit_bytes=memory_limit_bytes
    )


def _sweeps(store: Store, rows: int, largest_block: int, entry_capacity: int) -> int:
    """Return how often the CPU decodes the fullest block for a Gram matrix; 0 if it is kept."""
    fullest = int(store.changed[:rows].sum(axis=0, dtype=np.int64).max(initial=0))
    return 0 if fullest <= entry_capacity else -(-largest_block // planner.gram_columns(rows))


def _itemsizes(store: Store) -> tuple[int, int]:
    """Return the bytes of a weight of the checkpoints and of the base: the widest."""
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    return (
        max((tensor.itemsize for tensor in tracked), default=2),
        max((tensor.base_itemsize for tensor in tracked), default=2),
    )


def _statistics_stage(
    totals: BlockTotals,
    shape: planner.ModelShape,
    options: SubspaceOptions,
    tensors: Sequence[StoredTensor],
    number: int,
    entry_capacity: int,
) -> StagePlan:
    tasks = read_bytes = 0
    for tensor in tensors:
        for at in totals.changed_blocks(tensor):
            # A block whose changes do not fit is swept again for the second product.
            sweeps = 1 if totals.changes[at.column] <= entry_capacity else 2
            tasks += 1
            read_bytes += at.elements * tensor.base_itemsize
            read_bytes += sweeps * totals.frame_bytes[at.column]
    return StagePlan(
        name=f"statistics, pass {number + 1}",
        tasks=tasks,
        read_bytes=read_bytes,
        write_bytes=0,
        worker_bytes=max(
            planner.power_worker_bytes(shape, entry_capacity, options.rows, basis_columns(options)),
            planner.gram_worker_bytes(shape, entry_capacity, options.rows)
            if any(options.svd == "exact" or t.sketch_row < 0 for t in tensors)
            else 0,
        ),
    )


def _summary(
    store: Store,
    out: Path,
    request: Request,
    plan: Plan,
    figures: Sequence[TensorFigures],
    *,
    dry_run: bool,
    peak_bytes: int,
    elapsed_s: float,
) -> ExtrapolateSummary:
    explained, r2 = _medians(figures)
    changed = len(changed_tensors(store, len(request.history)))
    tracked = sum(tensor.kind == "tracked" for tensor in store.manifest.tensors)
    return ExtrapolateSummary(
        store=str(store.path),
        dry_run=dry_run,
        outputs=tuple(
            Output(target, str(out / prefix.rstrip("/")), target <= request.history[-1])
            for target, prefix in zip(request.targets, _prefixes(request.targets), strict=True)
        ),
        history=request.history,
        rank=request.rank,
        svd=request.svd,
        power_iterations=request.power_iterations,
        fit=request.fit,
        tensors=len(store.manifest.tensors),
        unchanged_tensors=tracked - changed,
        median_explained_variance=explained,
        median_r2=r2,
        bytes_read=sum(stage.read_bytes for stage in plan.stages),
        bytes_written=sum(stage.write_bytes for stage in plan.stages),
        peak_memory_bytes=peak_bytes,
        elapsed_s=elapsed_s,
        plan=plan,
        figures=tuple(figures),
    )
