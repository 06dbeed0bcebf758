"""A Hugging Face Hub on the loopback interface: the few endpoints that clients use to read models.

As the real one it keeps large files apart from git and sends clients to another host for them,
lists files in pages, serves ranges, and asks for tokens. What it is asked is kept, and faults can
be put in its way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Content = dict[str, bytes]
"""Files of a commit by path."""

PAGE = 3
"""Entries of a listing that are told at once; the real Hub tells 1000."""


def content_of(directory: Path, prefix: str = "") -> Content:
    """Return all files below a directory, as a commit that holds them."""
    return {
        prefix + path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def blob_sha1(data: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_hash(content: Content) -> str:
    digest = hashlib.sha1()
    for path, data in sorted(content.items()):
        digest.update(path.encode() + hashlib.sha1(data).digest())
    return digest.hexdigest()


@dataclass
class Repository:
    """Commits by hash; branches and tags by name. A token, where one is needed."""

    commits: dict[str, Content] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, content: Content, branch: str | None = None, tag: str | None = None) -> str:
        name = commit_hash(content)
        self.commits[name] = content
        if branch is not None:
            self.branches[branch] = name
        if tag is not None:
            self.tags[tag] = name
        return name

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str


@dataclass
class FakeHub:
    """The server's state; tests change it while it runs."""

    endpoint: str = ""
    cdn: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], int | None] = lambda request: None
    """May return an HTTP status to answer with, or a negative number: after so many bytes of the
    content the connection breaks."""
    before: Callable[[Request], None] = lambda request: None
    """Called first, in the server's thread."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with the answers of faults."""
    ranges: bool = True
    tamper: Callable[[bytes], bytes] = lambda data: data
    """What becomes of a file's content on its way."""

    def add(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def asked(self, part: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if part in r.path and r.method == method]


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        request = Request(
            self.command,
            self.path,
            self.headers["Range"],
            (self.headers["Authorization"] or "").removeprefix("Bearer ") or None,
            self.headers["Host"].partition(":")[0],
        )
        self.hub.requests.append(request)
        self.hub.before(request)
        # The program under test may have been killed meanwhile.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._break_after: int | None = None
            fault = self.hub.fault(request)
            if fault is not None and fault > 0:
                self._send(fault, b"no", self.hub.headers)
                return
            if fault is not None:
                self._break_after = -fault
            self._route(request)

    def _route(self, request: Request) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._send_content(self._large()[match[1]], {})
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(refs|revision|tree)(?:/(.*))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        found = match or file
        repository = self.hub.repositories.get(found[1]) if found else None
        if repository is None:
            self._send(404 if request.token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository.token is not None and request.token != repository.token:
            code = "GatedRepo" if repository.gated else "RepoNotFound"
            self._send(403 if repository.gated else 401, b"", {"X-Error-Code": code})
        elif match is not None and match[2] == "refs":
            self._send_json(
                {
                    kind: [
                        {"name": name, "ref": f"refs/x/{name}", "targetCommit": commit}
                        for name, commit in refs.items()
                    ]
                    for kind, refs in (
                        ("branches", repository.branches),
                        ("tags", repository.tags),
                        ("converts", {}),
                    )
                }
            )
        else:
            assert found is not None
            commit = repository.resolve(file[2] if file else found[3])
            if commit is None:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif file is not None:
                self._send_file(commit, repository.commits[commit], file[3])
            elif found[2] == "revision":
                self._send_json({"id": found[1], "sha": commit, "siblings": []})
            else:
                self._send_tree(repository.commits[commit], parse_qs(url.query))

    def _large(self) -> dict[str, bytes]:
        return {
            hashlib.sha256(data).hexdigest(): data
            for repository in self.hub.repositories.values()
            for content in repository.commits.values()
            for path, data in content.items()
            if is_large(path)
        }

    def _send_tree(self, content: Content, query: dict[str, list[str]]) -> None:
        entries: list[dict[str, Any]] = []
        folders = {path.rpartition("/")[0] for path in content} - {""}
        entries += [{"type": "directory", "oid": "0" * 40, "path": path} for path in folders]
        for path, data in sorted(content.items()):
            entry = {"type": "file", "oid": blob_sha1(data), "size": len(data), "path": path}
            if is_large(path):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            path = urlsplit(self.path).path
            following = f"{self.hub.endpoint}{path}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._send_json(entries[start : start + PAGE], headers)

    def _send_file(self, commit: str, content: Content, path: str) -> None:
        if path not in content:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, headers = content[path], {"X-Repo-Commit": commit}
        if not is_large(path):
            headers["ETag"] = f'"{blob_sha1(data)}"'
            self._send_content(data, headers)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/cdn/{sha256}",
        }
        self._send(302, b"", headers)

    def _send_content(self, data: bytes, headers: dict[str, str]) -> None:
        data = self.hub.tamper(data)
        wanted = self.headers["Range"] if self.hub.ranges else None
        if wanted is None:
            self._send(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, data[start:stop], headers)

    def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), headers or {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._break_after is not None and status in (200, 206):
            data = data[: self._break_after]
            self.close_connection = True
        self.wfile.write(data)


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """Return a context with a Hub that answers."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    port = server.server_address[1]
    hub.endpoint, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
