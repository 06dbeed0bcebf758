"""The command line reference is complete and current."""

from __future__ import annotations

import click
import pytest

from relex_stream.cli.main import COMMANDS, cli
from tests.cli.reference import DOCUMENT, render


def test_the_generated_part_is_current() -> None:
    document = DOCUMENT.read_text()
    assert document == render(document), "run: python -m tests.cli.reference"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_mentioned(name: str) -> None:
    document = DOCUMENT.read_text()
    assert f"## {name}\n" in document
    section = document.partition(f"## {name}\n")[2].partition("\n## ")[0]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        for option in parameter.opts:
            assert (option.upper() if isinstance(parameter, click.Argument) else option) in section


def test_the_manual_part_mentions_the_exit_statuses() -> None:
    document = DOCUMENT.read_text()
    for status in (0, 1, 2, 130):
        assert f"| {status} |" in document
