"""Model directories from a store: the base's or a step's files, with the weights of each block.

A weights file is what its recipe says: literal bytes (the header) and whole tensors. `Assembly`
makes such files at their full size in an `OutputDirectory` and puts blocks where they belong;
export and extrapolate differ only in how a block's bits come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream.blocks import Blocks
from relex_stream.errors import CorruptionError
from relex_stream.specs import joined_pieces
from relex_stream.store import Store
from relex_stream.store.records import FileEntry, StoredTensor
from relex_stream.ulp import Bits
from relex_stream.writer import Filler, OutputDirectory


@dataclass(frozen=True)
class _Destination:
    path: str
    offset: int


class Assembly:
    """The files of one model in an output directory.

    Parameters
    ----------
    store : Store
    entries : sequence of FileEntry
        Files to write, as recorded for the base or a step.
    prefix : str
        Directory inside the output, ``""`` or ending in ``/``.
    in_base_dtype : bool
        Whether tensors have the base's dtype in these files (else the checkpoints').
    replaced : sequence of str
        Side files that the caller writes itself.
    """

    def __init__(
        self,
        store: Store,
        entries: Sequence[FileEntry],
        *,
        prefix: str,
        in_base_dtype: bool,
        replaced: Sequence[str] = (),
    ) -> None:
        self._arguments = (store, tuple(entries), prefix, in_base_dtype, tuple(replaced))
        self._store = store
        self._prefix = prefix
        self._in_base_dtype = in_base_dtype
        self._entries = [entry for entry in entries if entry.path not in replaced]
        self._literals: list[tuple[_Destination, str]] = []
        self._destinations: dict[str, list[_Destination]] = {}
        for entry in self._entries:
            if entry.recipe is not None:
                self._follow_recipe(entry)

    def __reduce__(self) -> Any:
        # Recipes are read again where it is wanted: places of tensors may be very many.
        return _assembly, self._arguments

    def _follow_recipe(self, entry: FileEntry) -> None:
        offset = 0
        for kind, name in self._store.recipe(entry):
            place = _Destination(self._prefix + entry.path, offset)
            if kind == "blob":
                self._literals.append((place, name))
                offset += self._store.blob_size(name)
            else:
                tensor = self._resolve(name, entry)
                self._destinations.setdefault(tensor.name, []).append(place)
                offset += tensor.elements * self._itemsize(tensor)
        if offset != entry.size:
            raise CorruptionError(
                f"the recipe of {entry.path} makes {offset} bytes, not {entry.size}"
            )

    def _resolve(self, name: str, entry: FileEntry) -> StoredTensor:
        tensor = self._store.tensors.get(name)
        if tensor is None:
            raise CorruptionError(
                f"the recipe of {entry.path} names tensor {name}, which is unknown"
            )
        return self._store.tensors[tensor.tied_to] if tensor.tied_to is not None else tensor

    def _itemsize(self, tensor: StoredTensor) -> int:
        return tensor.base_itemsize if self._in_base_dtype else tensor.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self._entries)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(
            self._store.tensors[name].elements
            * self._itemsize(self._store.tensors[name])
            * len(places)
            for name, places in self._destinations.items()
        )

    @property
    def tensors(self) -> list[StoredTensor]:
        """Tensors that the files hold, as they lie there: the order to write them in."""
        first = {name: places[0] for name, places in self._destinations.items()}
        names = sorted(first, key=lambda name: (first[name].path, first[name].offset))
        return [self._store.tensors[name] for name in names]

    def offset_of(self, tensor: StoredTensor, start: int) -> int:
        """Return the file offset of a tensor's element `start` in the first file that holds it."""
        return self._destinations[tensor.name][0].offset + start * self._itemsize(tensor)

    def begin(self, output: OutputDirectory) -> None:
        """Make all files: side files whole, weights files at their size with their literals."""
        for entry in self._entries:
            if entry.blob is not None:
                output.write_file(self._prefix + entry.path, self._store.blob(entry.blob))
            else:
                output.preallocate(self._prefix + entry.path, entry.size)
        for place, name in self._literals:
            output.write(place.path, place.offset, self._store.blob(name))

    def put(self, output: Filler, at: Blocks, bits: Bits) -> None:
        """Write the bits of blocks wherever the files hold them; neighbours in one piece."""
        raw: NDArray[np.uint8] = bits.view(np.uint8)
        done = 0
        first: list[tuple[str, int, int]] = []
        for block in at.blocks:
            nbytes = block.elements * bits.itemsize
            for number, place in enumerate(self._destinations[block.tensor.name]):
                offset = place.offset + block.start * bits.itemsize
                if number == 0:
                    first.append((place.path, offset, nbytes))
                else:
                    output.write(place.path, offset, raw[done : done + nbytes].data)
            done += nbytes
        done = 0
        for path, offset, nbytes in joined_pieces(first):
            output.write(path, offset, raw[done : done + nbytes].data)
            done += nbytes


def _assembly(
    store: Store,
    entries: Sequence[FileEntry],
    prefix: str,
    in_base_dtype: bool,  # noqa: FBT001 - called by pickle
    replaced: Sequence[str],
) -> Assembly:
    return Assembly(store, entries, prefix=prefix, in_base_dtype=in_base_dtype, replaced=replaced)
