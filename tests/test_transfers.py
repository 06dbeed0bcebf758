"""Requests in the background: what was asked for is had, room is kept, errors come to light."""

from __future__ import annotations

import threading
import time

import pytest

from relex_stream import transfers
from relex_stream.transfers import ReadAhead, WriteBehind

DATA = bytes(range(256)) * 4


def _reader(room: int = 1 << 20, asked: list | None = None) -> ReadAhead:
    def fetch(key: str, offset: int, nbytes: int) -> bytes:
        if asked is not None:
            asked.append((key, offset, nbytes))
        if key == "missing":
            raise FileNotFoundError(key)
        return DATA[offset : offset + nbytes]

    return ReadAhead(fetch, room)


def test_what_was_asked_for_is_taken_in_pieces_and_fetched_once():
    asked = []
    ahead = _reader(asked=asked)
    assert ahead.ask("a", 10, 100)
    assert not ahead.ask("a", 10, 100)
    assert not ahead.ask("a", 20, 30)
    assert ahead.ask("a", 300, 50)
    assert ahead.take("a", 10, 40) == DATA[10:50]
    assert ahead.take("a", 50, 60) == DATA[50:110]
    assert ahead.take("a", 310, 10) == DATA[310:320]
    assert asked == [("a", 10, 100), ("a", 300, 50)]


def test_what_was_not_asked_for_is_none():
    ahead = _reader()
    ahead.ask("a", 10, 100)
    assert ahead.take("b", 10, 100) is None
    assert ahead.take("a", 10, 101) is None
    assert ahead.take("a", 9, 3) is None
    assert ahead.take("a", 10, 100) == DATA[10:110]
    assert ahead.take("a", 10, 100) is None  # the last of it was taken


def test_what_cannot_be_had_or_is_short_is_none_and_gives_its_room_back():
    ahead = _reader(room=2000)
    ahead.ask("missing", 0, 10)
    ahead.ask("a", 1000, 100)
    assert ahead.take("missing", 0, 10) is None
    assert ahead.take("a", 1000, 50) is None
    assert ahead._held == 0


def test_a_longer_range_takes_the_place_of_a_shorter_one():
    ahead = _reader()
    ahead.ask("a", 0, 10)
    assert ahead.ask("a", 0, 20)
    assert ahead.take("a", 0, 20) == DATA[:20]
    assert ahead._held == 0


def test_it_holds_no_more_than_its_room_and_forgets_what_nobody_takes(monkeypatch):
    monkeypatch.setattr(transfers, "_PATIENCE_S", 0.05)
    ahead = _reader(room=100)
    assert not ahead.ask("a", 0, 101)
    assert ahead.ask("a", 0, 60)
    assert ahead.ask("b", 0, 60)
    assert ahead._held == 60
    assert ahead.take("a", 0, 60) is None
    assert ahead.take("b", 0, 60) == DATA[:60]


def test_asking_waits_for_room():
    ahead = _reader(room=100)
    ahead.ask("a", 0, 80)
    taker = threading.Timer(0.1, ahead.take, ("a", 0, 80))
    taker.start()
    began = time.monotonic()
    assert ahead.ask("b", 0, 80)
    assert 0.05 < time.monotonic() - began < transfers._PATIENCE_S
    assert ahead.take("b", 0, 80) == DATA[:80]
    taker.join()


def test_work_on_one_key_is_done_in_order():
    behind = WriteBehind()
    done = []

    def work(number: int) -> None:
        time.sleep(0.01 if number == 0 else 0)
        done.append(number)

    for number in range(5):
        behind.submit("a", 1, lambda number=number: work(number))
    behind.wait()
    assert done == [0, 1, 2, 3, 4]


def test_submitting_waits_for_room():
    behind = WriteBehind(room_bytes=100)
    held, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lock:
            held[0] += 60
            most[0] = max(most[0], held[0])
        time.sleep(0.005)
        with lock:
            held[0] -= 60

    for number in range(8):
        behind.submit(str(number), 60, work)
    behind.wait()
    assert most[0] == 60
    behind.submit("large", 1000, work)  # alone, it may
    behind.wait()


def test_an_error_comes_to_light_and_ends_what_was_to_follow():
    behind = WriteBehind()
    done = []

    def fail() -> None:
        raise OSError("no")

    began = threading.Event()
    behind.submit("a", 1, lambda: began.wait(10) and fail())
    behind.submit("a", 1, lambda: done.append("after"))
    began.set()
    with pytest.raises(OSError, match="no"):
        behind.wait()
    with pytest.raises(OSError, match="no"):
        behind.submit("b", 1, lambda: done.append("later"))
    behind.forget()
    behind.submit("b", 1, lambda: done.append("again"))
    behind.wait()
    assert done == ["again"]
