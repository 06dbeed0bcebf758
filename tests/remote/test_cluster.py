"""Workers of a cluster that share a store, a base and checkpoints on object storage."""

from __future__ import annotations

import pytest

import relex_stream as rs
from tests.crash.replay import read_tree, unsynced
from tests.make_checkpoints import make_trajectory
from tests.make_stores import build_store

pytestmark = pytest.mark.slow

SHAPES = {"big.weight": (300, 512), "other.weight": (128, 512), "bias": (1009,), "scale": ()}


def test_a_cluster_builds_appends_and_extrapolates_there(tmp_path, bucket, upload):
    run = make_trajectory(tmp_path, steps=range(1, 6), tensors=SHAPES)
    local = tmp_path / "store"
    with unsynced():
        build_store(run.base, run.checkpoints, local, block_bytes=1 << 15)
    base = upload(run.base, bucket / "run" / "base")
    checkpoints = upload(run.checkpoints, bucket / "run" / "checkpoints")
    url = bucket / "run" / "store"
    for steps in ("1:3", "1:5"):
        build_store(base, checkpoints, url, steps=steps, block_bytes=1 << 15, local_cluster=2)
    from relex_stream.objects import objects_at

    objects = objects_at(url)
    there = {key: objects.get(key) for key in objects.listing()}
    here = {key: data for key, data in read_tree(local).items() if data is not None}
    assert there == here
    outputs = []
    for place, options in ((url, {"local_cluster": 2}), (local, {})):
        out = tmp_path / f"out-{len(outputs)}"
        rs.extrapolate(str(place), out, target_steps=[9], **options)
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
