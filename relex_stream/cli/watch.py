"""``relex-stream watch``: follow a run while it is trained."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session

if TYPE_CHECKING:
    from relex_stream.summaries import WatchEvent, WatchSummary

GRACE_S = 5.0
"""Seconds that what is under way gets after the first signal, before it is given up."""

SECONDS = click.FloatRange(min=0)


@click.command("watch")
@click.argument("base", type=options.PATH_OR_URL)
@click.argument("checkpoints", type=options.PATH)
@options.store_argument
@options.pattern
@options.steps
@options.source
@options.strip_prefix
@options.map_names
@click.option(
    "--settle",
    type=SECONDS,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Take a checkpoint when nothing in its directory has changed for so long.",
)
@click.option(
    "--poll",
    type=SECONDS,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks while there is nothing to do.",
)
@click.option(
    "--give-up",
    type=SECONDS,
    metavar="SECONDS",
    help="Pass over a checkpoint that is incomplete or broken when nothing in it has changed for "
    "so long.  [default: wait for it]",
)
@click.option(
    "--delete-ingested",
    is_flag=True,
    help="Delete the weights files of steps that were stored and verified; nothing else.",
)
@click.option(
    "--base-kept-elsewhere",
    is_flag=True,
    help="BASE stays where it is: allows --delete-ingested with a store that has no base weights.",
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete nothing of steps that are a multiple of N.  [default: none is kept so]",
)
@click.option(
    "--keep-last",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="Delete nothing of the last N steps stored, so that training can be resumed.",
)
@click.option(
    "--until",
    type=click.IntRange(min=1),
    metavar="STEP",
    help="End once this step, or a later one, is stored and verified.",
)
@click.option("--once", is_flag=True, help="End when there is nothing left to do.")
@click.option(
    "--idle-exit",
    type=SECONDS,
    metavar="SECONDS",
    help="End when nothing has happened for so long.  [default: never]",
)
@click.option(
    "--on-commit",
    metavar="COMMAND",
    help="Run a program after each step, without a shell. RELEX_STREAM_STORE, RELEX_STREAM_STEP, "
    "RELEX_STREAM_SOURCE and RELEX_STREAM_VERIFIED are in its environment.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be stored and deleted now; change nothing."
)
@options.include_base
@options.allow_nonfinite
@options.seed
@options.cast("Round F32 weights to BF16 on the way in, where the base has BF16.")
@options.memory_limit
@options.workers
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    base: Path | str,
    checkpoints: Path,
    store: Path,
    *,
    settle: float,
    poll: float,
    give_up: float | None,
    idle_exit: float | None,
    on_commit: str | None,
    **settings: Any,
) -> None:
    """Append checkpoints to STORE as a training run writes them, and free their space.

    Waits for complete checkpoints in CHECKPOINTS, appends each, reads it once more and compares it
    with the store, and with --delete-ingested then deletes its weights. Prints a line per step.
    Runs until it is stopped (SIGTERM or Ctrl-C), or as --once, --until and --idle-exit say.
    """
    from relex_stream.api import watch

    session = ctx.ensure_object(Session)

    def tell(event: WatchEvent) -> None:
        if session.json:
            click.echo(wording.to_json_line(event))
        elif not session.quiet or is_trouble(event):
            for line in describe_event(event, verbose=session.verbose):
                click.echo(line)

    with _progress(session) as progress, _stopping_on_signals() as stop:
        summary = watch(
            base,
            checkpoints,
            store,
            settle_s=settle,
            poll_s=poll,
            give_up_s=give_up,
            idle_exit_s=idle_exit,
            on_commit=_words(ctx, on_commit),
            on_event=tell,
            stop=stop,
            progress=progress,
            **settings,
        )
    if session.json:
        click.echo(wording.to_json_line(summary, warnings=session.warnings))
    elif not session.quiet:
        click.echo(closing_line(summary))
    if summary.steps_differing or summary.steps_given_up:
        ctx.exit(1)


def describe_event(event: WatchEvent, *, verbose: bool) -> list[str]:
    """Return the line of an event, and one for each problem."""
    start = f"{event.time} step {event.step}: "
    if event.kind in ("stored", "verified"):
        parts = []
        if event.kind == "stored":
            parts += [
                f"read {wording.format_bytes(event.bytes_in)}",
                f"stored {wording.format_bytes(event.bytes_stored)}",
                wording.format_ratio(event.ratio),
            ]
        parts.append(wording.format_duration(event.elapsed_s))
        if event.verified:
            parts.append("verified")
        elif event.problems:
            count = wording.format_count(len(event.problems), "difference")
            parts.append(f"DIFFERS from its source: {count}; the source stays")
        else:
            parts.append(event.message)
        shown = event.problems if verbose else event.problems[:3]
        return [start + wording.printable(", ".join(parts))] + [
            f"problem: {wording.printable(problem)}" for problem in shown
        ]
    if event.kind in ("deleting", "would-delete"):
        verb = "deleting" if event.kind == "deleting" else "would delete"
        files = wording.format_count(len(event.files), "file")
        lines = [f"{start}{verb} {files}, {wording.format_bytes(event.bytes_deleted)}"]
        return lines + [f"  {wording.printable(file)}" for file in event.files if verbose]
    if event.kind == "would-store":
        return [f"{start}would be stored and verified"]
    return [f"{start}{event.kind.replace('-', ' ')}: {wording.printable(event.message)}"]


def is_trouble(event: WatchEvent) -> bool:
    """Say whether an event is shown with ``--quiet`` too."""
    return bool(event.problems) or event.kind in ("given-up", "left-out")


def closing_line(summary: WatchSummary) -> str:
    """Return one line on all that was done."""
    reasons = {
        "stopped": "stopped by a signal",
        "until": "the last step wanted is stored",
        "once": "nothing left to do",
        "idle": "nothing happened any more",
        "dry-run": "nothing was changed",
    }
    parts = [
        f"{wording.format_count(len(summary.steps_added), 'step')} stored",
        f"{len(summary.steps_verified):,} verified",
        f"{len(summary.steps_deleted):,} deleted ({wording.format_bytes(summary.bytes_deleted)})",
    ]
    if summary.steps_differing:
        parts.append(f"differing: {wording.format_steps(summary.steps_differing)}")
    if summary.steps_given_up:
        parts.append(f"given up: {wording.format_steps(summary.steps_given_up)}")
    return f"{reasons[summary.ended]}; {', '.join(parts)}"


def _words(ctx: click.Context, text: str | None) -> tuple[str, ...]:
    try:
        words = shlex.split(text) if text is not None else []
    except ValueError as error:
        raise click.UsageError(f"--on-commit {text!r}: {error}", ctx) from None
    if text is not None and not words:
        raise click.UsageError("--on-commit names no program", ctx)
    return tuple(words)


@contextlib.contextmanager
def _progress(session: Session) -> Iterator[Any]:
    """Return a bar for those who look on; a log has its lines."""
    if session.verbose and sys.stderr.isatty():
        with session.progress() as progress:
            yield progress
    else:
        yield None


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[threading.Event]:
    """Return an event that SIGTERM or SIGINT sets.

    What is under way then has `GRACE_S`; after that, or at a second signal, it is given up.
    """
    stop = threading.Event()

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    handlers = {signal.SIGTERM: ask, signal.SIGINT: ask, signal.SIGALRM: give_up}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
