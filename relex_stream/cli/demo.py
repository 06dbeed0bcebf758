"""``relex-stream demo``: the main job on a real trajectory, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session

if TYPE_CHECKING:
    from relex_stream.summaries import DemoRow, DemoSummary


@click.command("demo")
@click.argument("directory", type=options.PATH, required=False)
@click.option(
    "--problems",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    metavar="N",
    help="Held-out problems that each model is measured on.",
)
@options.workers
@options.common
@click.pass_obj
def command(
    session: Session, directory: Path | None, *, problems: int, workers: int | None
) -> None:
    """Extrapolate a real training run that comes with the package, and measure the result.

    A small model learned three-digit addition by reinforcement learning with verifiable rewards.
    Its first checkpoints go into a store, later ones are predicted from it, and all are measured
    on held-out problems beside the true checkpoints. Files go to DIRECTORY and stay there, or to
    a temporary one.
    """
    from relex_stream.demo.run import run_demo

    with session.progress() as progress:
        summary = run_demo(directory, problems=problems, workers=workers, progress=progress)
    session.finish(summary, describe(summary), essential=True)


def describe(summary: DemoSummary) -> list[str]:
    """Return the table of models and what it says."""
    build = summary.build
    rows = [
        (
            row.kind,
            str(row.step),
            wording.format_share(row.accuracy),
            f"+/- {wording.format_share(row.standard_error)}",
        )
        for row in summary.rows
    ]
    stored = (
        f"The first {summary.history_steps} checkpoints of the run, "
        f"{wording.format_bytes(build.bytes_in)}, are "
        f"{wording.format_bytes(build.bytes_stored)} in the store "
        f"({wording.format_ratio(build.ratio)} smaller)."
    )
    fitted = (
        f"Rank 1 explains {wording.format_share(summary.median_explained_variance)} of the weight "
        f"change, R2 of the line {wording.format_figure(summary.median_r2)} (medians over tensors)."
    )
    lines = [
        stored,
        fitted,
        "",
        f"Accuracy on {summary.problems:,} held-out problems, greedy:",
        "",
        *wording.table(("model", "step", "accuracy", "std. error"), rows, "lrrr"),
        "",
        *_verdicts(summary),
    ]
    if summary.directory is not None:
        lines += ["", f"checkpoints, store and models are in {summary.directory}"]
    return lines


def _verdicts(summary: DemoSummary) -> list[str]:
    """Say of each prediction whether it beats the last checkpoint it was made from."""
    lines = ["On the same problems, against the last observed checkpoint:"]
    for row in summary.rows:
        if row.kind != "extrapolated":
            continue
        truth = next(r for r in summary.rows if r.kind == "true" and r.step == row.step)
        lines.append(
            f"step {row.step}: {_points(row)}, {_verdict(row)}; "
            f"the true checkpoint {_points(truth)}"
        )
    return lines


def _points(row: DemoRow) -> str:
    return f"{100 * row.gain:+.1f} +/- {100 * row.gain_error:.1f} points"


def _verdict(row: DemoRow) -> str:
    if abs(row.gain) <= 2 * row.gain_error:
        return "no clear difference"
    return "better" if row.gain > 0 else "worse"
