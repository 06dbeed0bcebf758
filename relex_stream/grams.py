"""Gram matrices of tensors: exact, by a pass over blocks, or estimated, from sketches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.analysis import REPLICATES, estimated_gram, replicated_grams
from relex_stream.base_weights import BaseWeights, open_base, transfer_bytes
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.blocks import float_pairs, model_shape
from relex_stream.errors import OptionError, RelexStreamWarning, SourceError
from relex_stream.graph import Executor, Threads
from relex_stream.locations import Location
from relex_stream.sketch import Subspace, cumulate, gram_of_deltas, unpack_sketch
from relex_stream.sources import CheckpointReader
from relex_stream.specs import Progress
from relex_stream.store import SketchReader, Store
from relex_stream.store.records import StoredTensor
from relex_stream.subspaces import (
    BlockTotals,
    Statistics,
    SubspaceOptions,
    block_groups,
    changed_tensors,
    subspace_groups,
)
from relex_stream.summaries import Plan, StagePlan
from relex_stream.warmup import warm_up_extrapolation

Float64 = NDArray[np.float64]

GRAMS_BYTES = 64 << 20
"""Gram matrices of so many tensors are made at a time, of one at least."""


@dataclass(frozen=True)
class TensorGram:
    """The Gram matrix of a tensor's weight deltas.

    Attributes
    ----------
    tensor : StoredTensor
    gram : ndarray of float64, shape (T, T)
    replicates : ndarray of float64, shape (groups, T, T), optional
        Of an estimate: as `analysis.replicated_grams`. None for one that is exact.
    """

    tensor: StoredTensor
    gram: Float64
    replicates: Float64 | None = None


class GramPass(Statistics):
    """A pass over blocks that ends in whole Gram matrices."""

    def finish(
        self, key: Hashable, value: Float64 | Subspace | None, total: Float64, *, last: bool
    ) -> Float64:
        """Return ``M M^T``."""
        return gram_of_deltas(total)


def is_estimated(tensor: StoredTensor, *, exact: bool) -> bool:
    """Say whether a tensor's Gram matrix comes from its sketch."""
    return tensor.sketch_row >= 0 and not exact


def estimated_grams(
    store: Store, tensors: Sequence[StoredTensor], rows: int, *, errors: bool
) -> Iterator[TensorGram]:
    """Yield the Gram matrices of tensors that have a sketch, with replicates if errors are wanted.

    Reads no weights.
    """
    sketches = SketchReader(store, rows)
    for tensor in tensors:
        if is_estimated(tensor, exact=False):
            sketch = cumulate(unpack_sketch(*sketches.read(tensor)))
            squares = store.delta_sq[:rows, tensor.index]
            replicates = replicated_grams(sketch, squares) if errors else None
            yield TensorGram(tensor, estimated_gram(sketch, squares), replicates)


def exact_grams(
    store: Store,
    base: BaseWeights,
    tensors: Sequence[StoredTensor],
    rows: int,
    *,
    executor: Executor,
    workers: int,
    progress: Progress,
    entry_capacity: int,
) -> Iterator[TensorGram]:
    """Yield the Gram matrices of tensors that changed, from their blocks.

    Parameters
    ----------
    store : Store
    base : BaseWeights
    tensors : sequence of StoredTensor
    rows : int
        From the first.
    executor, workers, progress, entry_capacity
        As in `subspaces.solve_subspaces`.
    """
    options = SubspaceOptions(rows, 1, "exact", 1)
    totals = BlockTotals.of(store, rows)
    at_once = max(1, GRAMS_BYTES // (8 * rows * rows))
    in_order = base.in_file_order(tensors)
    for first in range(0, len(in_order), at_once):
        some = in_order[first : first + at_once]
        groups = subspace_groups(some, totals, options)
        found: dict[int, Float64] = executor.run(
            GramPass(store, base, options, entry_capacity),
            block_groups(groups, totals, options),
            workers=workers,
            name="Gram matrices",
            progress=progress,
        )
        for number, group in enumerate(groups):
            yield TensorGram(group.tensors[0], found[number])


@dataclass
class GramSum:
    """The sum of some tensors' Gram matrices.

    Attributes
    ----------
    with_errors : bool
        Whether replicates are summed too.
    """

    with_errors: bool
    tensors: int = 0
    weights: int = 0
    gram: Float64 = field(default_factory=lambda: np.zeros((0, 0)))
    replicates: Float64 | None = None

    def add(self, found: TensorGram) -> None:
        """Take a tensor in."""
        if not self.tensors:
            self.gram = np.zeros_like(found.gram)
        self.tensors += 1
        self.weights += found.tensor.elements
        if self.with_errors:
            if self.replicates is None and found.replicates is not None:
                # So far all were exact: the same in every replicate.
                self.replicates = np.repeat(self.gram[None], REPLICATES, axis=0)
            if self.replicates is not None:
                self.replicates += found.gram if found.replicates is None else found.replicates
        self.gram += found.gram


class GramReader:
    """Reads the Gram matrices of all tensors that changed, and knows what that takes.

    Parameters
    ----------
    store : Store
    exact : bool
        From the weights; else from sketches, but for tensors that have none.
    base : Path or Url, optional
        As in `api.analyze`.
    executor : Threads
    progress : Progress
    rows : int, optional
        Of the store, from the first; default all.
    takes : callable, optional
        Says of a tensor whether it counts; default all do.
    errors : bool
        Whether replicates of estimates are wanted.

    Attributes
    ----------
    left_out : tuple of str
        Tensors without a sketch, where there is no base to look them up.
    """

    def __init__(
        self,
        store: Store,
        *,
        exact: bool,
        base: Location | None,
        executor: Threads,
        progress: Progress,
        rows: int | None = None,
        takes: Callable[[StoredTensor], bool] = lambda _: True,
        errors: bool = True,
    ) -> None:
        self._store = store
        self._exact = exact
        self._base = base
        self._executor = executor
        self._progress = progress
        self._rows = len(store.steps) if rows is None else rows
        self._errors = errors
        self.left_out: tuple[str, ...] = ()
        changed = [each for each in changed_tensors(store, self._rows) if takes(each)]
        self._estimated = [each for each in changed if is_estimated(each, exact=exact)]
        self._looked_up = [each for each in changed if not is_estimated(each, exact=exact)]

    def plan(self, *, groups: int) -> Plan:
        """Project the memory, with room for the sums of so many groups.

        Raises
        ------
        MemoryLimitError
            If it does not fit.
        """
        store, rows = self._store, self._rows
        pairs = float_pairs(store.manifest.tensors)
        warm_up = warm_up_extrapolation if self._looked_up else _nothing
        capacity = self._executor.prepare(warm_up, pairs, self._progress)
        shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
        read_bytes = sum(
            tensor.elements * tensor.base_itemsize
            + int(store.frame_bytes[:rows, _columns(tensor)].sum(dtype=np.int64))
            for tensor in self._looked_up
        )
        worker_bytes = 0
        if self._looked_up:
            worker_bytes = planner.gram_worker_bytes(shape, DEFAULT_ENTRY_CAPACITY, rows)
        gram = 8 * rows * rows
        # Those of groups; a tensor's own, its replicates and what they are made in; a batch.
        shared = planner.tables_bytes(shape, rows) + gram * (groups + 3 * REPLICATES)
        shared += max(min(GRAMS_BYTES, len(self._looked_up) * gram), gram)
        shared += transfer_bytes(store, self._base)
        stage = StagePlan("Gram matrices", shape.blocks, read_bytes, 0, worker_bytes)
        return planner.make_plan([stage], capacity, shared_bytes=shared)

    def grams(self, workers: int) -> Iterator[TensorGram]:
        """Yield the Gram matrix of every tensor that changed."""
        yield from estimated_grams(self._store, self._estimated, self._rows, errors=self._errors)
        if not self._looked_up:
            return
        with CheckpointReader() as reader:
            try:
                weights = open_base(self._store, self._base, reader)
            except SourceError as error:
                if self._exact or self._base is not None:
                    raise
                self._leave_out(error)
                return
            yield from exact_grams(
                self._store,
                weights,
                self._looked_up,
                self._rows,
                executor=self._executor,
                workers=workers,
                progress=self._progress,
                entry_capacity=DEFAULT_ENTRY_CAPACITY,
            )

    def refuse_nothing(self, verb: str) -> NoReturn:
        """Say why there was no tensor.

        Raises
        ------
        OptionError
        """
        if self.left_out:
            raise OptionError(
                f"all {len(self.left_out)} tensors of {self._store.path} that changed are small, "
                f"and to {verb} them takes the base: say with --base where it is"
            )
        raise OptionError(
            f"no step of {self._store.path} changed any weight; there is nothing to {verb}"
        )

    def _leave_out(self, error: SourceError) -> None:
        self.left_out = tuple(tensor.name for tensor in self._looked_up)
        warnings.warn(
            f"{len(self.left_out)} small tensors, which have no sketch, are left out: {error}",
            RelexStreamWarning,
            stacklevel=2,
        )


def _nothing(_pairs: object, _progress: Progress) -> None:
    """Prepare no kernels: none are needed."""


def _columns(tensor: StoredTensor) -> slice:
    return slice(tensor.first_block, tensor.first_block + tensor.blocks)
