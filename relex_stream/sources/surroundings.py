"""What trainers put around the weights of a checkpoint: configuration, tokenizer, notes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..listing import list_names
from .directories import list_files
from .side_files import names_below

_BELOW_STEP = (
    "policy/weights/model",  # NeMo-RL
    "policy/weights",
    "pytorch_model_fsdp_0",  # accelerate
)
"""Where weights lie in the directory of a step that has other files of theirs."""

_MODEL_FILES = ("huggingface", ".hf_metadata", "policy/tokenizer")
"""Directories of files that belong to the model, beside its weights or in the step's."""


_LOOKED_INTO = {path.split("/")[0] for path in (*_BELOW_STEP, *_MODEL_FILES)}


class Surroundings(NamedTuple):
    """The directory that a checkpoint's files are relative to, and what is in it.

    ``inside`` is where the weights lie in it, with a slash at its end, or empty. ``names`` are
    relative to ``root``: the files beside the weights, those of the step, those of the model, and
    those of other subdirectories as `names_below` has them.
    """

    root: Path
    inside: str
    names: list[str]


def look_around(directory: Path) -> Surroundings:
    """Return what is around weights.

    Parameters
    ----------
    directory : Path
        Where the weights lie, absolute.

    Raises
    ------
    SourceError
        If it cannot be listed.
    """
    root, inside = directory, ""
    for place in _BELOW_STEP:
        if directory.as_posix().endswith("/" + place):
            root, inside = directory.parents[place.count("/")], place + "/"
            break
    names: list[str] = []
    for below in dict.fromkeys((inside, "")):
        there = list_names(root / below)
        for model_files in _MODEL_FILES:
            there += [f"{model_files}/{name}" for name in list_files(root / below / model_files)]
        there += names_below(root / below, there, _LOOKED_INTO)
        names += [below + name for name in there]
    return Surroundings(root, inside, names)
