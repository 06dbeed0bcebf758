"""Checkpoints of safetensors files that each hold parts of tensors, as every rank wrote its own.

PyTorch's ``HuggingFaceStorageWriter`` writes them with ``save_distributed``, and so does NeMo-RL.
Each file is a plain one; its metadata says where in the tensor each part begins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SourceError
from ..listing import is_directory, list_names
from ..locations import Location
from ..specs import (
    Box,
    FilePart,
    Piece,
    SourceCheckpoint,
    TensorPlace,
    TensorSpec,
    WeightsFile,
)
from .naming import Naming
from .pieces import hull, join_pieces
from .quantised import refuse_quantised
from .safetensors_file import read_header
from .side_files import sort_files
from .strict_json import parse_object, shown
from .surroundings import look_around

SHARDS = "shard-*-model-*-of-*.safetensors"
"""Names of the files: the rank that wrote it, and which of its files it is."""

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


class _Shard(NamedTuple):
    """One file: what it is made of, and the part of each of its tensors."""

    file: WeightsFile
    parts: dict[str, tuple[TensorSpec, Piece]]  # the spec is the part's own


def holds_split(directory: Location) -> bool:
    """Return whether a directory has files that `open_split` would start from."""
    return is_directory(directory) and bool(fnmatch.filter(list_names(directory), SHARDS))


def open_split(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a directory of safetensors files that hold parts of tensors.

    Parameters
    ----------
    directory : Path
        Where they lie.
    step : int
        The step they are from.
    naming : Naming
        What their tensors are called in the base.

    Returns
    -------
    SourceCheckpoint
        A tensor's shape is that of all its parts together: a file that is missing shows as a gap,
        or where the shape is compared with the base's. ``directory`` is that of the step where
        trainers put files around the weights.

    Raises
    ------
    SourceError
        If a header is malformed or does not say where parts begin, or the parts of a tensor do not
        cover it or differ in dtype.
    """
    directory = directory.absolute()
    root, inside, names = look_around(directory)
    shards = [_read_shard(root, name) for name in fnmatch.filter(names, inside + SHARDS)]
    keys = dict.fromkeys(key for shard in shards for key in shard.parts)
    if not keys:
        raise SourceError(f"{directory}: the weights files hold no tensors; save the model anew")
    called = naming.of_model(keys)
    parts: dict[str, list[tuple[TensorSpec, Piece]]] = {}
    for shard in shards:
        for key, part in shard.parts.items():
            if key in called:
                parts.setdefault(called[key], []).append(part)
    tensors: dict[str, TensorPlace] = {}
    copies: dict[str, tuple[Piece, ...]] = {}
    for name, own in parts.items():
        tensors[name], again = _join(directory, name, own)
        if again:
            copies[name] = again
    refuse_quantised(directory, (place.spec for place in tensors.values()))
    side_files, skipped_files = sort_files(root, _others(names, shards))
    return SourceCheckpoint(
        step=step,
        directory=str(root),
        tensors=tensors,
        weights_files=tuple(
            replace(
                shard.file,
                parts=tuple(_file_parts(shard, called, tensors))
                if len(called) == len(keys)
                else None,
            )
            for shard in shards
        ),
        side_files=side_files,
        skipped_files=skipped_files,
        copies=copies,
    )


def _read_shard(directory: Path, name: str) -> _Shard:
    path = directory / name
    file, places, metadata = read_header(path, name)
    try:
        starts = _starts(metadata.get(_INFO))
        parts = {}
        for key, place in places.items():
            start, extent = starts.get(key), place.spec.shape
            if start is None or len(start) != len(extent):
                raise ValueError(f"of tensor {shown(key)} of shape {list(extent)} it says {start}")
            parts[key] = place.spec, Piece(place.path, place.offset, Box(start, extent))
    except ValueError as error:
        raise SourceError(
            f"{path}: its header does not say where its parts of tensors begin ({_INFO}): {error}; "
            "copy it again or save it anew"
        ) from None
    return _Shard(file, parts)


@lru_cache(maxsize=4096)  # the steps of a run are split alike
def _starts(text: str | None) -> dict[str, tuple[int, ...] | None]:
    """Return where the part of each tensor begins, None where that cannot be read.

    Raises ValueError with a clause that says what is wrong.
    """
    if text is None:
        raise ValueError("there is nothing of it")
    entries = parse_object(text.encode(errors="surrogatepass"))
    return {key: _start(entry) for key, entry in entries.items()}


def _start(entry: Any) -> tuple[int, ...] | None:
    start = entry.get(_OFFSETS) if isinstance(entry, dict) else None
    # bool is a subclass of int, and JSON's true is no offset.
    if isinstance(start, list) and all(type(first) is int and first >= 0 for first in start):
        return tuple(start)
    return None


def _join(
    directory: Path, name: str, parts: Sequence[tuple[TensorSpec, Piece]]
) -> tuple[TensorPlace, tuple[Piece, ...]]:
    """Return where the whole tensor lies, and parts of it that are there more than once."""
    first = parts[0][0]
    try:
        for spec, piece in parts:
            if spec.dtype != first.dtype or len(spec.shape) != len(first.shape):
                raise ValueError(
                    f"it is {first.dtype.code} {list(first.shape)} in one file and "
                    f"{spec.dtype.code} {list(spec.shape)} in {Path(piece.path).name}"
                )
        pieces = [piece for _, piece in parts]
        shape = hull([piece.box for piece in pieces])
        return join_pieces(TensorSpec(name, first.dtype, shape), pieces)
    except ValueError as error:
        raise SourceError(
            f"{directory}: tensor {shown(name)}: {error}; copy the files of all ranks again, or "
            "save the model anew"
        ) from None


def _file_parts(
    shard: _Shard, called: dict[str, str], tensors: dict[str, TensorPlace]
) -> Iterable[FilePart]:
    """Yield what puts the file together again, in the order of its bytes."""
    assert shard.file.parts is not None
    for part in shard.file.parts:
        if part.tensor is None:
            yield part
            continue
        spec, piece = shard.parts[part.tensor]
        name = called[part.tensor]
        if spec.numel:
            yield FilePart(
                tensor=name, box=None if spec.shape == tensors[name].spec.shape else piece.box
            )


def _others(names: Sequence[str], shards: Sequence[_Shard]) -> list[str]:
    used = {shard.file.relative_path for shard in shards}
    return [name for name in names if name not in used]
