"""Model directories that hold only the tensors that changed since the checkpoint before.

Nothing in such files says so: they look like checkpoints of another model, or half-written ones.
So they are read as this only where it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..specs import Patch, SourceCheckpoint
from .checkpoint import open_checkpoint
from .naming import Naming


def open_changed(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a model directory whose missing tensors are as they were.

    Raises
    ------
    SourceError
        As `open_checkpoint`.
    """
    return replace(open_checkpoint(directory, step, naming), patch=Patch(follows=None))
