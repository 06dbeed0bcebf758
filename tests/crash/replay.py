"""What a disk may hold after a crash: a log of a run's file-system operations, replayed.

`recording` puts a stand-in for the module ``os`` into ``relex_stream.store.files``. It does the
real thing and keeps a log; that log must account for the whole tree afterwards, so code that
changes a store behind the back of ``files`` is found out. `Replay` then builds, for any prefix of
the log, the disks that two kinds of crash may leave:

- The process is killed: all that was done is there; the write in flight may be cut short.
- The power fails: what a sync covered is there. Every later operation, each for itself, may be
  there, not there, or torn: data short, zeroed or garbage at full length. ``fsync`` of a file
  covers its bytes but not its name; names are covered by ``fsync`` of their directory; ``syncfs``
  covers everything. A rename is atomic as such, but may outrun the data of the file it renames.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from relex_stream.store import files

ROOT = 0
"""Inode of the directory that holds the store."""

Tree = dict[str, bytes | None]
"""Content of every file by relative path; None for directories."""


@dataclass(frozen=True)
class Operation:
    """One change or sync. `inode` is the file or directory whose state it is about.

    Kinds: ``create`` and ``mkdir`` (`child` gets `name`), ``write`` (`data` at `offset`),
    ``truncate`` (to `offset`), ``rename`` (`name` to `target`, which is then `child`), ``unlink``,
    ``rmdir``, ``fsync``, ``syncfs``.
    """

    kind: str
    inode: int = ROOT
    name: str = ""
    target: str = ""
    child: int = 0
    offset: int = 0
    data: bytes = b""

    @property
    def is_sync(self) -> bool:
        return self.kind in ("fsync", "syncfs")

    def covers(self, other: Operation) -> bool:
        """Say whether this sync puts an earlier operation on the disk."""
        return self.kind == "syncfs" or (self.kind == "fsync" and self.inode == other.inode)

    def torn(self, rng: random.Random) -> Operation:
        """Return this operation as a crash may have cut it."""
        if self.kind != "write" or not self.data:
            return self
        cut = rng.randrange(len(self.data))
        lost = len(self.data) - cut
        tail = rng.choice((b"", bytes(lost), rng.randbytes(lost)))
        return replace(self, data=self.data[:cut] + tail)


class Disk:
    """Directories and files by inode; contents are immutable, so copies are cheap."""

    def __init__(self) -> None:
        self.directories: dict[int, dict[str, int]] = {ROOT: {}}
        self.files: dict[int, bytes] = {}
        self._next = ROOT + 1

    def new_inode(self) -> int:
        self._next += 1
        return self._next

    def copy(self) -> Disk:
        other = Disk()
        other.directories = {inode: dict(names) for inode, names in self.directories.items()}
        other.files = dict(self.files)
        other._next = self._next
        return other

    @classmethod
    def of(cls, tree: Tree) -> Disk:
        """Return a disk that holds a tree, all of it synced."""
        disk = cls()
        for path, content in sorted(tree.items()):
            parent, name = disk.find_parent(path)
            inode = disk.new_inode()
            kind = "mkdir" if content is None else "create"
            disk.apply(Operation(kind, parent, name, child=inode))
            if content is not None:
                disk.files[inode] = content
        return disk

    def find(self, path: str) -> int | None:
        inode: int | None = ROOT
        for part in path.split("/") if path else ():
            inode = self.directories.get(inode, {}).get(part)
        return inode

    def find_parent(self, path: str) -> tuple[int, str]:
        directory, _, name = path.rpartition("/")
        inode = self.find(directory)
        assert inode in self.directories, f"{path} has no directory"
        return inode, name

    def read(self, path: str) -> bytes | None:
        inode = self.find(path)
        return None if inode is None else self.files.get(inode)

    def apply(self, operation: Operation) -> None:
        at, kind = operation.inode, operation.kind
        self._next = max(self._next, operation.child)
        if kind == "mkdir":
            self.directories.setdefault(operation.child, {})
            self.directories[at][operation.name] = operation.child
        elif kind == "create":
            self.files.setdefault(operation.child, b"")
            self.directories[at][operation.name] = operation.child
        elif kind == "write":
            before = self.files.get(at, b"")
            end = operation.offset + len(operation.data)
            start = before[: operation.offset].ljust(operation.offset, b"\0")
            self.files[at] = start + operation.data + before[end:]
        elif kind == "truncate":
            self.files[at] = self.files.get(at, b"")[: operation.offset]
        elif kind == "rename":
            self.files.setdefault(operation.child, b"")
            self.directories[at].pop(operation.name, None)
            self.directories[at][operation.target] = operation.child
        elif kind in ("unlink", "rmdir"):
            self.directories[at].pop(operation.name, None)

    def prepare(self, operation: Operation) -> None:
        """Make room for what an operation refers to, whether or not its name gets there."""
        if operation.kind == "mkdir":
            self.directories.setdefault(operation.child, {})

    def tree(self) -> Tree:
        found: Tree = {}

        def walk(inode: int, prefix: str) -> None:
            for name, child in self.directories[inode].items():
                if child in self.directories:
                    found[prefix + name] = None
                    walk(child, f"{prefix}{name}/")
                else:
                    found[prefix + name] = self.files[child]

        walk(ROOT, "")
        return found


def read_tree(root: Path) -> Tree:
    """Return what a real directory holds."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree, present: Tree) -> None:
    """Make a real directory that holds `present` hold `tree`, touching only what differs."""
    for path in sorted(present.keys() - tree.keys(), reverse=True):
        (root / path).rmdir() if present[path] is None else (root / path).unlink()
    for path, content in sorted(tree.items()):
        if content is None:
            if path not in present:
                (root / path).mkdir()
        elif path not in present or present[path] != content:
            (root / path).write_bytes(content)


# --- recording -----------------------------------------------------------------------------------

_UNMODELLED = {
    *("write", "writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "sync"),
    *("link", "symlink", "makedirs", "removedirs", "renames", "remove", "rename", "mknod"),
    *("fdopen", "fdatasync", "chmod", "utime"),
}


class Recorder:
    """Stands in for the module ``os``: does what is asked and logs what changes the disk.

    Parameters
    ----------
    root : Path
        Only changes below it are logged.
    disk : Disk
        What `root` holds now; follows along.
    """

    def __init__(self, root: Path, disk: Disk) -> None:
        self.log: list[Operation] = []
        self.disk = disk
        self._root = root
        self._inodes: dict[int, int] = {}
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        assert name not in _UNMODELLED, f"os.{name} is not part of the replay's model; add it"
        return getattr(os, name)

    def _log(self, kind: str, inode: int = ROOT, name: str = "", **fields: Any) -> None:
        operation = Operation(kind, inode, name, **fields)
        self.disk.apply(operation)
        self.log.append(operation)

    def _place(self, path: Any) -> str | None:
        """Return a path relative to the root; None outside it."""
        absolute = Path(os.path.abspath(path))
        if absolute != self._root and self._root not in absolute.parents:
            return None
        relative = absolute.relative_to(self._root).as_posix()
        return "" if relative == "." else relative

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        with self._lock:
            descriptor = os.open(path, flags, mode)
            place = self._place(path)
            if place is None:
                return descriptor
            inode = self.disk.find(place)
            if inode is None:
                parent, name = self.disk.find_parent(place)
                inode = self.disk.new_inode()
                self._log("create", parent, name, child=inode)
            elif flags & os.O_TRUNC and self.disk.files[inode]:
                self._log("truncate", inode, offset=0)
            self._inodes[descriptor] = inode
            return descriptor

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._inodes.pop(descriptor, None)
            os.close(descriptor)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        with self._lock:
            written = os.pwrite(descriptor, data, offset)
            inode = self._inodes[descriptor]
            self._log("write", inode, offset=offset, data=bytes(memoryview(data)[:written]))
            return written

    def ftruncate(self, descriptor: int, size: int) -> None:
        with self._lock:
            os.ftruncate(descriptor, size)
            self._log("truncate", self._inodes[descriptor], offset=size)

    def truncate(self, path: Any, size: int) -> None:
        with self._lock:
            os.truncate(path, size)
            inode = self.disk.find(str(self._place(path)))
            assert inode is not None
            self._log("truncate", inode, offset=size)

    def replace(self, source: Any, target: Any) -> None:
        with self._lock:
            os.replace(source, target)
            directory, name = self.disk.find_parent(str(self._place(source)))
            same, new_name = self.disk.find_parent(str(self._place(target)))
            assert directory == same, "renames stay within a directory"
            child = self.disk.directories[directory][name]
            self._log("rename", directory, name, target=new_name, child=child)

    def _remove(self, kind: str, path: Any) -> None:
        with self._lock:
            (os.unlink if kind == "unlink" else os.rmdir)(path)
            self._log(kind, *self.disk.find_parent(str(self._place(path))))

    def unlink(self, path: Any) -> None:
        self._remove("unlink", path)

    def rmdir(self, path: Any) -> None:
        self._remove("rmdir", path)

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        with self._lock:
            os.mkdir(path, mode)
            parent, name = self.disk.find_parent(str(self._place(path)))
            self._log("mkdir", parent, name, child=self.disk.new_inode())

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            if descriptor in self._inodes:
                self._log("fsync", self._inodes[descriptor])

    def syncfs(self) -> None:
        with self._lock:
            self._log("syncfs")


@contextmanager
def recording(root: Path, *, syncfs: bool, disk: Disk | None = None) -> Iterator[Recorder]:
    """Log what the package does to the disk below `root`; nothing is really synced.

    Parameters
    ----------
    syncfs : bool
        Whether the system has ``syncfs``; else every file is synced by itself.
    disk : Disk, optional
        What `root` holds, with the inodes of an earlier log that this one goes on from.
    """
    recorder = Recorder(root, Disk.of(read_tree(root)) if disk is None else disk.copy())

    def sync_file_system(_: Path) -> bool:
        if syncfs:
            recorder.syncfs()
        return syncfs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", recorder)
        patch.setattr(files, "_sync_file_system", sync_file_system)
        yield recorder
    assert recorder.disk.tree() == read_tree(root), "something changed the disk unseen"


class _Unsynced:
    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        pass


@contextmanager
def unsynced() -> Iterator[None]:
    """Let the package write without waiting for the disk: thousands of runs take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", _Unsynced())
        patch.setattr(files, "_sync_file_system", lambda _: True)
        yield


# --- replaying -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crash:
    """A disk as a crash may leave it.

    Attributes
    ----------
    disk : Disk
    durable : Disk
        What is certain at that moment: the disk with nothing on it but what syncs cover.
    prefix : int
        Operations of the log that had been done.
    how : str
        For messages.
    """

    disk: Disk
    durable: Disk
    prefix: int
    how: str


class Replay:
    """All the crashes a run may have had.

    Parameters
    ----------
    start : Disk
        What was on the disk before, synced.
    log : sequence of Operation
    """

    def __init__(self, start: Disk, log: Sequence[Operation]) -> None:
        self.start = start
        self.log = tuple(log)

    def volatile(self, prefix: int) -> Disk:
        """Return what programs see after `prefix` operations."""
        return _with(self.start, self.log[:prefix])

    def crashes(
        self,
        rng: random.Random,
        *,
        subsets: int,
        first: int = 0,
        only: Sequence[str] = ("killed", "dropped", "applied", "torn"),
    ) -> Iterator[Crash]:
        """Yield crashes after every prefix of the log, `subsets` random ones for each.

        Parameters
        ----------
        first : int
            Shortest prefix to crash after.
        only : sequence of str
            The kinds of certain crashes to yield besides the random ones.
        """
        durable, pending = self.start.copy(), []
        for prefix in range(len(self.log) + 1):
            if prefix:
                durable, pending = _advance(durable, pending, self.log[prefix - 1])
            if prefix < first:
                continue
            for how, kept in self._choices(rng, pending, prefix, subsets):
                if how.partition(" ")[0] in (*only, "subset"):
                    yield Crash(_with(durable, kept, pending), durable, prefix, how)

    def _choices(
        self, rng: random.Random, pending: list[Operation], prefix: int, subsets: int
    ) -> Iterator[tuple[str, list[Operation]]]:
        yield "dropped", []
        if prefix < len(self.log) and self.log[prefix].kind == "write":
            yield "killed while writing", [*pending, self.log[prefix].torn(rng)]
        if not pending:
            return
        yield "applied", pending
        writes = [i for i, operation in enumerate(pending) if operation.kind == "write"]
        if writes:
            last = writes[-1]
            torn = pending[last].torn(rng)
            yield "torn last write", [*pending[:last], torn, *pending[last + 1 :]]
        for number in range(subsets):
            share = rng.random()
            kept = [
                operation.torn(rng) if rng.random() < 0.3 else operation
                for operation in pending
                if rng.random() < share
            ]
            yield f"subset {number}", kept


def _advance(
    durable: Disk, pending: list[Operation], operation: Operation
) -> tuple[Disk, list[Operation]]:
    if not operation.is_sync:
        return durable, [*pending, operation]
    covered = [earlier for earlier in pending if operation.covers(earlier)]
    if not covered:
        return durable, pending
    rest = [earlier for earlier in pending if not operation.covers(earlier)]
    return _with(durable, covered, pending), rest


def _with(disk: Disk, done: Sequence[Operation], seen: Sequence[Operation] = ()) -> Disk:
    """Return a disk after some operations; those only `seen` left inodes but no names."""
    after = disk.copy()
    for operation in (*seen, *done):
        after.prepare(operation)
    for operation in done:
        after.apply(operation)
    return after
