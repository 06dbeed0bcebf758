"""The files around weights that are kept: all but weights, training state, and what is left lying.

A subdirectory is kept as a whole or not at all: one that holds weights or state belongs to another
checkpoint, or to the trainer.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import RemoteError, SourceError
from ..listing import file_status, is_directory
from ..locations import Location, Url
from ..objects import objects_at
from ..paths import check_relative_path, is_relative_path
from .directories import MOST_ENTRIES, walk

MAX_SIDE_FILE_BYTES = 64 << 20
"""Larger files beside the weights are taken for state, not for configuration or vocabulary."""

_STATE = (
    # training state, and weights in other formats
    *("optimizer*", "scheduler*", "rng_state*", "training_args.bin", ".metadata"),
    *("*.bin", "*.ckpt", "*.distcp", "*.pt", "*.pth", "*.safetensors"),
)
_LEFT_LYING = (
    # locks, leftovers of downloads, editors and interpreters, file system droppings
    *("*.lock", ".lock*", ".cache*", ".ds_store", ".git", ".nfs*", "*.swp", "__pycache__"),
    *("*.incomplete", "*.part", "*.partial", "*.temp", "*.tmp", ".tmp*", "tmp*", "*~"),
)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


_STATE_PATTERN, _LEFT_PATTERN = _any_of(_STATE), _any_of(_LEFT_LYING)


def names_below(
    directory: Location, names: Iterable[str], known: Collection[str] = ()
) -> list[str]:
    """Return the files of subdirectories that hold nothing but files to keep.

    Parameters
    ----------
    directory : Path or Url
    names : iterable of str
        What is in it.
    known : collection of str
        Subdirectories that are left to the caller.

    Returns
    -------
    list of str
        Paths in the directory; of a subdirectory that is left out its name and a slash. Links to
        directories are not entered.
    """
    if isinstance(directory, Url):
        objects = objects_at(directory)
        if all(size is not None for size in objects.names().values()):
            return []  # nothing is below
        sizes = {path: info.size for path, info in objects.listing().items()}
        return sort_listed({path: sizes[path] for path in sizes if path.split("/")[0] not in known})
    found: list[str] = []
    for name in names:
        inner = directory / name
        if name not in known and inner.is_dir() and not inner.is_symlink():
            found += _sorted_out(name, _files_of(inner, name))
    return found


def sort_listed(files: Mapping[str, int]) -> list[str]:
    """Return what `names_below` does, from a list of all files below with their sizes in bytes.

    Examples
    --------
    >>> sort_listed({"a.json": 1, "b/c.json": 1, "d/e.json": 1, "d/optimizer.pt": 1})
    ['b/c.json', 'd/']
    """
    inner: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path in sorted(files):
        if "/" in path:
            inner[path.split("/")[0]].append((path, files[path]))
    return [path for name, own in inner.items() for path in _sorted_out(name, own)]


def _files_of(directory: Path, name: str) -> Iterator[tuple[str, int]]:
    for path in walk(directory):
        # Broken links are no loss.
        with contextlib.suppress(FileNotFoundError):
            yield f"{name}/{path}", (directory / path).stat().st_size


def _sorted_out(name: str, files: Iterable[tuple[str, int]]) -> list[str]:
    """Return the files to keep of a subdirectory; its name and a slash if it is left out."""
    left_out = [f"{name}/"]
    if not is_kept(name, 0):
        return left_out
    kept: list[str] = []
    try:
        for number, (path, size) in enumerate(files):
            if number == MOST_ENTRIES or _is_state(path, size) or not is_relative_path(path):
                return left_out
            if not _is_left_lying(path):
                kept.append(path)
    except (OSError, SourceError):
        return left_out  # too many, or not to be looked at
    return sorted(kept)


def sort_files(directory: Location, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return side files and skipped files among `names`, paths in the directory, in their order."""
    side_files: list[str] = []
    skipped_files: list[str] = []
    for name in names:
        if name.endswith("/"):
            skipped_files.append(name)  # as `names_below` has it
            continue
        try:
            status = file_status(directory / name)
        except RemoteError:
            raise
        except OSError:
            # A broken link, or gone since the listing; or a directory on object storage.
            if not is_directory(directory / name):
                skipped_files.append(name)
            continue
        if not status.is_regular:
            continue
        if not is_kept(name, status.size):
            skipped_files.append(name)
            continue
        try:
            side_files.append(check_relative_path(name))
        except ValueError as error:
            raise SourceError(f"{directory}: {error}; rename or remove that file") from None
    return tuple(side_files), tuple(skipped_files)


def is_kept(path: str, nbytes: int) -> bool:
    """Return whether a file beside the weights is kept, by its relative path and size in bytes.

    Examples
    --------
    >>> is_kept("config.json", 700), is_kept("optimizer.pt", 700), is_kept("log.txt", 1 << 30)
    (True, False, False)
    """
    return not _is_state(path, nbytes) and not _is_left_lying(path)


def _is_state(path: str, nbytes: int) -> bool:
    """Say whether a file is state or weights, or of a directory of such."""
    return nbytes > MAX_SIDE_FILE_BYTES or any(
        map(_STATE_PATTERN.fullmatch, path.lower().split("/"))
    )


def _is_left_lying(path: str) -> bool:
    return any(map(_LEFT_PATTERN.fullmatch, path.lower().split("/")))
