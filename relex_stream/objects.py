"""Objects below a URL, through fsspec: whole and ranged reads, puts with and without a condition.

A put is atomic: an object is there whole, as before or as put. What fsspec has no common word for
is a put that only takes place if the object is still the one that was read; that is done here, for
the services that can. Nothing of fsspec is imported before a URL is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from relex_stream.errors import MissingDependencyError, OptionError, RelexStreamError, RemoteError
from relex_stream.locations import Url

CONNECTIONS = 32
"""Requests under way at a time, at most: of reading ahead and of writing behind together."""

_ONE_PUT_BYTES = 5 << 30
"""Below that S3 takes an object in one request; only such a request takes a condition here."""

_AGAIN_AFTER_S = (0.1, 0.5, 2.0, 0.0)

_INSTALL = {
    "s3": "pip install 'relex-stream[remote]'",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
}


class NotAsExpectedError(Exception):
    """An object is not the one a put was to replace, or is there where none was to be."""


class ObjectInfo(NamedTuple):
    """What is known of an object without reading it.

    Attributes
    ----------
    size : int
        Bytes.
    version : str
        Differs when the bytes differ: an ETag, or what the service has in its place.
    modified_s : float
        When it was last put, in seconds since 1970 by the clock of the service; 0 if unknown.
    """

    size: int
    version: str
    modified_s: float


class _Conditions(Protocol):
    """How a service makes a put depend on what is there."""

    def get(self, path: str) -> tuple[bytes, str]:
        """Return an object and its version, by one request."""

    def put(self, path: str, data: bytes, version: str | None) -> str:
        """Put an object in the place of one version; None where there must be none."""

    def remove(self, path: str, version: str) -> None:
        """Remove one version of an object."""


class Objects:
    """The objects below one URL; for any number of threads.

    Every method but those that say otherwise raises FileNotFoundError where there is no such
    object, and RemoteError for what else the service says.

    Parameters
    ----------
    url : Url

    Raises
    ------
    MissingDependencyError
        If the package for its protocol is not installed.
    OptionError
        If fsspec knows no such protocol.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._fs = _filesystem(url)
        self._conditions = _conditions(url, self._fs)

    def get(self, key: str) -> bytes:
        """Return an object."""
        if self._conditions is not None:
            # By one request; s3fs's own first asks how large the object is.
            return self.get_version(key)[0]
        with self._said_of(key):
            data: bytes = self._fs.cat_file(self._path(key))
            return data

    def get_range(self, key: str, offset: int, nbytes: int) -> bytes:
        """Return bytes of an object; fewer where it ends before."""
        with self._said_of(key):
            try:
                data: bytes = self._fs.cat_file(self._path(key), start=offset, end=offset + nbytes)
                return data
            except (FileNotFoundError, PermissionError):
                raise
            except (OSError, ValueError):
                # Services refuse ranges behind the end, each with an error of its own.
                if offset >= self._fs.info(self._path(key), **self._fresh)["size"]:
                    return b""
                raise

    def put(self, key: str, data: bytes) -> None:
        """Put an object, whatever is there."""
        with self._said_of(key):
            self._fs.pipe_file(self._path(key), data)

    @property
    def takes_conditions(self) -> bool:
        """Whether `get_version` and `put_if` can be used."""
        return self._conditions is not None

    def get_version(self, key: str) -> tuple[bytes, str]:
        """Return an object and its version."""
        assert self._conditions is not None
        with self._said_of(key):
            return self._conditions.get(self._path(key))

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Put an object in the place of one version of it; None where there must be none.

        Returns
        -------
        str
            The version that was put.

        Raises
        ------
        NotAsExpectedError
            If something else is there; also where the request was sent twice, because no answer
            came to the first, which had been met.
        """
        assert self._conditions is not None
        with self._said_of(key):
            return self._conditions.put(self._path(key), data, version)

    def remove_if(self, key: str, version: str) -> None:
        """Remove one version of an object; NotAsExpectedError if another is there, or none."""
        assert self._conditions is not None
        with self._said_of(key):
            self._conditions.remove(self._path(key), version)

    def info(self, key: str) -> ObjectInfo:
        """Say how large an object is, and of which version; not of a directory."""
        with self._said_of(key):
            found = self._fs.info(self._path(key), **self._fresh)
            if found["type"] != "file":
                raise FileNotFoundError(f"{self.url}/{key} is no object")
            return _info_of(found)

    def names(self) -> dict[str, int | None]:
        """Return what is directly below: sizes of objects, None for directories.

        None is there where nothing is: object storage knows no empty directories.
        """
        with self._said_of(""):
            try:
                found = self._fs.ls(self.url.path, detail=True, **self._fresh)
            except (FileNotFoundError, NotADirectoryError) as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return {}
            prefix = self._below()
            return {
                entry["name"].strip("/").removeprefix(prefix): (
                    int(entry["size"]) if entry["type"] == "file" else None
                )
                for entry in found
                if entry["name"].strip("/").startswith(prefix)
            }

    def listing(self) -> dict[str, ObjectInfo]:
        """Describe every object below, by key; none where nothing is."""
        with self._said_of(""):
            found = self._fs.find(self.url.path, detail=True, **self._fresh)
            prefix = self._below()
            infos = {
                path.strip("/").removeprefix(prefix): _info_of(entry)
                for path, entry in found.items()
                if path.strip("/").startswith(prefix)
            }
        if isinstance(self._conditions, _Memory):
            # Its listings tell no versions.
            infos = {
                key: info._replace(version=self.get_version(key)[1]) for key, info in infos.items()
            }
        return infos

    def _path(self, key: str) -> str:
        return f"{self.url.path}/{key}" if key else self.url.path

    def _below(self) -> str:
        stripped: str = self._fs._strip_protocol(self.url.path)  # noqa: SLF001
        return stripped.strip("/") + "/"

    @property
    def _fresh(self) -> dict[str, bool]:
        # Listings are never kept, but a file system may take one of another of its users'.
        return {"refresh": True} if self.url.protocol in ("s3", "s3a", "gs", "gcs") else {}

    @contextlib.contextmanager
    def _said_of(self, key: str) -> Iterator[None]:
        """Have what goes wrong said in one line that names the object and what to do."""
        try:
            yield
        except (NotAsExpectedError, RelexStreamError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
                raise
            raise RemoteError(f"{self.url / key if key else self.url}: {_advice(error)}") from error


@lru_cache(maxsize=64)
def objects_at(url: Url) -> Objects:
    """Return the objects below a URL; connections are kept."""
    return Objects(url)


def _info_of(entry: dict[str, Any]) -> ObjectInfo:
    """Take what file systems say of an object; each has its own words."""
    version = entry.get("ETag") or entry.get("etag") or entry.get("generation")
    moment = entry.get("LastModified") or entry.get("created") or entry.get("mtime")
    stamp = getattr(moment, "timestamp", None)
    return ObjectInfo(int(entry["size"]), str(version or moment), float(stamp()) if stamp else 0.0)


def _filesystem(url: Url) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(
            f"{url} needs a package that is not installed; "
            f"{_INSTALL.get(url.protocol, _INSTALL['s3'])}"
        ) from error
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS}
    try:
        return fsspec.filesystem(url.protocol, **options)
    except ImportError as error:
        raise MissingDependencyError(
            f"{url} needs a package that is not installed ({error}); "
            f"{_INSTALL.get(url.protocol, 'install it')}"
        ) from error
    except ValueError as error:
        raise OptionError(
            f"{url}: fsspec knows no protocol {url.protocol!r}; use s3://, gs:// or a path"
        ) from error


def _conditions(url: Url, fs: Any) -> _Conditions | None:
    if url.protocol in ("s3", "s3a"):
        return _S3(fs)
    if url.protocol == "memory":
        return _Memory(fs)
    return None


class _S3:
    """Conditions of S3: ``If-Match`` and ``If-None-Match`` of a put, by ETag."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def get(self, path: str) -> tuple[bytes, str]:
        from fsspec.asyn import sync

        bucket, key, _ = self._fs.split_path(path)

        async def read() -> tuple[bytes, str]:
            # Bytes and ETag of the same answer: asked for one after the other they may differ.
            answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)  # noqa: SLF001
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        for wait_s in _AGAIN_AFTER_S:
            # s3fs itself tries again to get an answer, but not to read one that breaks off.
            try:
                found: tuple[bytes, str] = sync(self._fs.loop, read)
            except OSError:
                raise
            except Exception:
                if not wait_s:
                    raise
                time.sleep(wait_s)
            else:
                return found
        raise AssertionError

    def put(self, path: str, data: bytes, version: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._met(path):
            answer = self._fs.pipe_file(path, data, chunksize=_ONE_PUT_BYTES, **condition)
            return str(answer["ETag"])

    def remove(self, path: str, version: str) -> None:
        bucket, key, _ = self._fs.split_path(path)
        with self._met(path):
            self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=version)

    @contextlib.contextmanager
    def _met(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Conflict: another put was under way; whoever asks again sees which one was first.
            if isinstance(error, FileExistsError) or _code(error) in (
                *("PreconditionFailed", "412", "ConditionalRequestConflict", "409"),
                *("NoSuchKey", "404", "OperationAborted"),
            ):
                raise NotAsExpectedError(path) from error
            raise


class _Memory:
    """The same for fsspec's file system in memory, within this process; for tests."""

    _lock = threading.Lock()

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def get(self, path: str) -> tuple[bytes, str]:
        data: bytes = self._fs.cat_file(path)
        return data, hashlib.md5(data, usedforsecurity=False).hexdigest()

    def put(self, path: str, data: bytes, version: str | None) -> str:
        with self._lock:
            try:
                there = self.get(path)[1]
            except FileNotFoundError:
                there = None
            if there != version:
                raise NotAsExpectedError(path)
            self._fs.pipe_file(path, data)
            return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def remove(self, path: str, version: str) -> None:
        with self._lock:
            if self.get(path)[1] != version:
                raise NotAsExpectedError(path)
            self._fs.rm_file(path)


def _code(error: BaseException) -> str | None:
    """Return what S3 calls an error, which s3fs makes an OSError of."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    return None


def _advice(error: Exception) -> str:
    """Say in one line what a service or its client says, and what to do."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    kind = type(error).__name__
    if _code(error) == "NoSuchBucket":
        return "there is no such bucket; check its name, or make it first"
    if isinstance(error, PermissionError) or "Credential" in kind or "TokenRetrieval" in kind:
        return (
            f"access was refused ({text}); set credentials that may use it, for S3 AWS_PROFILE "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "Connect" in kind or isinstance(error, ConnectionError | TimeoutError):
        return (
            f"cannot be reached ({text}); check the network, and for S3 of another provider "
            "AWS_ENDPOINT_URL"
        )
    return f"{text}; run it again, or look into the service"
