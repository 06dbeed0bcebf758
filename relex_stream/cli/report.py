"""``relex-stream report``: one page about a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import ReportSummary


@click.command("report")
@options.store_argument
@click.option(
    "-o",
    "--out",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help="The page to write, like report.html.",
)
@options.history_steps
@click.option(
    "--target-step",
    "target_steps",
    type=click.IntRange(min=1),
    metavar="N",
    multiple=True,
    help="A step to forecast coefficients for. May be given several times.  [default: 1.5 and 2 "
    "times the last step of the history]",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="R",
    help="Components to tell of; fewer where the history has fewer checkpoints.",
)
@options.fit
@options.window
@options.exact
@click.option("--title", metavar="TEXT", help="Heading of the page.  [default: the store's name]")
@click.option(
    "--pictures",
    type=options.PATH,
    metavar="DIRECTORY",
    help="Write each chart there as a file, too.",
)
@click.option(
    "--picture-format",
    type=click.Choice(["png", "svg"]),
    default=("png",),
    show_default="png",
    multiple=True,
    help="Of those files. May be given twice.",
)
@click.option(
    "--csv",
    type=options.PATH,
    metavar="DIRECTORY",
    help="Write all numbers there, as CSV tables.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@options.base
@options.memory_limit
@options.workers
@options.common
@click.pass_obj
def command(session: Session, /, store: Location, **asked: Any) -> None:
    """Write a page about the trajectory in STORE, which needs nothing but a browser.

    On it: coefficients with fit and forecast, explained variance and R2 by module and layer,
    singular values, what changed from step to step, what forecasts would have been worth, storage
    and memory. What analyze and backtest say, from one look at the store.
    """
    from relex_stream.api import report

    with session.progress() as progress:
        summary = report(store, **asked, progress=progress)
    session.finish(summary, describe(summary))


def describe(summary: ReportSummary) -> list[str]:
    """Return the verdict and what was written."""
    rows = {
        "store": summary.store,
        "history": wording.format_steps(summary.history),
        "page": f"{summary.path}, {wording.format_bytes(summary.page_bytes)}",
    }
    if summary.pictures:
        rows["pictures"] = wording.format_count(len(summary.pictures), "file")
    if summary.tables:
        rows["tables"] = wording.format_count(len(summary.tables), "file")
    rows["peak memory"] = wording.format_bytes(summary.peak_memory_bytes)
    rows["elapsed"] = wording.format_duration(summary.elapsed_s)
    return [*wording.pairs(rows), "", wording.printable(summary.verdict)]
