"""The ``devices`` command: ``extrapolate`` on a GPU beside the CPU, and where a block's time goes.

It has a GPU's machine to itself and asks everything at once: what the device and its link can do at
all, what each stage of a block takes of that, whether two blocks at a time are quicker, whether
memory and bits are what was promised, what whole commands take with so many workers or on the
device, and what all that says about the constants of `relex_stream.costs`.

On such a machine, in a checkout, with the packages installed, no network needed::

    export PYTHONPATH=$PWD
    # Half of it or less, to see that all of it runs:
    python -m benchmarks devices --quick --json quick.json
    # Everything; what would not end within --budget-s (9 minutes) is left out and named:
    python -m benchmarks devices --run runs --json devices.json
    # Or, where a command may not take that long, one after the other:
    python -m benchmarks devices --run runs --part prepare
    python -m benchmarks devices --run runs --part blocks --json blocks.json
    python -m benchmarks devices --run runs --part commands --json commands.json

``runs`` then holds, for each trajectory, its base and its store; checkpoints are written 16 at a
time (45 GB in all) and deleted when they are in the store, so that 30 GB of disk are enough. Where
the disk is slow and memory plenty, name a directory in memory, ``--run /dev/shm/runs --directory
/dev/shm``. A trajectory made before may be put there by name, for instance with
``python -m benchmarks trajectory runs/0.5b-bf16 --preset qwen2.5-0.5b --steps 32``.

The report is written after each part, and no round of runs is begun that would end after
``--budget-s``. Without a GPU, ``--pretend`` runs all of it on the CPU at tiny size, to test it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.commands import ModelSize, document, program, remove, run, work_directory
from benchmarks.processes import BenchmarkError, Measurement, Program, alternate
from benchmarks.report import Report, machine, median, process_row, publish, report_options
from benchmarks.trajectory import PRESETS, Preset, step_directory, write_steps
from relex_stream import costs, devices, planner
from relex_stream.base_weights import open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY, BlockReader
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.dense import DenseBlock, Staging
from relex_stream.devices import Device, DevicePool
from relex_stream.errors import DeviceError
from relex_stream.machine import usable_cores
from relex_stream.offload import Offload
from relex_stream.sketch import OVERSAMPLING, add_weighted_rows, cumulate_transposed
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.subspaces import (
    Statistics,
    SubspaceOptions,
    basis_columns,
    changed_tensors,
    split_routes,
)
from relex_stream.summaries import DevicePlan
from relex_stream.sweep import TILE_COLUMNS, sweep_outputs
from relex_stream.ulp import Bits, add_rounded, ordered

Float64 = NDArray[np.float64]

PARTS = ("prepare", "blocks", "commands")
SECTIONS = ("peaks", "stages", "streams", "memory", "bits", "cpu", "commands", "constants")
"""Each is a table; `part` in the rows of the report."""

PRETEND_NOTE = (
    "PRETEND DEVICES: no GPU was used. What is called a device here is torch on the CPU, sizes are "
    "tiny, and the figures mean nothing."
)
PRETEND = Device("pretend device", "cpu", 1 << 30)

BASIS = OVERSAMPLING + 1
"""Columns of the basis at rank 1, the default."""

_STEPS_AT_ONCE = 16
_PIECE = 1 << 24
_CLUSTER_START_S = 120.0
_CHECKOUT = Path(__file__).resolve().parent.parent
_PRETEND_PROGRAM = "from benchmarks.devices import pretend_main; pretend_main()"
_PRETEND_WORKER = "from benchmarks.devices import pretend_here\n\npretend_here()\n"


# --- what is worked on ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A trajectory.

    Attributes
    ----------
    routes : tuple of str
        What is given for ``--svd``, one after the other.
    """

    name: str
    preset: Preset
    dtype: str
    steps: int
    routes: tuple[str, ...] = ("randomized",)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    block_elements : mapping
        Of the blocks that are taken apart, by dtype.
    rows : int
        Their steps.
    copy_bytes, link_bytes, matrix : int
        What bandwidths and the speed of products are measured with.
    """

    cases: tuple[Case, ...]
    block_elements: Mapping[str, int]
    rows: int
    copy_bytes: int
    link_bytes: int
    matrix: int


def _cut_to(name: str, **config: int | bool) -> Preset:
    """Return a preset with fewer layers or words."""
    whole = PRESETS[name]
    return replace(whole, name=f"{name}, cut", config=dict(whole.config) | config)


START_CASE = Case("start", _cut_to("tiny", vocab_size=4096), "bf16", 6)
"""Hardly any work, but one tensor large enough for a device: what is left is starting."""


def full_sizes(*, steps: int, layers: int, fp32: Preset, fp32_steps: int) -> Sizes:
    """Return what is measured on a GPU."""
    sliced = _cut_to(
        "qwen3-8b", num_hidden_layers=layers, vocab_size=8192, tie_word_embeddings=True
    )
    return Sizes(
        cases=(
            START_CASE,
            Case("fp32", fp32, "fp32", fp32_steps, ("randomized", "exact")),
            Case("0.5b-bf16", PRESETS["qwen2.5-0.5b"], "bf16", steps),
            Case("8b-slice-bf16", sliced, "bf16", max(2, steps // 2)),
        ),
        block_elements={"bf16": 1 << 20, "fp32": 1 << 19},
        rows=50,
        copy_bytes=1 << 30,
        link_bytes=256 << 20,
        matrix=4096,
    )


def pretend_sizes() -> Sizes:
    """Return what a test can wait for; every tensor that matters is large enough for a device."""
    tiny = START_CASE.preset
    return Sizes(
        cases=(
            START_CASE,
            Case("fp32", tiny, "fp32", 4, ("randomized", "exact")),
            Case("0.5b-bf16", tiny, "bf16", 4),
        ),
        block_elements=dict.fromkeys(("bf16", "fp32"), planner.DEVICE_MIN_ELEMENTS),
        rows=5,
        copy_bytes=1 << 20,
        link_bytes=1 << 20,
        matrix=64,
    )


def prepare(case: Case, root: Path, *, workers: int) -> tuple[Path, Path]:
    """Return the directories of a base and of a store, made as far as they are not there.

    Checkpoints that were there before stay; those written here do not.
    """
    directory = root / case.name
    base, store = step_directory(directory, 0), directory / "store"
    if not base.exists():
        write_steps(directory, case.preset, [0], dtype=case.dtype)
    there = set(Store(store).steps) if store.exists() else set()
    missing = [step for step in range(1, case.steps + 1) if step not in there]
    for first in range(0, len(missing), _STEPS_AT_ONCE):
        batch = missing[first : first + _STEPS_AT_ONCE]
        to_write = [step for step in batch if not step_directory(directory, step).exists()]
        written = write_steps(directory, case.preset, to_write, dtype=case.dtype)
        options = ("--steps", f"{batch[0]}:{batch[-1]}", *_worker_options(workers))
        run(case.name, "build-store", base, directory / "checkpoints", store, *options)
        for each in written:
            remove(each)
    return base, store


def _worker_options(workers: int) -> tuple[object, ...]:
    # Room for any number of workers, and for torch and CUDA in the process.
    return ("--workers", workers, "--memory-limit", f"{6 + workers // 4}GiB")


# --- blocks --------------------------------------------------------------------------------------


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


class OneBlock:
    """A block of a store, taken apart: what the CPU and a device do with it.

    Parameters
    ----------
    base, store : Path
        Of a model of one large tensor that is one block.
    rows : int
        Steps that are used.
    checkpoints : CheckpointReader
    """

    def __init__(
        self, name: str, base: Path, store: Path, rows: int, checkpoints: CheckpointReader
    ) -> None:
        self.name = name
        self.rows = rows
        self.store = Store(store)
        self.base = open_base(self.store, base, checkpoints)
        self.reader = BlockReader(self.store, self.base, Workspace(), DEFAULT_ENTRY_CAPACITY)
        self.at = BlockOf(max(self.store.manifest.tensors, key=lambda each: each.elements), 0)
        self.base_bits: Bits = self.reader.base_bits(self.at).copy()
        self.itemsize = self.at.tensor.itemsize

    @property
    def elements(self) -> int:
        """Elements of the block."""
        return self.at.elements

    def changes(self, rows: int | None = None) -> int:
        """Return how many changes the first rows have."""
        return self.reader.entries(self.at, rows or self.rows)

    @cached_property
    def runs(self) -> list[tuple[list[int], list[int], NDArray[np.uint32], Bits]]:
        """What is put on a device, decoded."""
        found = []
        for each, changes in self.reader.decoded(self.at, self.rows):
            count = sum(each.counts)
            places, codes = changes.positions[:count].copy(), changes.zigzags[:count].copy()
            found.append((each.rows, each.counts, places, codes))
        return found

    def basis(self, columns: int, rows: int | None = None) -> Float64:
        """Return Q to multiply with: numbers at random."""
        rows = rows or self.rows
        return np.random.default_rng(columns).standard_normal((rows, columns)) / rows

    def weights(self, columns: int, rows: int | None = None) -> Float64:
        """Return what the rows of D are weighed with."""
        return cumulate_transposed(self.basis(columns, rows))

    # On the CPU, on the calling thread.

    def decode(self, rows: int) -> None:
        """Read and decode all frames."""
        for _ in self.reader.decoded(self.at, rows):
            pass

    def statistics(self, rows: int, offload: Offload | None = None) -> Statistics:
        """Return the stage that works on blocks, from the store on."""
        options = SubspaceOptions(rows, 1, "randomized", 1)
        return Statistics(self.store, self.base, options, DEFAULT_ENTRY_CAPACITY, offload)

    def share(self, stage: Statistics, basis: Float64 | None) -> Float64:
        """Return products with a basis, or the Gram matrix, by a stage."""
        return stage.work([(self.at,)], [basis])[0]

    def cpu_outputs(self, weights: Float64) -> Bits:
        """Return outputs as the writing stage makes them on the CPU."""
        rows, outputs = weights.shape
        changes = self.reader.change_rows(self.at, self.base_bits, rows)
        out = np.empty((outputs, self.elements), self.base_bits.dtype)
        fmt = self.at.base_format
        if changes.fits:
            sums = np.empty((min(TILE_COLUMNS, self.elements), outputs))
            sweep_outputs(changes.at_hand(), weights, self.base_bits, fmt.tag, sums, out)
            return out
        sums = np.zeros((self.elements, outputs))
        for batch in changes.batches():
            add_weighted_rows(batch, 0, weights, sums)
        for output in range(outputs):
            add_rounded(self.base_bits, sums[:, output], fmt, out[output])
        return out

    # On a device, on the current stream.

    def load(self, staging: Staging) -> DenseBlock:
        """Bring the block there."""
        fmt = self.at.format
        block = DenseBlock(self.base_bits, self.rows, fmt, staging.device, staging=staging)
        for each in self.runs:
            block.put(*each)
        return block

    def outputs(self, block: DenseBlock, columns: int) -> Bits:
        """Return outputs as a device makes them."""
        out = np.empty((columns, self.elements), self.base_bits.dtype)
        block.outputs(self.weights(columns), self.base_bits, self.at.base_format, out)
        return out

    def device_bytes(self, **made: Any) -> int:
        """Return what the planner says that the block takes of a device."""
        return planner.device_block_bytes(
            self.elements, self.rows, self.itemsize, self.at.tensor.base_itemsize, **made
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


def cpu_rows(block: OneBlock, runs: int) -> list[dict[str, Any]]:
    """Time what one thread of the CPU takes, beside what the constants of `costs` say."""
    rows = []
    for steps in sorted({max(2, block.rows // 3), block.rows}):
        stage, changes = block.statistics(steps), block.changes(steps)
        common = {"part": "cpu", "block": block.name, "steps": steps}
        decoding_s = _best(partial(block.decode, steps), runs)
        model = 1e-9 * changes * costs.CPU_DECODE_NS[block.itemsize]
        rows.append(_cpu_row(common, block, "decode", 0, changes, decoding_s, model))
        jobs: list[tuple[str, int, Callable[[], Any]]] = [
            ("gram", 0, partial(block.share, stage, None))
        ]
        for columns in (1, BASIS, 16):
            basis = block.basis(columns, steps)
            jobs.append(("products", columns, partial(block.share, stage, basis)))
        for columns in (1, 8):
            weights = block.weights(columns, steps)
            jobs.append(("outputs", columns, partial(block.cpu_outputs, weights)))
        for kind, columns, job in jobs:
            # What decoding costs is counted once, by its own constant.
            seconds = max(_best(job, runs) - decoding_s, 0.0)
            modelled = sum(
                1e-9 * constant * count
                for constant, count in zip(
                    _CPU_CONSTANTS[kind](),
                    _cpu_counts(kind, block, changes, steps, columns),
                    strict=True,
                )
            )
            rows.append(_cpu_row(common, block, kind, columns, changes, seconds, modelled))
    room = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    source = np.zeros_like(room)
    per_byte = _best(lambda: np.copyto(room, source), runs) / room.size
    modelled = 1e-9 * costs.CPU_STAGING_NS * block.changes()
    seconds = per_byte * (4 + block.itemsize) * block.changes()
    common = {"part": "cpu", "block": block.name, "steps": block.rows}
    return [
        *rows,
        _cpu_row(common, block, "staging", 0, block.changes(), seconds, modelled),
    ]


def _cpu_row(
    common: Mapping[str, Any],
    block: OneBlock,
    kind: str,
    columns: int,
    changes: int,
    seconds: float,
    modelled: float,
) -> dict[str, Any]:
    return {
        **common,
        "work": kind,
        "columns": columns,
        "ms per block": seconds * 1e3,
        "by the model, ms": modelled * 1e3,
        "measured / model": seconds / modelled if modelled else None,
        "ns per change": 1e9 * seconds / max(1, changes),
        "counts": _cpu_counts(kind, block, changes, common["steps"], columns)
        if kind in _CPU_CONSTANTS
        else [changes],
    }


_CPU_CONSTANTS: dict[str, Callable[[], tuple[float, ...]]] = {
    "products": lambda: costs.CPU_PRODUCT_NS,
    "outputs": lambda: costs.CPU_OUTPUT_NS,
    "gram": lambda: costs.CPU_GRAM_NS,
}


def _cpu_counts(kind: str, block: OneBlock, changes: int, steps: int, columns: int) -> list[float]:
    """Return how often each of a kind's constants counts."""
    elements = block.elements
    if kind != "gram":
        return [elements, elements * columns, changes, changes * columns]
    _, few, many, pair = costs.CPU_GRAM_NS
    if changes * few <= changes * many + elements * steps**2 * pair:
        return [elements, changes, 0, 0]
    return [elements, 0, changes, elements * steps**2]


def _best(work: Callable[[], Any], runs: int) -> float:
    """Return the seconds of the quickest run: what constants of a model stand for."""
    work()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


# --- whole commands ------------------------------------------------------------------------------


def pretend_here() -> None:
    """Have this process find a pretend device and nothing else."""
    devices.find_devices = lambda *_: (PRETEND,)


def pretend_main() -> None:
    """Run relex-stream's command line with a pretend device."""
    from relex_stream.cli.main import main  # it reads sys.argv

    pretend_here()
    main()


@dataclass(frozen=True)
class Deadline:
    """When to stop beginning things."""

    at: float

    @property
    def left_s(self) -> float:
        """Seconds left, perhaps less than none."""
        return self.at - time.monotonic()

    def share(self, parts: int) -> Deadline:
        """Return when the first of so many equal parts of what is left ends."""
        return Deadline(time.monotonic() + max(0.0, self.left_s) / parts)


@dataclass
class Rounds:
    """What some programs took, round by round, and checksums of what they wrote."""

    by_name: dict[str, list[Measurement]]
    digests: dict[str, set[int]]

    def row(self, name: str) -> dict[str, Any]:
        """Return the columns that a program's runs fill; the first counts only if alone."""
        first, *later = self.by_name[name]
        measured = later or [first]
        return {
            **process_row(measured),
            "first_s": first.wall_s,
            "in_process_s": self.in_process_s(name),
            "same bits each run": len(self.digests[name]) == 1 if later else None,
        }

    def in_process_s(self, name: str) -> float:
        """Return the median of what the command says that it took."""
        first, *later = self.by_name[name]
        return median(document(each)["elapsed_s"] for each in later or [first])


def measure_rounds(
    programs: Sequence[Program],
    outputs: Mapping[str, Path],
    *,
    runs: int,
    deadline: Deadline,
    after_first: Callable[[], None] = lambda: None,
) -> Rounds:
    """Run programs in turn, once to warm up and `runs` times more, or as often as time is left."""
    found = Rounds({each.name: [] for each in programs}, {each.name: set() for each in programs})
    for number in range(runs + 1):
        started = time.monotonic()
        for name, (measured,) in alternate(programs, runs=1, warmup=0).items():
            found.by_name[name].append(measured)
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(
                found.digests, pool.map(digest_of, map(outputs.get, found.digests)), strict=True
            ):
                found.digests[name].add(digest)
        if number == 0:
            after_first()
        if time.monotonic() - started > deadline.left_s:
            break
    return found


def digest_of(model: Path | None) -> int:
    """Return a checksum of a model's weights."""
    total = 0
    for file in sorted(model.glob("*.safetensors")) if model is not None else ():
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE):
                total = zlib.crc32(piece, total)
    return total


def difference(one: Path, other: Path) -> tuple[float, int]:
    """Return the share of weights in which two models differ, and by how many ULP at most.

    Raises
    ------
    BenchmarkError
        If they do not have the same tensors.
    """
    ours, theirs = dict(_weights_of(one)), dict(_weights_of(other))
    if ours.keys() != theirs.keys():
        raise BenchmarkError(f"{one.name} and {other.name} have other tensors")
    differing = total = most = 0
    for name, bits in ours.items():
        for first in range(0, bits.size, _PIECE):
            pair = [each[first : first + _PIECE] for each in (bits, theirs[name])]
            unlike = np.flatnonzero(pair[0] != pair[1])
            if unlike.size:
                left, right = (ordered(each[unlike]) for each in pair)
                signed = f"i{left.itemsize}"
                apart = left.view(signed).astype(np.int64) - right.view(signed)
                most = max(most, int(np.abs(apart).max()))
            differing += unlike.size
        total += bits.size
    return differing / max(1, total), most


def _weights_of(model: Path) -> Iterator[tuple[str, Bits]]:
    """Yield each tensor's name and bit patterns, flat, mapped from the file."""
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                width = {"BF16": 2, "F16": 2, "F32": 4}[entry["dtype"]]
                yield name, data[first:last].view(f"u{width}")


def work_of(store_path: Path, route: str, rows: int) -> costs.DeviceWork:
    """Return an extrapolation to one target as `costs` sees it when devices are chosen."""
    store = Store(store_path)
    options = SubspaceOptions(rows, 1, route, 1)
    changed = changed_tensors(store, rows)
    _, randomized = split_routes(changed, options)
    tracked = [tensor for tensor in store.manifest.tensors if tensor.kind == "tracked"]
    return costs.DeviceWork(
        elements=sum(tensor.elements for tensor in changed),
        changes=int(store.changed[:rows].sum(dtype=np.int64)),
        rows=rows,
        itemsize=max(tensor.itemsize for tensor in tracked),
        base_itemsize=max(tensor.base_itemsize for tensor in tracked),
        basis=basis_columns(options) if randomized else 0,
        passes=1,
        outputs=1,
    )


@contextlib.contextmanager
def gpu_cluster(directory: Path, *, threads: int, pretend: bool) -> Iterator[Path]:
    """Start a scheduler and two workers that share the first GPU; yield the scheduler's file."""
    from distributed import Client

    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    worker = [*common, "--nthreads", str(threads), "--memory-limit", "0", "--no-nanny"]
    worker += ["--resources", "GPU=1", "--local-directory", str(directory / "scratch")]
    if pretend:
        preload = directory / "pretend.py"
        preload.write_text(_PRETEND_WORKER, encoding="utf-8")
        worker += ["--preload", str(preload)]
    local = ["--host", "127.0.0.1"]
    commands = [["scheduler", *common, *local, "--port", "0"], *[["worker", *worker, *local]] * 2]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "cluster.log").open("w"))
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            stack.callback(_end, process)
        try:
            _wait_for(file)
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(2, timeout=_CLUSTER_START_S)
        except (OSError, TimeoutError) as error:
            tail = (directory / "cluster.log").read_text(encoding="utf-8")[-2000:]
            raise BenchmarkError(f"the cluster did not start: {error}\n{tail}") from error
        yield file


def _wait_for(file: Path) -> None:
    until = time.monotonic() + _CLUSTER_START_S
    while not file.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no {file.name} after {_CLUSTER_START_S:.0f} s")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    paths = [str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Settings:
    """What the command was asked for."""

    sizes: Sizes
    device: Device
    workers: tuple[int, ...]
    runs: int
    cluster: bool
    pretend: bool


class CommandRuns:
    """Whole extrapolations from one store by one route.

    Parameters
    ----------
    work : Path
        Where outputs go.
    """

    def __init__(self, settings: Settings, case: Case, route: str, root: Path, work: Path) -> None:
        self._settings = settings
        self._case = case
        self._route = route
        directory = root / case.name
        self._base, self.store = directory / "base", directory / "store"
        self._work = work
        self._compared: dict[str, tuple[float, int]] = {}

    def rows(self, deadline: Deadline) -> tuple[list[dict[str, Any]], list[str]]:
        """Return a row per program, and notes."""
        most = max(self._settings.workers)
        names = {count: f"cpu, {count} worker(s)" for count in self._settings.workers}
        programs = [self._program(name, "cpu", count) for count, name in names.items()]
        programs.append(self._program("cuda", "cuda", most))
        outputs = {each.name: self._output(each.name) for each in programs}
        reference = programs[0].name

        def compare() -> None:
            for name, out in outputs.items():
                self._compared[name] = difference(outputs[reference], out)

        found = measure_rounds(
            programs,
            outputs,
            runs=self._settings.runs,
            deadline=deadline,
            after_first=compare,
        )
        rows = [self._row(name, found, "cpu", count) for count, name in names.items()]
        rows.append(self._row("cuda", found, "cuda", most))
        notes: list[str] = []
        if self._settings.cluster and self._case is not START_CASE:
            more, notes = self._on_cluster(outputs[reference], deadline)
            rows += more
        for out in self._work.iterdir():
            if out.is_dir():
                remove(out)
        return rows, notes

    def _on_cluster(
        self, reference: Path, deadline: Deadline
    ) -> tuple[list[dict[str, Any]], list[str]]:
        name = "cuda, 2 processes"
        where = f"{self._case.name}, {self._route}, {name}"
        if importlib.util.find_spec("distributed") is None:
            return [], [f"{where}: left out, distributed is not installed."]
        if deadline.left_s < 0:
            return [], [f"{where}: left out, no time was left."]
        threads = max(1, max(self._settings.workers) // 2)
        cluster = gpu_cluster(
            self._work / "cluster", threads=threads, pretend=self._settings.pretend
        )
        out = self._output(name)
        try:
            with cluster as file:
                made = program(
                    name,
                    *self._arguments(out),
                    *("--devices", "cuda", "--scheduler", file, "--memory-limit", "16GiB"),
                    output=out,
                )
                found = measure_rounds(
                    [replace(made, env=_environment())],
                    {name: out},
                    runs=self._settings.runs,
                    deadline=deadline,
                )
            self._compared[name] = difference(reference, out)
        except BenchmarkError as error:
            return [], [f"{where}: {error}"]
        return [self._row(name, found, "cluster", 2 * threads)], []

    def _output(self, name: str) -> Path:
        return self._work / "".join(each if each.isalnum() else "-" for each in name)

    def _arguments(self, out: Path) -> tuple[object, ...]:
        case = self._case
        target = ("--target-step", 2 * case.steps, "--history-steps", case.steps)
        return ("extrapolate", self.store, out, *target, "--svd", self._route, "--base", self._base)

    def _program(self, name: str, kind: str, workers: int) -> Program:
        out = self._output(name)
        made = program(
            name,
            *self._arguments(out),
            *("--devices", kind),
            *_worker_options(workers),
            output=out,
        )
        argv = made.argv
        if kind == "cuda" and self._settings.pretend:
            argv = (sys.executable, "-c", _PRETEND_PROGRAM, *argv[3:])
        return replace(made, argv=argv, env=_environment())

    def _row(self, name: str, found: Rounds, kind: str, workers: int) -> dict[str, Any]:
        work = work_of(self.store, self._route, self._case.steps)
        plan = document(found.by_name[name][0])["plan"].get("devices") or {}
        share, most = self._compared[name]
        return {
            "part": "commands",
            "case": self._case.name,
            "route": self._route,
            "program": name,
            "workers": workers,
            **found.row(name),
            "differing_share": share,
            "most ULP": most,
            "blocks at a time": plan.get("slots"),
            "kind": kind,
            "work": {field: getattr(work, field) for field in work.__dataclass_fields__},
        }


def default_limit_note(settings: Settings, root: Path, work: Path) -> str:
    """Say whether a command on the device fits the memory limit that holds if none is named."""
    directory = root / START_CASE.name
    words = ("extrapolate", directory / "store", work / "limited", "--target-step", 12)
    made = program("default limit", *words, "--base", directory / "base", "--devices", "cuda")
    if settings.pretend:
        made = replace(made, argv=(sys.executable, "-c", _PRETEND_PROGRAM, *made.argv[3:]))
    try:
        ((measured,),) = alternate([replace(made, env=_environment())], runs=1, warmup=0).values()
    except BenchmarkError as error:
        reason = str(error).strip().splitlines()[-1]
        return f"With the default memory limit a command on the device fails: {reason}"
    workers = document(measured)["plan"]["workers"]
    return (
        f"With the default memory limit a command on the device runs with {workers} worker(s), its "
        f"peak {measured.peak_rss_bytes >> 20} MiB."
    )


# --- what it says about the cost model ----------------------------------------------------------


def suggested_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    """Return values for constants of `costs`, as far as measured, and what each comes from.

    Parameters
    ----------
    rows : sequence of mapping
        All rows of the report.
    """
    found: dict[str, tuple[Any, str]] = {}
    starts = {
        row["program"]: row["wall_s"]
        for row in rows
        if row["part"] == "commands" and row["case"] == START_CASE.name
    }
    cpu = [seconds for name, seconds in starts.items() if name.startswith("cpu")]
    if "cuda" in starts and cpu:
        found["DEVICE_START_S"] = (
            max(0.0, starts["cuda"] - min(cpu)),
            "a command with hardly any work, with the device less without",
        )
    found |= _device_constants(rows)
    found |= _cpu_constants([row for row in rows if row["part"] == "cpu"])
    return found


def _device_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    peaks = {row["peak"]: row for row in rows if row["part"] == "peaks"}
    stages = [row for row in rows if row["part"] == "stages"]
    if not peaks or not stages:
        return {}
    copy = next(row["GB/s"] for name, row in peaks.items() if name.startswith("copy")) * 1e9
    flops = next(row["GFLOPS"] for row in peaks.values() if "GFLOPS" in row) * 1e9
    puts = [row for row in stages if row["stage"].startswith("put")]
    link = sum(row["link_bytes"] for row in puts) / sum(1e-3 * row["device ms"] for row in puts)
    per_dense: dict[str, float] = {}
    for row in stages:
        seconds, dense = 1e-3 * row["device ms"], row["dense"]
        if row["stage"].startswith("products"):
            seconds -= dense * 4 * BASIS / flops
            per_dense[f"{row['block']}, products"] = seconds * copy / dense
        elif row["stage"].startswith("outputs, o=1"):
            per_dense[f"{row['block']}, outputs"] = seconds * copy / dense - 24
    texts = "; ".join(f"{name}: {value:.0f}" for name, value in per_dense.items())
    return {
        "DEVICE_LINK_BYTES_PER_S": (link, "put of both blocks, scattering included"),
        "DEVICE_MEMORY_BYTES_PER_S": (copy, "the large copy"),
        "DEVICE_FLOPS": (flops, "the large product"),
        "DEVICE_DENSE_BYTES": (
            sum(per_dense.values()) / len(per_dense),
            f"the mean, at the bandwidth of the copy, of {texts}",
        ),
    }


def _cpu_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    if not rows:
        return {}
    found: dict[str, tuple[Any, str]] = {}
    decoding = {}
    for itemsize in (2, 4):
        seen = [row for row in rows if row["work"] == "decode" and row["itemsize"] == itemsize]
        if seen:
            decoding[itemsize] = median(row["ns per change"] for row in seen)
    found["CPU_DECODE_NS"] = (decoding, "frames in the page cache, one thread")
    names = {"products": "CPU_PRODUCT_NS", "outputs": "CPU_OUTPUT_NS", "gram": "CPU_GRAM_NS"}
    for kind, name in names.items():
        seen = [row for row in rows if row["work"] == kind]
        fitted, worst = fit_nonnegative(
            [row["counts"] for row in seen], [1e6 * row["ms per block"] for row in seen]
        )
        # What no run tells about stays.
        told = np.any([row["counts"] for row in seen], axis=0)
        kept = zip(fitted, _CPU_CONSTANTS[kind](), told, strict=True)
        values = tuple(float(new) if tells else old for new, old, tells in kept)
        found[name] = (values, f"one thread, least squares, largest error {100 * worst:.0f} %")
    staging = [row["ns per change"] for row in rows if row["work"] == "staging"]
    found["CPU_STAGING_NS"] = (max(staging), "a copy of 1 MiB to page-locked memory")
    return found


def fit_nonnegative(
    counts: Sequence[Sequence[float]], wanted: Sequence[float]
) -> tuple[Float64, float]:
    """Fit by least squares of relative errors, no coefficient below zero.

    Returns
    -------
    coefficients : ndarray of float64
    worst : float
        The largest relative error.

    Examples
    --------
    >>> fit_nonnegative([[1, 0], [1, 2], [1, 4]], [3, 7, 11])[0].round(6).tolist()
    [3.0, 2.0]
    """
    goal = np.maximum(np.asarray(wanted, np.float64), 1e-12)
    rows = np.asarray(counts, np.float64) / goal[:, None]
    best, least = np.zeros(rows.shape[1]), math.inf
    # Of so few, every choice of those above zero can be tried.
    for count in range(1, rows.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(rows.shape[1]), count)):
            found, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(goal)), rcond=None)
            error = float(np.square(rows[:, chosen] @ found - 1).sum())
            if found.min() >= 0 and error < least - 1e-12:
                best, least = np.zeros(rows.shape[1]), error
                best[chosen] = found
    return best, float(np.abs(rows @ best - 1).max())


def add_projections(
    rows: Sequence[dict[str, Any]], constants: Mapping[str, tuple[Any, str]]
) -> None:
    """Put beside each command what the cost model projects, now and with other constants."""
    measured = [row for row in rows if row["part"] == "commands"]
    starts = [
        row["in_process_s"]
        for row in measured
        if row["case"] == START_CASE.name and row["kind"] == "cpu"
    ]
    for row in measured:
        work, cores, kind = costs.DeviceWork(**row["work"]), row["workers"], row["kind"]
        projected = partial(costs.projected_cpu_s, work, cores)
        if kind != "cpu":
            projected = partial(costs.projected_device_s, work, cores, 1)
        # The model does not count what any command takes to begin.
        row["without_start_s"] = max(0.0, row["in_process_s"] - min(starts, default=0.0))
        row["projected_s"] = projected()
        values = {name: value for name, (value, _) in constants.items()}
        if values:
            with mock.patch.multiple(costs, **values):
                row["projected_anew_s"] = projected()


def constant_rows(constants: Mapping[str, tuple[Any, str]]) -> list[dict[str, Any]]:
    """Return a row per constant."""
    return [
        {
            "part": "constants",
            "constant": name,
            "now": _shown(getattr(costs, name)),
            "measured": _shown(value),
            "from": source,
            "value": list(value.items() if isinstance(value, dict) else np.ravel(value).tolist()),
        }
        for name, (value, source) in constants.items()
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one:.3g}" for key, one in value.items())
    if isinstance(value, tuple):
        return ", ".join(f"{one:.3g}" for one in value)
    return f"{value:.3g}"


# --- the command ---------------------------------------------------------------------------------


_NOT_SHOWN = {"part", "kind", "itemsize", "dense", "wall_min_s", "wall_max_s", "cpu_s"}
"""Columns that the file has and tables leave out."""


class _Publisher:
    """Prints a table as soon as its rows are there, and keeps the file up to date."""

    def __init__(self, report: Report, json_path: Path | None, *, markdown: bool) -> None:
        self.report = report
        self._json_path = json_path
        self._markdown = markdown

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.report.add(row)
        self.save()

    def save(self) -> None:
        if self._json_path is not None:
            self.report.write(self._json_path)

    def show(self, section: str) -> None:
        rows = [row for row in self.report.rows if row["part"] == section]
        if not rows:
            return
        # As short as this, or a narrow table would cut it in lines.
        title = f"PRETEND: {section}" if self.report.settings["pretend"] else section
        shown = Report(title, "devices", {}, machine=self.report.machine)
        shown.rows = [{name: row[name] for name in row if name not in _NOT_SHOWN} for row in rows]
        if self._markdown:
            click.echo(f"\n{title}\n")
        publish(shown, json_path=None, markdown=self._markdown)


@contextlib.contextmanager
def _blocks(settings: Settings, root: Path, workers: int) -> Iterator[list[OneBlock]]:
    """Give the two blocks that are taken apart."""
    found = []
    with CheckpointReader() as checkpoints:
        for dtype, elements in settings.sizes.block_elements.items():
            config = {"hidden_size": 1024, "num_hidden_layers": 0, "vocab_size": elements // 1024}
            preset = _cut_to("40m", **config)
            case = Case(f"block-{dtype}", preset, dtype, settings.sizes.rows)
            base, store = prepare(case, root, workers=workers)
            rows = settings.sizes.rows
            found.append(OneBlock(case.name, base, store, rows, checkpoints))
        yield found


def _measure_blocks(
    settings: Settings, root: Path, publisher: _Publisher, deadline: Deadline
) -> None:
    most = max(settings.workers)
    clock = Clock(settings.device, 2 * settings.runs)
    with _blocks(settings, root, most) as blocks:
        peaks = measure_peaks(clock, settings.sizes)
        publisher.add(peaks.rows())
        publisher.show("peaks")
        sections: dict[str, Callable[[OneBlock], list[dict[str, Any]]]] = {
            "memory": lambda block: memory_rows(block, clock),
            "stages": lambda block: stage_rows(block, clock, peaks),
            "bits": lambda block: bit_rows(block, settings.device),
            "streams": lambda block: stream_rows(
                block, settings.device, clock, most, count=2 if settings.pretend else 8
            ),
            "cpu": lambda block: cpu_rows(block, settings.runs),
        }
        for section, measured in sections.items():
            if deadline.left_s < 0:
                publisher.report.note(f"{section}: left out, no time was left.")
                continue
            for block in blocks:
                facts = {"itemsize": block.itemsize, "dense": block.elements * block.rows}
                publisher.add([row | facts for row in measured(block)])
            publisher.show(section)


def _measure_commands(
    settings: Settings, root: Path, work: Path, publisher: _Publisher, deadline: Deadline
) -> None:
    cases = [(case, route) for case in settings.sizes.cases for route in case.routes]
    for number, (case, route) in enumerate(cases):
        if number and deadline.left_s < 0:
            publisher.report.note(f"{case.name}, {route}: left out, no time was left.")
            continue
        ends = deadline.share(len(cases) - number)
        _say(f"{case.name}: trajectory and store")
        prepare(case, root, workers=max(settings.workers))
        if number == 0:
            publisher.report.note(default_limit_note(settings, root, work))
        _say(f"{case.name}, {route}: extrapolations")
        rows, notes = CommandRuns(settings, case, route, root, work).rows(ends)
        for note in notes:
            publisher.report.note(note)
        publisher.add(rows)


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def find_device(*, pretend: bool) -> Device:
    """Return the first GPU, or a pretend one.

    Raises
    ------
    BenchmarkError
        If there is none; in one line.
    """
    if pretend:
        return PRETEND
    try:
        return devices.find_devices(devices.parse_devices("cuda:0"))[0]
    except DeviceError as error:
        raise BenchmarkError(f"{error}; --pretend runs this on the CPU, to test it") from error


def describe_device(device: Device) -> dict[str, Any]:
    """Return what is to be known of a device beside its figures."""
    if device is PRETEND:
        return {"name": device.name}
    properties = torch.cuda.get_device_properties(device.torch_device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "limit_bytes": device.memory_limit_bytes,
    }


@click.command("devices", context_settings={"show_default": True, "default_map": {"runs": 3}})
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep trajectories and stores there, and use those that are there.",
)
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only this part; repeatable."
)
@click.option("--quick", is_flag=True, help="Half the steps, fewer layers, two runs.")
@click.option("--pretend", is_flag=True, help="On the CPU and tiny, to test this command itself.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=32, help="Of bf16; half for the slice."
)
@click.option(
    "--layers", type=click.IntRange(min=1), default=2, help="Of the slice of the 8B model."
)
@click.option("--fp32-size", type=ModelSize(), default="40m", help="Weights, or a preset.")
@click.option("--fp32-steps", type=click.IntRange(min=2), default=32)
@click.option(
    "--workers",
    "workers_text",
    default="1,2,4,8,16",
    help="Of the CPU, with commas; those above the cores are left out.",
)
@click.option("--cluster/--no-cluster", default=True, help="Also two processes on the GPU.")
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, help="For all of it.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work, if not in the system's temporary directory.",
)
@report_options
def command(
    *,
    run_dir: Path | None,
    parts: tuple[str, ...],
    quick: bool,
    pretend: bool,
    steps: int,
    layers: int,
    fp32_size: Preset,
    fp32_steps: int,
    workers_text: str,
    cluster: bool,
    budget_s: float,
    directory: Path | None,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measure extrapolation on a GPU: a block's stages, whole commands, the cost model."""
    device = find_device(pretend=pretend)
    deadline = Deadline(time.monotonic() + budget_s)
    parts = parts or PARTS
    if quick:
        steps, fp32_steps, layers, runs = steps // 2, fp32_steps // 2, 1, min(runs, 2)
    sizes = full_sizes(steps=steps, layers=layers, fp32=fp32_size, fp32_steps=fp32_steps)
    cores = usable_cores()
    settings = Settings(
        sizes=pretend_sizes() if pretend else sizes,
        device=device,
        workers=_worker_counts(workers_text, cores),
        runs=runs,
        cluster=cluster,
        pretend=pretend,
    )
    with work_directory(directory) as work:
        root = (run_dir or work / "runs").absolute()
        title = "extrapolation on a device and on the CPU"
        report = Report(
            f"PRETEND DEVICES, figures mean nothing: {title}" if pretend else title,
            "devices",
            {
                "pretend": pretend,
                "parts": list(parts),
                "workers": list(settings.workers),
                "runs": runs,
                "budget_s": budget_s,
                "cases": {
                    case.name: {
                        "preset": case.preset.name,
                        "weights": case.preset.weights,
                        "dtype": case.dtype,
                        "steps": case.steps,
                    }
                    for case in settings.sizes.cases
                },
                "block_elements": dict(settings.sizes.block_elements),
                "block_rows": settings.sizes.rows,
            },
            machine=machine(root) | {"device": describe_device(device)},
        )
        if pretend:
            report.note(PRETEND_NOTE)
            click.echo(PRETEND_NOTE, err=True)
        publisher = _Publisher(report, json_path, markdown=markdown)
        if parts == ("prepare",):
            for case in settings.sizes.cases:
                _say(f"{case.name}: trajectory and store")
                prepare(case, root, workers=max(settings.workers))
        if "blocks" in parts:
            _measure_blocks(settings, root, publisher, deadline)
        if "commands" in parts:
            outputs = work / "outputs"
            outputs.mkdir()
            _measure_commands(settings, root, outputs, publisher, deadline)
        constants = suggested_constants(report.rows)
        add_projections(report.rows, constants)
        publisher.show("commands")
        publisher.add(constant_rows(constants))
        publisher.show("constants")
    for note in report.notes:
        click.echo(note)
    publisher.save()


def _worker_counts(text: str, cores: int) -> tuple[int, ...]:
    try:
        wanted = sorted({int(each) for each in text.split(",")})
    except ValueError:
        wanted = [0]
    if wanted[0] < 1:
        raise click.BadParameter(f"{text!r}: whole numbers with commas, such as 1,4,16")
    return tuple(each for each in wanted if each <= cores) or (1,)
