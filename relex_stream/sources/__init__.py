"""Read side: directories of trainers and models, safetensors headers, blocks of bytes.

Nothing here interprets weights, and nothing needs torch: a checkpoint becomes a description of
which bytes of which file are which tensor, and `CheckpointReader` fetches them.
"""

from .checkpoint import open_checkpoint
from .layout import FoundCheckpoints, ListedSteps, find_checkpoints, list_steps
from .naming import Naming
from .reader import CheckpointReader
from .steps import StepSelection, parse_steps

__all__ = [
    "CheckpointReader",
    "FoundCheckpoints",
    "ListedSteps",
    "Naming",
    "StepSelection",
    "find_checkpoints",
    "list_steps",
    "open_checkpoint",
    "parse_steps",
]
