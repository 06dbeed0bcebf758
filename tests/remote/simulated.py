"""Object storage as it may behave at its worst, and writers that take turns at it.

`World` holds the objects. A `Client` is what one writer sees of it: requests may be refused, may
arrive without an answer, late, or twice, and their conditions are looked at when they arrive. In
`play`, writers run on threads of which one at a time goes on, from one request to the next, in an
order drawn from a seed; some are killed on the way. Versions are digests of the bytes, as ETags
of S3 are: what was there before can come back.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import pytest

from relex_stream.errors import CorruptionError, RemoteError, StoreError
from relex_stream.locations import Url
from relex_stream.objects import NotAsExpectedError, ObjectInfo
from relex_stream.store import object_storage, spool
from relex_stream.store import read as reading
from relex_stream.store import write as writing
from relex_stream.store.object_storage import ObjectStorage
from relex_stream.store.read import Store

URL = Url.parse("simulated://bucket/run.store")


def digest(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Put:
    """A request that changes something: a put, or with ``data`` None a removal."""

    key: str
    data: bytes | None
    version: str | None = None
    conditional: bool = False

    def lands(self, objects: dict[str, bytes]) -> bool:
        """Do it, if its condition is met; say whether it was."""
        there = objects.get(self.key)
        if self.conditional and (None if there is None else digest(there)) != self.version:
            return False
        if self.data is None:
            objects.pop(self.key, None)
        else:
            objects[self.key] = self.data
        return True


@dataclass
class World:
    """All objects below `URL`, and every change of them."""

    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[Put] = field(default_factory=list)
    late: list[Put] = field(default_factory=list)
    landed: Callable[[Put], None] = lambda put: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def land(self, put: Put) -> bool:
        with self.lock:
            met = put.lands(self.objects)
            if met:
                self.log.append(put)
        if met:
            self.landed(put)
        return met


class Client:
    """Requests that all arrive; an `ObjectStore`."""

    url = URL
    takes_conditions = True

    def __init__(self, world: World) -> None:
        self.world = world

    def _send(self, put: Put) -> bool:
        return self.world.land(put)

    def _ask(self) -> None:
        """Do nothing: a turn of its own for those who take turns."""

    def get(self, key: str) -> bytes:
        self._ask()
        try:
            return self.world.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def get_range(self, key: str, offset: int, nbytes: int) -> bytes:
        return self.get(key)[offset : offset + nbytes]

    def get_version(self, key: str) -> tuple[bytes, str]:
        data = self.get(key)
        return data, digest(data)

    def put(self, key: str, data: bytes) -> None:
        self._send(Put(key, bytes(data)))

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        if not self._send(Put(key, bytes(data), version, conditional=True)):
            raise NotAsExpectedError(key)
        return digest(data)

    def remove_if(self, key: str, version: str) -> None:
        if not self._send(Put(key, None, version, conditional=True)):
            raise NotAsExpectedError(key)

    def info(self, key: str) -> ObjectInfo:
        data = self.get(key)
        return ObjectInfo(len(data), digest(data), 0.0)

    def names(self) -> dict[str, int | None]:
        self._ask()
        return {
            key.partition("/")[0]: None if "/" in key else len(data)
            for key, data in sorted(self.world.objects.items())
        }

    def listing(self) -> dict[str, ObjectInfo]:
        self._ask()
        with self.world.lock:
            return {
                key: ObjectInfo(len(data), digest(data), 0.0)
                for key, data in self.world.objects.items()
            }


class Killed(BaseException):
    """Ends a writer in the middle of what it does."""


class Turns:
    """Lets one of several threads go on at a time, from one request to the next."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._alive = 0
        self._turn: str | None = None

    def run(self, writers: dict[str, Callable[[], None]]) -> None:
        """Run all to their ends."""

        def whole(name: str) -> None:
            try:
                self.wait(name)
                writers[name]()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)
            finally:
                with self._changed:
                    self._alive -= 1
                    self._turn = None
                    self._choose()

        errors: list[BaseException] = []
        self._alive = len(writers)
        threads = [threading.Thread(target=whole, args=(name,), name=name) for name in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def wait(self, name: str) -> None:
        """Wait for one's turn."""
        with self._changed:
            if self._turn == name:
                self._turn = None
            self._waiting.append(name)
            self._choose()
            self._changed.wait_for(lambda: self._turn == name)
            self._waiting.remove(name)

    def _choose(self) -> None:
        if self._turn is None and self._waiting and len(self._waiting) == self._alive:
            self._turn = self.rng.choice(sorted(self._waiting))
            self._changed.notify_all()


class FaultyClient(Client):
    """What one writer sees of a world that is not kind to it."""

    def __init__(self, world: World, name: str, turns: Turns, faults: float, killed: float) -> None:
        super().__init__(world)
        self.name = name
        self.turns = turns
        self.faults = faults
        self.killed = killed
        self.holder = b""
        self._no_turn = False

    def _ask(self) -> None:
        rng = self.turns.rng
        if not self._no_turn:
            self.turns.wait(self.name)
        self._no_turn = False
        while self.world.late and rng.random() < 0.15:
            self.world.land(self.world.late.pop(rng.randrange(len(self.world.late))))
        if rng.random() < self.killed:
            raise Killed

    def _send(self, put: Put) -> bool:
        self._ask()
        world, rng = self.world, self.turns.rng
        there = world.objects.get(put.key)
        if put.key == "LOCK" and put.data and put.data == there:
            # Who has just put the lock has 20 minutes for one request: nobody gets in between.
            self._no_turn = True
        takes_away = there is not None and (put.data is None or not put.data.startswith(there))
        whim = rng.random() / self.faults if self.faults else 1.0
        if whim < 0.25:
            raise RemoteError(f"{put.key}: refused; run it again")
        if whim < 0.5:
            world.land(put)
            if put.conditional and rng.random() < 0.5:
                return world.land(put)  # sent again, because no answer came
            raise RemoteError(f"{put.key}: no answer; run it again")
        # Requests that take away come too late to be taken: they are signed with their time.
        if whim < 0.75 and not (takes_away and put.key not in ("HEAD", "LOCK")):
            world.late.append(put)
            raise RemoteError(f"{put.key}: no answer; run it again")
        if whim < 1.0 and not (takes_away and put.key not in ("HEAD", "LOCK")):
            world.late.append(put)
        return world.land(put)


class _AtOnce:
    """Does work when it is asked for, in the thread that asks."""

    def submit(self, key: str, nbytes: int, work: Callable[[], None]) -> None:
        work()

    def wait(self) -> None:
        pass

    def forget(self) -> None:
        pass


@contextmanager
def simulated(clients: dict[str, Client]) -> Iterator[None]:
    """Have each thread use the client of its name, and take locks for ended at once."""
    storages = {name: ObjectStorage(client) for name, client in clients.items()}
    for storage in storages.values():
        storage._behind = _AtOnce()

    def storage_at(root):
        return storages[threading.current_thread().name]

    with pytest.MonkeyPatch.context() as patch:
        for module in (reading, writing):
            patch.setattr(module, "storage_at", storage_at)
        patch.setattr(object_storage, "LOCK_ENDS_S", 0.0)
        patch.setattr(object_storage, "_JUST_NOW_S", -1.0)
        # One request of a writer at a time: its turn is for one.
        patch.setattr(object_storage, "THREADS", 1)
        patch.setattr(spool, "_REQUESTS", 1)
        # Python 3.11 has one lock for the tables of all stores, to be waited for out of turn.
        patch.setattr(Store.__dict__["_tables"], "lock", nullcontext(), raising=False)
        yield


@contextmanager
def seen(world: World) -> Iterator[None]:
    """Have all threads read a world as it is."""
    storage = ObjectStorage(Client(world))
    with pytest.MonkeyPatch.context() as patch:
        for module in (reading, writing):
            patch.setattr(module, "storage_at", lambda root: storage)
        yield


def check_readable(objects: dict[str, bytes]) -> tuple[int, ...]:
    """Check that all that HEAD reaches is there, bit for bit; return the steps."""
    if "HEAD" not in objects:
        return ()
    storage = ObjectStorage(Client(World(dict(objects))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "storage_at", lambda root: storage)
        store = Store(URL)
        for row in range(len(store.steps)):
            store.blobs_of(store.commit(row).files)
        for tensor in store.manifest.tensors:
            for block in range(tensor.blocks):
                store.read_frames(tensor, block, 0, len(store.steps))
        for name in store.blobs_of(store.manifest.base_files):
            store.blob(name)
    return store.steps


def play(
    seed: int,
    act: Callable[[random.Random], None],
    *,
    rounds: int = 6,
    faults: float = 0.04,
    killed: float = 0.004,
) -> World:
    """Have writers act, one or two at a time, with a store that is whole at any moment.

    Parameters
    ----------
    act : callable
        What a writer does, given numbers to draw from; its errors for users are no matter.
    """
    rng = random.Random(seed)
    world = World()

    def landed(put: Put) -> None:
        if put.key != "LOCK":
            try:
                check_readable(world.objects)
            except (CorruptionError, StoreError) as error:
                raise AssertionError(f"after {put.key}: {error}") from error

    world.landed = landed
    for number in range(rounds):
        turns = Turns(rng)
        names = [f"writer-{number}-{which}" for which in range(rng.choice((1, 2, 2)))]
        clients: dict[str, Client] = {
            name: FaultyClient(world, name, turns, faults, killed) for name in names
        }

        def writer() -> None:
            # The last is of code that was broken on purpose.
            with suppress(StoreError, RemoteError, NotAsExpectedError):
                act(rng)

        with simulated(clients):
            turns.run(dict.fromkeys(names, writer))
    while world.late:
        world.land(world.late.pop(rng.randrange(len(world.late))))
    return world


def prefixes(log: Sequence[Put]) -> Iterator[dict[str, bytes]]:
    """Yield the objects after each request of a log, which is changed in place."""
    objects: dict[str, bytes] = {}
    yield objects
    for put in log:
        put.lands(objects)
        yield objects
