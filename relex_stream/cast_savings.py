"""What F32 checkpoints cost against BF16 ones, from a few blocks of two neighbouring steps.

The rounding to BF16 is what makes changes sparse: most weights move by less than half a BF16 step.
Who stores F32 should know what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relex_stream.blocks import BlockOf, Workspace, frame_tools
from relex_stream.matching import CheckpointPlaces
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.summaries import CastSavings
from relex_stream.ulp import Bits, narrow

_BLOCKS = 24
"""Blocks looked at, evenly spread."""


def cast_savings(
    store: Store, places: Sequence[CheckpointPlaces], reader: CheckpointReader
) -> CastSavings | None:
    """Estimate what a step would take in BF16, from the last two checkpoints that were added.

    Parameters
    ----------
    store : Store
        With these steps.
    places : sequence of CheckpointPlaces
        In the order of their steps.
    reader : CheckpointReader

    Returns
    -------
    CastSavings or None
        None where nothing would be cast, or there are no two that are whole.
    """
    blocks = [
        BlockOf(tensor, block)
        for tensor in store.manifest.tensors
        if (tensor.base_dtype.code, tensor.dtype.code) == ("BF16", "F32")
        for block in range(tensor.blocks)
    ]
    if len(places) < 2 or not blocks or any(place.patch is not None for place in places[-2:]):
        return None
    chosen = [
        blocks[i] for i in np.linspace(0, len(blocks) - 1, min(_BLOCKS, len(blocks))).astype(int)
    ]
    source, workspace = SourceBlocks(reader, places[-2:]), Workspace()
    sampled = sum(_bf16_frame_bytes(at, source, workspace) for at in chosen)
    share = sum(at.elements for at in blocks) / sum(at.elements for at in chosen)
    frame_bytes = store.frame_bytes[store.row_of(places[-1].step)]
    return CastSavings(
        f32_step_bytes=int(sum(int(frame_bytes[at.column]) for at in blocks)),
        bf16_step_bytes=round(share * sampled),
    )


def _bf16_frame_bytes(at: BlockOf, source: SourceBlocks, workspace: Workspace) -> int:
    codec, changes = frame_tools(workspace, at.tensor.block_elements, at.base_format.itemsize)
    before, after = (_rounded(at, index, source, workspace) for index in range(2))
    return len(codec.encode(0, changes, at.elements)) if changes.find(before, after) else 0


def _rounded(at: BlockOf, index: int, source: SourceBlocks, workspace: Workspace) -> Bits:
    tensor: StoredTensor = at.tensor
    wide = workspace.array("wide", at.elements, np.uint32)
    source.read(at, index, wide, workspace, tensor)
    bits: Bits = workspace.array(f"rounded {index}", at.elements, np.uint16)
    narrow(wide, at.format, at.base_format, bits)
    return bits
