"""Checkpoints of grail: ``checkpoint-N/DELTA`` with what changed (PULSE), ``FULL`` with a model.

A delta is one file, packed by zstd as a whole: the positions that changed since ``prev_window``,
and the values there now. ``metadata.json`` beside it has its SHA-256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..listing import file_status, is_file, list_names, read_file
from ..locations import Location
from ..specs import PackedChange, Patch, SourceCheckpoint, WeightsFile
from .checkpoint import holds_weights, open_checkpoint
from .naming import Naming
from .strict_json import parse_object, shown

CODECS = ("sparse_codec_v2", "sparse_codec_v3", "sparse_codec_v3.1")

DIGEST_KIND = "xxh3-128"

_DELTA, _FULL = "DELTA", "FULL"
_PACKED = "delta_sparse.bin.zst"
_METADATA = "metadata.json"
_DELTA_METADATA = "delta_metadata.json"
_LARGEST_METADATA = 64 << 20
_AGAIN = "copy the checkpoint again"


def holds_window(directory: Location) -> bool:
    """Return whether a directory has what `open_window` would start from."""
    return is_file(directory / _DELTA / _PACKED) or holds_weights(directory / _FULL)


def open_window(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    """Open a checkpoint: ``FULL`` where that is complete, else ``DELTA``.

    ``FULL`` is published after ``DELTA``, at some steps. It follows no other checkpoint.

    Raises
    ------
    SourceError
        If neither is complete; if the metadata is malformed, or of a delta that leaves changes out.
    """
    directory = directory.absolute()
    if _is_complete(directory / _FULL) or not is_file(directory / _DELTA / _PACKED):
        return open_checkpoint(directory / _FULL, step, naming)
    return _open_delta(directory / _DELTA, step, naming)


def _is_complete(directory: Path) -> bool:
    if not holds_weights(directory) or not is_file(directory / _METADATA):
        return False
    listed = _read_metadata(directory / _METADATA).get("file_manifest")
    return isinstance(listed, dict) and listed.keys() <= set(list_names(directory)) | {_METADATA}


def _open_delta(directory: Path, step: int, naming: Naming) -> SourceCheckpoint:
    metadata = _read_metadata(directory / _METADATA)
    told = _read_metadata(directory / _DELTA_METADATA)
    where = directory / _METADATA
    window, before = metadata.get("window"), metadata.get("prev_window")
    if type(window) is not int or type(before) is not int or not 0 <= before < window:
        raise SourceError(
            f"{where}: window {shown(window)} cannot follow window {shown(before)}; {_AGAIN}"
        )
    if told.get("format") not in CODECS:
        raise SourceError(
            f"{directory / _DELTA_METADATA}: format {shown(told.get('format'))} is not one of "
            f"{', '.join(CODECS)}; take the checkpoint's {_FULL}, or leave it out with --steps"
        )
    if told.get("threshold", 0) != 0:
        raise SourceError(
            f"{directory / _DELTA_METADATA}: changes up to {shown(told['threshold'])} are left out "
            "of it, so the weights are not to be had from it; publish with GRAIL_DELTA_THRESHOLD=0"
        )
    path = directory / _PACKED
    status = file_status(path)
    manifest = metadata.get("file_manifest")
    digest = manifest.get(_PACKED) if isinstance(manifest, dict) else None
    shapes = told.get("shapes")
    if not isinstance(shapes, dict):
        raise SourceError(f"{directory / _DELTA_METADATA}: it has no object 'shapes'; {_AGAIN}")
    return SourceCheckpoint(
        step=step,
        directory=str(directory),
        tensors={},
        weights_files=(WeightsFile(_PACKED, status.size, status.modified_ns, None),),
        # They describe files that are not kept.
        side_files=(),
        skipped_files=tuple(name for name in list_names(directory) if name != _PACKED),
        patch=Patch(
            follows=step - (window - before),
            encoding=str(told["format"]),
            together=PackedChange(str(path), 0, status.size, _hex(where, _PACKED, digest)),
            names={name: name for name in shapes} | naming.of(shapes),
            digest_kind=DIGEST_KIND if metadata.get("weights_hash") else "",
            weights_digest=_hex(where, "weights_hash", metadata.get("weights_hash") or ""),
        ),
    )


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        if not is_file(path):
            raise SourceError(f"{path.parent} has no {path.name}; {_AGAIN}")
        if file_status(path).size > _LARGEST_METADATA:
            raise ValueError(f"it is larger than {_LARGEST_METADATA} bytes")
        return parse_object(read_file(path))
    except ValueError as error:
        raise SourceError(f"{path}: {error}; {_AGAIN}") from None


def _hex(where: Path, name: str, text: object) -> bytes:
    try:
        if isinstance(text, str):
            return bytes.fromhex(text)
    except ValueError:
        pass
    raise SourceError(f"{where}: the checksum {name} is missing or malformed; {_AGAIN}")
