"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

import click

from relex_stream.specs import NoProgress, Progress
from relex_stream.wording import format_bytes, format_duration, printable

if TYPE_CHECKING:
    from rich.console import Console

LINE_INTERVAL_S = 10.0
"""Seconds between two lines of a log."""

BAR_INTERVAL_S = 0.1
"""Seconds between two updates of a bar: block tasks may end thousands of times a second."""


class ClosableProgress(Progress, Protocol):
    """A `Progress` that can be ended early, because the work was."""

    def close(self) -> None:
        """End whatever is shown; more calls do nothing."""


class QuietProgress(NoProgress):
    """A `ClosableProgress` that says nothing."""

    def close(self) -> None:
        """Ignore."""


def describe(done_bytes: int, total_bytes: int, elapsed_s: float) -> str:
    """Return how far a stage is, how fast it goes and how long it will take.

    Nothing for a stage that has no bytes to count.

    Examples
    --------
    >>> describe(256 << 20, 1 << 30, 2.0)
    '256 MiB of 1.00 GiB (25 %), 128 MiB/s, 6.00 s left'
    """
    if not total_bytes and not done_bytes:
        return ""
    share = f" ({100 * done_bytes // total_bytes} %)" if total_bytes else ""
    text = f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}{share}"
    if done_bytes > 0 and elapsed_s > 0:
        speed = done_bytes / elapsed_s
        # A stage may do a little more than was announced.
        left_s = max(0, total_bytes - done_bytes) / speed
        text += f", {format_bytes(speed)}/s, {format_duration(left_s)} left"
    return text


class LineProgress:
    """Plain lines: when a stage starts, about every ten seconds, and when it ends.

    Parameters
    ----------
    write : callable
        Takes one line without its end.
    clock : callable
        Seconds that only grow; tests bring their own.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._stage = ""
        self._total_bytes = self._done_bytes = 0
        self._started_s = self._written_s = 0.0

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(printable(text))

    def start(self, stage: str, total_bytes: int) -> None:
        """Write that a stage begins."""
        self._stage, self._total_bytes, self._done_bytes = stage, total_bytes, 0
        self._started_s = self._written_s = self._clock()
        self._write(
            f"{stage}: {format_bytes(total_bytes)} to do" if total_bytes else f"{stage} ..."
        )

    def advance(self, done_bytes: int) -> None:
        """Count, and write a line if the last one is ten seconds old."""
        self._done_bytes += done_bytes
        now_s = self._clock()
        if now_s - self._written_s >= LINE_INTERVAL_S:
            self._written_s = now_s
            figures = describe(self._done_bytes, self._total_bytes, now_s - self._started_s)
            self._write(f"{self._stage}: {figures}")

    def finish(self) -> None:
        """Write what the stage did."""
        elapsed_s = self._clock() - self._started_s
        if not self._done_bytes:
            self._write(f"{self._stage}: done in {format_duration(elapsed_s)}")
            return
        text = f"{self._stage}: done, {format_bytes(self._done_bytes)}"
        text += f" in {format_duration(elapsed_s)}"
        if elapsed_s > 0:
            text += f", {format_bytes(self._done_bytes / elapsed_s)}/s"
        self._write(text)

    def close(self) -> None:
        """Do nothing: lines need no cleaning up."""


class BarProgress:
    """One bar per stage on a terminal, drawn by rich."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            expand=True,
            # The result belongs on stdout even while a bar is up on stderr.
            redirect_stdout=False,
        )
        self._clock = clock
        self._task: int | None = None
        self._total_bytes = self._done_bytes = 0
        self._started_s = self._drawn_s = 0.0

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def start(self, stage: str, total_bytes: int) -> None:
        """Add a bar."""
        self._bars.start()
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._started_s = self._drawn_s = self._clock()
        self._task = self._bars.add_task(
            stage, total=max(total_bytes, 1), figures=describe(0, total_bytes, 0.0)
        )

    def advance(self, done_bytes: int) -> None:
        """Move the bar, at most ten times a second."""
        self._done_bytes += done_bytes
        now_s = self._clock()
        if now_s - self._drawn_s >= BAR_INTERVAL_S:
            self._drawn_s = now_s
            self._draw(describe(self._done_bytes, self._total_bytes, now_s - self._started_s))

    def finish(self) -> None:
        """Fill the bar and say what the stage did."""
        elapsed_s = self._clock() - self._started_s
        text = f"in {format_duration(elapsed_s)}"
        if self._done_bytes:
            text = f"{format_bytes(self._done_bytes)} {text}"
        # A full bar needs something to be full of, also where there was nothing to do.
        self._total_bytes = self._done_bytes = max(self._done_bytes, 1)
        self._draw(text)

    def close(self) -> None:
        """Stop drawing and give the cursor back."""
        self._bars.stop()

    def _draw(self, figures: str) -> None:
        if self._task is not None:
            self._bars.update(
                self._task,  # type: ignore[arg-type]
                completed=self._done_bytes,
                total=max(self._total_bytes, 1),
                figures=figures,
            )


def make_progress(*, quiet: bool, stream: TextIO | None = None) -> ClosableProgress:
    """Return the `Progress` that suits a stream, stderr by default.

    rich is imported for terminals only.
    """
    if quiet:
        return QuietProgress()
    target = sys.stderr if stream is None else stream
    if target.isatty():
        from rich.console import Console

        console = Console(file=target)
        if not console.is_dumb_terminal:
            return BarProgress(console)

    def write(line: str) -> None:
        # A reader that has gone away must not end hours of work.
        with contextlib.suppress(OSError):
            click.echo(line, file=target)

    return LineProgress(write)
