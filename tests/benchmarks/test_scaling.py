"""The `scaling` benchmark: its counts add up, and all of it runs on a tiny model."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
from click.testing import CliRunner

from benchmarks import scaling
from benchmarks.__main__ import cli
from benchmarks.trajectory import PRESETS
from relex_stream import planner
from relex_stream.errors import MemoryLimitError
from relex_stream.sources import open_checkpoint

SMALL = scaling.Model(
    "small",
    scaling.mixture_shapes(
        hidden=1024,
        inner=256,
        dense_inner=2048,
        layers=3,
        experts=8,
        heads=4,
        vocabulary=4000,
    ),
    shard_bytes=20_000_000,
)


@pytest.mark.parametrize(
    ("name", "weights", "tensors"),
    [
        ("8B", 8_190_735_360, 399),
        ("70B", 70_553_706_496, 723),
        ("405B", 405_853_388_800, 1137),
        ("1T", 1.027e12, 70_000),
    ],
)
def test_models_are_as_large_as_those_they_are_named_after(name, weights, tensors):
    model = scaling.MODELS[name]()
    assert model.weights == pytest.approx(weights, rel=0.001)
    assert len(model.shapes) == pytest.approx(tensors, rel=0.005)
    assert sum(len(shapes) for shapes in scaling.shards(model)) == len(model.shapes)


def test_hollow_checkpoints_are_read_like_any_other(tmp_path):
    scaling.write_hollow(SMALL, tmp_path / "hollow")
    found = open_checkpoint(tmp_path / "hollow", 3)
    assert {name: place.spec.shape for name, place in found.tensors.items()} == SMALL.shapes
    assert found.nbytes > SMALL.nbytes
    assert len(found.weights_files) == len(scaling.shards(SMALL)) > 1


@pytest.mark.parametrize("stage", scaling.STAGES)
def test_every_byte_is_in_one_task(stage):
    tensors, steps, share = scaling.describe(SMALL), 10, 0.01
    groups = scaling.groups_of(stage, tensors, steps, share)
    blocks = [at for group in groups for task in group.tasks for at in task]
    assert sum(at.elements for at in blocks) == SMALL.weights
    assert len(set(blocks)) == len(blocks) == scaling.least_shape(tensors).blocks
    total = sum(group.nbytes for group in groups)
    if stage == "build":
        assert total == steps * SMALL.nbytes
    rows = scaling.graph_rows("small", stage, groups, steps, (1, 4, 64))
    for row in rows:
        assert row["work_bytes"] == total
        assert row["mean_bytes"] * row["at work"] == pytest.approx(total)
        assert row["tasks"] == row["at work"] + row["sums"]
        assert row["at work"] <= sum(len(group.tasks) for group in groups)
        counts = scaling.graph_counts(groups, row["threads"], begins=stage == "statistics")
        assert counts == {name: row[name] for name in counts}
    assert rows[0]["tasks"] <= rows[-1]["tasks"]


def test_a_model_and_its_history_make_the_changes():
    totals = scaling.totals_of(scaling.describe(SMALL), 10, 0.01)
    assert sum(totals.changes) == pytest.approx(0.1 * SMALL.weights, rel=0.01)
    assert len(totals.changes) == len(totals.frame_bytes)


@pytest.mark.parametrize("plan", [scaling.plan_build, scaling.plan_extrapolate])
def test_the_least_limit_is_the_least(plan):
    tensors = scaling.describe(SMALL)
    arguments = (SMALL.nbytes, 100) if plan is scaling.plan_build else (100,)
    planned = partial(plan, tensors, *arguments, threads=4)
    limit = scaling.least_limit(planned, 4)
    assert planned(limit).workers == 4
    assert planned(limit).projected_bytes <= limit
    assert planned(limit - (1 << 20)).workers < 4
    with pytest.raises(MemoryLimitError):
        planned(100 << 20)


def test_more_nodes_take_no_longer_but_for_the_scheduler():
    client = {
        "record_bytes": 1000,
        "tensors": len(SMALL.shapes),
        "blocks": 100,
        "open store_s": 0.1,
        "open next_s": 0.1,
        "match_s": 0.1,
        "commit_s": 0.1,
        "tables_s": 0.1,
    }
    tasks = {("build", 16, n): 7 for n in (4, 40)}
    tasks |= {(stage, 20, n): 7 for n in (4, 40) for stage in ("statistics", "write")}
    site = scaling.Site(4, 1e9, 1e10, 1e-3)
    few, many = (scaling.project(SMALL, client, tasks, site, n, 20, 0.005) for n in (1, 10))
    for one, ten in zip(few, many, strict=True):
        for part in ("read_s", "cores_s"):
            assert 0 < ten[part] < one[part]
        assert ten["cores_s"] == pytest.approx(one["cores_s"] / 10)
        assert ten["scheduler_s"] == one["scheduler_s"]
        assert one["projected_s"] >= max(one["read_s"], one["cores_s"], one["scheduler_s"])
    build, _ = few
    # 20 steps in two commits, each of which reads the base; the second what the first stored.
    assert build["tasks"] == 14
    assert build["store GB"] == pytest.approx(
        20 * 0.005 * SMALL.weights * scaling.STORED_BITS / 8e9
    )
    least_s = (20 + 2) * SMALL.nbytes / 1e9
    assert least_s < build["read_s"] < 1.01 * least_s


def test_a_size_grows_with_threads_and_with_the_cost_of_a_task():
    (one, four) = scaling.size_rows((0.05,), (1, 4), 1e-3)
    (twice,) = scaling.size_rows((0.05,), (1,), 2e-3)
    for name in one:
        if name not in ("part", "threads"):
            assert four[name] == pytest.approx(4 * one[name])
            assert twice[name] == pytest.approx(2 * one[name])


def test_the_command_counts_runs_and_projects(tmp_path):
    path = tmp_path / "scaling.json"
    words = ["scaling", "--quick", "--directory", tmp_path / "work", "--json", path]
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "work").iterdir())
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        *("graphs", "client", "no work", "paced", "sizes", "memory", "projection"),
    ]
    (client,) = (row for row in rows if row["part"] == "client")
    assert client["weights"] == sum(map(math.prod, PRESETS["tiny"].shapes.values()))
    for row in rows:
        if row["part"] in ("no work", "paced"):
            assert 0 < row["at work"] <= row["tasks"]
            assert row["wall_s"] > 0
        if row["part"] == "memory":
            limits = row["one thread_bytes"], row["all threads_bytes"]
            assert 0 < limits[0] <= limits[1]
            assert (row["threads of 768 MiB"] > 0) == (limits[0] <= planner.DEFAULT_LIMIT_BYTES)
    assert "A task costs the scheduler" in result.output
