"""Read side: directories of trainers and models, safetensors headers, blocks of bytes.

Nothing here interprets weights, and nothing needs torch: a checkpoint becomes a description of
which bytes of which file are which tensor, and `CheckpointReader` fetches them.
"""

from .checkpoint import open_checkpoint
from .completion import missing_mark
from .layout import FoundCheckpoints, StepSelection, find_checkpoints, list_steps, parse_steps
from .reader import CheckpointReader

__all__ = [
    "CheckpointReader",
    "FoundCheckpoints",
    "StepSelection",
    "find_checkpoints",
    "list_steps",
    "missing_mark",
    "open_checkpoint",
    "parse_steps",
]
