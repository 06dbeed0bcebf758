"""Gram matrices of tensors: exact, by a pass over blocks, or estimated, from sketches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relex_stream.analysis import estimated_gram, replicated_grams
from relex_stream.base_weights import BaseWeights
from relex_stream.graph import Executor
from relex_stream.sketch import Subspace, cumulate, gram_of_deltas, unpack_sketch
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


def estimated_grams(store: Store, rows: int) -> Iterator[TensorGram]:
    """Yield the Gram matrices of tensors that have a sketch and changed; reads no weights."""
    sketches = SketchReader(store, rows)
    for tensor in changed_tensors(store, rows):
        if is_estimated(tensor, exact=False):
            sketch = cumulate(unpack_sketch(*sketches.read(tensor)))
            squares = store.delta_sq[:rows, tensor.index]
            yield TensorGram(
                tensor, estimated_gram(sketch, squares), replicated_grams(sketch, squares)
            )


def exact_grams(
    store: Store,
    base: BaseWeights,
    rows: int,
    *,
    every: bool,
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
    rows : int
        From the first.
    every : bool
        Of all tensors; else of those without a sketch.
    executor, workers, progress, entry_capacity
        As in `subspaces.solve_subspaces`.
    """
    options = SubspaceOptions(rows, 1, "exact", 1)
    totals = BlockTotals.of(store, rows)
    tensors = base.in_file_order(
        [each for each in changed_tensors(store, rows) if not is_estimated(each, exact=every)]
    )
    at_once = max(1, GRAMS_BYTES // (8 * rows * rows))
    for first in range(0, len(tensors), at_once):
        some = tensors[first : first + at_once]
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
