"""Model directories that hold only the tensors that changed since the checkpoint before.

Nothing in such files says so: they look like checkpoints of another model, or half-written ones.
So they are read as this only where it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..specs import Patch, SourceCheckpoint
from .checkpoint import INDEX_FILE, open_checkpoint
from .naming import Naming


def open_changed(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a model directory whose missing tensors are as they were.

    Raises
    ------
    SourceError
        As `open_checkpoint`.
    """
    checkpoint = open_checkpoint(directory, step, naming)
    return replace(
        checkpoint,
        # What they were put together again to would be no model.
        weights_files=tuple(replace(file, parts=None) for file in checkpoint.weights_files),
        side_files=tuple(name for name in checkpoint.side_files if name != INDEX_FILE),
        patch=Patch(follows=None),
    )
