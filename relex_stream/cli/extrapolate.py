"""``relex-stream extrapolate``: predict the weights of later steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relex_stream.cli import options, report
from relex_stream.cli.plan import describe_plan
from relex_stream.cli.session import Session

if TYPE_CHECKING:
    from relex_stream.summaries import ExtrapolateSummary


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
    help="The step to predict. Give it several times for several models from the same passes, "
    "each in its own directory OUT/step_N.",
)
@click.option(
    "--history-steps",
    type=click.IntRange(min=1),
    metavar="K",
    help="Use the stored steps up to step K only.  [default: all]",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="R",
    help="Rank of the subspace of each tensor's weight deltas.",
)
@click.option(
    "--svd",
    type=click.Choice(["randomized", "exact"]),
    default="randomized",
    show_default=True,
    help="How the subspace is found: from the stored sketches, or from full Gram matrices.",
)
@click.option(
    "--power-iterations",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="Q",
    help="Passes over the store that refine the randomized subspace. One is within 1e-4 of the "
    "exact rank-1 result; take 2 or 3 for higher ranks.",
)
@click.option(
    "--fit",
    type=click.Choice(["linear"]),
    default="linear",
    show_default=True,
    help="How coefficients are carried on to the target step.",
)
@options.base
@options.memory_limit
@options.workers
@options.devices
@options.device_memory_limit
@options.overwrite
@click.option("--dry-run", is_flag=True, help="Print the plan and its memory; write nothing.")
@options.cluster
@options.common
@click.pass_obj
def command(
    session: Session,
    store: Path,
    out: Path,
    *,
    target_steps: tuple[int, ...],
    history_steps: int | None,
    rank: int,
    svd: str,
    power_iterations: int,
    fit: str,
    base: Path | None,
    memory_limit: int | None,
    workers: int | None,
    overwrite: bool,
    dry_run: bool,
    scheduler: str | None,
    local_cluster: int | None,
    devices: str,
    device_memory_limit: int | None,
) -> None:
    """Predict the weights at later steps from the steps in STORE, and write them to OUT.

    The method is RELEX: per tensor, the rank-1 subspace of the weight deltas and a line through
    its coefficients. The output is a directory that transformers and vLLM load.
    """
    from relex_stream.api import extrapolate

    with session.progress() as progress:
        summary = extrapolate(
            store,
            out,
            target_steps=target_steps,
            history_steps=history_steps,
            rank=rank,
            svd=svd,
            power_iterations=power_iterations,
            fit=fit,
            base=base,
            memory_limit=memory_limit,
            workers=workers,
            overwrite=overwrite,
            dry_run=dry_run,
            scheduler=scheduler,
            local_cluster=local_cluster,
            devices=devices,
            device_memory_limit=device_memory_limit,
            progress=progress,
        )
    session.finish(summary, describe(summary, verbose=session.verbose), essential=dry_run)


def describe(summary: ExtrapolateSummary, *, verbose: bool) -> list[str]:
    """Return the plan of a dry run, or the closing summary."""
    rows = {"store": summary.store}
    for output in summary.outputs:
        inside = " (inside the history)" if output.inside_history else ""
        rows[f"step {output.target_step}"] = f"{output.path}{inside}"
    method = f"rank {summary.rank}, {summary.svd} SVD, {summary.fit} fit"
    if summary.svd == "randomized":
        passes = report.format_count(summary.power_iterations, "power iteration")
        method = f"rank {summary.rank}, {summary.svd} SVD with {passes}, {summary.fit} fit"
    rows["history"] = report.format_steps(summary.history, full=verbose)
    rows["method"] = method
    if summary.dry_run:
        plan = describe_plan(summary.plan)
        return ["dry run: nothing was written", "", *report.pairs(rows), "", *plan]

    rows["tensors"] = f"{summary.tensors:,}, of which {summary.unchanged_tensors:,} never changed"
    rows["explained variance"] = f"{report.format_share(summary.median_explained_variance)}, median"
    rows["R2 of the fit"] = f"{report.format_figure(summary.median_r2)}, median"
    rows["read"] = report.format_bytes(summary.bytes_read)
    rows["written"] = report.format_bytes(summary.bytes_written)
    if summary.plan.devices is not None:
        rows["devices"] = ", ".join(summary.plan.devices.names)
    rows["peak memory"] = report.format_bytes(summary.peak_memory_bytes)
    rows["elapsed"] = report.format_duration(summary.elapsed_s)
    lines = report.pairs(rows)
    if verbose:
        lines += ["", *describe_plan(summary.plan), "", *_figures(summary)]
    return lines


def _figures(summary: ExtrapolateSummary) -> list[str]:
    return report.table(
        ("tensor", "singular values", "explained variance", "R2"),
        [
            (
                tensor.name,
                " ".join(f"{value:.3g}" for value in tensor.singular_values[: summary.rank]),
                report.format_share(tensor.explained_variance),
                " ".join(report.format_figure(value) for value in tensor.r2),
            )
            for tensor in summary.figures
        ],
        "lrrr",
    )
