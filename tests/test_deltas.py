"""Stores built from feeds of changes are those built from whole checkpoints, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import relex_stream as rs
from relex_stream.store import Store
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_deltas import changed_run, grail_run, slime_run

SHAPES = {
    "model.embed_tokens.weight": (96, 40),
    "model.layers.0.mlp.weight": (300, 512),
    "model.layers.0.mlp.bias": (10007,),
    "model.layers.0.norm.weight": (24,),
    "unused": (0, 4),
}

FEEDS: dict[str, tuple[Callable[..., Path], dict[str, Any], dict[str, Any]]] = {
    # writer, its options, those of build_store
    "xor": (slime_run, {}, {}),
    "overwrite": (slime_run, {"encoding": "overwrite", "files": 1}, {}),
    "v2": (grail_run, {"codec": "v2"}, {}),
    "v3": (grail_run, {"codec": "v3"}, {}),
    "v3.1": (grail_run, {}, {}),
    "with models": (grail_run, {"full": (2, 3)}, {}),
    "tensors": (changed_run, {}, {"source": "changed-safetensors"}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(
        tmp_path_factory.mktemp("run"), steps=(1, 2, 3, 4), tensors=SHAPES, change_share=0.02
    )


@pytest.fixture(scope="module")
def whole(run: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "run.store"
    rs.build_store(run.base, run.checkpoints, store)
    return store


def chunks(store: Path) -> dict[str, bytes]:
    """Return the contents of all chunks of a store."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.name.startswith("c.")
    }


@pytest.mark.parametrize("kind", FEEDS)
def test_a_feed_comes_to_the_same_store(
    kind: str, run: Trajectory, whole: Path, tmp_path: Path
) -> None:
    write, options, settings = FEEDS[kind]
    feed = write(run, tmp_path / "feed", **options)
    summary = rs.build_store(run.base, feed, tmp_path / "run.store", **settings)
    assert summary.steps_added == run.steps
    assert chunks(tmp_path / "run.store") == chunks(whole) != {}
    ours, theirs = Store(tmp_path / "run.store"), Store(whole)
    for row in range(4):
        mine, other = ours.commit(row), theirs.commit(row)
        assert (mine.source_crc == other.source_crc).all()
        assert (mine.change_sq == other.change_sq).all()
        assert (mine.sketch == other.sketch).all()
