"""What is asked of the Hub, and what becomes of answers that are none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

from relex_stream.errors import HubError
from relex_stream.hub import client as client_module
from relex_stream.hub.client import HubClient, HubFile, Stopped
from tests.hub.server import FakeHub, Request, blob_sha1

CONTENT = {
    "README.md": b"text",
    "a b/model.safetensors": bytes(range(256)) * 40,
    "config.json": b"{}",
    "empty.txt": b"",
    "x/y/z.json": b"[]",
}
WEIGHTS = "a b/model.safetensors"


@pytest.fixture
def commit(hub: FakeHub) -> str:
    return hub.add("org/name").commit(CONTENT, branch="main", tag="v1")


def fetched(client: HubClient, commit: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return a range of the weights."""
    file = next(f for f in client.files("org/name", commit) if f.path == WEIGHTS)
    received = bytearray(file.size)

    def write(offset: int, data: bytes) -> None:
        received[offset : offset + len(data)] = data

    stop = file.size if stop is None else stop
    client.fetch("org/name", commit, file, start, stop, write)
    return bytes(received[start:stop])


def test_a_repository_is_told_with_its_checksums(hub: FakeHub, commit: str) -> None:
    client = HubClient()
    assert client.refs("org/name") == [("branch", "main", commit), ("tag", "v1", commit)]
    assert client.commit_of("org/name", "v1") == commit
    large = CONTENT[WEIGHTS]
    # The listing comes in pages.
    assert client.files("org/name", commit) == [
        HubFile(
            path,
            len(data),
            hashlib.sha256(large).hexdigest() if path == WEIGHTS else None,
            None if path == WEIGHTS else blob_sha1(data),
        )
        for path, data in sorted(CONTENT.items())
    ]


def test_ranges_and_whole_files_arrive(hub: FakeHub, commit: str) -> None:
    client = HubClient()
    assert fetched(client, commit) == CONTENT[WEIGHTS]
    assert fetched(client, commit, 100, 2000) == CONTENT[WEIGHTS][100:2000]
    assert [request.range for request in hub.asked("/cdn/")] == [None, "bytes=100-1999"]


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(
    hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/name"].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetched(HubClient(), commit) == CONTENT[WEIGHTS]
    assert hub.asked("/resolve/")[0].token == "hf_secret"
    assert [request.token for request in hub.asked("/cdn/")] == [None]


def test_a_broken_transfer_goes_on_where_it_ended(hub: FakeHub, commit: str) -> None:
    hub.fault = lambda request: -1000 if "/cdn/" in request.path else None
    assert fetched(HubClient(), commit, 0, 10_000) == CONTENT[WEIGHTS][:10_000]
    starts = [request.range.split("-")[0] for request in hub.asked("/cdn/") if request.range]
    # More often than a request is made again that brings nothing.
    assert starts == [f"bytes={start}" for start in range(0, 10_000, 1000)]


def test_transfers_that_bring_nothing_end(hub: FakeHub, commit: str) -> None:
    hub.fault = lambda request: 503 if "/cdn/" in request.path else None
    with pytest.raises(HubError, match=r"answers 503; wait a while, then run the command again"):
        fetched(HubClient(), commit)
    assert len(hub.asked("/cdn/")) == 6


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(hub: FakeHub, commit: str, status: int) -> None:
    left = [status] * 3
    hub.fault = lambda request: left.pop() if "/refs" in request.path and left else None
    assert len(HubClient().refs("org/name")) == 2


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7'}, {"Retry-After": "Monday"}]
)
def test_a_server_may_say_how_long_to_wait(
    hub: FakeHub, commit: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, hub.headers = [429], headers
    hub.fault = lambda request: left.pop() if "/refs" in request.path and left else None
    client = HubClient()
    waits: list[float] = []
    monkeypatch.setattr(client._closed, "wait", lambda seconds: bool(waits.append(seconds)))
    client.refs("org/name")
    assert waits == [0.0 if "Monday" in headers.values() else 7.0]


def test_nobody_waits_for_an_hour(hub: FakeHub, commit: str) -> None:
    hub.headers, hub.fault = {"Retry-After": "3600"}, lambda request: 429
    with pytest.raises(HubError, match="too many requests; wait some minutes, or set HF_TOKEN"):
        HubClient().refs("org/name")
    assert len(hub.asked("/refs")) == 1


def test_a_closed_client_ends_what_it_does(hub: FakeHub, commit: str) -> None:
    client = HubClient()

    def close(request: Request) -> None:
        if "/cdn/" in request.path:
            client.close()

    hub.before = close
    with pytest.raises(Stopped):
        fetched(client, commit)
    hub.fault = lambda request: 503
    with pytest.raises(Stopped):
        client.refs("org/name")


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        ("org/none", "main", r"org/none@main: no such repository on http.*or a private one; check"),
        ("org/name", "none", r"org/name@none: no such revision; choose one of http.*/tree/main$"),
        ("org/private", "main", r"org/private@main: no such repository.*set HF_TOKEN if it is"),
        ("org/gated", "main", r"org/gated@main: access is restricted; accept the terms on http"),
    ],
)
def test_what_is_not_there_or_not_allowed(
    hub: FakeHub, commit: str, repository: str, revision: str, message: str
) -> None:
    for name in ("org/private", "org/gated"):
        hub.add(name).commit(CONTENT, branch="main")
        hub.repositories[name].token = "hf_other"
    hub.repositories["org/gated"].gated = True
    with pytest.raises(HubError, match=message) as error:
        HubClient().commit_of(repository, revision)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "the token may not read it; set HF_TOKEN to one that may"),
        (404, "no such file; check the URL"),
        (418, "answers 418; check the URL"),
    ],
)
def test_other_refusals(hub: FakeHub, commit: str, status: int, message: str) -> None:
    hub.fault = lambda request: status if "/cdn/" in request.path else None
    with pytest.raises(HubError, match=message) as error:
        fetched(HubClient(), commit)
    assert str(error.value).startswith(f"org/name@{commit}: {WEIGHTS}: ")
    assert len(hub.asked("/cdn/")) == 1


def test_a_token_that_is_refused(
    hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    hub.headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.fault = lambda request: 401
    with pytest.raises(HubError, match="refuses the token; set HF_TOKEN to a valid one"):
        HubClient().refs("org/name")


def test_offline_mode_asks_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"org/name: cannot be asked for in offline mode; unset HF"):
        HubClient().refs("org/name")
    assert not hub.asked("/refs")


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached \(.*check the net"):
        HubClient().refs("org/name")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in</html>",
        b"[]",
        b'{"branches": [], "tags": [{"name": "x", "targetCommit": "../../x"}]}',
        b'{"branches": [{"name": 7, "targetCommit": "' + b"0" * 40 + b'"}], "tags": []}',
    ],
)
def test_answers_of_something_else(
    hub: FakeHub, commit: str, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.hub.server.json.dumps", lambda value: answer.decode())
    with pytest.raises(HubError, match=r"does not answer as the Hugging Face Hub does .*check HF_"):
        HubClient().refs("org/name")


def test_pages_that_lead_elsewhere_are_not_followed(
    hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HubClient()
    # It would get the token.
    hub.endpoint = hub.cdn
    with pytest.raises(HubError, match="its pages lead elsewhere"):
        client.files("org/name", commit)


def test_a_list_without_an_end(hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_MAX_PAGES", 1)
    with pytest.raises(HubError, match="list of files does not end"):
        HubClient().files("org/name", commit)


def test_a_server_that_gives_no_ranges(hub: FakeHub, commit: str) -> None:
    hub.ranges = False
    assert fetched(HubClient(), commit) == CONTENT[WEIGHTS]
    with pytest.raises(HubError, match="does not give parts of files; set HF_ENDPOINT to one"):
        fetched(HubClient(), commit, 5, 9)


def test_a_disk_that_is_full_is_not_the_hubs_fault(hub: FakeHub, commit: str) -> None:
    client = HubClient()
    file = client.files("org/name", commit)[1]
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space"),
    ):
        client.fetch("org/name", commit, file, 0, 5, lambda _, data: full.write(data))
