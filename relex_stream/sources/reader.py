"""Blocks of bytes from many files at once, with few of them open at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import RemoteError, SourceError
from ..listing import file_status
from ..locations import Url, location
from ..objects import objects_at
from ..pagecache import ask_for
from ..specs import SourceCheckpoint
from ..transfers import READING_BYTES, ReadAhead

_MOST_OPEN = 512

# Size and time of the last change. No inode number: some network file systems invent a new one
# whenever their cache drops the file.
_Version = tuple[int, int]


@dataclass
class _OpenFile:
    descriptor: int
    readers: int = 0


class CheckpointReader:
    """Reads runs of bytes from files, from any number of threads.

    Files are opened when first read and closed when `max_open` others were read since, never
    during a read. The size and modification time a file has when first opened are remembered: work
    takes hours, and a trainer that rewrites a checkpoint meanwhile must not go unseen.

    Parameters
    ----------
    max_open : int, optional
        Most files open at a time; by default half of what the system allows this process, and no
        more than 512. Threads that need more than are left wait for the others.

    Attributes
    ----------
    max_open : int

    Notes
    -----
    Pickled, it takes along what it expects of files, and none of them.

    Raises
    ------
    ValueError
        If `max_open` is below 1.

    Examples
    --------
    >>> import tempfile
    >>> buffer = np.empty(3, dtype=np.uint8)
    >>> with tempfile.NamedTemporaryFile() as file, CheckpointReader() as reader:
    ...     _ = file.write(b"abcdef")
    ...     file.flush()
    ...     reader.read(file.name, 2, buffer)
    ...     reader.verify_unchanged()
    >>> buffer.tobytes()
    b'cde'
    """

    def __init__(self, max_open: int | None = None) -> None:
        if max_open is None:
            max_open = _default_max_open()
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self.max_open = max_open
        self._changed = threading.Condition()  # guards everything below
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()  # least recently used first
        self._opening: set[str] = set()  # paths being opened without the lock held
        self._versions: dict[str, _Version] = {}  # when first opened, or as expected
        self._read: set[str] = set()
        self._lent = 0  # descriptors promised to `borrow`
        self._closed = False
        self._ahead = ReadAhead(_range_of)  # of objects
        # Where nobody closes it: a copy that a task worked with.
        weakref.finalize(self, _close_all, self._files)

    def __getstate__(self) -> dict[str, _Version]:
        with self._changed:
            return dict(self._versions)

    def __setstate__(self, versions: dict[str, _Version]) -> None:
        self.__init__()  # type: ignore[misc]
        self._versions = versions

    def read(self, path: str, offset: int, buffer: memoryview | NDArray[np.uint8]) -> None:
        """Fill a buffer with the bytes of a file from an offset on.

        Parameters
        ----------
        path : str
            The file.
        offset : int
            Position of the first byte; any alignment.
        buffer : memoryview or ndarray of uint8
            Writable and contiguous; all of it is filled. An empty one touches no file.

        Raises
        ------
        SourceError
            If the file cannot be opened or read, ends too early, or changed since first opened.
        ValueError
            If the offset is negative, the buffer unsuitable, or the reader closed.
        """
        view = buffer if isinstance(buffer, memoryview) else buffer.data
        if offset < 0:
            raise ValueError(f"offset must not be negative, got {offset}")
        if view.readonly or not view.c_contiguous:
            raise ValueError("the buffer must be writable and contiguous")
        if view.nbytes == 0:
            return  # and memoryview.cast refuses empty arrays
        view = view.cast("B")
        if "://" in path:
            self._read_object(path, offset, view)
            return
        with self.borrow([path]) as (descriptor,):
            done = 0
            while done < len(view):  # one call returns at most 2 GiB, on network mounts often less
                try:
                    count = _read_at(descriptor, offset + done, view[done:])
                except OSError as error:
                    raise _unreadable(path, error) from error
                if count == 0:
                    raise SourceError(
                        f"{path}: truncated while reading: it ends at byte {offset + done} where "
                        f"{offset + len(view)} expected; copy it again"
                    )
                done += count

    def advise(self, path: str, offset: int, nbytes: int) -> bool:
        """Ask the system to have bytes of a file read from the disk, without waiting for them.

        Returns
        -------
        bool
            False if the first of them are in memory already, and nothing was asked for; or if the
            system cannot be asked. A file that cannot be read is left to `read` to name.
        """
        if "://" in path:
            return self._ahead.ask(path, offset, nbytes)
        with contextlib.suppress(SourceError), self.borrow([path]) as (descriptor,):
            return ask_for(descriptor, offset, nbytes)
        return False

    def expect(self, checkpoint: SourceCheckpoint) -> None:
        """Refuse its files when they are first read, if they changed since their headers were."""
        with self._changed:
            paths = checkpoint.weights_paths
            for path, file in zip(paths, checkpoint.weights_files, strict=True):
                self._versions.setdefault(path, (file.size, file.modified_ns))

    @property
    def reading_bytes(self) -> int:
        """What requests to object storage hold in memory, at most."""
        with self._changed:
            return READING_BYTES if are_objects(self._versions) else 0

    def limited_to(self, paths: Iterable[str]) -> CheckpointReader:
        """Return another reader, which expects the same of some files and nothing of others.

        For what travels: of very many checkpoints a task reads a few.
        """
        other = CheckpointReader(self.max_open)
        with self._changed:
            other._versions = {path: self._versions[path] for path in paths}
        return other

    def verify_unchanged(self, paths: Iterable[str] | None = None) -> None:
        """Check that files still have the size and time they were first opened with.

        Parameters
        ----------
        paths : iterable of str, optional
            Expected files, which others may have read; by default those read here so far.

        Raises
        ------
        SourceError
            If a file was changed, replaced or removed; the message names it.
        """
        with self._changed:
            chosen = sorted(self._read) if paths is None else paths
            versions = {path: self._versions[path] for path in chosen}
        for path, version in versions.items():
            if _version_of(path) != version:
                raise _changed_file(path)

    def _read_object(self, path: str, offset: int, view: memoryview) -> None:
        with self._changed:
            if self._closed:
                raise ValueError("the reader is closed")
            first = path not in self._read
        if first:
            version = _version_of(path)
            with self._changed:
                if self._versions.setdefault(path, version) != version:
                    raise _changed_file(path)
                self._read.add(path)
        try:
            data = self._ahead.take(path, offset, len(view))
            if data is None:
                data = _range_of(path, offset, len(view))
        except RemoteError:
            raise
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(data) < len(view):
            raise SourceError(
                f"{path}: truncated while reading: it ends at byte {offset + len(data)} where "
                f"{offset + len(view)} expected; copy it again"
            )
        view[:] = data

    def close(self) -> None:
        """Wait for running reads, then close all files. Later reads raise ValueError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._opening and not self._busy())
            _close_all(self._files)

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the reader."""
        self.close()

    def _busy(self) -> bool:
        return any(file.readers for file in self._files.values())

    @contextmanager
    def borrow(self, paths: Sequence[str]) -> Iterator[list[int]]:
        """Lend open descriptors of files, for reading at offsets only.

        Parameters
        ----------
        paths : sequence of str
            At most `max_open` of them.

        Yields
        ------
        list of int
            Valid inside the ``with`` block.

        Raises
        ------
        SourceError
            If a file cannot be opened, or changed since first opened.
        """
        assert not are_objects(paths), "objects have no descriptors"
        if len(paths) > self.max_open:
            raise ValueError(
                f"{len(paths)} files asked for at once, at most {self.max_open} may be"
            )
        with self._changed:
            # All or none: two threads that each wait for the other's last file wait forever.
            self._changed.wait_for(lambda: self._closed or self._lent + len(paths) <= self.max_open)
            files = [self._take(path) for path in paths]
            self._lent += len(paths)
        try:
            for number, path in enumerate(paths):
                files[number] = files[number] or self._acquire(path)
            yield [file.descriptor for file in files if file]
        finally:
            with self._changed:
                for file in files:
                    if file:  # those before an error
                        file.readers -= 1
                self._lent -= len(paths)
                self._changed.notify_all()

    def _take(self, path: str) -> _OpenFile | None:
        """Take a file if it is open; the caller holds the lock."""
        if self._closed:
            raise ValueError("the reader is closed")
        file = self._files.get(path)
        if file is not None:
            file.readers += 1
            self._files.move_to_end(path)
        return file

    def _acquire(self, path: str) -> _OpenFile:
        with self._changed:
            while True:
                file = self._take(path)
                if file is not None:
                    return file
                if path not in self._opening:
                    self._make_room()
                    self._opening.add(path)
                    break
                self._changed.wait()
        # Opening may take long on a network file system: other threads go on reading meanwhile.
        try:
            descriptor, version = _open(path)
            with self._changed:
                if self._versions.setdefault(path, version) != version:
                    os.close(descriptor)
                    raise _changed_file(path)
                self._read.add(path)
                file = self._files[path] = _OpenFile(descriptor, readers=1)
                return file
        finally:
            with self._changed:
                self._opening.discard(path)
                self._changed.notify_all()

    def _make_room(self) -> None:
        """Close an idle file if no other may be opened; `borrow` saw to it that there is one."""
        if len(self._files) + len(self._opening) < self.max_open:
            return
        idle = next(path for path, file in self._files.items() if not file.readers)
        os.close(self._files.pop(idle).descriptor)


def are_objects(paths: Iterable[str]) -> bool:
    """Say whether files are on object storage: those of a checkpoint all are, or none."""
    return any("://" in path for path in paths)


def _close_all(files: OrderedDict[str, _OpenFile]) -> None:
    while files:
        os.close(files.popitem()[1].descriptor)


def _default_max_open() -> int:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return _MOST_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return max(1, min(_MOST_OPEN, soft // 2))


def _open(path: str) -> tuple[int, _Version]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return descriptor, _version(os.fstat(descriptor))
    except OSError as error:
        os.close(descriptor)
        raise _unreadable(path, error) from error


def _read_at(descriptor: int, offset: int, view: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    data = os.pread(descriptor, len(view), offset)
    view[: len(data)] = data
    return len(data)


def _version_of(path: str) -> _Version:
    try:
        size, modified_ns, _ = file_status(location(path))
    except RemoteError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    return size, modified_ns


def _range_of(path: str, offset: int, nbytes: int) -> bytes:
    url = Url.parse(path)
    return objects_at(url.parent).get_range(url.name, offset, nbytes)


def _version(status: os.stat_result) -> _Version:
    return status.st_size, status.st_mtime_ns


def _unreadable(path: str, error: OSError) -> SourceError:
    return SourceError(
        f"{path}: cannot be read: {error.strerror or error}; check that it is still there and "
        "readable"
    )


def _changed_file(path: str) -> SourceError:
    return SourceError(
        f"{path}: changed while it was being read; run again once nothing writes to it"
    )
