"""``relex-stream extrapolate``: predict the weights of later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relex_stream.cli import models, options
from relex_stream.cli.session import Session
from relex_stream.locations import Location


@click.command("extrapolate")
@options.store_argument
@click.argument("out", type=options.PATH)
@click.option(
    "--target-step",
    "target_steps",
    type=click.IntRange(min=1),
    metavar="N",
    multiple=True,
    required=True,
    help="The step to predict. May be given several times.",
)
@options.subspace
@click.option(
    "--refit-every",
    type=click.IntRange(min=1),
    metavar="F",
    help="Predict F steps, then fit again through as many of the last coefficients, observed or "
    "predicted, and so on.  [default: never]",
)
@click.option(
    "--damping",
    type=options.DampingType(),
    default=(1.0,),
    show_default="1",
    metavar="X|auto",
    multiple=True,
    help="Multiply the predicted delta by X, or the predicted change with --anchor latest. auto, "
    "with that anchor: chosen by what forecasts of the end of the history from its earlier steps "
    "were worth. May be given several times.",
)
@click.option(
    "--anchor",
    type=click.Choice(["base", "latest"]),
    default=("base",),
    show_default="base",
    multiple=True,
    help="What the prediction is added to: its delta to the base, or its change since then to the "
    "last checkpoint, which keeps what lies outside the subspace. May be given twice.",
)
@options.selection
@click.option(
    "--compat",
    type=click.Choice(["relex"]),
    help="Do as the scripts of RELEX's authors do: deltas in half precision, and a fit over rows "
    "0, 1, ... instead of steps.",
)
@click.option(
    "--step-scale",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="With --compat relex: multiply target steps by X (their scripts do by 2 for one model).",
)
@options.making
@options.common
@click.pass_obj
def command(session: Session, /, store: Location, out: Path, **asked: Any) -> None:
    """Predict the weights at later steps from the steps in STORE, and write them to OUT.

    The method is RELEX: per tensor, the rank-1 subspace of the weight deltas and a line through
    its coefficients. The output is a directory that transformers and vLLM load.

    Every combination of target, rank, damping and anchor is a model. Several are written in the
    same passes, to directories such as OUT/step_500/rank_1/damping_0.3/anchor_base (without the
    levels that have one value), with an index, OUT/relex_stream.json.
    """
    from relex_stream.api import extrapolate

    with session.progress() as progress:
        summary = extrapolate(store, out, **asked, progress=progress)
    lines = models.describe(summary, verbose=session.verbose)
    session.finish(summary, lines, essential=summary.dry_run)
