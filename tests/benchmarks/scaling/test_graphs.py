"""Counts of groups and graphs add up to the model."""

from __future__ import annotations

import pytest

from benchmarks.scaling.graphs import (
    STAGES,
    describe,
    graph_counts,
    graph_rows,
    groups_of,
    least_shape,
    totals_of,
)
from tests.benchmarks.scaling.small import SMALL


@pytest.mark.parametrize("stage", STAGES)
def test_every_byte_is_in_one_task(stage):
    tensors, steps, share = describe(SMALL), 10, 0.01
    groups = groups_of(stage, tensors, steps, share)
    blocks = [at for group in groups for task in group.tasks for at in task]
    assert sum(at.elements for at in blocks) == SMALL.weights
    assert len(set(blocks)) == len(blocks) == least_shape(tensors).blocks
    total = sum(group.nbytes for group in groups)
    if stage == "build":
        assert total == steps * SMALL.nbytes
    rows = graph_rows("small", stage, groups, steps, (1, 4, 64))
    for row in rows:
        assert row["work_bytes"] == total
        assert row["mean_bytes"] * row["at work"] == pytest.approx(total)
        assert row["tasks"] == row["at work"] + row["sums"]
        assert row["at work"] <= sum(len(group.tasks) for group in groups)
        counts = graph_counts(groups, row["threads"], begins=stage == "statistics")
        assert counts == {name: row[name] for name in counts}
    assert rows[0]["tasks"] <= rows[-1]["tasks"]


def test_a_model_and_its_history_make_the_changes():
    totals = totals_of(describe(SMALL), 10, 0.01)
    assert sum(totals.changes) == pytest.approx(0.1 * SMALL.weights, rel=0.01)
    assert len(totals.changes) == len(totals.frame_bytes)
