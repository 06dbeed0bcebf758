"""Read side: directories of trainers and models, safetensors headers, blocks of bytes.

Nothing here interprets weights, and nothing needs torch: a checkpoint becomes a description of
which bytes of which file are which tensor, and `CheckpointReader` fetches them.
"""

from .checkpoint import open_checkpoint
from .layout import FoundCheckpoints, ListedSteps, find_checkpoints, list_steps
from .naming import Naming
from .phases import FoundRun, Phase, find_run
from .reader import CheckpointReader
from .steps import StepSelection, parse_steps

__all__ = [
    "CheckpointReader",
    "FoundCheckpoints",
    "FoundRun",
    "ListedSteps",
    "Naming",
    "Phase",
    "StepSelection",
    "find_checkpoints",
    "find_run",
    "list_steps",
    "open_checkpoint",
    "parse_steps",
]
