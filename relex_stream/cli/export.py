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
    help="The stored step to rebuild; 0 is the base.",
)
@click.option(
    "--steps",
    metavar="STEPS",
    help="Several, each in OUT/step_N: numbers, ranges and ranges with a stride, like 10:100:10.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["ingested", "hf"]),
    help="The files that were ingested, byte for byte; or safetensors with the base's names, "
    "shards and side files.  [default: ingested, where they can be put together again]",
)
@options.cast("With --format hf: round to BF16 what the base has in BF16.")
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
    step: int | None,
    steps: str | None,
    file_format: str | None,
    cast: str | None,
    base: Location | str | None,
    memory_limit: int | None,
    workers: int | None,
) -> None:
    """Rebuild a stored step in the directory OUT, every file byte for byte as it was.

    Lists the files with their SHA-256, in the form that sha256sum --check reads.
    """
    from relex_stream.api import export, export_steps

    if (step is None) == (steps is None):
        raise click.UsageError("give one of --step and --steps")
    with session.progress() as progress:
        if step is not None:
            summary = export(
                store,
                out,
                step=step,
                file_format=file_format,
                cast=cast,
                base=base,
                memory_limit=memory_limit,
                workers=workers,
                progress=progress,
            )
            session.finish(summary, describe(summary))
            exports = [summary]
        else:
            assert steps is not None
            several = export_steps(
                store,
                out,
                steps=steps,
                file_format=file_format,
                cast=cast,
                base=base,
                memory_limit=memory_limit,
                workers=workers,
                progress=progress,
            )
            exports = list(several.exports)
            lines = [line for each in exports for line in describe(each, f"step_{each.step}/")]
            session.finish(several, lines)
    if not (session.quiet or session.json):
        for each in exports:
            click.echo(closing_line(each), err=True)


def describe(summary: ExportSummary, below: str = "") -> list[str]:
    """Return a line per file: its SHA-256 and its path."""
    return [f"{file.sha256}  {below}{wording.printable(file.path)}" for file in summary.files]


def closing_line(summary: ExportSummary) -> str:
    """Return one line on the whole export; it goes to stderr, apart from the checksums."""
    form = " as a model like the base" if summary.file_format == "hf" else ""
    return (
        f"step {summary.step}{form}: {wording.format_count(len(summary.files), 'file')}, "
        f"{wording.format_bytes(summary.bytes_written)} written to "
        f"{wording.printable(summary.path)} in {wording.format_duration(summary.elapsed_s)}, "
        f"peak memory {wording.format_bytes(summary.peak_memory_bytes)}"
    )
