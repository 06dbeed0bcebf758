"""What one run of the command line shares: verbosity, JSON output, and the warnings shown."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from relex_stream.errors import RelexStreamWarning
from relex_stream.wording import printable, to_json

if TYPE_CHECKING:
    from relex_stream.cli.progress import ClosableProgress


@dataclass
class Session:
    """State of one run; the shared options fill it in, the command prints through it.

    In JSON mode stdout carries exactly one document; everything for people goes to stderr.
    """

    json: bool = False
    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def catch_warnings(self) -> Iterator[None]:
        """Show this package's warnings as ``warning: ...`` lines and keep them for JSON.

        Warnings of other packages concern developers; they are shown with ``--debug`` alone.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("always", RelexStreamWarning)
            warnings.showwarning = self._show_warning
            yield
        logging.getLogger("relex_stream").setLevel(logging.NOTSET)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, RelexStreamWarning):
            self.warnings.append(str(message))
            text = str(message)
        elif self.debug:
            text = f"{filename}:{lineno}: {category.__name__}: {message}"
        else:
            return
        # A reader of stderr that has gone away must not end hours of work.
        with contextlib.suppress(OSError):
            click.echo(f"warning: {printable(text)}", err=True)

    def progress(self) -> contextlib.closing[ClosableProgress]:
        """Return a context whose value is the `Progress` for this run; leaving it ends the bar."""
        from relex_stream.cli.progress import make_progress

        return contextlib.closing(make_progress(quiet=self.quiet))

    def finish(self, summary: Any, lines: Iterable[str], *, essential: bool = False) -> None:
        """Print a command's result: one JSON document, or lines for people.

        Parameters
        ----------
        summary : dataclass instance
            What the library returned.
        lines : iterable of str
            The same for people.
        essential : bool
            Whether the lines are what was asked for, so that ``--quiet`` keeps them.
        """
        if self.json:
            click.echo(to_json(summary, warnings=self.warnings))
        elif essential or not self.quiet:
            for line in lines:
                click.echo(line)

    def fail(self, kind: str, message: str) -> None:
        """Show an error as one line on stderr, and as the JSON document where one is due."""
        text = printable(" ".join(message.split()))
        with contextlib.suppress(OSError):
            click.echo(f"error: {text}" if kind != "Interrupted" else text, err=True)
        if self.json:
            click.echo(to_json(error={"type": kind, "message": message}, warnings=self.warnings))
