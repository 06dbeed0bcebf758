"""The statistics passes: top left singular vectors of every tensor's weight deltas.

Tensors with a sketch take the randomized route, one pass over their blocks per power iteration;
the others, and all of them when asked, the exact route in one pass. Both are sums over blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.blocks import BlockOf, Blocks, Workspace, work_on_strips
from relex_stream.graph import Executor, Fetcher, Group, Stage, grouped
from relex_stream.offload import Offload, kind_for
from relex_stream.sketch import (
    OVERSAMPLING,
    Subspace,
    add_gram,
    add_products,
    add_weighted_rows,
    cumulate_transposed,
    next_basis,
    products_of_changes,
    scatter_columns,
    sketch_basis,
    subspace_of_gram,
    subspace_of_products,
    unpack_sketch,
)
from relex_stream.specs import Progress
from relex_stream.store import SketchReader, Store
from relex_stream.store.records import StoredTensor
from relex_stream.sweep import TILE_COLUMNS, sweep_products

Float64 = NDArray[np.float64]

SVD_ROUTES = ("randomized", "exact")


@dataclass(frozen=True)
class SubspaceOptions:
    """What is asked of the statistics: how many rows and components, by which route."""

    rows: int
    rank: int
    svd: str
    power_iterations: int

    def is_exact(self, tensor: StoredTensor) -> bool:
        """Say whether a tensor takes the exact route."""
        return self.svd == "exact" or tensor.sketch_row < 0

    def passes(self, tensor: StoredTensor) -> int:
        """Return how often a tensor's blocks are gone through."""
        return 1 if self.is_exact(tensor) else self.power_iterations


def basis_columns(options: SubspaceOptions) -> int:
    """Return the columns of the randomized route's basis: rank + 7, at most the rows."""
    return min(options.rows, options.rank + OVERSAMPLING)


def changed_tensors(store: Store, rows: int) -> list[StoredTensor]:
    """Return the tensors that any of the first `rows` steps changed."""
    touched = np.asarray(store.changed[:rows].any(axis=0))
    return [
        tensor
        for tensor in store.manifest.tensors
        if tensor.kind == "tracked"
        and touched[tensor.first_block : tensor.first_block + tensor.blocks].any()
    ]


def split_routes(
    tensors: Sequence[StoredTensor], options: SubspaceOptions
) -> tuple[list[StoredTensor], list[StoredTensor]]:
    """Split tensors into those for the exact and those for the randomized route."""
    exact = [tensor for tensor in tensors if options.is_exact(tensor)]
    randomized = [tensor for tensor in tensors if not options.is_exact(tensor)]
    return exact, randomized


_CHANGE_WORK = 16
"""A change costs about as much as this many bytes of a block that are only read."""


@dataclass(frozen=True)
class BlockTotals:
    """What the first rows of a store hold, a number per block: lists, as blocks may be very many.

    Attributes
    ----------
    changes, frame_bytes : list of int
    """

    changes: list[int]
    frame_bytes: list[int]

    @classmethod
    def of(cls, store: Store, rows: int) -> BlockTotals:
        """Add up the first `rows` rows."""
        return cls(
            store.changed[:rows].sum(axis=0, dtype=np.int64).tolist(),
            store.frame_bytes[:rows].sum(axis=0, dtype=np.int64).tolist(),
        )

    def changed_blocks(self, tensor: StoredTensor) -> list[BlockOf]:
        """Return the blocks of a tensor that changed."""
        blocks = (BlockOf(tensor, block) for block in range(tensor.blocks))
        return [at for at in blocks if self.changes[at.column]]

    def work(self, at: BlockOf) -> int:
        """Return how much work a block is, in bytes: its weights, and its changes at their cost."""
        return at.elements * at.tensor.base_itemsize + _CHANGE_WORK * self.changes[at.column]


class Statistics(Stage[tuple[BlockOf, ...], "Float64 | Subspace", Float64]):
    """Passes over the blocks of tensors: from sketches, or from nothing, to subspaces.

    A group is a tensor. Its value is the basis of the next pass, and in the end the subspace; one
    that takes the exact route has none before that.
    """

    begins = True
    fetches = True

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        options: SubspaceOptions,
        entry_capacity: int,
        offload: Offload | None = None,
    ) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._options = options
        self._rows = options.rows
        self._entry_capacity = entry_capacity
        self._offload = offload
        self.device_share = offload.share if offload is not None else 0.0
        self._sketches = SketchReader(store, options.rows)

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._store, self._base, self._rows, tasks)

    def begin(self, groups: Sequence[Group[Any, Any]]) -> list[Float64 | Subspace | None]:
        """Return the basis that each tensor's sketch gives; None for the exact route."""
        tensors = self._store.manifest.tensors
        return [self._basis(tensors[group.key]) for group in groups]

    def _basis(self, tensor: StoredTensor) -> Float64 | None:
        if self._options.is_exact(tensor):
            return None
        return sketch_basis(unpack_sketch(*self._sketches.read(tensor)), self._options.rank)

    def combine(self, partials: list[Float64]) -> Float64:
        """Add up."""
        return _added(partials)

    def finish(
        self, key: Hashable, value: Float64 | Subspace | None, total: Float64, *, last: bool
    ) -> Float64 | Subspace:
        """Return the subspace or, while passes are left, the next basis."""
        if value is None:
            return subspace_of_gram(total, self._options.rank)
        assert isinstance(value, np.ndarray)
        products = products_of_changes(total)
        if last:
            return subspace_of_products(value, products, self._options.rank)
        return next_basis(products)

    def work(
        self,
        tasks: Sequence[tuple[BlockOf, ...]],
        values: Sequence[Float64 | Subspace | None],
    ) -> list[Float64]:
        """Return each task's share of its tensor's ``D P`` (T, k), or of ``D D^T`` (T, T)."""
        workspace = self.of_thread(Workspace)
        reader = BlockReader(self._store, self._base, workspace, self._entry_capacity)
        # P = M^T Q = D^T (L^T Q).
        weights = {
            task[0].tensor.index: cumulate_transposed(value)
            for task, value in zip(tasks, values, strict=True)
            if isinstance(value, np.ndarray)
        }

        def shares(at: Blocks) -> list[Float64]:
            of_tensor = weights.get(at.blocks[0].tensor.index)
            if of_tensor is None:
                return self._grams(reader, at, workspace)
            return [self._products(reader, at, workspace, of_tensor)]

        def kind_of(at: BlockOf) -> Hashable:
            # A product is summed in the order of the tiles, which must not depend on what lies
            # beside.
            return None if at.tensor.index in weights else kind_for(self._offload, at)

        return [_added(parts) for parts in work_on_strips(tasks, kind_of, shares)]

    def _products(
        self, reader: BlockReader, at: Blocks, workspace: Workspace, weights: Float64
    ) -> Float64:
        base_bits = reader.base_bits(at)
        if self._offload is not None:
            found = self._offload.products(reader, at, base_bits, self._rows, weights)
            if found is not None:
                return found
        total = np.zeros(weights.shape)
        changes = reader.change_rows(at, base_bits, self._rows)
        # P in float32: an element's sum over steps carries a few 1e-7, which average out over the
        # block's elements in D P, taken in float64.
        columns = min(TILE_COLUMNS, at.elements) if changes.fits else at.elements
        projected = workspace.array("projected", (columns, weights.shape[1]), np.float32)
        if changes.fits:
            sweep_products(changes.at_hand(), weights, projected, total)
            return total
        projected[:] = 0
        for batch in changes.batches():
            add_weighted_rows(batch, 0, weights, projected)
        for batch in changes.batches():
            add_products(batch, 0, projected, total)
        return total

    def _grams(self, reader: BlockReader, at: Blocks, workspace: Workspace) -> list[Float64]:
        if len(at.blocks) > 1 and reader.entries(at, self._rows) > self._entry_capacity:
            # Each tile would be a sweep of all; a block by itself is one of its own at most.
            return [gram for block in at.blocks for gram in self._grams(reader, block, workspace)]
        base_bits = reader.base_bits(at)
        if self._offload is not None:
            found = self._offload.gram(reader, at, base_bits, self._rows)
            if found is not None:
                return [found]
        totals = [np.zeros((self._rows, self._rows)) for _ in at.blocks]
        changes = reader.change_rows(at, base_bits, self._rows)
        # Needs all rows of a column at once: where they do not fit, each tile is a sweep.
        for tile in changes.tiles(planner.gram_columns(self._rows)):
            if changes.fits:
                for batch in tile.batches():
                    add_gram(batch, tile.first, tile.columns, totals[tile.block])
                continue
            dense = workspace.array("columns", (self._rows, tile.columns), np.float64)
            dense[:] = 0
            for batch in tile.batches():
                scatter_columns(batch, tile.first, dense)
            totals[tile.block] += dense @ dense.T
        return totals


def _added(parts: list[Float64]) -> Float64:
    if len(parts) == 1:
        return parts[0]
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def _groups_of_store(
    store: Store, base: BaseWeights, options: SubspaceOptions
) -> list[Group[tuple[BlockOf, ...], Float64 | Subspace]]:
    totals = BlockTotals.of(store, options.rows)
    return block_groups(base.in_file_order(changed_tensors(store, options.rows)), totals, options)


def block_groups(
    tensors: Sequence[StoredTensor], totals: BlockTotals, options: SubspaceOptions
) -> list[Group[tuple[BlockOf, ...], Float64 | Subspace]]:
    """Return the groups of the statistics of some tensors, in their order."""
    by_index = {tensor.index: tensor for tensor in tensors}

    def with_gram(at: BlockOf) -> int:
        # Small tensors are worked on together: as many as have room for their Gram matrices.
        return totals.work(at) + 8 * options.rows**2

    return grouped(
        (
            (
                tensor.index,
                totals.changed_blocks(tensor),
                with_gram if options.is_exact(tensor) else totals.work,
            )
            for tensor in tensors
        ),
        passes=lambda index: options.passes(by_index[index]),
    )


def fetching_first_blocks(
    store: Store, base: BaseWeights, options: SubspaceOptions
) -> AbstractContextManager[Any]:
    """Return a context in which the system is asked for what `solve_subspaces` will read first."""
    groups = _groups_of_store(store, base, options)
    return Fetcher(groups, partial(fetch_blocks, store, base, options.rows))


def solve_subspaces(
    store: Store,
    base: BaseWeights,
    options: SubspaceOptions,
    *,
    executor: Executor,
    workers: int,
    progress: Progress,
    entry_capacity: int,
    offload: Offload | None = None,
) -> dict[str, Subspace]:
    """Return the subspace of every tensor that changed in the first rows.

    Parameters
    ----------
    store : Store
    base : BaseWeights
    options : SubspaceOptions
    executor : Executor
    workers : int
        Of each process.
    progress : Progress
    entry_capacity : int
        Changes of a block kept between sweeps.
    offload : Offload, optional
        Devices that work on blocks instead of the CPU.

    Notes
    -----
    The store and the base are read once per pass: once for the exact route, once per power
    iteration for the randomized one.
    """
    results: dict[int, Subspace] = executor.run(
        Statistics(store, base, options, entry_capacity, offload),
        _groups_of_store(store, base, options),
        workers=workers,
        name="statistics",
        progress=progress,
    )
    tensors = store.manifest.tensors
    return {tensors[index].name: subspace for index, subspace in results.items()}
