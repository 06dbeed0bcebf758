"""Every call by which a store changes the disk, one function each.

A test that replays crashes replaces these functions by ones that also keep a log; so no other
module of the package writes, syncs, renames or removes anything in a store.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from relex_stream.errors import StoreBusyError, StoreError


def make_directory(path: Path | str) -> None:
    """Make one directory; its parent must exist. Does nothing if it is there already."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)


def write_file(path: Path | str, data: bytes) -> None:
    """Write a whole file under its final name; not atomic: only for names nothing reaches yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, data, 0)
    finally:
        os.close(descriptor)


def write_tail(
    path: Path | str,
    committed_bytes: int,
    data: bytes | memoryview,
    check: Callable[[], None] | None = None,
) -> None:
    """Put `data` right after the first `committed_bytes` of a file, which stay as they are.

    Whatever lies behind them is cut off first; not with `check`, which those have who help a
    writer elsewhere: two of them may be at the same work, one of which has been given up for dead,
    and what one has written must not be taken away by the other.

    Parameters
    ----------
    path : path
    committed_bytes : int
    data : bytes or memoryview
    check : callable, optional
        Called once the file is open; raises if nothing is to be written. What is removed after that
        takes along what is written here.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if check is not None:
            check()
        size = os.fstat(descriptor).st_size
        if size < committed_bytes:
            raise StoreError(
                f"{path} holds {size} bytes, {committed_bytes} are committed; "
                "the store is damaged (see relex-stream verify)"
            )
        if size > committed_bytes and check is None:
            os.ftruncate(descriptor, committed_bytes)
        _write_all(descriptor, data, committed_bytes)
    finally:
        os.close(descriptor)


def truncate_file(path: Path, size: int) -> None:
    """Cut a file to `size` bytes."""
    os.truncate(path, size)


def rename(source: Path, target: Path) -> None:
    """Rename within a directory, replacing `target`."""
    os.replace(source, target)


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_directory(path: Path) -> None:
    """Remove a directory if it is there and empty."""
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync_file(path: Path) -> None:
    """Put a file's bytes (or a directory's names) on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync directories; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.EBADF) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def sync_many(root: Path, written: Iterable[Path | str]) -> None:
    """Put all `written` files, and all names in the directories above them, on the disk.

    Where something was removed, the directory it was in counts as written.

    On Linux one ``syncfs`` of the file system of `root`, which costs much less than thousands of
    ``fsync``; elsewhere each file and each directory above it up to `root`.
    """
    if sys.platform == "linux" and _sync_file_system(root):
        return
    paths = [Path(path) for path in written]
    for path in paths:
        sync_file(path)
    parents = {
        parent for path in paths for parent in path.parents if root in (parent, *parent.parents)
    }
    for directory in sorted(parents, key=lambda path: -len(path.parts)):
        sync_file(directory)


def _sync_file_system(root: Path) -> bool:
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return False
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"syncfs failed for {root}")
    finally:
        os.close(descriptor)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file's content: after a crash at any moment it is whole, old or new."""
    temporary = path.with_name(path.name + ".partial")
    write_file(temporary, data)
    sync_file(temporary)
    rename(temporary, path)
    sync_file(path.parent)


class Lock(NamedTuple):
    """A lock file that is held.

    Attributes
    ----------
    holder : bytes
        What it holds meanwhile; no other holder ever has the same.
    unfinished : bool
        Whether the last holder may have left something over.
    """

    holder: bytes
    unfinished: bool


def is_held_by(path: Path, holder: bytes) -> bool:
    """Say whether a lock file is held by one that has said so; for its helpers elsewhere."""
    try:
        return path.read_bytes() == holder
    except OSError:
        return False


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[Lock]:
    """Hold the lock file of a store.

    The file holds the owner while work is under way and is empty after a clean end; where it is
    missing, nobody knows. It is on the disk before anything that its holder does. The kernel lets
    go of the lock when its process ends, however it ends.

    Raises
    ------
    StoreBusyError
        If another process holds the lock.
    StoreError
        If the file system has no locks.
    """
    missing = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            raise StoreBusyError(
                f"another process is writing to {path.parent} ({owner}); "
                "wait for it, or end it, and run this again"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{path.parent} cannot be locked ({error.strerror}); its file system has no locks "
                "(on Lustre: mount it with -o flock)"
            ) from error
        unfinished = missing or os.fstat(descriptor).st_size > 0
        # Not cut to nothing first: it must not look clean before what is left over is swept.
        name = f"process {os.getpid()} on {os.uname().nodename}, {uuid.uuid4().hex[:12]}"
        holder = (name + "\n").encode()
        os.pwrite(descriptor, holder, 0)
        os.ftruncate(descriptor, len(holder))
        os.fsync(descriptor)
        # Also where the file was there: its maker may have been killed before this.
        sync_file(path.parent)
        yield Lock(holder, unfinished)
        os.ftruncate(descriptor, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
