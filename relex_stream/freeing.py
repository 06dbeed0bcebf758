"""Deleting the weights files of steps that a store has given back bit for bit.

Nothing here decides that a step was verified. What it does see to: only the files that were
verified, as they were verified; only inside the directory of the checkpoints, whatever links say;
never the base's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from relex_stream.specs import SourceCheckpoint
from relex_stream.watch_ledger import VerifiedFile


class KeptError(Exception):
    """A file must stay; the text says why, as a clause."""


def files_to_free(source: SourceCheckpoint, checkpoints: Path) -> tuple[VerifiedFile, ...]:
    """Return the weights files of a checkpoint that a store replaces.

    Those that it can put together again, and those that hold nothing but changes; not those that
    also hold what is not kept, like the state of an optimizer.
    """
    directory = Path(os.path.relpath(source.directory, checkpoints.absolute()))
    return tuple(
        VerifiedFile((directory / file.relative_path).as_posix(), file.size, file.modified_ns)
        for file in source.weights_files
        if file.parts is not None or source.patch is not None
    )


def steps_to_free(
    verified: Iterable[int], stored: Sequence[int], *, keep_every: int | None, keep_last: int
) -> list[int]:
    """Return the verified steps whose weights may go, ascending.

    Parameters
    ----------
    verified : iterable of int
    stored : sequence of int
        All steps in the store, ascending; the last `keep_last` of them stay.
    keep_every : int, optional
        Multiples of this stay.

    Examples
    --------
    >>> steps_to_free([10, 20, 30, 40], [10, 20, 30, 40], keep_every=20, keep_last=1)
    [10, 30]
    """
    last = set(stored[-keep_last:]) if keep_last else set()
    return sorted(
        step
        for step in verified
        if step not in last and not (keep_every is not None and step % keep_every == 0)
    )


class Remover:
    """Removes verified files below a directory, and nothing else.

    Parameters
    ----------
    checkpoints : Path
        What lies outside, links followed, stays.
    protected : iterable of path
        Files that stay under any name: the base's.
    """

    def __init__(self, checkpoints: Path, protected: Iterable[Path | str]) -> None:
        self._root = os.path.realpath(checkpoints)
        self._protected = {
            (status.st_dev, status.st_ino) for path in protected for status in [os.stat(path)]
        }

    def check(self, file: VerifiedFile) -> int:
        """Return how many bytes removing a file would free; 0 for a link, or if it is gone.

        Raises
        ------
        KeptError
            If it must stay.
        """
        return self._reach(file, remove=False)

    def remove(self, file: VerifiedFile) -> int:
        """Remove a file, if it is there; return what that freed.

        Raises
        ------
        KeptError
            If it must stay, or cannot be removed.
        """
        return self._reach(file, remove=True)

    def _reach(self, file: VerifiedFile, *, remove: bool) -> int:
        directory, name = os.path.split(os.path.join(self._root, file.path))
        directory = os.path.realpath(directory)
        if not self._is_inside(directory):
            raise KeptError(f"{file.path} lies outside the checkpoints, in {directory}")
        try:
            with _opened_below(self._root, directory) as descriptor:
                freed = self._checked(file, os.path.join(directory, name), descriptor)
                if remove:
                    os.unlink(name, dir_fd=descriptor)
                return freed
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise KeptError(f"{file.path} cannot be removed: {error.strerror}") from error

    def _checked(self, file: VerifiedFile, path: str, directory: int) -> int:
        """Return what removing a file in an opened directory frees."""
        name = os.path.basename(path)
        here = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISLNK(here.st_mode) and not self._is_inside(os.path.realpath(path)):
            raise KeptError(f"{file.path} is a link to a file outside the checkpoints")
        status = os.stat(name, dir_fd=directory)
        if (status.st_dev, status.st_ino) in self._protected:
            raise KeptError(f"{file.path} is a file of the base")
        if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (
            file.size,
            file.modified_ns,
        ):
            raise KeptError(f"{file.path} has changed since it was verified")
        return here.st_size if stat.S_ISREG(here.st_mode) and here.st_nlink == 1 else 0

    def _is_inside(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root + os.sep)


@contextmanager
def _opened_below(root: str, directory: str) -> Iterator[int]:
    """Open a directory, free of links as a path, one level at a time: no link gets in between."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(root, flags)
    try:
        for part in Path(directory).relative_to(root).parts:
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
