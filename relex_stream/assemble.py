"""Model directories from a store: the base's or a step's files, with the weights of each block.

A weights file is what its recipe says: literal bytes (the header) and whole tensors. `Assembly`
makes such files at their full size in an `OutputDirectory` and puts blocks where they belong;
export and extrapolate differ only in how a block's bits come about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream.blocks import BlockOf, Blocks
from relex_stream.errors import CorruptionError
from relex_stream.pieces import Span, is_inside, span_runs, spans_of
from relex_stream.store import Store
from relex_stream.store.records import FileEntry, RecipePart, StoredTensor
from relex_stream.ulp import Bits
from relex_stream.writer import Filler, OutputDirectory


class _Destination(NamedTuple):
    """Where a tensor goes, or a part of it; `span` is None for the whole."""

    path: str
    offset: int
    span: Span | None = None


class _Literal(NamedTuple):
    """Where a whole blob goes, or `nbytes` of what is packed in an entry's own, from `start` on."""

    path: str
    offset: int
    of: str | FileEntry
    start: int = 0
    nbytes: int | None = None


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
    headers : mapping of str to bytes, optional
        Of weights files, by path: what they begin with instead of the blob that their recipes do.
    """

    def __init__(
        self,
        store: Store,
        entries: Sequence[FileEntry],
        *,
        prefix: str,
        in_base_dtype: bool,
        replaced: Sequence[str] = (),
        headers: Mapping[str, bytes] | None = None,
    ) -> None:
        self._arguments = (
            store,
            tuple(entries),
            prefix,
            in_base_dtype,
            tuple(replaced),
            dict(headers or {}),
        )
        self._store = store
        self._prefix = prefix
        self._in_base_dtype = in_base_dtype
        self._entries = [entry for entry in entries if entry.path not in replaced]
        self._headers = headers or {}
        self._sizes = {entry.path: entry.size for entry in self._entries}
        self._literals: list[_Literal] = []
        self._destinations: dict[str, list[_Destination]] = {}
        for entry in self._entries:
            if entry.recipe is not None:
                self._follow_recipe(entry)

    def __reduce__(self) -> Any:
        # Recipes are read again where it is wanted: places of tensors may be very many.
        return _assembly, self._arguments

    def _follow_recipe(self, entry: FileEntry) -> None:
        path, offset, literal = self._prefix + entry.path, 0, 0
        parts = self._store.recipe(entry)
        header = self._headers.get(entry.path)
        if header is not None:
            parts, offset = parts[1:], len(header)
        for part in parts:
            if part.blob is not None:
                self._literals.append(_Literal(path, offset, part.blob))
                offset += self._store.blob_size(part.blob)
            elif part.nbytes is not None:
                if entry.blob is None:
                    raise CorruptionError(f"the recipe of {entry.path} has bytes of no blob")
                self._literals.append(_Literal(path, offset, entry, literal, part.nbytes))
                literal += part.nbytes
                offset += part.nbytes
            else:
                offset += self._place(part, entry, path, offset)
        if header is not None:
            self._sizes[entry.path] = offset
        elif offset != entry.size:
            raise CorruptionError(
                f"the recipe of {entry.path} makes {offset} bytes, not {entry.size}"
            )

    def _place(self, part: RecipePart, entry: FileEntry, path: str, offset: int) -> int:
        """Note where a tensor or a part of it goes; return its bytes."""
        assert part.tensor is not None
        tensor = self._resolve(part.tensor, entry)
        places = self._destinations.setdefault(tensor.name, [])
        itemsize = self._itemsize(tensor)
        if part.box is None:
            places.append(_Destination(path, offset))
            return tensor.elements * itemsize
        # The shape of a tied tensor is that of the one it is tied to.
        if not is_inside(part.box, tensor.shape):
            raise CorruptionError(
                f"the recipe of {entry.path} names a part that tensor {part.tensor} does not have"
            )
        # Of a constant the elements are its bytes.
        scale = tensor.dtype.itemsize if tensor.kind == "constant" else 1
        nbytes = 0
        for span in spans_of(part.box, tensor.shape):
            scaled = span.scaled(scale)
            places.append(_Destination(path, offset + nbytes, scaled))
            nbytes += scaled.elements * itemsize
        return nbytes

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
    def in_base_dtype(self) -> bool:
        """Whether tensors have the base's dtype in the files."""
        return self._in_base_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path without the prefix."""
        return dict(self._sizes)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        total = 0
        for name, places in self._destinations.items():
            tensor = self._store.tensors[name]
            elements = sum(
                tensor.elements if place.span is None else place.span.elements for place in places
            )
            total += elements * self._itemsize(tensor)
        return total

    @property
    def is_complete(self) -> bool:
        """Whether the files hold every element of every tensor.

        Of the files of a checkpoint those that also held training state are not kept.
        """
        for tensor in self._store.manifest.tensors:
            # Replicas are the same part again.
            spans = {place.span for place in self._destinations.get(tensor.name, ())}
            held = sum(tensor.elements if span is None else span.elements for span in spans)
            if tensor.kind != "tied" and held < tensor.elements:
                return False
        return True

    @property
    def tensors(self) -> list[StoredTensor]:
        """Tensors that the files hold, as they lie there: the order to write them in."""
        first = {name: places[0] for name, places in self._destinations.items() if places}
        names = sorted(first, key=lambda name: (first[name].path, first[name].offset))
        return [self._store.tensors[name] for name in names]

    def offset_of(self, tensor: StoredTensor, start: int) -> int:
        """Return the file offset of a tensor's element `start` in the first file that holds it."""
        return self._destinations[tensor.name][0].offset + start * self._itemsize(tensor)

    def begin(self, output: OutputDirectory) -> None:
        """Make all files: side files whole, weights files at their size with their literals."""
        store = self._store
        for entry in self._entries:
            if entry.recipe is not None:
                output.preallocate(self._prefix + entry.path, self._sizes[entry.path])
            else:
                assert entry.blob is not None
                output.write_file(self._prefix + entry.path, store.blob(entry.blob))
        for path, header in self._headers.items():
            output.write(self._prefix + path, 0, header)
        of: str | FileEntry | None = None
        data = b""
        for literal in self._literals:
            if literal.of is not of:
                of = literal.of
                data = store.literals(of) if isinstance(of, FileEntry) else store.blob(of)
            nbytes = len(data) if literal.nbytes is None else literal.nbytes
            here = memoryview(data)[literal.start : literal.start + nbytes]
            output.write(literal.path, literal.offset, here)

    def put(self, output: Filler, at: Blocks, bits: Bits) -> None:
        """Write the bits of blocks wherever the files hold them; neighbours in one piece."""
        raw: NDArray[np.uint8] = bits.view(np.uint8)
        done = 0
        first: list[tuple[str, int, int, int]] = []
        for block in at.blocks:
            nbytes = block.elements * bits.itemsize
            for number, place in enumerate(self._destinations[block.tensor.name]):
                here = raw[done : done + nbytes]
                offset = place.offset + block.start * bits.itemsize
                if place.span is not None:
                    _put_span(output, place, block, here, bits.itemsize)
                elif number == 0:
                    first.append((place.path, offset, done, nbytes))
                else:
                    output.write(place.path, offset, here.data)
            done += nbytes
        for path, offset, start, nbytes in _joined(first):
            output.write(path, offset, raw[start : start + nbytes].data)


def _joined(pieces: Iterable[tuple[str, int, int, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Join pieces, each (path, offset there, offset here, bytes), that neighbour in both."""
    last: tuple[str, int, int, int] | None = None
    for path, there, here, nbytes in pieces:
        if last is not None and (last[0], last[1] + last[3], last[2] + last[3]) == (
            path,
            there,
            here,
        ):
            last = *last[:3], last[3] + nbytes
            continue
        if last is not None:
            yield last
        last = path, there, here, nbytes
    if last is not None:
        yield last


def _put_span(
    output: Filler, place: _Destination, block: BlockOf, raw: NDArray[np.uint8], itemsize: int
) -> None:
    """Write what a part of the tensor has of a block."""
    assert place.span is not None
    runs = span_runs(place.span, place.offset, block.start, block.start + block.elements, itemsize)
    for offset, first, elements in zip(*(column.tolist() for column in runs), strict=True):
        output.write(place.path, offset, raw[first * itemsize : (first + elements) * itemsize].data)


def _assembly(
    store: Store,
    entries: Sequence[FileEntry],
    prefix: str,
    in_base_dtype: bool,  # noqa: FBT001 - called by pickle
    replaced: Sequence[str],
    headers: Mapping[str, bytes],
) -> Assembly:
    return Assembly(
        store,
        entries,
        prefix=prefix,
        in_base_dtype=in_base_dtype,
        replaced=replaced,
        headers=headers,
    )
