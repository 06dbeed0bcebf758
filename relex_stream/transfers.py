"""Requests that go on while others work: what will be read, and what was written.

A request to object storage takes tens of milliseconds, whatever it carries, so many have to be
under way at a time. Both classes here hold no more bytes than they are given room for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

THREADS = 16
"""Requests under way at a time, of each of the two."""

READ_AHEAD_BYTES = 32 << 20
"""Room for what was asked for in advance."""

WRITE_BEHIND_BYTES = 32 << 20
"""Room for what is not yet written."""

READING_BYTES = 2 * READ_AHEAD_BYTES
WRITING_BYTES = 2 * WRITE_BEHIND_BYTES
"""What each takes at most: an object is there once more while it goes through the client."""

_PATIENCE_S = 5.0


class _Range(NamedTuple):
    """Bytes of an object that were asked for."""

    key: str
    offset: int
    nbytes: int
    data: Future[bytes]

    def covers(self, offset: int, nbytes: int) -> bool:
        return self.offset <= offset and offset + nbytes <= self.offset + self.nbytes


class ReadAhead:
    """Bytes of objects, fetched before they are wanted; for any number of threads.

    Parameters
    ----------
    fetch : callable
        Returns bytes of an object: key, offset, number of bytes.
    room_bytes : int
    """

    def __init__(
        self, fetch: Callable[[str, int, int], bytes], room_bytes: int = READ_AHEAD_BYTES
    ) -> None:
        self._fetch = fetch
        self._room = room_bytes
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="relex-ahead")
        self._changed = threading.Condition()
        self._ranges: OrderedDict[tuple[str, int], _Range] = OrderedDict()  # oldest first
        self._of_key: dict[str, list[_Range]] = {}
        self._held = 0

    def ask(self, key: str, offset: int, nbytes: int) -> bool:
        """Have bytes fetched, without waiting for them; only for room, and not for long.

        Returns
        -------
        bool
            False if they were asked for already, or are too many.
        """
        with self._changed:
            if nbytes > self._room or self._find(key, offset, nbytes) is not None:
                return False
            if not self._changed.wait_for(lambda: self._fits(nbytes), _PATIENCE_S):
                # Nobody came for the oldest: work that was given up, or went another way.
                while not self._fits(nbytes):
                    self._forget(next(iter(self._ranges.values())))
            before = self._ranges.get((key, offset))  # a shorter one
            if before is not None:
                self._forget(before)
            self._held += nbytes
            data = self._pool.submit(self._fetch, key, offset, nbytes)
            asked = self._ranges[key, offset] = _Range(key, offset, nbytes, data)
            self._of_key.setdefault(key, []).append(asked)
        return True

    def take(self, key: str, offset: int, nbytes: int) -> bytes | None:
        """Return bytes that were asked for; None if they were not, or could not be had.

        They are kept until the last of them is taken.
        """
        with self._changed:
            asked = self._find(key, offset, nbytes)
        if asked is None:
            return None
        try:
            data = asked.data.result()
        except (Exception, CancelledError):  # noqa: BLE001 - named by whoever then asks for them
            data = b""
        start = offset - asked.offset
        with self._changed:
            last = start + nbytes == asked.nbytes or len(data) < asked.nbytes
            if last and self._ranges.get((key, asked.offset)) is asked:
                self._forget(asked)
        return data[start : start + nbytes] if len(data) == asked.nbytes else None

    def _fits(self, nbytes: int) -> bool:
        return self._held + nbytes <= self._room

    def _find(self, key: str, offset: int, nbytes: int) -> _Range | None:
        ranges = self._of_key.get(key, ())
        return next((asked for asked in ranges if asked.covers(offset, nbytes)), None)

    def _forget(self, asked: _Range) -> None:
        del self._ranges[asked.key, asked.offset]
        self._of_key[asked.key].remove(asked)
        if not self._of_key[asked.key]:
            del self._of_key[asked.key]
        asked.data.cancel()
        self._held -= asked.nbytes
        self._changed.notify_all()


class WriteBehind:
    """Work on objects that goes on behind the back of those who asked for it.

    Work on one key is done in the order in which it was asked for.

    Parameters
    ----------
    room_bytes : int
    """

    def __init__(self, room_bytes: int = WRITE_BEHIND_BYTES) -> None:
        self._room = room_bytes
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="relex-behind")
        self._changed = threading.Condition()
        self._last: dict[str, Future[None]] = {}
        self._held = 0
        self._running = 0
        self._error: BaseException | None = None

    def submit(self, key: str, nbytes: int, work: Callable[[], None]) -> None:
        """Have work on a key done that holds `nbytes`; waits while there is no room.

        Raises what went wrong with earlier work.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or not self._running
                    or self._held + nbytes <= self._room
                )
            )
            self._raise()
            self._held += nbytes
            self._running += 1
            before = self._last.get(key)
            self._last[key] = self._pool.submit(self._do, key, nbytes, work, before)

    def wait(self) -> None:
        """Wait until all is done; raise what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            self._raise()

    def forget(self) -> None:
        """Wait until all is done, and take no notice of what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            self._error = None

    def _do(
        self, key: str, nbytes: int, work: Callable[[], None], before: Future[None] | None
    ) -> None:
        try:
            if before is not None:
                before.result()  # began before this one, so it does not wait for a thread
            if self._error is None:
                work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = self._error or error
        finally:
            with self._changed:
                self._held -= nbytes
                self._running -= 1
                if not self._running:
                    self._last.clear()
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
