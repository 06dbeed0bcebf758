"""PyTorch distributed checkpoints (DCP): ``.metadata`` and the files of the ranks, without torch.

Each chunk of a tensor is a region of a file, and in the region lies what ``torch.save`` writes of
that chunk: a zip archive, with the chunk's elements somewhere in it. (Or, with the writer's other
format, the file is a safetensors file.)
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..errors import SourceError
from ..listing import is_file, list_names
from ..locations import Location
from ..specs import Box, FilePart, Piece, SourceCheckpoint, TensorPlace, TensorSpec, WeightsFile
from .dcp_metadata import METADATA, DcpMetadata, Region, SavedTensor, read_metadata
from .directories import summarise
from .file_parts import lay_out
from .naming import Naming
from .pieces import join_pieces
from .quantised import refuse_quantised
from .recognised import is_megatron, refuse_adapter
from .safetensors_file import read_weights_file
from .side_files import sort_files
from .strict_json import shown
from .surroundings import look_around
from .torch_file import StoredView, read_torch_region

_STATE = {
    *("optim", "optimizer", "optimizers", "optimizer_state_dict", "sched", "scheduler"),
    *("lr_scheduler", "lr_schedulers", "dataloader", "train_state", "progress", "rng", "rng_state"),
}
"""What trainers keep beside the tensors of a model whose names have no prefix."""

_ZIP = b"PK\x03\x04"


class _Chunk(NamedTuple):
    """A chunk of a tensor of the model, and where `.metadata` says that it lies.

    The spec has the tensor's key and the chunk's own shape; the name is that in the base.
    """

    name: str
    spec: TensorSpec
    box: Box
    region: Region
    whole: bool

    @property
    def part(self) -> FilePart:
        return FilePart(tensor=self.name, box=None if self.whole else self.box)


def holds_dcp(directory: Location) -> bool:
    """Return whether a directory has a checkpoint that `open_dcp` would start from."""
    return is_file(directory / METADATA) and not is_megatron(directory, list_names(directory))


def open_dcp(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a PyTorch distributed checkpoint.

    Parameters
    ----------
    directory : Path
        That of its ``.metadata``.
    step : int
        The step it is from.
    naming : Naming
        What its tensors are called in the base. Keys that are not the model's are left alone.

    Returns
    -------
    SourceCheckpoint
        ``weights_files`` are the files with tensors of the model. Those that also hold other state
        have no parts. ``.metadata`` is a side file if all files have parts; without one of them it
        would be of no use. ``directory`` is that of the step where trainers put files around the
        weights.

    Raises
    ------
    SourceError
        If the metadata is not what torch writes, a file is missing or does not hold what it says,
        or the chunks of a tensor do not cover it.
    """
    directory = directory.absolute()
    root, inside, names = look_around(directory)
    metadata = read_metadata(directory)
    called = _called(directory, metadata, naming)
    by_file: dict[str, list[_Chunk]] = defaultdict(list)
    for key, name in called.items():
        saved = metadata.tensors[key]
        for box, region in saved.chunks.items():
            spec = TensorSpec(key, saved.dtype, box.shape)
            whole = box.shape == saved.shape
            by_file[region.relative_path].append(_Chunk(name, spec, box, region, whole))
    with_state = _files_with_state(metadata, called)
    files: list[WeightsFile] = []
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for relative_path in sorted(by_file):
        path = directory / relative_path
        chunks = sorted(by_file[relative_path], key=lambda chunk: chunk.region.offset)
        file, offsets = _read_file(
            path, inside + relative_path, chunks, with_state=relative_path in with_state
        )
        files.append(file)
        for chunk, offset in zip(chunks, offsets, strict=True):
            pieces[chunk.name].append(Piece(str(path), offset, chunk.box))
    tensors = {
        name: _join(directory, metadata.tensors[key], key, name, pieces[name])
        for key, name in called.items()
    }
    refuse_quantised(directory, (place.spec for place in tensors.values()))
    used = {file.relative_path for file in files}
    if all(file.parts is not None for file in files):
        used.add(inside + METADATA)
    side_files, skipped_files = sort_files(root, [name for name in names if name not in used])
    if inside + METADATA in used:
        side_files = (inside + METADATA, *side_files)
    return SourceCheckpoint(
        step=step,
        directory=str(root),
        tensors=tensors,
        weights_files=tuple(files),
        side_files=side_files,
        skipped_files=skipped_files,
    )


def _called(directory: Path, metadata: DcpMetadata, naming: Naming) -> dict[str, str]:
    """Return what the model's tensors are called in the base, by their keys."""
    called = naming.of(metadata.tensors)
    refuse_adapter(directory / METADATA, called)
    # Without a prefix the naming cannot tell the model's keys from others.
    called = {
        key: name
        for key, name in called.items()
        if name in naming.wanted or key.partition(".")[0] not in _STATE
    }
    if not called:
        keys = summarise(list(metadata.tensors), limit=3)
        raise SourceError(
            f"{directory / METADATA}: no tensors of a model: found {keys}; say with --strip-prefix "
            "or --map what they are called in the base"
        )
    return called


def _files_with_state(metadata: DcpMetadata, called: Container[str]) -> set[str]:
    """Return the files that hold more than the model's tensors."""
    regions = {
        region
        for key, tensor in metadata.tensors.items()
        if key not in called
        for region in tensor.chunks.values()
    }
    return {region.relative_path for region in (*regions, *metadata.other)}


def _read_file(
    path: Path, relative_path: str, chunks: Sequence[_Chunk], *, with_state: bool
) -> tuple[WeightsFile, list[int]]:
    """Return what a file is made of (no parts: with state), and where each of its chunks begins."""
    try:
        # Opening a pipe would wait for its writer, so look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: not a regular file, so it cannot be a weights file")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            end = max(chunk.region.end for chunk in chunks)
            # The regions of a safetensors file are not what is in it.
            if os.pread(descriptor, len(_ZIP), chunks[0].region.offset) != _ZIP:
                file, offsets = _read_safetensors(path, relative_path, chunks)
                return replace(file, parts=None) if with_state else file, offsets
            if end > status.st_size:
                raise SourceError(
                    f"{path}: truncated: {status.st_size} bytes where at least {end} expected; "
                    "copy it again"
                )
            offsets, literals, runs = _read_zips(descriptor, path, chunks)
            # Between the regions are at most empty chunks that the metadata names but once.
            parts = (
                None
                if with_state
                else lay_out(
                    status.st_size, literals, runs, lambda at, size: os.pread(descriptor, size, at)
                )
            )
            file = WeightsFile(relative_path, status.st_size, status.st_mtime_ns, parts)
            return file, offsets
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise SourceError(
            f"{path}: missing, and {METADATA} says that it holds tensors; copy it again"
        ) from None
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error


def _read_zips(
    descriptor: int, path: Path, chunks: Sequence[_Chunk]
) -> tuple[list[int], list[tuple[int, bytes]], list[tuple[int, int, FilePart]]]:
    """Return where each chunk begins, and literals and chunks as `lay_out` takes them."""
    literals: list[tuple[int, bytes]] = []
    runs: list[tuple[int, int, FilePart]] = []
    offsets: list[int] = []
    for chunk in chunks:
        if not chunk.spec.numel:
            offsets.append(chunk.region.offset)
            continue
        where = f"{path}, tensor {shown(chunk.spec.name)}"
        _, offset, length = chunk.region
        found = read_torch_region(descriptor, where, offset, length, {})
        view = found.value
        if not isinstance(view, StoredView):
            raise SourceError(f"{where}: it is no tensor; save the checkpoint anew")
        if (view.dtype, view.shape) != (chunk.spec.dtype, chunk.spec.shape):
            raise SourceError(
                f"{where}: its part is {view.dtype.code} {list(view.shape)} where {METADATA} says "
                f"{chunk.spec.dtype.code} {list(chunk.spec.shape)}; copy the checkpoint again"
            )
        if not view.row_major:
            raise SourceError(
                f"{where}: its elements do not lie in row-major order; save it contiguous"
            )
        offsets.append(view.offset)
        literals += found.literals
        runs.append((view.offset, chunk.spec.nbytes, chunk.part))
    return offsets, literals, runs


def _read_safetensors(
    path: Path, relative_path: str, chunks: Sequence[_Chunk]
) -> tuple[WeightsFile, list[int]]:
    file, places = read_weights_file(path, relative_path)
    by_key = {chunk.spec.name: chunk for chunk in chunks}
    for key, chunk in by_key.items():
        if key not in places or places[key].spec != chunk.spec:
            raise SourceError(
                f"{path}: does not hold the part of tensor {shown(key)} that {METADATA} says; "
                "copy the checkpoint again, or save it anew"
            )
    if len(by_key) < len(chunks):
        raise SourceError(
            f"{path}: holds only one of several parts of a tensor; save the checkpoint anew, in "
            "torch's own serialization format"
        )
    assert file.parts is not None
    parts = tuple(
        by_key[part.tensor].part if part.tensor in by_key else part for part in file.parts
    )
    return replace(file, parts=parts), [places[chunk.spec.name].offset for chunk in chunks]


def _join(
    directory: Path, saved: SavedTensor, key: str, name: str, pieces: Sequence[Piece]
) -> TensorPlace:
    try:
        if not pieces:
            raise ValueError("it has no chunks")
        place, _ = join_pieces(TensorSpec(name, saved.dtype, saved.shape), pieces)
    except ValueError as error:
        raise SourceError(
            f"{directory / METADATA}: tensor {shown(key)}: {error}; save the checkpoint anew"
        ) from None
    return place
