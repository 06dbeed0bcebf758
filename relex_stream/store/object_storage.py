"""A store on object storage: the same keys and bytes, other rules for writing them.

Nobody can hold a lock there that ends with its process, and a request may arrive long after the one
who sent it was given up for dead. So nothing here rests on the lock. HEAD is only ever put in the
place of the very HEAD that it continues, and chunks only grow: every put of a chunk begins with
all the bytes it takes the place of. What is committed can then be neither lost nor changed,
whoever writes, in whatever order requests arrive. Only taking away is different; see `sweep`, and
docs/store-format.md, "Object storage", for the argument.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import RemoteError, StoreError
from relex_stream.locations import Url
from relex_stream.objects import NotAsExpectedError, ObjectInfo, objects_at
from relex_stream.store.files import Lock
from relex_stream.store.storage import refuse_foreign
from relex_stream.transfers import READING_BYTES, THREADS, WRITING_BYTES, ReadAhead, WriteBehind

if TYPE_CHECKING:
    from relex_stream.store.reach import Reach

HEARTBEAT_S = 30.0
"""Seconds between two puts of a lock that is held."""

LOCK_ENDS_S = 1200.0
"""A lock that was not put for so long has ended with its process.

S3 refuses requests that were signed more than 15 minutes before they arrive, so that what such a
process sent has arrived by then, or will not.
"""

_JUST_NOW_S = 5.0
"""Before anything is taken away, the lock must have been held so long ago at most."""

_FREE = b""
_UNFINISHED = b"unfinished\n"
"""What a lock holds that nobody has: after a clean end, and after one that left something over."""

_ATTEMPTS = 5
"""Puts of one chunk, if others get in between; with a lock there are none."""

_CHECK_S = 10.0
"""Seconds for which a helper takes the holder of the lock to be who it was."""


class ObjectStore(Protocol):
    """What is asked of object storage; `objects.Objects` is one, tests have others."""

    url: Url

    @property
    def takes_conditions(self) -> bool:
        """As in `Objects`."""

    def get(self, key: str) -> bytes:
        """As in `Objects`."""

    def get_range(self, key: str, offset: int, nbytes: int) -> bytes:
        """As in `Objects`."""

    def get_version(self, key: str) -> tuple[bytes, str]:
        """As in `Objects`."""

    def put(self, key: str, data: bytes) -> None:
        """As in `Objects`."""

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """As in `Objects`."""

    def remove_if(self, key: str, version: str) -> None:
        """As in `Objects`."""

    def info(self, key: str) -> ObjectInfo:
        """As in `Objects`."""

    def names(self) -> dict[str, int | None]:
        """As in `Objects`."""

    def listing(self) -> dict[str, ObjectInfo]:
        """As in `Objects`."""


class ObjectStorage:
    """A prefix of a bucket; a `Storage`.

    Parameters
    ----------
    objects : ObjectStore
    """

    is_local = False
    reading_bytes = READING_BYTES
    writing_bytes = WRITING_BYTES

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._url = objects.url
        self._ahead = ReadAhead(objects.get_range)
        self._behind = WriteBehind()
        self._lost = False  # the lock, to another writer
        self._held: tuple[bytes, str, float] = (b"", "", 0.0)  # holder, version, when last put
        self._seen_held: tuple[bytes, float] = (b"", 0.0)

    @classmethod
    def at(cls, url: Url) -> ObjectStorage:
        """Return the storage below a URL."""
        return cls(objects_at(url))

    # --- reading --------------------------------------------------------------------------------

    def exists(self) -> bool:
        """As in `Storage`."""
        return bool(self._objects.names())

    def read(self, key: str) -> bytes:
        """As in `Storage`."""
        return self._objects.get(key)

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """As in `Storage`."""

        def read(key: str) -> bytes | None:
            try:
                return self._objects.get(key)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(THREADS, thread_name_prefix="relex-each") as pool:
            yield from pool.map(read, keys)

    def read_into(self, key: str, pieces: Sequence[tuple[int, NDArray[np.uint8]]]) -> bool:
        """As in `Storage`."""
        for offset, out in pieces:
            data = self._ahead.take(key, offset, out.size)
            if data is None:
                data = self._objects.get_range(key, offset, out.size)
            if len(data) < out.size:
                return False
            out[:] = np.frombuffer(data, np.uint8)
        return True

    def size(self, key: str) -> int:
        """As in `Storage`."""
        return self._objects.info(key).size

    def total_bytes(self) -> int:
        """As in `Storage`."""
        return sum(info.size for info in self._objects.listing().values())

    def advise(self, key: str, offset: int, nbytes: int) -> bool:
        """As in `Storage`; what goes wrong is named when it is read."""
        return self._ahead.ask(key, offset, nbytes)

    # --- who writes -----------------------------------------------------------------------------

    def prepare(self, names: set[str]) -> None:
        """As in `Storage`."""
        if not self._objects.takes_conditions:
            raise StoreError(
                f"{self._url} can be read, but not written: {self._url.protocol}:// has no put "
                "that depends on what is there; write the store to a directory and copy that"
            )
        present = set(self._objects.names())
        if present:
            refuse_foreign(self._url, present, names)

    @contextmanager
    def lock(self) -> Iterator[Lock]:
        """As in `Storage`: an object that is put again and again for as long as it is held.

        It spares two writers from working in vain; what they write is safe without.
        """
        name = f"process {os.getpid()} on {_machine()}, {uuid.uuid4().hex[:12]}"
        holder = (name + "\n").encode()
        before, version = self._take_lock(holder)
        self._check_conditions(holder)
        self._behind.forget()  # of an earlier writer in this process
        self._held, self._lost = (holder, version, time.time()), False
        ended = threading.Event()
        beat = threading.Thread(
            target=self._keep_lock, args=(ended,), name="relex-lock", daemon=True
        )
        beat.start()
        left = _UNFINISHED
        try:
            yield Lock(holder, before != _FREE)
            left = _FREE
        finally:
            with contextlib.suppress(Exception):  # what brought us here is what matters
                self._behind.forget()
            ended.set()
            beat.join()
            # If another has it by now, or storage is out of reach, it is left as it is.
            with contextlib.suppress(NotAsExpectedError, RemoteError):
                self._objects.put_if("LOCK", left, version)

    def _take_lock(self, holder: bytes) -> tuple[bytes | None, str]:
        """Put the lock; return what it held before, None if it was missing, and its version."""
        for _ in range(_ATTEMPTS):
            before: bytes | None
            version: str | None
            try:
                before, version = self._objects.get_version("LOCK")
            except FileNotFoundError:
                before = version = None
            if before == holder:  # put by a request whose answer was lost
                assert version is not None
                return None, version
            if before not in (None, _FREE, _UNFINISHED):
                self._check_ended(before)
            try:
                return before, self._objects.put_if("LOCK", holder, version)
            except NotAsExpectedError:
                continue
        raise StoreError(f"{self._url}: others take its lock again and again; run this again")

    def _check_ended(self, holder: bytes) -> None:
        """Check that who holds the lock cannot be at work any more."""
        owner = holder.decode(errors="replace").strip()
        if _ended_here(owner):
            return
        try:
            age = time.time() - self._objects.info("LOCK").modified_s
        except FileNotFoundError:
            return
        if age < LOCK_ENDS_S:
            raise StoreError(
                f"another process is writing to {self._url} ({owner}; last heard of "
                f"{max(0, round(age))} s ago); wait for it, or end it, and run this again; if it "
                f"was killed, its lock ends {round(LOCK_ENDS_S / 60)} minutes after it was last "
                f"heard of, or once you remove {self._url}/LOCK"
            )

    def _check_conditions(self, holder: bytes) -> None:
        """Check that the service looks at conditions; some take them and put all the same."""
        for version in (None, '"00000000000000000000000000000000"'):
            try:
                self._objects.put_if("LOCK", holder, version)
            except NotAsExpectedError:
                continue
            raise StoreError(
                f"{self._url} can be read, but not written: this service ignores If-Match and "
                "If-None-Match; write the store to a directory and copy that"
            )

    def _keep_lock(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            # Out of reach for a moment: whoever waits will see for how long.
            with contextlib.suppress(RemoteError):
                self._put_lock()
            if self._lost:
                return

    def _put_lock(self) -> None:
        holder, version, _ = self._held
        # By the clock of the wall: others do not stop when this machine sleeps.
        now = time.time()
        try:
            # The same bytes, so the same version; only the time of the put is another.
            self._objects.put_if("LOCK", holder, version)
        except NotAsExpectedError:
            self._lost = True
        else:
            self._held = (holder, version, now)

    def _check_lock(self, *, just_now: bool = False) -> None:
        if just_now and time.time() - self._held[2] > _JUST_NOW_S:
            self._put_lock()
        if self._lost:
            raise StoreError(
                f"another process took over the lock of {self._url}, because this one was not "
                "heard of; nothing more is written; run it again if it is wanted"
            )

    def is_held_by(self, holder: bytes) -> bool:
        """As in `Storage`; asked once in a while."""
        held, when = self._seen_held
        if held == holder and time.monotonic() - when < _CHECK_S:
            return True
        try:
            held = self._objects.get("LOCK")
        except OSError:
            return False
        self._seen_held = (held, time.monotonic())
        return held == holder

    # --- writing --------------------------------------------------------------------------------

    def read_head(self) -> tuple[bytes, str] | None:
        """As in `Storage`."""
        try:
            return self._objects.get_version("HEAD")
        except FileNotFoundError:
            return None

    def replace_head(self, data: bytes, version: str | None) -> str:
        """As in `Storage`; the one thing by which steps come to exist, or cease to."""
        self._check_lock()
        try:
            return self._objects.put_if("HEAD", data, version)
        except NotAsExpectedError:
            found = self.read_head()
        except RemoteError:
            # Whether it arrived is not known, but may be seen.
            with contextlib.suppress(RemoteError):
                found = self.read_head()
                if found is not None and found[0] == data:
                    return found[1]
            raise
        if found is not None and found[0] == data:
            return found[1]  # the answer to a first request was lost
        raise StoreError(
            f"another process has committed to {self._url} meanwhile; nothing of this one's was; "
            "run it again"
        )

    def make_directory(self, key: str) -> None:
        """Do nothing: there are none."""

    def write(self, key: str, data: bytes) -> None:
        """As in `Storage`."""
        self._check_lock()
        self._behind.submit(key, len(data), partial(self._objects.put, key, data))

    def write_tail(
        self, key: str, start: int, data: bytes | memoryview, check: Callable[[], None] | None
    ) -> None:
        """As in `Storage`; begins to, and `sync` says whether it went well."""
        self._check_lock()
        if check is not None:
            check()
        self._behind.submit(
            key, 2 * (start + len(data)), partial(self._extend, key, start, bytes(data))
        )

    def _extend(self, key: str, start: int, data: bytes) -> None:
        """Have a chunk hold `data` at `start`, without taking away a byte of it.

        Not even one that no HEAD reaches: another writer's may, a moment later.
        """
        there, version = b"", None
        looked = False
        for _ in range(_ATTEMPTS):
            if start or looked:
                try:
                    there, version = self._objects.get_version(key)
                except FileNotFoundError:
                    there, version = b"", None
            looked = True
            if len(there) < start:
                raise StoreError(
                    f"{self._url / key} holds {len(there)} bytes, {start} are committed; "
                    "the store is damaged (see relex-stream verify)"
                )
            tail = there[start:]
            if tail.startswith(data):
                return  # by an unfinished run, or a request whose answer was lost
            if not data.startswith(tail):
                raise StoreError(
                    f"{self._url / key} holds frames of another build that is at work or did not "
                    f"finish; {self._remedy()}"
                )
            with contextlib.suppress(NotAsExpectedError):
                self._objects.put_if(key, there[:start] + data, version)
                return
        raise StoreError(f"{self._url / key} is changed again and again; {self._remedy()}")

    def _remedy(self) -> str:
        if self.read_head() is not None:
            return "run this again once nobody else writes: what is left over is removed first"
        return (
            "the first build of this store never finished, and was of other checkpoints: once "
            f"nobody else writes, remove {self._url} or name another STORE"
        )

    def replace_documents(self, documents: Mapping[str, bytes], *, settled: bool) -> None:
        """As in `Storage`; a put is atomic."""
        for key, document in documents.items():
            self.write(key, document)

    def restore(self, key: str, data: bytes) -> None:
        """As in `Storage`; in the place of the very version that was damaged."""
        self._check_lock()
        for _ in range(_ATTEMPTS):
            try:
                there, version = self._objects.get_version(key)
            except FileNotFoundError:
                there, version = b"", None
            if version is not None and there == data:
                return  # by a request whose answer was lost
            with contextlib.suppress(NotAsExpectedError):
                self._objects.put_if(key, data, version)
                return
        raise StoreError(f"{self._url / key} is changed again and again; {self._remedy()}")

    def sync(self, keys: Iterable[str]) -> None:
        """As in `Storage`: what is put is there."""
        self._behind.wait()

    def has_blob(self, key: str, data: bytes) -> bool:
        """As in `Storage`; the name says what it holds, and half an object there is not."""
        try:
            return self.size(key) == len(data)
        except FileNotFoundError:
            return False

    def sweep(self, reach: Reach, fence: Callable[[], None] | None) -> None:
        """As in `Storage`; the only place where bytes are taken away.

        First a new HEAD keeps those from committing that were there before. Then only versions
        are taken away that were there before it, so that what came later stays.
        """
        unreached = {
            key: (info.version, wanted)
            for key, info in self._objects.listing().items()
            if (wanted := reach.kept_bytes(key)) is not None and wanted < info.size
        }
        if fence is None or not unreached:
            return
        fence()
        for key, (version, wanted) in unreached.items():
            kept = self._objects.get_range(key, 0, wanted) if wanted else b""
            self._check_lock(just_now=True)
            try:
                if wanted:
                    self._objects.put_if(key, kept, version)
                else:
                    self._objects.remove_if(key, version)
            except (NotAsExpectedError, FileNotFoundError):
                raise StoreError(
                    f"another process is writing to {self._url / key}; end it, and run this again"
                ) from None


def _machine() -> str:
    """Name this machine, and tell it and its processes from others of the same name."""
    identity = ""
    with contextlib.suppress(OSError):
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        identity += str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{os.uname().nodename} ({sha256(identity.encode()).hexdigest()[:8]})"


def _ended_here(owner: str) -> bool:
    """Say whether the owner of a lock was a process of this machine that is no more."""
    words = owner.split()
    if len(words) < 3 or not words[1].isdecimal() or f" on {_machine()}," not in owner:
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
