"""``relex-stream reconstruct``: project stored steps into their subspace and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relex_stream.cli import models, options
from relex_stream.cli.session import Session
from relex_stream.locations import Location


@click.command("reconstruct")
@options.store_argument
@click.argument("out", type=options.PATH)
@click.option(
    "--step",
    "steps",
    type=click.IntRange(min=1),
    metavar="N",
    multiple=True,
    required=True,
    help="The stored step. May be given several times.",
)
@click.option(
    "--fitted",
    is_flag=True,
    help="Take the point of the fitted curve at that step, not the step's own coefficients.",
)
@options.subspace
@options.selection
@options.making
@options.common
@click.pass_obj
def command(session: Session, /, store: Location, out: Path, **asked: Any) -> None:
    """Project a step of STORE into the rank-r subspace of its history and back; write it to OUT.

    What RELEX finds first (arXiv 2605.21468): such a model is about as good as the step itself. If
    yours is not, an extrapolation in that subspace cannot be.
    """
    from relex_stream.api import reconstruct

    with session.progress() as progress:
        summary = reconstruct(store, out, **asked, progress=progress)
    lines = models.describe(summary, verbose=session.verbose)
    session.finish(summary, lines, essential=summary.dry_run)
