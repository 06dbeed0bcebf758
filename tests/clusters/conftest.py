"""What the tests of a module share: clusters, a run to work on, and small tasks."""

from __future__ import annotations

from collections.abc import Iterator

import distributed
import pytest

from relex_stream import costs
from relex_stream.graph import stages
from tests.clusters.runs import TENSORS, client_of, processes
from tests.make_checkpoints import Trajectory, make_trajectory


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster of two processes with two threads each."""
    with processes(2, 2) as address:
        yield address


@pytest.fixture
def mortal() -> Iterator[distributed.Client]:
    """A cluster of two processes, which may die."""
    with processes(2, 1, silence_logs=50) as address, client_of(address) as client:
        yield client


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """Twenty steps of four tensors, two of which are cut into many blocks."""
    root = tmp_path_factory.mktemp("run")
    return make_trajectory(root, steps=range(1, 21), tensors=TENSORS, change_share=0.1)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stages of a few kilobytes cut into many tasks, as large ones are."""
    monkeypatch.setattr(stages, "TASK_BYTES", 4 << 10)
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: 16 << 10)


@pytest.fixture
def each_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every group be a dask task of its own."""
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: 1)


@pytest.fixture
def cut_to_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every leaf of a group be a dask task."""
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
