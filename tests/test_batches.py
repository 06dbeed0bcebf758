"""What a build tells of the steps that it committed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from relex_stream.store import Store
from tests.make_checkpoints import make_trajectory
from tests.make_stores import build_store


def test_what_changed_is_counted_over_blocks_and_added_steps(tmp_path: Path) -> None:
    run = make_trajectory(
        tmp_path, steps=(1, 2, 3, 4), tensors={"a": (60, 20), "b": (33,)}, change_share=0.1
    )
    changed = {
        step: sum(
            int(np.count_nonzero(run.bits[step][name] != run.bits[step - 1][name]))
            for name in run.bits[0]
        )
        for step in run.steps
    }
    store = tmp_path / "store"
    for steps, rows in (((1, 2, 3), slice(0, 3)), ((4,), slice(3, 4))):
        summary = build_store(
            run.base,
            run.checkpoints,
            store,
            steps=f"1:{steps[-1]}",
            block_bytes=64,
            commit_steps=2,
        )
        assert summary.steps_added == steps
        assert summary.changed_weights == sum(changed[step] for step in steps)
        frame_bytes = int(Store(store).frame_bytes[rows].sum())
        assert summary.bits_per_changed_weight == 8 * frame_bytes / summary.changed_weights
