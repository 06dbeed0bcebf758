"""What measured rows say about the constants of `costs`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.devices.constants import fit_nonnegative, suggested_constants
from benchmarks.devices.on_device import Peaks


def test_fits_find_what_times_were_made_of():
    truth = np.array([1.5, 0.0, 6.0, 0.35])
    counts = np.random.default_rng(0).uniform(1, 1e6, (12, 4))
    found, worst = fit_nonnegative(counts, counts @ truth)
    assert found == pytest.approx(truth, abs=1e-9)
    assert worst < 1e-9


def test_constants_come_from_the_rows_that_tell_of_them():
    assert suggested_constants([]) == {}
    starts = [
        {"part": "commands", "case": "start", "program": name, "wall_s": wall_s}
        for name, wall_s in (("cpu, 1 worker(s)", 1.5), ("cuda", 6.0))
    ]
    assert suggested_constants(starts)["DEVICE_START_S"][0] == 4.5
    peaks = Peaks(2e12, 5e10, 5e10, 1e10, 4e13).rows()
    dense = 10**6
    stages = [
        {"stage": "put", "block": "b", "device ms": 1.0, "link_bytes": 4e7},
        # At 2e12 bytes per second, 250 and 300 bytes per element; the product takes its own.
        {"stage": "products, k=8", "block": "b", "device ms": 0.125 + 8e-7 * 1e3},
        {"stage": "outputs, o=1", "block": "b", "device ms": 0.162},
    ]
    rows = peaks + [{"part": "stages", "dense": dense} | row for row in stages]
    found = {name: value for name, (value, _) in suggested_constants(rows).items()}
    assert found["DEVICE_LINK_BYTES_PER_S"] == pytest.approx(4e10)
    assert found["DEVICE_MEMORY_BYTES_PER_S"] == pytest.approx(2e12)
    assert found["DEVICE_FLOPS"] == pytest.approx(4e13)
    assert found["DEVICE_DENSE_BYTES"] == pytest.approx((250 + 300) / 2)
