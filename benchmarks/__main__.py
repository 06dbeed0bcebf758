"""``python -m benchmarks COMMAND``: what the published figures are measured with."""

from __future__ import annotations

import importlib
import sys

import click

from benchmarks.processes import BenchmarkError
from relex_stream.errors import RelexStreamError

COMMANDS = {
    "trajectory": "Write a synthetic trajectory of checkpoints.",
    "peers": "Time relex-stream beside other programs on the same checkpoints.",
    "compat": "Compare outputs of --compat relex with those of the authors' scripts.",
    "findings": "Measure extrapolations of the small runs by reward.",
    "ablations": "Change rank, fit, window, anchor and cut-off one by one; measure by reward.",
    "dampings": "Measure rules by which a history might choose its damping, by reward.",
    "memory": "Measure peak memory against model size, number of steps and the limit.",
    "scale": "Measure one and two workers, cost against steps and size, and project.",
    "scaling": "Count tasks and bytes of models that do not fit here; run graphs without work.",
    "answers": "Time what answers from the store alone, at the shape of a large model.",
    "append": "Append the checkpoints of a large model one by one, each deleted after its commit.",
    "layouts": "Build stores of one run in the layouts of trainers, from a cold disk.",
    "codec": "Measure bits per changed weight and speed beside other codecs.",
    "devices": "Measure extrapolation on a GPU: stages of a block, commands, the cost model.",
    "faults": "Break files, disks and processes on purpose; count what was lost.",
    "rlvr": "Train a small model by verifiable rewards; keep a checkpoint per step in a store.",
    "pictures": "Draw a report, or what a store takes.",
}
"""Each is `command` in the module or package of the same name."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"benchmarks.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"show_default": True})
def cli() -> None:
    """Generate trajectories, measure programs on them, draw what was measured."""


def main() -> None:
    """Run the command line; a failed measurement is a message, not a traceback."""
    try:
        cli(prog_name="python -m benchmarks")
    except (BenchmarkError, RelexStreamError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
