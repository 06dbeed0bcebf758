"""Fixtures for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import relex_stream as rs

SHIPPED_STORE = Path(rs.__file__).parent / "demo" / "data" / "store"


@dataclass(frozen=True)
class RealTrajectory:
    """Directories of a run that reinforcement learning really made."""

    base: Path
    checkpoints: Path
    steps: tuple[int, ...]


@pytest.fixture(scope="session")
def real_trajectory(tmp_path_factory: pytest.TempPathFactory) -> RealTrajectory:
    """The demonstration's run as a trainer left it: every shipped step, exported."""
    if not SHIPPED_STORE.is_dir():
        pytest.skip(f"no shipped trajectory at {SHIPPED_STORE}")
    root = tmp_path_factory.mktemp("real")
    steps = rs.open_store(SHIPPED_STORE).steps
    rs.export(SHIPPED_STORE, root / "base", step=0)
    for step in steps:
        rs.export(SHIPPED_STORE, root / "checkpoints" / f"step_{step}", step=step)
    return RealTrajectory(root / "base", root / "checkpoints", steps)
