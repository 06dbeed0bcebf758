"""A float64 oracle for extrapolation, dense and straight from the formulas.

Nothing here uses the code under test, nor `make_checkpoints`: 16-bit patterns become numbers, and
numbers patterns of any width, by arithmetic on sign, exponent and mantissa. Per tensor:

* M (T, d): row t is ``theta_t - theta_0``;
* U, S, V: `numpy.linalg.svd` of M, the first r components;
* C = M V: coefficients, one row per step; a least-squares curve over the step numbers by
  `numpy.linalg.lstsq` gives c(target);
* the predicted delta is ``p(target) = V c(target)``; ``theta* = theta_0 + lambda p(target)``, or
  ``theta_K + lambda (p(target) - p(K))``, rounded once.

Values that are not finite count as 0, as docs/design.md says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
Float64 = NDArray[np.float64]

_MANTISSA_AND_BIAS = {"BF16": (7, 127), "F16": (10, 15), "F32": (23, 127)}
_UNSIGNED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def values(bits: Bits, dtype: str) -> Float64:
    """Return the numbers that bit patterns stand for, 0 for those that are not finite.

    Examples
    --------
    >>> values(np.array([0x3FC0, 0x8001, 0x7F80], np.uint16), "BF16").tolist()
    [1.5, -9.183549615799121e-41, 0.0]
    >>> values(np.array([0x3E00, 0x0001], np.uint16), "F16").tolist()
    [1.5, 5.960464477539063e-08]
    """
    if dtype != "F32":
        return _table(dtype)[bits]
    with np.errstate(invalid="ignore"):  # signalling NaNs say so when they are widened
        single = np.ascontiguousarray(bits).view(np.float32).astype(np.float64)
    return np.where(np.isfinite(single), single, 0.0)


@functools.cache
def _table(dtype: str) -> Float64:
    """Return the numbers of all 65,536 patterns of a 16-bit format."""
    mantissa_bits, bias = _MANTISSA_AND_BIAS[dtype]
    patterns = np.arange(1 << 16)
    fraction = patterns & ((1 << mantissa_bits) - 1)
    exponent = (patterns >> mantissa_bits) & (2 * bias + 1)
    # Subnormals have the exponent of the smallest normals, and no implicit one.
    significand = np.where(exponent == 0, fraction, fraction + (1 << mantissa_bits))
    scale = np.maximum(exponent, 1) - bias - mantissa_bits
    magnitude = np.ldexp(significand.astype(np.float64), scale)
    magnitude = np.where(exponent == 2 * bias + 1, 0.0, magnitude)
    return np.where(patterns >> 15 == 1, -magnitude, magnitude)


def rounded(numbers: Float64, dtype: str) -> Bits:
    """Return the bit patterns of finite numbers, rounded once to nearest, ties to even.

    Examples
    --------
    >>> ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-40), 1e39, 2**-134, -0.0])
    >>> [hex(pattern) for pattern in rounded(ties, "BF16")]
    ['0x3f80', '0x3f82', '0xbf81', '0x7f80', '0x0', '0x8000']
    """
    mantissa_bits, bias = _MANTISSA_AND_BIAS[dtype]
    magnitude = np.abs(numbers)
    _, exponent = np.frexp(magnitude)  # the leading bit is 2**(exponent - 1)
    leading = np.where(
        magnitude == 0, 1 - bias, np.maximum(exponent.astype(np.int64) - 1, 1 - bias)
    )
    steps = np.rint(np.ldexp(magnitude, mantissa_bits - leading)).astype(np.int64)
    # A normal number's `steps` holds the implicit one, which belongs to the exponent's field; where
    # rounding carried into the next binade the sum carries too.
    pattern = ((leading + bias - 1) << mantissa_bits) + steps
    pattern = np.minimum(pattern, (2 * bias + 1) << mantissa_bits)
    sign = np.signbit(numbers).astype(np.int64)
    top = 8 * np.dtype(_UNSIGNED[dtype]).itemsize - 1
    return (pattern + (sign << top)).astype(_UNSIGNED[dtype])


def ulp_distance(ours: Bits, theirs: Bits) -> NDArray[np.int64]:
    """Return how many representable numbers lie from one pattern to the other (0 if identical).

    The two zeros are one apart.

    Examples
    --------
    >>> ulp_distance(np.array([0x3F80, 0x8000], np.uint16), np.array([0x3F82, 0x0000], np.uint16))
    array([2, 1])
    """

    def place(bits: Bits) -> NDArray[np.int64]:
        top = 8 * bits.dtype.itemsize - 1
        magnitude = bits.astype(np.int64) & ((1 << top) - 1)
        return np.where(bits >> top == 1, -1 - magnitude, magnitude)

    return np.abs(place(np.asarray(ours)) - place(np.asarray(theirs)))


@dataclass(frozen=True)
class Prediction:
    """What the formulas give for one tensor at one target step.

    Attributes
    ----------
    delta : ndarray of float64, shape (d,)
        ``M^T w``, before rounding.
    bits : ndarray
        ``theta_0 + M^T w`` in the base's dtype and the tensor's shape.
    """

    delta: Float64
    bits: Bits


Curve = Callable[[Float64, Float64, float], Float64]
"""From steps (T,), coefficients (T, r) and a target to those there (r,)."""


def line(steps: Float64, coefficients: Float64, target: float) -> Float64:
    """A least-squares line."""
    return polynomial(1)(steps, coefficients, target)


def polynomial(degree: int) -> Curve:
    """A least-squares polynomial, on a regressor from -1 to 1."""

    def curve(steps: Float64, coefficients: Float64, target: float) -> Float64:
        middle, width = steps.mean(), max(float(np.ptp(steps)) / 2, 1.0)
        design = np.vander((steps - middle) / width, degree + 1)
        parameters, *_ = np.linalg.lstsq(design, coefficients, rcond=None)
        there: Float64 = np.vander([(target - middle) / width], degree + 1)[0] @ parameters
        return there

    return curve


def line_from_base(steps: Float64, coefficients: Float64, target: float) -> Float64:
    """A least-squares line that is 0 at step 0."""
    return target * (steps @ coefficients) / (steps @ steps)


def windowed(curve: Curve, window: int) -> Curve:
    """A curve through the last steps alone."""
    return lambda steps, coefficients, target: curve(
        steps[-window:], coefficients[-window:], target
    )


def refitted(curve: Curve, window: int, every: int) -> Curve:
    """Predict so many steps, one by one, slide the window, fit again."""

    def again(steps: Float64, coefficients: Float64, target: float) -> Float64:
        steps, coefficients = steps[-window:], coefficients[-window:]
        while target > steps[-1] + every:
            ahead = steps[-1] + np.arange(1.0, every + 1)
            made = np.stack([curve(steps, coefficients, step) for step in ahead])
            steps = np.concatenate([steps, ahead])[-window:]
            coefficients = np.concatenate([coefficients, made])[-window:]
        return curve(steps, coefficients, target)

    return again


class History:
    """The base and checkpoints of a tensor, or of several side by side, decomposed.

    Parameters
    ----------
    base : ndarray
        Bit patterns in `base_dtype`.
    checkpoints : sequence of ndarray
        Bit patterns at each of `steps`, in `dtype`.

    Attributes
    ----------
    deltas : ndarray of float64, shape (T, d)
        M.
    """

    def __init__(
        self,
        base: Bits,
        base_dtype: str,
        checkpoints: Sequence[Bits],
        dtype: str,
        steps: Sequence[int],
    ) -> None:
        self._base = base
        self._base_dtype = base_dtype
        self._steps = np.asarray(steps, np.float64)
        self._origin = values(base, base_dtype).reshape(-1)
        self.deltas = np.stack([values(b, dtype).reshape(-1) - self._origin for b in checkpoints])
        left, self._singular, _ = np.linalg.svd(self.deltas, full_matrices=False)
        # V from U: rows of numpy's V^T lose digits where singular values are small.
        with np.errstate(divide="ignore", invalid="ignore"):
            self._right = np.nan_to_num(self.deltas.T @ left / self._singular)

    def predict(
        self,
        target_step: float,
        rank: int,
        *,
        curve: Curve = line,
        damping: float = 1.0,
        anchor: str = "base",
    ) -> Prediction:
        """Extrapolate."""

        def there(coefficients: Float64, step: float) -> Float64:
            return curve(self._steps, coefficients, step)

        right, coefficients = self._components(rank)
        delta = right @ there(coefficients, target_step)
        if anchor == "latest":
            change = delta - right @ there(coefficients, self._steps[-1])
            delta = self.deltas[-1] + damping * change
        else:
            delta = damping * delta
        return self.of_delta(delta)

    def project(self, step: int, rank: int) -> Prediction:
        """Project a step into the subspace and back."""
        right, coefficients = self._components(rank)
        return self.of_delta(right @ coefficients[self._steps.tolist().index(step)])

    def _components(self, rank: int) -> tuple[Float64, Float64]:
        """Return V (d, r) and C (T, r); directions that M does not have count for nothing."""
        singular = self._singular[:rank]
        kept = int((singular > 1e-7 * self._singular.max(initial=0.0)).sum())
        right = self._right[:, :kept]
        return right, self.deltas @ right

    def of_delta(self, delta: Float64) -> Prediction:
        """Round the base plus a delta."""
        # A weight that no step moved keeps its pattern (a negative zero, a NaN's payload).
        bits = np.where(
            self.deltas.any(axis=0),
            rounded(self._origin + delta, self._base_dtype),
            self._base.reshape(-1),
        )
        return Prediction(delta, bits.astype(self._base.dtype).reshape(self._base.shape))
