"""Builds on object storage, request by request: what each of them leaves is a whole store."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest

from relex_stream import api
from relex_stream.errors import StoreError
from relex_stream.objects import NotAsExpectedError
from relex_stream.store import object_storage, storage
from relex_stream.store.object_storage import ObjectStorage
from relex_stream.store.reach import Reach
from relex_stream.store.spool import Spool
from tests.crash.replay import read_tree, unsynced
from tests.crash.runs import build, tiny_trajectory
from tests.make_checkpoints import Trajectory
from tests.remote.simulated import URL, Client, World, check_readable, prefixes

STEPS = range(1, 19)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("run"), STEPS)


@pytest.fixture(scope="module")
def local(run):
    """The store as a build of this machine has it, its files by key."""
    with unsynced():
        build(run.base, run.checkpoints, run.base.parent / "local", commit_steps=None)
    tree = read_tree(run.base.parent / "local")
    return {key: data for key, data in tree.items() if data is not None}


@pytest.fixture
def kept_at(monkeypatch):
    """A function that has `URL` be a world."""

    def keep(world: World) -> World:
        storage.storage_at.cache_clear()
        monkeypatch.setattr(ObjectStorage, "at", lambda url: ObjectStorage(Client(world)))
        return world

    yield keep
    storage.storage_at.cache_clear()


def _contents(objects: dict[str, bytes], *left_out: str) -> dict[str, bytes]:
    """Return what does not depend on where the base is, which records and HEAD name."""
    return {
        key: data
        for key, data in objects.items()
        if not key.startswith("commits/") and key not in ("HEAD", "LOCK", *left_out)
    }


def _build(run, **options) -> None:
    build(run.base, run.checkpoints, URL, **options)


def test_every_request_of_a_build_and_an_append_leaves_whole_steps(run, local, kept_at):
    world = kept_at(World())
    _build(run, steps="1:15", commit_steps=4)
    _build(run, steps="1:18", commit_steps=2)
    assert _contents(world.objects) == _contents(local)
    seen = []
    for objects in prefixes(world.log):
        steps = check_readable(objects)
        if not seen or steps != seen[-1]:
            seen.append(steps)
    commits = (0, 4, 8, 12, 15, 17, 18)
    assert seen == [tuple(range(1, 1 + count)) for count in commits]
    assert len(world.log) > 60


def test_a_build_killed_after_any_request_is_taken_up(run, local, kept_at, monkeypatch):
    whole = kept_at(World())
    _build(run, steps="1:17", commit_steps=8)
    # Its process is another one, and nobody waits for its lock to end.
    monkeypatch.setattr(object_storage, "LOCK_ENDS_S", 0.0)
    log = list(whole.log)
    for count in range(0, len(log) + 1, 5):
        objects = {}
        for put in log[:count]:
            put.lands(objects)
        world = kept_at(World(objects))
        _build(run, steps="1:18", commit_steps=None)
        assert check_readable(world.objects) == tuple(STEPS)
        assert _contents(world.objects) == _contents(local), f"after {count} requests"


def test_what_it_takes_in_requests(run, kept_at):
    """The formula of docs/remote.md."""
    world = kept_at(World())
    _build(run, commit_steps=None, steps="1:16")
    before = len(world.log)
    _build(run, commit_steps=None, steps="1:17")
    added = [put.key for put in world.log[before:]]
    kinds = Counter(key.partition("/")[0] if key[0] != "d" else key.split("/")[-1] for key in added)
    chunks = sum(key.startswith("deltas/") and "/c.1." in key for key in added)
    assert kinds.pop("LOCK") == 2
    assert kinds.pop("HEAD") == 1
    assert kinds.pop("commits") == 1
    assert kinds.pop("zarr.json") == 3  # a new group of steps: one for each array
    blobs = kinds.pop("blobs", 0)
    assert sum(kinds.values()) == chunks <= 4
    assert blobs <= 2


def test_the_same_build_twice_puts_nothing_but_its_lock(run, kept_at):
    world = kept_at(World())
    _build(run, steps="1:3")
    before = len(world.log)
    _build(run, steps="1:3")
    assert {put.key for put in world.log[before:]} == {"LOCK"}


# --- the lock ------------------------------------------------------------------------------------


def test_a_lock_that_is_held_is_waited_for(run, kept_at):
    world = kept_at(World())
    _build(run, steps="1:2")
    world.objects["LOCK"] = b"process 1 on elsewhere (0123abcd), 0123456789ab\n"
    client = Client(world)
    kept = client.info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Client, "info", lambda self, key: kept(key)._replace(modified_s=time.time() - 60)
        )
        with pytest.raises(StoreError, match=r"process 1 on elsewhere.*heard of 60 s ago.*LOCK"):
            _build(run, steps="1:3")
        assert check_readable(world.objects) == (1, 2)
        patch.setattr(
            Client, "info", lambda self, key: kept(key)._replace(modified_s=time.time() - 1300)
        )
        _build(run, steps="1:3")
    assert check_readable(world.objects) == (1, 2, 3)
    assert world.objects["LOCK"] == b""


def test_the_lock_of_a_process_of_this_machine_that_is_no_more_has_ended(run, kept_at):
    world = kept_at(World())
    world.objects["LOCK"] = (
        f"process 4194303999 on {object_storage._machine()}, 0123456789ab\n".encode()
    )
    with pytest.MonkeyPatch.context() as patch:

        def kill(process, signal):
            assert (process, signal) == (4194303999, 0)
            raise ProcessLookupError

        patch.setattr(object_storage.os, "kill", kill)
        _build(run, steps="1:2")
    assert check_readable(world.objects) == (1, 2)


def test_a_build_that_fails_lets_go_of_the_lock_and_the_next_one_sweeps(run, kept_at):
    world = kept_at(World())
    _build(run, steps="1:2")
    whole = dict(world.objects)

    class Full(Client):
        def put_if(self, key, data, version):
            if key == "HEAD":
                raise OSError("no")
            return super().put_if(key, data, version)

    with pytest.MonkeyPatch.context() as patch:
        storage.storage_at.cache_clear()
        patch.setattr(ObjectStorage, "at", lambda url: ObjectStorage(Full(world)))
        with pytest.raises(OSError, match="no"):
            _build(run, steps="1:3")
    assert world.objects["LOCK"] == b"unfinished\n"
    left = {key for key in world.objects if world.objects[key] != whole.get(key)}
    assert any("/c." in key for key in left)
    kept_at(world)
    _build(run, steps="1:2")
    after = {key: data for key, data in world.objects.items() if key != "HEAD"}
    assert after == {key: data for key, data in whole.items() if key != "HEAD"}
    assert b'"fence"' in world.objects["HEAD"]


def test_a_lock_that_was_taken_over_stops_the_writer(kept_at):
    world = kept_at(World())
    here = ObjectStorage(Client(world))
    with here.lock() as lock:
        assert here.is_held_by(lock.holder)
        world.objects["LOCK"] = b"another\n"
        here._put_lock()
        with pytest.raises(StoreError, match="took over the lock"):
            here.write("blobs/x", b"")
        with pytest.raises(StoreError, match="took over the lock"):
            here.replace_head(b"{}", None)
        here._seen_held = (b"", 0.0)
        assert not here.is_held_by(lock.holder)
    assert world.objects["LOCK"] == b"another\n"


def test_nothing_is_taken_away_by_one_who_slept(kept_at, monkeypatch):
    """Its clock went on: before it removes anything it looks at whose the lock is."""
    world = kept_at(World({"HEAD": b"{}"}))
    here = ObjectStorage(Client(world))
    with here.lock():
        world.objects["blobs/" + "0" * 64] = b"left over"

        def sleeps() -> None:
            world.objects["LOCK"] = b"another\n"
            now = time.time() + 2000
            monkeypatch.setattr(object_storage.time, "time", lambda: now)

        with pytest.raises(StoreError, match="took over the lock"):
            here.sweep(Reach(), sleeps)
    assert world.objects["blobs/" + "0" * 64] == b"left over"


def test_what_came_after_the_fence_is_not_taken_away(kept_at):
    chunks = {"deltas/a/c.0.0": b"old", "deltas/b/c.0.0": b"committed+"}
    world = kept_at(World({"HEAD": b"{}"} | chunks))
    here = ObjectStorage(Client(world))
    reach = Reach(chunks={"deltas/b/c.0.0": 9})
    for key in chunks:
        before = dict(world.objects)

        def comes_late(key=key) -> None:
            world.objects[key] += b" and more"

        with here.lock(), pytest.raises(StoreError, match="another process is writing to"):
            here.sweep(reach, comes_late)
        assert world.objects[key] == before[key] + b" and more"
        world.objects = {**before, "LOCK": b""}
    with here.lock():
        here.sweep(reach, lambda: None)
    assert {k: v for k, v in world.objects.items() if "/c." in k} == {
        "deltas/b/c.0.0": b"committed"
    }


def test_the_lock_is_put_again_and_again(kept_at, monkeypatch):
    monkeypatch.setattr(object_storage, "HEARTBEAT_S", 0.01)
    world = kept_at(World())
    beats = threading.Event()

    def landed(put):
        if sum(put.key == "LOCK" for put in world.log) > 4:
            beats.set()

    world.landed = landed
    with ObjectStorage(Client(world)).lock():
        assert beats.wait(10)
    assert world.objects["LOCK"] == b""


# --- services ------------------------------------------------------------------------------------


def test_a_service_that_ignores_conditions_is_not_written_to(run, kept_at, monkeypatch):
    world = kept_at(World())

    def put_if(self, key, data, version):
        self.world.objects[key] = data
        return "version"

    monkeypatch.setattr(Client, "put_if", put_if)
    with pytest.raises(StoreError, match="ignores If-Match"):
        _build(run, steps="1:2")
    assert set(world.objects) == {"LOCK"}


def test_a_service_without_conditions_is_not_written_to(run, kept_at, monkeypatch):
    world = kept_at(World())
    monkeypatch.setattr(Client, "takes_conditions", False)
    with pytest.raises(StoreError, match=r"can be read, but not written.*copy that"):
        _build(run, steps="1:2")
    assert not world.objects


def test_an_answer_that_was_lost_is_no_failure(kept_at):
    world = kept_at(World())

    class Forgetful(Client):
        def put_if(self, key, data, version):
            super().put_if(key, data, version)
            raise NotAsExpectedError(key)  # what the same request is told when it is sent again

    here = ObjectStorage(Forgetful(world))
    here.replace_head(b"{}", None)
    here.write_tail("deltas/a/c.0.0", 0, b"frame", None)
    here.sync([])
    assert world.objects == {"HEAD": b"{}", "deltas/a/c.0.0": b"frame"}


def test_frames_of_an_unfinished_first_build_of_others_are_not_touched(run, kept_at, monkeypatch):
    world = kept_at(World())
    _build(run, steps="1:2")
    del world.objects["HEAD"]
    left = dict(world.objects)
    with pytest.raises(StoreError, match=r"first build of this store never finished.*remove"):
        _build(run, steps="2:3")
    assert {key: world.objects[key] for key in left if key.startswith("deltas/")} == {
        key: data for key, data in left.items() if key.startswith("deltas/")
    }
    _build(run, steps="1:3")
    assert check_readable(world.objects) == (1, 2, 3)


def test_other_files_are_refused(run, kept_at):
    world = kept_at(World({"thesis.tex": b"..."}))
    with pytest.raises(StoreError, match=r"not a store's \(thesis.tex\)"):
        _build(run, steps="1:2")
    assert set(world.objects) == {"thesis.tex"}


def test_what_is_no_store_is_named(kept_at):
    world = kept_at(World())
    with pytest.raises(StoreError, match="nothing is there"):
        api.info(str(URL))
    world.objects["LOCK"] = b""
    with pytest.raises(StoreError, match="its first build never finished"):
        api.info(str(URL))


def test_records_are_fetched_once_and_short_ones_are_known():
    world = World({"commits/a": b"0123456789"})
    asked = []

    class Counted(Client):
        def get(self, key):
            asked.append(key)
            return super().get(key)

    spool = Spool(ObjectStorage(Counted(world)))
    spool.fetch(["commits/a", "commits/none"])
    out = np.zeros(4, np.uint8)
    assert spool.read_into("commits/a", [(2, out)])
    assert out.tobytes() == b"2345"
    assert not spool.read_into("commits/a", [(7, out)])
    assert spool.size("commits/a") == 10
    assert spool.read("commits/a") == b"0123456789"
    assert asked.count("commits/a") == 1
    with pytest.raises(FileNotFoundError):
        spool.read("commits/none")
