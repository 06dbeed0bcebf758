"""A real scheduler that hands out graphs without work to real workers, all of them here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import BenchmarkError, end_process
from benchmarks.scaling.figures import element_ns
from benchmarks.scaling.graphs import STAGES, build_groups, describe, graph_counts, groups_of
from benchmarks.scaling.models import MODELS
from benchmarks.scaling.stand_ins import stand_in
from relex_stream.graph import Group
from relex_stream.graph.cluster import Cluster
from relex_stream.specs import STEP_GROUP, NoProgress

_IDLE_S = 4.0


def run_graphs(
    cluster: Running,
    names: Sequence[str],
    steps: int,
    share: float,
    *,
    most_tasks: int,
    paced: Sequence[str],
) -> list[dict[str, Any]]:
    """Run the graphs of all stages without work, as large as they are.

    Those of the models in `paced` also as fast as the work would go.
    """
    rows = []
    # The first run loads what later ones have.
    cluster.measure("tiny", "build", build_groups(describe(MODELS["tiny"]()), 2), 2, share)
    threads = cluster.processes * cluster.threads
    for name in names:
        tensors = describe(MODELS[name]())
        for stage in STAGES:
            count = STEP_GROUP if stage == "build" else steps
            groups = groups_of(stage, tensors, count, share)
            counts = graph_counts(groups, threads, begins=stage == "statistics")
            if counts["tasks"] > most_tasks:
                continue
            rows.append(cluster.measure(name, stage, groups, count, share))
            if name in paced:
                rows.append(cluster.measure(name, stage, groups, count, share, paced=True))
    return rows


@contextlib.contextmanager
def running_cluster(root: Path, processes: int, threads: int) -> Iterator[Running]:
    """Start a scheduler and workers in processes of their own, and end them."""
    where = root / f"scheduler-{processes}-{threads}.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(
            _process(
                root,
                environment,
                *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"),
                *("--dashboard-address", "127.0.0.1:0", "--no-show", "--scheduler-file", where),
            )
        )
        _wait_for(where, scheduler)
        for number in range(processes):
            stack.enter_context(
                _process(
                    root,
                    environment,
                    *("distributed.cli.dask_worker", "--scheduler-file", where, "--no-nanny"),
                    *("--nthreads", threads, "--memory-limit", 0, "--no-dashboard"),
                    *("--local-directory", root / f"worker-{number}", "--name", number),
                    *("--host", "127.0.0.1"),
                )
            )
        from distributed import Client as DaskClient

        address = json.loads(where.read_bytes())["address"]
        client = stack.enter_context(DaskClient(address, timeout=30, set_as_default=False))
        client.wait_for_workers(processes, timeout=60)
        there = psutil.Process(scheduler.pid)
        time.sleep(1)
        before = _cpu_s(there)
        time.sleep(_IDLE_S)
        idle_share = (_cpu_s(there) - before) / _IDLE_S
        yield Running(client, there, processes, threads, idle_share)


@contextlib.contextmanager
def _process(
    root: Path, environment: Mapping[str, str], *words: object
) -> Iterator[subprocess.Popen[bytes]]:
    with open(root / "cluster.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        end_process(process)


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        if process.poll() is not None or time.monotonic() > until:
            raise BenchmarkError("the scheduler did not start; is distributed installed?")
        time.sleep(0.05)


@dataclass(frozen=True)
class Running:
    """A cluster that runs here.

    Attributes
    ----------
    threads : int
        Of each process.
    idle_share : float
        Of a processor, that the scheduler takes without tasks.
    """

    client: Any
    scheduler: psutil.Process
    processes: int
    threads: int
    idle_share: float

    def measure(
        self,
        name: str,
        stage: str,
        groups: Sequence[Group[Any, Any]],
        steps: int,
        share: float,
        *,
        paced: bool = False,
    ) -> dict[str, Any]:
        """Run a stage's graph through `Cluster`; return a row."""
        cluster = Cluster(self.client)
        cluster.prepare(_warm_up_nothing, None, NoProgress())
        work = stand_in(stage, steps, share, paced=paced)
        load = os.getloadavg()[0]
        here = psutil.Process()
        cpu = _cpu_s(self.scheduler), _cpu_s(here)
        started = time.perf_counter()
        cluster.run(work, groups, workers=self.threads, name=stage, progress=NoProgress())
        wall_s = time.perf_counter() - started
        scheduler_s, client_s = _cpu_s(self.scheduler) - cpu[0], _cpu_s(here) - cpu[1]
        net_s = max(0.0, scheduler_s - self.idle_share * wall_s)
        update = self._last_update()
        threads = self.processes * self.threads
        row = graph_counts(groups, threads, begins=work.begins)
        tasks = row["tasks"]
        elements = sum(at.elements for group in groups for task in group.tasks for at in task)
        work_s = element_ns(stage, steps, share) * 1e-9 * elements / threads if paced else None
        return {
            "part": "paced" if paced else "no work",
            "model": name,
            "stage": stage,
            "steps": steps,
            "processes": self.processes,
            "threads": threads,
            **row,
            "wall_s": wall_s,
            "alone_s": work_s,
            "wall per task, ms": 1e3 * wall_s / tasks,
            "scheduler per task, ms": 1e3 * net_s / tasks,
            "client per task, ms": 1e3 * client_s / tasks,
            "scheduler_share": scheduler_s / wall_s,
            "order per task, ms": 1e3 * update["ordering"] / tasks,
            "take apart per task, ms": 1e3 * update["materialization"] / tasks,
            "enter per task, ms": 1e3 * update["state_initialization"] / tasks,
            "scheduler rss_bytes": self.scheduler.memory_info().rss,
            "load before": load,
        }

    def _last_update(self) -> dict[str, float]:
        events = [event for _, event in self.client.get_events("scheduler")]
        metrics = [e["metrics"] for e in events if e.get("action") == "update-graph"][-1]
        # Some are differences the wrong way round.
        return {
            name: abs(metrics[f"{name}_duration_seconds"])
            for name in ("materialization", "ordering", "state_initialization")
        }


def _warm_up_nothing(_formats: Any, _progress: Any) -> None:
    pass


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
