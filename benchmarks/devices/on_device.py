"""What a device does with a block, held against what it and its link can do at all.

One function a table: stages one by one, blocks at a time, memory, bits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.devices.cases import Sizes
from benchmarks.devices.clock import Clock, together
from benchmarks.devices.one_block import BASIS, OneBlock
from relex_stream import planner
from relex_stream.dense import DenseBlock, Staging
from relex_stream.devices import Device, DevicePool
from relex_stream.offload import Offload
from relex_stream.summaries import DevicePlan


@dataclass(frozen=True)
class Peaks:
    """What device, link and products can do at all."""

    copy_bytes_per_s: float
    pinned_bytes_per_s: float
    back_bytes_per_s: float
    pageable_bytes_per_s: float
    flops: float

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each."""
        texts = {
            "copy on the device, read and written": self.copy_bytes_per_s,
            "host to device, page-locked": self.pinned_bytes_per_s,
            "device to host, page-locked": self.back_bytes_per_s,
            "host to device, pageable": self.pageable_bytes_per_s,
        }
        rows: list[dict[str, Any]] = [
            {"part": "peaks", "peak": text, "GB/s": rate / 1e9} for text, rate in texts.items()
        ]
        products = {"part": "peaks", "peak": "float64 product of large matrices"}
        return [*rows, products | {"GFLOPS": self.flops / 1e9}]


def measure_peaks(clock: Clock, sizes: Sizes) -> Peaks:
    """Measure with large copies and one large product."""
    device = clock.device
    here = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    copied = clock.time(lambda: there.copy_(here))
    size = sizes.link_bytes
    on_device = torch.zeros(size, dtype=torch.uint8, device=device)
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=clock.is_cuda)
    pageable = torch.zeros(size, dtype=torch.uint8)
    sent = clock.time(lambda: on_device.copy_(pinned, non_blocking=True))
    back = clock.time(lambda: pinned.copy_(on_device, non_blocking=True))
    slow = clock.time(lambda: on_device.copy_(pageable))
    matrix = torch.ones((sizes.matrix, sizes.matrix), dtype=torch.float64, device=device)
    multiplied = clock.time(lambda: matrix @ matrix)
    return Peaks(
        copy_bytes_per_s=2 * sizes.copy_bytes / copied.device_s,
        pinned_bytes_per_s=size / sent.device_s,
        back_bytes_per_s=size / back.device_s,
        pageable_bytes_per_s=size / slow.device_s,
        flops=2 * sizes.matrix**3 / multiplied.device_s,
    )


# Bytes read and written per element and row by the operations of `dense`, one by one, as if none
# found anything in a cache: what they reach against a copy may exceed 1 where they do.
_MADE_BYTES = 218
"""Making D, but for reading the differences themselves."""

_PUT_BYTES = 188
"""Per change, of making an index and a difference, but for those of the weight's width."""

_WEIGHED_BYTES = 40
"""Per output: D and a term, then the term and its sum."""


def stage_rows(block: OneBlock, clock: Clock, peaks: Peaks) -> list[dict[str, Any]]:
    """Time each stage of a block, alone on the device."""
    staging = Staging(clock.device)
    loaded = block.load(staging)
    dense, changes, width = block.elements * block.rows, block.changes(), block.itemsize
    made = dense * (_MADE_BYTES + width)
    moved = block.elements * width + changes * (4 + width)
    put = dense * width + changes * (_PUT_BYTES + 4 * width)
    coefficients = block.weights(BASIS)
    tile_bytes = (dense + BASIS * block.elements) * 8
    # What a product consists of has no public name: this knows how it is made.
    make = loaded._all_changes  # noqa: SLF001
    tiles = list(loaded._tiles(planner.device_tile_columns(block.rows)))  # noqa: SLF001
    tile = make(tiles[0])
    sent = torch.from_numpy(coefficients).to(clock.device)
    narrow = tile.T @ sent

    def for_all(work: Callable[[slice], Any]) -> None:
        for each in tiles:
            work(each)

    stages: list[tuple[str, Callable[[], Any], float, float]] = [
        ("put (staged, copied, scattered)", lambda: block.load(staging), moved, put),
        ("make D", lambda: for_all(make), 0, made),
        (f"D^T C, k={BASIS}", lambda: for_all(lambda _: tile.T @ sent), 0, tile_bytes),
        (f"D P, k={BASIS}", lambda: for_all(lambda _: tile @ narrow), 0, tile_bytes),
        (f"products, k={BASIS}", lambda: loaded.products(coefficients), 0, made + 2 * tile_bytes),
        ("gram", loaded.gram, 0, made + 16 * dense),
    ]
    for count in (1, 8):
        out_bytes = (1 + count) * block.elements * block.base_bits.itemsize
        touched = made + count * _WEIGHED_BYTES * dense
        work = partial(block.outputs, loaded, count)
        stages.append((f"outputs, o={count}", work, out_bytes, touched))
    rows = []
    for name, work, over_link, touched in stages:
        times = clock.time(work)
        row: dict[str, Any] = {
            "part": "stages",
            "block": block.name,
            "stage": name,
            "device ms": times.device_s * 1e3,
            "wall ms": times.wall_s * 1e3,
            "touched_bytes": touched,
            "GB/s": 1e-9 * touched / times.device_s,
            "of_copy_share": touched / times.device_s / peaks.copy_bytes_per_s,
        }
        if over_link:
            row["link_bytes"] = over_link
            row["link GB/s"] = 1e-9 * over_link / times.device_s
            row["of_link_share"] = over_link / times.device_s / peaks.pinned_bytes_per_s
        rows.append(row)
    return rows


def stream_rows(
    block: OneBlock, device: Device, clock: Clock, cores: int, *, count: int = 8
) -> list[dict[str, Any]]:
    """Time blocks one, two and four at a time on the device, and from the store on by workers."""
    rows = []
    coefficients = block.weights(BASIS)
    for threads in (1, 2, 4):
        pool = DevicePool([device], [threads])
        stagings: dict[int, Staging] = {}

        def work(pool: DevicePool = pool, stagings: dict[int, Staging] = stagings) -> None:
            with pool.borrow() as loan:
                if loan.slot not in stagings:
                    stagings[loan.slot] = Staging(torch.device(device.torch_device))
                block.load(stagings[loan.slot]).products(coefficients)

        seconds = together(threads, work, count)
        rows.append(_stream_row(block, "put and products of decoded changes", threads, seconds))
    basis = block.basis(BASIS)
    block_bytes = block.device_bytes(basis=BASIS)
    for threads in _powers(cores):
        slots = planner.device_slots(device.memory_limit_bytes, block_bytes, threads, 1)
        limit = device.memory_limit_bytes
        plan = DevicePlan((device.name,), limit, block_bytes, slots, slots * block_bytes)
        for name, offload in (("device", Offload(plan, [device])), ("CPU", None)):
            stage = block.statistics(block.rows, offload)
            clock.forget_peak()
            seconds = together(threads, partial(block.share, stage, basis), max(1, count // 4))
            row = _stream_row(block, f"products from the store, {name}", threads, seconds)
            row["blocks at a time"] = slots if offload else threads
            if offload:
                # torch keeps a workspace of cuBLAS for each pair of thread and stream that met.
                row |= {"projected_bytes": plan.projected_bytes, **clock.peak()}
            rows.append(row)
    return rows


def _stream_row(block: OneBlock, work: str, threads: int, seconds: float) -> dict[str, Any]:
    return {
        "part": "streams",
        "block": block.name,
        "work": work,
        "threads": threads,
        "ms per block": seconds * 1e3,
        "blocks at a time": threads,
    }


def _powers(most: int) -> list[int]:
    return sorted({2**power for power in range(5) if 2**power <= most} | {min(most, 16)})


def memory_rows(block: OneBlock, clock: Clock) -> list[dict[str, Any]]:
    """Hold the peak of each kind of work against what the planner says."""
    staging = Staging(clock.device)
    kinds: list[tuple[str, dict[str, Any], Callable[[DenseBlock], Any]]] = [
        (f"products, k={BASIS}", {"basis": BASIS}, lambda b: b.products(block.weights(BASIS))),
        ("gram", {"gram": True}, lambda b: b.gram()),
        ("outputs, o=1", {"outputs": 1}, lambda b: block.outputs(b, 1)),
        ("outputs, o=8", {"outputs": 8}, lambda b: block.outputs(b, 8)),
    ]
    rows = []
    for name, made, work in kinds:
        row: dict[str, Any] = {
            "part": "memory",
            "block": block.name,
            "work": name,
            "projected_bytes": block.device_bytes(**made),
        }
        clock.forget_peak()
        work(block.load(staging))
        # cuBLAS's workspace is among it.
        peak = clock.peak()
        if peak:
            row |= peak
            row["of_projected_share"] = peak["peak_bytes"] / row["projected_bytes"]
            row["fits"] = peak["peak_bytes"] <= row["projected_bytes"]
        rows.append(row)
    return rows


def bit_rows(block: OneBlock, device: Device) -> list[dict[str, Any]]:
    """Say whether a device gives the same bits again, beside other work, and those of the CPU."""
    kinds: dict[str, Callable[[DenseBlock], NDArray[Any]]] = {
        f"products, k={BASIS}": lambda b: b.products(block.weights(BASIS)),
        # On the CPU only the lower triangle is made.
        "gram": lambda b: np.tril(b.gram()),
        "outputs, o=2": lambda b: block.outputs(b, 2),
    }
    pool = DevicePool([device], [2])

    def results() -> list[NDArray[Any]]:
        with pool.borrow() as loan:
            staging = Staging(torch.device(loan.device.torch_device))
            return [work(block.load(staging)) for work in kinds.values()]

    one, again = results(), results()
    with ThreadPoolExecutor(2) as threads:
        beside = [each.result() for each in [threads.submit(results) for _ in range(2)]]
    stage = block.statistics(block.rows)
    cpu = [
        block.share(stage, block.basis(BASIS)),
        np.tril(block.share(stage, None)),
        block.cpu_outputs(block.weights(2)),
    ]
    rows = []
    for number, name in enumerate(kinds):
        ours, theirs = one[number], cpu[number]
        row: dict[str, Any] = {
            "part": "bits",
            "block": block.name,
            "work": name,
            "same bits again": bool(np.array_equal(ours, again[number])),
            "same bits beside another": all(np.array_equal(ours, each[number]) for each in beside),
            "same bits as the CPU": bool(np.array_equal(ours, theirs)),
        }
        if ours.dtype == np.float64:
            largest = float(np.abs(theirs).max())
            row["difference from the CPU"] = float(np.abs(ours - theirs).max()) / largest
        rows.append(row)
    return rows
