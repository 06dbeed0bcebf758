"""Checks of paths from the outside, before they are joined to a directory or written to."""

from __future__ import annotations

import re
from pathlib import Path

from relex_stream.errors import OptionError
from relex_stream.locations import Location, Url

_MAX_NAME_BYTES = 255  # what the usual file systems allow for one name
_DRIVE = re.compile(r"[A-Za-z]:")


def check_relative_path(text: str) -> str:
    """Return `text` if it names a file below whatever directory it is joined to.

    Index files, stores and recipes name files; a path among them must not be able to reach out of
    its directory on any operating system. The file system is not looked at.

    Parameters
    ----------
    text : str
        A path with ``/`` between its parts.

    Returns
    -------
    str
        `text` itself, unchanged.

    Raises
    ------
    ValueError
        If it is empty or absolute, has a drive letter, a backslash, a NUL, an empty part, ``.`` or
        ``..`` as a part, a name over 255 bytes, or text that UTF-8 cannot encode.

    Examples
    --------
    >>> check_relative_path("tokenizer/vocab.json")
    'tokenizer/vocab.json'
    >>> check_relative_path("../secret")
    Traceback (most recent call last):
    ...
    ValueError: unsafe path '../secret': a part is '..'
    """
    problem = _problem(text)
    if problem is not None:
        shown = text if len(text) <= 300 else text[:300] + "..."
        raise ValueError(f"unsafe path {shown!r}: {problem}")
    return text


def is_relative_path(text: str) -> bool:
    """Return whether `check_relative_path` takes it.

    Examples
    --------
    >>> is_relative_path("a/b.json"), is_relative_path("../b.json")
    (True, False)
    """
    return _problem(text) is None


def _problem(text: str) -> str | None:
    problems = (
        (not text, "it is empty"),
        ("\0" in text, "it holds a NUL"),
        ("\\" in text, "it holds a backslash"),
        (text.startswith("/"), "it is absolute"),
        (_DRIVE.match(text), "it has a drive letter"),
        (any("\ud800" <= char <= "\udfff" for char in text), "it is not valid Unicode text"),
    )
    parts = (_problem_of_part(part) for part in text.split("/"))
    return next((clause for found, clause in problems if found), next(filter(None, parts), None))


def _problem_of_part(part: str) -> str | None:
    if not part:
        return "a part is empty"
    if part in (".", ".."):
        return f"a part is {part!r}"
    size = len(part.encode(errors="replace"))
    if size > _MAX_NAME_BYTES:
        return f"a name has {size} bytes, more than {_MAX_NAME_BYTES}"
    return None


def refuse_inside(path: Path, directory: Location, what: str, of: str) -> None:
    """Refuse a path that is, or lies in, a directory that must stay as it is.

    On object storage no path of this machine does.

    Raises
    ------
    OptionError
        If so; `what` and `of` name the two for people.
    """
    if isinstance(directory, Url):
        return
    inner, outer = path.resolve(), directory.resolve()
    if inner == outer or outer in inner.parents:
        raise OptionError(f"{what} {path} lies inside {of} {directory}; name a place outside it")
    if inner in outer.parents:
        raise OptionError(f"{of} {directory} lies inside {what} {path}; name another place")
