"""One block at all its steps as a dense array on a torch device: its products, its outputs.

The counterpart of `block_sweep` for devices that would rather touch every element at every step
than look for those that changed. A block's changes are scattered into an array of (T, b) integers
of the weight's width; from there on everything is plain torch, in tiles of columns whose scratch is
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relex_stream.planner import (
    DEVICE_OUTPUT_COLUMNS,
    DEVICE_OUTPUT_ROWS,
    device_tile_columns,
)
from relex_stream.ulp import Bits, FloatFormat

Float64 = NDArray[np.float64]

_SIGNED = {2: torch.int16, 4: torch.int32}
"""Integers of a weight's width: torch can do little with unsigned ones."""

_ALIGNMENT = 64
"""Arrays that share a staging buffer begin at multiples of this many bytes."""

_SIGN = -(1 << 63)
_INFINITY = 0x7FF << 52
"""Bits of float64, as int64."""


class Staging:
    """Carries numpy arrays to a device and back through page-locked memory.

    A device copies from and to page-locked memory by itself, while the host goes on; making such
    memory takes milliseconds. So it is kept: two buffers that alternate on the way there, and one
    for the way back, all growing to the largest size asked for. For one thread at a time.

    Parameters
    ----------
    device : torch.device
        Devices other than CUDA take the same way through ordinary memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [_host_bytes(0, device) for _ in range(3)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Return one-dimensional arrays, on the device, as signed integers or floats.

        The arrays may be changed as soon as this returns; the copy may still be under way on the
        current stream, in whose order the tensors are to be used.
        """
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        buffer = self._buffer(self._turn, starts[-1])
        room = buffer.numpy()
        for start, array in zip(starts, arrays, strict=False):
            room[start : start + array.nbytes].view(array.dtype)[:] = array
        there = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)
        there.copy_(buffer, non_blocking=True)
        self._copied[self._turn] = _mark(self.device)
        return [
            there[start : start + array.nbytes].view(_torch_dtype(array.dtype))
            for start, array in zip(starts, arrays, strict=False)
        ]

    def fetch(self, tensor: Tensor, out: NDArray[Any]) -> None:
        """Copy a tensor of the device to `out`, of the same shape and width; waits for it."""
        tensor = tensor.contiguous()
        buffer = self._buffer(2, tensor.nbytes)
        buffer.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        copied = _mark(self.device)
        if copied is not None:
            copied.synchronize()
        np.copyto(out, buffer.numpy().view(out.dtype).reshape(out.shape))

    def _buffer(self, number: int, size: int) -> Tensor:
        if self._buffers[number].numel() < size:
            # Let go first: the larger one may be made of the same pages.
            self._buffers[number] = _host_bytes(0, self.device)
            self._buffers[number] = _host_bytes(size, self.device)
        return self._buffers[number][:size]


def _host_bytes(size: int, device: torch.device) -> Tensor:
    """Return memory of the host that a device can copy from and to by itself."""
    # The host by name: a program may have set another default.
    pinned = size > 0 and device.type == "cuda"
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that tells when all that was asked of the current stream is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    if dtype.kind == "f":
        return torch.float64
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


class DenseBlock:
    """A block, or some columns of one, at all its steps.

    Parameters
    ----------
    origin : ndarray of uint16 or uint32, shape (b,)
        Bit patterns at the base, in the checkpoints' dtype.
    rows : int
        Steps, T.
    fmt : FloatFormat
        The checkpoints' format.
    device : torch.device
    first : int
        Element of the block that `origin` begins with.
    staging : Staging, optional
        Kept buffers for this device; its own if not given.

    Notes
    -----
    `planner.device_block_bytes` lists what this holds on the device. All of it is on the current
    stream; what a method returns is there when it returns.

    Products are added tile by tile, from left to right, to what the columns left of them gave.
    Tiles do not depend on where a block is cut, so that the two parts of a block that is cut
    between two tiles give the bits of the whole.
    """

    def __init__(
        self,
        origin: Bits,
        rows: int,
        fmt: FloatFormat,
        device: torch.device,
        *,
        first: int = 0,
        staging: Staging | None = None,
    ) -> None:
        self._rows = rows
        self._format = fmt
        self._first = first
        self._columns = origin.size
        self._staging = staging or Staging(device)
        self._device = device
        (self._origin,) = self._staging.send(origin)
        # The difference from the step before, of ordered patterns: what a frame has, its zigzag
        # undone. 0 where nothing changed.
        self._differences = torch.zeros(
            (rows, self._columns), dtype=_SIGNED[fmt.itemsize], device=device
        )

    def put(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        positions: NDArray[np.uint32],
        zigzags: Bits,
    ) -> None:
        """Add the changes of some rows, one row behind the other; those of other columns are left.

        Parameters
        ----------
        rows, counts : sequence of int
            Row numbers (0 is the first step), each only once in a block's life, and how many
            changes each has.
        positions, zigzags : ndarray
            As in `codec.Changes`: the first ``sum(counts)`` count, and ascend within a row.
        """
        ends = np.cumsum(np.array(counts, np.int64))
        total = int(ends[-1]) if len(ends) else 0
        positions, zigzags = positions[:total], zigzags[:total]
        cuts = self._cuts(ends - np.array(counts, np.int64), ends, positions)
        if cuts is not None:
            counts = [stop - start for start, stop in cuts]
            positions = np.concatenate([positions[start:stop] for start, stop in cuts])
            zigzags = np.concatenate([zigzags[start:stop] for start, stop in cuts])
        if not positions.size:
            return
        places, codes, offsets, repeats = self._staging.send(
            positions, zigzags, np.array(rows, np.int64) * self._columns, np.array(counts, np.int64)
        )
        index = places.to(torch.int64)
        del places
        # Positions are unsigned: what looks negative is beyond 2^31.
        index.bitwise_and_(0xFFFFFFFF).sub_(self._first)
        index += torch.repeat_interleave(offsets, repeats, output_size=index.numel())
        wide = codes.to(torch.int64).bitwise_and_((1 << 8 * self._format.itemsize) - 1)
        odd = wide.bitwise_and(1).neg_()
        wide = wide.bitwise_right_shift_(1).bitwise_xor_(odd)
        del odd
        # No index comes twice: a row has an element once. So the order of writing does not matter.
        self._differences.view(-1).index_put_((index,), wide.to(self._differences.dtype))

    def _cuts(
        self,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        positions: NDArray[np.uint32],
    ) -> list[tuple[int, int]] | None:
        """Return where each row's changes inside these columns lie; None if all are inside."""
        some = ends > starts
        lowest, highest = positions[starts[some]], positions[ends[some] - 1]
        low, high = self._first, self._first + self._columns
        if lowest.min(initial=low) >= low and highest.max(initial=low) < high:
            return None
        return [
            (
                start + int(np.searchsorted(positions[start:end], low)),
                start + int(np.searchsorted(positions[start:end], high)),
            )
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def products(self, coefficients: Float64, total: Float64 | None = None) -> Float64:
        """Return ``D (D^T C)``.

        Parameters
        ----------
        coefficients : ndarray of float64, shape (T, k)
            C.
        total : ndarray of float64, shape (T, k), optional
            What the columns left of these gave, to add to.

        Returns
        -------
        ndarray of float64, shape (T, k)
            Squared weight units times those of C.
        """
        weights = self._send_matrix(coefficients)
        out = self._start(coefficients.shape, total)
        for tile in self._tiles(device_tile_columns(self._rows)):
            changes = self._all_changes(tile)
            out += _product(changes, _product(changes.T, weights))
            # Not beside the next tile's.
            del changes
        return self._fetch_matrix(out)

    def gram(self, total: Float64 | None = None) -> Float64:
        """Return ``D D^T``.

        Parameters
        ----------
        total : ndarray of float64, shape (T, T), optional
            What the columns left of these gave, to add to.

        Returns
        -------
        ndarray of float64, shape (T, T)
            Both triangles, equal but for rounding.
        """
        out = self._start((self._rows, self._rows), total)
        for tile in self._tiles(device_tile_columns(self._rows)):
            changes = self._all_changes(tile)
            out += _product(changes, changes.T)
            del changes
        return self._fetch_matrix(out)

    def outputs(self, weights: Float64, base: Bits, base_format: FloatFormat, out: Bits) -> int:
        """Write ``base + D^T W``, rounded once, for each column of W: the bits of `sweep_outputs`.

        Parameters
        ----------
        weights : ndarray of float64, shape (T, o)
            W; finite.
        base : ndarray of base_format.bits_dtype, shape (b,)
            Bit patterns in the base's own dtype.
        base_format : FloatFormat
        out : ndarray, dtype of `base`, shape (o, >= b)
            Out.

        Returns
        -------
        int
            How many results overflowed to infinity.

        Notes
        -----
        The same additions in the same order as on the CPU, whatever the device: a matrix product
        would leave both to a library. Elements that a row leaves alone add ``0 * w`` here and
        nothing there; neither changes a sum that began with +0, which never becomes -0. Products
        and sums are separate operations because a fused one rounds once instead of twice.
        """
        if not weights.shape[1]:
            return 0
        scales = self._send_matrix(weights)
        (bits,) = self._staging.send(base)
        overflowed = torch.zeros((), dtype=torch.int64, device=self._device)
        for tile in self._tiles(DEVICE_OUTPUT_COLUMNS):
            overflowed += self._round_tile(tile, scales, bits[tile], base_format, out[:, tile])
        return int(overflowed.item())

    def _round_tile(
        self, tile: slice, scales: Tensor, bits: Tensor, fmt: FloatFormat, out: Bits
    ) -> Tensor:
        """Write the outputs of some columns; return how many overflowed, a number on the device."""
        sums = self._weighted(tile, scales)
        before = bits.to(torch.int64)
        after = torch.empty(sums.shape, dtype=bits.dtype, device=self._device)
        overflowed = torch.zeros((), dtype=torch.int64, device=self._device)
        for output, total in enumerate(sums):
            rounded = _rounded(_numbers_(_ordered(before, fmt), fmt).add_(total), fmt)
            # A base's value that nothing is added to is finite: those that are not count as 0.
            overflowed += _exponent_full(rounded, fmt).sum()
            # What adds up to nothing keeps its exact bits (a negative zero, a NaN's payload).
            after[output] = torch.where(total != 0.0, rounded, before)
            del rounded
        self._staging.fetch(after, out)
        return overflowed

    def _weighted(self, tile: slice, scales: Tensor) -> Tensor:
        """Return ``(D^T W)^T`` of some columns, (o, columns), some rows at a time."""
        state = self._ordered_origin(tile)
        shape = (scales.shape[1], state.numel())
        sums = torch.zeros(shape, dtype=torch.float64, device=self._device)
        term = torch.empty_like(sums)
        for first in range(0, self._rows, DEVICE_OUTPUT_ROWS):
            stop = min(self._rows, first + DEVICE_OUTPUT_ROWS)
            changes, state = self._changes(first, stop, tile, state)
            for row in range(stop - first):
                torch.mul(changes[row], scales[first + row, :, None], out=term)
                sums += term
            del changes
        return sums

    def _tiles(self, columns: int) -> Iterator[slice]:
        for first in range(0, self._columns, columns):
            yield slice(first, min(self._columns, first + columns))

    def _ordered_origin(self, tile: slice) -> Tensor:
        """Return the ordered patterns of some columns before the first row, int64."""
        return _ordered(self._origin[tile].to(torch.int64), self._format)

    def _all_changes(self, tile: slice) -> Tensor:
        """Return all rows of D of some columns."""
        return self._changes(0, self._rows, tile, self._ordered_origin(tile))[0]

    def _changes(self, first: int, stop: int, tile: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows of D, and the ordered patterns after them.

        Parameters
        ----------
        state : Tensor of int64, shape (columns,)
            Ordered patterns before row `first`.

        Returns
        -------
        changes : Tensor of float64, shape (stop - first, columns)
        state : Tensor of int64, shape (columns,)
        """
        steps = torch.empty(
            (stop - first + 1, state.numel()), dtype=torch.int64, device=self._device
        )
        steps[0] = state
        steps[1:] = self._differences[first:stop, tile]
        # In 64 bits the sum cannot overflow. Patterns wrap in their own width: shifts repeat the
        # top bit that is left.
        steps.cumsum_(0)
        spare = 64 - 8 * self._format.itemsize
        steps.bitwise_left_shift_(spare).bitwise_right_shift_(spare)
        state = steps[-1].clone()
        values = _numbers_(steps, self._format)
        return values[1:] - values[:-1], state

    def _send_matrix(self, matrix: Float64) -> Tensor:
        (sent,) = self._staging.send(np.ascontiguousarray(matrix, np.float64).reshape(-1))
        return sent.view(matrix.shape)

    def _start(self, shape: tuple[int, ...], total: Float64 | None) -> Tensor:
        if total is None:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)
        return self._send_matrix(total)

    def _fetch_matrix(self, matrix: Tensor) -> Float64:
        out = np.empty(tuple(matrix.shape))
        self._staging.fetch(matrix, out)
        return out


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices, in float64 or not at all: see the module's docstring."""
    assert left.dtype == right.dtype == torch.float64
    return left @ right


def _ordered(patterns: Tensor, fmt: FloatFormat) -> Tensor:
    """Map patterns, int64 with the sign repeated upwards, to ordered ones, as `ulp.ordered`."""
    below_sign = (1 << 8 * fmt.itemsize - 1) - 1
    return patterns.bitwise_right_shift(63).bitwise_and_(below_sign).bitwise_xor_(patterns)


def _numbers_(ordered: Tensor, fmt: FloatFormat) -> Tensor:
    """Turn ordered patterns into their values in place, as `ulp.numbers`; return the float64s."""
    sign = ordered.bitwise_right_shift(63)
    # Ordered patterns below 0 are those of the magnitude with all bits turned.
    magnitude = ordered.bitwise_xor_(sign)
    not_finite = magnitude >= (2 * fmt.bias + 1) << fmt.mantissa
    # The exponent and mantissa in a float64's place, then the bias put right by an exact
    # multiplication; subnormals come out exact too.
    magnitude.bitwise_left_shift_(52 - fmt.mantissa).bitwise_or_(sign.bitwise_and_(_SIGN))
    del sign
    values = magnitude.view(torch.float64).mul_(2.0 ** (1023 - fmt.bias))
    return values.masked_fill_(not_finite, 0.0)


def _rounded(values: Tensor, fmt: FloatFormat) -> Tensor:
    """Round float64 to a format once, to nearest even; return patterns as `_ordered` takes them.

    `ulp._round_one` on whole tensors. torch's own conversion to 16-bit formats goes through
    float32, so it rounds twice.
    """
    wide = values.view(torch.int64)
    sign = wide.bitwise_right_shift(63)
    # NaNs become the first above infinity, lest the sum below leave 64 bits.
    magnitude = wide.bitwise_and(~_SIGN).clamp_(max=_INFINITY + 1)
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    drop = 52 - fmt.mantissa
    rounded = magnitude.bitwise_right_shift(drop).bitwise_and_(1)
    rounded.add_(magnitude).add_((1 << drop - 1) - 1).bitwise_right_shift_(drop)
    rounded.sub_((1023 - fmt.bias) << fmt.mantissa).clamp_(max=infinity)
    # Subnormal in the target: a whole number of its smallest steps. The sum with 2^52 has no room
    # for halves, so the addition itself rounds, to even, and its low bits are that number.
    steps = values.abs().mul_(2.0 ** (fmt.bias - 1 + fmt.mantissa)).add_(2.0**52)
    steps = steps.view(torch.int64).bitwise_and_((1 << 52) - 1)
    rounded = torch.where(magnitude < (1024 - fmt.bias) << 52, steps, rounded)
    rounded.masked_fill_(magnitude > _INFINITY, infinity | 1 << fmt.mantissa - 1)
    # The sign's bit counts negative in two's complement.
    return rounded.add_(sign.bitwise_left_shift_(8 * fmt.itemsize - 1))


def _exponent_full(patterns: Tensor, fmt: FloatFormat) -> Tensor:
    """Say which patterns are not finite."""
    full = (2 * fmt.bias + 1) << fmt.mantissa
    return patterns.bitwise_and(full) == full
