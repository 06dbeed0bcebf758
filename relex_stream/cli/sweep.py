"""``relex-stream sweep``: models of a grid of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relex_stream.cli import models, options
from relex_stream.cli.session import Session
from relex_stream.locations import Location


def _several(name: str, metavar: str, kind: click.ParamType[Any], help: str) -> Any:  # noqa: A002
    return click.option(name, type=kind, metavar=metavar, multiple=True, help=help)


_NUMBER = click.IntRange(min=1)

_EXTRAPOLATE = ("target_step", "refit_every", "damping", "anchor")
_RECONSTRUCT = ("step",)
_SUBSPACE = ("history_steps", "rank", "fit", "window", "group_by", "svd", "power_iterations")
_COMBINE = ("recipe", "weights")
_SELECTION = ("include", "exclude", "excluded_from")


@click.command("sweep")
@options.store_argument
@click.argument("out", type=options.PATH)
@click.option(
    "--grid",
    type=options.PATH,
    metavar="FILE",
    help="A YAML file of the settings, see above; instead of the options that follow.",
)
@_several("--target-step", "N", _NUMBER, "Extrapolate to this step.")
@_several("--step", "N", _NUMBER, "Reconstruct this stored step.")
@_several("--recipe", "RECIPE", click.STRING, "Combine by this recipe (see combine).")
@_several("--weights", "STEP=WEIGHT,...", click.STRING, "Combine with these weights.")
@_several("--history-steps", "K|all", options.NumberOr("all"), "Use steps up to K.  [default: all]")
@_several("--rank", "R", _NUMBER, "Rank of the subspace.  [default: 1]")
@_several("--fit", "FIT", click.STRING, "How coefficients go on.  [default: linear]")
@_several("--window", "W|all", options.NumberOr("all"), "Fit the last W.  [default: all]")
@_several("--refit-every", "F|never", options.NumberOr("never"), "Fit again.  [default: never]")
@_several("--damping", "X|auto", options.DampingType(), "Times the prediction.  [default: 1]")
@_several(
    "--anchor",
    "base|latest",
    click.Choice(["base", "latest"]),
    "As in extrapolate.  [default: base]",
)
@_several("--group-by", "WHAT", click.STRING, "What has a subspace of its own.  [default: tensor]")
@click.option(
    "--svd",
    type=click.Choice(["randomized", "exact"]),
    help="As in extrapolate.  [default: randomized]",
)
@click.option(
    "--power-iterations", type=_NUMBER, metavar="Q", help="As in extrapolate.  [default: 1]"
)
@options.selection
@options.making
@options.common
@click.pass_obj
def command(
    session: Session, /, store: Location, out: Path, grid: Path | None, **asked: Any
) -> None:
    """Write the models of a grid of settings to OUT, with one index.

    Every option of extrapolate, reconstruct and combine may have several values; every combination
    is a model, in a directory such as OUT/fit_linear/window_20/step_500/damping_0.3, without the
    levels that have one value. OUT/relex_stream.json says what each is. Models with the same
    history and subspaces share their statistics and are written in the same passes. See --dry-run
    for how many they are, and what they take.

    \b
    A grid file is a list of entries, each with its own settings:
      - method: extrapolate
        target-step: [500, 1000]
        history-steps: [100, all]
        fit: [linear, polynomial:2]
        anchor: latest
        damping: [auto, 0.3, 1]
      - method: reconstruct
        step: [100]
        rank: [1, 5]
      - method: combine
        recipe: ["lawa:last=5"]
    """  # noqa: D301 - the backspace is click's mark for lines that stay as they are
    from relex_stream.api import sweep

    given = _given(asked)
    if grid is not None and given:
        raise click.UsageError("--grid has all settings: leave the others out")
    entries = [] if grid is not None else _entries(given)
    with session.progress() as progress:
        summary = sweep(store, out, grid=grid or entries, **asked, progress=progress)
    lines = models.describe(summary, verbose=session.verbose)
    session.finish(summary, lines, essential=summary.dry_run)


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    """Take the settings that are given out of what is asked."""
    every = (*_EXTRAPOLATE, *_RECONSTRUCT, *_SUBSPACE, *_COMBINE, *_SELECTION)
    given: dict[str, Any] = {}
    for name in every:
        value = asked.pop(name)
        if value not in (None, ()) and (name, value) != ("excluded_from", "base"):
            given[name] = value
    return given


def _entries(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return settings as entries of a grid."""
    parts = {
        "extrapolate": (*_EXTRAPOLATE, *_SUBSPACE, *_SELECTION),
        "reconstruct": (*_RECONSTRUCT, *_SUBSPACE, *_SELECTION),
        "combine": (*_COMBINE, "history_steps", *_SELECTION),
    }
    wanted = {
        "extrapolate": "target_step" in given,
        "reconstruct": "step" in given,
        "combine": bool(given.keys() & set(_COMBINE)),
    }
    entries = [
        {"method": method, **{name: given[name] for name in names if name in given}}
        for method, names in parts.items()
        if wanted[method]
    ]
    if not entries:
        raise click.UsageError("name a --grid, or a --target-step, --step, --recipe or --weights")
    unused = given.keys() - {name for entry in entries for name in entry}
    if unused:
        name = sorted(unused)[0].replace("_", "-")
        raise click.UsageError(f"--{name} changes nothing of what is asked for")
    return entries
