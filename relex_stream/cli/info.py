"""``relex-stream info``: show what a store holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from relex_stream import wording
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.locations import Location

if TYPE_CHECKING:
    from relex_stream.summaries import StepInfo, StoreInfo

MOST_STEPS = 20
"""Rows of the table of steps without ``--verbose``: half from either end."""


@click.command("info")
@options.store_argument
@options.common
@click.pass_obj
def command(session: Session, store: Location) -> None:
    """Show the steps, tensors and sizes of STORE. Reads its records, not its weights."""
    from relex_stream.api import info

    summary = info(store)
    session.finish(summary, describe(summary, verbose=session.verbose), essential=True)


def describe(summary: StoreInfo, *, verbose: bool) -> list[str]:
    """Return the named values of a store and the table of its steps."""
    dtypes = [
        f"{code}: {wording.format_count(tensors, 'tensor')}, {weights:,} weights"
        for code, (tensors, weights) in summary.dtypes.items()
    ]
    included = "in the store" if summary.base_included else "not in the store"
    rows = {
        "store": summary.store,
        "format version": str(summary.format_version),
        "steps": wording.format_steps([step.step for step in summary.steps]),
        "tensors": f"{summary.tensors:,}, of which {summary.constant_tensors:,} are constant",
        "weights": f"{summary.weights:,}",
        "dtypes": "; ".join(dtypes) or "none",
        "base": f"{summary.base} ({included})",
        "sketch seed": str(summary.seed),
        "checkpoints": wording.format_bytes(summary.bytes_in),
        "store on disk": wording.format_bytes(summary.store_bytes),
    }
    if summary.base_bytes_stored:
        rows["base weights"] = wording.format_bytes(summary.base_bytes_stored)
    rows["ratio"] = wording.format_ratio(summary.ratio)
    rows["bits per changed weight"] = wording.format_figure(summary.bits_per_changed_weight, 2)
    lines = wording.pairs(rows)
    if summary.steps:
        lines += ["", *_step_table(summary.steps, full=verbose)]
    return lines


def _step_table(steps: tuple[StepInfo, ...], *, full: bool) -> list[str]:
    """Return a row per step, the middle left out of a long trajectory."""
    rows = [
        (
            str(step.step),
            f"{step.changed_weights:,}",
            wording.format_share(step.changed_share),
            wording.format_bytes(step.frame_bytes),
            wording.format_bytes(step.record_bytes),
            wording.format_bytes(step.source_bytes),
        )
        for step in steps
    ]
    lines = wording.table(
        ("step", "changed weights", "share", "deltas", "record", "checkpoint"), rows, "rrrrrr"
    )
    left_out = len(rows) - MOST_STEPS
    if full or left_out <= 1:
        return lines
    half = MOST_STEPS // 2
    note = f"  ... {left_out:,} more (--verbose lists all)"
    return [*lines[: 2 + half], note, *lines[-half:]]
