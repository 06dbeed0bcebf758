"""``relex-stream backtest``: what earlier forecasts would have been worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location
from relex_stream.summaries import WEAK_SKILL

if TYPE_CHECKING:
    from relex_stream.summaries import BacktestSummary, ForecastSkill, SkillOfDamping

_GROUPS_SHOWN = 5


@click.command("backtest")
@options.store_argument
@click.option(
    "--history-steps",
    type=click.IntRange(min=1),
    metavar="K",
    multiple=True,
    help="Forecast from the stored steps up to step K. May be given several times.  [default: a "
    "quarter, a third, a half and two thirds of the last step]",
)
@click.option(
    "--target-step",
    "target_steps",
    type=click.IntRange(min=1),
    metavar="N",
    multiple=True,
    help="A stored step to forecast. May be given several times.  [default: those nearest to 1.25, "
    "1.5, 2, 3, 4, 6 and 8 times K, and the last]",
)
@options.rank
@click.option(
    "--fit",
    default=("linear",),
    show_default="linear",
    metavar="FIT",
    multiple=True,
    help="As in extrapolate. May be given several times.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    metavar="W",
    multiple=True,
    help="As in extrapolate. May be given several times.  [default: all]",
)
@click.option(
    "--anchor",
    type=click.Choice(["base", "latest"]),
    default=("base", "latest"),
    show_default="base, latest",
    multiple=True,
    help="As in extrapolate. May be given twice.",
)
@click.option(
    "--damping",
    type=float,
    default=(0.1, 0.3, 0.5, 1.0),
    show_default="0.1, 0.3, 0.5, 1",
    metavar="X",
    multiple=True,
    help="As in extrapolate. May be given several times.",
)
@click.option(
    "--group-by",
    type=click.Choice(["tensor", "layer", "module", "model"]),
    default="tensor",
    show_default=True,
    help="What has a subspace of its own, as in extrapolate.",
)
@options.exact
@options.base
@options.memory_limit
@options.workers
@options.common
@click.pass_obj
def command(session: Session, /, store: Location, **asked: Any) -> None:
    """Say what forecasts from the first steps in STORE would have been worth at its later ones.

    Skill is 1 for a perfect forecast and 0 for one that is no nearer to what came than the last
    observed step, over all weights of the model. Below 0, staying would have been better. Weights
    are not rewards: a model may be evaluated as better although it is further away, but forecasts
    of far below 0 mostly are not.
    """
    from relex_stream.api import backtest

    with session.progress() as progress:
        summary = backtest(store, **asked, progress=progress)
    session.finish(summary, describe(summary, verbose=session.verbose), essential=True)


def describe(summary: BacktestSummary, *, verbose: bool = False) -> list[str]:
    """Return the recommendation, and a table of forecasts."""
    figures = "exact, from the weights"
    if not summary.exact:
        figures = "estimated from sketches, +- their standard error; small tensors exact"
    rows = {
        "store": summary.store,
        "steps": wording.format_steps(summary.steps, full=verbose),
        "figures": figures,
    }
    lines = [*wording.pairs(rows), "", *_forecasts(summary), "", *_advice(summary)]
    groups = sorted(summary.groups, key=lambda each: each.skill)
    shown = groups if verbose else groups[:_GROUPS_SHOWN]
    if shown:
        title = summary.group_by if verbose else "least skill"
        lines += [
            "",
            *wording.table(
                (title, "skill", "best damping", "moved"),
                [
                    (
                        each.name,
                        wording.format_figure(each.skill),
                        wording.format_figure(each.best_damping, 2),
                        f"{each.moved:.3g}",
                    )
                    for each in shown
                ],
                "lrrr",
            ),
        ]
    return lines


def _forecasts(summary: BacktestSummary) -> list[str]:
    forecasts = summary.forecasts
    dampings = [each.damping for each in forecasts[0].skills]
    several = {
        name: len({getattr(each, name) for each in forecasts}) > 1
        for name in ("rank", "fit", "window")
    }
    shown = [name for name, more in several.items() if more]
    header = (
        *("from", "to", "horizon", *shown, "anchor"),
        *(f"x {damping:g}" for damping in dampings),
        *("auto", "best"),
    )
    rows = [
        (
            str(each.history_step),
            str(each.target_step),
            f"{each.horizon:.2f}",
            *(_setting(each, name) for name in shown),
            each.anchor,
            *(_skill(found) for found in each.skills),
            _chosen(each.auto),
            _chosen(each.best),
        )
        for each in forecasts
    ]
    align = "rrr" + "r" * len(shown) + "l" + "r" * (len(dampings) + 2)
    return ["skill, by damping", "", *wording.table(header, rows, align)]


def _setting(each: ForecastSkill, name: str) -> str:
    value = getattr(each, name)
    return "all" if value is None else str(value)


def _skill(found: SkillOfDamping) -> str:
    text = wording.format_figure(found.skill)
    return text if found.error is None or text == "-" else f"{text} +- {found.error:.3f}"


def _chosen(found: SkillOfDamping | None) -> str:
    return "-" if found is None else f"{wording.format_figure(found.skill)} ({found.damping:.2f})"


def _advice(summary: BacktestSummary) -> list[str]:
    advice = summary.recommendation
    if advice is None:
        return ["nothing was better than to stay at the last observed step: do not extrapolate"]
    damping = advice.damping if isinstance(advice.damping, str) else f"{advice.damping:g}"
    options_ = [f"--rank {advice.rank}", f"--fit {advice.fit}", f"--anchor {advice.anchor}"]
    options_ += [f"--damping {damping}"]
    if advice.window is not None:
        options_.insert(2, f"--window {advice.window}")
    if summary.group_by != "tensor":
        options_.append(f"--group-by {summary.group_by}")
    count = wording.format_count(advice.forecasts, "forecast")
    reach = f"up to {advice.reach:.2f} times the history" if advice.reach else "not even nearby"
    if advice.reach and not advice.reach_is_known:
        reach += ", the furthest that could be tested"
    return wording.pairs(
        {
            "most skill": " ".join(options_),
            "mean skill": f"{advice.mean_skill:.3f} over {count}, least {advice.least_skill:.3f}"
            + (": hardly nearer than staying" if advice.mean_skill < WEAK_SKILL else ""),
            "above 0": reach,
        }
    )
