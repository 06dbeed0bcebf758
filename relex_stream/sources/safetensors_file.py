"""One safetensors file: its header, checked strictly, and the file taken apart into byte runs.

The safetensors library must accept the file too, but its numpy reader cannot name bf16 tensors'
places and it lets duplicate names pass, so the header is parsed here.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import RemoteError, SourceError
from ..listing import FileStatus, file_status, read_start
from ..locations import Location, Url
from ..specs import DTYPES, FilePart, TensorPlace, TensorSpec, WeightsFile
from .strict_json import parse_object, shown

MAX_HEADER_BYTES = 100_000_000
"""Longest header the format allows."""

_LENGTH_BYTES = 8
_LIKELY_HEADER_BYTES = 64 << 10  # asked for at once of an object, so that most take one request
_MAX_DIMENSIONS = 64  # numpy's own limit; bounds the work of multiplying a shape
_MAX_INTEGER = 2**63 - 1
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class _UnsupportedDTypeError(ValueError):
    """The header may be fine, but weights of this dtype (packed ones, say) cannot be handled."""


def read_weights_file(
    path: Location, relative_path: str
) -> tuple[WeightsFile, dict[str, TensorPlace]]:
    """Read and check the header of a safetensors file, but for what it says of itself.

    As `read_header`, without the metadata.
    """
    weights_file, places, _ = read_header(path, relative_path)
    return weights_file, places


def read_header(
    path: Location, relative_path: str
) -> tuple[WeightsFile, dict[str, TensorPlace], dict[str, str]]:
    """Read and check the header of a safetensors file.

    Parameters
    ----------
    path : Path or Url
        The file; it is read up to the end of its header only.
    relative_path : str
        Its path within the checkpoint directory, kept in the result.

    Returns
    -------
    WeightsFile
        Length and header bytes as one literal part, then one part per tensor in the order of their
        bytes (empty tensors included; those at one offset stay in header order).
    dict of str to TensorPlace
        Where each tensor's bytes lie, in the same order. Offsets may be unaligned.
    dict of str to str
        What the header says of the file itself, its ``__metadata__``.

    Raises
    ------
    SourceError
        If the file cannot be read, is truncated, or is not exactly what the format asks for:
        tensors of known dtypes that cover the file's data without gap, overlap or rest.
    """
    raw_header, status = _read_header(path)
    size = status.size
    checked = _last_checked.get(relative_path)
    if checked is None or (checked.raw, checked.size) != (raw_header, size):
        checked = _check(path, raw_header, size)
        if len(_last_checked) >= _MOST_KEPT:
            _last_checked.clear()
        _last_checked[relative_path] = checked
    start, where = len(raw_header), str(path)
    places = {
        spec.name: TensorPlace(spec, where, start + begin) for spec, begin, _ in checked.tensors
    }
    file = WeightsFile(relative_path, size, status.modified_ns, checked.parts)
    return file, places, checked.metadata


class _Checked(NamedTuple):
    """A header with its length field, and the size of a file, that are right for each other."""

    raw: bytes
    size: int
    tensors: list[tuple[TensorSpec, int, int]]
    parts: tuple[FilePart, ...]
    metadata: dict[str, str]


_last_checked: dict[str, _Checked] = {}
"""By file name: checkpoints of a run have the same headers, megabytes where tensors are many."""

_MOST_KEPT = 4096


def _check(path: Location, raw_header: bytes, size: int) -> _Checked:
    try:
        tensors, metadata = _parse_header(raw_header[_LENGTH_BYTES:])
    except _UnsupportedDTypeError as error:
        raise SourceError(f"{path}: {error} is not supported; dequantise the model first") from None
    except ValueError as error:
        raise SourceError(
            f"{path}: bad safetensors header: {error}; copy the file again or save it anew"
        ) from None
    _check_coverage(path, tensors, len(raw_header), size)
    _check_with_library(path, raw_header, size)
    parts = (FilePart(literal=raw_header), *(FilePart(tensor=spec.name) for spec, _, _ in tensors))
    return _Checked(raw_header, size, tensors, parts, metadata)


def _read_header(path: Location) -> tuple[bytes, FileStatus]:
    """Return the length field with the header, and the file's status; limits come before reads."""
    try:
        # Opening a pipe would wait for its writer, so look before opening.
        status = file_status(path)
        if not status.is_regular:
            raise SourceError(f"{path}: not a regular file, so it cannot be a weights file")
        if isinstance(path, Url):
            start = read_start(path, min(_LIKELY_HEADER_BYTES, status.size))
            length = _header_length(path, start[:_LENGTH_BYTES], status.size)
            if len(start) < _LENGTH_BYTES + length:
                start = read_start(path, _LENGTH_BYTES + length)
            raw = start[: _LENGTH_BYTES + length]
        else:
            with path.open("rb") as file:
                opened = os.fstat(file.fileno())
                status = FileStatus(opened.st_size, opened.st_mtime_ns, is_regular=True)
                prefix = file.read(_LENGTH_BYTES)
                length = _header_length(path, prefix, status.size)
                raw = prefix + file.read(length)
    except (SourceError, RemoteError):
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    if len(raw) < _LENGTH_BYTES + length:
        raise _truncated(path, len(raw), f"at least {_LENGTH_BYTES + length}")
    return raw, status


def _header_length(path: Location, prefix: bytes, size: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise _truncated(path, size, "at least 8")
    if prefix == b"version ":
        raise SourceError(
            f"{path}: a Git LFS pointer instead of weights; fetch them with 'git lfs pull'"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path}: not a safetensors file: it announces a header of {length} bytes, the "
            f"format allows {MAX_HEADER_BYTES}; copy it again or convert it to safetensors"
        )
    if _LENGTH_BYTES + length > size:
        raise _truncated(path, size, f"at least {_LENGTH_BYTES + length}")
    return length


def _truncated(path: Location, size: int, expected: str) -> SourceError:
    return SourceError(f"{path}: truncated: {size} bytes where {expected} expected; copy it again")


def _parse_header(header: bytes) -> tuple[list[tuple[TensorSpec, int, int]], dict[str, str]]:
    """Return tensors with begin and end of their bytes, in the order of those bytes; and metadata.

    Raises ValueError with a clause that says what is wrong.
    """
    if not header.startswith(b"{"):
        raise ValueError("it does not begin with '{'")
    entries = parse_object(header)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError(f"{_METADATA} is not an object of strings")
    tensors = [_parse_entry(name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda item: item[1:])  # stable: empty tensors at one offset keep their order
    return tensors, metadata


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not name or "\0" in name:
        raise ValueError(f"tensor name {shown(name)} is empty or holds a NUL")
    try:
        return _checked_entry(name, entry)
    except ValueError as error:
        raise type(error)(f"tensor {shown(name)} {error}") from None


def _checked_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise ValueError("does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _UnsupportedDTypeError(f"has dtype {shown(code)}, which")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"has shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {shown(offsets)}")
    spec = TensorSpec(name, DTYPES[code], tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise ValueError(
            f"has {end - begin} bytes where {code} of shape {shown(shape)} takes "
            f"{shown(spec.nbytes)}"
        )
    return spec, begin, end


def _are_sizes(value: object) -> bool:
    # bool is a subclass of int, and JSON's true is no size.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_INTEGER for item in value
    )


def _check_coverage(
    path: Location, tensors: list[tuple[TensorSpec, int, int]], start: int, size: int
) -> None:
    """Check that the tensors, in the order of their bytes, cover the file from `start` exactly."""
    covered = 0
    for spec, begin, end in tensors:
        if begin != covered:
            problem = "a gap lies before" if begin > covered else "other tensors overlap"
            raise SourceError(
                f"{path}: bad safetensors header: {problem} tensor {shown(spec.name)} (offset "
                f"{begin} where {covered} expected); copy the file again or save it anew"
            )
        covered = end
    expected = start + covered
    if size < expected:
        raise _truncated(path, size, str(expected))
    if size > expected:
        raise SourceError(
            f"{path}: {size - expected} bytes follow the last tensor ({size} bytes where "
            f"{expected} expected); copy it again"
        )


def _check_with_library(path: Location, raw_header: bytes, size: int) -> None:
    """Let safetensors itself validate the file: opening maps it and checks the header only.

    This comes after our own checks because their messages are clearer, and an empty or cut file
    never gets mapped. It needs a file: of an object, one with its header and a hole behind that.
    """
    try:
        if isinstance(path, Url):
            with tempfile.NamedTemporaryFile(prefix="relex-header-") as file:
                file.write(raw_header)
                file.flush()
                os.truncate(file.name, size)
                with safe_open(file.name, framework="np"):
                    pass
        else:
            with safe_open(path, framework="np"):
                pass
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path}: refused by the safetensors library: {error}; copy the file again or save it "
            "anew"
        ) from error
