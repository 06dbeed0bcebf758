"""Where each tensor of a file of ``torch.save`` lies, without torch.

`torch.load` would read all of the file, or map it after a second of importing torch; what its
``weights_only`` admits differs from version to version (see `pickles`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

from ..errors import SourceError
from ..specs import DTYPES, DType
from .pickles import ORDERED_DICT, Known, load_pickle
from .strict_json import shown
from .torch_zip import PICKLE, Span, read_torch_zip

_MAX_DIMENSIONS = 64
_MAX_INTEGER = 2**63 - 1
_MOST_ARGUMENTS = 8


class StoredView(NamedTuple):
    """A tensor in a file: what it is, and where its first element lies.

    ``row_major`` says whether its elements follow each other in row-major order without gaps.
    """

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    row_major: bool


@dataclass(frozen=True)
class TorchObject:
    """What ``torch.save`` wrote, taken apart.

    Attributes
    ----------
    value : object
        The saved object as `load_pickle` returns it, each plain tensor a `StoredView`.
    storages : tuple of Span
        Where the tensors' bytes lie, in the order of the bytes.
    literals : tuple of (int, bytes)
        Offset and bytes of everything else, in that order too.
    """

    value: object
    storages: tuple[Span, ...]
    literals: tuple[tuple[int, bytes], ...]


def read_torch_file(path: Path, known: Mapping[str, Known]) -> tuple[TorchObject, os.stat_result]:
    """Read a file of ``torch.save``, all but its storages.

    Parameters
    ----------
    path : Path
        The file.
    known : mapping of str to Known
        What its pickle may name besides plain tensors: see `load_pickle`.

    Returns
    -------
    TorchObject
        What it holds.
    os.stat_result
        Of the file that was read.

    Raises
    ------
    SourceError
        If it cannot be read, is truncated, or is not exactly what torch writes.
    """
    try:
        # Opening a pipe would wait for its writer, so look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: not a regular file, so it cannot be a weights file")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            return read_torch_region(descriptor, str(path), 0, status.st_size, known), status
        finally:
            os.close(descriptor)
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error


def read_torch_region(
    descriptor: int, where: str, offset: int, size: int, known: Mapping[str, Known]
) -> TorchObject:
    """Read what ``torch.save`` wrote into a region of an open file, all but its storages.

    Parameters
    ----------
    descriptor : int
        Of a regular file.
    where : str
        What to call the region in errors.
    offset, size : int
        The region, in bytes.
    known : mapping of str to Known
        What its pickle may name besides plain tensors: see `load_pickle`.

    Returns
    -------
    TorchObject
        With offsets in the whole file.

    Raises
    ------
    SourceError
        If the region is not exactly what torch writes.
    OSError
        If it cannot be read.
    """
    archive = read_torch_zip(descriptor, where, offset, size)
    byteorder = archive.records.get("byteorder", b"little")
    if byteorder != b"little":
        raise SourceError(
            f"{where}: written with byte order {shown(byteorder)}; save it anew on a little-endian "
            "machine"
        )
    if PICKLE not in archive.records:
        raise SourceError(f"{where}: an archive without {PICKLE}; save it anew with torch.save")
    value = load_pickle(
        archive.records[PICKLE], where, {**_TENSORS, **known}, _storage_finder(archive.storages)
    )
    return TorchObject(value, tuple(archive.storages.values()), tuple(archive.literals))


def are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    """Return whether a value from a file is a shape, strides or the like: few, none negative."""
    return (
        type(value) is tuple
        and len(value) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _MAX_INTEGER for size in value)
    )


class _Storage(NamedTuple):
    """A storage as the pickle has it; of `dtype` None if its tensors say which."""

    dtype: DType | None
    span: Span


def _storage_finder(storages: Mapping[str, Span]) -> Callable[[object], _Storage]:
    def find(identity: object) -> _Storage:
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise ValueError(f"it points to {shown(identity)}, which is no storage")
        _, kind, key, _, count = identity
        if type(kind) is not Known or kind not in _STORAGE_DTYPES:
            raise ValueError(f"it has a storage of type {shown(kind)}")
        dtype = _STORAGE_DTYPES[kind]
        span = storages.get(key) if type(key) is str else None
        if span is None or type(count) is not int:
            raise ValueError(f"storage {shown(key)} is not in the file")
        if count * (1 if dtype is None else dtype.itemsize) != span.nbytes:
            raise ValueError(f"storage {key} has {span.nbytes} bytes where {count} elements belong")
        return _Storage(dtype, span)

    return find


def _rebuild_tensor(args: tuple[object, ...]) -> StoredView:
    """Stand in for ``_rebuild_tensor_v2`` and ``_v3``, whose arguments these are."""
    if not 4 <= len(args) <= _MOST_ARGUMENTS or not isinstance(args[0], _Storage):
        raise ValueError("it has a tensor without a storage")
    storage, (begin, shape, strides), extra = args[0], args[1:4], args[6:]
    dtype = storage.dtype
    if dtype is None:  # _v3 names it
        named, extra = extra[:1], extra[1:]
        dtype = TORCH_DTYPES.get(named[0]) if named and type(named[0]) is Known else None
        if dtype is None:
            raise ValueError("it has a tensor without a dtype")
    if any(extra):
        raise ValueError("it has a tensor that is conjugated or negated lazily")
    if type(begin) is not int or begin < 0 or not are_sizes(shape) or not are_sizes(strides):
        raise ValueError(f"it has a tensor of shape {shown(shape)}, strides {shown(strides)}")
    return _view(dtype, storage.span, begin, shape, strides)


def _view(
    dtype: DType, span: Span, begin: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> StoredView:
    if len(shape) != len(strides):
        raise ValueError(f"it has a tensor of shape {shown(shape)}, strides {shown(strides)}")
    if 0 in shape:
        return StoredView(dtype, shape, span.offset, row_major=True)
    last, count, row_major = begin, 1, True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        last += (size - 1) * stride
        row_major = row_major and (size == 1 or stride == count)
        count *= size
    if (last + 1) * dtype.itemsize > span.nbytes:
        raise ValueError(f"a tensor of shape {shown(shape)} reaches out of its storage")
    return StoredView(dtype, shape, span.offset + begin * dtype.itemsize, row_major)


def _rebuild_parameter(args: tuple[object, ...]) -> object:
    return args[0] if args else None


def _refused(kind: str, remedy: str) -> Known:
    return Known(kind, refusal=f"holds {kind}, which are not read; {remedy}")


TORCH_DTYPES = {
    Known(f"torch.{name}"): DTYPES[code]
    for name, code in (
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        ("float32", "F32"),
        ("float64", "F64"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
        ("float8_e8m0fnu", "F8_E8M0"),
        ("int64", "I64"),
        ("int32", "I32"),
        ("int16", "I16"),
        ("int8", "I8"),
        ("uint64", "U64"),
        ("uint32", "U32"),
        ("uint16", "U16"),
        ("uint8", "U8"),
        ("bool", "BOOL"),
        ("complex64", "C64"),
    )
}
"""What a pickle names for a dtype, and which that is here."""

_STORAGE_DTYPES = {
    Known(name): None if code is None else DTYPES[code]
    for name, code in (
        ("torch.BFloat16Storage", "BF16"),
        ("torch.HalfStorage", "F16"),
        ("torch.FloatStorage", "F32"),
        ("torch.DoubleStorage", "F64"),
        ("torch.LongStorage", "I64"),
        ("torch.IntStorage", "I32"),
        ("torch.ShortStorage", "I16"),
        ("torch.CharStorage", "I8"),
        ("torch.ByteStorage", "U8"),
        ("torch.BoolStorage", "BOOL"),
        ("torch.ComplexFloatStorage", "C64"),
        ("torch.storage.UntypedStorage", None),
    )
}

_QUANTISED = _refused("quantised tensors", "dequantise the model and save it anew")
_SPARSE = _refused("sparse tensors", "make them dense and save them anew")

_TENSORS = {
    "collections.OrderedDict": ORDERED_DICT,
    "torch._utils._rebuild_tensor_v2": Known("tensor", make=_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Known("tensor", make=_rebuild_tensor),
    "torch._utils._rebuild_parameter": Known("parameter", make=_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": Known("parameter", make=_rebuild_parameter),
    "torch._utils._rebuild_qtensor": _QUANTISED,
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_meta_tensor_no_storage": _refused(
        "tensors without data", "save the model from the devices that hold it"
    ),
    "torch.Size": Known("torch.Size"),
    "torch.device": Known("torch.device"),
    **{f"torch.{name}Storage": _QUANTISED for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2")},
    **{known.name: known for known in (*TORCH_DTYPES, *_STORAGE_DTYPES)},
}
"""What pickles of plain tensors name."""
