"""A block as a dense array of torch: against the compiled kernels, and against dense formulas."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import accumulate, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from relex_stream import dense, planner
from relex_stream.block_sweep import sweep_outputs, sweep_products
from relex_stream.dense import DenseBlock, Staging
from relex_stream.sketch import ChangeRows, add_gram
from relex_stream.ulp import FORMATS, add_rounded, advance_rows, numbers, ordered
from tests import oracle
from tests.test_block_sweep import WIDTHS, Case, cases, make_case, random_patterns

CODES = sorted(FORMATS)
CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
        ],
    ),
]
ROUNDING = 1e-12
"""Of the sum of all terms' magnitudes: some hundred terms, each rounded to 1e-16 of the sum."""

on_devices = pytest.mark.parametrize("device", DEVICES, ids=str)
tiles = st.sampled_from([1, 7, 64, 100, 300, 1000])
seeds = st.integers(0, 2**32 - 1)


@contextmanager
def tiles_of(columns: int, output_rows: int = 5):
    """Make tiles so narrow that a small block has some."""
    with (
        mock.patch.object(dense, "device_tile_columns", return_value=columns),
        mock.patch.object(dense, "DEVICE_OUTPUT_COLUMNS", columns),
        mock.patch.object(dense, "DEVICE_OUTPUT_ROWS", output_rows),
    ):
        yield


def load(case: Case, device=CPU, first=0, stop=None, at_a_time=100, staging=None) -> DenseBlock:
    """Put a case's changes to some columns, given `at_a_time` rows at a time in one buffer."""
    rows = case.rows
    block = DenseBlock(
        rows.origin[first:stop],
        len(case.dense),
        FORMATS[code_of(case)],
        device,
        first=first,
        staging=staging,
    )
    positions, zigzags = np.empty_like(rows.positions), np.empty_like(rows.zigzags)
    for some in range(0, rows.rows.size, at_a_time):
        here = slice(some, some + at_a_time)
        low, high = rows.starts[here][0], rows.ends[here][-1]
        positions[: high - low] = rows.positions[low:high]
        zigzags[: high - low] = rows.zigzags[low:high]
        counts = (rows.ends - rows.starts)[here].tolist()
        block.put(rows.rows[here].tolist(), counts, positions, zigzags)
        # The buffer is used again at once.
        positions[:], zigzags[:] = 0xFFFFFFFF, 0xFFFF
    return block


def code_of(case: Case) -> str:
    return next(code for code, fmt in FORMATS.items() if fmt.tag == case.rows.tag)


def kernel_outputs(case: Case, weights, base, base_code):
    out = np.zeros((weights.shape[1], base.size), base.dtype)
    sums = np.empty((64, weights.shape[1]))
    return out, sweep_outputs(case.rows, weights, base, FORMATS[base_code].tag, sums, out)


# --- against the kernels and the formulas -------------------------------------------------------


@on_devices
@settings(max_examples=40, deadline=None)
@given(case=cases, tile=tiles, width=st.sampled_from(WIDTHS), seed=seeds)
def test_products_are_those_of_the_dense_matrix_and_of_the_kernel(device, case, tile, width, seed):
    coefficients = np.random.default_rng(seed).standard_normal((len(case.dense), width))
    with tiles_of(tile):
        found = load(case, device).products(coefficients)
    terms = np.abs(case.dense).T @ np.abs(coefficients)
    largest = np.abs(case.dense) @ terms
    exact = case.dense @ (case.dense.T @ coefficients)
    assert found.dtype == np.float64
    assert (np.abs(found - exact) <= ROUNDING * largest).all()
    by_kernel = np.zeros(coefficients.shape)
    sweep_products(case.rows, coefficients, np.empty((64, width), np.float32), by_kernel)
    # The kernel's P is float32: as in test_block_sweep.py, where huge columns leave its range.
    usual = ((case.dense != 0) @ (terms > 1e30)) == 0
    assert (np.abs(found - by_kernel) <= 1e-6 * largest + 1e-12)[usual].all()


@on_devices
@settings(max_examples=40, deadline=None)
@given(case=cases, tile=tiles)
def test_grams_are_those_of_the_dense_matrix_and_of_the_kernel(device, case, tile):
    with tiles_of(tile):
        found = load(case, device).gram()
    largest = np.abs(case.dense) @ np.abs(case.dense).T
    assert found.dtype == np.float64
    assert (np.abs(found - case.dense @ case.dense.T) <= ROUNDING * largest).all()
    rows = case.rows
    changes = ChangeRows(rows.rows, rows.starts, rows.ends, rows.positions, rows.values)
    state = rows.origin.copy()
    advance_rows(state, rows.starts, rows.ends, rows.positions, rows.zigzags, rows.tag, rows.values)
    by_kernel = np.zeros(found.shape)
    add_gram(changes, 0, rows.origin.size, by_kernel)
    assert (np.abs(np.tril(found - by_kernel)) <= ROUNDING * largest).all()


@on_devices
@settings(max_examples=40, deadline=None)
@given(
    case=cases,
    tile=tiles,
    at_once=st.integers(1, 13),
    width=st.sampled_from(WIDTHS),
    base_code=st.sampled_from(CODES),
    seed=seeds,
)
def test_outputs_have_the_bits_of_the_kernel(device, case, tile, at_once, width, base_code, seed):
    rng = np.random.default_rng(seed)
    size, steps = case.rows.origin.size, len(case.dense)
    base = random_patterns(rng, size, base_code)
    # Of all sizes: sums cancel, and results overflow and become subnormal.
    weights = rng.standard_normal((steps, width)) * 10.0 ** rng.integers(-6, 7, (steps, width))
    weights[rng.random(weights.shape) < 0.2] = 0.0
    expected, count = kernel_outputs(case, weights, base, base_code)
    out = np.full((width, size + 3), 77, base.dtype)
    with tiles_of(tile, at_once):
        block = load(case, device)
        overflowed = block.outputs(weights, base, FORMATS[base_code], out)
    assert np.array_equal(out[:, :size], expected)
    assert (out[:, size:] == 77).all()
    assert overflowed == count


@on_devices
@settings(max_examples=30, deadline=None)
@given(case=cases, width=st.sampled_from(WIDTHS), base_code=st.sampled_from(CODES))
def test_outputs_are_rounded_once_from_the_float64_sum(device, case, width, base_code):
    size, steps = case.rows.origin.size, len(case.dense)
    rng = np.random.default_rng(size)
    base = random_patterns(rng, size, base_code)
    # Powers of two: products are exact, and both sides sum them row after row.
    weights = 2.0 ** rng.integers(-3, 3, (steps, width)) * rng.choice([-1, 0, 1], (steps, width))
    out = np.zeros((width, size), base.dtype)
    load(case, device).outputs(weights, base, FORMATS[base_code], out)
    for output in range(width):
        added = np.zeros(size)
        for row in range(steps):
            added += case.dense[row] * weights[row, output]
        total = oracle.values(base, base_code) + added
        # An element to which nothing is added keeps its bits, whatever they are.
        expected = np.where(added == 0, base, oracle.rounded(total, base_code))
        assert np.array_equal(out[output], expected)


@on_devices
@settings(max_examples=25, deadline=None)
@given(
    case=cases, tile=st.sampled_from([1, 8, 32, 64]), at_a_time=st.integers(1, 13), data=st.data()
)
def test_parts_cut_between_tiles_give_the_bits_of_the_whole(device, case, tile, at_a_time, data):
    size, steps = case.rows.origin.size, len(case.dense)
    middle = tile * data.draw(st.integers(1, max(1, size // tile)))
    parts = [(0, min(middle, size)), (min(middle, size), size)]
    rng = np.random.default_rng(size)
    coefficients = rng.standard_normal((steps, 3))
    base = case.rows.origin
    fmt = FORMATS[code_of(case)]
    with tiles_of(tile):
        whole = load(case, device)
        products, gram = None, None
        out = np.zeros((2, 3, size), base.dtype)
        count = whole.outputs(coefficients, base, fmt, out[0])
        for first, stop in parts:
            part = load(case, device, first, stop, at_a_time)
            products = part.products(coefficients, products)
            gram = part.gram(gram)
            count -= part.outputs(coefficients, base[first:stop], fmt, out[1, :, first:stop])
        assert np.array_equal(products, whole.products(coefficients))
        assert np.array_equal(gram, whole.gram())
    assert np.array_equal(out[0], out[1])
    assert count == 0


def test_what_is_to_be_continued_is_not_written_to():
    case = make_case_of_pieces("BF16", 50, 3)
    coefficients, start = np.ones((3, 2)), np.ones((3, 2))
    added = load(case).products(coefficients, start) - load(case).products(coefficients)
    np.testing.assert_allclose(added, 1.0, rtol=1e-12)
    load(case).gram(np.ones((3, 3)))
    assert (start == 1).all()


@on_devices
@pytest.mark.parametrize("code", CODES)
def test_nan_payloads_infinities_and_both_zeros(device, code):
    fmt = FORMATS[code]
    top = 1 << 8 * fmt.itemsize - 1
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    zero, one = 0, fmt.bias << fmt.mantissa
    odd = [zero, top, infinity, infinity | top, infinity + 1, top - 1, 2 * top - 1, 1, one]
    # From every one of them to every other, and back.
    before, after = (side.reshape(-1) for side in np.meshgrid(odd, odd))
    bits = [side.astype(fmt.bits_dtype) for side in (before, after, before)]
    case = case_of(code, bits)
    weights = np.array([[1.0, 3.0, 0.0], [0.5, 3.0, 1.0]])
    base = bits[0]
    expected, count = kernel_outputs(case, weights, base, code)
    out = np.zeros_like(expected)
    assert load(case, device).outputs(weights, base, fmt, out) == count
    assert np.array_equal(out, expected)
    # There and back is nothing, exactly: the base's own bits.
    assert np.array_equal(out[1], base)
    assert np.isfinite(load(case, device).products(weights)).all()


def case_of(code: str, bits: list[np.ndarray]) -> Case:
    """Make a case of given patterns, with `make_case`'s own way to find changes."""
    with mock.patch("tests.test_block_sweep.random_patterns", side_effect=bits):
        return make_case(code, bits[0].size, len(bits) - 1, 1.0, 0)


@pytest.mark.parametrize("code", CODES)
def test_without_changes_without_rows_and_without_outputs(code):
    fmt = FORMATS[code]
    base = random_patterns(np.random.default_rng(0), 20, code)
    out = np.zeros((2, 20), base.dtype)
    for rows in (0, 1, 3):
        block = DenseBlock(base, rows, fmt, CPU)
        block.put([], [], np.empty(5, np.uint32), np.empty(5, base.dtype))
        if rows:
            block.put([0], [0], np.empty(5, np.uint32), np.empty(5, base.dtype))
        assert not block.products(np.ones((rows, 4))).any()
        assert block.gram().shape == (rows, rows)
        assert not block.gram().any()
        assert block.outputs(np.ones((rows, 2)), base, fmt, out) == 0
        assert np.array_equal(out, [base, base])
        assert block.outputs(np.ones((rows, 0)), base, fmt, out[:0]) == 0


def test_positions_are_unsigned():
    base = np.zeros(10, np.uint16)
    first = (1 << 32) - 10
    positions = np.array([5, first - 1, first, first + 9, first + 2], np.uint32)
    zigzags = np.array([2, 2, 4, 6, 8], np.uint16)
    block = DenseBlock(base, 2, FORMATS["BF16"], CPU, first=first)
    block.put([0, 1], [4, 1], positions, zigzags)
    expected = np.zeros((2, 10))
    expected[0, 0], expected[0, 9], expected[1, 2] = 2, 3, 4
    smallest = 2.0**-133
    np.testing.assert_array_equal(block.gram(), expected @ expected.T * smallest**2)


@on_devices
@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_a_block_as_large_as_real_ones(device, code):
    # More columns than a tile has, and not a whole number of tiles.
    case = make_case_of_pieces(code, planner.DEVICE_OUTPUT_COLUMNS + 4_321, steps=18)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((18, 3))
    base = case.rows.origin
    expected, count = kernel_outputs(case, weights, base, code)
    out = np.zeros_like(expected)
    block = load(case, device, at_a_time=7)
    assert block.outputs(weights, base, FORMATS[code], out) == count
    assert np.array_equal(out, expected)
    products = block.products(weights)
    exact = case.dense @ (case.dense.T @ weights)
    np.testing.assert_allclose(products, exact, rtol=0, atol=1e-12 * np.abs(exact).max())
    gram = block.gram()
    exact = case.dense @ case.dense.T
    np.testing.assert_allclose(gram, exact, rtol=0, atol=1e-12 * np.abs(exact).max())
    # The same bits every time, and however the block is cut between tiles.
    tile = planner.device_tile_columns(18)
    left = load(case, device, 0, 3 * tile)
    right = load(case, device, 3 * tile, None)
    assert np.array_equal(load(case, device).products(weights), products)
    assert np.array_equal(right.products(weights, left.products(weights)), products)
    assert np.array_equal(right.gram(left.gram()), gram)


def make_case_of_pieces(code: str, size: int, steps: int) -> Case:
    """Make a case whose dtype's every step changes a part of the weights a little."""
    rng = np.random.default_rng(0)
    bits = [oracle.rounded(rng.standard_normal(size) * 0.02, code)]
    for _ in range(steps):
        moved = np.where(rng.random(size) < 0.05, rng.integers(1, 4, size), 0)
        bits.append(bits[-1] + moved.astype(bits[0].dtype))
    return case_of(code, bits)


# --- exactness ----------------------------------------------------------------------------------


def signed(patterns):
    kind = {2: np.int16, 4: np.int32}[patterns.itemsize]
    return torch.from_numpy(patterns.view(kind).astype(np.int64))


@pytest.mark.parametrize("code", CODES)
def test_values_are_exact(code):
    fmt = FORMATS[code]
    if fmt.itemsize == 2:
        patterns = np.arange(1 << 16).astype(np.uint16)
    else:
        rng = np.random.default_rng(0)
        fractions = [0, 1, 2, 0x3FFFFF, 0x400000, 0x7FFFFF, *rng.integers(0, 1 << 23, 50)]
        patterns = np.add.outer(np.arange(512) << 23, fractions).reshape(-1).astype(np.uint32)
    order = dense._ordered(signed(patterns), fmt)
    kind = {2: np.int16, 4: np.int32}[fmt.itemsize]
    assert np.array_equal(order.numpy(), ordered(patterns).view(kind))
    assert torch.equal(dense._ordered(order, fmt), signed(patterns))
    values = dense._numbers_(order, fmt)
    assert np.array_equal(values.numpy(), numbers(patterns, fmt))
    assert np.array_equal(values.numpy(), oracle.values(patterns, code))


def awkward_numbers(code: str, rng) -> np.ndarray:
    """Return numbers at, just below and just above every kind of tie, and any pattern at all."""
    fmt = FORMATS[code]
    patterns = rng.integers(0, (2 * fmt.bias + 1) << fmt.mantissa, 2000).astype(fmt.bits_dtype)
    patterns[:8] = [0, 1, 2, 3, (1 << fmt.mantissa) - 1, 1 << fmt.mantissa, 5, 7]
    patterns[8] = ((2 * fmt.bias + 1) << fmt.mantissa) - 1
    low = oracle.values(patterns, code)
    last = 2.0 ** (fmt.bias + 1)
    high = oracle.values(patterns + fmt.bits_dtype.type(1), code)
    tie = np.where(high > low, low / 2 + high / 2, last * (1 - 2.0 ** -(fmt.mantissa + 2)))
    exact = np.concatenate([low, tie, np.nextafter(tie, np.inf), np.nextafter(tie, -np.inf)])
    anything = rng.integers(0, 1 << 63, 3000, dtype=np.int64).view(np.float64)
    special = np.array([np.inf, 5e-324, 2.0**-1022, 1.7976931348623157e308])
    some = np.concatenate([exact, anything[~np.isnan(anything)], special])
    return np.concatenate([some, -some])


@pytest.mark.parametrize("code", CODES)
def test_rounding_is_that_of_the_kernel(code):
    fmt = FORMATS[code]
    values = awkward_numbers(code, np.random.default_rng(0))
    expected = np.zeros(values.size, fmt.bits_dtype)
    count = add_rounded(expected.copy(), values, fmt, expected)
    found = dense._rounded(torch.from_numpy(values.copy()), fmt)
    kind = {2: torch.int16, 4: torch.int32}[fmt.itemsize]
    # A zero added to a zero leaves its bits there; rounding keeps the sign of -0.0.
    some = values != 0
    assert np.array_equal(found.to(kind).numpy().view(fmt.bits_dtype)[some], expected[some])
    assert torch.equal(found, found.to(kind).to(torch.int64))
    assert int(dense._exponent_full(found, fmt).sum()) == count > 0


@pytest.mark.parametrize("code", CODES)
def test_nans_round_to_quiet_nans(code):
    fmt = FORMATS[code]
    payloads = [0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFF8000000000000, 0xFFFFFFFFFFFFFFFF]
    values = np.array(payloads, np.uint64).view(np.float64)
    found = dense._rounded(torch.from_numpy(values), fmt).numpy().astype(fmt.bits_dtype)
    quiet = (2 * fmt.bias + 1) << fmt.mantissa | 1 << fmt.mantissa - 1
    top = 1 << 8 * fmt.itemsize - 1
    assert found.tolist() == [quiet, quiet, quiet | top, quiet | top]


class Operations(TorchDispatchMode):
    """Notes the operations, and the dtypes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func.overloadpacket).removeprefix("aten."))
        if isinstance(result, torch.Tensor):
            self.dtypes.add(result.dtype)
        return result


def test_nothing_is_computed_in_less_than_float64():
    # So neither TF32 nor another reduced precision can come in, whatever a process has set.
    case = make_case("BF16", 100, 4, 0.5, 0)
    weights = np.ones((4, 2))
    with Operations() as seen, torch.autocast("cpu", torch.bfloat16):
        block = load(case)
        block.products(weights)
        block.gram()
        block.outputs(weights, case.rows.origin, FORMATS["BF16"], np.zeros((2, 100), np.uint16))
    assert {dtype for dtype in seen.dtypes if dtype.is_floating_point} == {torch.float64}
    with pytest.raises(AssertionError):
        dense._product(torch.ones(1, 1), torch.ones(1, 1))


def test_weighted_sums_use_nothing_that_rounds_or_orders_as_it_likes():
    # On the CPU a fused operation rounds twice as well; on CUDA it rounds once.
    case = make_case("F32", 100, 4, 0.5, 0)
    block = load(case)
    out = np.zeros((2, 100), np.uint32)
    with Operations() as seen:
        block.outputs(np.ones((4, 2)), case.rows.origin, FORMATS["F32"], out)
    assert {"mul", "add_"} <= seen.names
    assert not seen.names & {"mm", "addmm", "bmm", "matmul", "mv", "dot", "einsum"}
    assert not {name for name in seen.names if name.startswith(("addc", "lerp", "cumprod"))}


# --- memory -------------------------------------------------------------------------------------


def peak_allocated(device, work) -> int:
    """Return the most bytes torch's allocator gave out at a time, by its own account."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@on_devices
@pytest.mark.parametrize(("code", "base_code"), [("BF16", "BF16"), ("F32", "BF16")])
@pytest.mark.parametrize(
    "kind", [{"basis": 9}, {"gram": True}, {"outputs": 1}, {"outputs": 8}], ids=str
)
@pytest.mark.parametrize(("size", "steps"), [(150_001, 1), (150_001, 11), (70_001, 40)])
def test_the_projection_bounds_what_is_allocated(device, code, base_code, kind, size, steps):
    # Every weight changes at every step, one run for each: the worst content.
    fmt, base_format = FORMATS[code], FORMATS[base_code]
    origin = oracle.rounded(np.random.default_rng(0).standard_normal(size), code)
    base = np.zeros(size, base_format.bits_dtype)
    positions, zigzags = np.arange(size, dtype=np.uint32), np.full(size, 2, fmt.bits_dtype)
    out = np.empty((kind.get("outputs", 0), size), base.dtype)
    staging = Staging(device)

    def work():
        block = DenseBlock(origin, steps, fmt, device, staging=staging)
        for row in range(steps):
            block.put([row], [size], positions, zigzags)
        if "basis" in kind:
            block.products(np.ones((steps, kind["basis"])))
        elif "gram" in kind:
            block.gram()
        else:
            block.outputs(np.ones((steps, kind["outputs"])), base, base_format, out)

    # After the first time staging, which is the host's, is as large as it gets.
    work()
    projected = planner.device_block_bytes(size, steps, fmt.itemsize, base.itemsize, **kind)
    projected -= planner.DEVICE_LIBRARY_BYTES
    peak = peak_allocated(device, work)
    # A CUDA device gives memory out in pieces of 512 bytes.
    assert peak <= projected + (1 << 16 if device.type == "cuda" else 0)
    # And not so far below that devices would be left idle.
    assert peak >= 0.6 * projected
    kept = sum(buffer.numel() for buffer in staging._buffers)
    assert kept <= planner.device_staging_bytes(
        size, fmt.itemsize, base.itemsize, kind.get("outputs", 0)
    )


@settings(deadline=None)
@given(rows=st.integers(0, 10**6))
def test_tiles_stay_in_their_room(rows):
    columns = planner.device_tile_columns(rows)
    assert columns.bit_count() == 1
    assert 64 <= columns <= planner.DEVICE_TILE_COLUMNS
    if columns > 64:
        assert planner._CHANGES_BYTES * (rows + 1) * columns <= planner.DEVICE_SCRATCH_BYTES
    assert columns >= planner.device_tile_columns(rows + 1)


# --- staging ------------------------------------------------------------------------------------


@on_devices
@given(sizes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_arrays_arrive_as_they_were_and_come_back(device, sizes):
    staging = Staging(device)
    rng = np.random.default_rng(0)
    sent = []
    for some in sizes:
        kinds = [np.uint32, np.uint16, np.int64, np.float64]
        arrays = [
            rng.integers(0, 1 << 15, size).astype(kind)
            for size, kind in zip(some, kinds, strict=False)
        ]
        expected = [array.copy() for array in arrays]
        sent += zip(staging.send(*arrays), expected, strict=True)
        for array in arrays:
            array[:] = 1
    for tensor, expected in sent:
        assert tensor.device.type == device.type
        wide = np.zeros((1, 2 * expected.size), expected.dtype)
        staging.fetch(tensor.view(1, -1), wide[:, ::2])
        assert np.array_equal(wide[0, ::2], expected)
        assert not wide[0, 1::2].any()


def test_a_buffer_is_written_to_when_its_last_copy_is_done(monkeypatch):
    log = []

    class Event:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            log.append(f"wait {self.number}")

    def mark(device):
        log.append(f"mark {len(log)}")
        return Event(len(log) - 1)

    monkeypatch.setattr(dense, "_mark", mark)
    staging = Staging(CPU)
    for _ in range(4):
        staging.send(np.zeros(3))
    # The two buffers alternate: the third copy needs the first's, the fourth the second's.
    assert log == ["mark 0", "mark 1", "wait 0", "mark 3", "wait 1", "mark 5"]
    first, second = (buffer.data_ptr() for buffer in staging._buffers[:2])
    assert first != second
    log.clear()
    staging.fetch(torch.zeros(3), np.empty(3, np.float32))
    assert log == ["mark 0", "wait 0"]


def test_a_buffer_that_is_large_enough_stays():
    staging = Staging(CPU)
    places = []
    for size in (100, 100, 50, 50, 100):
        staging.send(np.zeros(size))
        places.append([buffer.data_ptr() for buffer in staging._buffers])
    assert all(before == after for before, after in pairwise(places[1:]))
