"""What a watch says, each thing once, and what it did so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from relex_stream.errors import RelexStreamWarning
from relex_stream.summaries import WatchEvent, WatchSummary


class Teller:
    """Makes events and passes them on.

    Parameters
    ----------
    tell : callable
        Is given each event.
    since_1970_s : callable
        Returns the time.
    """

    def __init__(
        self, tell: Callable[[WatchEvent], None], since_1970_s: Callable[[], float]
    ) -> None:
        self.tell = tell
        self._since_1970_s = since_1970_s
        self._said: set[tuple[int, str]] = set()
        self._warned: set[str] = set()

    def event(self, step: int, kind: str, **fields: Any) -> WatchEvent:
        """Return an event of this moment."""
        now = datetime.fromtimestamp(self._since_1970_s()).astimezone()
        return WatchEvent(now.isoformat(timespec="seconds"), kind, step, **fields)

    def say(self, step: int, kind: str, message: str) -> None:
        """Tell something of a step once."""
        if (step, message) not in self._said or kind == "given-up":
            self._said.add((step, message))
            self.tell(self.event(step, kind, message=message))

    def warn(self, text: str) -> None:
        """Warn of something once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RelexStreamWarning, stacklevel=2)

    @contextmanager
    def warnings_said_once(self) -> Iterator[None]:
        """Let what builds warn of through once: each of very many would say the same."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RelexStreamWarning)
            try:
                yield
            finally:
                texts = [str(warning.message) for warning in caught]
        for text in texts:
            self.warn(text)


@dataclass
class Done:
    """What a watch did so far."""

    added: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    bytes_in: int = 0
    bytes_stored: int = 0
    bytes_deleted: int = 0

    def add(self, event: WatchEvent) -> None:
        """Count a step that was stored."""
        self.added.append(event.step)
        self.bytes_in += event.bytes_in
        self.bytes_stored += event.bytes_stored

    def summary(
        self, *, store: str, ended: str, given_up: tuple[int, ...], elapsed_s: float
    ) -> WatchSummary:
        """Return all of it."""
        return WatchSummary(
            store=store,
            ended=ended,
            steps_added=tuple(self.added),
            steps_verified=tuple(self.verified),
            steps_differing=tuple(self.differing),
            steps_deleted=tuple(self.deleted),
            steps_given_up=given_up,
            bytes_in=self.bytes_in,
            bytes_stored=self.bytes_stored,
            bytes_deleted=self.bytes_deleted,
            elapsed_s=elapsed_s,
        )
