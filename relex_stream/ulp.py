"""Bit patterns of floats: ordered integers, exact differences between steps, and rounding.

The ordered pattern of a float is a bijection of all bit patterns (both zeros, infinities, every
NaN) onto integers that keeps numeric order. Differences of ordered patterns are taken modulo
2^16 or 2^32, so they never overflow and adding one back gives every pattern exactly.

Kernels are compiled by numba, release the GIL and run on arrays of ``uint16`` (BF16, F16) or
``uint32`` (F32). A `FloatFormat` says how to read a pattern as a number; patterns that are not
finite count as 0 in every number taken here, so that one NaN cannot spoil a statistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from relex_stream.intrinsics import (
    DIFFERENCE_LANES,
    bits_from_float32,
    bits_from_float64,
    difference_mask,
    float32_from_bits,
    prefetch,
    trailing_zeros,
)
from relex_stream.kernels import kernel

Bits = NDArray[Any]
"""Bit patterns of weights, in the unsigned integer of their width."""


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format with deltas in the store.

    Attributes
    ----------
    code : str
        safetensors dtype code.
    tag : tuple of int
        The same for compiled kernels, by its length, which is part of its type: each kernel is
        compiled for the formats that it meets, and none has a branch left that asks for them.
    mantissa : int
        Stored mantissa bits.
    bias : int
        Exponent bias.
    bits_dtype : dtype
        Unsigned integer of the format's width.
    """

    code: str
    tag: tuple[int, ...]
    mantissa: int
    bias: int
    bits_dtype: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """Bytes per weight."""
        return self.bits_dtype.itemsize


_BF16, _F16 = 1, 2  # lengths of tags

MASKS_SHAPE = (2, 2048)
"""Scratch of `find_changes`: as many masks of differences, and their places, as 256 KiB have."""

_PREFETCHED = 16
"""Changes ahead of which the base's weights are asked for."""

F16_TAG = (0, 0)

FORMATS = {
    "BF16": FloatFormat("BF16", (0,), 7, 127, np.dtype(np.uint16)),
    "F16": FloatFormat("F16", F16_TAG, 10, 15, np.dtype(np.uint16)),
    "F32": FloatFormat("F32", (0, 0, 0), 23, 127, np.dtype(np.uint32)),
}
"""Float formats by safetensors dtype code."""


def ordered(bits: Bits) -> Bits:
    """Map bit patterns to ordered integers (two's complement, in the same unsigned dtype).

    Its own inverse.

    Parameters
    ----------
    bits : ndarray of uint16 or uint32
        Bit patterns of floats.

    Returns
    -------
    ndarray, same shape and dtype

    Examples
    --------
    >>> ordered(np.array([0x0000, 0x8000, 0xBF80], np.uint16)).view(np.int16).tolist()
    [0, -1, -16257]
    """
    top = 8 * bits.dtype.itemsize - 1
    below_sign = bits.dtype.type((1 << top) - 1)
    return np.where(bits >> top, bits ^ below_sign, bits)


@njit(inline="always")
def ordered_one(pattern, top):  # type: ignore[no-untyped-def]
    """Return the ordered pattern of one pattern whose sign is bit `top`, or undo that."""
    # Branch-free: all bits below the sign are flipped when the sign is set.
    pattern = np.uint32(pattern)
    flip = (np.uint32(0) - (pattern >> np.uint32(top))) & np.uint32((1 << top) - 1)
    return pattern ^ flip


@njit(inline="always")
def finite_one(pattern, tag):  # type: ignore[no-untyped-def]
    """Say whether a pattern is a finite number."""
    wide = np.uint32(pattern)
    if len(tag) == _BF16:
        return (wide & np.uint32(0x7F80)) != np.uint32(0x7F80)
    if len(tag) == _F16:
        return (wide & np.uint32(0x7C00)) != np.uint32(0x7C00)
    return (wide & np.uint32(0x7F800000)) != np.uint32(0x7F800000)


@njit(inline="always")
def number_one(pattern, tag):  # type: ignore[no-untyped-def]
    """Return the value of a pattern as float64, 0.0 when it is not finite."""
    if not finite_one(pattern, tag):
        return 0.0
    wide = np.uint32(pattern)
    if len(tag) == _BF16:
        return np.float64(float32_from_bits(wide << np.uint32(16)))
    if len(tag) == _F16:
        # The half's exponent and mantissa in a float's place, then the bias put right by an
        # exact multiplication; subnormal halves come out exact too.
        magnitude = np.float64(float32_from_bits((wide & np.uint32(0x7FFF)) << np.uint32(13)))
        magnitude *= 5.192296858534828e33  # 2**112
        return -magnitude if wide & np.uint32(0x8000) else magnitude
    return np.float64(float32_from_bits(wide))


@njit(inline="always")
def _zigzag_difference(before, after, top):  # type: ignore[no-untyped-def]
    mask = np.uint32((1 << (top + 1)) - 1)
    difference = (ordered_one(after, top) - ordered_one(before, top)) & mask
    sign = (np.uint32(0) - (difference >> np.uint32(top))) & mask
    return ((difference << np.uint32(1)) & mask) ^ sign


@kernel
def find_changes(before, after, masks, positions, zigzags):  # type: ignore[no-untyped-def]
    """Find the elements whose bits differ, and by how much.

    Parameters
    ----------
    before, after : ndarray of uint8, uint16 or uint32, shape (b,)
        Bit patterns at two steps.
    masks : ndarray of uint64, shape (2, n)
        Scratch, `MASKS_SHAPE` or any other.
    positions : ndarray of uint32, shape (>= b,)
        Out: ascending positions of the changed elements.
    zigzags : ndarray, same dtype as `before`, shape (>= b,)
        Out: zigzag code of the modular ordered difference (never 0).

    Returns
    -------
    int
        Number of changed elements.
    """
    top = 8 * before.itemsize - 1
    found = 0
    whole = before.size // DIFFERENCE_LANES * DIFFERENCE_LANES
    at_a_time = masks.shape[1] * DIFFERENCE_LANES
    for start in range(0, whole, at_a_time):
        # No branch here depends on the weights: one that cannot be foreseen, at every mask, would
        # take half as long as the comparing itself.
        noted = 0
        for first in range(start, min(whole, start + at_a_time), DIFFERENCE_LANES):
            changed = difference_mask(before, first, after, first)
            masks[0, noted], masks[1, noted] = changed, first
            noted += changed != np.uint64(0)
        for i in range(noted):
            changed = masks[0, i]
            while changed != np.uint64(0):
                at = np.int64(masks[1, i] + trailing_zeros(changed))
                changed &= changed - np.uint64(1)
                positions[found] = at
                zigzags[found] = _zigzag_difference(before[at], after[at], top)
                found += 1
    for i in range(whole, before.size):
        if before[i] != after[i]:
            positions[found] = i
            zigzags[found] = _zigzag_difference(before[i], after[i], top)
            found += 1
    return found


@kernel
def advance(state, positions, zigzags, count):  # type: ignore[no-untyped-def]
    """Apply the first `count` differences to `state` in place (bit patterns of one block).

    `positions` must lie inside `state`; the decoder guarantees it.
    """
    top = 8 * state.itemsize - 1
    mask = np.uint32((1 << (top + 1)) - 1)
    for i in range(count):
        p = positions[i]
        code = np.uint32(zigzags[i])
        difference = (code >> np.uint32(1)) ^ (np.uint32(0) - (code & np.uint32(1)))
        # The sum wraps in 32 bits; it is cut to the pattern's width before the order is undone.
        after = (ordered_one(state[p], top) + difference) & mask
        state[p] = ordered_one(after, top)


@kernel
def retreat(state, positions, zigzags, count):  # type: ignore[no-untyped-def]
    """Take back what `advance` did."""
    top = 8 * state.itemsize - 1
    mask = np.uint32((1 << (top + 1)) - 1)
    for i in range(count):
        p = positions[i]
        code = np.uint32(zigzags[i])
        difference = (code >> np.uint32(1)) ^ (np.uint32(0) - (code & np.uint32(1)))
        before = (ordered_one(state[p], top) - difference) & mask
        state[p] = ordered_one(before, top)


@njit(inline="always")
def advance_one(state, p, zigzag, tag):  # type: ignore[no-untyped-def]
    """Apply a difference to one element of `state`; return what it added, as float64."""
    top = 8 * state.itemsize - 1
    mask = np.uint32((1 << (top + 1)) - 1)
    before = state[p]
    code = np.uint32(zigzag)
    difference = (code >> np.uint32(1)) ^ (np.uint32(0) - (code & np.uint32(1)))
    after = ordered_one((ordered_one(before, top) + difference) & mask, top)
    state[p] = after
    return number_one(after, tag) - number_one(before, tag)


@njit(inline="always")
def _half_one(value):  # type: ignore[no-untyped-def]
    """Round to half precision, as float64; 0.0 when that is not finite."""
    return number_one(_round_one(value, 10, 15), F16_TAG)


@njit(inline="always")
def half_change_one(state, p, zigzag, tag, origin):  # type: ignore[no-untyped-def]
    """Apply a difference to one element; return by how much the delta in half precision changed.

    That delta is ``half(half(theta) - half(theta_0))``, as the scripts of RELEX's authors take it;
    `origin` is the pattern of theta_0.
    """
    start = _half_one(number_one(origin, tag))
    before = _half_one(_half_one(number_one(state[p], tag)) - start)
    advance_one(state, p, zigzag, tag)
    return _half_one(_half_one(number_one(state[p], tag)) - start) - before


@kernel
def advance_rows(state, starts, ends, positions, zigzags, tag, values):  # type: ignore[no-untyped-def]
    """Apply the differences of some rows to `state` in place, one row after the other.

    Row i has entries ``starts[i]:ends[i]`` of positions and zigzags. What each added is written to
    `values`, as float64, at the same place; `tag` is the `FloatFormat.tag` of the patterns.
    """
    for row in range(starts.size):
        for i in range(starts[row], ends[row]):
            values[i] = advance_one(state, positions[i], zigzags[i], tag)


@kernel
def advance_rows_half(state, origin, starts, ends, positions, zigzags, tag, values):  # type: ignore[no-untyped-def]
    """`advance_rows` for deltas in half precision; `origin` has the patterns at the base."""
    for row in range(starts.size):
        for i in range(starts[row], ends[row]):
            p = positions[i]
            values[i] = half_change_one(state, p, zigzags[i], tag, origin[p])


@kernel
def take_changes(base, state, after, first, positions, count, tag, values):  # type: ignore[no-untyped-def]
    """Measure the changes that `find_changes` found in a piece of a block, and make them.

    Parameters
    ----------
    base, state : ndarray of uint16 or uint32, shape (b,)
        Bit patterns of the block at the base, and at the step before in the piece; `state` is at
        this step afterwards.
    after : ndarray of uint16 or uint32
        Bit patterns at this step of the piece that begins at element `first`.
    positions : ndarray of uint32
        The first `count` are the changed elements: within the piece on entry, within the block on
        return.
    values : ndarray of float64
        Out: change in value of each.

    Returns
    -------
    change_sq : float
        Sum of squares of the changes.
    delta_sq_growth : float
        What the changes add to the sum of squares of ``this step - base``.
    nonfinite_at : int
        First position in the block that is not finite now though the base is finite there; -1 if
        none.
    """
    change_sq = 0.0
    growth = 0.0
    nonfinite_at = -1
    for i in range(count):
        if i + _PREFETCHED < count:
            # The changed elements are few and far apart: each would be waited for.
            prefetch(base, first + np.int64(positions[i + _PREFETCHED]))
        at = positions[i]
        p = first + np.int64(at)
        positions[i] = p
        if nonfinite_at < 0 and not finite_one(after[at], tag) and finite_one(base[p], tag):
            nonfinite_at = p
        now = number_one(after[at], tag)
        then = number_one(state[p], tag)
        origin = number_one(base[p], tag)
        state[p] = after[at]
        change = now - then
        values[i] = change
        change_sq += change * change
        # (now - origin)^2 - (then - origin)^2, factored so that it does not cancel.
        growth += change * ((now - origin) + (then - origin))
    return change_sq, growth, nonfinite_at


@njit(inline="always")
def _round_one(value, mantissa, bias):  # type: ignore[no-untyped-def]
    """Round a float64 to a 16-bit format in one step, to nearest even; return the pattern."""
    wide = bits_from_float64(value)
    sign = (wide >> np.uint64(63)) << np.uint64(15)
    magnitude = wide & np.uint64(0x7FFFFFFFFFFFFFFF)
    infinity = np.uint64((2 * bias + 1) << mantissa)
    # All cases are computed and one is taken: a branch that is hard to foresee costs more.
    drop = np.uint64(52 - mantissa)
    half = (np.uint64(1) << (drop - np.uint64(1))) - np.uint64(1)
    rounded = (magnitude + half + ((magnitude >> drop) & np.uint64(1))) >> drop
    rounded -= np.uint64(1023 - bias) << np.uint64(mantissa)
    rounded = min(rounded, infinity)
    # Subnormal in the target: a whole number of its smallest steps. The sum with 2^52 has no room
    # for halves, so the addition itself rounds, to even, and its low bits are that number.
    steps = bits_from_float64(abs(value) * 2.0 ** (bias - 1 + mantissa) + 4503599627370496.0)
    rounded = steps & np.uint64(0xFFFF) if magnitude < np.uint64((1024 - bias) << 52) else rounded
    quiet_nan = infinity | np.uint64(1 << (mantissa - 1))
    rounded = quiet_nan if magnitude > np.uint64(0x7FF0000000000000) else rounded
    return np.uint32(sign | rounded)


@njit(inline="always")
def rounded_sum_one(pattern, addend, tag):  # type: ignore[no-untyped-def]
    """Return the pattern of a pattern's value plus a float64, rounded once to nearest even."""
    value = number_one(pattern, tag) + addend
    if len(tag) == _BF16:
        return _round_one(value, 7, 127)
    if len(tag) == _F16:
        return _round_one(value, 10, 15)
    return bits_from_float32(np.float32(value))


@kernel
def _add_rounded_kernel(bits, addend, tag, out):  # type: ignore[no-untyped-def]
    overflowed = 0
    for i in range(bits.size):
        # An element no step changed keeps its exact bits (a negative zero, a NaN's payload).
        if addend[i] == 0.0:
            out[i] = bits[i]
            continue
        pattern = rounded_sum_one(bits[i], addend[i], tag)
        if not finite_one(pattern, tag):
            overflowed += 1
        out[i] = pattern
    return overflowed


def add_rounded(base: Bits, addend: NDArray[np.float64], fmt: FloatFormat, out: Bits) -> int:
    """Write the float64 ``base + addend``, rounded once to nearest even in `fmt`, to `out`.

    Elements with an addend of 0 keep their exact bits.

    Parameters
    ----------
    base : ndarray of fmt.bits_dtype, shape (b,)
        Bit patterns.
    addend : ndarray of float64, shape (b,)
        May be a strided view.
    fmt : FloatFormat
    out : ndarray of fmt.bits_dtype, shape (b,)
        May be `base` itself.

    Returns
    -------
    int
        How many results overflowed to infinity (or are NaN).

    Examples
    --------
    >>> out = np.zeros(1, np.uint16)
    >>> add_rounded(np.array([0x3F80], np.uint16), np.array([0.5]), FORMATS["BF16"], out)
    0
    >>> hex(out[0])
    '0x3fc0'
    """
    return int(_add_rounded_kernel(base, addend, fmt.tag, out))


def widen(bits: Bits, source: FloatFormat, target: FloatFormat, out: Bits) -> None:
    """Write patterns of `source` as patterns of `target`, exactly, to `out`.

    Only the pairs of `can_widen`: the same format, or BF16 or F16 to F32.
    """
    if source == target:
        np.copyto(out, bits)
    elif source.code == "BF16":
        np.left_shift(bits, 16, out=out, dtype=np.uint32, casting="unsafe")
    else:
        _widen_half_kernel(bits, out)


def narrow(bits: Bits, source: FloatFormat, target: FloatFormat, out: Bits) -> None:
    """Write patterns as those of a narrower format: rounded to nearest even, or as they are.

    What is not finite stays so. `target` is a format that `source` is as wide as or wider than.
    """
    if source == target:
        out[:] = bits
    elif target.code == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = bits.view(np.float32).astype(np.float16).view(np.uint16)
    else:
        round_to_bf16(bits, out)


@kernel
def round_to_bf16(bits, out):  # type: ignore[no-untyped-def]
    """Write F32 patterns as BF16 ones, rounded to nearest even, to `out`.

    A NaN stays one: quiet, with the upper half of its payload.
    """
    for i in range(bits.size):
        wide = bits[i]
        # BF16 is the upper half of F32.
        rounded = wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))
        is_nan = (wide & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = (wide | np.uint32(0x400000) if is_nan else rounded) >> np.uint32(16)


@kernel
def _widen_half_kernel(bits, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        wide = np.uint32(bits[i])
        if finite_one(wide, F16_TAG):
            out[i] = bits_from_float32(np.float32(number_one(wide, F16_TAG)))
        else:
            # By integers: a conversion in hardware quiets signalling NaNs on some machines, and a
            # store must give the same bits on all.
            sign = (wide & np.uint32(0x8000)) << np.uint32(16)
            payload = (wide & np.uint32(0x3FF)) << np.uint32(13)
            out[i] = sign | np.uint32(0x7F800000) | payload


def can_widen(source: FloatFormat, target: FloatFormat) -> bool:
    """Say whether every pattern of `source` is exactly one of `target`."""
    return source == target or (target.code == "F32" and source.itemsize == 2)


@kernel
def _numbers_kernel(bits, tag, out):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        out[i] = number_one(bits[i], tag)


def numbers(bits: Bits, fmt: FloatFormat) -> NDArray[np.float64]:
    """Return the values of bit patterns as float64; patterns that are not finite give 0.

    Examples
    --------
    >>> numbers(np.array([0x3F80, 0x7F80], np.uint16), FORMATS["BF16"]).tolist()
    [1.0, 0.0]
    """
    out = np.empty(bits.shape, np.float64)
    _numbers_kernel(bits.reshape(-1), fmt.tag, out.reshape(-1))
    return out
