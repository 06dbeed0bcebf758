"""The same run in the layouts of trainers: what their checkpoints take on the disk, and a store.

The checkpoints are written by torch itself, by one process per rank (not timed). Each round takes
them out of the page cache and builds a whole store by a whole process, beside a program that only
reads the same files. One layout is on the disk at a time.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.commands import ModelSize, document, program, remove, work_directory
from benchmarks.layout_writers import FORMATS
from benchmarks.processes import BenchmarkError, Program, alternate, measure
from benchmarks.report import Report, output_options, process_row, publish
from benchmarks.trajectory import Preset, write_base, write_steps

RANKS = 4

_READ = Path(__file__).parent / "peer_programs" / "read_write.py"


@dataclass(frozen=True)
class Layout:
    """What a trainer writes, and with which options it goes into a store.

    Attributes
    ----------
    name : str
    format_name : str
        Of `layout_writers`; ``whole`` for a Hugging Face model, as the trajectory itself has it.
    dtype : str
        ``bf16`` or ``fp32``: that of the weights in the files.
    builds : tuple of tuple of str
        Options of build-store, one store each.
    """

    name: str
    format_name: str
    dtype: str
    builds: tuple[tuple[str, ...], ...] = ((),)


LAYOUTS = (
    Layout("Hugging Face model", "whole", "bf16"),
    Layout("split safetensors", "split", "bf16"),
    Layout("verl FSDP shards", "verl", "fp32", ((), ("--as", "bf16"))),
    Layout("PyTorch DCP", "dcp", "fp32", ((), ("--as", "bf16"))),
)


@click.command("layouts")
@click.option("--preset", type=ModelSize(), default="qwen2.5-0.5b", help="Model, or weights.")
@click.option("--steps", type=click.IntRange(min=1), default=4, help="Checkpoints.")
@click.option("--runs", type=click.IntRange(min=1), default=3, help="Measured runs of each.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work; a directory in it is made and deleted.  [default: the temporary one]",
)
@output_options
def command(
    preset: Preset,
    *,
    steps: int,
    runs: int,
    directory: Path | None,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Build stores of one run in the layouts of trainers, from a cold disk."""
    report = Report(
        f"{preset.name}: {steps} checkpoints as trainers write them",
        "layouts",
        {"preset": preset.name, "weights": preset.weights, "steps": steps, "ranks": RANKS}
        | {"cold": True},
    )
    with work_directory(directory) as work:
        # A run of FP32, the same in a layout, and a store of FP32.
        needed = 3 * 4 * preset.weights * steps
        free = shutil.disk_usage(work).free
        if free < needed:
            raise BenchmarkError(
                f"{needed / 1e9:.0f} GB of free disk are needed, {free / 1e9:.0f} GB are there"
            )
        base = write_base(work, preset)
        for layout in LAYOUTS:
            run = _write(layout, work, preset, steps)
            for row in _measure(layout, base, run, work, runs):
                report.add(row | {"steps": steps})
            remove(run)
    publish(report, json_path=json_path, markdown=markdown)


def _write(layout: Layout, work: Path, preset: Preset, steps: int) -> Path:
    """Return the directory of the checkpoints in a layout."""
    models = write_steps(work, preset, range(1, steps + 1), dtype=layout.dtype)
    checkpoints = models[0].parent
    if layout.format_name == "whole":
        return checkpoints
    out = work / "run"
    arguments = (layout.format_name, RANKS, out, *models)
    measure("write", (sys.executable, "-m", "benchmarks.layout_writers", *map(str, arguments)))
    remove(checkpoints)
    return out


def _measure(
    layout: Layout, base: Path, run: Path, work: Path, runs: int
) -> Sequence[dict[str, Any]]:
    files = [path for path in sorted(run.rglob("*")) if _holds_weights(path)]
    reads = [base, *files]
    named = [word for path in files for word in ("--read", str(path))]
    programs = [Program("only read", (sys.executable, str(_READ), *named, "--threads", "2"))]
    stores = []
    for number, options in enumerate(layout.builds):
        stores.append(work / f"store-{number}")
        name = " ".join(("build-store", *options))
        call = ("build-store", base, run, stores[-1], *options)
        programs.append(program(name, *call, output=stores[-1]))
    cold = [
        Program(one.name, one.argv, one.prepare, reads, one.cwd, one.env, one.timeout_s)
        for one in programs
    ]
    measured = alternate(cold, runs=runs, warmup=0, cold=True)
    bytes_in = sum(path.stat().st_size for path in files)
    rows = []
    for name, measurements in measured.items():
        row: dict[str, Any] = {
            "layout": layout.name,
            "weights": layout.dtype,
            "program": name,
            "checkpoints_bytes": bytes_in,
        }
        if name != "only read":
            row["store_bytes"] = document(measurements[-1])["store_bytes"]
        rows.append(row | process_row(measurements))
        click.echo(f"{layout.name}, {name}: {rows[-1]['wall_s']:.1f} s", err=True)
    for store in stores:
        remove(store)
    return rows


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt", ".distcp")


assert {layout.format_name for layout in LAYOUTS} == {*FORMATS, "whole"}
