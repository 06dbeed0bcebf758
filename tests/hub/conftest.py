"""A Hub on the loopback interface that this process takes for the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from relex_stream.hub import client
from tests.hub.server import FakeHub, content_of, serving
from tests.make_checkpoints import Trajectory, make_trajectory


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """A small run whose checkpoints have two shards."""
    shapes = {"embed": (64, 24), "mlp": (90, 512), "norm": (24,)}
    root = tmp_path_factory.mktemp("run")
    return make_trajectory(root, steps=(10, 20, 30, 40), tensors=shapes, layout="step_{step}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub without repositories; requests that fail are made again at once."""
    home = tmp_path / "hf"
    with serving() as hub:
        # They are read from the environment when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "none"), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(client, "RETRY_WAITS_S", (0.0,) * 5)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def published(hub: FakeHub, run: Trajectory) -> FakeHub:
    """``org/run`` with a branch for each step, and the base on ``main``."""
    repository = hub.add("org/run")
    repository.commit(content_of(run.base), branch="main")
    for step in run.steps:
        repository.commit(content_of(run.directories[step]), branch=f"step_{step}")
    return hub
