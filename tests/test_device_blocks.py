"""Blocks of a store on borrowed devices: what kernels give, also where memory runs out."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from relex_stream import blocks, dense, planner
from relex_stream.base_weights import open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY, BlockReader
from relex_stream.block_sweep import sweep_outputs, sweep_products
from relex_stream.blocks import BlockOf, Strip, Workspace
from relex_stream.dense import DenseBlock
from relex_stream.device_blocks import MIN_ELEMENTS, DeviceBlocks
from relex_stream.devices import Device, DevicePool, find_devices, parse_devices
from relex_stream.errors import CorruptionError, RelexStreamWarning
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store

STEPS = (1, 2, 3, 5, 8, *range(9, 24))  # of two chunks
ROWS = 20
SHAPES = {"a.weight": (40, 31), "b.norm.weight": (16,), "c.bias": (7,)}
BLOCK_BYTES = 2000
TILE = 128
PATIENCE_S = 30
KINDS = ("products", "gram", "outputs")


@pytest.fixture(scope="module", params=[("BF16", None), ("F16", None), ("F32", "BF16")], ids=str)
def run(request, tmp_path_factory) -> Trajectory:
    dtype, base_dtype = request.param
    root = tmp_path_factory.mktemp("devices")
    trajectory = make_trajectory(
        root, steps=STEPS, dtype=dtype, base_dtype=base_dtype, tensors=SHAPES, change_share=0.05
    )
    options = {"include_base": True, "block_bytes": BLOCK_BYTES}
    build_store(trajectory.base, trajectory.checkpoints, root / "store", **options)
    return trajectory


@pytest.fixture(autouse=True)
def narrow_tiles():
    """Tiles of which even a small block has some; blocks must be cut between two."""
    with (
        mock.patch.object(dense, "device_tile_columns", return_value=TILE),
        mock.patch.object(planner, "device_tile_columns", return_value=TILE),
        mock.patch.object(dense, "DEVICE_OUTPUT_COLUMNS", TILE),
        mock.patch.object(dense, "DEVICE_OUTPUT_ROWS", 3),
    ):
        yield


def reader_of(run: Trajectory) -> BlockReader:
    store = Store(run.base.parent / "store")
    base = open_base(store, None, CheckpointReader())
    return BlockReader(store, base, Workspace(), DEFAULT_ENTRY_CAPACITY)


def blocks_of(reader: BlockReader) -> list[BlockOf]:
    return [
        BlockOf(tensor, number)
        for tensor in reader.store.manifest.tensors
        for number in range(tensor.blocks)
    ]


def largest_of(reader: BlockReader) -> BlockOf:
    return max(blocks_of(reader), key=lambda at: at.elements)


def pretend(count=1, slots=1) -> DeviceBlocks:
    devices = [Device(f"pretend {number}", "cpu", 1 << 30) for number in range(count)]
    return DeviceBlocks(DevicePool(devices, [slots] * count))


def cuda() -> DeviceBlocks:
    return DeviceBlocks(DevicePool(find_devices(parse_devices("cuda:0")), [2]))


ON_DEVICES = [
    pretend,
    pytest.param(
        cuda,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
        ],
    ),
]
on_devices = pytest.mark.parametrize("make", ON_DEVICES)


def work(devices: DeviceBlocks, reader: BlockReader, at: BlockOf, rows=ROWS, width=3):
    """Return all that devices compute of a block, by kind; None where the CPU is to do it."""
    weights = np.random.default_rng(rows).standard_normal((rows, width))
    base_bits = reader.base_bits(at)
    out = np.full((width, at.elements + 3), 77, base_bits.dtype)
    overflowed = devices.outputs(reader, at, base_bits, rows, weights, out)
    assert (out[:, at.elements :] == 77).all()
    return SimpleNamespace(
        weights=weights,
        products=devices.products(reader, at, base_bits, rows, weights),
        gram=devices.gram(reader, at, base_bits, rows),
        outputs=None if overflowed is None else (overflowed, out[:, : at.elements].tolist()),
    )


def same(one, other) -> bool:
    """Say whether all results have the same bits."""
    return (
        one.outputs == other.outputs
        and np.array_equal(one.products, other.products)
        and np.array_equal(one.gram, other.gram)
    )


def changes_of(run: Trajectory, at: BlockOf, rows: int):
    """Return D of the block, dense, from the checkpoints."""
    here = slice(at.start, at.start + at.elements)
    steps = (0, *STEPS[:rows])
    values = [
        oracle.values(
            run.bits[step][at.tensor.name].reshape(-1)[here], run.dtype if step else run.base_dtype
        )
        for step in steps
    ]
    return np.diff(values, axis=0)


def check(run: Trajectory, reader: BlockReader, at: BlockOf, found, rows: int) -> None:
    """Compare with the kernels and with the formulas."""
    changes = changes_of(run, at, rows)
    magnitude = np.abs(changes)
    # Sums of some hundred terms, each rounded to 1e-16 of the sum.
    exact = changes @ (changes.T @ found.weights)
    largest = magnitude @ (magnitude.T @ np.abs(found.weights))
    assert (np.abs(found.products - exact) <= 1e-12 * largest).all()
    assert (np.abs(found.gram - changes @ changes.T) <= 1e-12 * (magnitude @ magnitude.T)).all()

    base_bits = reader.base_bits(at)
    block = reader.change_rows(at, base_bits, rows).at_hand()
    by_kernel = np.zeros(found.products.shape)
    width = found.weights.shape[1]
    sweep_products(block, found.weights, np.empty((64, width), np.float32), by_kernel)
    # P is float32 there: each of 20 additions rounds to 6e-8 of the largest sum.
    assert (np.abs(found.products - by_kernel) <= 1e-6 * largest).all()
    block = reader.change_rows(at, base_bits, rows).at_hand()
    out = np.empty((width, at.elements), base_bits.dtype)
    tag = at.base_format.tag
    count = sweep_outputs(block, found.weights, base_bits, tag, np.empty((64, width)), out)
    assert found.outputs == (int(count), out.tolist())


@on_devices
@pytest.mark.parametrize("rows", [20, 17, 1])
def test_devices_give_what_the_kernels_give(run, make, rows):
    devices, reader = make(), reader_of(run)
    for at in blocks_of(reader):
        check(run, reader, at, work(devices, reader, at, rows), rows)


@on_devices
def test_twice_the_same_bits(run, make):
    devices, reader = make(), reader_of(run)
    at = largest_of(reader)
    assert same(work(devices, reader, at), work(devices, reader, at))
    assert same(work(devices, reader, at), work(make(), reader, at))


@pytest.mark.parametrize("limits", [(1, 1 << 20), (1 << 16, 300)])
def test_a_block_comes_a_run_at_a_time(run, monkeypatch, limits):
    monkeypatch.setattr(blocks, "_RUN_CHANGES", limits[0])
    monkeypatch.setattr(planner, "FRAMES_AT_HAND_BYTES", limits[1])
    runs = []
    put = DenseBlock.put

    def noting(self, rows, counts, positions, zigzags):
        runs.append(rows)
        assert len(rows) == 1 or sum(counts) <= blocks.run_capacity(at.elements)
        put(self, rows, counts, positions, zigzags)

    monkeypatch.setattr(DenseBlock, "put", noting)
    reader = reader_of(run)
    at = largest_of(reader)
    check(run, reader, at, work(pretend(), reader, at), ROWS)
    assert len(runs) > 3
    assert max(map(len, runs)) < ROWS


def test_several_threads_on_several_devices_give_the_same_bits(run):
    expected = {}
    reader = reader_of(run)
    for at in blocks_of(reader):
        expected[at.tensor.name, at.block] = work(pretend(), reader, at)
    devices = pretend(count=3, slots=2)

    def compare(number):
        reader = reader_of(run)
        each = blocks_of(reader)
        for at in each[number % len(each) :] + each[: number % len(each)]:
            assert same(work(devices, reader, at), expected[at.tensor.name, at.block])

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(compare, range(8)))
    # Buffers are kept for each slot, not for each block or thread.
    assert len(devices._staging) <= 6


def test_blocks_that_devices_take():
    def block_of(elements):
        at = mock.Mock(spec=BlockOf)
        at.elements = elements
        return at

    assert not DeviceBlocks.takes(block_of(MIN_ELEMENTS - 1))
    assert DeviceBlocks.takes(block_of(MIN_ELEMENTS))
    strip = mock.Mock(spec=Strip)
    strip.elements = 10 * MIN_ELEMENTS
    assert not DeviceBlocks.takes(strip)


def test_what_devices_take_has_two_tiles_at_least():
    # So that cutting it never changes a sum.
    assert MIN_ELEMENTS >= 2 * planner.DEVICE_TILE_COLUMNS
    assert MIN_ELEMENTS % planner.DEVICE_TILE_COLUMNS == 0


# --- where memory runs out -----------------------------------------------------------------------


@contextmanager
def memory_for(columns: int, where: str = "__init__"):
    """Let blocks of more columns run out of memory; yield what was tried, in order."""
    tried = []
    faithful = getattr(DenseBlock, where)

    def limited(self, *arguments, **options):
        size = arguments[0].size if where == "__init__" else self._columns
        tried.append(size)
        if size > columns:
            # Something large that must be gone before the next try.
            self.ballast = torch.empty(1)
            alive.append(weakref.ref(self.ballast))
            raise torch.cuda.OutOfMemoryError("out of memory")
        assert not [ballast for ballast in alive if ballast() is not None]
        return faithful(self, *arguments, **options)

    alive: list[weakref.ref] = []
    with mock.patch.object(DenseBlock, where, limited):
        yield tried


@pytest.mark.parametrize("where", ["__init__", "put", "_changes"])
def test_a_block_that_must_be_halved_gives_the_same_bits(run, where):
    reader = reader_of(run)
    at = largest_of(reader)
    expected = work(pretend(), reader, at)
    devices = pretend()
    gc.disable()
    try:
        with memory_for(at.elements - 1, where) as tried, warnings.catch_warnings():
            warnings.simplefilter("error")
            found = work(devices, reader, at)
    finally:
        gc.enable()
    assert same(found, expected)
    check(run, reader, at, found, ROWS)
    # Once as a whole, then in two parts of which the first ends where a tile does.
    middle = -(-(at.elements // 2) // TILE) * TILE
    assert set(tried) == {at.elements, middle, at.elements - middle}
    assert tried.count(at.elements) == 3
    with devices._pool.borrow() as loan:
        assert loan.slot == 0


def test_a_block_of_one_tile_is_halved_within(run):
    reader = reader_of(run)
    at = min((at for at in blocks_of(reader) if "bias" in at.tensor.name), key=lambda at: at.block)
    assert at.elements == 7
    with memory_for(4) as tried:
        found = work(pretend(), reader, at)
    assert tried[:3] == [7, 3, 4]
    check(run, reader, at, found, ROWS)


def test_what_does_not_fit_in_halves_is_left_to_the_cpu_with_one_warning(run):
    reader = reader_of(run)
    at = largest_of(reader)
    devices = pretend(count=2)
    with memory_for(1) as tried:
        with pytest.warns(RelexStreamWarning) as caught:
            found = work(devices, reader, at)
        assert all(getattr(found, kind) is None for kind in KINDS)
        (warning,) = caught
        assert str(warning.message) == (
            f"pretend 0 has no memory for half of a block of {at.elements} weights (tensor "
            f"{at.tensor.name}); the CPU works on such blocks, more slowly"
        )
        # Each was tried as a whole, then a half.
        assert len(tried) == 6
        with devices._pool.borrow(), pytest.warns(RelexStreamWarning, match="pretend 1") as caught:
            work(devices, reader, at)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work(devices, reader, at)
            with devices._pool.borrow():
                work(devices, reader, at)
    # Memory may come back.
    check(run, reader, at, work(devices, reader, at), ROWS)


def test_one_warning_also_from_several_threads(run):
    devices = pretend(slots=4)
    start = threading.Barrier(4, timeout=PATIENCE_S)

    def fail(_):
        reader = reader_of(run)
        start.wait()
        work(devices, reader, largest_of(reader))

    with (
        memory_for(1),
        pytest.warns(RelexStreamWarning) as caught,
        ThreadPoolExecutor(4) as executor,
    ):
        list(executor.map(fail, range(4)))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",  # of page-locked memory
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_other_words_for_lack_of_memory_are_known(run, text, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(text)

    reader = reader_of(run)
    monkeypatch.setattr("relex_stream.device_blocks.DenseBlock", fail)
    with pytest.warns(RelexStreamWarning, match="has no memory for half of a block"):
        found = work(pretend(), reader, largest_of(reader))
    assert all(getattr(found, kind) is None for kind in KINDS)


def test_each_slot_works_on_one_thread(run, monkeypatch):
    # cuBLAS keeps memory for every pair of a thread and a stream.
    pool = DevicePool([Device("pretend 0", "cpu", 1 << 30)], [2])
    seen = {}
    barrier = threading.Barrier(2, timeout=PATIENCE_S)

    def use(_):
        for _ in range(20):
            with pool.borrow() as loan:
                name = pool.on_its_thread(loan, threading.get_ident)
                assert seen.setdefault(loan.slot, name) == name
        barrier.wait()

    for _ in range(3):  # other threads each time
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(use, range(2)))
    assert len(set(seen.values())) == len(seen) <= 2


def test_other_errors_are_not_taken_for_lack_of_memory(run):
    reader = reader_of(run)
    at = largest_of(reader)
    devices = pretend()

    def damaged(self, at, rows):
        raise CorruptionError("step 3, tensor a.weight, block 0")
        yield

    with mock.patch.object(BlockReader, "decoded", damaged):
        for kind in ("products", "gram"):
            weights = [np.ones((20, 1))] if kind == "products" else []
            with pytest.raises(CorruptionError, match="step 3"):
                getattr(devices, kind)(reader, at, reader.base_bits(at), 20, *weights)
    # The device is there again.
    check(run, reader, at, work(devices, reader, at), ROWS)
