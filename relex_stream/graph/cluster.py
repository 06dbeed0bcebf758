"""Stages on the workers of a dask.distributed cluster.

What travels are descriptions, and small results: workers read and write the files themselves, which
they see under the same paths. A task that is run again, because a worker died, writes the same
bytes to the same places.
"""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relex_stream import costs, machine, planner
from relex_stream.errors import ClusterError, RelexStreamWarning
from relex_stream.graph.packed import PackedStage
from relex_stream.graph.stage_run import StageRun
from relex_stream.graph.stages import TASK_BYTES, Group, Stage
from relex_stream.graph.tasks import build_graph
from relex_stream.graph.threads import WarmUp
from relex_stream.graph.workers import GPU, Worker, ask_workers, worker_threads
from relex_stream.locations import Location
from relex_stream.specs import Progress

if TYPE_CHECKING:
    from distributed import Client

DASK_SHARE = 0.75
"""Of the memory limit that a worker has from dask, what we plan with."""


class Cluster:
    """Runs stages on a cluster; an `Executor`.

    Parameters
    ----------
    client : distributed.Client
    memory_limit : int, optional
        Bytes that each worker process may hold.
    """

    is_local = False

    def __init__(self, client: Client, memory_limit: int | None = None) -> None:
        self._client = client
        self._memory_limit = memory_limit
        self._threads = 1  # of all processes, once they were asked
        self._warned: set[str] = set()

    def places(self) -> planner.Places:
        """As in `Executor`; a worker has a device if it says so by the resource ``GPU``."""
        threads, with_gpu = worker_threads(self._client)
        return planner.Places(
            cores=sum(threads),
            gpu_workers=len(with_gpu),
            gpu_cores=sum(with_gpu),
        )

    def prepare(self, warm_up: WarmUp, formats: Any, progress: Progress) -> planner.Capacity:
        """As in `Executor`.

        Raises
        ------
        ClusterError
            If there are no workers, or they have other versions than this process.
        """
        progress.start("prepare workers", 0)
        found = ask_workers(self._client, warm_up, formats)
        progress.finish()
        self._threads = sum(worker.threads for worker in found)
        on_host: dict[str, int] = {}
        for worker in found:
            on_host[worker.host] = on_host.get(worker.host, 0) + 1
        return planner.Capacity(
            processes=len(found),
            workers=max(worker.threads for worker in found),
            workers_fixed=False,
            reserved_bytes=max(worker.resident_bytes for worker in found),
            memory_limit_bytes=min(
                self._limit_of(worker, on_host[worker.host]) for worker in found
            ),
            command_reserved_bytes=machine.resident_bytes(),
            command_limit_bytes=machine.memory_limit(
                self._memory_limit, planner.DEFAULT_LIMIT_BYTES
            ),
        )

    def _limit_of(self, worker: Worker, beside: int) -> int:
        """Return what a worker may hold, of as many `beside` each other on its machine."""
        default = planner.DEFAULT_LIMIT_BYTES
        limit = self._memory_limit or min(
            max(default, worker.resident_bytes + default // 2),
            worker.resident_bytes + worker.available_bytes // beside,
        )
        if not worker.limit_bytes:
            return limit
        # Above 0.8 of that limit dask gives a worker nothing to do, and buffers stay as they are.
        return min(limit, int(DASK_SHARE * worker.limit_bytes))

    def peak_bytes(self) -> int:
        """As in `Executor`; of workers, since they were started."""
        there: dict[str, int] = self._client.run(machine.peak_bytes, on_error="ignore")
        return max([machine.peak_bytes(), *there.values()])

    def check_sees(self, paths: Sequence[Location]) -> None:
        """As in `Executor`."""
        for worker in ask_workers(self._client, paths=paths):
            if worker.missing:
                raise ClusterError(
                    f"worker {worker.address} on {worker.host} does not see {worker.missing[0]}; "
                    "all machines of a cluster need base, checkpoints, store and output under the "
                    "same paths"
                )

    def run(
        self,
        stage: Stage[Any, Any, Any],
        groups: Sequence[Group[Any, Any]],
        *,
        workers: int,
        name: str,
        progress: Progress,
    ) -> dict[Any, Any]:
        """As in `Executor`.

        Raises
        ------
        ClusterError
            If tasks end with their workers again and again, or the scheduler is lost.
        """
        total = sum(group.nbytes for group in groups)
        run = f"{re.sub('[^a-z]+', '-', name)}-{uuid.uuid4().hex[:8]}"
        graph = build_graph(
            PackedStage(stage, run, workers),
            groups,
            begins=stage.begins,
            task_bytes=costs.cluster_task_bytes(total, self._threads, TASK_BYTES),
            name=run,
        )
        progress.start(name, total)
        resources = {GPU: stage.device_share} if stage.device_share else None
        results: Mapping[Any, list[Any]] = {}
        if graph.outputs:
            results = StageRun(self._client, run, graph, progress, resources, self._warn).results()
        progress.finish()
        return {
            key: result
            for done, keys in graph.outputs.items()
            for key, result in zip(keys, results[done], strict=True)
        }

    def _warn(self, text: str) -> None:
        """Warn of what tasks told, of stages and processes that may all tell the same."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RelexStreamWarning, stacklevel=2)
