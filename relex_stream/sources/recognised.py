"""Weights that are recognised and not read: what they are, and what to run first."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import SourceError
from ..listing import file_status, is_directory, list_names, read_file
from ..locations import Location, relative_to
from .directories import summarise
from .strict_json import shown

_MERGE = "merge to safetensors first, e.g. with the trainer's own model merger"
_MEGATRON = (
    "convert it to Hugging Face first: verl's model merger (--backend megatron), slime's "
    "tools/convert_torch_dist_to_hf.py or NeMo-RL's convert_megatron_to_hf.py"
)
_DEEPSPEED = (
    "run the zero_to_fp32.py that DeepSpeed puts beside them first, with --safe_serialization"
)


class _Other(NamedTuple):
    """Names of files or directories, what they are, and the remedy as an imperative clause."""

    pattern: str
    kind: str
    remedy: str


_OTHERS = (
    _Other("adapter_model.*", "an adapter without its model", "merge it into its base model first"),
    _Other("zero_pp_rank_*", "DeepSpeed ZeRO shards", _DEEPSPEED),
    _Other("bf16_zero_pp_rank_*", "DeepSpeed ZeRO shards", _DEEPSPEED),
    # Of files, DeepSpeed's; of directories, Megatron's.
    _Other("mp_rank_*_model_states.pt", "DeepSpeed shards", _DEEPSPEED),
    _Other("common.pt", "a Megatron distributed checkpoint", _MEGATRON),
    _Other("mp_rank_*", "Megatron shards", _MEGATRON),
    _Other("model_world_size_*_rank_*.pt", "FSDP shards", _MERGE),
    _Other("__*.metadata", "a PyTorch checkpoint that each rank described on its own", _MERGE),
    _Other("*.distcp", "a PyTorch distributed checkpoint", _MERGE),
    _Other(
        "model*-of-*.safetensors",
        "shards without their index",
        "copy model.safetensors.index.json too, or save the model anew",
    ),
    _Other("*.safetensors", "other safetensors files", "name the model's file model.safetensors"),
    _Other("*.gguf", "a GGUF model", "use the safetensors it was made from"),
    _Other("*.bin", "PyTorch weights", "convert to safetensors first (safe_serialization=True)"),
    _Other("*.pt", "PyTorch files", _MERGE),
    _Other("*.pth", "PyTorch files", _MERGE),
)
"""The first match counts."""

_INSIDE = (
    *(".", "actor", "huggingface", "actor/huggingface", "actor/model", "model", "trainer"),
    *("policy/weights", "policy/weights/model", "actor/dist_ckpt", "actor/model/dist_ckpt"),
)
"""Where trainers put weights inside a step's directory."""

_NESTED = ("iter_*", "global_step*", "mp_rank_*")
"""Directories that Megatron and DeepSpeed put into one, with the weights in them."""

_LARGEST_METADATA = 1 << 20

_ADAPTER = re.compile(r"(?:^|\.)(?:lora_[A-Za-z_]+|base_layer)\.")


def recognise_weights(directory: Location) -> tuple[str, str] | None:
    """Recognise weights in a format that is not read here.

    Parameters
    ----------
    directory : Location
        Any path; it need not exist.

    Returns
    -------
    tuple of str or None
        What they are, with names of files, and what to do about it as an imperative clause.
    """
    names = list_names(directory) if is_directory(directory) else []
    if is_megatron(directory, names):
        return f"a Megatron distributed checkpoint ({summarise(names)})", _MEGATRON
    return recognise_names(names)


def recognise_names(names: list[str]) -> tuple[str, str] | None:
    """Recognise weights by the names in a directory alone, as above."""
    for other in _OTHERS:
        matches = fnmatch.filter(names, other.pattern)
        if matches:
            return f"{other.kind} ({summarise(matches)})", other.remedy
    return None


def recognise_inside(step: Location) -> tuple[str, str] | None:
    """Recognise weights in a step's directory, wherever trainers put theirs, as above.

    The place is told with what is there.
    """
    for inside in _INSIDE:
        place = step / inside
        nested = (
            [
                name
                for name in list_names(place)
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NESTED)
                and is_directory(place / name)
            ]
            if is_directory(place)
            else []
        )
        for path in (place, *(place / name for name in nested)):
            recognised = recognise_weights(path)
            if recognised is not None:
                what, remedy = recognised
                where = relative_to(path, step)
                return f"{what}{'' if where == '.' else f' in {where}'}", remedy
    return None


def refuse_adapter(where: Location, names: Iterable[str]) -> None:
    """Refuse weights of an adapter, which are no model's.

    Raises
    ------
    SourceError
        If a name among `names` is one that PEFT gives to parts of an adapter, or to what it wraps.
    """
    for name in names:
        if _ADAPTER.search(name):
            raise SourceError(
                f"{where}: tensor {shown(name)} belongs to an adapter (LoRA); merge it into its "
                "base model first, and save that"
            )


def is_megatron(directory: Location, names: list[str]) -> bool:
    """Return whether a directory, with its names, is a checkpoint of Megatron's own.

    It may hold the files of a PyTorch distributed checkpoint; the tensors in them are those of
    Megatron's layers, split and fused otherwise than the model's.
    """
    if "common.pt" in names:
        return True
    path = directory / "metadata.json"
    try:
        return (
            "metadata.json" in names
            and file_status(path).size <= _LARGEST_METADATA
            and b'"sharded_backend"' in read_file(path)
        )
    except OSError:
        return False
