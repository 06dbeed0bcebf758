"""A block of a store, taken apart: each thing that the CPU or a device does with it, by itself."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.base_weights import open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY, BlockReader
from relex_stream.block_sweep import TILE_COLUMNS, sweep_outputs
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.dense import DenseBlock, Staging
from relex_stream.offload import Offload
from relex_stream.sketch import OVERSAMPLING, add_weighted_rows, cumulate_transposed
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.subspaces import Statistics, SubspaceOptions
from relex_stream.ulp import Bits, add_rounded

Float64 = NDArray[np.float64]

BASIS = OVERSAMPLING + 1
"""Columns of the basis at rank 1, the default."""


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
        if changes.tiled:
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
