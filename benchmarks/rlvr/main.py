"""The ``rlvr`` command: its options."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.rlvr.runs import RUNS


@click.command("rlvr", context_settings={"show_default": True})
@click.argument("name", type=click.Choice(list(RUNS)))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--keep-checkpoints", is_flag=True, help="Leave base and checkpoints too.")
@click.option("--log-every", type=click.IntRange(min=1), default=5, help="Steps per line.")
def command(*, name: str, out_dir: Path, keep_checkpoints: bool, log_every: int) -> None:
    """Make the run NAME: OUT_DIR/store and OUT_DIR/trajectory.json. OUT_DIR must not exist."""
    # It imports transformers, which `--help` does without.
    from benchmarks.rlvr.recording import record_run

    if out_dir.exists():
        raise click.BadParameter(f"{out_dir} exists; name a new directory", param_hint="OUT_DIR")
    record = record_run(out_dir, RUNS[name], log_every=log_every, keep_checkpoints=keep_checkpoints)
    click.echo(json.dumps(record["held_out_accuracy"], indent=2))
