"""Places that users name: directories of this machine, or URLs of object storage.

A `Url` does what this package asks of a ``pathlib.Path`` whose bytes it does not touch: it is
joined with ``/``, named in messages, pickled into tasks. It is no ``os.PathLike``, so that nothing
can take it for a local file.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from relex_stream.errors import OptionError

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
_FLATTENED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")


@dataclass(frozen=True, order=True)
class Url:
    """A directory, or a file in it, on object storage.

    Attributes
    ----------
    protocol : str
        As fsspec knows it: ``"s3"``, ``"gs"``.
    path : str
        Bucket and key, without a ``/`` at either end.

    Examples
    --------
    >>> url = Url.parse("s3://bucket/run.store/")
    >>> str(url), str(url / "HEAD"), url.name, str(url.parent)
    ('s3://bucket/run.store', 's3://bucket/run.store/HEAD', 'run.store', 's3://bucket')
    """

    protocol: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """Take a URL apart.

        Raises
        ------
        OptionError
            If it names no bucket, chains several file systems, or has parts that are no names.
        """
        match = _URL.fullmatch(text)
        assert match is not None
        if match[1] == "hf":
            raise OptionError(
                f"{text}: only bases and checkpoints may be on the Hub; give a directory here, "
                "or a URL of object storage"
            )
        path = match[2].rstrip("/")
        if not path or "::" in text or any(part in ("", ".", "..") for part in path.split("/")):
            raise OptionError(f"{text!r} is not a URL of the form s3://bucket/path; write it so")
        return cls(match[1], path)

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, below: str) -> Url:
        return Url(self.protocol, posixpath.normpath(f"{self.path}/{below}"))

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.path)

    @property
    def parent(self) -> Url:
        """The URL without its last part; of a bucket the bucket itself."""
        return Url(self.protocol, posixpath.dirname(self.path) or self.path)

    def absolute(self) -> Url:
        """Return itself: every URL is absolute."""
        return self

    def resolve(self) -> Url:
        """Return itself: there are no links."""
        return self


Location = Path | Url
"""A directory or file, wherever it is."""


def location(place: str | os.PathLike[str] | Url) -> Location:
    """Return where a user points to.

    Raises
    ------
    OptionError
        If it is a URL that cannot be one of object storage, or one that went through ``Path``,
        which makes one slash of two.

    Examples
    --------
    >>> location("s3://bucket/run.store"), location("runs/a").name, str(location("file:///a/b"))
    (Url(protocol='s3', path='bucket/run.store'), 'a', '/a/b')
    """
    if isinstance(place, Url):
        return place
    text = os.fspath(place)
    match = _URL.fullmatch(text)
    if match is None:
        if not isinstance(place, str) and _FLATTENED.match(text):
            raise OptionError(f"{text!r} was a URL before it became a Path; give it as a str")
        return Path(place)
    if match[1] in ("file", "local"):
        return Path(match[2])
    return Url.parse(text)


def local_directory(place: str | os.PathLike[str] | Url, what: str) -> Path:
    """Return a directory of this machine, for what is only ever there.

    Raises
    ------
    OptionError
        If it is a URL; `what` names it for people.
    """
    found = location(place)
    if isinstance(found, Url):
        raise OptionError(
            f"{what} must be a directory of this machine, not {found}; copy from or to there, "
            "e.g. with: aws s3 cp --recursive"
        )
    return found


def relative_to(target: Location, start: Location) -> str:
    """Return how `target` is to be found from a directory `start`, both without links.

    A relative path where one leads there; else `target` as it is.

    Examples
    --------
    >>> relative_to(location("s3://bucket/run/base"), location("s3://bucket/run/store"))
    '../base'
    >>> relative_to(location("s3://other/base"), location("s3://bucket/run/store"))
    's3://other/base'
    """
    if isinstance(target, Url) and isinstance(start, Url):
        if (target.protocol, target.path.split("/")[0]) != (
            start.protocol,
            start.path.split("/")[0],
        ):
            return str(target)
        return posixpath.relpath(f"/{target.path}", f"/{start.path}")
    if isinstance(target, Url) or isinstance(start, Url):
        return str(target)
    return os.path.relpath(target, start)


def lies_in(inner: Location, outer: Location) -> bool:
    """Say whether a place is below another, or is it; both without links.

    Examples
    --------
    >>> lies_in(location("s3://b/run/store"), location("s3://b/run"))
    True
    """
    if isinstance(inner, Url) and isinstance(outer, Url):
        return f"{inner}/".startswith(f"{outer}/")
    if isinstance(inner, Url) or isinstance(outer, Url):
        return False
    return outer in (inner, *inner.parents)


def joined(start: Location, hint: str) -> Location:
    """Return what `relative_to` described.

    Examples
    --------
    >>> str(joined(location("s3://bucket/run/store"), "../base"))
    's3://bucket/run/base'
    >>> str(joined(location("s3://bucket/run/store"), "/models/base"))
    '/models/base'
    """
    if _URL.fullmatch(hint):
        return Url.parse(hint)
    if isinstance(start, Url) and not hint.startswith("/"):
        return start / hint
    return Path(os.path.normpath(start / hint if isinstance(start, Path) else hint))
