"""Projections follow nodes, threads and the cost of a task."""

from __future__ import annotations

import pytest

from benchmarks.scaling.figures import STORED_BITS
from benchmarks.scaling.projection import Site, project, size_rows
from tests.benchmarks.scaling.small import SMALL


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
        "columns_s": 0.1,
    }
    tasks = {("build", 16, n): 7 for n in (4, 40)}
    tasks |= {(stage, 20, n): 7 for n in (4, 40) for stage in ("statistics", "write")}
    site = Site(4, 1e9, 1e10, 1e-3)
    few, many = (project(SMALL, client, tasks, site, n, 20, 0.005, 16) for n in (1, 10))
    for one, ten in zip(few, many, strict=True):
        for part in ("read_s", "cores_s"):
            assert 0 < ten[part] < one[part]
        assert ten["cores_s"] == pytest.approx(one["cores_s"] / 10)
        assert ten["scheduler_s"] == one["scheduler_s"]
        assert one["projected_s"] >= max(one["read_s"], one["cores_s"], one["scheduler_s"])
    build, _ = few
    # 20 steps in two commits, each of which reads the base; the second what the first stored.
    assert build["tasks"] == 14
    assert build["store GB"] == pytest.approx(20 * 0.005 * SMALL.weights * STORED_BITS / 8e9)
    least_s = (20 + 2) * SMALL.nbytes / 1e9
    assert least_s < build["read_s"] < 1.01 * least_s


def test_a_size_grows_with_threads_and_with_the_cost_of_a_task():
    (one, four) = size_rows((0.05,), (1, 4), 1e-3)
    (twice,) = size_rows((0.05,), (1,), 2e-3)
    for name in one:
        if name not in ("part", "threads"):
            assert four[name] == pytest.approx(4 * one[name])
            assert twice[name] == pytest.approx(2 * one[name])
