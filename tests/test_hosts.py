"""A cluster of several hosts that share a directory: scheduler, workers and the command apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import relex_stream as rs
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.namespaces import Host, hosts, why_not

TENSORS = {f"layers.{layer}.weight": (900, 1000) for layer in range(12)} | {"norm.bias": (300,)}


@pytest.fixture(autouse=True)
def _allowed() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("run")
    return make_trajectory(root, steps=range(1, 13), tensors=TENSORS, change_share=0.02)


WAIT = """
import os, sys, time
from distributed import Client
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
with Client(scheduler_file=sys.argv[1], timeout=20) as client:
    client.wait_for_workers(int(sys.argv[2]), timeout=30)
"""


@dataclass
class Machines:
    """A host for the command and the scheduler, and some with a worker each."""

    command: Host
    workers: list[Host]
    scheduler_file: Path

    def relex_stream(self, *arguments: object, **options: object) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "relex_stream", *map(str, arguments)]
        return self.command.popen(
            [*program, "--scheduler", str(self.scheduler_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )


@contextmanager
def machines(count: int, root: Path, *, nthreads: int = 1) -> Iterator[Machines]:
    """Start a cluster on hosts of its own; a lost connection is noticed after seconds."""
    root.mkdir()
    file = root / "scheduler.json"
    config = root / "dask.yaml"
    config.write_text(
        "distributed: {comm: {timeouts: {connect: 3s, tcp: 12s}}, scheduler: {worker-ttl: 15s}}"
    )
    with hosts(1 + count) as made:
        for number, host in enumerate(made):
            kind = ["worker", "--nthreads", str(nthreads), "--memory-limit", "0"]
            program = ["scheduler"] if number == 0 else kind
            common = ["--scheduler-file", str(file), "--host", host.address, "--no-dashboard"]
            log = (root / f"{host.name}.log").open("w")
            host.popen(
                [sys.executable, "-m", "dask", *program, *common],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment()
                | {"DASK_CONFIG": str(root), "DASK_TEMPORARY_DIRECTORY": str(root)},
            )
            log.close()
        yield Machines(made[0], made[1:], file)


def _environment() -> dict[str, str]:

    return dict(os.environ)


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "relex_stream.json"
    }


def finished(process: subprocess.Popen[str], *, status: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    return output, errors


def test_hosts_that_share_a_directory_write_what_one_does(run: Trajectory, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    with machines(2, tmp_path / "cluster") as cluster:
        _, log = finished(
            cluster.relex_stream("build-store", run.base, run.checkpoints, there, "--include-base")
        )
        # Progress, and where the cluster is, come to the terminal.
        assert f"dask scheduler at tcp://{cluster.command.address}:" in log
        assert "encode steps 1 to 12: done" in log
        output, _ = finished(
            cluster.relex_stream(
                "extrapolate", there, tmp_path / "there.out", "--target-step", 30, "--json"
            )
        )
    assert json.loads(output)["plan"]["processes"] == 2
    rs.build_store(run.base, run.checkpoints, here, include_base=True)
    assert tree(there) == tree(here)
    rs.extrapolate(here, tmp_path / "here.out", target_steps=[30])
    assert tree(tmp_path / "there.out") == tree(tmp_path / "here.out")


def begin(process: subprocess.Popen[str]) -> None:
    """Wait until the workers have their tasks."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("encode"):
            return
    raise AssertionError("it ended before it began")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_host_that_is_lost_changes_nothing(run: Trajectory, tmp_path: Path, how: str) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    with machines(3, tmp_path / "cluster") as cluster:
        process = cluster.relex_stream("build-store", run.base, run.checkpoints, there)
        begin(process)
        getattr(cluster.workers[0], how)()
        finished(process)
        scheduler_log = (tmp_path / "cluster" / f"{cluster.command.name}.log").read_text()
    # The scheduler had given it work, and took it back.
    assert "Remove worker" in scheduler_log
    rs.build_store(run.base, run.checkpoints, here)
    assert tree(there) == tree(here)
    assert rs.verify(there).problems == ()


@pytest.mark.slow
def test_a_command_whose_scheduler_is_lost_says_so(run: Trajectory, tmp_path: Path) -> None:
    there = tmp_path / "there"
    with machines(1, tmp_path / "cluster") as cluster:
        scheduler, cluster.command = cluster.command, cluster.workers[0]
        process = cluster.relex_stream("build-store", run.base, run.checkpoints, there)
        begin(process)
        scheduler.kill()
        _, log = finished(process, status=2)
    assert "error: the cluster gave up the work" in log
    assert "Traceback" not in log
    # And by itself it goes on where that ended.
    rs.build_store(run.base, run.checkpoints, there)
    rs.build_store(run.base, run.checkpoints, tmp_path / "here")
    assert tree(there) == tree(tmp_path / "here")
