"""The write side: a directory of preallocated files, filled block by block, whole or absent.

Files are made at their full size under a temporary name beside the final one, written at any
offset from any thread, and counted; only when every byte was written are they synced and the
directory renamed. Memory does not depend on the size of a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from relex_stream.errors import OutputError
from relex_stream.pagecache import start_writing
from relex_stream.paths import check_relative_path

MARKER = "relex_stream.json"
"""A file in an output that lists, under ``"files"``, every file this package wrote there."""

_LOCK_NAME = "LOCK"

_WORTH_STARTING_BYTES = 256 << 10
"""Of a write that the disk is told to begin with: small ones are better put together."""


class Filler:
    """Writes blocks into the files of an output, from anywhere that sees its directory.

    May be used from several threads, and pickled.

    Parameters
    ----------
    directory : Path
        Where the files are for now.
    path : Path
        The output's name, for messages.
    sizes : dict
        Bytes of each file, by relative path.

    Attributes
    ----------
    directory : Path
    """

    def __init__(self, directory: Path, path: Path, sizes: dict[str, int]) -> None:
        self.directory = directory
        self._path = path
        self._sizes = sizes
        self._local = threading.local()

    def __getstate__(self) -> tuple[Path, Path, dict[str, int]]:
        return self.directory, self._path, self._sizes

    def __setstate__(self, state: tuple[Path, Path, dict[str, int]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def write(self, relative_path: str, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`; every byte once.

        Raises
        ------
        OutputError
            If the disk fails, or the output is no longer being made.
        """
        view = memoryview(data).cast("B")
        size = len(view)
        if offset < 0 or offset + size > self._sizes[relative_path]:
            raise AssertionError(f"write outside {relative_path}")
        with naming(f"writing {relative_path} of {self._path}"):
            descriptor = os.open(self.directory / relative_path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                start = offset
                while view:
                    count = os.pwrite(descriptor, view, offset)
                    view = view[count:]
                    offset += count
                if size >= _WORTH_STARTING_BYTES:
                    start_writing(descriptor, start, size)
            finally:
                os.close(descriptor)
        self._written[relative_path] += size

    @property
    def _written(self) -> Counter[str]:
        written: Counter[str] | None = getattr(self._local, "written", None)
        if written is None:
            written = self._local.written = Counter()
        return written

    def take_written(self) -> Counter[str]:
        """Return the bytes that this thread wrote since it last asked, by file."""
        written, self._local.written = self._written, Counter()
        self._local.unsynced = getattr(self._local, "unsynced", set()) | set(written)
        return written

    def sync(self) -> None:
        """Put on the disk what this thread wrote before it last called `take_written`."""
        for relative_path in sorted(getattr(self._local, "unsynced", ())):
            with naming(f"writing {relative_path} of {self._path}"):
                _sync(self.directory / relative_path)
        self._local.unsynced = set()


@contextmanager
def naming(doing: str) -> Iterator[None]:
    """Return a context in which an error of the disk becomes one that says what was being done."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{doing} failed: {error.strerror or error}") from error


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a single file before anything is written.

    Raises
    ------
    OutputError
        If something is there that is not to be replaced, or the directory is not there.
    """
    if not path.name or path.is_dir():
        raise OutputError(f"{path} is a directory; name a file")
    if os.path.lexists(path):
        if not overwrite:
            raise OutputError(f"{path} exists; name another file, or give --overwrite")
        if path.is_symlink() or not path.is_file():
            raise OutputError(f"{path} is not a plain file; it is left as it is")
    elif not path.parent.is_dir():
        raise OutputError(f"there is no directory {path.parent}; make it first")


def write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a single file, which appears under its name only when complete and on the disk.

    Raises
    ------
    OutputError
        As `check_file`, or if the disk fails; what was there is then still there.
    """
    check_file(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.relex-partial")
    with naming(f"writing {path}"):
        try:
            partial.write_bytes(data)
            _sync(partial)
            # Something may have come there meanwhile.
            check_file(path, overwrite=overwrite)
            os.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync(path.parent)


class OutputDirectory:
    """A directory that appears under its name only when complete (a context manager).

    Parameters
    ----------
    path : Path
        The final name.
    overwrite : bool
        Replace a directory there, if it holds nothing but what this package wrote, by its
        `MARKER`.

    Raises
    ------
    OutputError
        On entering: if something is there already and is not to be replaced, or the directory
        cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        # Only the last name is taken as it is: a link as OUT would be replaced, not followed.
        self.path = path.parent.resolve() / path.name if path.name else path.resolve()
        self.overwrite = overwrite
        self._partial = self.path.with_name(f".{self.path.name}.relex-partial")
        # Of this run alone: a task of one that was given up may still be writing somewhere.
        self._directory = self._partial / uuid.uuid4().hex[:12]
        self._retired = self.path.with_name(f".{self.path.name}.relex-old")
        self._sizes: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._filler = Filler(self._directory, self.path, self._sizes)
        self._lock = threading.Lock()
        self._lock_descriptor = -1
        self._done = False

    def check(self, total_bytes: int) -> None:
        """Refuse before anything is written.

        Parameters
        ----------
        total_bytes : int
            Bytes that will be written.

        Raises
        ------
        OutputError
            If the path is taken, or the disk has no room.
        """
        self._check_free()
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"{parent} is not a directory; name another place for the output")
        free = shutil.disk_usage(parent).free
        if total_bytes > free:
            raise OutputError(
                f"the output needs {total_bytes} bytes, {parent} has {free} free; "
                "free some or name another place"
            )

    def _check_free(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.overwrite:
            raise OutputError(
                f"{self.path} exists; name another directory, or give --overwrite to replace a "
                "model that relex-stream wrote"
            )
        if self.path.is_symlink() or not self.path.is_dir():
            raise OutputError(f"{self.path} is not a directory; it is left as it is")
        own = _listed_files(self.path / MARKER)
        for found in self.path.rglob("*"):
            name = found.relative_to(self.path).as_posix()
            if found.is_symlink() or (not found.is_dir() and name not in own):
                raise OutputError(
                    f"{self.path} holds {name}, which relex-stream did not write there; "
                    "it is left as it is: name another directory, or remove it yourself"
                )

    def __enter__(self) -> Self:
        with naming(f"preparing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._bring_back()
                self._check_free()
                for entry in self._partial.iterdir():
                    if entry.name != _LOCK_NAME:
                        _remove(entry)
                self._directory.mkdir()
            except BaseException:
                self._let_go()
                raise
        return self

    def _bring_back(self) -> None:
        # A run ended between its two renames; what it would have replaced comes back.
        if os.path.lexists(self._retired) and not os.path.lexists(self.path):
            os.rename(self._retired, self.path)

    def _take_lock(self) -> None:
        place = self._partial / _LOCK_NAME
        while True:
            self._partial.mkdir(exist_ok=True)
            # A file, and open for writing: network file systems lock nothing else for other hosts.
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise OutputError(
                    f"another process is writing {self.path}; wait for it or end it"
                ) from error
            except OSError:
                os.close(descriptor)
                raise
            # Its last holder may have removed it between the two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(place)):
                    self._lock_descriptor = descriptor
                    return
            os.close(descriptor)

    def _let_go(self) -> None:
        """Remove what only this run had, and give the lock back; nothing here is an error."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(self._partial / _LOCK_NAME)
        os.close(self._lock_descriptor)
        # Not before: network file systems keep another name of a file that is open.
        with contextlib.suppress(OSError):
            os.rmdir(self._partial)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._done:
            self._let_go()
            return
        try:
            self._bring_back()
        finally:
            self._let_go()

    # --- filling --------------------------------------------------------------------------------

    def preallocate(self, relative_path: str, size: int) -> None:
        """Make a file of `size` bytes to be filled by `write`."""
        with (
            naming(f"making {relative_path} of {self.path}"),
            self._place(relative_path).open("wb") as file,
        ):
            file.truncate(size)
        self._sizes[relative_path] = size
        self._written[relative_path] = 0

    @property
    def filler(self) -> Filler:
        """What blocks are written with; tell `add_written` what it says they were."""
        return self._filler

    def add_written(self, written: Mapping[str, int]) -> None:
        """Take note of bytes that were written by a `Filler`, by file."""
        with self._lock:
            for relative_path, size in written.items():
                self._written[relative_path] += size

    def write(self, relative_path: str, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`; from any thread, every byte once."""
        self._filler.write(relative_path, offset, data)
        self.add_written(self._filler.take_written())

    def write_file(self, relative_path: str, data: bytes) -> None:
        """Write a small file whole."""
        with naming(f"writing {relative_path} of {self.path}"):
            self._place(relative_path).write_bytes(data)
        self._sizes[relative_path] = self._written[relative_path] = len(data)

    def _place(self, relative_path: str) -> Path:
        try:
            check_relative_path(relative_path)
        except ValueError as error:
            raise OutputError(f"{relative_path!r} is no path inside the output: {error}") from error
        path = self._directory / relative_path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def files(self) -> list[str]:
        """Relative paths of all files begun so far."""
        return sorted(self._sizes)

    def hash_files(self, report: Callable[[int], None]) -> dict[str, str]:
        """Return the SHA-256 of every file, read back from where it was written."""
        digests = {}
        for name in sorted(self._sizes):
            digest = hashlib.sha256()
            with (
                naming(f"reading {name} of {self.path} back"),
                (self._directory / name).open("rb", buffering=0) as file,
            ):
                while block := file.read(1 << 20):
                    digest.update(block)
                    report(len(block))
            digests[name] = digest.hexdigest()
        return digests

    # --- the end --------------------------------------------------------------------------------

    def finish(self) -> None:
        """Check that every byte was written, sync, and give the directory its name.

        Raises
        ------
        OutputError
            If the disk fails, or something that is not to be replaced has come to the path.
        """
        for name, size in self._sizes.items():
            if self._written[name] != size:
                raise AssertionError(f"{name}: {self._written[name]} of {size} bytes were written")
        with naming(f"finishing {self.path}"):
            for name in self._sizes:
                _sync(self._directory / name)
            for directory in [p for p in self._directory.rglob("*") if p.is_dir()]:
                _sync(directory)
            _sync(self._directory)
            # Something may have come there since the check on entering.
            self._check_free()
            if os.path.lexists(self.path):
                _remove(self._retired)
                os.rename(self.path, self._retired)
            os.rename(self._directory, self.path)
            self._done = True
            _sync(self.path.parent)
            _remove(self._retired)


def _listed_files(marker: Path) -> set[str]:
    try:
        listed = json.loads(marker.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
