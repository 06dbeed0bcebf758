"""The base's weights, from its directory or from the store, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from relex_stream.blocks import BlockOf, Blocks, Workspace, base_bits_dtype, frame_tools
from relex_stream.checksum import extend_each
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.listing import is_directory
from relex_stream.locations import Location, Url, joined, location
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import SourceCheckpoint, TensorPlace, joined_pieces
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.transfers import READING_BYTES
from relex_stream.ulp import Bits, advance


class BaseWeights:
    """The base's weights, from its directory or from the store, checked as they are read.

    Can be pickled: a copy opens the files anew, and refuses those that were changed meanwhile.

    Parameters
    ----------
    store : Store or None
        The store that has its checksums, or its weights; None while a new one is being built.
    checkpoint : SourceCheckpoint or None
        Its directory; None to read the frames in `store`.
    reader : CheckpointReader
        What the directory is read with.
    """

    def __init__(
        self,
        store: Store | None,
        checkpoint: SourceCheckpoint | None,
        reader: CheckpointReader,
    ) -> None:
        self._store = store
        self._reader = reader
        self._expected_crc = store.manifest.base_crc if store is not None else None
        self._places = checkpoint.tensors if checkpoint is not None else None
        self._directory = checkpoint.directory if checkpoint is not None else None
        if checkpoint is not None:
            reader.expect(checkpoint)

    @property
    def where(self) -> str:
        """Where the weights are, for messages."""
        if self._directory is not None:
            return self._directory
        assert self._store is not None
        return str(self._store.path)

    def __getstate__(self) -> tuple[Store | None, str | None, CheckpointReader]:
        return self._store, self._directory, self._reader

    def __setstate__(self, state: tuple[Store | None, str | None, CheckpointReader]) -> None:
        store, directory, reader = state
        checkpoint = open_checkpoint(location(directory), 0) if directory is not None else None
        self.__init__(store, checkpoint, reader)  # type: ignore[misc]

    def read(self, at: Blocks, workspace: Workspace) -> tuple[Bits, NDArray[np.uint32]]:
        """Return the base's bit patterns (in a buffer of `workspace`) and each block's CRC-32C.

        Raises
        ------
        SourceError
            If the base's files are not the ones the store was built over.
        CorruptionError
            If an included base is damaged.
        """
        dtype = base_bits_dtype(at.blocks[0].tensor)
        if self._places is not None:
            out = self._read_files(at, dtype, workspace, self._places)
        else:
            out = workspace.array("base", at.elements, dtype)
            for block, (low, high) in zip(at.blocks, pairwise(at.bounds), strict=True):
                self._decode_included(block, out[low:high], workspace)
        crcs = np.empty(len(at.blocks), np.uint32)
        extend_each(out.view(np.uint8), at.bounds * dtype.itemsize, crcs)
        if self._expected_crc is not None:
            for block, crc in zip(at.blocks, crcs.tolist(), strict=True):
                if crc != int(self._expected_crc[block.column]):
                    raise self._mismatch(block)
        return out, crcs

    def _read_files(
        self,
        at: Blocks,
        dtype: np.dtype[Any],
        workspace: Workspace,
        places: Mapping[str, TensorPlace],
    ) -> Bits:
        itemsize = dtype.itemsize
        pieces = joined_pieces(
            (place.path, place.offset + block.start * itemsize, block.elements * itemsize)
            for block in at.blocks
            for place in (places[block.tensor.name],)
        )
        out = workspace.array("base", at.elements, dtype, pieces[0][1])
        raw, done = out.view(np.uint8), 0
        for path, offset, nbytes in pieces:
            self._reader.read(path, offset, raw[done : done + nbytes])
            done += nbytes
        return out

    def _mismatch(self, at: BlockOf) -> SourceError | CorruptionError:
        if self._places is None:
            return CorruptionError(
                f"the base weights in {self.where} do not match their checksum: "
                f"tensor {at.tensor.name}, block {at.block}"
            )
        return SourceError(
            f"the base has changed: tensor {at.tensor.name} in "
            f"{self._places[at.tensor.name].path} is not what the store was "
            "built over; give the original with --base"
        )

    def advise(self, at: BlockOf) -> bool:
        """Ask the system for a block's bytes; say whether any of them had to be asked for.

        True also where nothing can be said.
        """
        if self._places is None:
            return True
        place = self._places[at.tensor.name]
        itemsize = at.tensor.base_itemsize
        return self._reader.advise(
            place.path, place.offset + at.start * itemsize, at.elements * itemsize
        )

    def holds(self, name: str) -> bool:
        """Say whether the base's directory has a tensor of this name."""
        return self._places is not None and name in self._places

    def in_file_order(self, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
        """Return tensors in the order of their bytes in the base's files: the order to work in."""
        if self._places is None:
            return sorted(tensors, key=lambda tensor: tensor.index)
        places = self._places
        return sorted(tensors, key=lambda t: (places[t.name].path, places[t.name].offset))

    def read_raw_crc(self, name: str, at: BlockOf, workspace: Workspace) -> int:
        """Return the CRC-32C of the block's range in another tensor of the same shape and dtype."""
        assert self._places is not None
        raw = workspace.array("tied", at.elements * at.tensor.base_itemsize, np.uint8)
        place = self._places[name]
        self._reader.read(place.path, place.offset + at.start * at.tensor.base_itemsize, raw)
        crc: int = google_crc32c.value(raw)
        return crc

    def _decode_included(self, at: BlockOf, out: Bits, workspace: Workspace) -> None:
        assert self._store is not None
        out[:] = 0
        frame = self._store.read_base_frame(at.tensor, at.block)
        if frame is None:
            return
        codec, changes = frame_tools(workspace, at.tensor.block_elements, out.itemsize)
        try:
            codec.decode(frame, at.elements, changes)
        except CorruptionError as error:
            raise CorruptionError(
                f"{self.where}: base weights of tensor {at.tensor.name}, block {at.block}: {error}"
            ) from error
        advance(out, changes.positions, changes.zigzags, changes.count)


def base_directory(store: Store, base: Location | None) -> Location | None:
    """Return where the base is read from: `base` if given, None if in the store, else the hint."""
    if base is not None:
        return base
    if store.manifest.base_included:
        return None
    return joined(store.path, store.manifest.base_hint)


def transfer_bytes(store: Store, base: Location | None) -> int:
    """Return what requests to object storage hold in memory, at most, to read store and base.

    0 where both are on this machine; `base` as in `base_directory`.
    """
    from_url = isinstance(base_directory(store, base), Url)
    return store.storage.reading_bytes + (READING_BYTES if from_url else 0)


def open_base(store: Store, base: Location | None, reader: CheckpointReader) -> BaseWeights:
    """Return the base of a store: at `base` if given, else in the store, else where it was.

    Raises
    ------
    SourceError
        If it is not there, or is another model.
    """
    directory = base_directory(store, base)
    if directory is None:
        return BaseWeights(store, None, reader)
    if not is_directory(directory):
        origin = (
            "given with --base" if base is not None else "where it was when the store was built"
        )
        raise SourceError(f"no base at {directory} ({origin}); give its directory with --base")
    checkpoint = open_checkpoint(directory, 0)
    check_base_layout(store, checkpoint)
    return BaseWeights(store, checkpoint, reader)


def check_base_layout(store: Store, checkpoint: SourceCheckpoint) -> None:
    """Check that a directory has the tensors the store's base had.

    Raises
    ------
    SourceError
        Naming the first tensor that is missing or different.
    """
    for tensor in store.manifest.tensors:
        if tensor.kind == "tied":
            continue
        place = checkpoint.tensors.get(tensor.name)
        if place is None:
            raise SourceError(
                f"{checkpoint.directory} is not the base of {store.path}: it has no tensor "
                f"{tensor.name}; give the original with --base"
            )
        if place.spec.shape != tensor.shape or place.spec.dtype != tensor.base_dtype:
            raise SourceError(
                f"{checkpoint.directory} is not the base of {store.path}: tensor {tensor.name} is "
                f"{place.spec.dtype.code} {list(place.spec.shape)}, the store was built over "
                f"{tensor.base_dtype.code} {list(tensor.shape)}; give the original with --base"
            )
