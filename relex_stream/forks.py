"""Are a stored step and the base still the ones that are there? Seen from a few blocks.

A run that is taken up again from an earlier checkpoint writes other weights under the same numbers.
What comes after them does not follow from what is stored, so it must not be appended to it.
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from relex_stream.base_weights import BaseWeights, check_base_layout
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.matching import match_checkpoint
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import SourceCheckpoint
from relex_stream.store import Store
from relex_stream.store.records import Commit, StoredTensor
from relex_stream.ulp import Bits
from relex_stream.unpacking import unpack

_BLOCKS = 12
"""Blocks looked at. Some thousandths of the weights change from one checkpoint to the next, so that
one block of a million weights tells two runs apart; small ones may not."""


def is_stored(
    store: Store,
    checkpoint: SourceCheckpoint,
    reader: CheckpointReader,
    base: SourceCheckpoint,
    *,
    cast: bool,
) -> bool:
    """Say whether a checkpoint is the one that the store has of its step, as far as can be seen.

    Parameters
    ----------
    store : Store
    checkpoint : SourceCheckpoint
        Of a stored step.
    reader : CheckpointReader
    base : SourceCheckpoint
        Read only where the checkpoint holds no more than changes.
    cast : bool
        As in `match_checkpoint`.

    Raises
    ------
    TrajectoryError
        If it has other tensors.
    SourceError
        If it cannot be read.
    """
    tensors = store.manifest.tensors
    places = match_checkpoint(checkpoint, tensors, "", cast=cast)
    row = store.row_of(checkpoint.step)
    commit = store.commit(row)
    with unpack(store.path, [places], tensors, reader) as patches:
        source = SourceBlocks(reader, [places], patches)
        before = _Before(store, base, reader, row) if places.patch is not None else None
        return _are_stored(commit, tensors, source, before)


class _Before:
    """The bits of a store's blocks after its first `rows` steps."""

    def __init__(
        self, store: Store, base: SourceCheckpoint, reader: CheckpointReader, rows: int
    ) -> None:
        check_base_layout(store, base)
        weights = BaseWeights(store, base, reader)
        self._reader = BlockReader(store, weights, Workspace())
        self._rows = rows

    def bits(self, at: BlockOf) -> Bits:
        """Return those of a block; valid until the next."""
        bits = self._reader.base_bits(at)
        return bits if at.tensor.kind == "constant" else self._reader.bits_at(at, bits, self._rows)


def _are_stored(
    commit: Commit,
    tensors: tuple[StoredTensor, ...],
    source: SourceBlocks,
    before: _Before | None,
) -> bool:
    workspace = Workspace()
    for column in _telling(commit.changed):
        at = _block_at(tensors, column)
        bits = workspace.array("block", at.elements, np.dtype(f"u{at.tensor.itemsize}"))
        own = None if before is None else before.bits(at)
        source.read(at, 0, bits, workspace, at.tensor, own)
        if google_crc32c.value(bits.view(np.uint8)) != int(commit.source_crc[column]):
            return False
    return True


def refuse_other_base(store: Store, base: SourceCheckpoint, reader: CheckpointReader) -> None:
    """Refuse a base with the store's tensors and other weights, as far as can be seen.

    Parameters
    ----------
    store : Store
        With a step at least.
    base : SourceCheckpoint
        With the tensors of the store's base.
    reader : CheckpointReader

    Raises
    ------
    SourceError
        Naming a tensor that differs.
    """
    weights = BaseWeights(store, base, reader)
    workspace = Workspace()
    for column in _telling(store.commit(len(store.steps) - 1).changed):
        weights.read(_block_at(store.manifest.tensors, column), workspace)


def _telling(changed: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> list[int]:
    """Return columns of blocks that changed most at the step: most likely to differ in another."""
    most = np.argsort(changed, kind="stable")[::-1][:_BLOCKS]
    columns: list[int] = np.sort(most).tolist()
    return columns


def _block_at(tensors: tuple[StoredTensor, ...], column: int) -> BlockOf:
    """Return the block of a column of the per-block tables."""
    tensor = next(t for t in tensors if t.first_block <= column < t.first_block + t.blocks)
    return BlockOf(tensor, column - tensor.first_block)
