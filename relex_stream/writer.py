"""The write side: a directory of preallocated files, filled block by block, whole or absent.

Files are made at their full size under a temporary name beside the final one, written at any
offset from any thread, and counted; only when every byte was written are they synced and the
directory renamed. Memory does not depend on the size of a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from relex_stream.errors import OutputError
from relex_stream.pagecache import start_writing
from relex_stream.paths import check_relative_path

MARKER = "relex_stream.json"
"""A file in an output that lists, under ``"files"``, every file this package wrote there."""

_WORTH_STARTING_BYTES = 256 << 10
"""Of a write that the disk is told to begin with: small ones are better put together."""


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
        self._retired = self.path.with_name(f".{self.path.name}.relex-old")
        self._sizes: dict[str, int] = {}
        self._written: dict[str, int] = {}
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
                "model that extrapolate wrote"
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
        with self._naming(f"preparing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            self._take_lock()
            try:
                self._bring_back()
                self._check_free()
                for entry in self._partial.iterdir():
                    _remove(entry)
            except BaseException:
                self._give_up()
                raise
        return self

    @contextmanager
    def _naming(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{doing} failed: {error.strerror or error}") from error

    def _bring_back(self) -> None:
        # A run ended between its two renames; what it would have replaced comes back.
        if os.path.lexists(self._retired) and not os.path.lexists(self.path):
            os.rename(self._retired, self.path)

    def _give_up(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        os.close(self._lock_descriptor)

    def _take_lock(self) -> None:
        self._lock_descriptor = os.open(self._partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_descriptor)
            raise OutputError(
                f"another process is writing {self.path}; wait for it or end it"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._done:
            os.close(self._lock_descriptor)
            return
        try:
            self._bring_back()
        finally:
            self._give_up()

    # --- filling --------------------------------------------------------------------------------

    def preallocate(self, relative_path: str, size: int) -> None:
        """Make a file of `size` bytes to be filled by `write`."""
        with (
            self._naming(f"making {relative_path} of {self.path}"),
            self._place(relative_path).open("wb") as file,
        ):
            file.truncate(size)
        self._sizes[relative_path] = size
        self._written[relative_path] = 0

    def write(self, relative_path: str, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`; from any thread, every byte once."""
        view = memoryview(data).cast("B")
        size = len(view)
        if offset < 0 or offset + size > self._sizes[relative_path]:
            raise AssertionError(f"write outside {relative_path}")
        with self._naming(f"writing {relative_path} of {self.path}"):
            descriptor = os.open(self._partial / relative_path, os.O_WRONLY | os.O_CLOEXEC)
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
        with self._lock:
            self._written[relative_path] += size

    def write_file(self, relative_path: str, data: bytes) -> None:
        """Write a small file whole."""
        with self._naming(f"writing {relative_path} of {self.path}"):
            self._place(relative_path).write_bytes(data)
        self._sizes[relative_path] = self._written[relative_path] = len(data)

    def _place(self, relative_path: str) -> Path:
        try:
            check_relative_path(relative_path)
        except ValueError as error:
            raise OutputError(f"{relative_path!r} is no path inside the output: {error}") from error
        path = self._partial / relative_path
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
                self._naming(f"reading {name} of {self.path} back"),
                (self._partial / name).open("rb", buffering=0) as file,
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
        with self._naming(f"finishing {self.path}"):
            for name in self._sizes:
                _sync(self._partial / name)
            for directory in [p for p in self._partial.rglob("*") if p.is_dir()]:
                _sync(directory)
            _sync(self._partial)
            # Something may have come there since the check on entering.
            self._check_free()
            if os.path.lexists(self.path):
                _remove(self._retired)
                os.rename(self.path, self._retired)
            os.rename(self._partial, self.path)
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
