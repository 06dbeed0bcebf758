"""The entry point: a lazy table of commands; here errors become one line and an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from relex_stream._version import __version__
from relex_stream.cli import options
from relex_stream.cli.session import Session
from relex_stream.errors import RelexStreamError

EXIT_INTERNAL = 1
"""An exception nobody foresaw; also what ``verify`` returns when it finds problems."""

EXIT_ERROR = 2
"""Something the user can put right: arguments, files, memory."""

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


@dataclass(frozen=True)
class Entry:
    """A row of the command table: ``module:attribute`` of the command, and its line in the help."""

    target: str
    short_help: str


COMMANDS = {
    "build-store": Entry(
        "relex_stream.cli.build_store:command",
        "Compress a base model and its checkpoints, or append to a store.",
    ),
    "watch": Entry(
        "relex_stream.cli.watch:command",
        "Append checkpoints as a run writes them, and free their space.",
    ),
    "analyze": Entry(
        "relex_stream.cli.analyze:command",
        "Say how low-rank and how straight a stored trajectory is.",
    ),
    "backtest": Entry(
        "relex_stream.cli.backtest:command",
        "Say what earlier forecasts of stored steps would have been worth.",
    ),
    "report": Entry(
        "relex_stream.cli.report:command",
        "Write a page with charts of what a store knows.",
    ),
    "extrapolate": Entry(
        "relex_stream.cli.extrapolate:command",
        "Predict the weights of later steps.",
    ),
    "reconstruct": Entry(
        "relex_stream.cli.reconstruct:command",
        "Project stored steps into their subspace and back.",
    ),
    "combine": Entry(
        "relex_stream.cli.combine:command",
        "Write weighted sums of stored steps: ExPO, EMA, LAWA and others.",
    ),
    "sweep": Entry(
        "relex_stream.cli.sweep:command",
        "Write the models of a grid of settings, with one index.",
    ),
    "export": Entry(
        "relex_stream.cli.export:command",
        "Rebuild a stored step, byte for byte.",
    ),
    "info": Entry(
        "relex_stream.cli.info:command",
        "Show what a store holds.",
    ),
    "verify": Entry(
        "relex_stream.cli.verify:command",
        "Check every committed byte of a store.",
    ),
    "drop": Entry(
        "relex_stream.cli.drop:command",
        "Take back the last steps of a store.",
    ),
    "demo": Entry(
        "relex_stream.cli.demo:command",
        "Run the main job on a real trajectory that comes with the package.",
    ),
}


class LazyGroup(click.Group):
    """A click group that imports a command only when it is run or its own help is asked for.

    Parameters
    ----------
    table : mapping of str to Entry
        The commands, in the order of the help.
    """

    def __init__(self, *args: Any, table: Mapping[str, Entry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in table order."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or return None for a name that is not in the table."""
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        module, attribute = entry.target.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, which imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.short_help) for name, entry in self.table.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: FBT001, FBT002 - click's signature
        **extra: Any,
    ) -> Any:
        """Run the command line; in standalone mode, end the process with the exit status."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        # A parse error can come before the option's callback, so --json is looked for here too.
        session = Session(json="--json" in arguments, debug="--debug" in arguments)
        with session.catch_warnings():
            try:
                status = super().main(
                    arguments, prog_name, complete_var, standalone_mode=False, obj=session, **extra
                )
            except click.exceptions.NoArgsIsHelpError as error:
                error.show()
                status = EXIT_ERROR
            except Exception as error:  # noqa: BLE001 - the last line of defence
                status = _report(session, error)
        sys.exit(status)


def _report(session: Session, error: Exception) -> int:
    """Show `error` as one line (and one JSON document) and return the exit status."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        # click takes it for the end of what a prompt reads; there are no prompts here.
        error = error.__cause__
    kind, message, status = _explain(error)
    if session.debug and not isinstance(error, click.ClickException | click.Abort):
        traceback.print_exception(error)
    try:
        session.fail(kind, message)
    except BrokenPipeError:
        # Nobody reads any more. Python would complain once again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _explain(error: Exception) -> tuple[str, str, int]:
    """Return the error's name for JSON, its message for people and the exit status."""
    kind = type(error).__name__
    if isinstance(error, click.Abort):
        return "Interrupted", "interrupted; nothing committed is lost", EXIT_INTERRUPTED
    if isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message += f"; see '{error.ctx.command_path} --help'"
        return kind, message, error.exit_code
    if isinstance(error, RelexStreamError):
        return kind, str(error), EXIT_ERROR
    if isinstance(error, OSError) and error.strerror:
        place = f": {os.fsdecode(error.filename)}" if _is_path(error.filename) else ""
        return kind, f"{error.strerror}{place}", EXIT_ERROR
    if isinstance(error, MemoryError):
        return (
            kind,
            "out of memory; give a smaller --memory-limit or fewer --workers",
            EXIT_ERROR,
        )
    text = f"unexpected {kind}: {error}" if str(error) else f"unexpected {kind}"
    return kind, f"{text}; run again with --debug for the traceback", EXIT_INTERNAL


def _is_path(filename: object) -> bool:
    # OSError.filename may also be a file descriptor.
    return isinstance(filename, str | bytes | os.PathLike)


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="relex-stream", message="%(prog)s %(version)s")
@options.debug
def cli() -> None:
    """Keep RLVR checkpoints losslessly in a small store, and answer for any step.

    Build a store from a base model and its checkpoints, rebuild past steps byte for byte, and
    extrapolate future ones.
    """


def main() -> NoReturn:
    """Run the ``relex-stream`` command with the process's arguments."""
    cli.main(prog_name="relex-stream")
    raise AssertionError("click returned in standalone mode")
