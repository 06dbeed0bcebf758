"""Damage one file of a directory at a time, read everything, and tell what became of it.

Reading happens in a process of its own, for some formats read damaged files into a crash or
without an end; such a process is replaced and the reading counted.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.faults.formats import Format, Kept

KINDS = ("a bit flipped", "cut short", "removed")
"""What is done to a file."""

OUTCOMES = ("refused", "harmless", "missing", "wrong weights", "died", "no end")
"""An error of the library; all as it was; some tensors or steps are not there any more, the others
as they were; other bits than were stored; the process died; it did not end within the time."""


@contextmanager
def damaged(directory: Path, kind: str, rng: np.random.Generator) -> Iterator[None]:
    """Damage a file that has bytes, chosen at random, and put it back afterwards.

    Small files are chosen as often as large ones: metadata as often as data.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = [one for one in files if one.stat().st_size][
        rng.integers(sum(1 for one in files if one.stat().st_size))
    ]
    whole = path.read_bytes()
    at = int(rng.integers(len(whole)))
    if kind == "removed":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(whole[:at])
    else:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(whole)


def count_outcomes(
    form: Format,
    directory: Path,
    expected: Kept,
    *,
    kind: str,
    times: int,
    seed: int,
    limit_s: float = 60.0,
) -> Counter[str]:
    """Damage a directory in a format `times` times and return how often what came of it.

    A reading that has not ended after `limit_s` seconds is ended and counted so.

    Raises
    ------
    AssertionError
        If the intact directory does not read back, before or after.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    counted: Counter[str] = Counter()
    reading = _Reading(form, directory, expected, limit_s)
    try:
        assert reading.outcome() == "harmless", f"{form.name} does not give back what it was given"
        for _ in range(times):
            with damaged(directory, kind, rng):
                counted[reading.outcome()] += 1
        assert reading.outcome() == "harmless", f"{form.name}: the directory was not put back"
    finally:
        reading.stop()
    return counted


class _Reading:
    """A process that reads when asked, replaced when it died or does not end."""

    def __init__(self, form: Format, directory: Path, expected: Kept, limit_s: float) -> None:
        self._asked = form, directory, expected
        self._limit_s = limit_s
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_answer, args=(theirs, *self._asked), daemon=True)
        self._process.start()
        # Ours must be the only other end, or a death would not be seen.
        theirs.close()
        self._ours.recv()

    def outcome(self) -> str:
        try:
            self._ours.send("read")
            if self._ours.poll(self._limit_s):
                return str(self._ours.recv())
            found = "no end"
        except (EOFError, OSError):
            found = "died"
        self.stop()
        self._start()
        return found

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()


def _answer(asked: Connection, form: Format, directory: Path, expected: Kept) -> None:
    # Thousands of readings: what a library says of each would hide the counts.
    warnings.simplefilter("ignore")
    os.environ["ICECHUNK_LOG"] = "off"
    asked.send("ready")
    while True:
        asked.recv()
        asked.send(_read_and_compare(form, directory, expected))


def _read_and_compare(form: Format, directory: Path, expected: Kept) -> str:
    try:
        found = form.read(directory)
    # What a library raises for a damaged file is its own affair, a panic of its Rust code included.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "refused"
    if not found.keys() <= expected.keys() or not all(
        np.array_equal(bits.reshape(-1), expected[key].reshape(-1)) for key, bits in found.items()
    ):
        return "wrong weights"
    return "harmless" if len(found) == len(expected) else "missing"
