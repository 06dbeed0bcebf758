"""Clusters for tests, of processes or within this one, and what tests run on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distributed
import numpy as np

from relex_stream.graph import Stage, cluster
from relex_stream.specs import NoProgress, Progress
from tests.make_checkpoints import Trajectory
from tests.make_stores import build_store
from tests.test_graph import value_of

TENSORS = {"model.embed.weight": (300, 90), "a.weight": (90, 70), "b.bias": (90,), "c.weight": (5,)}


@contextmanager
def processes(workers: int = 2, threads: int = 2, **options: Any) -> Iterator[str]:
    """Start processes; the address of their scheduler."""
    with distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        **options,
    ) as started:
        yield started.scheduler_address


@contextmanager
def within(*workers: dict[str, Any]) -> Iterator[str]:
    """Start workers in this process, one for each of some options: patches hold there too.

    What travels is pickled all the same.
    """
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with distributed.SpecCluster(
        scheduler={"cls": distributed.Scheduler, "options": here},
        workers={
            number: {"cls": distributed.Worker, "options": here | {"memory_limit": 0} | options}
            for number, options in enumerate(workers)
        },
    ) as started:
        yield started.scheduler_address


@contextmanager
def client_of(scheduler: str) -> Iterator[distributed.Client]:
    with distributed.Client(scheduler, set_as_default=False) as client:
        yield client


def no_warm_up(formats: object, progress: object) -> None:
    pass


def prepared(client: distributed.Client) -> cluster.Cluster:
    """A cluster whose workers have been asked what they are."""
    executor = cluster.Cluster(client)
    executor.prepare(no_warm_up, None, NoProgress())
    return executor


def run_stage(
    client: distributed.Client,
    stage: Stage[Any, Any, Any],
    groups: Any,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[Any, Any]:
    return prepared(client).run(
        stage, groups, workers=workers, name="a stage", progress=progress or NoProgress()
    )


class Numbers(Stage):  # type: ignore[type-arg]
    """Sums that show every change of their order."""

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        return [value_of(task) for task in tasks]

    def combine(self, partials):  # type: ignore[no-untyped-def]
        return np.sum(partials, axis=0)

    def finish(self, key, value, total, *, last):  # type: ignore[no-untyped-def]
        return total


def build(run: Trajectory, store: Path, **options: Any) -> None:
    """Build a store, or append to it, in small blocks and with sketches of small tensors."""
    build_store(
        run.base,
        run.checkpoints,
        store,
        block_bytes=2 << 10,
        sketch_min_elements=1000,
        **options,
    )


def tree(directory: Path) -> dict[str, bytes]:
    """The files of a store or an output, without the record of when it was made."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "relex_stream.json"
    }
