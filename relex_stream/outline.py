"""What a job comes to before it is run: its stages, their memory, the devices that take part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from relex_stream import costs, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import transfer_bytes
from relex_stream.blocks import model_shape
from relex_stream.errors import DeviceError, MemoryLimitError
from relex_stream.locations import Location
from relex_stream.offload import Offload, choose_offload
from relex_stream.request import Batch
from relex_stream.store import Store
from relex_stream.subspaces import (
    BlockTotals,
    SubspaceGroup,
    SubspaceOptions,
    basis_columns,
    changed_tensors,
    predicted_tensors,
    split_routes,
    subspace_groups,
)
from relex_stream.summaries import Plan, StagePlan

OUTPUTS_AT_ONCE = 16
"""Most models that are written in one pass; fewer where memory is short."""


def output_passes(outputs: int, at_once: int) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield the first output of each pass and the one behind its last, and the stage's name."""
    for first in range(0, outputs, at_once):
        stop = min(outputs, first + at_once)
        which = "" if at_once >= outputs else f" {first + 1} to {stop} of {outputs}"
        yield (first, stop), f"write outputs{which}"


class Outline:
    """What a job comes to, before it is run: its stages, memory and devices.

    Parameters
    ----------
    store : Store
    job : Batch
    outputs : int
        Models to write.
    entry_capacity : int
        As in `RunOptions`.
    base : Path or Url, optional
        The base's directory, when it has moved.
    """

    def __init__(
        self,
        store: Store,
        job: Batch,
        outputs: int,
        entry_capacity: int,
        base: Location | None = None,
    ) -> None:
        self._transfer_bytes = transfer_bytes(store, base)
        self._store = store
        self._outputs = outputs
        self._entry_capacity = entry_capacity
        self._rows = job.rows
        self._options = job.subspaces
        self._half_deltas = job.half_deltas
        self._totals = BlockTotals.of(store, job.rows)
        self._changed = changed_tensors(store, job.rows)
        groups: list[SubspaceGroup] = []
        if job.subspaces is not None:
            tensors = predicted_tensors(store, job.subspaces)
            groups = subspace_groups(tensors, self._totals, job.subspaces)
            self._exact, self._randomized = split_routes(groups, job.subspaces)
        else:
            self._exact, self._randomized = [], []
        shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
        # What there is one of for each tensor there is for each group: runs may be more.
        self._shape = replace(shape, tensors=max(shape.tensors, len(groups)))

    def plan(
        self,
        assemblies: Sequence[Assembly],
        capacity: planner.Capacity,
        offload: Offload | None,
    ) -> tuple[Plan, int]:
        """Return the plan, and how many models to write in one pass.

        As many as take no worker away, up to `OUTPUTS_AT_ONCE`.

        Raises
        ------
        MemoryLimitError
            If not even one model at a time fits.
        """
        least = self._plan(assemblies, capacity, offload, 1)
        at_once = min(self._outputs, OUTPUTS_AT_ONCE)
        while at_once > 1:
            with suppress(MemoryLimitError):
                plan = self._plan(assemblies, capacity, offload, at_once)
                if plan.workers >= least.workers:
                    return plan, at_once
            at_once = -(-at_once // 2)
        return least, 1

    def _plan(
        self,
        assemblies: Sequence[Assembly],
        capacity: planner.Capacity,
        offload: Offload | None,
        at_once: int,
    ) -> Plan:
        shape, totals = self._shape, self._totals
        stages = self._statistics_stages()
        at_once = min(at_once, len(assemblies))
        writing = planner.write_worker_bytes(shape, self._entry_capacity, at_once)
        for (first, stop), name in output_passes(len(assemblies), at_once):
            stages.append(
                StagePlan(
                    name=name,
                    tasks=shape.blocks,
                    read_bytes=assemblies[0].tensor_bytes + sum(totals.frame_bytes),
                    write_bytes=sum(assembly.nbytes for assembly in assemblies[first:stop]),
                    worker_bytes=writing,
                )
            )
        if self._half_deltas:
            # The base beside the state: in half precision a change is no difference of two values.
            beside = shape.largest_block_bytes
            stages = [replace(each, worker_bytes=each.worker_bytes + beside) for each in stages]
        if offload is not None:
            staging = planner.device_staging_bytes(
                shape.largest_block, *_itemsizes(self._store), at_once
            )
            stages = [replace(each, worker_bytes=each.worker_bytes + staging) for each in stages]
        options = self._options
        return planner.make_plan(
            stages,
            capacity,
            shared_bytes=planner.extrapolate_shared_bytes(
                shape,
                self._rows,
                options.rank if options is not None else 0,
                self._basis,
                len(assemblies),
                len(self._exact),
                outputs_at_once=at_once,
            )
            + self._transfer_bytes,
        )

    @property
    def _basis(self) -> int:
        if not self._randomized or self._options is None:
            return 0
        return basis_columns(self._options)

    def _statistics_stages(self) -> list[StagePlan]:
        options = self._options
        if options is None:
            return []
        passes = options.power_iterations if self._randomized else min(1, len(self._exact))
        return [
            self._statistics_stage(
                options, [*self._randomized, *(self._exact if number == 0 else [])], number
            )
            for number in range(passes)
        ]

    def _statistics_stage(
        self, options: SubspaceOptions, groups: Sequence[SubspaceGroup], number: int
    ) -> StagePlan:
        tasks = read_bytes = 0
        totals = self._totals
        for at in (at for group in groups for at in group.blocks):
            # A block whose changes do not fit is swept again for the second product.
            sweeps = 1 if totals.changes[at.column] <= self._entry_capacity else 2
            tasks += 1
            read_bytes += at.elements * at.tensor.base_itemsize
            read_bytes += sweeps * totals.frame_bytes[at.column]
        shape, capacity, rows = self._shape, self._entry_capacity, self._rows
        return StagePlan(
            name=f"statistics, pass {number + 1}",
            tasks=tasks,
            read_bytes=read_bytes,
            write_bytes=0,
            worker_bytes=max(
                planner.power_worker_bytes(shape, capacity, rows, basis_columns(options)),
                planner.gram_worker_bytes(shape, capacity, rows)
                if any(options.is_exact(group) for group in groups)
                else 0,
            ),
        )

    def choose_devices(
        self, asked: str, memory_limit_bytes: int | None, places: planner.Places
    ) -> tuple[Offload | None, str]:
        """Choose what works on blocks, and say why; arguments as in `models.RunOptions`."""
        rows = self._rows
        itemsize, base_itemsize = _itemsizes(self._store)
        outputs = min(self._outputs, OUTPUTS_AT_ONCE)
        work = costs.DeviceWork(
            elements=sum(tensor.elements for tensor in self._changed),
            changes=int(self._store.changed[:rows].sum(dtype=np.int64)),
            rows=rows,
            itemsize=itemsize,
            base_itemsize=base_itemsize,
            basis=self._basis,
            passes=self._options.power_iterations if self._options and self._randomized else 1,
            outputs=outputs,
            sweeps=self._sweeps(),
        )
        block_bytes = planner.device_block_bytes(
            self._shape.largest_block,
            rows,
            itemsize,
            base_itemsize,
            basis=self._basis,
            gram=bool(self._exact),
            outputs=outputs,
        )
        if self._half_deltas:
            if asked not in ("auto", "cpu"):
                raise DeviceError("--compat relex works on the CPU only; leave --devices out")
            asked = "cpu"
        return choose_offload(
            asked,
            work,
            places,
            block_bytes=block_bytes,
            memory_limit_bytes=memory_limit_bytes,
        )

    def _sweeps(self) -> int:
        """Return how often the CPU decodes the fullest block for a Gram matrix; 0 if it is kept."""
        fullest = max(self._totals.changes, default=0)
        if fullest <= self._entry_capacity:
            return 0
        return -(-self._shape.largest_block // planner.gram_columns(self._rows))


def _itemsizes(store: Store) -> tuple[int, int]:
    """Return the bytes of a weight of the checkpoints and of the base: the widest."""
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    return (
        max((tensor.itemsize for tensor in tracked), default=2),
        max((tensor.base_itemsize for tensor in tracked), default=2),
    )
