"""A service that fails, is slow and answers twice, behind the real client's interface."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest

from relex_stream.errors import RemoteError, SourceError, StoreError
from relex_stream.store import object_storage, storage
from relex_stream.store.object_storage import ObjectStorage
from tests.crash.replay import read_tree, unsynced
from tests.crash.runs import build, tiny_trajectory
from tests.remote.simulated import URL, Client, World, check_readable

pytestmark = pytest.mark.slow


class Chaotic(Client):
    """Requests of many threads, of which some fail, and some are done all the same."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(world)
        self._rng = random.Random(seed)
        self._drawing = threading.Lock()

    def _whim(self) -> float:
        with self._drawing:
            return self._rng.random()

    def _ask(self) -> None:
        whim = self._whim()
        if whim < 0.05:
            time.sleep(whim / 10)
        elif whim < 0.053:
            raise RemoteError("no answer; run it again")

    def _send(self, put) -> bool:
        whim = self._whim()
        if whim < 0.01:
            raise RemoteError(f"{put.key}: refused; run it again")
        met = self.world.land(put)
        if whim < 0.02:
            raise RemoteError(f"{put.key}: no answer; run it again")
        if whim < 0.04 and put.conditional:
            return self.world.land(put)
        if whim < 0.08:
            time.sleep(whim / 10)
        return met


@pytest.mark.parametrize("seed", range(12))
def test_a_build_gets_through_in_the_end(tmp_path, monkeypatch, seed):
    steps = range(1, 19)
    run = tiny_trajectory(tmp_path, steps)
    with unsynced():
        build(run.base, run.checkpoints, tmp_path / "local", commit_steps=None)
    world = World()
    storage.storage_at.cache_clear()
    here = ObjectStorage(Chaotic(world, seed))
    monkeypatch.setattr(ObjectStorage, "at", lambda url: here)
    monkeypatch.setattr(object_storage, "LOCK_ENDS_S", 0.0)
    tries = 0
    last: tuple[int, ...] = ()
    while last != tuple(steps):
        tries += 1
        assert tries < 200
        with contextlib.suppress(RemoteError, StoreError, SourceError):
            build(run.base, run.checkpoints, URL, commit_steps=3, workers=3)
        steps_now = check_readable(world.objects)
        assert steps_now[: len(last)] == last  # nothing is ever lost
        last = steps_now
    storage.storage_at.cache_clear()
    tree = read_tree(tmp_path / "local")
    chunks = {key: data for key, data in tree.items() if data is not None and "/c." in key}
    assert {key: data for key, data in world.objects.items() if "/c." in key} == chunks
