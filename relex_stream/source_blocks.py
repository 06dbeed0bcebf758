"""Blocks of checkpoints as bits of the store's dtypes, from wherever in the files they lie.

A block is read from the runs of its tensor's pieces. `SourceBlocks` reads it whole, or says where
its runs are for the kernel that reads, compares and packs many steps in one call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from relex_stream.blocks import BlockOf, Blocks, Workspace
from relex_stream.matching import CheckpointPlaces
from relex_stream.patches import Patches
from relex_stream.pieces import Runs
from relex_stream.scan import FETCHED, Reads
from relex_stream.sources import CheckpointReader
from relex_stream.sources.reader import are_objects
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import FORMATS, Bits, narrow

_MOST_FILES = 64
"""Files that one call of the kernel holds open, where it may take fewer steps instead."""

_WIDE_BYTES = 4
"""Of an element that is cast."""


class SourceBlocks:
    """Blocks of some checkpoints of a run.

    Parameters
    ----------
    reader : CheckpointReader
    checkpoints : sequence of CheckpointPlaces
        Numbered from 0; matched to one store.
    patches : Patches, optional
        What those change that hold only what changed.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        checkpoints: Sequence[CheckpointPlaces],
        patches: Patches | None = None,
    ) -> None:
        self._reader = reader
        self._checkpoints = checkpoints
        self._patches = patches

    def read(
        self,
        at: BlockOf,
        index: int,
        out: Bits,
        workspace: Workspace,
        tensor: StoredTensor,
        before: Bits | None = None,
    ) -> None:
        """Read the block of a checkpoint's `tensor`: that of `at`, or another of its shape.

        Parameters
        ----------
        at : BlockOf
        index : int
            Number of the checkpoint.
        out : ndarray of unsigned int, shape (elements of `at`,)
            Bit patterns in the store's dtype; bytes of a constant.
        workspace : Workspace
        tensor : StoredTensor
        before : ndarray of unsigned int, shape (elements of `at`,), optional
            The bits at the checkpoint before; needed where `is_made_of_the_one_before`.

        Raises
        ------
        SourceError
            If a file cannot be read, or has changed.
        """
        places = self._checkpoints[index]
        if self.is_made_of_the_one_before(index, tensor):
            assert before is not None
            out[:] = before
            if self._patches is not None and self._patches.changes(index, tensor):
                self._patches.apply(index, at, out, workspace)
        elif places.is_cast[tensor.index]:
            wide = workspace.array("wide source", at.elements, np.uint32)
            self._fill(at, places, tensor, wide)
            narrow(wide, FORMATS["F32"], FORMATS[tensor.dtype.code], out)
        else:
            self._fill(at, places, tensor, out)

    def is_made_of_the_one_before(self, index: int, tensor: StoredTensor) -> bool:
        """Say whether a checkpoint holds at most changes of a tensor."""
        places = self._checkpoints[index]
        return places.patch is not None and not places.table.holds(tensor.index)

    def copies(self, at: BlockOf, index: int, workspace: Workspace) -> Iterator[tuple[int, Bits]]:
        """Yield what a checkpoint holds of a block once more: its first element, and the bits.

        Each is valid until the next.
        """
        places = self._checkpoints[index]
        if places.copies is None:
            return
        itemsize = at.tensor.itemsize
        runs = places.copies.runs(at.tensor.index, at.start, at.start + at.elements, itemsize)
        for file, offset, first, elements in _each(runs):
            bits = workspace.array("copy", elements, np.dtype(f"u{itemsize}"))
            self._reader.read(places.files[file], offset, bits.view(np.uint8))
            yield first, bits

    def has_copies(self, tensor: StoredTensor) -> bool:
        """Say whether some checkpoint holds parts of a tensor once more."""
        return any(
            places.copies is not None and places.copies.holds(tensor.index)
            for places in self._checkpoints
        )

    def path_of(self, tensor: StoredTensor, index: int) -> str:
        """Return what holds a tensor in a checkpoint, a file or its directory, for messages."""
        places = self._checkpoints[index]
        file, _ = places.table.first_place(tensor.index)
        return places.files[file] if file >= 0 else places.directory

    def advise(self, at: BlockOf, index: int) -> bool:
        """Ask the system for a block's bytes, as `CheckpointReader.advise` does."""
        places = self._checkpoints[index]
        itemsize = self._itemsize(places, at.tensor)
        runs = self._runs(at, places, at.tensor, itemsize)
        asked = [
            self._reader.advise(places.files[file], offset, elements * itemsize)
            for file, offset, _, elements in _each(runs)
        ]
        return any(asked)

    def kind_of(self, tensor: StoredTensor) -> Hashable:
        """Return a value that is equal for two tensors where they lie in the same files."""
        return int(self._classes[tensor.index])

    @cached_property
    def _classes(self) -> NDArray[np.int64]:
        """A number per tensor, equal for two that agree in files, and in what is cast."""
        classes: NDArray[np.int64] | None = None
        last: tuple[object, object] | None = None
        for places in self._checkpoints:
            if last is not None and last[0] is places.table and last[1] is places.is_cast:
                continue
            last = places.table, places.is_cast
            here = 2 * (places.table.file_class + 1) + places.is_cast
            # Two at a time: with hundreds of checkpoints, whole columns would be long to compare.
            pairs = here if classes is None else classes * (int(here.max()) + 1) + here
            classes = np.unique(pairs, return_inverse=True)[1]
        assert classes is not None
        return classes

    def steps_at_a_time(self, at: Blocks) -> int:
        """Return how many checkpoints `lent` may take of some blocks, at least 1."""
        if are_objects(self._checkpoints[0].files):
            return 1  # each is read into memory first
        if any(places.patch is not None for places in self._checkpoints):
            return 1  # each is made of the one before
        most = max(
            len(places.table.files_of(at.blocks[0].tensor.index)) for places in self._checkpoints
        )
        return max(1, min(_MOST_FILES, self._reader.max_open) // max(1, most))

    @contextmanager
    def lent(
        self, at: Blocks, low: int, high: int, workspace: Workspace, before: Bits
    ) -> Iterator[Reads]:
        """Say where blocks lie in the checkpoints ``low : high``, their files open for it.

        All blocks lie in the same files (`kind_of`). Where the files of one checkpoint are more
        than may be open, or on object storage, what they hold is read first; and what is changed of
        the checkpoint before is made first, of the bits `before`.

        Yields
        ------
        Reads
            Valid inside the ``with`` block.
        """
        checkpoints = self._checkpoints[low:high]
        is_cast = np.array([bool(p.is_cast[at.blocks[0].tensor.index]) for p in checkpoints])
        if self.is_made_of_the_one_before(low, at.blocks[0].tensor):
            assert high - low == 1, "each is made of the one before"
            yield self._made(at, low, workspace, before)
            return
        bounds, number, offset, nbytes, paths = self._where(at, checkpoints)
        if len(paths) > self._reader.max_open or are_objects(paths):
            fetched = workspace.array("fetched", int(nbytes.sum()), np.uint8)
            done = np.cumsum([0, *nbytes])
            for run, start in enumerate(done[:-1].tolist()):
                here = fetched[start : start + int(nbytes[run])]
                self._reader.read(paths[number[run]], int(offset[run]), here)
            nowhere = np.full(number.size, FETCHED, np.int32)
            yield Reads(np.zeros(0, np.int32), bounds, nowhere, done[:-1], nbytes, is_cast, fetched)
            return
        with self._reader.borrow(paths) as descriptors:
            none = np.zeros(0, np.uint8)
            yield Reads(
                np.array(descriptors, np.int32), bounds, number, offset, nbytes, is_cast, none
            )

    def _made(self, at: Blocks, index: int, workspace: Workspace, before: Bits) -> Reads:
        """Return blocks of a checkpoint that are made of those before."""
        made = workspace.array("fetched", before.shape, before.dtype)
        for block, (low, high) in zip(at.blocks, pairwise(at.bounds.tolist()), strict=True):
            self.read(
                block, index, made[low:high], workspace, block.tensor, before=before[low:high]
            )
        starts = at.bounds * made.itemsize
        return Reads(
            descriptors=np.zeros(0, np.int32),
            bounds=np.arange(len(at.blocks) + 1, dtype=np.int64),
            file=np.full(len(at.blocks), FETCHED, np.int32),
            offset=starts[:-1],
            nbytes=np.diff(starts),
            is_cast=np.zeros(1, np.bool_),
            fetched=made.view(np.uint8),
        )

    def _where(
        self, at: Blocks, checkpoints: Sequence[CheckpointPlaces]
    ) -> tuple[
        NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], list[str]
    ]:
        """Return bounds, files, offsets and bytes of runs, block by block, and the files' paths."""
        indices = [block.tensor.index for block in at.blocks]
        if all(places.table.are_whole[indices].all() for places in checkpoints):
            return self._where_whole(at, indices, checkpoints)
        paths: dict[str, int] = {}
        numbers: list[NDArray[np.int32]] = []
        pieces: list[Runs] = []
        sizes: list[NDArray[np.int64]] = []
        for block in at.blocks:
            for places in checkpoints:
                itemsize = self._itemsize(places, block.tensor)
                runs = self._runs(block, places, block.tensor, itemsize)
                of_file = {
                    file: paths.setdefault(places.files[file], len(paths))
                    for file in dict.fromkeys(runs.file.tolist())
                }
                numbers.append(np.array([of_file[f] for f in runs.file.tolist()], np.int32))
                pieces.append(runs)
                sizes.append(runs.elements * itemsize)
        bounds = np.cumsum([0, *(size.size for size in sizes)], dtype=np.int64)
        offset = np.concatenate([runs.offset for runs in pieces])
        return bounds, np.concatenate(numbers), offset, np.concatenate(sizes), list(paths)

    def _where_whole(
        self, at: Blocks, indices: list[int], checkpoints: Sequence[CheckpointPlaces]
    ) -> tuple[
        NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], list[str]
    ]:
        """As `_where`, of tensors that lie in one run each: in columns, for strips of hundreds."""
        steps = len(checkpoints)
        starts = np.array([block.start for block in at.blocks], np.int64)
        elements = np.array([block.elements for block in at.blocks], np.int64)
        itemsizes = np.array([self._itemsize(p, at.blocks[0].tensor) for p in checkpoints])
        offset = np.stack(
            [places.table.offset[places.table.bounds[indices]] for places in checkpoints], axis=1
        )
        offset += starts[:, None] * itemsizes
        # All blocks lie in the same file of a checkpoint.
        paths = [places.files[places.table.first_place(indices[0])[0]] for places in checkpoints]
        return (
            np.arange(offset.size + 1, dtype=np.int64),
            np.tile(np.arange(steps, dtype=np.int32), len(at.blocks)),
            offset.reshape(-1),
            (elements[:, None] * itemsizes).reshape(-1),
            paths,
        )

    @staticmethod
    def _itemsize(places: CheckpointPlaces, tensor: StoredTensor) -> int:
        return _WIDE_BYTES if places.is_cast[tensor.index] else tensor.itemsize

    @staticmethod
    def _runs(at: BlockOf, places: CheckpointPlaces, tensor: StoredTensor, itemsize: int) -> Runs:
        return places.table.runs(tensor.index, at.start, at.start + at.elements, itemsize)

    def _fill(
        self,
        at: BlockOf,
        places: CheckpointPlaces,
        tensor: StoredTensor,
        out: Bits,
    ) -> None:
        for file, offset, first, elements in _each(self._runs(at, places, tensor, out.itemsize)):
            here = out[first : first + elements].view(np.uint8)
            self._reader.read(places.files[file], offset, here)


def _each(runs: Runs) -> Iterator[tuple[int, int, int, int]]:
    """Yield file, offset, first element and number of elements of each run."""
    return zip(*(column.tolist() for column in runs), strict=True)
