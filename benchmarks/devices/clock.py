"""How long work takes: on a device between two events, and in threads that do it at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import median
from relex_stream.devices import Device


@dataclass(frozen=True)
class Times:
    """Medians: seconds between two events on the device, and as the host sees them."""

    device_s: float
    wall_s: float


class Clock:
    """Times work on a device.

    Parameters
    ----------
    device : Device
    runs : int
        Of which the median counts, after one that does not.
    """

    def __init__(self, device: Device, runs: int) -> None:
        self.device = torch.device(device.torch_device)
        self.is_cuda = self.device.type == "cuda"
        self.runs = runs

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], Any]) -> Times:
        """Run and time work; what it returns is let go before the next run."""
        work()
        found = [self._once(work) for _ in range(self.runs)]
        return Times(median(one.device_s for one in found), median(one.wall_s for one in found))

    def forget_peak(self) -> None:
        """Begin to look for the most memory taken; what torch keeps for later is given back."""
        if self.is_cuda:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int]:
        """Return the columns of the most memory taken since then; none for pretend devices."""
        if not self.is_cuda:
            return {}
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }

    def _once(self, work: Callable[[], Any]) -> Times:
        self.synchronize()
        start, end = self._event(), self._event()
        started = time.perf_counter()
        if start is not None:
            start.record()
        result = work()
        if end is not None:
            end.record()
        self.synchronize()
        wall_s = time.perf_counter() - started
        del result
        if start is None or end is None:
            return Times(wall_s, wall_s)
        return Times(start.elapsed_time(end) / 1e3, wall_s)

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self.is_cuda else None


def together(threads: int, work: Callable[[], Any], count: int) -> float:
    """Return the seconds per call if each of some threads calls `count` times, all at once."""
    start = threading.Barrier(threads + 1)

    def loop() -> None:
        work()
        start.wait()
        for _ in range(count):
            work()

    with ThreadPoolExecutor(threads) as pool:
        loops = [pool.submit(loop) for _ in range(threads)]
        for each in loops:
            # A barrier that will never be full would hang.
            each.add_done_callback(lambda done: start.abort() if done.exception() else None)
        try:
            start.wait()
        except threading.BrokenBarrierError:
            for each in loops:
                each.result()
            raise
        started = time.perf_counter()
        for each in loops:
            each.result()
    return (time.perf_counter() - started) / (threads * count)
