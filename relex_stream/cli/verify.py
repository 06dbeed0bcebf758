"""``relex-stream verify``: check every committed byte of a store, compare it, repair it."""

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
@click.option(
    "--against",
    type=options.PLACE,
    metavar="CHECKPOINTS",
    help="Also compare each step, bit for bit, with its checkpoint in this directory, where that "
    "is still there.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Rebuild what is damaged, from the checkpoints of --against and the base.",
)
@click.option("--dry-run", is_flag=True, help="With --repair: say what would be rebuilt.")
@options.pattern
@options.source
@options.strip_prefix
@options.map_names
@options.cast("With --against: F32 checkpoints were rounded to BF16 on the way in.")
@options.step_offset
@options.then
@options.memory_limit
@options.workers
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    store: Location,
    *,
    base: Location | str | None,
    against: Location | None,
    repair: bool,
    dry_run: bool,
    pattern: str | None,
    source: str,
    strip_prefix: str | None,
    map_names: tuple[tuple[str, str], ...],
    cast: str | None,
    step_offset: int,
    then: tuple[tuple[Location, int], ...],
    memory_limit: int | None,
    workers: int | None,
) -> None:
    """Check every committed byte of STORE against its checksums.

    Prints a line per problem; the exit status is 1 if there is any. With --repair, a line per file
    of the store that was rebuilt, and per problem that is left. A file is replaced whole, and only
    by the very bytes that were committed.
    """
    from relex_stream.api import verify

    session = ctx.ensure_object(Session)
    with session.progress() as progress:
        summary = verify(
            store,
            base=base,
            against=against,
            pattern=pattern,
            source=source,
            strip_prefix=strip_prefix,
            map_names=map_names,
            cast=cast,
            step_offset=step_offset,
            then=then,
            repair=repair,
            dry_run=dry_run,
            memory_limit=memory_limit,
            workers=workers,
            progress=progress,
        )
    rebuilt = "would be rebuilt" if dry_run else "rebuilt"
    lines = [f"{rebuilt}: {wording.printable(key)}" for key in summary.repaired]
    lines += [f"problem: {wording.printable(problem)}" for problem in summary.problems]
    if not session.quiet:
        lines += [f"note: {wording.printable(note)}" for note in summary.notes]
        lines += closing_lines(summary, full=session.verbose)
    session.finish(summary, lines, essential=True)
    if summary.problems:
        ctx.exit(1)


def closing_lines(summary: VerifySummary, *, full: bool) -> list[str]:
    """Return a line on all that was checked, and one on what was compared."""
    found = wording.format_count(len(summary.problems), "problem") if summary.problems else "intact"
    lines = []
    if summary.compared or summary.not_compared:
        compared = wording.format_steps(summary.compared, full=full)
        text = f"compared with checkpoints: {compared}"
        if summary.compared:
            text += f", {wording.format_bytes(summary.compared_bytes)}"
        if summary.not_compared:
            text += f"; not there: {wording.format_steps(summary.not_compared, full=full)}"
        lines.append(text)
    lines.append(
        f"{wording.printable(summary.store)}: {found}; "
        f"{wording.format_count(summary.steps, 'step')}, "
        f"{wording.format_count(summary.frames, 'frame')}, "
        f"{wording.format_count(summary.records, 'record')} and "
        f"{wording.format_count(summary.blobs, 'blob')} checked, "
        f"{wording.format_bytes(summary.bytes_read)} in "
        f"{wording.format_duration(summary.elapsed_s)}"
    )
    return lines
