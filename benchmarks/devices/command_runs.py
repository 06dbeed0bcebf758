"""Whole extrapolations: by workers of the CPU, on the device, by a cluster of two that share it."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import document, program, remove
from benchmarks.devices.cases import START_CASE, Case, Settings, worker_options
from benchmarks.devices.pretend import PRETEND_PROGRAM, PRETEND_WORKER, environment
from benchmarks.devices.rounds import Deadline, Rounds, difference, measure_rounds
from benchmarks.processes import BenchmarkError, Program, alternate, end_process
from relex_stream import costs
from relex_stream.store import Store
from relex_stream.subspaces import (
    BlockTotals,
    SubspaceOptions,
    basis_columns,
    changed_tensors,
    split_routes,
    subspace_groups,
)

_CLUSTER_START_S = 120.0


class CommandRuns:
    """Whole extrapolations from one store by one route.

    Parameters
    ----------
    work : Path
        Where outputs go.
    """

    def __init__(self, settings: Settings, case: Case, route: str, root: Path, work: Path) -> None:
        self._settings = settings
        self._case = case
        self._route = route
        directory = root / case.name
        self._base, self.store = directory / "base", directory / "store"
        self._work = work
        self._compared: dict[str, tuple[float, int]] = {}

    def rows(self, deadline: Deadline) -> tuple[list[dict[str, Any]], list[str]]:
        """Return a row per program, and notes."""
        most = max(self._settings.workers)
        names = {count: f"cpu, {count} worker(s)" for count in self._settings.workers}
        programs = [self._program(name, "cpu", count) for count, name in names.items()]
        programs.append(self._program("cuda", "cuda", most))
        outputs = {each.name: self._output(each.name) for each in programs}
        reference = programs[0].name

        def compare() -> None:
            for name, out in outputs.items():
                self._compared[name] = difference(outputs[reference], out)

        found = measure_rounds(
            programs,
            outputs,
            runs=self._settings.runs,
            deadline=deadline,
            after_first=compare,
        )
        rows = [self._row(name, found, "cpu", count) for count, name in names.items()]
        rows.append(self._row("cuda", found, "cuda", most))
        notes: list[str] = []
        if self._settings.cluster and self._case is not START_CASE:
            more, notes = self._on_cluster(outputs[reference], deadline)
            rows += more
        for out in self._work.iterdir():
            if out.is_dir():
                remove(out)
        return rows, notes

    def _on_cluster(
        self, reference: Path, deadline: Deadline
    ) -> tuple[list[dict[str, Any]], list[str]]:
        name = "cuda, 2 processes"
        where = f"{self._case.name}, {self._route}, {name}"
        if importlib.util.find_spec("distributed") is None:
            return [], [f"{where}: left out, distributed is not installed."]
        if deadline.left_s < 0:
            return [], [f"{where}: left out, no time was left."]
        threads = max(1, max(self._settings.workers) // 2)
        cluster = gpu_cluster(
            self._work / "cluster", threads=threads, pretend=self._settings.pretend
        )
        out = self._output(name)
        try:
            with cluster as file:
                made = program(
                    name,
                    *self._arguments(out),
                    *("--devices", "cuda", "--scheduler", file, "--memory-limit", "16GiB"),
                    output=out,
                )
                found = measure_rounds(
                    [replace(made, env=environment())],
                    {name: out},
                    runs=self._settings.runs,
                    deadline=deadline,
                )
            self._compared[name] = difference(reference, out)
        except BenchmarkError as error:
            return [], [f"{where}: {error}"]
        return [self._row(name, found, "cluster", 2 * threads)], []

    def _output(self, name: str) -> Path:
        return self._work / "".join(each if each.isalnum() else "-" for each in name)

    def _arguments(self, out: Path) -> tuple[object, ...]:
        case = self._case
        target = ("--target-step", 2 * case.steps, "--history-steps", case.steps)
        return ("extrapolate", self.store, out, *target, "--svd", self._route, "--base", self._base)

    def _program(self, name: str, kind: str, workers: int) -> Program:
        out = self._output(name)
        made = program(
            name,
            *self._arguments(out),
            *("--devices", kind),
            *worker_options(workers),
            output=out,
        )
        argv = made.argv
        if kind == "cuda" and self._settings.pretend:
            argv = (sys.executable, "-c", PRETEND_PROGRAM, *argv[3:])
        return replace(made, argv=argv, env=environment())

    def _row(self, name: str, found: Rounds, kind: str, workers: int) -> dict[str, Any]:
        work = work_of(self.store, self._route, self._case.steps)
        plan = document(found.by_name[name][0])["plan"].get("devices") or {}
        share, most = self._compared[name]
        return {
            "part": "commands",
            "case": self._case.name,
            "route": self._route,
            "program": name,
            "workers": workers,
            **found.row(name),
            "differing_share": share,
            "most ULP": most,
            "blocks at a time": plan.get("slots"),
            "kind": kind,
            "work": {field: getattr(work, field) for field in work.__dataclass_fields__},
        }


def work_of(store_path: Path, route: str, rows: int) -> costs.DeviceWork:
    """Return an extrapolation to one target as `costs` sees it when devices are chosen."""
    store = Store(store_path)
    options = SubspaceOptions(rows, 1, route, 1)
    changed = changed_tensors(store, rows)
    groups = subspace_groups(changed, BlockTotals.of(store, rows), options)
    _, randomized = split_routes(groups, options)
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    return costs.DeviceWork(
        elements=sum(tensor.elements for tensor in changed),
        changes=int(store.changed[:rows].sum(dtype=np.int64)),
        rows=rows,
        itemsize=max(tensor.itemsize for tensor in tracked),
        base_itemsize=max(tensor.base_itemsize for tensor in tracked),
        basis=basis_columns(options) if randomized else 0,
        passes=1,
        outputs=1,
    )


@contextlib.contextmanager
def gpu_cluster(directory: Path, *, threads: int, pretend: bool) -> Iterator[Path]:
    """Start a scheduler and two workers that share the first GPU; yield the scheduler's file."""
    from distributed import Client

    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    worker = [*common, "--nthreads", str(threads), "--memory-limit", "0", "--no-nanny"]
    worker += ["--resources", "GPU=1", "--local-directory", str(directory / "scratch")]
    if pretend:
        preload = directory / "pretend.py"
        preload.write_text(PRETEND_WORKER, encoding="utf-8")
        worker += ["--preload", str(preload)]
    local = ["--host", "127.0.0.1"]
    commands = [["scheduler", *common, *local, "--port", "0"], *[["worker", *worker, *local]] * 2]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "cluster.log").open("w"))
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            stack.callback(end_process, process)
        try:
            _wait_for(file)
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(2, timeout=_CLUSTER_START_S)
        except (OSError, TimeoutError) as error:
            tail = (directory / "cluster.log").read_text(encoding="utf-8")[-2000:]
            raise BenchmarkError(f"the cluster did not start: {error}\n{tail}") from error
        yield file


def _wait_for(file: Path) -> None:
    until = time.monotonic() + _CLUSTER_START_S
    while not file.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no {file.name} after {_CLUSTER_START_S:.0f} s")
        time.sleep(0.05)


def default_limit_note(settings: Settings, root: Path, work: Path) -> str:
    """Say whether a command on the device fits the memory limit that holds if none is named."""
    directory = root / START_CASE.name
    words = ("extrapolate", directory / "store", work / "limited", "--target-step", 12)
    made = program("default limit", *words, "--base", directory / "base", "--devices", "cuda")
    if settings.pretend:
        made = replace(made, argv=(sys.executable, "-c", PRETEND_PROGRAM, *made.argv[3:]))
    try:
        ((measured,),) = alternate([replace(made, env=environment())], runs=1, warmup=0).values()
    except BenchmarkError as error:
        reason = str(error).strip().splitlines()[-1]
        return f"With the default memory limit a command on the device fails: {reason}"
    workers = document(measured)["plan"]["workers"]
    return (
        f"With the default memory limit a command on the device runs with {workers} worker(s), its "
        f"peak {measured.peak_rss_bytes >> 20} MiB."
    )
