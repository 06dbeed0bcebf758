"""Threads that are timed together."""

from __future__ import annotations

import threading

import pytest

from benchmarks.devices.clock import together

PATIENCE_S = 30


def test_threads_work_at_once_and_their_errors_are_told():
    meet = threading.Barrier(3, timeout=PATIENCE_S)
    assert together(3, meet.wait, 2) > 0

    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        together(2, fail, 1)
