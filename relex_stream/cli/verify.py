"""``relex-stream verify``: check every committed byte of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import VerifySummary


@click.command("verify")
@options.store_argument
@options.base
@options.workers
@options.common
@click.pass_context
def command(
    ctx: click.Context, store: Location, *, base: Location | str | None, workers: int | None
) -> None:
    """Check every committed byte of STORE against its checksums.

    Prints a line per problem; the exit status is 1 if there is any.
    """
    from relex_stream.api import verify

    session = ctx.ensure_object(Session)
    with session.progress() as progress:
        summary = verify(store, base=base, workers=workers, progress=progress)
    lines = [f"problem: {wording.printable(problem)}" for problem in summary.problems]
    if not session.quiet:
        lines.append(closing_line(summary))
    session.finish(summary, lines, essential=True)
    if summary.problems:
        ctx.exit(1)


def closing_line(summary: VerifySummary) -> str:
    """Return one line on all that was checked."""
    found = wording.format_count(len(summary.problems), "problem") if summary.problems else "intact"
    return (
        f"{wording.printable(summary.store)}: {found}; "
        f"{wording.format_count(summary.steps, 'step')}, "
        f"{wording.format_count(summary.frames, 'frame')}, "
        f"{wording.format_count(summary.records, 'record')} and "
        f"{wording.format_count(summary.blobs, 'blob')} checked, "
        f"{wording.format_bytes(summary.bytes_read)} in "
        f"{wording.format_duration(summary.elapsed_s)}"
    )
