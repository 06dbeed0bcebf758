"""What the ``.metadata`` of a PyTorch distributed checkpoint says, without torch.

It is a pickle of dataclasses of ``torch.distributed.checkpoint.metadata``: for each tensor its
dtype, shape and chunks, and for each chunk a region of a file. Their fields are the same from torch
2.4 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import SourceError
from ..paths import check_relative_path
from ..specs import Box, DType
from .pickles import MAX_PICKLE_BYTES, ORDERED_DICT, Known, Made, load_pickle
from .strict_json import shown
from .torch_file import TORCH_DTYPES, are_sizes

METADATA = ".metadata"


class Region(NamedTuple):
    """A run of bytes of a file: its path relative to the checkpoint's, offset and length."""

    relative_path: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + self.length


class SavedTensor(NamedTuple):
    """A tensor as the metadata has it: each of its chunks with the region that holds it."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: dict[Box, Region]


class DcpMetadata(NamedTuple):
    """Tensors by key, and the regions of everything that is not a tensor."""

    tensors: dict[str, SavedTensor]
    other: tuple[Region, ...]


def read_metadata(directory: Path) -> DcpMetadata:
    """Read the metadata of a checkpoint.

    Parameters
    ----------
    directory : Path
        The checkpoint's, which has a ``.metadata``.

    Returns
    -------
    DcpMetadata
        Paths in it stay inside the directory. Whether the files are there, and hold what it says,
        is not looked at.

    Raises
    ------
    SourceError
        If it cannot be read, or is not what torch writes.
    """
    path = directory / METADATA
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise SourceError(
                f"{path}: {size} bytes, more than the {MAX_PICKLE_BYTES} that are read; save the "
                "model apart from its optimizer"
            )
        data = path.read_bytes()
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    made = load_pickle(data, str(path), _KNOWN)
    try:
        return _take_apart(made)
    except ValueError as error:
        raise SourceError(f"{path}: {error}; copy it again or save the checkpoint anew") from None


def _take_apart(made: object) -> DcpMetadata:
    """Return what the metadata says; raises ValueError with a clause that says what is wrong."""
    entries = _field(made, _METADATA, "state_dict_metadata")
    stored = _field(made, _METADATA, "storage_data")
    if type(entries) is not dict or type(stored) is not dict:
        raise ValueError("it does not say what is stored and where")
    regions: dict[tuple[str, object], Region] = {}
    for index, info in stored.items():
        key, offset = _field(index, _INDEX, "fqn"), _field(index, _INDEX, "offset")
        if type(key) is not str:
            raise ValueError(f"it has an entry called {shown(key)}")
        regions[key, None if offset is None else _size(offset)] = _region(key, info)
    tensors: dict[str, SavedTensor] = {}
    for key, entry in entries.items():
        if type(key) is not str or not key or "\0" in key:
            raise ValueError(f"it has an entry called {shown(key)}")
        if isinstance(entry, Made) and entry.by is _BYTES:
            continue
        try:
            tensors[key] = _tensor(key, entry, regions)
        except ValueError as error:
            raise ValueError(f"tensor {shown(key)}: {error}") from None
    return DcpMetadata(
        tensors,
        tuple(region for (key, _), region in regions.items() if key not in tensors),
    )


def _tensor(key: str, entry: object, regions: Mapping[tuple[str, object], Region]) -> SavedTensor:
    properties = _field(entry, _TENSOR, "properties")
    state = properties.state if isinstance(properties, Made) else None
    named = state[0] if type(state) is tuple and state else None
    dtype = TORCH_DTYPES.get(named) if isinstance(named, Known) else None
    if dtype is None:
        raise ValueError(f"its dtype is {shown(named)}")
    parts = _field(entry, _TENSOR, "chunks")
    if type(parts) is not list:
        raise ValueError("it has no chunks")
    chunks: dict[Box, Region] = {}
    for part in parts:
        box = Box(_size(_field(part, _CHUNK, "offsets")), _size(_field(part, _CHUNK, "sizes")))
        region = regions.get((key, box.start))
        if region is None:
            raise ValueError(f"its part at {list(box.start)} is in no file")
        chunks[box] = region
    return SavedTensor(dtype, _size(_field(entry, _TENSOR, "size")), chunks)


def _region(key: str, info: object) -> Region:
    path = _field(info, _STORAGE_INFO, "relative_path")
    offset = _field(info, _STORAGE_INFO, "offset")
    length = _field(info, _STORAGE_INFO, "length")
    transforms = _field(info, _STORAGE_INFO, "transform_descriptors")
    if transforms:
        raise ValueError(
            f"{shown(key)} was written through {shown(transforms)}, which is not read: save it "
            "without extensions of the writer"
        )
    if type(path) is not str or not are_sizes((offset, length)):
        raise ValueError(f"{shown(key)} has no place in a file")
    assert isinstance(offset, int)
    assert isinstance(length, int)
    return Region(check_relative_path(path), offset, length)


def _field(value: object, kind: Known, name: str) -> object:
    """Return a field of an object of this kind, None where it has none."""
    if not isinstance(value, Made) or value.by is not kind:
        raise ValueError(f"{shown(value)} is where a {kind.name} belongs")
    return value.get(name)


def _size(value: object) -> tuple[int, ...]:
    """Return a torch.Size as a tuple."""
    size = value.args[0] if isinstance(value, Made) and value.by is _SIZE and value.args else None
    if not are_sizes(size):
        raise ValueError(f"{shown(value)} is where a size belongs")
    return size


_METADATA = Known("Metadata")
_TENSOR = Known("TensorStorageMetadata")
_BYTES = Known("BytesStorageMetadata")
_CHUNK = Known("ChunkStorageMetadata")
_INDEX = Known("MetadataIndex")
_STORAGE_INFO = Known("_StorageInfo")
_SIZE = Known("torch.Size")

_KNOWN: dict[str, Known] = {
    "collections.OrderedDict": ORDERED_DICT,
    "torch.Size": _SIZE,
    "torch.serialization._get_layout": Known("layout"),
    "torch.distributed.checkpoint.filesystem._StorageInfo": _STORAGE_INFO,
    **{
        f"torch.distributed.checkpoint.metadata.{known.name}": known
        for known in (
            *(_METADATA, _TENSOR, _BYTES, _CHUNK, _INDEX),
            *map(Known, ("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        )
    },
    # Where the checkpoint was when it was written, which does not matter.
    **{
        f"{module}.{name}": Known(name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{dtype.name: dtype for dtype in TORCH_DTYPES},
}
