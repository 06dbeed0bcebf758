"""``relex-stream drop``: take back the last steps of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import DropSummary


@click.command("drop")
@options.store_argument
@click.option(
    "--after",
    type=click.IntRange(min=0),
    metavar="N",
    required=True,
    help="Drop every step later than N; 0 drops all.",
)
@options.common
@click.pass_obj
def command(session: Session, store: Location, *, after: int) -> None:
    """Take the steps later than a given one back out of STORE, for good.

    Use it when a run was resumed from an earlier checkpoint and its later steps were replaced.
    """
    from relex_stream.api import drop

    summary = drop(store, after=after)
    session.finish(summary, describe(summary, after=after, verbose=session.verbose))


def describe(summary: DropSummary, *, after: int, verbose: bool) -> list[str]:
    """Return which steps went and which are left."""
    left = f"left: {wording.format_steps(summary.steps_left, full=verbose)}"
    if not summary.steps_dropped:
        return [f"nothing to drop: no step later than {after}", left]
    dropped = wording.format_steps(summary.steps_dropped, full=verbose)
    return [f"dropped: {dropped}; {wording.format_bytes(summary.bytes_freed)} freed", left]
