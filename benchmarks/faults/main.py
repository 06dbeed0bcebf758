"""The ``faults`` command: what docs/reliability.md tells, counted anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.commands import work_directory
from benchmarks.faults.damage import KINDS, OUTCOMES, count_outcomes
from benchmarks.faults.formats import FORMATS, kept
from benchmarks.report import Report, output_options, publish
from tests.make_checkpoints import make_trajectory

TENSORS = {
    "embed.weight": (128, 64),
    "mlp.weight": (200, 256),
    "bias": (4099,),
    "norm.weight": (64,),
}


@click.group("faults")
def command() -> None:
    """Break things on purpose and count what was lost."""


@command.command("formats")
@click.option("--times", type=click.IntRange(min=1), default=1000, help="Of each kind of damage.")
@click.option(
    "--format",
    "names",
    type=click.Choice(list(FORMATS)),
    multiple=True,
    help="Only this one; repeatable.",
)
@click.option("--seed", type=int, default=0)
@click.option("--steps", type=click.IntRange(min=1), default=5, help="Checkpoints.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work; a directory in it is made and deleted.  [default: the temporary one]",
)
@output_options
def formats(
    *,
    times: int,
    names: Sequence[str],
    seed: int,
    steps: int,
    directory: Path | None,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Damage the same run in a relex-stream store and in other formats; read it all back."""
    report = Report(
        "A file damaged, everything read", "faults formats", {"times": times, "seed": seed}
    )
    with work_directory(directory) as work:
        run = make_trajectory(work / "run", seed=seed, steps=range(1, steps + 1), tensors=TENSORS)
        expected = kept(run)
        for index, name in enumerate(names or FORMATS):
            place = work / f"format-{index}"
            FORMATS[name].write(run, place)
            for kind in KINDS:
                counted = count_outcomes(
                    FORMATS[name], place, expected, kind=kind, times=times, seed=seed
                )
                report.add(
                    {"format": name, "damage": kind, "times": counted.total()}
                    | {outcome: counted[outcome] for outcome in OUTCOMES}
                )
                click.echo(f"{name}, {kind}: {dict(counted)}", err=True)
    publish(report, json_path=json_path, markdown=markdown)
