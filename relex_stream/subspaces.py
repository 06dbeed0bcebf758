"""The statistics passes: top left singular vectors of every tensor's weight deltas.

Tensors with a sketch take the randomized route, one pass over their blocks per power iteration;
the others, and all of them when asked, the exact route in one pass. Both are sums over blocks.
"""

from __future__ import annotations

import threading
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
from relex_stream.blocks import BlockOf, Blocks, Workspace, float_formats, work_on_strips
from relex_stream.graph import Fetcher, Group, grouped, map_in_threads, run_groups
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
from relex_stream.store import Store
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
    exact = [t for t in tensors if options.svd == "exact" or t.sketch_row < 0]
    randomized = [t for t in tensors if options.svd != "exact" and t.sketch_row >= 0]
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


class _BlockSums:
    """What one pass computes per block; safe to call from several threads."""

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        options: SubspaceOptions,
        entry_capacity: int,
        bases: dict[Hashable, Float64],
    ) -> None:
        self._store = store
        self._base = base
        self._rows = options.rows
        self._entry_capacity = entry_capacity
        self._weights = {key: cumulate_transposed(basis) for key, basis in bases.items()}
        self._local = threading.local()

    def run(self, tasks: Sequence[tuple[BlockOf, ...]]) -> list[Float64]:
        """Return each task's share of its tensor's ``D P`` (T, k), or of ``D D^T`` (T, T)."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        reader = BlockReader(self._store, self._base, workspace, self._entry_capacity)

        def shares(at: Blocks) -> list[Float64]:
            weights = self._weights.get(at.blocks[0].tensor.index)
            if weights is None:
                return self._grams(reader, at, workspace)
            return [self._products(reader, at, workspace, weights)]

        return [_added(parts) for parts in work_on_strips(tasks, self._kind_of, shares)]

    def _kind_of(self, at: BlockOf) -> Hashable:
        # A product is summed in the order of the tiles, which must not depend on what lies beside.
        return None if at.tensor.index in self._weights else float_formats(at)

    def _products(
        self, reader: BlockReader, at: Blocks, workspace: Workspace, weights: Float64
    ) -> Float64:
        total = np.zeros(weights.shape)
        changes = reader.change_rows(at, reader.base_bits(at), self._rows)
        # P = M^T Q = D^T (L^T Q). float32: an element's sum over steps carries a few 1e-7, which
        # average out over the block's elements in D P, taken in float64.
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
        totals = [np.zeros((self._rows, self._rows)) for _ in at.blocks]
        changes = reader.change_rows(at, reader.base_bits(at), self._rows)
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


def _block_groups(
    store: Store, base: BaseWeights, tensors: Sequence[StoredTensor], rows: int
) -> list[Group[tuple[BlockOf, ...]]]:
    totals = BlockTotals.of(store, rows)
    return grouped(
        (tensor.index, totals.changed_blocks(tensor), totals.work)
        for tensor in base.in_file_order(tensors)
    )


def fetching_first_blocks(
    store: Store, base: BaseWeights, rows: int
) -> AbstractContextManager[Any]:
    """Return a context in which the system is asked for what `solve_subspaces` will read first."""
    groups = _block_groups(store, base, changed_tensors(store, rows), rows)
    return Fetcher(groups, partial(fetch_blocks, store, base, rows))


def solve_subspaces(
    store: Store,
    base: BaseWeights,
    options: SubspaceOptions,
    *,
    entry_capacity: int,
    workers: int,
    progress: Progress,
) -> dict[str, Subspace]:
    """Return the top left singular vectors of every tensor that changed, by name.

    Parameters
    ----------
    store, base : Store, BaseWeights
    options : SubspaceOptions
    entry_capacity : int
        Changes of a block kept between sweeps.
    workers : int
    progress : Progress

    Notes
    -----
    The store and the base are read once per pass: once for the exact route, once per power
    iteration for the randomized one.
    """
    exact, randomized = split_routes(changed_tensors(store, options.rows), options)
    bases: dict[Hashable, Float64] = dict(
        map_in_threads(
            partial(_basis, options.rank), store.sketch_rows(randomized, options.rows), workers
        )
    )
    results: dict[Hashable, Subspace | Float64] = {}
    for iteration in range(options.power_iterations if randomized else min(1, len(exact))):
        tensors = randomized + (exact if iteration == 0 else [])
        groups = _block_groups(store, base, tensors, options.rows)
        finish = _Finish(bases, options.rank, last=iteration == options.power_iterations - 1)
        results |= run_groups(
            groups,
            _BlockSums(store, base, options, entry_capacity, bases).run,
            _added,
            finish,
            workers=workers,
            stage=f"statistics, pass {iteration + 1}",
            progress=progress,
            fetch=partial(fetch_blocks, store, base, options.rows),
        )
        bases = {index: basis for index, basis in results.items() if isinstance(basis, np.ndarray)}
    names = {tensor.index: tensor.name for tensor in store.manifest.tensors}
    return {
        names[index]: subspace
        for index, subspace in results.items()
        if isinstance(index, int) and isinstance(subspace, Subspace)
    }


def _basis(
    rank: int, stored: tuple[StoredTensor, NDArray[np.float16], NDArray[np.float32]]
) -> tuple[Hashable, Float64]:
    tensor, sketch, scale = stored
    return tensor.index, sketch_basis(unpack_sketch(sketch, scale), rank)


class _Finish:
    """Turns a tensor's sums into its subspace or, while passes are left, into the next basis."""

    def __init__(self, bases: dict[Hashable, Float64], rank: int, *, last: bool) -> None:
        self._bases = bases
        self._rank = rank
        self._last = last

    def __call__(self, index: Hashable, total: Float64) -> Subspace | Float64:
        basis = self._bases.get(index)
        if basis is None:
            return subspace_of_gram(total, self._rank)
        products = products_of_changes(total)
        if self._last:
            return subspace_of_products(basis, products, self._rank)
        return next_basis(products)
