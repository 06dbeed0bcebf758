"""A run whose checkpoints never lie on the disk together: each is appended, then deleted.

What a long training run does with a disk of its own size, at the size of a real model. A
checkpoint is generated (not timed), taken out of the page cache, appended by a whole process and
deleted when that is committed; at the end the store extrapolates. So an 8B model of 16.4 GB a step
needs the room of its base, one checkpoint and one output.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from benchmarks.commands import ModelSize, document, remove, run, work_directory
from benchmarks.processes import BenchmarkError, Measurement, directory_bytes, evict
from benchmarks.report import Report, output_options, publish
from benchmarks.trajectory import Preset, write_base, write_step


@click.command("append")
@click.option("--preset", type=ModelSize(), default="qwen3-8b", help="Model, or number of weights.")
@click.option("--steps", type=click.IntRange(min=2), default=6, help="Checkpoints.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work; a directory in it is made and deleted.  [default: the temporary one]",
)
@click.option("--verify/--no-verify", default=True, help="Verify the store at the end.")
@output_options
def command(
    preset: Preset,
    *,
    steps: int,
    directory: Path | None,
    verify: bool,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Append generated checkpoints one by one, each deleted after its commit, then extrapolate."""
    report = Report(
        f"{preset.name}: checkpoints appended one by one",
        "append",
        {"preset": preset.name, "weights": preset.weights, "steps": steps, "cold": True},
    )
    with work_directory(directory) as work:
        model_bytes = 2 * preset.weights
        # Base, one checkpoint or one output, and what the store takes: little beside them.
        needed = int(2.2 * model_bytes)
        free = shutil.disk_usage(work).free
        if free < needed:
            raise BenchmarkError(
                f"{needed / 1e9:.0f} GB of free disk are needed, {free / 1e9:.0f} GB are there"
            )
        base, store = write_base(work, preset), work / "store"
        click.echo(f"base written: {directory_bytes(base) / 1e9:.2f} GB", err=True)
        for step in range(1, steps + 1):
            checkpoint = write_step(work, preset, step)
            evict([base, checkpoint])
            measured = run(f"append step {step}", "build-store", base, work / "checkpoints", store)
            _add(report, measured, directory_bytes(checkpoint), directory_bytes(store))
            shutil.rmtree(checkpoint)
        evict([base])
        out = work / "extrapolated"
        jobs: list[tuple[Any, ...]] = [
            ("extrapolate", store, out, "--target-step", 2 * steps),
            ("export", store, work / "exported", "--step", steps),
        ]
        if verify:
            jobs.append(("verify", store))
        for name, *arguments in jobs:
            measured = run(str(name), name, *arguments)
            _add(report, measured, directory_bytes(base), directory_bytes(store))
            remove(out)
            remove(work / "exported")
    publish(report, json_path=json_path, markdown=markdown)


def _add(report: Report, measured: Measurement, read_bytes: int, store_bytes: int) -> None:
    summary = document(measured)
    row: dict[str, Any] = {
        "job": measured.name,
        "wall_s": measured.wall_s,
        "cpu_s": measured.user_s + measured.system_s,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "model_bytes": read_bytes,
        "store_bytes": store_bytes,
    }
    if "bits_per_changed_weight" in summary:
        row["changed_weights"] = summary["changed_weights"]
        row["bits_per_changed_weight"] = summary["bits_per_changed_weight"]
    report.add(row)
    click.echo(
        f"{measured.name}: {measured.wall_s:.1f} s, "
        f"{measured.peak_rss_bytes / 2**20:.0f} MiB, store {store_bytes / 1e6:.0f} MB",
        err=True,
    )
