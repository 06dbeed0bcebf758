"""From a store to extrapolated models: statistics, a fit per tensor, one weighted sum per block.

Every output is the base plus a linear combination of stored changes, ``theta_0 + M^T w`` with
``w = U U^T h`` per tensor (docs/design.md), so all targets are written in one pass.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relex_stream import cards, machine, planner
from relex_stream.assemble import Assembly
from relex_stream.blocks import (
    DEFAULT_ENTRY_CAPACITY,
    BaseWeights,
    BlockOf,
    BlockReader,
    Workspace,
    base_directory,
    model_shape,
    open_base,
)
from relex_stream.errors import RelexStreamWarning
from relex_stream.fit import hat_vector, output_weights, r_squared
from relex_stream.graph import grouped, run_groups
from relex_stream.pages import PAGE_BYTES
from relex_stream.paths import refuse_inside
from relex_stream.request import Request, check_request
from relex_stream.sketch import Subspace, add_weighted_rows, cumulate_transposed
from relex_stream.sources import CheckpointReader
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.subspaces import (
    SubspaceOptions,
    basis_columns,
    block_work,
    changed_blocks,
    changed_tensors,
    solve_subspaces,
    split_routes,
)
from relex_stream.summaries import ExtrapolateSummary, Output, Plan, StagePlan, TensorFigures
from relex_stream.sweep import TILE_COLUMNS, sweep_outputs
from relex_stream.ulp import add_rounded
from relex_stream.warmup import warm_up_extrapolation
from relex_stream.writer import MARKER, OutputDirectory

Float64 = NDArray[np.float64]

_OWN_FILES = ("README.md", MARKER)


class BlockWrite:
    """Writes blocks of all outputs; safe to call from several threads.

    Parameters
    ----------
    weights : dict of int to ndarray of float64, shape (T, outputs)
        ``L^T w`` per tensor index; tensors without are copied from the base.
    """

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        output: OutputDirectory,
        assemblies: Sequence[Assembly],
        weights: dict[int, Float64],
        entry_capacity: int,
    ) -> None:
        self._store = store
        self._base = base
        self._output = output
        self._assemblies = assemblies
        self._weights = weights
        self.rows = max((weight.shape[0] for weight in weights.values()), default=0)
        self._entry_capacity = entry_capacity
        self._local = threading.local()

    def run(self, blocks: tuple[BlockOf, ...]) -> int:
        """Write neighbouring blocks of one tensor; return how many values overflowed."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        reader = BlockReader(self._store, self._base, workspace, self._entry_capacity)
        return sum(self._write(reader, at, workspace) for at in blocks)

    def _write(self, reader: BlockReader, at: BlockOf, workspace: Workspace) -> int:
        base_bits = reader.base_bits(at)
        weights = self._weights.get(at.tensor.index)
        if weights is None or not reader.entries(at, weights.shape[0]):
            for assembly in self._assemblies:
                assembly.put(self._output, at.tensor, at.start, base_bits)
            return 0
        changes = reader.change_rows(at, base_bits, weights.shape[0])
        outputs = weights.shape[1]
        # Every output has the base's files: the same offsets. Rows that begin a page apart.
        offset = self._assemblies[0].offset_of(at.tensor, at.start)
        stride = -(-at.elements * base_bits.itemsize // PAGE_BYTES) * PAGE_BYTES
        shape = (outputs, stride // base_bits.itemsize)
        rounded = workspace.array("rounded", shape, base_bits.dtype, offset)
        columns = min(TILE_COLUMNS, at.elements) if changes.fits else at.elements
        sums = workspace.array("sums", (columns, outputs), np.float64)
        fmt = at.base_format
        if changes.fits:
            block = changes.at_hand()
            overflowed = int(sweep_outputs(block, weights, base_bits, fmt.number, sums, rounded))
        else:
            sums[:] = 0
            for batch in changes.batches():
                add_weighted_rows(batch, 0, weights, sums)
            overflowed = sum(
                add_rounded(base_bits, sums[:, output], fmt, rounded[output, : at.elements])
                for output in range(outputs)
            )
        for assembly, bits in zip(self._assemblies, rounded, strict=True):
            assembly.put(self._output, at.tensor, at.start, bits[: at.elements])
        return overflowed


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
    asked_workers = machine.wanted_workers(workers)
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
    warm_up_extrapolation(store.manifest.tensors, progress)
    plan = _plan(
        store,
        request,
        assemblies,
        entry_capacity=entry_capacity,
        memory_limit=memory_limit,
        workers=asked_workers,
        workers_fixed=workers is not None,
    )
    figures: list[TensorFigures] = []
    if not dry_run:
        with CheckpointReader() as reader, output:
            weights_of_base = open_base(store, base, reader)
            subspaces = solve_subspaces(
                store,
                weights_of_base,
                request.options,
                entry_capacity=entry_capacity,
                workers=plan.workers,
                progress=progress,
            )
            figures = _figures(store, request, subspaces)
            weights = _weights(store, request, subspaces)
            for assembly in assemblies:
                assembly.begin(output)
            _write_blocks(
                store,
                BlockWrite(store, weights_of_base, output, assemblies, weights, entry_capacity),
                assemblies,
                plan.workers,
                progress,
            )
            _write_documents(store, request, figures, output)
            output.finish()
    return _summary(
        store, out, request, plan, figures, dry_run=dry_run, elapsed_s=time.monotonic() - started
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
    rows = len(request.history)
    figures = []
    for name, subspace in subspaces.items():
        total = float(store.delta_sq[:rows, store.tensors[name].index].sum())
        coefficients = subspace.vectors * subspace.singular_values
        explained = float((subspace.singular_values**2).sum()) / total if total > 0 else 1.0
        figures.append(
            TensorFigures(
                name=name,
                singular_values=tuple(subspace.singular_values.tolist()),
                explained_variance=min(1.0, explained),
                r2=tuple(r_squared(request.history, coefficients).tolist()),
            )
        )
    return sorted(figures, key=lambda figure: figure.name)


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
    work: BlockWrite,
    assemblies: Sequence[Assembly],
    workers: int,
    progress: Progress,
) -> None:
    outputs = len(assemblies)

    def worked_on(at: BlockOf) -> int:
        return block_work(store, at, work.rows) + at.elements * at.tensor.base_itemsize * outputs

    overflowed: dict[Hashable, int] = run_groups(
        grouped(
            (tensor.index, [BlockOf(tensor, block) for block in range(tensor.blocks)], worked_on)
            for tensor in assemblies[0].tensors
        ),
        work.run,
        _total,
        lambda _, count: count,
        workers=workers,
        stage="write outputs",
        progress=progress,
    )
    names = [t.name for t in store.manifest.tensors if overflowed.get(t.index)]
    if names:
        warnings.warn(
            f"{sum(overflowed.values())} extrapolated values overflow their dtype (first in tensor "
            f"{names[0]}) and were written as infinities; a nearer --target-step avoids that",
            RelexStreamWarning,
            stacklevel=3,
        )


def _total(counts: list[int]) -> int:
    return sum(counts)


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
    *,
    entry_capacity: int,
    memory_limit: int | None,
    workers: int,
    workers_fixed: bool,
) -> Plan:
    options = request.options
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    exact, randomized = split_routes(changed_tensors(store, options.rows), options)
    basis = basis_columns(options) if randomized else 0
    passes = options.power_iterations if randomized else min(1, len(exact))
    stages = [
        _statistics_stage(
            store,
            shape,
            options,
            randomized + (exact if number == 0 else []),
            number,
            entry_capacity,
        )
        for number in range(passes)
    ]
    tensor_bytes = assemblies[0].tensor_bytes
    stages.append(
        StagePlan(
            name="write outputs",
            tasks=shape.blocks,
            read_bytes=tensor_bytes
            + sum(_frame_bytes(store, tensor, options.rows) for tensor in exact + randomized),
            write_bytes=sum(assembly.nbytes for assembly in assemblies),
            worker_bytes=planner.write_worker_bytes(shape, entry_capacity, len(assemblies)),
        )
    )
    return planner.make_plan(
        stages,
        reserved_bytes=machine.resident_bytes(),
        shared_bytes=planner.extrapolate_shared_bytes(
            shape, options.rows, basis, len(assemblies), len(exact)
        ),
        memory_limit_bytes=machine.memory_limit(memory_limit, planner.DEFAULT_LIMIT_BYTES),
        workers=workers,
        workers_fixed=workers_fixed,
    )


def _statistics_stage(
    store: Store,
    shape: planner.ModelShape,
    options: SubspaceOptions,
    tensors: Sequence[StoredTensor],
    number: int,
    entry_capacity: int,
) -> StagePlan:
    tasks = read_bytes = 0
    for tensor in tensors:
        for at in changed_blocks(store, tensor, options.rows):
            frames = int(store.frame_bytes[: options.rows, at.column].sum(dtype=np.int64))
            entries = int(store.changed[: options.rows, at.column].sum(dtype=np.int64))
            # A block whose changes do not fit is swept again for the second product.
            sweeps = 1 if entries <= entry_capacity else 2
            tasks += 1
            read_bytes += at.elements * tensor.base_itemsize + sweeps * frames
    return StagePlan(
        name=f"statistics, pass {number + 1}",
        tasks=tasks,
        read_bytes=read_bytes,
        write_bytes=0,
        worker_bytes=max(
            planner.power_worker_bytes(shape, entry_capacity, basis_columns(options)),
            planner.gram_worker_bytes(shape, entry_capacity, options.rows)
            if any(options.svd == "exact" or t.sketch_row < 0 for t in tensors)
            else 0,
        ),
    )


def _frame_bytes(store: Store, tensor: StoredTensor, rows: int) -> int:
    columns = slice(tensor.first_block, tensor.first_block + tensor.blocks)
    return int(store.frame_bytes[:rows, columns].sum(dtype=np.int64))


def _summary(
    store: Store,
    out: Path,
    request: Request,
    plan: Plan,
    figures: Sequence[TensorFigures],
    *,
    dry_run: bool,
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
        peak_memory_bytes=machine.peak_bytes(),
        elapsed_s=elapsed_s,
        plan=plan,
        figures=tuple(figures),
    )
