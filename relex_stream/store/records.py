"""The immutable records of a store, and HEAD, as bytes.

A record is a safetensors file: columns of numbers as tensors, everything else as one JSON text in
its metadata. HEAD is a small JSON file that names the manifest and every committed record by name
and CRC-32C; what HEAD does not name does not exist.
"""

from __future__ import annotations

import json
import math
import posixpath
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from relex_stream.errors import CorruptionError, StoreError
from relex_stream.specs import DTYPES, STEP_GROUP, Box, DType

NEWEST_FORMAT = 2
"""The newest store format this version reads. It writes the oldest that has what is needed: 2 adds
files made of parts of tensors."""

MAX_STEP = (1 << 53) - 1
"""Largest step: every one up to here is exact in float64 and in JSON."""

MAX_BLOCK_BYTES = 1 << 30
"""Largest block of a store; positions in a block are 32-bit."""

_METADATA_KEY = "relex_stream"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the store keeps it.

    Attributes
    ----------
    name : str
    kind : str
        ``"tracked"`` (has deltas), ``"constant"`` (never changes; blocks are of bytes) or
        ``"tied"`` (bits equal those of the tensor `tied_to`; keeps nothing of its own).
    base_dtype, dtype : DType
        In the base, and in the checkpoints (the base widens to it exactly).
    shape : tuple of int
    tied_to : str or None
    index : int
        Position in the per-tensor columns of records.
    first_block, blocks : int
        Its part of the per-block columns of records.
    block_elements : int
        Elements of each block but perhaps the last.
    sketch_row : int
        Row in the sketch columns of records; -1 without a sketch.
    """

    name: str
    kind: str
    base_dtype: DType
    dtype: DType
    shape: tuple[int, ...]
    tied_to: str | None
    index: int
    first_block: int
    blocks: int
    block_elements: int
    sketch_row: int

    @cached_property
    def itemsize(self) -> int:
        """Bytes per stored element (constants are stored as bytes)."""
        return 1 if self.kind == "constant" else self.dtype.itemsize

    @cached_property
    def base_itemsize(self) -> int:
        """Bytes per stored element in the base's files."""
        return 1 if self.kind == "constant" else self.base_dtype.itemsize

    @cached_property
    def elements(self) -> int:
        """Stored elements: weights, or bytes of a constant."""
        weights = math.prod(self.shape)
        return weights * self.dtype.itemsize if self.kind == "constant" else weights

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the elements ``start, stop`` of the tensor's block number `block`."""
        start = block * self.block_elements
        return start, min(self.elements, start + self.block_elements)


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: its content as the name of one blob, or a recipe for it.

    A recipe is a blob of JSON that names what the file is made of, in order: blobs, tensors, parts
    of tensors, and, where the entry has a blob too, runs of the bytes packed in it.
    """

    path: str
    size: int
    blob: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.blob is None and self.recipe is None:
            raise ValueError(f"file {self.path} has neither blob nor recipe")

    @property
    def format(self) -> int:
        """The oldest store format that has such entries."""
        return 1 if self.blob is None or self.recipe is None else 2


class RecipePart(NamedTuple):
    """A run of bytes of a file: of a tensor, a box of it, a whole blob, or of the entry's own blob.

    One of ``tensor``, ``blob`` and ``nbytes`` is set; ``box`` may be with a tensor.
    """

    tensor: str | None = None
    box: Box | None = None
    blob: str | None = None
    nbytes: int | None = None
    """Of the bytes packed in the entry's own blob, from where the part before ended."""

    def encode(self) -> list[Any]:
        """Return it as JSON has it."""
        if self.nbytes is not None:
            return ["literal", self.nbytes]
        if self.blob is not None:
            return ["blob", self.blob]
        return ["tensor", self.tensor, *map(list, self.box or ())]

    @classmethod
    def decode(cls, part: list[Any]) -> RecipePart:
        """Read one.

        Raises
        ------
        ValueError
            If it is none.
        """
        match part:
            case ["blob", str(name)]:
                return cls(blob=name)
            case ["literal", int(nbytes)] if nbytes >= 0:
                return cls(nbytes=nbytes)
            case ["tensor", str(name)]:
                return cls(tensor=name)
            case ["tensor", str(name), list(start), list(shape)] if len(start) == len(shape):
                if all(type(number) is int and number >= 0 for number in start + shape):
                    return cls(tensor=name, box=Box(tuple(start), tuple(shape)))
        raise ValueError("unknown kind of part")


def pack_literals(literals: bytes) -> bytes:
    """Return what an entry's own blob holds of bytes: a zlib stream.

    Examples
    --------
    >>> unpack_literals(pack_literals(b"PK" * 1000), 2000) == b"PK" * 1000
    True
    """
    return zlib.compress(literals)


def unpack_literals(packed: bytes, nbytes: int) -> bytes:
    """Return the bytes that were packed, of which there must be `nbytes`.

    No more memory than for these is taken.

    Raises
    ------
    ValueError
        If there are others.
    """
    stream = zlib.decompressobj()
    try:
        # One more than are wanted: 0 would mean all.
        data = stream.decompress(packed, nbytes + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(data) != nbytes or not stream.eof or stream.unused_data:
        raise ValueError(f"it does not hold {nbytes} bytes")
    return data


@dataclass(frozen=True)
class Manifest:
    """What all steps of a store share; written once, with the first commit."""

    tensors: tuple[StoredTensor, ...]
    block_bytes: int
    seed: int
    sketch_width: int
    base_hint: str
    base_files: tuple[FileEntry, ...]
    base_crc: NDArray[np.uint32]
    """CRC-32C of each block's bytes in the base."""
    base_included: bool
    base_frame_bytes: NDArray[np.uint32]
    """Bytes of each block's frame of base weights in the store; all 0 without them."""

    @property
    def blocks(self) -> int:
        """Blocks of all tensors."""
        return int(self.base_crc.size)


@dataclass(frozen=True)
class Commit:
    """One committed step.

    Attributes
    ----------
    frame_bytes, frame_crc, changed, source_crc : ndarray of uint32, shape (blocks,)
        Per block: bytes and CRC-32C of its frame (0: none), changed elements, CRC-32C of the
        source's bytes.
    change_sq, delta_sq : ndarray of float64, shape (tensors,)
        ``|D_t|^2`` and ``|M_t|^2`` per tensor.
    sketch : ndarray of float16, shape (sketched tensors, width)
    sketch_scale : ndarray of float32, shape (sketched tensors,)
    """

    step: int
    row: int
    previous: str
    """Name of the record before it (the manifest's for the first)."""
    source: str
    source_bytes: int
    files: tuple[FileEntry, ...]
    nonfinite: bool
    """Whether the step holds values that are not finite where the base is."""
    frame_bytes: NDArray[np.uint32]
    frame_crc: NDArray[np.uint32]
    changed: NDArray[np.uint32]
    source_crc: NDArray[np.uint32]
    change_sq: NDArray[np.float64]
    delta_sq: NDArray[np.float64]
    sketch: NDArray[np.float16]
    sketch_scale: NDArray[np.float32]

    @property
    def format(self) -> int:
        """The oldest store format that has such a commit."""
        return _format_of(self.files)


@dataclass(frozen=True)
class RecordName:
    """Where a record is and the CRC-32C of its bytes."""

    path: str
    crc32c: int


@dataclass(frozen=True)
class Head:
    """What exists: the manifest and the committed steps with their records, in row order.

    ``fence`` makes it differ from every HEAD before, on object storage, once something was taken
    away there.
    """

    manifest: RecordName
    steps: tuple[int, ...]
    commits: tuple[RecordName, ...]
    format: int = 1
    fence: str | None = None


def _format_of(files: Iterable[FileEntry]) -> int:
    return max((entry.format for entry in files), default=1)


def record_name(stem: str, data: bytes) -> RecordName:
    """Name a record by its content, so that no record is ever written over another."""
    crc = google_crc32c.value(data)
    return RecordName(f"commits/{stem}-{crc:08x}.safetensors", crc)


def _encode_record(metadata: dict[str, Any], columns: dict[str, NDArray[Any]]) -> bytes:
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return safetensors.numpy.save(columns, {_METADATA_KEY: text})


def _decode_record(data: bytes, what: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        columns = safetensors.numpy.load(data)
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA_KEY])
        version = metadata.get("format")
    except (
        SafetensorError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise CorruptionError(f"{what} is not a record of a relex-stream store: {error}") from error
    check_version(version, what)
    return metadata, columns


def check_version(version: object, what: str) -> None:
    """Refuse formats this version does not know.

    Raises
    ------
    StoreError
        If `version` is newer than `NEWEST_FORMAT` or no version at all.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"{what} names no store format; it is not part of a relex-stream store")
    if version > NEWEST_FORMAT:
        raise StoreError(
            f"{what} has store format {version}, this version reads up to {NEWEST_FORMAT}; "
            "install a newer relex-stream"
        )


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as a record."""
    tensors = [
        {
            "name": tensor.name,
            "kind": tensor.kind,
            "base_dtype": tensor.base_dtype.code,
            "dtype": tensor.dtype.code,
            "shape": list(tensor.shape),
            "tied_to": tensor.tied_to,
            "sketch_row": tensor.sketch_row,
        }
        for tensor in manifest.tensors
    ]
    metadata = {
        "format": _format_of(manifest.base_files),
        "tensors": tensors,
        "block_bytes": manifest.block_bytes,
        "step_group": STEP_GROUP,
        "seed": manifest.seed,
        "sketch_width": manifest.sketch_width,
        "base_hint": manifest.base_hint,
        "base_files": [asdict(entry) for entry in manifest.base_files],
        "base_included": manifest.base_included,
    }
    columns = {"base_crc": manifest.base_crc, "base_frame_bytes": manifest.base_frame_bytes}
    return _encode_record(metadata, columns)


def place_tensors(
    descriptions: list[dict[str, Any]], block_bytes: int
) -> tuple[tuple[StoredTensor, ...], int]:
    """Return tensors with their numbers and places in the tables, and the number of blocks."""
    tensors = []
    first_block = 0
    for index, described in enumerate(descriptions):
        kind = described["kind"]
        dtype = DTYPES[described["dtype"]]
        shape = tuple(described["shape"])
        block_elements = block_bytes // (1 if kind == "constant" else dtype.itemsize)
        elements = math.prod(shape) * (dtype.itemsize if kind == "constant" else 1)
        blocks = 0 if kind == "tied" else -(-elements // block_elements)
        tensors.append(
            StoredTensor(
                name=described["name"],
                kind=kind,
                base_dtype=DTYPES[described["base_dtype"]],
                dtype=dtype,
                shape=shape,
                tied_to=described["tied_to"],
                index=index,
                first_block=first_block,
                blocks=blocks,
                block_elements=block_elements,
                sketch_row=described["sketch_row"],
            )
        )
        first_block += blocks
    return tuple(tensors), first_block


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest.

    Raises
    ------
    CorruptionError, StoreError
        If it is damaged, or of a newer format.
    """
    metadata, columns = _decode_record(data, "the manifest")
    try:
        if metadata["step_group"] != STEP_GROUP:
            raise ValueError(f"step group {metadata['step_group']}")
        block_bytes = metadata["block_bytes"]
        if not 8 <= block_bytes <= MAX_BLOCK_BYTES or block_bytes % 8:
            raise ValueError(f"blocks of {block_bytes} bytes")
        tensors, blocks = place_tensors(metadata["tensors"], metadata["block_bytes"])
        manifest = Manifest(
            tensors=tensors,
            block_bytes=metadata["block_bytes"],
            seed=metadata["seed"],
            sketch_width=metadata["sketch_width"],
            base_hint=metadata["base_hint"],
            base_files=tuple(FileEntry(**entry) for entry in metadata["base_files"]),
            base_crc=columns["base_crc"],
            base_included=metadata["base_included"],
            base_frame_bytes=columns["base_frame_bytes"],
        )
        if manifest.base_crc.shape != (blocks,) or manifest.base_frame_bytes.shape != (blocks,):
            raise ValueError("columns do not match the tensors")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"the manifest is damaged: {error}") from error
    return manifest


def encode_commit(commit: Commit) -> bytes:
    """Return a commit as a record."""
    metadata = {
        "format": commit.format,
        "step": commit.step,
        "row": commit.row,
        "previous": commit.previous,
        "source": commit.source,
        "source_bytes": commit.source_bytes,
        "files": [asdict(entry) for entry in commit.files],
        "nonfinite": commit.nonfinite,
    }
    names = (
        "frame_bytes",
        "frame_crc",
        "changed",
        "source_crc",
        "change_sq",
        "delta_sq",
        "sketch",
        "sketch_scale",
    )
    return _encode_record(metadata, {name: getattr(commit, name) for name in names})


def decode_commit(data: bytes, manifest: Manifest, what: str) -> Commit:
    """Read a commit and check that its columns fit the manifest.

    Raises
    ------
    CorruptionError
        If it is damaged.
    """
    metadata, columns = _decode_record(data, what)
    try:
        commit = Commit(
            step=metadata["step"],
            row=metadata["row"],
            previous=metadata["previous"],
            source=metadata["source"],
            source_bytes=metadata["source_bytes"],
            files=tuple(FileEntry(**entry) for entry in metadata["files"]),
            nonfinite=metadata["nonfinite"],
            **columns,
        )
        tensors = len(manifest.tensors)
        sketched = sum(tensor.sketch_row >= 0 for tensor in manifest.tensors)
        shapes = {
            "frame_bytes": (manifest.blocks,),
            "frame_crc": (manifest.blocks,),
            "changed": (manifest.blocks,),
            "source_crc": (manifest.blocks,),
            "change_sq": (tensors,),
            "delta_sq": (tensors,),
            "sketch": (sketched, manifest.sketch_width),
            "sketch_scale": (sketched,),
        }
        for name, shape in shapes.items():
            if getattr(commit, name).shape != shape:
                raise ValueError(f"column {name} does not match the tensors")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{what} is damaged: {error}") from error
    return commit


def encode_head(head: Head) -> bytes:
    """Return HEAD as bytes: JSON with a checksum of itself."""
    body: dict[str, Any] = {
        "format": head.format,
        "manifest": [head.manifest.path, head.manifest.crc32c],
        "commits": [
            [step, name.path, name.crc32c]
            for step, name in zip(head.steps, head.commits, strict=True)
        ],
    }
    if head.fence is not None:
        body["fence"] = head.fence
    body["crc32c"] = _body_crc(body)
    return (json.dumps(body, indent=1) + "\n").encode()


def decode_head(data: bytes) -> Head:
    """Read HEAD.

    Raises
    ------
    CorruptionError, StoreError
        If it is damaged, or of a newer format.
    """
    try:
        body = json.loads(data)
        crc = body.pop("crc32c")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptionError(f"HEAD of the store is damaged: {error}") from error
    check_version(body.get("format"), "the store")
    if crc != _body_crc(body):
        raise CorruptionError("HEAD of the store does not match its checksum")
    try:
        manifest, *names = (
            RecordName(str(path), int(crc))
            for path, crc in (body["manifest"], *(name for _, *name in body["commits"]))
        )
        steps = tuple(int(step) for step, *_ in body["commits"])
        fence = body.get("fence")
        if fence is not None and not isinstance(fence, str):
            raise ValueError("its fence is no text")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"HEAD of the store is damaged: {error}") from error
    if any(b <= a for a, b in pairwise((0, *steps, MAX_STEP + 1))):
        raise CorruptionError("HEAD of the store has steps out of order")
    for name in (manifest, *names):
        if posixpath.dirname(name.path) != "commits":
            raise CorruptionError(f"HEAD of the store names a record elsewhere: {name.path!r}")
    return Head(manifest, steps, tuple(names), body["format"], fence)


def _body_crc(body: dict[str, Any]) -> int:
    crc: int = google_crc32c.value(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    return crc
