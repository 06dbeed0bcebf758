"""``relex-stream export``: rebuild a stored step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import ExportSummary


@click.command("export")
@options.store_argument
@click.argument("out", type=options.PATH)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    metavar="N",
    required=True,
    help="The stored step to rebuild.",
)
@options.base
@options.memory_limit
@options.workers
@options.common
@click.pass_obj
def command(
    session: Session,
    store: Location,
    out: Path,
    *,
    step: int,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
) -> None:
    """Rebuild a stored step in the directory OUT, every file byte for byte as it was.

    Lists the files with their SHA-256, in the form that sha256sum --check reads.
    """
    from relex_stream.api import export

    with session.progress() as progress:
        summary = export(
            store,
            out,
            step=step,
            base=base,
            memory_limit=memory_limit,
            workers=workers,
            progress=progress,
        )
    session.finish(summary, describe(summary))
    if not (session.quiet or session.json):
        click.echo(closing_line(summary), err=True)


def describe(summary: ExportSummary) -> list[str]:
    """Return a line per file: its SHA-256 and its path."""
    return [f"{file.sha256}  {wording.printable(file.path)}" for file in summary.files]


def closing_line(summary: ExportSummary) -> str:
    """Return one line on the whole export; it goes to stderr, apart from the checksums."""
    return (
        f"step {summary.step}: {wording.format_count(len(summary.files), 'file')}, "
        f"{wording.format_bytes(summary.bytes_written)} written to "
        f"{wording.printable(summary.path)} in {wording.format_duration(summary.elapsed_s)}, "
        f"peak memory {wording.format_bytes(summary.peak_memory_bytes)}"
    )
