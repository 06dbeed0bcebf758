"""Small frozen descriptions shared by all modules: dtypes, tensors, blocks, files, checkpoints.

Nothing here opens a file or does arithmetic on weights; everything can be pickled into a task.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

STEP_GROUP = 16
"""Steps per zarr chunk: the store's step axis is allocated in whole groups of this many."""

BLOCK_BYTES = 2 << 20
"""Bytes of one block of one step: 1 Mi elements of a 16-bit dtype, 512 Ki of a 32-bit one."""


@dataclass(frozen=True)
class DType:
    """A safetensors dtype: its code, bytes per element, and whether weights of it are tracked.

    Tracked dtypes have deltas in the store; tensors of every other dtype must stay constant.
    """

    code: str
    itemsize: int
    tracked: bool = False


DTYPES = {
    dtype.code: dtype
    for dtype in (
        DType("BF16", 2, tracked=True),
        DType("F16", 2, tracked=True),
        DType("F32", 4, tracked=True),
        DType("F64", 8),
        DType("F8_E4M3", 1),
        DType("F8_E5M2", 1),
        DType("F8_E8M0", 1),
        DType("I64", 8),
        DType("I32", 4),
        DType("I16", 2),
        DType("I8", 1),
        DType("U64", 8),
        DType("U32", 4),
        DType("U16", 2),
        DType("U8", 1),
        DType("BOOL", 1),
        DType("C64", 8),
    )
}
"""Every dtype a safetensors header may name here, by code."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a checkpoint: dtype and shape, no place."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class Box(NamedTuple):
    """A part of a tensor: in each dimension the first index and how many from there on.

    Of a 0-d tensor both are empty.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """Where a part of a tensor lies: its elements in row-major order, without gaps, in one file."""

    path: str
    offset: int
    box: Box


class TensorPlace(NamedTuple):  # a dataclass takes six times as long to make, and they are many
    """Where a tensor's bytes lie: a file of a checkpoint and an absolute byte offset in it.

    A tensor that trainers have split lies in ``pieces``: boxes that cover it, none overlapping
    another, empty ones left out. `path` and `offset` are then those of the first. Without pieces
    all of it lies there in row-major order.
    """

    spec: TensorSpec
    path: str
    offset: int
    pieces: tuple[Piece, ...] = ()


class FilePart(NamedTuple):
    """A run of bytes of a weights file: literal bytes, or a tensor or a part of it.

    Exactly one of ``literal`` and ``tensor`` is set; a file is the concatenation of its parts.
    ``box`` is the part of the tensor, None for all of it.
    """

    literal: bytes | None = None
    tensor: str | None = None
    box: Box | None = None


@dataclass(frozen=True)
class WeightsFile:
    """A weights file taken apart: relative path, size in bytes, time of change, parts in order.

    ``parts`` is None where the file also holds what is not kept (the state of an optimizer), so
    that it cannot be put together again.
    """

    relative_path: str
    size: int
    modified_ns: int
    parts: tuple[FilePart, ...] | None


class PackedChange(NamedTuple):
    """Where the changes of a tensor lie packed, in a file of a checkpoint.

    ``digest`` is that of the tensor's bytes once they are made, as the feed tells it; empty where
    it does not.
    """

    path: str
    offset: int
    nbytes: int
    digest: bytes = b""


@dataclass(frozen=True)
class Patch:
    """How a checkpoint is made from the one before: what it does not tell of is as it was.

    Attributes
    ----------
    follows : int or None
        The step that it changes; None where that is not told: the one before in its directory.
    encoding : str
        How changes are packed: one of `relex_stream.unpacking.ENCODINGS`; "" where changed tensors
        are there whole.
    changes : dict of str to PackedChange
        By tensor, where each is packed on its own.
    together : PackedChange or None
        All of them in one, where they are not; its digest is that of the packed file.
    names : dict of str to str
        With ``together``: what it calls its tensors, and their names in the base.
    digest_kind : str
        The function that digests are of; "" where there are none.
    weights_digest : bytes
        Of all tensors, by their names, one behind the other; empty where it is not told.
    """

    follows: int | None
    encoding: str = ""
    changes: dict[str, PackedChange] = field(default_factory=dict)
    together: PackedChange | None = None
    names: dict[str, str] = field(default_factory=dict)
    digest_kind: str = ""
    weights_digest: bytes = b""


@dataclass(frozen=True)
class SourceCheckpoint:
    """An opened checkpoint directory (or the base, step 0): places of its tensors and its files.

    ``side_files`` are the other files to keep (config, tokenizer, ...), relative to ``directory``;
    ``skipped_files`` were left out on purpose (optimizer state and the like). ``copies`` are
    further pieces that hold parts of tensors once more (replicas of ranks), and are part of the
    files: they must hold the same bits as ``tensors``. With a ``patch`` the tensors are those that
    it has whole, and all others are as in the checkpoint before, but for what the patch changes.
    """

    step: int
    directory: str
    tensors: dict[str, TensorPlace]
    weights_files: tuple[WeightsFile, ...]
    side_files: tuple[str, ...]
    skipped_files: tuple[str, ...]
    copies: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    patch: Patch | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size for file in self.weights_files)

    @property
    def weights_paths(self) -> list[str]:
        """Paths of all weights files."""
        return [posixpath.join(self.directory, file.relative_path) for file in self.weights_files]


def joined_pieces(pieces: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Join pieces of files, each (path, offset, bytes), that follow each other there and here.

    Examples
    --------
    >>> joined_pieces([("a", 0, 5), ("a", 5, 3), ("a", 9, 1), ("b", 10, 1)])
    [('a', 0, 8), ('a', 9, 1), ('b', 10, 1)]
    """
    joined: list[tuple[str, int, int]] = []
    for path, offset, nbytes in pieces:
        last_path, start, size = joined[-1] if joined else ("", 0, 0)
        if last_path == path and start + size == offset:
            joined[-1] = (path, start, size + nbytes)
        else:
            joined.append((path, offset, nbytes))
    return joined


class Progress(Protocol):
    """What long work tells its caller; called from the thread that started the work only."""

    def note(self, text: str) -> None:
        """Say something that is not progress: one line."""

    def start(self, stage: str, total_bytes: int) -> None:
        """Begin a stage that will handle `total_bytes`; 0 where there are none to count."""

    def advance(self, done_bytes: int) -> None:
        """Report that `done_bytes` more were handled."""

    def finish(self) -> None:
        """End the stage begun last."""


class NoProgress:
    """A `Progress` that says nothing."""

    def note(self, text: str) -> None:
        """Ignore."""

    def start(self, stage: str, total_bytes: int) -> None:
        """Ignore."""

    def advance(self, done_bytes: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
