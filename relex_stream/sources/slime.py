"""Weight syncs of slime, miles and SGLang that hold only what changed: ``weight_vNNNNNN``.

Each is laid out as a model directory, whose index says that it is none: its files hold, for each
changed tensor, what must be done to the bytes of version N - 1, packed by zstd. A version without
that in its index is an ordinary model. Described in slime's ``docs/en/advanced/delta-weight-sync``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..listing import file_status, is_file, list_names, read_file
from ..locations import Location, Url
from ..specs import PackedChange, Patch, SourceCheckpoint, WeightsFile
from .checkpoint import DELTA_MARK, INDEX_FILE, check_index, parse_weight_map, read_index
from .naming import Naming
from .safetensors_file import MAX_HEADER_BYTES, read_header
from .side_files import sort_files
from .strict_json import parse_object, shown

ENCODINGS = ("xor", "overwrite")

_NUMBER = re.compile(r"[0-9]{1,18}")
_VERSION_NAME = re.compile(r"weight_v([0-9]+)")
_SAVE_AGAIN = "have the trainer publish it again"


def holds_changes(directory: Location) -> bool:
    """Return whether a directory's index says that its files hold changes only."""
    index = directory / INDEX_FILE
    return (
        not isinstance(index, Url)
        and is_file(index)
        and file_status(index).size <= MAX_HEADER_BYTES
        # Indexes of large models take a while to be taken apart.
        and f'"{DELTA_MARK}"'.encode() in read_file(index)
    )


def read_weight_map(directory: Path) -> dict[str, str]:
    """Return the weight map of a directory's index, be it of a whole model or of changes.

    Raises
    ------
    SourceError
        If the index is malformed.
    """
    index = directory / INDEX_FILE
    return _read_index(index)[1] if holds_changes(directory) else read_index(index)


def open_changes(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a version that holds changes only.

    Parameters
    ----------
    directory : Path
    step : int
        The version's number, or one that is as far ahead of it as that of every other version.
    naming : Naming
        What tensors are called in the base.

    Returns
    -------
    SourceCheckpoint
        Without tensors of its own. The index is one of its weights files: without it the others
        cannot be read.

    Raises
    ------
    SourceError
        If the index or a header is malformed, they do not agree, or the changes are packed
        otherwise than is known.
    """
    directory = directory.absolute()
    names = list_names(directory)
    index = directory / INDEX_FILE
    metadata, shards = _read_index(index)
    version, before = _versions(index, metadata)
    encoding = metadata[DELTA_MARK]
    files = [_index_file(index)]
    packed: dict[str, PackedChange] = {}
    for shard in sorted(set(shards.values())):
        if shard not in names:
            raise SourceError(
                f"{directory}: file {shard}, named by {INDEX_FILE}, is missing; copy it again"
            )
        file, places, digests = read_header(directory / shard, shard)
        # What its tensors are made of lies in the store, but these bytes do not.
        files.append(WeightsFile(file.relative_path, file.size, file.modified_ns, None))
        for name, place in places.items():
            if name in packed:
                raise SourceError(
                    f"{place.path}: tensor {shown(name)} is also in {packed[name].path}; "
                    f"{_SAVE_AGAIN}"
                )
            if place.spec.dtype.code != "U8" or len(place.spec.shape) != 1:
                raise SourceError(
                    f"{place.path}: tensor {shown(name)} is {place.spec.dtype.code} "
                    f"{list(place.spec.shape)} where packed bytes belong; {_SAVE_AGAIN}"
                )
            packed[name] = PackedChange(
                place.path, place.offset, place.spec.nbytes, _digest(place.path, name, digests)
            )
    check_index(index, shards, {name: change.path for name, change in packed.items()})
    called = naming.of(packed)
    used = {file.relative_path for file in files}
    side_files, skipped_files = sort_files(directory, [name for name in names if name not in used])
    return SourceCheckpoint(
        step=step,
        directory=str(directory),
        tensors={},
        weights_files=tuple(files),
        side_files=side_files,
        skipped_files=skipped_files,
        patch=Patch(
            follows=step - (version - before),
            encoding=encoding,
            changes={called.get(name, name): change for name, change in packed.items()},
            digest_kind=str(metadata.get("checksum_format", "")),
        ),
    )


def _read_index(index: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        parsed = parse_object(read_file(index))
        metadata = parsed.get("metadata")
        if not isinstance(metadata, dict):
            raise ValueError("it has no object 'metadata'")
        if metadata.get(DELTA_MARK) not in ENCODINGS:
            raise ValueError(
                f"its changes are encoded as {shown(metadata.get(DELTA_MARK))}, and only "
                f"{' and '.join(ENCODINGS)} are known"
            )
        if metadata.get("compression_format") != "zstd":
            raise ValueError(
                f"its changes are packed by {shown(metadata.get('compression_format'))}, and only "
                "zstd is known"
            )
        # Nothing may have changed.
        return metadata, parse_weight_map(parsed, may_be_empty=True)
    except ValueError as error:
        raise SourceError(f"{index}: bad index: {error}; {_SAVE_AGAIN}") from None


def _versions(index: Path, metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Return the version's number and that of the one that it changes."""
    numbers = []
    for key in ("version", "base_version"):
        text = metadata.get(key)
        if not isinstance(text, str) or not _NUMBER.fullmatch(text):
            raise SourceError(f"{index}: bad index: its {key} is {shown(text)}; {_SAVE_AGAIN}")
        numbers.append(int(text))
    version, before = numbers
    if before >= version:
        raise SourceError(
            f"{index}: bad index: version {version} cannot follow version {before}; {_SAVE_AGAIN}"
        )
    named = _VERSION_NAME.fullmatch(index.parent.name)
    if named is not None and int(named[1]) != version:
        raise SourceError(
            f"{index}: this is version {version}, in a directory named {index.parent.name}; give "
            "the directory its own name again"
        )
    return version, before


def _index_file(index: Path) -> WeightsFile:
    status = file_status(index)
    return WeightsFile(INDEX_FILE, status.size, status.modified_ns, None)


def _digest(path: str, name: str, digests: Mapping[str, str]) -> bytes:
    """Return what the tensor's bytes must come to."""
    try:
        return bytes.fromhex(digests[name])
    except (KeyError, ValueError):
        raise SourceError(
            f"{path}: the checksum of tensor {shown(name)} is missing or malformed; {_SAVE_AGAIN}"
        ) from None
