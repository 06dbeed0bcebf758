"""The formats of weights that are read, in the order in which one directory is tried for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from ..locations import Location, Url
from ..specs import SourceCheckpoint
from .changed import open_changed
from .checkpoint import holds_weights, open_checkpoint
from .dcp import holds_dcp, open_dcp
from .fsdp import holds_shards, open_shards
from .grail import holds_window, open_window
from .naming import Naming
from .slime import holds_changes, open_changes
from .split_safetensors import holds_split, open_split


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes
    ----------
    name : str
        For ``--source``.
    title : str
        For people.
    looked_for : str
        Names of the files that `holds` looks for.
    places : tuple of str
        Directories inside a step's where trainers put such weights, first match first.
    holds : callable
        Whether a directory has files that `open` would start from; cheap.
    open : callable
        Opens a directory, of a step, its tensors under the base's names. Raises `SourceError`.
    is_detected : bool
        Whether it may be found out, and not only asked for by name.
    """

    name: str
    title: str
    looked_for: str
    places: tuple[str, ...]
    holds: Callable[[Location], bool]
    open: Callable[[Location, int, Naming], SourceCheckpoint]
    is_detected: bool = True


def _here(
    open_it: Callable[[Path, int, Naming], SourceCheckpoint],
) -> Callable[[Location, int, Naming], SourceCheckpoint]:
    """Make a format's `open` refuse what is not on this machine."""

    def opened(directory: Location, step: int, naming: Naming) -> SourceCheckpoint:
        if isinstance(directory, Url):
            raise SourceError(
                f"{directory}: of checkpoints on object storage only whole safetensors are read; "
                "copy this one to this machine first, e.g. with: aws s3 cp --recursive"
            )
        return open_it(directory, step, naming)

    return opened


def _open_model(directory: Location, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a model directory, or one laid out as such that says that it holds changes."""
    if isinstance(directory, Path) and holds_changes(directory):
        return open_changes(directory, step, naming)
    return open_checkpoint(directory, step, naming)


_MODEL_PLACES = (
    *(".", "huggingface", "actor/huggingface", "actor/model/huggingface"),
    *("weight", "policy/weights/model/consolidated", "policy/weights/model"),
)

FORMATS = (
    Format(
        name="safetensors",
        title="safetensors",
        looked_for="model.safetensors or model.safetensors.index.json",
        places=_MODEL_PLACES,
        holds=holds_weights,
        open=_open_model,
    ),
    Format(
        name="split-safetensors",
        title="split safetensors",
        looked_for="shard-*-model-*-of-*.safetensors",
        places=(".", "policy/weights/model", "model", "sharded"),
        holds=holds_split,
        open=_here(open_split),
    ),
    Format(
        name="fsdp",
        title="verl FSDP shards",
        looked_for="model_world_size_W_rank_R.pt",
        places=("actor", ".", "actor/model", "model"),
        holds=holds_shards,
        open=_here(open_shards),
    ),
    Format(
        name="dcp",
        title="PyTorch DCP",
        looked_for=".metadata with *.distcp",
        places=(
            *(".", "trainer", "pytorch_model_fsdp_0", "policy/weights/model", "policy/weights"),
            *("model", "actor", "weights"),
        ),
        holds=holds_dcp,
        open=_here(open_dcp),
    ),
    Format(
        name="grail",
        title="grail windows",
        looked_for="DELTA/delta_sparse.bin.zst or FULL/model.safetensors",
        places=(".",),
        holds=holds_window,
        open=_here(open_window),
    ),
    Format(
        name="changed-safetensors",
        title="changed tensors",
        looked_for="model.safetensors or model.safetensors.index.json",
        places=_MODEL_PLACES,
        holds=holds_weights,
        open=_here(open_changed),
        is_detected=False,
    ),
)
"""The first one counts that all steps hold in the same place."""
