"""Directories and files of checkpoints, wherever they are: what is there, how large, whole reads.

What is not as it should be is named here, with what to do; blocks of bytes are for
`sources.reader`.
"""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from typing import NamedTuple

from relex_stream.errors import RemoteError, SourceError
from relex_stream.locations import Location, Url
from relex_stream.objects import ObjectInfo, objects_at


class FileStatus(NamedTuple):
    """What tells a file from what it was before.

    Attributes
    ----------
    size : int
        Bytes.
    modified_ns : int
        When it was last changed, in nanoseconds; of an object, a number made of its version.
    is_regular : bool
        Whether it is a file with bytes of its own.
    """

    size: int
    modified_ns: int
    is_regular: bool


def list_names(directory: Location) -> list[str]:
    """Return the sorted names of a directory's entries.

    Raises
    ------
    SourceError
        If it is missing, not a directory, or cannot be listed.
    """
    try:
        if isinstance(directory, Url):
            names = sorted(objects_at(directory).names())
            if not names:
                raise FileNotFoundError(str(directory))
            return names
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        raise SourceError(f"{directory}: no such directory; check the path") from None
    except NotADirectoryError:
        raise SourceError(
            f"{directory}: a file where a directory belongs; check the path"
        ) from None
    except RemoteError:
        raise
    except OSError as error:
        raise SourceError(
            f"{directory}: cannot be listed: {error.strerror}; check its permissions"
        ) from error


def is_directory(path: Location) -> bool:
    """Say whether there is a directory; on object storage, whether anything is below."""
    return bool(objects_at(path).names()) if isinstance(path, Url) else path.is_dir()


def is_file(path: Location) -> bool:
    """Say whether there is a file, or a link to one."""
    if isinstance(path, Url):
        try:
            file_status(path)
        except FileNotFoundError:
            return False
        return True
    return path.is_file()


def is_link(path: Location) -> bool:
    """Say whether there is a link, whatever it leads to."""
    return not isinstance(path, Url) and path.is_symlink()


def file_status(path: Location) -> FileStatus:
    """Look at a file; OSError if there is none."""
    if isinstance(path, Url):
        return status_of(objects_at(path.parent).info(path.name))
    status = path.stat()
    return FileStatus(status.st_size, status.st_mtime_ns, stat.S_ISREG(status.st_mode))


def status_of(info: ObjectInfo) -> FileStatus:
    """Return what tells an object from what it was before."""
    number = int.from_bytes(sha256(info.version.encode()).digest()[:7], "little")
    return FileStatus(info.size, number, is_regular=True)


def read_file(path: Location) -> bytes:
    """Return all bytes of a file.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    try:
        if isinstance(path, Url):
            return objects_at(path.parent).get(path.name)
        return path.read_bytes()
    except RemoteError:
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error}") from error


def read_start(path: Url, nbytes: int) -> bytes:
    """Return the first bytes of an object; OSError if there is none."""
    return objects_at(path.parent).get_range(path.name, 0, nbytes)
