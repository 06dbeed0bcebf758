from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relex_stream.codec import Changes
from relex_stream.intrinsics import DIFFERENCE_LANES
from relex_stream.ulp import (
    FORMATS,
    add_rounded,
    advance,
    advance_rows,
    can_widen,
    find_changes,
    finite_one,
    narrow,
    number_one,
    numbers,
    ordered,
    ordered_one,
    retreat,
    take_changes,
    widen,
)

BF16, F16, F32 = FORMATS["BF16"], FORMATS["F16"], FORMATS["F32"]
ALL_16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
WIDTH = {"BF16": 16, "F16": 16, "F32": 32}


def as_float64(bits, fmt):
    """Read patterns by numpy's own conversions; what is not finite stays so."""
    if fmt is BF16:
        bits = bits.astype(np.uint32) << np.uint32(16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(np.float16 if fmt is F16 else np.float32).astype(np.float64)


def random_bits(rng, size, itemsize):
    return np.frombuffer(rng.bytes(size * itemsize), f"u{itemsize}").copy()


def some_float32(rng, size):
    """Patterns of float32 that include every kind: subnormals, infinities, NaNs, both zeros."""
    bits = random_bits(rng, size, 4)
    kinds = np.array(
        [
            *(0, 1 << 31, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF),
            *(0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x3F800000),
        ],
        np.uint32,
    )
    bits[:: max(1, size // 300)] = rng.choice(kinds, bits[:: max(1, size // 300)].size)
    return bits


# --- the order of patterns ---------------------------------------------------------------------


def test_ordered_is_a_bijection_of_all_16_bit_patterns():
    assert np.array_equal(np.sort(ordered(ALL_16)), ALL_16)
    assert np.array_equal(ordered(ordered(ALL_16)), ALL_16)


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_ordered_keeps_the_order_of_all_16_bit_numbers(code):
    values = as_float64(ALL_16, FORMATS[code])
    in_order = ALL_16[np.argsort(ordered(ALL_16).view(np.int16), kind="stable")]
    in_order_values = values[in_order]
    kept = in_order_values[~np.isnan(in_order_values)]
    assert np.all(kept[1:] >= kept[:-1])
    # Only the two zeros are equal.
    assert np.count_nonzero(kept[1:] == kept[:-1]) == 1
    # NaNs lie outside the infinities, on the side of their sign.
    assert np.isnan(in_order_values[:1]).all()
    assert np.isnan(in_order_values[-1:]).all()


def test_ordered_of_32_bits_keeps_order_and_undoes_itself():
    bits = some_float32(np.random.default_rng(0), 100_000)
    assert np.array_equal(ordered(ordered(bits)), bits)
    values = as_float64(bits, F32)
    kept = np.isfinite(values)
    by_pattern = np.argsort(ordered(bits[kept]).view(np.int32), kind="stable")
    assert np.all(np.diff(values[kept][by_pattern]) >= 0)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_one_pattern_is_taken_as_arrays_are(code):
    fmt = FORMATS[code]
    bits = ALL_16 if fmt.itemsize == 2 else some_float32(np.random.default_rng(10), 20_000)
    exact = as_float64(bits, fmt)
    top = WIDTH[code] - 1
    assert [ordered_one(pattern, top) for pattern in bits] == ordered(bits).tolist()
    assert [finite_one(p, fmt.tag) for p in bits] == np.isfinite(exact).tolist()
    expected = np.where(np.isfinite(exact), exact, 0.0)
    assert np.array_equal([number_one(pattern, fmt.tag) for pattern in bits], expected)


# --- differences between two steps -------------------------------------------------------------


def check_differences(before, after):
    """Find the changes, compare them with numpy's, and apply them."""
    changes = Changes(before.size, before.itemsize)
    count = changes.find(before, after)
    assert np.array_equal(changes.positions[:count], np.flatnonzero(before != after))
    bits = 8 * before.itemsize
    different = before != after
    modular = (
        ordered(after[different]).astype(object) - ordered(before[different]).astype(object)
    ) % (1 << bits)
    signed = np.where(modular >= 1 << (bits - 1), modular - (1 << bits), modular)
    expected = np.where(signed < 0, -2 * signed - 1, 2 * signed)
    assert np.array_equal(changes.zigzags[:count].astype(object), expected)
    state = before.copy()
    advance(state, changes.positions, changes.zigzags, count)
    assert np.array_equal(state, after)
    retreat(state, changes.positions, changes.zigzags, count)
    assert np.array_equal(state, before)
    return changes


def test_differences_of_all_16_bit_patterns_come_back():
    rng = np.random.default_rng(1)
    for after in (rng.permutation(ALL_16), ALL_16[::-1].copy(), ALL_16 ^ np.uint16(0x8000)):
        check_differences(ALL_16, after)


def check_values(before, after, fmt):
    """Apply all changes as one row, and compare what each added with the difference of numbers."""
    changes = check_differences(before, after)
    count = changes.count
    state, values = before.copy(), np.full(before.size + 1, np.nan)
    starts, ends = np.zeros(1, np.int64), np.array([count])
    advance_rows(state, starts, ends, changes.positions, changes.zigzags, fmt.tag, values)
    assert np.array_equal(state, after)
    at = changes.positions[:count]
    assert np.array_equal(values[:count], numbers(after, fmt)[at] - numbers(before, fmt)[at])
    assert np.isnan(values[count:]).all()


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_advance_rows_measures_all_16_bit_patterns(code):
    check_values(ALL_16, np.random.default_rng(2).permutation(ALL_16), FORMATS[code])


def test_advance_rows_measures_float32():
    rng = np.random.default_rng(3)
    check_values(some_float32(rng, 20_001), some_float32(rng, 20_001), F32)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_advance_rows_takes_one_row_after_the_other_and_only_what_they_name(code):
    fmt = FORMATS[code]
    rng = np.random.default_rng(11)
    size, steps = 300, 7
    bits = [random_bits(rng, size, fmt.itemsize)]
    for _ in range(steps):
        now = np.where(rng.random(size) < 0.4, random_bits(rng, size, fmt.itemsize), bits[-1])
        bits.append(now)
    bits[4] = bits[3]  # a row without changes
    # Rows lie apart; between them is what no row names: positions outside the block.
    positions = np.full((size + 5) * steps, 0xFFFFFFFF, np.uint32)
    zigzags = np.full(positions.size, 7, fmt.bits_dtype)
    starts, ends = np.zeros(steps, np.int64), np.zeros(steps, np.int64)
    changes = Changes(size, fmt.itemsize)
    for row in range(steps):
        count = changes.find(bits[row], bits[row + 1])
        starts[row] = row * (size + 5) + row % 3
        ends[row] = starts[row] + count
        positions[starts[row] : ends[row]] = changes.positions[:count]
        zigzags[starts[row] : ends[row]] = changes.zigzags[:count]
    state, values = bits[0].copy(), np.full(positions.size, np.nan)
    advance_rows(state, starts, ends, positions, zigzags, fmt.tag, values)
    assert np.array_equal(state, bits[-1])
    expected = np.full(positions.size, np.nan)
    for row in range(steps):
        here = slice(starts[row], ends[row])
        before, after = (numbers(b, fmt) for b in bits[row : row + 2])
        expected[here] = (after - before)[positions[here]]
    assert np.array_equal(values, expected, equal_nan=True)


GUARD = 9


@settings(max_examples=60, deadline=None)
@given(
    itemsize=st.sampled_from([1, 2, 4]),
    size=st.integers(0, 200),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@example(itemsize=2, size=5, share=1.0, seed=0)
@example(itemsize=1, size=15, share=1.0, seed=0)
@example(itemsize=4, size=3, share=1.0, seed=0)
def test_differences_of_any_length_come_back(itemsize, size, share, seed):
    rng = np.random.default_rng(seed)
    before = random_bits(rng, size, itemsize)
    changing = rng.random(size) < share
    after = np.where(changing, random_bits(rng, size, itemsize), before)
    check_differences(before, after)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_differences_are_those_of_the_piece_at_any_length_and_offset(itemsize):
    # Whatever surrounds the piece in memory differs everywhere, and nothing is written behind the
    # room that the piece may need.
    rng = np.random.default_rng(12)
    room = 200 + 2 * GUARD
    for size in range(201):
        first = int(rng.integers(GUARD))
        piece = slice(first, first + size)
        around = random_bits(rng, room, itemsize)
        before, after = around, ~around
        changing = rng.random(size) < rng.choice([0.02, 0.5, 1.0])
        after[piece] = np.where(changing, after[piece], before[piece])
        positions = np.full(room, 0xDEADBEEF, np.uint32)
        zigzags = np.full(room, 0, f"u{itemsize}")
        at = int(rng.integers(GUARD))
        masks = np.full((2, int(rng.integers(1, 5))), 2**64 - 1, np.uint64)
        count = find_changes(
            before[piece], after[piece], masks, positions[at : at + size], zigzags[at:]
        )
        assert np.array_equal(positions[at : at + count], np.flatnonzero(changing))
        assert np.all(positions[:at] == 0xDEADBEEF)
        assert np.all(positions[at + count :] == 0xDEADBEEF)
        assert np.all(zigzags[at : at + count] > 0)
        assert not zigzags[:at].any()
        assert not zigzags[at + count :].any()


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("lanes_more", [-63, -1, 0, 1, 9, 63, 64, 65, 136])
def test_a_single_changed_element_is_found_wherever_it_lies(itemsize, lanes_more):
    size = DIFFERENCE_LANES + lanes_more
    before = np.zeros(size, f"u{itemsize}")
    changes = Changes(size, itemsize)
    assert changes.find(before, before.copy()) == 0
    for place in range(size):
        for bit in (0, 8 * itemsize - 1):
            after = before.copy()
            after[place] = 1 << bit
            assert changes.find(before, after) == 1
            # One up; or from +0 to -0, one down.
            assert (changes.positions[0], changes.zigzags[0]) == (place, 1 if bit else 2)


def test_all_elements_change():
    before = np.zeros(1001, np.uint16)
    changes = check_differences(before, before + np.uint16(1))
    assert changes.count == 1001


def test_zigzag_of_neighbours_is_small():
    # +1, -1, and across zero: -0.0 to +0.0 is one step up.
    before = np.array([0x3F80, 0x3F80, 0x8000, 0xBF80], np.uint16)
    after = np.array([0x3F81, 0x3F7F, 0x0000, 0xBF81], np.uint16)
    changes = check_differences(before, after)
    assert changes.zigzags[:4].tolist() == [2, 1, 2, 1]


# --- patterns as numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_numbers_of_all_16_bit_patterns(code):
    fmt = FORMATS[code]
    exact = as_float64(ALL_16, fmt)
    expected = np.where(np.isfinite(exact), exact, 0.0)
    found = numbers(ALL_16, fmt)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_numbers_of_float32():
    bits = some_float32(np.random.default_rng(4), 50_000)
    exact = as_float64(bits, F32)
    assert np.array_equal(numbers(bits, F32), np.where(np.isfinite(exact), exact, 0.0))


def test_numbers_keeps_the_shape():
    bits = ALL_16[:12].reshape(3, 4)
    assert numbers(bits, BF16).shape == (3, 4)


# --- rounding ----------------------------------------------------------------------------------


def rounded_exactly(value: float, fmt) -> int:
    """Round to nearest even by exact arithmetic; return the pattern of the magnitude."""
    if value == 0:
        return 0
    exponent = max(1, math.frexp(value)[1] - 1 + fmt.bias)  # biased; 1 also for subnormals
    step = Fraction(2) ** (exponent - fmt.bias - fmt.mantissa)
    count = round(abs(Fraction(value)) / step)  # Python rounds halves of a Fraction to even
    # The count is the stored bits, plus 2^mantissa where there is a hidden bit; that bit, and a
    # carry out of the binade, add to the exponent below.
    pattern = count + ((exponent - 1) << fmt.mantissa)
    return min(pattern, (2 * fmt.bias + 1) << fmt.mantissa)


def add_exactly(base: int, addend: float, fmt) -> int:
    """Return the pattern of the float64 sum rounded once; `addend` is not 0."""
    number = float(numbers(np.array([base], fmt.bits_dtype), fmt)[0])
    total = number + addend
    sign = int(np.signbit(total)) << (WIDTH[fmt.code] - 1)
    if np.isinf(total):
        return sign | ((2 * fmt.bias + 1) << fmt.mantissa)
    return sign | rounded_exactly(total, fmt)


def check_add_rounded(base, addend, fmt):
    out = np.empty_like(base)
    overflowed = add_rounded(base, addend, fmt, out)
    expected = [
        int(bits) if change == 0 else add_exactly(int(bits), float(change), fmt)
        for bits, change in zip(base, addend, strict=True)
    ]
    assert out.tolist() == expected
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    below_sign = (1 << (WIDTH[fmt.code] - 1)) - 1
    assert overflowed == sum(
        change != 0 and bits & below_sign >= infinity
        for bits, change in zip(expected, addend, strict=True)
    )


def test_the_oracle_rounds_every_16_bit_number_to_itself():
    for fmt in (BF16, F16):
        values = as_float64(ALL_16[:0x8000], fmt)
        for pattern in np.flatnonzero(np.isfinite(values)):
            assert rounded_exactly(float(values[pattern]), fmt) == pattern


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_against_exact_arithmetic(code):
    fmt = FORMATS[code]
    rng = np.random.default_rng(5)
    size = 3000
    base = random_bits(rng, size, fmt.itemsize)
    # Addends from far below a ULP to far above the value, of either sign.
    values = np.abs(numbers(base, fmt)) + 2.0 ** (1 - fmt.bias - fmt.mantissa)
    relative = 2.0 ** rng.integers(-fmt.mantissa - 5, 4, size)
    addend = values * relative * rng.choice([-1, 1], size) * rng.random(size)
    check_add_rounded(base, addend, fmt)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_of_subnormals(code):
    fmt = FORMATS[code]
    rng = np.random.default_rng(6)
    base = rng.integers(0, 4 << fmt.mantissa, 1000).astype(fmt.bits_dtype)
    step = 2.0 ** (1 - fmt.bias - fmt.mantissa)
    addend = rng.integers(-4 << (fmt.mantissa + 2), 4 << (fmt.mantissa + 2), 1000) * (step / 8)
    check_add_rounded(base, addend, fmt)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_takes_ties_to_even_and_looks_beyond_them(code):
    fmt = FORMATS[code]
    one = fmt.bias << fmt.mantissa
    half = 2.0 ** (-fmt.mantissa - 1)
    base = np.array([one, one + 1, one, one, one | 1 << (WIDTH[code] - 1)], fmt.bits_dtype)
    above, below = half * (1 + 2.0**-20), half * (1 - 2.0**-20)
    addend = np.array([half, half, above, below, -half])
    out = np.empty_like(base)
    assert add_rounded(base, addend, fmt, out) == 0
    assert out.tolist() == [one, one + 2, one + 1, one, int(base[4])]
    check_add_rounded(base, addend, fmt)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_counts_what_overflows(code):
    fmt = FORMATS[code]
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    sign = 1 << (WIDTH[code] - 1)
    largest = infinity - 1
    top_step = 2.0 ** (fmt.bias - fmt.mantissa)
    base = np.array([largest, largest, largest | sign, largest, largest], fmt.bits_dtype)
    # Half a step above the largest number is the tie with 2^(bias + 1), which is even: infinity.
    addend = np.array([top_step / 2, top_step * 0.499, -top_step, 1e300, np.inf])
    out = np.empty_like(base)
    assert add_rounded(base, addend, fmt, out) == 4
    assert out.tolist() == [infinity, largest, infinity | sign, infinity, infinity]


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_counts_nan(code):
    fmt = FORMATS[code]
    out = np.zeros(1, fmt.bits_dtype)
    base = np.array([fmt.bias << fmt.mantissa], fmt.bits_dtype)
    assert add_rounded(base, np.array([np.nan]), fmt, out) == 1
    assert np.isnan(as_float64(out, fmt)[0])


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_add_rounded_leaves_elements_without_a_change_alone(code):
    fmt = FORMATS[code]
    base = ALL_16 if fmt.itemsize == 2 else some_float32(np.random.default_rng(7), 10_000)
    out = np.zeros_like(base)
    addend = np.where(np.arange(base.size) % 2, 0.0, -0.0)
    assert add_rounded(base, addend, fmt, out) == 0
    assert np.array_equal(out, base)


def test_add_rounded_in_place_with_a_strided_addend():
    addends = np.array([[0.5, 9.0], [0.0, 9.0], [-1.0, 9.0]])
    base = np.array([0x3F80, 0x8000, 0x3F80], np.uint16)
    assert add_rounded(base, addends[:, 0], BF16, base) == 0
    assert base.tolist() == [0x3FC0, 0x8000, 0x0000]


# --- widening ----------------------------------------------------------------------------------


def widened(bits, source, target):
    out = np.full(bits.size, 0xAA, target.bits_dtype)
    widen(bits, source, target, out)
    return out


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_widening_keeps_all_16_bit_patterns_apart_and_exact(code):
    fmt = FORMATS[code]
    found = widened(ALL_16, fmt, F32)
    exact = as_float64(ALL_16, fmt)
    assert np.array_equal(as_float64(found, F32), exact, equal_nan=True)
    assert np.array_equal(found >> np.uint32(31), ALL_16 >> np.uint16(15))
    assert np.unique(found).size == 1 << 16
    # NaNs too: the payload goes to the top of the wider one, signalling ones stay so. A store
    # holds differences to these patterns, so they may depend on no machine.
    nans = np.isnan(exact)
    payload = (1 << fmt.mantissa) - 1
    expected = (ALL_16[nans].astype(np.uint32) & payload) << np.uint32(23 - fmt.mantissa)
    assert np.array_equal(found[nans] & np.uint32(0x7FFFFF), expected)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_widening_to_the_same_format_copies(code):
    fmt = FORMATS[code]
    bits = random_bits(np.random.default_rng(8), 1001, fmt.itemsize)
    assert np.array_equal(widened(bits, fmt, fmt), bits)


def test_which_formats_widen():
    allowed = {(a, b) for a in FORMATS for b in FORMATS if can_widen(FORMATS[a], FORMATS[b])}
    assert allowed == {(a, a) for a in FORMATS} | {("BF16", "F32"), ("F16", "F32")}


# --- narrowing ---------------------------------------------------------------------------------


def narrowed(bits, source, target):
    out = np.full(bits.size, 0xAA, target.bits_dtype)
    narrow(bits, source, target, out)
    return out


def test_f32_is_rounded_to_bf16_whatever_its_lower_half_is():
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        wide = (ALL_16.astype(np.uint32) << np.uint32(16)) | np.uint32(lower)
        found = narrowed(wide, F32, BF16)
        # By the definition: the nearer of the two neighbours, of equally near ones the even.
        up = (lower > 0x8000) | ((lower == 0x8000) & (ALL_16 & 1 == 1))
        expected = ALL_16.astype(np.uint32) + up
        nan = np.isnan(wide.view(np.float32))
        assert np.array_equal(found[~nan], expected[~nan])
        # NaNs keep sign and payload, and are quiet: none becomes an infinity.
        assert np.array_equal(found[nan], ALL_16[nan] | np.uint16(0x40))


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_narrowing_undoes_widening(code):
    fmt = FORMATS[code]
    found = narrowed(widened(ALL_16, fmt, F32), F32, fmt)
    nan = np.isnan(as_float64(ALL_16, fmt))
    assert np.array_equal(found[~nan], ALL_16[~nan])
    assert np.isnan(as_float64(found, fmt)[nan]).all()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_narrowing_to_the_same_format_copies(code):
    bits = random_bits(np.random.default_rng(9), 5000, FORMATS[code].itemsize)
    assert np.array_equal(narrowed(bits, FORMATS[code], FORMATS[code]), bits)


def test_f32_is_rounded_to_f16():
    between = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65520, 65519, -1e30, 2**-25], np.float32)
    found = narrowed(between.view(np.uint32), F32, F16)
    assert found.tolist() == [0x3C00, 0x3C02, 0x7C00, 0x7BFF, 0xFC00, 0x0000]


# --- measuring changes -------------------------------------------------------------------------


def weights(rng, size, fmt):
    """Return patterns of finite numbers of usual sizes."""
    values = (rng.standard_normal(size) * 0.02).astype(np.float32)
    if fmt is F16:
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return wide if fmt is F32 else (wide >> np.uint32(16)).astype(np.uint16)


@pytest.mark.parametrize("first", [0, 1, 777])
@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_take_changes_measures_and_makes_the_changes_of_a_piece(code, first):
    fmt = FORMATS[code]
    rng = np.random.default_rng(9)
    block, piece = 3000, 2000
    base, before = weights(rng, block, fmt), weights(rng, block, fmt)
    after = weights(rng, piece, fmt)
    at = np.flatnonzero(rng.random(piece) < 0.3)
    positions = np.append(at, 0).astype(np.uint32)  # what lies behind `count` is not looked at
    values = np.full(piece, np.nan)
    state = before.copy()
    change_sq, growth, nonfinite_at = take_changes(
        base, state, after, first, positions, at.size, fmt.tag, values
    )
    # Of the whole of `after`, only the elements named were taken over, at their place in the block.
    expected = before.copy()
    expected[first + at] = after[at]
    assert np.array_equal(state, expected)
    assert positions.tolist() == [*(first + at).tolist(), 0]
    origin, then = (as_float64(b, fmt)[first + at] for b in (base, before))
    now = as_float64(after, fmt)[at]
    assert np.array_equal(values[: at.size], now - then)
    assert np.isnan(values[at.size :]).all()
    assert change_sq == pytest.approx(((now - then) ** 2).sum(), rel=1e-12)
    growth_expected = ((now - origin) ** 2).sum() - ((then - origin) ** 2).sum()
    assert growth == pytest.approx(growth_expected, rel=1e-9, abs=1e-12)
    assert nonfinite_at == -1


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_take_changes_names_the_first_position_that_became_not_finite(code):
    fmt = FORMATS[code]
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    one = fmt.bias << fmt.mantissa
    base = np.array([one, infinity, one, one, one], fmt.bits_dtype)
    before = np.array([one, infinity, one, one, infinity], fmt.bits_dtype)
    after = np.array([0, infinity + 1, infinity, infinity + 1, one], fmt.bits_dtype)
    values = np.empty(5)

    def measure(first, *at):
        positions = np.array(at, np.uint32)
        piece, state = after[first:], before.copy()
        return take_changes(base, state, piece, first, positions, positions.size, fmt.tag, values)

    assert measure(0, 0, 1, 2, 3, 4)[2] == 2
    assert measure(0, 3, 4)[2] == 3
    assert measure(2, 1, 2)[2] == 3  # of the block, not of the piece
    # Not finite in the base already, or only at the step before: nothing to say.
    assert measure(0, 0, 1)[2] == -1
    assert measure(4, 0)[2] == -1
    assert measure(3)[2] == -1
    # What is not finite counts as 0.
    change_sq, growth, _ = measure(0, 0, 1, 2, 3, 4)
    assert values.tolist() == [-1.0, 0.0, -1.0, -1.0, 1.0]
    assert change_sq == 4.0
    assert growth == 1.0 + 0.0 + 1.0 + 1.0 - 1.0


def test_growth_does_not_cancel():
    # The distance to the base hardly changes; the difference of the squares would be all noise.
    base = np.array([0.0], np.float32).view(np.uint32)
    before = np.array([1e10], np.float32).view(np.uint32)
    after = before + np.uint32(1)
    values, state = np.empty(1), before.copy()
    positions = np.zeros(1, np.uint32)
    _, growth, _ = take_changes(base, state, after, 0, positions, 1, F32.tag, values)
    then, now = (Fraction(float(b.view(np.float32)[0])) for b in (before, after))
    assert growth == float(now * now - then * then)
