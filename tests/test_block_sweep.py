"""A block's changes swept in tiles, against dense matrices of the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream.block_sweep import BlockRows, sweep_outputs, sweep_products
from relex_stream.codec import Changes
from relex_stream.ulp import FORMATS
from tests import oracle

WIDTHS = (1, 3, 7, 8, 9, 16, 19)
"""Columns of C and of W: below, at and above what is added at a time, and twice that."""


@dataclass
class Case:
    """A block across its steps: its bits, its changes as the kernels take them, and dense D."""

    bits: list[np.ndarray]
    rows: BlockRows
    dense: np.ndarray


def random_patterns(rng, size, code, share_odd=0.1):
    """Return patterns of ordinary weights, and some of any kind (NaN, infinities, both zeros)."""
    patterns = oracle.rounded(rng.standard_normal(size) * 0.02, code)
    odd = rng.random(size) < share_odd
    patterns[odd] = rng.integers(0, 1 << 8 * patterns.itemsize, odd.sum()).astype(patterns.dtype)
    return patterns


def make_case(code, size, steps, share, seed):
    rng = np.random.default_rng(seed)
    fmt = FORMATS[code]
    bits = [random_patterns(rng, size, code)]
    rows, starts, ends, positions, zigzags = [], [], [], [], []
    changes = Changes(max(size, 1), fmt.itemsize)
    for step in range(steps):
        now = np.where(rng.random(size) < share, random_patterns(rng, size, code), bits[-1])
        bits.append(now)
        count = changes.find(bits[-2], now)
        if count:
            rows.append(step)
            starts.append(len(positions))
            positions += changes.positions[:count].tolist()
            zigzags += changes.zigzags[:count].tolist()
            ends.append(len(positions))
    dense = np.diff([oracle.values(each, code) for each in bits], axis=0)
    block = BlockRows(
        origin=bits[0].copy(),
        tag=fmt.tag,
        rows=np.array(rows, np.int64),
        starts=np.array(starts, np.int64),
        ends=np.array(ends, np.int64),
        positions=np.array(positions, np.uint32),
        zigzags=np.array(zigzags, fmt.bits_dtype),
        values=np.zeros(len(positions)),
    )
    return Case(bits, block, dense.reshape(steps, size))


cases = st.builds(
    make_case,
    st.sampled_from(["BF16", "F16", "F32"]),
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.integers(0, 2**32 - 1),
)
tiles = st.sampled_from([1, 7, 64, 100, 300, 1000])


@settings(max_examples=80, deadline=None)
@given(case=cases, tile=tiles, width=st.sampled_from(WIDTHS), seed=st.integers(0, 2**32 - 1))
def test_products_are_those_of_the_dense_matrix(case, tile, width, seed):
    coefficients = np.random.default_rng(seed).standard_normal((len(case.dense), width))
    start = np.random.default_rng(seed + 1).standard_normal(coefficients.shape)
    out = start.copy()
    # What lies in the room given does not count.
    sweep_products(case.rows, coefficients, np.full((tile, width), np.nan, np.float32), out)
    exact = case.dense @ (case.dense.T @ coefficients)
    # P is summed in float32: each of at most 12 additions rounds to 6e-8 of the largest sum. Some
    # patterns of any kind are huge: columns that leave float32's range are none of this test's.
    terms = np.abs(case.dense).T @ np.abs(coefficients)
    usual = ((case.dense != 0) @ (terms > 1e30)) == 0
    largest = np.abs(case.dense) @ terms
    assert (np.abs(out - start - exact) <= 1e-6 * largest + 1e-12)[usual].all()
    assert np.array_equal(case.rows.origin, case.bits[0])


@settings(max_examples=80, deadline=None)
@given(
    case=cases,
    tile=tiles,
    width=st.sampled_from(WIDTHS),
    base_code=st.sampled_from(sorted(FORMATS)),
)
def test_outputs_are_rounded_once_from_the_float64_sum(case, tile, width, base_code):
    size, steps = case.rows.origin.size, len(case.dense)
    rng = np.random.default_rng(size)
    base = random_patterns(rng, size, base_code)
    # Powers of two: products are exact, and both sides sum them row after row.
    weights = 2.0 ** rng.integers(-3, 3, (steps, width)) * rng.choice([-1, 0, 1], (steps, width))
    spare = 3
    out = np.zeros((width, size + spare), base.dtype)
    sums = np.full((tile, width), np.nan)
    overflowed = sweep_outputs(case.rows, weights, base, FORMATS[base_code].tag, sums, out)
    expected_overflows = 0
    for output in range(width):
        added = np.zeros(size)
        for row in range(steps):
            added += case.dense[row] * weights[row, output]
        total = oracle.values(base, base_code) + added
        # An element to which nothing is added keeps its bits, whatever they are.
        expected = np.where(added == 0, base, oracle.rounded(total, base_code))
        assert np.array_equal(out[output, :size], expected)
        infinite = (added != 0) & ~np.isfinite(_as_number(expected, base_code))
        expected_overflows += int(infinite.sum())
    assert overflowed == expected_overflows
    assert not out[:, size:].any()
    assert np.array_equal(case.rows.origin, case.bits[0])


def _as_number(patterns, code):
    """Return numbers, infinities where patterns are not finite."""
    numbers = oracle.values(patterns, code)
    zero = patterns & patterns.dtype.type((1 << 8 * patterns.itemsize - 1) - 1) == 0
    return np.where((numbers == 0) & ~zero, np.inf, numbers)
