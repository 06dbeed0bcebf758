"""Is a stored step still the one that the trainer's directory has? Seen from a few blocks.

A run that is taken up again from an earlier checkpoint writes other weights under the same numbers.
What comes after them does not follow from what is stored, so it must not be appended to it.
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from relex_stream.blocks import BlockOf, Workspace
from relex_stream.matching import match_checkpoint
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import SourceCheckpoint
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor

_BLOCKS = 12
"""Blocks looked at. Some thousandths of the weights change from one checkpoint to the next, so that
one block of a million weights tells two runs apart; small ones may not."""


def is_stored(
    store: Store, checkpoint: SourceCheckpoint, reader: CheckpointReader, *, cast: bool
) -> bool:
    """Say whether a checkpoint is the one that the store has of its step, as far as can be seen.

    Parameters
    ----------
    store : Store
    checkpoint : SourceCheckpoint
        Of a stored step.
    reader : CheckpointReader
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
    source = SourceBlocks(reader, [match_checkpoint(checkpoint, tensors, "", cast=cast)])
    commit = store.commit(store.row_of(checkpoint.step))
    workspace = Workspace()
    for column in _telling(commit.changed):
        at = _block_at(tensors, column)
        bits = workspace.array("block", at.elements, np.dtype(f"u{at.tensor.itemsize}"))
        source.read(at, 0, bits, workspace, at.tensor)
        if google_crc32c.value(bits.view(np.uint8)) != int(commit.source_crc[column]):
            return False
    return True


def _telling(changed: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> list[int]:
    """Return columns of blocks that changed most at the step: most likely to differ in another."""
    most = np.argsort(changed, kind="stable")[::-1][:_BLOCKS]
    columns: list[int] = np.sort(most).tolist()
    return columns


def _block_at(tensors: tuple[StoredTensor, ...], column: int) -> BlockOf:
    """Return the block of a column of the per-block tables."""
    tensor = next(t for t in tensors if t.first_block <= column < t.first_block + t.blocks)
    return BlockOf(tensor, column - tensor.first_block)
