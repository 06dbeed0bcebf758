"""Fixtures for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream.demo.run import TRAJECTORY


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
