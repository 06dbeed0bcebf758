"""``relex-stream demo``: the main job on a real trajectory, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relex_stream.cli import options, report
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
            report.format_share(row.accuracy),
            f"+/- {report.format_share(row.standard_error)}",
        )
        for row in summary.rows
    ]
    stored = (
        f"The first {summary.history_steps} checkpoints of the run, "
        f"{report.format_bytes(build.bytes_in)}, are {report.format_bytes(build.bytes_stored)} in "
        f"the store ({report.format_ratio(build.ratio)} smaller)."
    )
    fitted = (
        f"Rank 1 explains {report.format_share(summary.median_explained_variance)} of the weight "
        f"change, R2 of the line {report.format_figure(summary.median_r2)} (medians over tensors)."
    )
    lines = [
        stored,
        fitted,
        "",
        f"Accuracy on {summary.problems:,} held-out problems, greedy:",
        "",
        *report.table(("model", "step", "accuracy", "std. error"), rows, "lrrr"),
        "",
        *_verdicts(summary),
    ]
    if summary.directory is not None:
        lines += ["", f"checkpoints, store and models are in {summary.directory}"]
    return lines


def _verdicts(summary: DemoSummary) -> list[str]:
    """Say of each prediction whether it beat the last checkpoint it was made from."""
    last = next(row for row in summary.rows if row.kind == "last observed")
    return [
        f"step {row.step}: {_verdict(row, last)}"
        for row in summary.rows
        if row.kind == "extrapolated"
    ]


def _verdict(row: DemoRow, last: DemoRow) -> str:
    gain = row.accuracy - last.accuracy
    noise = (row.standard_error**2 + last.standard_error**2) ** 0.5
    points = f"{abs(100 * gain):.1f} points"
    if abs(gain) <= 2 * noise:
        return f"no clear difference from the last observed checkpoint ({100 * gain:+.1f} points)"
    if gain > 0:
        return f"better than the last observed checkpoint by {points}"
    return f"worse than the last observed checkpoint by {points}"
