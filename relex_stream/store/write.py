"""Appending to a store, taking steps back, and clearing what an unfinished run left.

Order of a commit: frames behind the committed bytes of their chunks, blobs and records under new
names; all of that synced; then HEAD replaced. Until HEAD names a record, nothing that was written
exists for any reader, and no byte that HEAD reaches is ever changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import StoreError
from relex_stream.locations import Location
from relex_stream.specs import STEP_GROUP, WeightsFile
from relex_stream.store import arrays
from relex_stream.store.reach import Reach
from relex_stream.store.read import HEAD_NAME, RecordReader, Store, blob_key, head_at
from relex_stream.store.records import (
    Commit,
    FileEntry,
    Head,
    Manifest,
    RecipePart,
    RecordName,
    StoredTensor,
    encode_commit,
    encode_head,
    encode_manifest,
    pack_literals,
    record_name,
)
from relex_stream.store.storage import storage_at
from relex_stream.store.tree import delta_documents

LOCK_NAME = "LOCK"
_OWN_NAMES = {HEAD_NAME, LOCK_NAME, "zarr.json", arrays.DELTAS, arrays.BASE, "commits", "blobs"}


def blob_name(data: bytes) -> str:
    """Return the name of a blob: the SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def sync_frames(root: Location, keys: Sequence[str]) -> None:
    """Put chunks that `write_frames` wrote on the disk."""
    storage_at(root).sync(keys)


def write_frames(
    root: Location,
    group: str,
    tensor: StoredTensor,
    chunk_row: int,
    block: int,
    committed: int,
    data: bytes | memoryview,
    fence: Fence | None = None,
) -> str:
    """Put frames behind the committed bytes of a chunk. Idempotent; safe from any thread.

    Parameters
    ----------
    root : Path or Url
        The store.
    group : str
        ``arrays.DELTAS`` or ``arrays.BASE``.
    committed : int
        Bytes of the chunk that HEAD reaches.
    data : bytes or memoryview of bytes
        Whole frames.
    fence : Fence, optional
        For those who do not hold the lock themselves.

    Returns
    -------
    str
        Key of the chunk.
    """
    key = arrays.chunk_key(group, tensor, chunk_row, block)
    storage_at(root).write_tail(key, committed, data, fence.check if fence is not None else None)
    return key


def recipe_of(
    file: WeightsFile, put_blob: Callable[[bytes], str]
) -> tuple[list[RecipePart], bytes | None]:
    """Return what a weights file is made of that can be put together again.

    Literal bytes are blobs named in the recipe where they are few and mostly the same at every step
    (a header), else they are kept together for the file: then all steps may share the recipe.

    Parameters
    ----------
    file : WeightsFile
    put_blob : callable
        Is given each blob, and returns its name.

    Returns
    -------
    parts : list of RecipePart
    literals : bytes or None
        Those that are kept together; None where they are blobs.
    """
    assert file.parts is not None
    literals = [part.literal for part in file.parts if part.literal is not None]
    together = len(literals) > 1 or any(part.box is not None for part in file.parts)
    parts = []
    for part in file.parts:
        if part.literal is None:
            parts.append(RecipePart(tensor=part.tensor, box=part.box))
        elif together:
            parts.append(RecipePart(nbytes=len(part.literal)))
        else:
            parts.append(RecipePart(blob=put_blob(part.literal)))
    return parts, b"".join(literals) if together else None


def keep_weights_file(file: WeightsFile, put_blob: Callable[[bytes], str]) -> FileEntry:
    """Return a weights file's entry, its recipe and literal bytes given to `put_blob`."""
    parts, literals = recipe_of(file, put_blob)
    body = {"size": file.size, "parts": [part.encode() for part in parts]}
    return FileEntry(
        file.relative_path,
        file.size,
        blob=None if literals is None else put_blob(pack_literals(literals)),
        recipe=put_blob(json.dumps(body, separators=(",", ":")).encode()),
    )


@dataclass(frozen=True)
class Fence:
    """Keeps out those who help a writer elsewhere, once it no longer holds the lock.

    A cluster may go on with a task for a while after the command that sent it was ended; by then
    another may be writing.
    """

    root: Location
    holder: bytes

    def check(self) -> None:
        """Check that the writer still holds the lock.

        Raises
        ------
        StoreError
            If it does not, or another store is at this path on this machine.
        """
        if not storage_at(self.root).is_held_by(self.holder):
            raise StoreError(
                f"{self.root} is not held by the build that this task belongs to: either "
                "that has ended, or this machine sees another directory under this path"
            )


class StoreWriter:
    """The one writer of a store, for as long as it is open (a context manager).

    Parameters
    ----------
    path : Path or Url
        The store; made if it is not there.
    sweep : bool
        Clear first what a run that did not finish left over. Who does not must do it before the
        end; what is damaged may be in the way.

    Attributes
    ----------
    unswept : bool
        Whether something may be left over.
    store : Store or None
        What is committed; None before the first commit.
    fence : Fence
        For those who help, while it is open.

    Raises
    ------
    StoreError
        On entering: if another process writes to it, or `path` holds something else.
    """

    def __init__(self, path: Location, *, sweep: bool = True) -> None:
        self.path = path
        self.store: Store | None = None
        self.unswept = False
        self._sweeps_first = sweep
        self._fenced_already = False
        self._storage = storage_at(path)
        self._head_version: str | None = None
        self._written: list[str] = []
        self._blobs: set[str] = set()  # those known to be whole
        self._stack = contextlib.ExitStack()
        self._restoring = threading.Lock()

    def __enter__(self) -> Self:
        self._storage.prepare(_OWN_NAMES)
        lock = self._stack.enter_context(self._storage.lock())
        self.fence = Fence(self.path, lock.holder)
        try:
            for name in ("commits", "blobs", arrays.DELTAS):
                self._storage.make_directory(name)
            head = self._storage.read_head()
            if head is not None:
                data, self._head_version = head
                self.store = Store(self.path, head=head_at(self.path, data))
            self.unswept = lock.unfinished
            if self.unswept and self._sweeps_first:
                self.sweep()
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        # After an error the lock file keeps its owner: the next writer then sweeps.
        self._stack.__exit__(*exception)  # type: ignore[arg-type]

    @property
    def transfer_bytes(self) -> int:
        """What requests to object storage hold in memory, at most."""
        return self._storage.reading_bytes + self._storage.writing_bytes

    # --- writing --------------------------------------------------------------------------------

    def allocate(self, tensors: Sequence[StoredTensor], rows: int, *, include_base: bool) -> None:
        """Make the arrays that `rows` steps need, or give them more rows.

        Costs nothing while the last group of steps has room.
        """
        allocated = arrays.allocated_rows(rows)
        before = arrays.allocated_rows(len(self.store.steps)) if self.store else 0
        if self.store is not None and allocated <= before:
            return
        if self.store is None:
            self._write("zarr.json", arrays.root_document())
            self._write(f"{arrays.DELTAS}/zarr.json", arrays.group_document())
            if include_base:
                self._storage.make_directory(arrays.BASE)
                self._write(f"{arrays.BASE}/zarr.json", arrays.group_document())
        documents = {}
        for tensor in tensors:
            groups = [arrays.DELTAS] if tensor.kind == "tracked" else []
            if include_base and self.store is None and tensor.kind != "tied":
                groups.append(arrays.BASE)
            for group in groups:
                directory = f"{group}/{arrays.array_name(tensor.name)}"
                self._storage.make_directory(directory)
                rows_here = allocated if group == arrays.DELTAS else 1
                document = arrays.array_document(tensor, group, rows_here)
                documents[f"{directory}/zarr.json"] = document
        if self.store is None:  # no reader yet that could see half of one
            for key, document in documents.items():
                self._write(key, document)
        else:
            self._put_documents(documents)

    def put_blob(self, data: bytes) -> str:
        """Keep `data` once per content; return its name."""
        name = blob_name(data)
        if name not in self._blobs:
            if not self._storage.has_blob(blob_key(name), data):
                self._write(blob_key(name), data)
            self._blobs.add(name)
        return name

    def put_weights_file(self, file: WeightsFile) -> FileEntry:
        """Keep the recipe of a weights file; the bytes of its tensors are kept as deltas."""
        return keep_weights_file(file, self.put_blob)

    def put_side_file(self, relative_path: str, data: bytes) -> FileEntry:
        """Keep a side file once per content."""
        return FileEntry(relative_path, len(data), blob=self.put_blob(data))

    def commit(self, manifest: Manifest, commits: Sequence[Commit]) -> None:
        """Make steps exist.

        Parameters
        ----------
        manifest : Manifest
            As committed, or the first one of a new store.
        commits : sequence of Commit
            In row order. Their field ``previous`` is set here, so give any.
        """
        head = self.store.head if self.store else None
        if head is None:
            data = encode_manifest(manifest)
            manifest_name = record_name("manifest", data)
            self._write(manifest_name.path, data)
            head = Head(manifest_name, (), ())
        names: list[RecordName] = list(head.commits)
        for commit in commits:
            previous = names[-1] if names else head.manifest
            data = encode_commit(Commit(**{**commit.__dict__, "previous": previous.path}))
            name = record_name(f"{commit.step:012d}", data)
            self._write(name.path, data)
            names.append(name)
        self._storage.sync(chain(self._written, self._chunks_of(manifest, commits)))
        self._written.clear()
        steps = head.steps + tuple(commit.step for commit in commits)
        newest = max((commit.format for commit in commits), default=1)
        self._replace_head(
            replace(head, steps=steps, commits=tuple(names), format=max(head.format, newest))
        )

    def _chunks_of(self, manifest: Manifest, commits: Sequence[Commit]) -> Iterator[str]:
        """Yield the chunks that `write_frames` wrote for these commits."""
        groups: dict[int, NDArray[np.bool_]] = {}
        for commit in commits:
            written = groups.setdefault(commit.row // STEP_GROUP, np.zeros(manifest.blocks, bool))
            written |= commit.frame_bytes > 0
        for tensor in manifest.tensors:
            for block in range(tensor.blocks):
                column = tensor.first_block + block
                if self.store is None and manifest.base_frame_bytes[column]:
                    yield arrays.chunk_key(arrays.BASE, tensor, 0, block)
                for chunk_row, written in groups.items():
                    if written[column]:
                        yield arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)

    def restore(self, contents: Mapping[str, bytes]) -> None:
        """Put files that HEAD reaches back as they were committed, each whole at any moment.

        Safe from any thread.

        Parameters
        ----------
        contents : mapping of str to bytes
            Keys, and what was committed there.
        """
        assert self.store is not None
        with self._restoring:
            if contents and not self._fenced_already and not self._storage.is_local:
                # Those who appended to a damaged chunk must not commit what is not there any more.
                self._replace_head(self._fenced(self.store.head))
                self._fenced_already = True
        for key, data in contents.items():
            self._storage.restore(key, data)

    def drop_after(self, step: int) -> tuple[int, ...]:
        """Take back all steps after `step`; return them. HEAD goes first, bytes after."""
        assert self.store is not None
        head = self.store.head
        kept = sum(committed <= step for committed in head.steps)
        dropped = head.steps[kept:]
        if dropped:
            head = replace(head, steps=head.steps[:kept], commits=head.commits[:kept])
            self._replace_head(self._fenced(head))
            self._sweep(fenced=True)
        return dropped

    def _fenced(self, head: Head) -> Head:
        """Make a HEAD differ from every one before, where versions are told apart by their bytes.

        Others that still go by an earlier one then cannot replace it any more.
        """
        if self._storage.is_local:
            return head
        return replace(head, format=max(head.format, 2), fence=uuid.uuid4().hex)

    def _replace_head(self, head: Head) -> None:
        self._head_version = self._storage.replace_head(encode_head(head), self._head_version)
        records: RecordReader | None = self.store.records if self.store else None
        self.store = Store(self.path, head=head, records=records)

    def _write(self, key: str, data: bytes) -> None:
        self._storage.write(key, data)
        self._written.append(key)

    # --- clearing -------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what HEAD does not reach: tails of chunks, whole chunks, records, blobs, arrays.

        Only names of the kinds a store makes are touched; `Storage.sweep` says how.
        """
        self._sweep(fenced=False)
        self.unswept = False

    def _sweep(self, *, fenced: bool) -> None:
        self._blobs.clear()
        store = self.store
        reach = Reach.of(store) if store is not None else Reach()
        fence = None
        if store is not None:
            head = store.head
            fence = (lambda: None) if fenced else lambda: self._replace_head(self._fenced(head))
            self._put_documents(_stale_documents(store))
        self._storage.sweep(reach, fence)

    def _put_documents(self, documents: dict[str, bytes]) -> None:
        """Replace ``zarr.json`` of arrays, which other zarr readers may be reading."""
        self._storage.replace_documents(documents, settled=self.store is not None)
        self._written += documents


def _stale_documents(store: Store) -> dict[str, bytes]:
    """Return the ``zarr.json`` of delta arrays that a killed run grew, or a drop left too large."""
    documents = delta_documents(store)
    there = store.storage.read_each(list(documents))
    return {
        key: document
        for (key, document), found in zip(documents.items(), there, strict=True)
        if found != document
    }
