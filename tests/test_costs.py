"""Models of time: what they grow with, and what they may choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream import costs
from relex_stream.costs import DeviceWork, cluster_task_bytes
from relex_stream.graph.stages import TASK_BYTES

DENSE = DeviceWork(
    elements=10**9,
    changes=50 * 10**9,
    rows=50,
    itemsize=4,
    base_itemsize=4,
    basis=8,
    passes=1,
    outputs=1,
)
SPARSE = replace(DENSE, changes=DENSE.changes // 200, itemsize=2, base_itemsize=2)


def test_projections_grow_with_the_work_and_shrink_with_the_machine():
    works = [DENSE, SPARSE, replace(DENSE, sweeps=9)]
    for work in works + [replace(work, basis=0) for work in works]:
        cpu_s, device_s = costs.projected_cpu_s(work, 4), costs.projected_device_s(work, 4, 1)
        assert costs.projected_cpu_s(work, 8) == pytest.approx(cpu_s / 2)
        assert costs.projected_device_s(work, 8, 2) < device_s
        for field in ("elements", "changes", "passes", "outputs"):
            larger = replace(work, **{field: 2 * getattr(work, field)})
            assert costs.projected_cpu_s(larger, 4) > cpu_s
        wider = replace(work, elements=2 * work.elements, changes=2 * work.changes)
        assert costs.projected_device_s(wider, 4, 1) > device_s > costs.DEVICE_START_S


def test_what_is_decoded_again_for_each_sweep_takes_the_cpu_longer():
    for basis in (0, 8):
        kept = replace(DENSE, basis=basis)
        times = [costs.projected_cpu_s(replace(kept, sweeps=sweeps), 4) for sweeps in (0, 9)]
        assert times[1] > 1.3 * times[0]
        devices = {costs.projected_device_s(replace(kept, sweeps=n), 4, 1) for n in (0, 9)}
        assert len(devices) == 1  # which keep it


def test_a_device_gains_no_more_than_what_is_left_to_it():
    # Frames are decoded by the cores whatever happens: with a device without end, about three times
    # as fast for dense float32.
    cpu_s = costs.projected_cpu_s(DENSE, 16)
    device_s = costs.projected_device_s(DENSE, 16, 10**6) - costs.DEVICE_START_S
    assert 2.5 < cpu_s / device_s < 4


@given(total=st.integers(0, 1 << 60), workers=st.integers(1, 4096))
def test_tasks_of_a_cluster_leave_the_scheduler_its_share(total, workers):
    size = cluster_task_bytes(total, workers, TASK_BYTES)
    assert size >= TASK_BYTES
    # At their quickest, all threads together finish a task in so many seconds.
    each_s = size / costs._WORK_BYTES_PER_S / workers
    kept_up = costs.SCHEDULER_SHARE * each_s * 1.000001 >= costs.SCHEDULER_TASK_S
    few = total < size * workers * costs._TASKS_PER_WORKER + size * workers
    assert kept_up or few
    # And all have work, unless it is not worth cutting any more; enough of it for all to end at
    # about the same time, unless the scheduler would not keep up at all.
    assert size == TASK_BYTES or total >= size * workers * costs._TASKS_PER_WORKER_AT_LEAST
    behind = costs.SCHEDULER_SHARE_AT_MOST * each_s <= costs.SCHEDULER_TASK_S * 1.000001
    assert size == TASK_BYTES or total >= size * workers * costs._TASKS_PER_WORKER or behind
