"""``relex-stream combine``: weighted sums of stored steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relex_stream.cli import models, options
from relex_stream.cli.session import Session
from relex_stream.locations import Location


@click.command("combine")
@options.store_argument
@click.argument("out", type=options.PATH)
@click.option(
    "--recipe",
    "recipes",
    metavar="RECIPE",
    multiple=True,
    help="A published recipe, see above. May be given several times.",
)
@click.option(
    "--weights",
    metavar="STEP=WEIGHT,...",
    multiple=True,
    help="The weight of each step, like 100=0.5,200=0.75; the base has what is left of 1. May be "
    "given several times.",
)
@options.history_steps
@options.selection
@options.making
@options.common
@click.pass_obj
def command(session: Session, /, store: Location, out: Path, **asked: Any) -> None:
    """Write weighted sums of the steps in STORE to OUT.

    \b
    Recipes:
      two-point:target=N[,from=A][,to=B][,norms=copy|extrapolate]
          the line through two steps, A (default: the base) and B (default: the last), at step N;
          normalisation layers are those of B (RLVR-Linearity, arXiv 2601.04537)
      expo:alpha=X[,step=N]
          step N (default: the last) and X times its delta on top (ExPO, arXiv 2404.16792)
      first-update:scale=X
          the base and X times the delta of the first step
      ema:decay=X[,to=N]
          the exponential moving average that begins at the base
      lawa:last=K[,to=N]
          the mean of the last K steps (LAWA, arXiv 2306.03241)
    """  # noqa: D301 - the backspace is click's mark for lines that stay as they are
    from relex_stream.api import combine

    with session.progress() as progress:
        summary = combine(store, out, **asked, progress=progress)
    lines = models.describe(summary, verbose=session.verbose)
    session.finish(summary, lines, essential=summary.dry_run)
