"""Appending to a store, taking steps back, and clearing what an unfinished run left.

Order of a commit: frames behind the committed bytes of their chunks, blobs and records under new
names; all of that synced; then HEAD replaced. Until HEAD names a record, nothing that was written
exists for any reader, and no byte that HEAD reaches is ever changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import StoreError
from relex_stream.specs import STEP_GROUP, WeightsFile
from relex_stream.store import arrays, files
from relex_stream.store.read import HEAD_NAME, Store, blob_path
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
    record_name,
)

LOCK_NAME = "LOCK"
_RECORD = re.compile(r"(manifest|[0-9]+)-[0-9a-f]{8}\.safetensors")
_BLOB = re.compile(r"[0-9a-f]{64}")
_OWN_NAMES = {HEAD_NAME, LOCK_NAME, "zarr.json", arrays.DELTAS, arrays.BASE, "commits", "blobs"}


def blob_name(data: bytes) -> str:
    """Return the name of a blob: the SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def sync_frames(root: Path, paths: Sequence[str]) -> None:
    """Put chunks that `write_frames` wrote on the disk."""
    files.sync_many(root, paths)


def write_frames(
    root: Path,
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
    root : Path
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
        Path of the chunk.
    """
    # No Path where tensors may be very many: making one costs as much as opening a file.
    path = f"{root}/{arrays.chunk_key(group, tensor, chunk_row, block)}"
    files.write_tail(path, committed, data, fence.check if fence is not None else None)
    return path


def weights_entry(file: WeightsFile, put_blob: Callable[[bytes], str]) -> FileEntry:
    """Return what a store keeps of a weights file that can be put together again.

    Literal bytes are blobs named in the recipe where they are few and mostly the same at every step
    (a header), else one blob for the file: then all steps may share the recipe.

    Parameters
    ----------
    file : WeightsFile
    put_blob : callable
        Is given each blob, and returns its name.
    """
    assert file.parts is not None
    literals = [part.literal for part in file.parts if part.literal is not None]
    own_blob = None
    if len(literals) > 1 or any(part.box is not None for part in file.parts):
        own_blob = put_blob(b"".join(literals))
    parts = []
    for part in file.parts:
        if part.literal is None:
            parts.append(RecipePart(tensor=part.tensor, box=part.box))
        elif own_blob is None:
            parts.append(RecipePart(blob=put_blob(part.literal)))
        else:
            parts.append(RecipePart(nbytes=len(part.literal)))
    body = {"size": file.size, "parts": [part.encode() for part in parts]}
    recipe = put_blob(json.dumps(body, separators=(",", ":")).encode())
    return FileEntry(file.relative_path, file.size, blob=own_blob, recipe=recipe)


@dataclass(frozen=True)
class Fence:
    """Keeps out those who help a writer elsewhere, once it no longer holds the lock.

    A cluster may go on with a task for a while after the command that sent it was ended; by then
    another may be writing.
    """

    lock: Path
    holder: bytes

    def check(self) -> None:
        """Check that the writer still holds the lock.

        Raises
        ------
        StoreError
            If it does not, or another store is at this path on this machine.
        """
        if not files.is_held_by(self.lock, self.holder):
            raise StoreError(
                f"{self.lock.parent} is not held by the build that this task belongs to: either "
                "that has ended, or this machine sees another directory under this path"
            )


class StoreWriter:
    """The one writer of a store, for as long as it is open (a context manager).

    Parameters
    ----------
    path : Path
        The store; made if it is not there.

    Attributes
    ----------
    store : Store or None
        What is committed; None before the first commit.
    fence : Fence
        For those who help, while it is open.

    Raises
    ------
    StoreError
        On entering: if another process writes to it, or `path` holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: Store | None = None
        self._written: list[Path | str] = []
        self._blobs: set[str] = set()  # those known to be whole
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._make_root()
        lock = self._stack.enter_context(files.exclusive_lock(self.path / LOCK_NAME))
        self.fence = Fence(self.path / LOCK_NAME, lock.holder)
        try:
            for name in ("commits", "blobs", arrays.DELTAS):
                files.make_directory(self.path / name)
            if (self.path / HEAD_NAME).exists():
                # Overwriting bytes that HEAD does not reach is safe only once the disk agrees
                # on which HEAD that is.
                files.sync_file(self.path / HEAD_NAME)
                files.sync_file(self.path)
                self.store = Store(self.path)
            if lock.unfinished:
                self.sweep()
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        # After an error the lock file keeps its owner: the next writer then sweeps.
        self._stack.__exit__(*exception)  # type: ignore[arg-type]

    def _make_root(self) -> None:
        try:
            present = set(os.listdir(self.path))
        except FileNotFoundError:
            present = set()
            self._make_path()
        except NotADirectoryError:
            raise StoreError(f"{self.path} is a file; name a directory for the store") from None
        foreign = sorted(present - _OWN_NAMES - {HEAD_NAME + ".partial"})
        if not present & {HEAD_NAME, LOCK_NAME}:
            # The lock file is the first thing a store has: whatever is here, no store put it here.
            foreign = sorted(present)
        if foreign:
            raise StoreError(
                f"{self.path} holds files that are not a store's ({', '.join(foreign[:3])}); "
                "name another directory"
            )
        if HEAD_NAME not in present:
            # Made now, or by a first build that may have been killed before this.
            _sync_parent(self.path)

    def _make_path(self) -> None:
        for directory in reversed(self.path.parents):
            if not directory.exists():
                files.make_directory(directory)
                _sync_parent(directory)
        files.make_directory(self.path)

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
            self._write(self.path / "zarr.json", arrays.root_document())
            self._write(self.path / arrays.DELTAS / "zarr.json", arrays.group_document())
            if include_base:
                self._make(self.path / arrays.BASE)
                self._write(self.path / arrays.BASE / "zarr.json", arrays.group_document())
        documents = {}
        for tensor in tensors:
            groups = [arrays.DELTAS] if tensor.kind == "tracked" else []
            if include_base and self.store is None and tensor.kind != "tied":
                groups.append(arrays.BASE)
            for group in groups:
                directory = f"{self.path}/{group}/{arrays.array_name(tensor.name)}"
                self._make(directory)
                rows_here = allocated if group == arrays.DELTAS else 1
                document = arrays.array_document(tensor, group, rows_here)
                documents[f"{directory}/zarr.json"] = document
        if self.store is None:  # no reader yet that could see half of one
            for path, document in documents.items():
                self._write(path, document)
        else:
            self._put_documents({Path(path): data for path, data in documents.items()})

    def put_blob(self, data: bytes) -> str:
        """Keep `data` once per content; return its name."""
        name = blob_name(data)
        if name not in self._blobs:
            path = blob_path(self.path, name)
            if not _holds(path, data):
                self._write(path, data)
            self._blobs.add(name)
        return name

    def put_weights_file(self, file: WeightsFile) -> FileEntry:
        """Keep the recipe of a weights file; the bytes of its tensors are kept as deltas."""
        return weights_entry(file, self.put_blob)

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
            self._write(self.path / manifest_name.path, data)
            head = Head(manifest_name, (), ())
        names: list[RecordName] = list(head.commits)
        for commit in commits:
            previous = names[-1] if names else head.manifest
            data = encode_commit(Commit(**{**commit.__dict__, "previous": previous.path}))
            name = record_name(f"{commit.step:012d}", data)
            self._write(self.path / name.path, data)
            names.append(name)
        files.sync_many(self.path, chain(self._written, self._chunks_of(manifest, commits)))
        self._written.clear()
        steps = head.steps + tuple(commit.step for commit in commits)
        newest = max((commit.format for commit in commits), default=1)
        self._replace_head(Head(head.manifest, steps, tuple(names), max(head.format, newest)))

    def _chunks_of(self, manifest: Manifest, commits: Sequence[Commit]) -> Iterator[Path]:
        """Yield the chunks that `write_frames` wrote for these commits."""
        groups: dict[int, NDArray[np.bool_]] = {}
        for commit in commits:
            written = groups.setdefault(commit.row // STEP_GROUP, np.zeros(manifest.blocks, bool))
            written |= commit.frame_bytes > 0
        for tensor in manifest.tensors:
            for block in range(tensor.blocks):
                column = tensor.first_block + block
                if self.store is None and manifest.base_frame_bytes[column]:
                    yield self.path / arrays.chunk_key(arrays.BASE, tensor, 0, block)
                for chunk_row, written in groups.items():
                    if written[column]:
                        yield self.path / arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block)

    def drop_after(self, step: int) -> tuple[int, ...]:
        """Take back all steps after `step`; return them. HEAD goes first, bytes after."""
        assert self.store is not None
        head = self.store.head
        kept = sum(committed <= step for committed in head.steps)
        dropped = head.steps[kept:]
        if dropped:
            self._replace_head(
                Head(head.manifest, head.steps[:kept], head.commits[:kept], head.format)
            )
            self.sweep()
        return dropped

    def _replace_head(self, head: Head) -> None:
        files.replace_file(self.path / HEAD_NAME, encode_head(head))
        self.store = Store(self.path)

    def _make(self, directory: Path | str) -> None:
        files.make_directory(directory)

    def _write(self, path: Path | str, data: bytes) -> None:
        files.write_file(path, data)
        self._written.append(path)

    # --- clearing -------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what HEAD does not reach: tails of chunks, whole chunks, records, blobs, arrays.

        Only names of the kinds a store makes are touched. All of it is then synced, also what an
        earlier sweep did that was killed, so that a lock file which says "clean" is right even
        after a power failure.
        """
        store = self.store
        self._blobs.clear()
        records, blobs, chunks = _reachable(store) if store else (set(), set(), {})
        self._remove_unnamed("commits", _RECORD, records)
        self._remove_unnamed("blobs", _BLOB, blobs)
        for group in (arrays.DELTAS, arrays.BASE):
            self._sweep_group(group, chunks)
        files.remove_file(self.path / (HEAD_NAME + ".partial"))
        if store is not None:
            self._put_documents(_stale_documents(store))
        files.sync_many(self.path, self.path.rglob("*"))

    def _sweep_group(self, group: str, chunks: dict[str, int]) -> None:
        known = _array_directories(self.store, group) if self.store else set()
        for directory in sorted(path for path in (self.path / group).glob("*") if path.is_dir()):
            for path in sorted(directory.iterdir()):
                if path.name.startswith("c."):
                    size = chunks.get(path.relative_to(self.path).as_posix(), 0)
                    if size == 0:
                        files.remove_file(path)
                    elif path.stat().st_size > size:
                        files.truncate_file(path, size)
                elif path.name == "zarr.json.partial" or (
                    path.name == "zarr.json" and directory.name not in known
                ):
                    files.remove_file(path)
            if directory.name not in known:
                files.remove_directory(directory)
        if group == arrays.BASE and not known:
            files.remove_file(self.path / group / "zarr.json")
            files.remove_directory(self.path / group)

    def _remove_unnamed(self, directory: str, kind: re.Pattern[str], named: set[str]) -> None:
        for name in sorted(os.listdir(self.path / directory)):
            if name not in named and kind.fullmatch(name):
                files.remove_file(self.path / directory / name)

    def _put_documents(self, documents: dict[Path, bytes]) -> None:
        """Replace ``zarr.json`` of arrays; each is whole at any moment, for other zarr readers."""
        for path, document in documents.items():
            files.write_file(_partial(path), document)
        if documents and self.store is not None:
            files.sync_many(self.path, map(_partial, documents))
        for path in documents:
            files.rename(_partial(path), path)
        self._written += documents


def _stale_documents(store: Store) -> dict[Path, bytes]:
    """Return the ``zarr.json`` of delta arrays that a killed run grew, or a drop left too large."""
    rows = arrays.allocated_rows(len(store.steps))
    documents = {}
    for tensor in store.manifest.tensors:
        if tensor.kind == "tracked":
            path = store.path / arrays.DELTAS / arrays.array_name(tensor.name) / "zarr.json"
            document = arrays.array_document(tensor, arrays.DELTAS, rows)
            if not path.exists() or path.read_bytes() != document:
                documents[path] = document
    return documents


def _holds(path: Path, data: bytes) -> bool:
    # One left by a killed run may be torn, so the content is looked at, not the name.
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except FileNotFoundError:
        return False


def _sync_parent(path: Path) -> None:
    # A directory may let us make something in it and yet not open it.
    with contextlib.suppress(PermissionError):
        files.sync_file(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _array_directories(store: Store, group: str) -> set[str]:
    manifest = store.manifest
    return {
        arrays.array_name(tensor.name)
        for tensor in manifest.tensors
        if (tensor.kind == "tracked" if group == arrays.DELTAS else tensor.kind != "tied")
        and (group == arrays.DELTAS or manifest.base_included)
    }


def _reachable(store: Store) -> tuple[set[str], set[str], dict[str, int]]:
    """Return what HEAD reaches: names of records and of blobs, committed bytes of chunks."""
    names = (store.head.manifest, *store.head.commits)
    blobs = store.blobs_of(store.manifest.base_files)
    for row in range(len(store.steps)):
        blobs |= store.blobs_of(store.commit(row).files)
    return {Path(name.path).name for name in names}, blobs, dict(_committed_chunks(store))


def _committed_chunks(store: Store) -> Iterator[tuple[str, int]]:
    groups = -(-len(store.steps) // STEP_GROUP)
    for tensor in store.manifest.tensors:
        for block in range(tensor.blocks):
            base_bytes = int(store.manifest.base_frame_bytes[tensor.first_block + block])
            if base_bytes:
                yield arrays.chunk_key(arrays.BASE, tensor, 0, block), base_bytes
            for chunk_row in range(groups):
                size = store.committed_bytes(tensor, block, chunk_row)
                if size:
                    yield arrays.chunk_key(arrays.DELTAS, tensor, chunk_row, block), size
