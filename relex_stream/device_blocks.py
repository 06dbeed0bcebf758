"""Blocks of a store on borrowed devices: products, Gram matrices and outputs.

What `block_sweep` and `sketch` compute on the CPU from a block's changes, for the blocks where a
device may pay. Outputs have the same bits as there; products and Gram matrices differ by rounding.

This module imports torch: import it once there is a device to use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf, Blocks
from relex_stream.dense import DenseBlock, Staging
from relex_stream.devices import DevicePool, Loan
from relex_stream.errors import warn_from_task
from relex_stream.ulp import Bits

Float64 = NDArray[np.float64]

Result = TypeVar("Result")

MIN_ELEMENTS = planner.DEVICE_MIN_ELEMENTS


class DeviceBlocks:
    """Works on blocks on the devices of a pool; safe to call from several threads.

    Each method returns None where the device's memory did not hold even half of the block: then
    the CPU is to do it, and a warning said so, once per device.

    Parameters
    ----------
    pool : DevicePool
    """

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._staging: dict[tuple[int, int], Staging] = {}
        self._lock = threading.Lock()
        self._warned: set[int] = set()

    @staticmethod
    def takes(at: Blocks) -> bool:
        """Say whether devices work on a block.

        That depends on the block alone, never on which device is free: a product's rounding must
        not.
        """
        return isinstance(at, BlockOf) and at.elements >= MIN_ELEMENTS

    def products(
        self, reader: BlockReader, at: BlockOf, base_bits: Bits, rows: int, coefficients: Float64
    ) -> Float64 | None:
        """Return ``D (D^T C)`` of a block.

        Parameters
        ----------
        reader : BlockReader
            The calling thread's own.
        at : BlockOf
        base_bits : ndarray of uint16 or uint32, shape (b,)
            The base's patterns, in its own dtype.
        rows : int
            How many rows of D, T.
        coefficients : ndarray of float64, shape (T, k)
            C.

        Returns
        -------
        ndarray of float64, shape (T, k), or None

        Raises
        ------
        CorruptionError
            If a frame is not what was committed.
        """

        def work(loan: Loan, cuts: Sequence[slice]) -> Float64:
            total = np.zeros(coefficients.shape)
            for cut in cuts:
                total = self._load(reader, at, base_bits, rows, loan, cut).products(
                    coefficients, total
                )
            return total

        return self._on_device(at, planner.device_tile_columns(rows), work)

    def gram(self, reader: BlockReader, at: BlockOf, base_bits: Bits, rows: int) -> Float64 | None:
        """Return ``D D^T`` of a block, float64, shape (T, T), or None; else as `products`."""

        def work(loan: Loan, cuts: Sequence[slice]) -> Float64:
            total = np.zeros((rows, rows))
            for cut in cuts:
                total = self._load(reader, at, base_bits, rows, loan, cut).gram(total)
            return total

        return self._on_device(at, planner.device_tile_columns(rows), work)

    def outputs(
        self,
        reader: BlockReader,
        at: BlockOf,
        base_bits: Bits,
        rows: int,
        weights: Float64,
        out: Bits,
    ) -> int | None:
        """Write ``base + D^T W`` of a block, rounded once; return how many values overflowed.

        Parameters
        ----------
        weights : ndarray of float64, shape (T, o)
            W.
        out : ndarray, dtype of `base_bits`, shape (o, >= b)
            Out; holds anything where None is returned.

        Notes
        -----
        The bits that `sweep.sweep_outputs` writes. Else as `products`.
        """

        def work(loan: Loan, cuts: Sequence[slice]) -> int:
            return sum(
                self._load(reader, at, base_bits, rows, loan, cut).outputs(
                    weights, base_bits[cut], at.base_format, out[:, cut]
                )
                for cut in cuts
            )

        return self._on_device(at, planner.device_tile_columns(rows), work)

    def _load(
        self,
        reader: BlockReader,
        at: BlockOf,
        base_bits: Bits,
        rows: int,
        loan: Loan,
        cut: slice,
    ) -> DenseBlock:
        """Bring some columns of a block to a device, a run of frames at a time."""
        origin = base_bits
        if at.format != at.base_format:
            origin = reader.start_state(at, base_bits)
        staging = self._staging_of(loan)
        block = DenseBlock(
            origin[cut], rows, at.format, staging.device, first=cut.start, staging=staging
        )
        for run, changes in reader.decoded(at, rows):
            block.put(run.rows, run.counts, changes.positions, changes.zigzags)
        return block

    def _staging_of(self, loan: Loan) -> Staging:
        # Kept per slot, which is one thread's at a time: locking memory takes milliseconds.
        key = loan.number, loan.slot
        if key not in self._staging:
            self._staging[key] = Staging(torch.device(loan.device.torch_device))
        return self._staging[key]

    def _on_device(
        self, at: BlockOf, tile: int, work: Callable[[Loan, Sequence[slice]], Result]
    ) -> Result | None:
        """Do the work on a whole block, or where memory runs out in two cuts, or not at all."""
        half = at.elements // 2
        # Between two tiles: see `DenseBlock`.
        middle = -(-half // tile) * tile if at.elements > tile else half
        whole = [slice(0, at.elements)]
        halves = [slice(0, middle), slice(middle, at.elements)]
        with self._pool.borrow() as loan:
            for cuts in (whole, halves):
                try:
                    return self._pool.on_its_thread(loan, partial(work, loan, cuts))
                except RuntimeError as error:
                    if not _is_out_of_memory(error):
                        raise
                # Not while the exception is handled: it holds the frames whose tensors are to go.
                if loan.device.torch_device.startswith("cuda"):
                    torch.cuda.empty_cache()
        self._warn(loan, at)
        return None

    def _warn(self, loan: Loan, at: BlockOf) -> None:
        with self._lock:
            if loan.number in self._warned:
                return
            self._warned.add(loan.number)
        warn_from_task(
            f"{loan.device.name} has no memory for half of a block of {at.elements} weights "
            f"(tensor {at.tensor.name}); the CPU works on such blocks, more slowly"
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a device has no memory: torch's own class, or what CUDA and cuBLAS say.

    Page-locked memory, and what cuBLAS wants to begin with, fail with a text only.
    """
    texts = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )
