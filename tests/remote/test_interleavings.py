"""Many writers at one store on object storage that loses, delays and repeats requests."""

from __future__ import annotations

import random
import threading

import pytest

from relex_stream.errors import StoreError
from relex_stream.store import StoreWriter
from relex_stream.store.object_storage import ObjectStorage
from tests.remote import small
from tests.remote.simulated import URL, Client, World, check_readable, play, simulated


def _act(rng: random.Random) -> None:
    """Append steps of one of two runs, in one commit or two; or take some back."""
    with StoreWriter(URL) as writer:
        if writer.store is not None and rng.random() < 0.25:
            writer.drop_after(rng.randrange(len(writer.store.steps) + 1))
        run = rng.choice((0, 100))
        for _ in range(rng.choice((1, 1, 2))):
            rows = len(writer.store.steps) if writer.store else 0
            # What is written again after an end is the same bytes, most often.
            small.append(writer, [run + rows + i for i in range(rng.choice((1, 2, 9)))])


def _goes_on(world: World) -> None:
    """Check that a writer that nobody disturbs can append to what is left."""
    before = check_readable(world.objects)
    with simulated({threading.current_thread().name: Client(world)}):
        said = ""
        # Late requests of writers that were given up for dead are swept the next time.
        while "run this again" not in said:
            try:
                with StoreWriter(URL) as writer:
                    small.append(writer, [7])
                break
            except StoreError as error:
                said += str(error)
                if "first build of this store never finished" in said and not before:
                    return
        else:
            with StoreWriter(URL) as writer:
                small.append(writer, [7])
    assert len(check_readable(world.objects)) == len(before) + 1


@pytest.mark.parametrize("seed", range(24))
def test_a_store_is_whole_at_any_moment(seed):
    _goes_on(play(seed, _act))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_store_is_whole_at_any_moment_of_many(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        _goes_on(play(seed, _act, rounds=4, faults=random.Random(seed).choice((0.02, 0.1, 0.3))))


def test_writers_get_something_done_in_these_games():
    steps = [len(check_readable(play(seed, _act).objects)) for seed in range(12)]
    assert sum(count > 2 for count in steps) >= 8, steps


def _found(monkeypatch, seeds=range(60)) -> bool:
    for seed in seeds:
        try:
            play(seed, _act)
        except AssertionError:
            return True
    return False


def test_the_games_see_a_head_put_without_a_condition(monkeypatch):
    def replace(self, data, version):
        self._objects.put("HEAD", data)
        return ""

    monkeypatch.setattr(ObjectStorage, "replace_head", replace)
    assert _found(monkeypatch)


def test_the_games_see_chunks_put_without_a_condition(monkeypatch):
    def extend(self, key, start, data):
        there = self._objects.get(key) if start else b""
        self._objects.put(key, there[:start] + data)

    monkeypatch.setattr(ObjectStorage, "_extend", extend)
    assert _found(monkeypatch)


def test_the_games_see_frames_put_in_the_place_of_others(monkeypatch):
    """With a condition, which is not enough: the others may be committed a moment later."""

    def extend(self, key, start, data):
        try:
            there, version = self._objects.get_version(key)
        except FileNotFoundError:
            there, version = b"", None
        self._objects.put_if(key, there[:start] + data, version)

    monkeypatch.setattr(ObjectStorage, "_extend", extend)
    assert _found(monkeypatch)


def test_the_games_see_a_sweep_without_a_fence(monkeypatch):
    sweep = ObjectStorage.sweep
    monkeypatch.setattr(
        ObjectStorage,
        "sweep",
        lambda self, reach, fence: sweep(self, reach, fence and (lambda: None)),
    )
    assert _found(monkeypatch)


def _commit_across_a_drop() -> World:
    """Have a writer commit after another committed too, and took that back."""
    world = World()
    client = Client(world)
    with simulated({threading.current_thread().name: client}):
        with StoreWriter(URL) as writer:
            small.append(writer, [1, 2])
        with StoreWriter(URL) as slow:
            assert slow.store is not None
            commit = slow.commit

            def meanwhile(manifest, commits):
                with StoreWriter(URL) as quick:
                    # Left over by the slow one, so that it has to be swept first.
                    quick.sweep()
                    small.append(quick, [5])
                    quick.drop_after(2)
                commit(manifest, commits)

            slow.commit = meanwhile
            with pytest.raises(StoreError, match="has committed to"):
                small.append(slow, [4])
    return world


def test_a_head_that_was_taken_back_is_not_continued():
    assert check_readable(_commit_across_a_drop().objects) == (1, 2)


def test_without_its_fence_it_would_be(monkeypatch):
    monkeypatch.setattr(StoreWriter, "_fenced", lambda self, head: head)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        _commit_across_a_drop()
