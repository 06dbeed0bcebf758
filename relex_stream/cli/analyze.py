"""``relex-stream analyze``: how low-rank and how straight a trajectory is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import AnalyzeSummary, GroupAnalysis

_GROUPINGS = ("layer", "module", "tensor")


@click.command("analyze")
@options.store_argument
@options.history_steps
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="R",
    help="Components to tell of.",
)
@options.fit
@options.window
@options.exact
@click.option(
    "--by",
    "groupings",
    type=click.Choice(_GROUPINGS),
    multiple=True,
    default=("module", "layer"),
    show_default="module, layer",
    help="What to list besides the model. May be given several times. --json has all.",
)
@options.base
@options.memory_limit
@options.workers
@options.common
@click.pass_obj
def command(
    session: Session, /, store: Location, *, groupings: tuple[str, ...], **asked: Any
) -> None:
    """Say how low-rank and how straight the trajectory in STORE is.

    For the model, its modules, layers and tensors: the share of all movement in the first
    components, how well a line describes each, there and at steps that it has not seen, and
    whether the movement slows down. And which steps are odd. None of it says that an extrapolation
    helps.
    """
    from relex_stream.api import analyze

    with session.progress() as progress:
        summary = analyze(store, **asked, progress=progress)
    lines = describe(summary, groupings, verbose=session.verbose)
    session.finish(summary, lines, essential=True)


def describe(
    summary: AnalyzeSummary, groupings: Sequence[str], *, verbose: bool = False
) -> list[str]:
    """Return the model's figures, odd steps, and a table for each grouping."""
    model = summary.model
    figures = "exact, from the weights"
    if not summary.exact:
        figures = "estimated from sketches, +- their standard error; small tensors exact"
    fit = f"{summary.fit} fit"
    if summary.window is not None:
        fit += f" of the last {summary.window} checkpoints"
    rows = {
        "store": summary.store,
        "history": wording.format_steps(summary.history, full=verbose),
        "figures": figures,
        "tensors": f"{model.tensors:,} changed, {summary.unchanged_tensors:,} never did",
        "moved": f"{model.delta_norm:.4g} from the base by step {summary.history[-1]} (norm)",
    }
    for number in range(summary.rank):
        share = _share(model.explained_variance, model.explained_variance_error, number)
        rows[f"rank {number + 1}"] = f"explains {share} of all movement"
    rows["R2"] = f"{_figure(model.r2, model.r2_error, 0)}, {fit} of the first component"
    if not math.isnan(model.r2_elsewhere[0]):
        elsewhere = _figure(model.r2_elsewhere, model.r2_elsewhere_error, 0)
        rows["R2 elsewhere"] = f"{elsewhere}, at stored steps that the fit has not seen"
    rows["bend"] = f"{_bend(model)}: the movement {_bent(model.bend)}"
    lines = wording.pairs(rows)
    odd = [each for each in summary.steps if each.note]
    if odd:
        lines += [
            "",
            *wording.table(("step", "note"), [(str(s.step), s.note) for s in odd], "rl"),
        ]
    for grouping in dict.fromkeys(groupings):
        groups = getattr(summary, f"{grouping}s")
        lines += ["", *_table(grouping, groups, summary)]
    if verbose:
        lines += ["", *_steps(summary)]
    return lines


def _table(grouping: str, groups: Sequence[GroupAnalysis], summary: AnalyzeSummary) -> list[str]:
    header = (grouping, "weights", "moved", "explained variance", "R2", "R2 elsewhere", "bend")
    return wording.table(
        header,
        [
            (
                each.name,
                f"{each.weights:,}",
                f"{each.delta_norm:.3g}",
                " ".join(
                    _share(each.explained_variance, each.explained_variance_error, number)
                    for number in range(summary.rank)
                ),
                _figure(each.r2, each.r2_error, 0),
                _figure(each.r2_elsewhere, each.r2_elsewhere_error, 0),
                _bend(each),
            )
            for each in groups
        ],
        "lrrrrrr",
    )


def _steps(summary: AnalyzeSummary) -> list[str]:
    return wording.table(
        ("step", "changed", "moved since", "from the base"),
        [
            (
                str(each.step),
                wording.format_share(each.changed_share),
                f"{each.change_norm:.3g}",
                f"{each.delta_norm:.3g}",
            )
            for each in summary.steps
        ],
        "rrrr",
    )


def _share(shares: Sequence[float], errors: Sequence[float] | None, number: int) -> str:
    text = wording.format_share(shares[number])
    return text if errors is None or text == "-" else f"{text} +- {100 * errors[number]:.1f}"


def _figure(figures: Sequence[float], errors: Sequence[float] | None, number: int) -> str:
    text = wording.format_figure(figures[number])
    return text if errors is None or text == "-" else f"{text} +- {errors[number]:.3f}"


def _bend(group: GroupAnalysis) -> str:
    errors = None if group.bend_error is None else (group.bend_error,)
    return _figure((group.bend,), errors, 0)


def _bent(bend: float) -> str:
    if math.isnan(bend) or abs(bend) < 0.02:
        return "is straight so far"
    return "slows down" if bend > 0 else "speeds up"
