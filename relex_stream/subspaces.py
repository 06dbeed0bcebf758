"""The statistics passes: top left singular vectors of the weight deltas of tensors, or groups.

Groups with a sketch take the randomized route, one pass over their blocks per power iteration;
the others, and all of them when asked, the exact route in one pass. Both are sums over blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.block_sweep import TILE_COLUMNS, sweep_products
from relex_stream.blocks import BlockOf, Blocks, Workspace, work_on_strips
from relex_stream.graph import Executor, Fetcher, Group, Stage, grouped
from relex_stream.grouping import Selection, group_name, run_blocks
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
    sketch_gram,
    subspace_of_gram,
    subspace_of_products,
    unpack_sketch,
)
from relex_stream.specs import Progress
from relex_stream.store import SketchReader, Store
from relex_stream.store.records import StoredTensor

Float64 = NDArray[np.float64]

SVD_ROUTES = ("randomized", "exact")


@dataclass(frozen=True)
class SubspaceOptions:
    """What is asked of the statistics: how many rows and components, by which route."""

    rows: int
    rank: int
    svd: str
    power_iterations: int
    group_by: str = "tensor"
    selection: Selection = field(default_factory=Selection)
    half_deltas: bool = False
    """Whether weight deltas are those of RELEX's scripts, taken in half precision."""

    def is_exact(self, group: SubspaceGroup) -> bool:
        """Say whether a group takes the exact route: a run has no sketch, its tensor has."""
        return self.svd == "exact" or self.group_by == "run" or not group.sketched

    def passes(self, group: SubspaceGroup) -> int:
        """Return how often a group's blocks are gone through."""
        return 1 if self.is_exact(group) else self.power_iterations


@dataclass(frozen=True)
class SubspaceGroup:
    """What has a subspace of its own.

    Attributes
    ----------
    name : str
        A tensor's, or that of `subspace_name`.
    tensors : tuple of StoredTensor
        Whose blocks they are.
    blocks : tuple of BlockOf
        Those that changed.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    blocks: tuple[BlockOf, ...]

    @property
    def sketched(self) -> tuple[int, ...]:
        """Indices of its tensors that have a sketch."""
        return tuple(tensor.index for tensor in self.tensors if tensor.sketch_row >= 0)


def subspace_name(at: BlockOf, group_by: str) -> str:
    """Return the name of the group that a block belongs to.

    Runs of a tensor that has several are named by their elements, as ``name[0:1048576]``.
    """
    tensor = at.tensor
    if group_by != "run":
        return group_name(tensor.name, group_by)
    blocks = run_blocks(tensor.block_elements)
    if tensor.blocks <= blocks:
        return tensor.name
    first = at.block - at.block % blocks
    start, _ = tensor.block_range(first)
    _, stop = tensor.block_range(min(first + blocks, tensor.blocks) - 1)
    return f"{tensor.name}[{start}:{stop}]"


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


def predicted_tensors(store: Store, options: SubspaceOptions) -> list[StoredTensor]:
    """Return the tensors with a subspace: those that changed, of the selection."""
    changed = changed_tensors(store, options.rows)
    return [tensor for tensor in changed if options.selection.takes(tensor.name)]


def subspace_groups(
    tensors: Sequence[StoredTensor], totals: BlockTotals, options: SubspaceOptions
) -> list[SubspaceGroup]:
    """Put the changed blocks of tensors into groups, in the order in which each begins."""
    members: dict[str, tuple[dict[int, StoredTensor], list[BlockOf]]] = {}
    for tensor in tensors:
        for at in totals.changed_blocks(tensor):
            name = subspace_name(at, options.group_by)
            those, blocks = members.setdefault(name, ({}, []))
            those[tensor.index] = tensor
            blocks.append(at)
    return [
        SubspaceGroup(name, tuple(those.values()), tuple(blocks))
        for name, (those, blocks) in members.items()
    ]


def split_routes(
    groups: Sequence[SubspaceGroup], options: SubspaceOptions
) -> tuple[list[SubspaceGroup], list[SubspaceGroup]]:
    """Split groups into those for the exact and those for the randomized route."""
    exact = [group for group in groups if options.is_exact(group)]
    randomized = [group for group in groups if not options.is_exact(group)]
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

    What a group is given are the tensors whose sketches give its first basis. Its value is the
    basis of the next pass, and in the end the subspace; one that takes the exact route is given
    nothing, and has no value before that.
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
        """Return the basis that each group's sketches give; None for the exact route."""
        return [self._basis(group.given) for group in groups]

    def _basis(self, sketched: tuple[int, ...] | None) -> Float64 | None:
        if sketched is None:
            return None
        tensors = self._store.manifest.tensors
        gram = np.zeros((self._rows, self._rows))
        for index in sketched:
            gram += sketch_gram(unpack_sketch(*self._sketches.read(tensors[index])))
        return sketch_basis(gram, self._options.rank)

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
        """Return each task's share of its group's ``D P`` (T, k), or of ``D D^T`` (T, T)."""
        workspace = self.of_thread(Workspace)
        reader = BlockReader(
            self._store,
            self._base,
            workspace,
            self._entry_capacity,
            half_deltas=self._options.half_deltas,
        )
        # P = M^T Q = D^T (L^T Q).
        weights: dict[int, Float64] = {}
        for task, value in zip(tasks, values, strict=True):
            if isinstance(value, np.ndarray):
                weights |= dict.fromkeys((at.column for at in task), cumulate_transposed(value))

        def shares(at: Blocks) -> list[Float64]:
            of_group = weights.get(at.blocks[0].column)
            if of_group is None:
                return self._grams(reader, at, workspace)
            return [self._products(reader, at, workspace, of_group)]

        def kind_of(at: BlockOf) -> Hashable:
            # A product is summed in the order of the tiles, which must not depend on what lies
            # beside.
            return None if at.column in weights else kind_for(self._offload, at)

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
        columns = min(TILE_COLUMNS, at.elements) if changes.tiled else at.elements
        projected = workspace.array("projected", (columns, weights.shape[1]), np.float32)
        if changes.tiled:
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


def groups_of_store(
    store: Store, base: BaseWeights, options: SubspaceOptions
) -> list[SubspaceGroup]:
    """Return the groups of a store, in the order in which the base's files have them."""
    tensors = base.in_file_order(predicted_tensors(store, options))
    return subspace_groups(tensors, BlockTotals.of(store, options.rows), options)


def block_groups(
    groups: Sequence[SubspaceGroup], totals: BlockTotals, options: SubspaceOptions
) -> list[Group[tuple[BlockOf, ...], Float64 | Subspace]]:
    """Return the same as groups of the stage; their keys are their numbers."""

    def with_gram(at: BlockOf) -> int:
        # Small tensors are worked on together: as many as have room for their Gram matrices.
        return totals.work(at) + 8 * options.rows**2

    exact = [options.is_exact(group) for group in groups]
    return grouped(
        (
            (number, group.blocks, with_gram if exact[number] else totals.work)
            for number, group in enumerate(groups)
        ),
        given=lambda number: None if exact[number] else groups[number].sketched,
        passes=lambda number: options.passes(groups[number]),
    )


def fetching_first_blocks(
    store: Store, base: BaseWeights, options: SubspaceOptions
) -> AbstractContextManager[Any]:
    """Return a context in which the system is asked for what `solve_subspaces` will read first."""
    totals = BlockTotals.of(store, options.rows)
    groups = block_groups(groups_of_store(store, base, options), totals, options)
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
    """Return the subspace of every group that changed in the first rows, by its name.

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
    groups = groups_of_store(store, base, options)
    results: dict[int, Subspace] = executor.run(
        Statistics(store, base, options, entry_capacity, offload),
        block_groups(groups, BlockTotals.of(store, options.rows), options),
        workers=workers,
        name="statistics",
        progress=progress,
    )
    return {groups[number].name: subspace for number, subspace in results.items()}
