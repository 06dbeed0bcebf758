"""What a store asks of the place it is kept in: a directory of this machine, or object storage.

Keys are paths within the store, with ``/``. `LocalStorage` is the one here; `object_storage` has
the other. Which calls come in which order is for `write`; what one of them does to a disk is for
`files`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import StoreError
from relex_stream.locations import Location, Url
from relex_stream.pagecache import ask_for
from relex_stream.store import files
from relex_stream.store.files import Lock

if TYPE_CHECKING:
    from relex_stream.store.reach import Reach

Bytes = NDArray[np.uint8]


class Storage(Protocol):
    """Where a store's bytes are; for any number of threads.

    Attributes
    ----------
    is_local : bool
        Whether it is a directory of this machine.
    reading_bytes, writing_bytes : int
        What requests that go on in the background hold in memory, at most.
    """

    is_local: bool
    reading_bytes: int
    writing_bytes: int

    def exists(self) -> bool:
        """Say whether there is anything at all."""

    def read(self, key: str) -> bytes:
        """Return all bytes of a key; OSError if there are none."""

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """Yield all bytes of keys, in their order; None for those that are missing."""

    def read_into(self, key: str, pieces: Sequence[tuple[int, Bytes]]) -> bool:
        """Fill arrays from offsets on; say whether all were, or the key ends before."""

    def size(self, key: str) -> int:
        """Return the bytes of a key; OSError if there is none."""

    def total_bytes(self) -> int:
        """Return the bytes of all keys."""

    def advise(self, key: str, offset: int, nbytes: int) -> bool:
        """Have bytes at hand soon, without waiting; False if they are there already."""

    def prepare(self, names: set[str]) -> None:
        """Make the place of a new store, or see that there is a store.

        `names` are those that a store has; StoreError if others are there.
        """

    def lock(self) -> AbstractContextManager[Lock]:
        """Hold the lock of the store; StoreError if another has it."""

    def is_held_by(self, holder: bytes) -> bool:
        """Say whether the lock has this holder; for its helpers elsewhere."""

    def read_head(self) -> tuple[bytes, str] | None:
        """Return HEAD and its version for `replace_head`; None if there is none."""

    def replace_head(self, data: bytes, version: str | None) -> str:
        """Replace one version of HEAD (None: there must be none); return the new version.

        StoreError if another writer did so before.
        """

    def make_directory(self, key: str) -> None:
        """Make a directory, where there are such."""

    def write(self, key: str, data: bytes) -> None:
        """Write a key that nothing reaches, or whose bytes are the same."""

    def write_tail(
        self, key: str, start: int, data: bytes | memoryview, check: Callable[[], None] | None
    ) -> None:
        """Put bytes right behind the first `start` of a key, which stay as they are.

        `check` is of those who help a writer elsewhere; see `files.write_tail`.
        """

    def replace_documents(self, documents: Mapping[str, bytes], *, settled: bool) -> None:
        """Replace keys that other zarr readers may be reading; `settled` once there is a HEAD."""

    def restore(self, key: str, data: bytes) -> None:
        """Replace a damaged or missing key, at once and for good; from any thread."""

    def sync(self, keys: Iterable[str]) -> None:
        """Return once all that was written under these keys can be relied on."""

    def has_blob(self, key: str, data: bytes) -> bool:
        """Say whether a key, named by its content, is there and whole."""

    def sweep(self, reach: Reach, fence: Callable[[], None] | None) -> None:
        """Remove what is not reached. `fence` is called first, if there is anything.

        It keeps writers that were given up for dead from committing what is removed here; without
        it nothing is removed where that could happen.
        """


class LocalStorage:
    """A directory of this machine; a `Storage`."""

    is_local = True
    reading_bytes = 0
    writing_bytes = 0

    def __init__(self, root: Path) -> None:
        self._root = root
        self._text = str(root)

    def exists(self) -> bool:
        """As in `Storage`."""
        return self._root.exists()

    def read(self, key: str) -> bytes:
        """As in `Storage`."""
        return (self._root / key).read_bytes()

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """As in `Storage`."""
        for key in keys:
            try:
                yield self.read(key)
            except FileNotFoundError:
                yield None

    def read_into(self, key: str, pieces: Sequence[tuple[int, Bytes]]) -> bool:
        """As in `Storage`."""
        # No Path: making one costs as much as opening a file.
        descriptor = os.open(f"{self._text}/{key}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset, out in pieces:
                done = 0
                while done < out.size:
                    count = os.preadv(descriptor, [out[done:].data], offset + done)
                    if not count:
                        return False
                    done += count
        finally:
            os.close(descriptor)
        return True

    def size(self, key: str) -> int:
        """As in `Storage`."""
        return os.stat(f"{self._text}/{key}").st_size

    def total_bytes(self) -> int:
        """As in `Storage`."""
        return _bytes_below(self._text)

    def advise(self, key: str, offset: int, nbytes: int) -> bool:
        """As in `Storage`, as far as the first byte says; what is missing is not named here."""
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{self._text}/{key}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return ask_for(descriptor, offset, nbytes)
            finally:
                os.close(descriptor)
        return False

    def prepare(self, names: set[str]) -> None:
        """As in `Storage`."""
        try:
            present = set(os.listdir(self._root))
        except FileNotFoundError:
            present = set()
            self._make_path()
        except NotADirectoryError:
            raise StoreError(f"{self._root} is a file; name a directory for the store") from None
        refuse_foreign(self._root, present, names | {"HEAD.partial", "zarr.json.partial"})
        if "HEAD" not in present:
            # Made now, or by a first build that may have been killed before this.
            _sync_parent(self._root)

    def _make_path(self) -> None:
        for directory in reversed(self._root.parents):
            if not directory.exists():
                files.make_directory(directory)
                _sync_parent(directory)
        files.make_directory(self._root)

    def lock(self) -> AbstractContextManager[Lock]:
        """As in `Storage`: the kernel's, which ends with its process."""
        return files.exclusive_lock(self._root / "LOCK")

    def is_held_by(self, holder: bytes) -> bool:
        """As in `Storage`."""
        return files.is_held_by(self._root / "LOCK", holder)

    def read_head(self) -> tuple[bytes, str] | None:
        """As in `Storage`; the lock makes versions needless."""
        if not (self._root / "HEAD").exists():
            return None
        # Overwriting bytes that HEAD does not reach is safe only once the disk agrees on which
        # HEAD that is.
        files.sync_file(self._root / "HEAD")
        files.sync_file(self._root)
        return (self._root / "HEAD").read_bytes(), ""

    def replace_head(self, data: bytes, version: str | None) -> str:
        """As in `Storage`."""
        files.replace_file(self._root / "HEAD", data)
        return ""

    def make_directory(self, key: str) -> None:
        """As in `Storage`."""
        files.make_directory(f"{self._text}/{key}")

    def write(self, key: str, data: bytes) -> None:
        """As in `Storage`."""
        files.write_file(f"{self._text}/{key}", data)

    def write_tail(
        self, key: str, start: int, data: bytes | memoryview, check: Callable[[], None] | None
    ) -> None:
        """As in `Storage`."""
        files.write_tail(f"{self._text}/{key}", start, data, check)

    def replace_documents(self, documents: Mapping[str, bytes], *, settled: bool) -> None:
        """As in `Storage`; each is whole at any moment."""
        paths = {self._root / key: document for key, document in documents.items()}
        for path, document in paths.items():
            files.write_file(_partial(path), document)
        if paths and settled:
            files.sync_many(self._root, map(_partial, paths))
        for path in paths:
            files.rename(_partial(path), path)

    def restore(self, key: str, data: bytes) -> None:
        """As in `Storage`."""
        path = self._root / key
        for directory in reversed(path.relative_to(self._root).parents[:-1]):
            files.make_directory(self._root / directory)
            _sync_parent(self._root / directory)
        files.replace_file(path, data)

    def sync(self, keys: Iterable[str]) -> None:
        """As in `Storage`."""
        files.sync_many(self._root, (self._root / key for key in keys))

    def has_blob(self, key: str, data: bytes) -> bool:
        """As in `Storage`."""
        # One left by a killed run may be torn, so the content is looked at, not the name.
        try:
            return self.size(key) == len(data) and self.read(key) == data
        except FileNotFoundError:
            return False

    def sweep(self, reach: Reach, fence: Callable[[], None] | None) -> None:
        """As in `Storage`; the lock is all that is needed.

        All of it is then synced, also what an earlier sweep did that was killed, so that a lock
        file which says "clean" is right even after a power failure.
        """
        for path in sorted(path for path in self._root.rglob("*") if not path.is_dir()):
            size = reach.kept_bytes(path.relative_to(self._root).as_posix())
            if size == 0:
                files.remove_file(path)
            elif size is not None and path.stat().st_size > size:
                files.truncate_file(path, size)
        for group, known in reach.arrays.items():
            for path in sorted((self._root / group).glob("*")):
                if path.is_dir() and path.name not in known:
                    files.remove_directory(path)
            if not known and group == "base":
                files.remove_directory(self._root / group)
        files.sync_many(self._root, self._root.rglob("*"))


@lru_cache(maxsize=16)
def storage_at(root: Location) -> Storage:
    """Return the storage at a place; of object storage, one for all stores and threads."""
    if isinstance(root, Url):
        from relex_stream.store.object_storage import ObjectStorage

        return ObjectStorage.at(root)
    return LocalStorage(root)


def refuse_foreign(root: Location, present: set[str], names: set[str]) -> None:
    """Refuse a place that holds other things than a store does."""
    foreign = sorted(present - names)
    if not present & {"HEAD", "LOCK"}:
        # The lock file is the first thing a store has: whatever is here, no store put it here.
        foreign = sorted(present)
    if foreign:
        raise StoreError(
            f"{root} holds files that are not a store's ({', '.join(foreign[:3])}); "
            "name another directory"
        )


def _sync_parent(path: Path) -> None:
    # A directory may let us make something in it and yet not open it.
    with contextlib.suppress(PermissionError):
        files.sync_file(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _bytes_below(directory: str) -> int:
    total = 0
    for entry in _files_below(directory):
        total += entry.stat(follow_symlinks=False).st_size
    return total


def _files_below(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry
