"""What is asked of the Hugging Face Hub: refs, commits, listings, ranges of bytes.

The session of huggingface_hub makes the requests, so that token, proxies, certificates, endpoint
and offline mode are what they are for every other program. But its downloads cannot be stopped, and
begin anew after each interruption (huggingface_hub #4228); so what is asked is said here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import quote

from relex_stream._version import __version__
from relex_stream.errors import HubError, MissingDependencyError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_Answer = TypeVar("_Answer")

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a request is made again; with the last one it has failed."""

LONGEST_WAIT_S = 300.0
"""Seconds: the window of the Hub's rate limits. Who asks for more is not waited for."""

_RETRIED = (408, 429, 500, 502, 503, 504)
_MAX_PAGES = 10_000
"""Ten million files; a listing that goes on is one that leads in a circle."""

_GO_ON = "run the command again, and it goes on where it stopped"


class Ref(NamedTuple):
    """A branch or tag, and the hash of the commit it points to."""

    kind: str
    name: str
    commit: str


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at some commit: path, size in bytes, the checksum that the Hub says.

    ``sha256`` is that of the content, for files kept apart from git (LFS, Xet); of all others
    ``blob_sha1`` is git's.
    """

    path: str
    size: int
    sha256: str | None
    blob_sha1: str | None


class Stopped(Exception):  # noqa: N818 - it is a request that was met, not an error
    """The client was closed while it had work to do."""


def require_hub() -> None:
    """Check that huggingface_hub is there.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"hf:// needs huggingface_hub ({error}); pip install 'relex-stream[hub]'"
        ) from None


class HubClient:
    """Requests to the Hub, made again when they fail for a while; used by several threads at once.

    Raises
    ------
    MissingDependencyError
        If huggingface_hub is not installed.
    """

    def __init__(self) -> None:
        require_hub()
        from huggingface_hub import constants

        self.endpoint: str = constants.ENDPOINT
        self.offline: bool = constants.HF_HUB_OFFLINE
        self._timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._closed = threading.Event()

    def close(self) -> None:
        """Let every request, here or in another thread, end soon with `Stopped`."""
        self._closed.set()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def refs(self, repository: str) -> list[Ref]:
        """Return the branches and tags of a repository.

        Raises
        ------
        HubError
            If it is not there, not to be read with this token, or the Hub cannot be reached.
        """
        found, _ = self._json(repository, f"models/{repository}/refs")
        with _as_the_hub_answers(self.endpoint):
            return [
                Ref(kind, _text(ref["name"]), _hash(ref["targetCommit"]))
                for kind, refs in (("branch", found["branches"]), ("tag", found["tags"]))
                for ref in refs
            ]

    def commit_of(self, repository: str, revision: str) -> str:
        """Return the hash of the commit that a branch, a tag or a shorter hash stands for.

        Raises
        ------
        HubError
            As `refs` does, and if there is no such revision.
        """
        what = f"{repository}@{revision}"
        found, _ = self._json(what, f"models/{repository}/revision/{quote(revision, safe='')}")
        with _as_the_hub_answers(self.endpoint):
            return _hash(found["sha"])

    def files(self, repository: str, commit: str) -> list[HubFile]:
        """Return all files of a repository at a commit.

        Raises
        ------
        HubError
            As `refs` does.
        """
        what = f"{repository}@{commit}"
        files: list[HubFile] = []
        page: str | None = f"models/{repository}/tree/{commit}?recursive=true"
        for _ in range(_MAX_PAGES):
            if page is None:
                return files
            entries, page = self._json(what, page)
            with _as_the_hub_answers(self.endpoint):
                files += [_file(entry) for entry in entries if entry["type"] == "file"]
        raise HubError(f"{what}: the Hub's list of files does not end; name another revision")

    def fetch(
        self,
        repository: str,
        commit: str,
        file: HubFile,
        start: int,
        stop: int,
        write: Callable[[int, bytes], None],
    ) -> None:
        """Fetch a range of a file, going on where a broken transfer ended.

        Parameters
        ----------
        repository, commit : str
        file : HubFile
        start, stop : int
            Bytes; `stop` is the first that is not wanted.
        write : callable
            Takes the offset in the file and bytes of it, in order.

        Raises
        ------
        HubError
            As `refs` does, and if transfers keep breaking or bring something else.
        Stopped
            If the client is closed.
        """
        what = f"{repository}@{commit}: {file.path}"
        url = f"{self.endpoint}/{repository}/resolve/{commit}/{quote(file.path)}"
        at, failures, errors = start, 0, _passing_errors()
        while at < stop:
            before, error = at, None
            try:
                for data in self._bytes(what, url, at, stop, file.size):
                    write(at, data)
                    at += len(data)
            except errors as failed:
                error = failed
            if at < stop:
                # What moves is not broken for good, however often it stops.
                failures = 1 if before < at else failures + 1
                reason = error or EOFError(f"a transfer ended after {at} of {file.size} bytes")
                self._wait(what, reason, failures)

    @contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Return a context in which errors of huggingface_hub become one line, a `HubError`.

        `what` begins with the name of the repository.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            yield
        except _passing_errors() as error:
            self._explain(what, error)
        except LocalEntryNotFoundError as error:
            # What it says itself is that the cache does not have it.
            self._explain(what, error.__cause__ or error)

    def _bytes(self, what: str, url: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # A compressed answer would have other offsets.
        headers = self._headers() | {"Accept-Encoding": "identity"}
        whole = (start, stop) == (0, size)
        if not whole:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        left = stop - start
        with get_session().stream(
            "GET", url, headers=headers, timeout=self._timeout_s, follow_redirects=True
        ) as answer:
            hf_raise_for_status(answer)
            if not whole and answer.status_code != 206:
                raise HubError(
                    f"{what}: {self.endpoint} does not give parts of files; set HF_ENDPOINT to "
                    "one that does"
                )
            # As they come: pieces of a given size would be waited for, and lost with a connection.
            for data in answer.iter_bytes():
                if self._closed.is_set():
                    raise Stopped
                yield data[:left]
                left -= len(data)
                if left <= 0:
                    return

    def _json(self, what: str, path: str) -> tuple[Any, str | None]:
        """Return an answer of the API, and the path of its next page."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        root = f"{self.endpoint}/api/"

        def ask() -> tuple[Any, str | None]:
            answer = get_session().get(
                root + path,
                headers=self._headers(),
                timeout=self._timeout_s,
                follow_redirects=True,
            )
            hf_raise_for_status(answer)
            following = answer.links.get("next", {}).get("url")
            with _as_the_hub_answers(self.endpoint):
                if following is not None and not following.startswith(root):
                    raise ValueError("its pages lead elsewhere")  # where the token must not go
                return answer.json(), following and following.removeprefix(root)

        return self._patiently(what, ask)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(library_name="relex-stream", library_version=__version__)

    def _patiently(self, what: str, ask: Callable[[], _Answer]) -> _Answer:
        """Ask until there is an answer, or the same request failed too often."""
        failures, errors = 0, _passing_errors()
        while True:
            try:
                return ask()
            except errors as error:
                failures += 1
                self._wait(what, error, failures)

    def _wait(self, what: str, error: Exception, failures: int) -> None:
        """Wait before a request is made again, or say why there is no point in that."""
        wait_s = _wait_before_retry(error, failures)
        if wait_s is None:
            self._explain(what, error)
        if self._closed.wait(wait_s):
            raise Stopped

    def _explain(self, what: str, error: BaseException) -> NoReturn:
        from huggingface_hub import errors

        name = what.partition("@")[0].partition(":")[0]
        page = f"{self.endpoint}/{name}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            text = "cannot be asked for in offline mode; unset HF_HUB_OFFLINE"
        elif isinstance(error, errors.GatedRepoError):
            text = f"access is restricted; accept the terms on {page} and set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            text = f"no such revision; choose one of {page}/tree/main"
        elif isinstance(error, errors.RepositoryNotFoundError):
            text = (
                f"no such repository on {self.endpoint}, or a private one; check its name, and set "
                "HF_TOKEN if it is private"
            )
        elif isinstance(error, errors.HfHubHTTPError):
            text = self._explain_status(error)
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            text = f"{self.endpoint} cannot be reached ({reason}); check the network, then {_GO_ON}"
        raise HubError(f"{what}: {text}") from error

    def _explain_status(self, error: HfHubHTTPError) -> str:
        status = error.response.status_code
        if status == 401:
            return f"{self.endpoint} refuses the token; set HF_TOKEN to a valid one"
        if status == 403:
            return "the token may not read it; set HF_TOKEN to one that may"
        if status == 404:
            return "no such file; check the URL, and HF_ENDPOINT if it is set"
        if status == 429:
            return f"too many requests; wait some minutes, or set HF_TOKEN, then {_GO_ON}"
        if status in _RETRIED:
            return f"{self.endpoint} answers {status}; wait a while, then {_GO_ON}"
        return f"{self.endpoint} answers {status}; check the URL, and HF_ENDPOINT if it is set"


def _passing_errors() -> tuple[type[Exception], ...]:
    """Return the errors of requests, many of which pass."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The root of those of httpx or httpx2, whichever huggingface_hub uses.
    return cast(type[Exception], HfHubHTTPError.__bases__[0]), OfflineModeIsEnabled


def _wait_before_retry(error: Exception, failures: int) -> float | None:
    """Return the seconds to wait after a failure, None if there is no point in it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if failures > len(RETRY_WAITS_S) or isinstance(error, OfflineModeIsEnabled):
        return None
    wait_s = RETRY_WAITS_S[failures - 1]
    if not isinstance(error, HfHubHTTPError):
        return wait_s
    if error.response.status_code not in _RETRIED:
        return None
    asked_s = _asked_to_wait(error.response.headers)
    return max(wait_s, asked_s) if asked_s <= LONGEST_WAIT_S else None


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks for, 0 if it does not.

    Examples
    --------
    >>> _asked_to_wait({"retry-after": "7"}), _asked_to_wait({"ratelimit": '"api";r=0;t=55'})
    (7.0, 55.0)
    """
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*", headers.get("retry-after", ""))
    match = match or re.search(
        r"r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,9})", headers.get("ratelimit", "")
    )
    return float(match[1]) if match else 0.0


@contextmanager
def _as_the_hub_answers(endpoint: str) -> Iterator[None]:
    """Return a context in which an answer of another form is an error of its own."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{endpoint} does not answer as the Hugging Face Hub does ({type(error).__name__}: "
            f"{error}); check HF_ENDPOINT and the network's proxies"
        ) from None


def _file(entry: Mapping[str, Any]) -> HubFile:
    apart = entry.get("lfs")
    size = entry["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"size {size!r}")
    return HubFile(
        path=_text(entry["path"]),
        size=size,
        sha256=None if apart is None else _hash(apart["oid"], 64),
        blob_sha1=None if apart is not None else _hash(entry["oid"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} where a name belongs")
    return value


def _hash(value: object, digits: int = 40) -> str:
    # It becomes the name of a directory.
    if not isinstance(value, str) or re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is None:
        raise ValueError(f"{value!r} where a hash of {digits} digits belongs")
    return value
