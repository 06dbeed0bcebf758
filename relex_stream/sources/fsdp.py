"""verl's FSDP shards: one file of ``torch.save`` per rank, with that rank's part of each tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import SourceError
from ..listing import is_directory, list_names
from ..locations import Location
from ..specs import (
    Box,
    DType,
    FilePart,
    Piece,
    SourceCheckpoint,
    TensorPlace,
    TensorSpec,
    WeightsFile,
)
from .checkpoint import INDEX_FILE
from .directories import summarise
from .dtensor import DTENSORS, DTensor, Meshes, local_box
from .file_parts import lay_out
from .naming import Naming
from .pickles import collector_paused
from .pieces import join_pieces
from .quantised import refuse_quantised
from .recognised import refuse_adapter
from .side_files import sort_files
from .strict_json import parse_object, shown
from .surroundings import look_around
from .torch_file import StoredView, read_torch_file

CONFIG_FILE = "fsdp_config.json"
MODEL_DIRECTORY = "huggingface"
"""Beside the shards: the model's config and tokenizer, and perhaps the model itself again."""

_INDEX = f"{MODEL_DIRECTORY}/{INDEX_FILE}"
"""Of weights that are not kept: it would send readers to files that are not there."""

_ADAPTER_DIRECTORY = "lora_adapter"
_SHARD = re.compile(r"model_world_size_([1-9][0-9]{0,5})_rank_(0|[1-9][0-9]{0,5})\.pt")
_LONGEST_CONFIG = 1 << 20

_FLAT = re.compile(r"(?:^|\.)_?flat_param(?:eter)?(?:_[0-9]+)?$")


class _Local(NamedTuple):
    """What one rank holds of a tensor: the shape of all of it, a box of it, and where that is."""

    dtype: DType
    shape: tuple[int, ...]
    box: Box
    offset: int

    @property
    def nbytes(self) -> int:
        return TensorSpec("", self.dtype, self.box.shape).nbytes

    @property
    def is_whole(self) -> bool:
        return self.box.shape == self.shape


class _RankFile(NamedTuple):
    """One rank's file."""

    path: Path
    status: os.stat_result
    literals: tuple[tuple[int, bytes], ...]
    tensors: dict[str, _Local]


def holds_shards(directory: Location) -> bool:
    """Return whether a directory has files that `open_shards` would start from."""
    return is_directory(directory) and any(map(_SHARD.fullmatch, list_names(directory)))


@collector_paused()
def open_shards(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a directory of ``model_world_size_W_rank_R.pt``, one file per rank.

    Tensors may be DTensors, on a mesh of one or more dimensions, or whole. What is no tensor stays
    in the files.

    Parameters
    ----------
    directory : Path
        Where they lie: for verl the ``actor`` of a step.
    step : int
        The step they are from.
    naming : Naming
        What their tensors are called in the base.

    Returns
    -------
    SourceCheckpoint
        Side files are those beside the shards and all in ``huggingface``. What several ranks hold
        is in ``copies``, but for the first of them.

    Raises
    ------
    SourceError
        If files of ranks are missing or malformed, tensors are spread in a way that is not read or
        do not fit together, or they are those of an adapter.
    """
    directory = directory.absolute()
    _, _, names = look_around(directory)
    ranks = _find_ranks(directory, names)
    files = [_read_rank(directory / name, rank) for rank, name in enumerate(ranks)]
    locals_of = _by_tensor(directory, files)
    refuse_adapter(directory, locals_of)
    if _ADAPTER_DIRECTORY in names:
        raise SourceError(
            f"{directory}: an adapter beside the weights ({_ADAPTER_DIRECTORY}); merge it into its "
            "base model first"
        )
    called = naming.of_model(locals_of)
    tensors: dict[str, TensorPlace] = {}
    copies: dict[str, tuple[Piece, ...]] = {}
    for key, name in called.items():
        tensors[name], again = _join(directory, name, files, locals_of[key])
        if again:
            copies[name] = again
    refuse_quantised(directory / MODEL_DIRECTORY, (place.spec for place in tensors.values()))
    side_files, skipped_files = sort_files(
        directory, [name for name in names if name not in ranks and name != _INDEX]
    )
    return SourceCheckpoint(
        step=step,
        directory=str(directory),
        tensors=tensors,
        weights_files=tuple(_weights_file(file, called) for file in files),
        side_files=side_files,
        skipped_files=(*skipped_files, *(name for name in names if name == _INDEX)),
        copies=copies,
    )


def _find_ranks(directory: Path, names: Iterable[str]) -> list[str]:
    """Return the names of all ranks' files, in the order of the ranks."""
    by_world: dict[int, dict[int, str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is not None:
            by_world.setdefault(int(match[1]), {})[int(match[2])] = name
    there = summarise([str(world) for world in sorted(by_world)])
    if not by_world:
        raise SourceError(
            f"{directory}: no FSDP shards: looked for model_world_size_W_rank_R.pt; check the path"
        )
    world = _noted_world(directory / CONFIG_FILE)
    if world is None:
        world = min(by_world)
        if len(by_world) > 1:
            raise SourceError(
                f"{directory}: shards of {there} ranks beside each other, and no {CONFIG_FILE}; "
                "remove those that are left from another run"
            )
    if world not in by_world:
        raise SourceError(
            f"{directory}: {CONFIG_FILE} says {world} ranks, and there are shards of {there}; copy "
            "the shards of all ranks again"
        )
    found = by_world[world]
    missing = [str(rank) for rank in range(world) if rank not in found]
    if missing:
        raise SourceError(
            f"{directory}: the shards of ranks {summarise(missing)} of {world} are missing; wait "
            "until all are written, or copy them from the machines that wrote them"
        )
    if len(found) > world:
        raise SourceError(
            f"{directory}: shards of rank {max(found)} where there are {world} ranks; remove those "
            "that are left from another run"
        )
    return [found[rank] for rank in range(world)]


def _noted_world(path: Path) -> int | None:
    """Return the number of ranks that verl noted, None where it did not: old versions."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            world = parse_object(file.read(_LONGEST_CONFIG)).get("world_size")
        if type(world) is not int:
            raise ValueError(f"it has world_size {shown(world)}")
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}; copy it again, or remove it") from None
    return world


def _read_rank(path: Path, rank: int) -> _RankFile:
    content, status = read_torch_file(path, DTENSORS)
    if type(content.value) is not dict:
        raise SourceError(f"{path}: holds no dict of tensors; save the model's state_dict")
    meshes = Meshes(rank)
    tensors: dict[str, _Local] = {}
    for name, value in content.value.items():
        if not isinstance(value, StoredView | DTensor):
            continue
        if type(name) is not str or not name or "\0" in name:
            raise SourceError(f"{path}: a tensor has the name {shown(name)}; save the model anew")
        try:
            tensors[name] = _local(name, value, meshes)
        except ValueError as error:
            raise SourceError(f"{path}: tensor {shown(name)}: {error}") from None
    return _RankFile(path, status, content.literals, tensors)


def _local(name: str, value: StoredView | DTensor, meshes: Meshes) -> _Local:
    """Return what a rank holds; raise ValueError, with clauses, where that is not read."""
    if _FLAT.search(name):
        raise ValueError("a flat parameter of FSDP 1, not read; save with SHARDED_STATE_DICT")
    view = value.local if isinstance(value, DTensor) else value
    if not view.row_major:
        raise ValueError(
            "it lies in the file transposed or with gaps; save it anew after .contiguous()"
        )
    if isinstance(value, DTensor):
        return _Local(view.dtype, value.shape, local_box(value, meshes), view.offset)
    whole = Box((0,) * len(view.shape), view.shape)
    return _Local(view.dtype, view.shape, whole, view.offset)


def _by_tensor(directory: Path, files: list[_RankFile]) -> dict[str, list[_Local]]:
    """Return what each rank holds of each tensor, in the order of the first rank's file."""
    first = files[0]
    if not first.tensors:
        raise SourceError(f"{first.path}: holds no tensors; save the model anew")
    for file in files[1:]:
        for name in first.tensors.keys() ^ file.tensors.keys():
            holder, lacking = (first, file) if name in first.tensors else (file, first)
            raise SourceError(
                f"{directory}: tensor {shown(name)} is in {holder.path.name} and not in "
                f"{lacking.path.name}; copy the shards of all ranks again"
            )
    return {name: [file.tensors[name] for file in files] for name in first.tensors}


def _join(
    directory: Path, name: str, files: list[_RankFile], parts: list[_Local]
) -> tuple[TensorPlace, tuple[Piece, ...]]:
    """Return where the whole tensor lies, and parts of it that are there more than once."""
    first = parts[0]
    try:
        for part, file in zip(parts, files, strict=True):
            if (part.dtype, part.shape) != (first.dtype, first.shape):
                raise ValueError(
                    f"it is {first.dtype.code} {list(first.shape)} in {files[0].path.name} and "
                    f"{part.dtype.code} {list(part.shape)} in {file.path.name}"
                )
        pieces = [
            Piece(str(file.path), part.offset, part.box)
            for part, file in zip(parts, files, strict=True)
        ]
        return join_pieces(TensorSpec(name, first.dtype, first.shape), pieces)
    except ValueError as error:
        raise SourceError(
            f"{directory}: tensor {shown(name)}: {error}; copy the shards of all ranks again, or "
            "merge them with the trainer's own model merger first"
        ) from None


def _weights_file(file: _RankFile, called: Mapping[str, str]) -> WeightsFile:
    """Return a rank's file, taken apart if all of it is the model's."""
    size, modified = file.status.st_size, file.status.st_mtime_ns
    if not file.tensors.keys() <= called.keys():
        return WeightsFile(file.path.name, size, modified, parts=None)
    tensors = (
        (
            local.offset,
            local.nbytes,
            FilePart(tensor=called[key], box=None if local.is_whole else local.box),
        )
        for key, local in file.tensors.items()
    )
    with _reading(file.path) as read:
        parts = lay_out(size, file.literals, tensors, read)
    return WeightsFile(file.path.name, size, modified, parts)


@contextmanager
def _reading(path: Path) -> Iterator[Callable[[int, int], bytes]]:
    """Return a context with a function that reads bytes of a file: the padding between tensors."""
    try:
        with path.open("rb", buffering=0) as file:
            yield lambda offset, nbytes: os.pread(file.fileno(), nbytes, offset) if nbytes else b""
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check that it is still there and readable"
        ) from error
