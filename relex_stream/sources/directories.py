"""Listing what is below a directory, and telling of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import SourceError

MOST_ENTRIES = 10_000
"""Files and directories of a subdirectory that may belong to a model."""


def summarise(names: list[str], limit: int = 5) -> str:
    """Return up to `limit` names and the number of the others, for a message.

    Examples
    --------
    >>> summarise(["a", "b", "c"], limit=2), summarise([])
    ('a, b and 1 more', 'nothing')
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "nothing"


def list_files(directory: Path) -> list[str]:
    """Return the paths of all files below a directory, sorted, relative to it; see `walk`."""
    return sorted(walk(directory))


def walk(directory: Path) -> Iterator[str]:
    """Yield the paths of all files below a directory, relative to it.

    Directories that are links are not entered. Without such a directory there are none.

    Raises
    ------
    SourceError
        If it has more than 10,000 entries: it is no model's.
    """
    entries = 0
    for parent, inner, names in os.walk(directory):
        entries += len(inner) + len(names)
        if entries > MOST_ENTRIES:
            raise SourceError(
                f"{directory}: more than {MOST_ENTRIES} files and directories; move what is not "
                "the model's elsewhere"
            )
        below = Path(parent).relative_to(directory)
        yield from ((below / name).as_posix() for name in names)
