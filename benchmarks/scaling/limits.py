"""Memory limits: what the planner wants of each process, and what it does with the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.scaling.figures import BASIS, RESIDENT_BYTES
from benchmarks.scaling.graphs import describe, least_shape
from benchmarks.scaling.models import Model
from relex_stream import planner
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.errors import MemoryLimitError
from relex_stream.store.records import StoredTensor
from relex_stream.summaries import Plan, StagePlan


def memory_rows(model: Model, steps: int, threads: int) -> list[dict[str, Any]]:
    """Return what the planner wants of each process, and what it does with the default."""
    tensors = describe(model)
    shape = least_shape(tensors)
    rows = []
    for command, plan in (
        ("build-store", partial(plan_build, tensors, model.nbytes, steps)),
        ("extrapolate", partial(plan_extrapolate, tensors, steps)),
    ):
        try:
            default = plan(planner.DEFAULT_LIMIT_BYTES, threads=threads).workers
        except MemoryLimitError:
            default = 0
        whole = least_limit(partial(plan, threads=threads), threads)
        rows.append(
            {
                "part": "memory",
                "model": model.name,
                "command": command,
                "checkpoints": steps,
                "threads of 768 MiB": default,
                "one thread_bytes": least_limit(partial(plan, threads=1), 1),
                "all threads_bytes": whole,
                "commit with 768 MiB, steps": batch_steps(
                    shape, model.nbytes, 0, steps, planner.DEFAULT_LIMIT_BYTES
                ),
                "commit, steps": batch_steps(shape, model.nbytes, 0, steps, whole),
                "tables_bytes": 12 * steps * shape.blocks,
            }
        )
    return rows


def least_limit(plan: Callable[[int], Plan], workers: int) -> int:
    """Return the least memory limit, in whole MiB, with which so many threads work.

    A build makes larger commits where it may, so not every larger limit does.
    """

    def works(mib: int) -> bool:
        try:
            return plan(mib << 20).workers >= workers
        except MemoryLimitError:
            return False

    low, high = 0, 1
    while not works(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high << 20


def plan_build(
    tensors: Sequence[StoredTensor], nbytes: int, steps: int, limit: int, *, threads: int
) -> Plan:
    """Return the plan of building `steps`, as `build` makes it."""
    shape = least_shape(tensors)
    batch = batch_steps(shape, nbytes, 0, steps, limit)
    stage = StagePlan("encode", shape.blocks, 0, 0, planner.ingest_worker_bytes(shape, batch))
    largest = max(tensor.blocks for tensor in tensors)
    shared = planner.ingest_shared_bytes(shape, batch, steps, largest, len(tensors))
    return planner.make_plan([stage], _capacity(limit, threads), shared_bytes=shared)


def plan_extrapolate(
    tensors: Sequence[StoredTensor], steps: int, limit: int, *, threads: int
) -> Plan:
    """Return the plan of one output, as `extrapolate` makes it."""
    shape = least_shape(tensors)
    exact = shape.tensors - shape.sketched
    basis = min(steps, BASIS)
    capacity = DEFAULT_ENTRY_CAPACITY
    workers = [
        planner.power_worker_bytes(shape, capacity, steps, basis),
        planner.write_worker_bytes(shape, capacity, 1),
    ]
    if exact:
        workers.append(planner.gram_worker_bytes(shape, capacity, steps))
    stages = [StagePlan("stage", shape.blocks, 0, 0, size) for size in workers]
    shared = planner.extrapolate_shared_bytes(shape, steps, 1, basis, 1, exact)
    return planner.make_plan(stages, _capacity(limit, threads), shared_bytes=shared)


def _capacity(limit: int, threads: int) -> planner.Capacity:
    return planner.Capacity(
        processes=1,
        workers=threads,
        workers_fixed=threads == 1,
        reserved_bytes=RESIDENT_BYTES,
        memory_limit_bytes=limit,
    )


def batch_steps(shape: planner.ModelShape, nbytes: int, rows: int, left: int, limit: int) -> int:
    """Return the steps of the next commit under a memory limit."""
    return planner.commit_batch(shape, nbytes, rows, left, planner.statistics_bytes(limit))
