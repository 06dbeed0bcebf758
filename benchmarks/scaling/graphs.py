"""Groups and graphs of a stage, as the commands make them of a model's tensors; counted.

Nothing runs here: the place of the stage in a graph stays empty.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np

from benchmarks.scaling.figures import MEMORY_LIMIT_BYTES, RANK, STORED_BITS
from benchmarks.scaling.models import Model
from relex_stream import costs, planner
from relex_stream.blocks import BlockOf, model_shape
from relex_stream.graph import Group, grouped
from relex_stream.graph.stages import TASK_BYTES
from relex_stream.graph.tasks import build_graph
from relex_stream.model_writes import Mix
from relex_stream.sketch import SKETCH_MIN_ELEMENTS, SKETCH_WIDTH
from relex_stream.specs import BLOCK_BYTES
from relex_stream.store.records import StoredTensor, place_tensors
from relex_stream.subspaces import (
    BlockTotals,
    SubspaceOptions,
    block_groups,
    subspace_groups,
)

_NOWHERE: Any = None  # in the place of a stage: nobody runs these graphs

STAGES = ("build", "statistics", "write")
"""One commit of build-store, and the two stages of extrapolate."""


def describe(model: Model) -> tuple[StoredTensor, ...]:
    """Return the tensors as the store keeps them, without files."""
    described = [
        {
            "name": name,
            "kind": "tracked",
            "base_dtype": "BF16",
            "dtype": "BF16",
            "shape": model.shapes[name],
            "tied_to": None,
            "sketch_row": -1,
        }
        for name in sorted(model.shapes)
    ]
    large = [one for one in described if math.prod(one["shape"]) >= SKETCH_MIN_ELEMENTS]
    for row, one in enumerate(large):
        one["sketch_row"] = row
    return place_tensors(described, BLOCK_BYTES)[0]


def least_shape(tensors: Sequence[StoredTensor]) -> planner.ModelShape:
    """Return the shape that the planner takes."""
    return model_shape(tensors, SKETCH_WIDTH)


def commit_steps(model: Model, shape: planner.ModelShape, steps: int, nodes: int) -> int:
    """Return how many of so many steps a commit of a new store takes on so many nodes."""
    most = planner.statistics_bytes(MEMORY_LIMIT_BYTES)
    return planner.commit_batch(shape, model.nbytes, 0, steps, most, nodes)


def build_groups(tensors: Sequence[StoredTensor], steps: int) -> list[Group[Any, Any]]:
    """Return the groups of a commit of `steps`."""
    return grouped(
        (
            tensor.index,
            [BlockOf(tensor, block) for block in range(tensor.blocks)],
            lambda at: at.elements * at.tensor.itemsize * steps,
        )
        for tensor in tensors
        if tensor.blocks
    )


def totals_of(tensors: Sequence[StoredTensor], steps: int, share: float) -> BlockTotals:
    """Return what a store of `steps` would hold per block where `share` changes at each."""
    changes: list[int] = []
    for tensor in tensors:
        starts = [tensor.block_range(block) for block in (0, max(0, tensor.blocks - 1))]
        first, last = (math.ceil((stop - start) * share * steps) for start, stop in starts)
        changes += [first] * (tensor.blocks - 1) + [last] * (tensor.blocks > 0)
    return BlockTotals(changes, [math.ceil(count * STORED_BITS / 8) for count in changes])


def write_groups(
    tensors: Sequence[StoredTensor], totals: BlockTotals, steps: int
) -> list[Group[Any, Any]]:
    """Return the groups of writing one output."""
    return grouped(
        (
            (
                tensor.index,
                [BlockOf(tensor, block) for block in range(tensor.blocks)],
                lambda at: totals.work(at) + at.elements * at.tensor.base_itemsize,
            )
            for tensor in tensors
        ),
        given=lambda _: Mix(np.zeros((steps, 1))),
    )


def groups_of(
    stage: str, tensors: Sequence[StoredTensor], steps: int, share: float
) -> list[Group[Any, Any]]:
    """Return the groups of a stage; for a build `steps` are those of the commit."""
    if stage == "build":
        return build_groups(tensors, steps)
    totals = totals_of(tensors, steps, share)
    if stage == "statistics":
        options = SubspaceOptions(rows=steps, rank=RANK, svd="randomized", power_iterations=1)
        return block_groups(subspace_groups(tensors, totals, options), totals, options)
    return write_groups(tensors, totals, steps)


def graph_rows(
    name: str,
    stage: str,
    groups: Sequence[Group[Any, Any]],
    steps: int,
    threads: Sequence[int],
) -> list[dict[str, Any]]:
    """Build a stage's graph for so many threads; count and weigh it.

    The pickled size is taken once: the descriptions are the same however they are cut.
    """
    total = sum(group.nbytes for group in groups)
    rows: list[dict[str, Any]] = []
    for count in threads:
        task_bytes = costs.cluster_task_bytes(total, count, TASK_BYTES)
        started = time.process_time()
        graph = build_graph(
            _NOWHERE, groups, begins=stage == "statistics", task_bytes=task_bytes, name="relex-1"
        )
        graph_s = time.process_time() - started
        if not rows:
            started = time.process_time()
            pickled = len(cloudpickle.dumps(graph.tasks, protocol=5))
            pickle_s = time.process_time() - started
        at_work = [size for size in graph.nbytes.values() if size]
        rows.append(
            {
                "part": "graphs",
                "model": name,
                "stage": stage,
                "steps": steps,
                "threads": count,
                "wanted_bytes": task_bytes,
                "work_bytes": total,
                "tasks": len(graph.tasks) - 1,  # one is the stage
                "at work": len(at_work),
                "sums": len(graph.tasks) - 1 - len(at_work),
                "mean_bytes": sum(at_work) / max(1, len(at_work)),
                "largest_bytes": max(at_work, default=0),
                "outputs": len(graph.outputs),
                "pickled_bytes": pickled,
                "graph_s": graph_s,
                "pickle_s": pickle_s,
            }
        )
    return rows


def graph_counts(
    groups: Sequence[Group[Any, Any]], threads: int, *, begins: bool
) -> dict[str, int]:
    """Return how many tasks a stage is on so many threads, and how many of them work on blocks."""
    total = sum(group.nbytes for group in groups)
    graph = build_graph(
        _NOWHERE,
        groups,
        begins=begins,
        task_bytes=costs.cluster_task_bytes(total, threads, TASK_BYTES),
        name="relex-1",
    )
    return {
        "tasks": len(graph.tasks) - 1,
        "at work": sum(size > 0 for size in graph.nbytes.values()),
    }
