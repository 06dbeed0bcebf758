"""Fixtures for all tests."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

import relex_stream as rs
from relex_stream.demo.run import TRAJECTORY

# How long an example takes says nothing where other work runs beside it.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@dataclass(frozen=True)
class RealTrajectory:
    """Directories of a run that reinforcement learning really made."""

    base: Path
    checkpoints: Path
    steps: tuple[int, ...]


@pytest.fixture(scope="session")
def real_trajectory(tmp_path_factory: pytest.TempPathFactory) -> RealTrajectory:
    """The demonstration's run as a trainer left it: every shipped step, exported."""
    root = tmp_path_factory.mktemp("real")
    steps = rs.open_store(TRAJECTORY).steps
    rs.export(TRAJECTORY, root / "base", step=0)
    for step in steps:
        rs.export(TRAJECTORY, root / "checkpoints" / f"step_{step}", step=step)
    return RealTrajectory(root / "base", root / "checkpoints", steps)


@pytest.fixture(scope="session")
def torch_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several ranks, as torch writes them: tests/torch_writers/distributed.py."""
    return _written_once(tmp_path_factory, "tests.torch_writers.distributed")


@pytest.fixture(scope="session")
def verl_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verl's FSDP workers leave: tests/torch_writers/verl.py."""
    return _written_once(tmp_path_factory, "tests.torch_writers.verl")


@pytest.fixture(scope="session")
def torch_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of several steps in layouts of trainers: tests/torch_writers/runs.py."""
    return _written_once(tmp_path_factory, "tests.torch_writers.runs")


def _written_once(factory: pytest.TempPathFactory, module: str) -> Path:
    """Run a module that writes into the directory it is given, once for all of xdist's workers."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    root, done = shared / module, shared / f"{module}.done"
    with (shared / f"{module}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)  # of a worker that failed
            root.mkdir()
            command = [sys.executable, "-m", module, str(root)]
            written = subprocess.run(
                command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
            )
            assert written.returncode == 0, written.stderr
            done.touch()
    return root
