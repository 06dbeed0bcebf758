"""The command line reference is complete and current."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from relex_stream.cli.main import COMMANDS, cli
from tests.cli.reference import EXAMPLES, INDEX, PAGES, index, page

OUTDATED = "run: python -m tests.cli.reference"


def test_the_index_is_current() -> None:
    document = INDEX.read_text()
    assert document == index(document), OUTDATED


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_is_current(name: str) -> None:
    assert (PAGES / f"{name}.md").read_text() == page(name), OUTDATED


@pytest.mark.parametrize("directory", [PAGES, EXAMPLES], ids=["pages", "examples"])
def test_every_command_has_a_file_and_none_is_left_over(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(f"{n}.md" for n in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_mentioned(name: str) -> None:
    assert f"[{name}](commands/{name}.md)" in INDEX.read_text()
    document = (PAGES / f"{name}.md").read_text()
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        for option in parameter.opts:
            assert (option.upper() if isinstance(parameter, click.Argument) else option) in document


@pytest.mark.parametrize("name", COMMANDS)
def test_no_fact_of_the_help_is_lost(name: str) -> None:
    """Every word that the command prints for help is on its page."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    with command.make_context(name, [], resilient_parsing=True) as context:
        words = set(command.get_help(context).replace("[", " ").replace("]", " ").split())
    words -= {"Usage:", "Options:", "default:", "required"}
    document = (PAGES / f"{name}.md").read_text().replace("\\", "")
    lost = {w for w in words if w.strip("(),;:.") not in document and not w.startswith("x>=")}
    assert not lost


def test_the_manual_part_mentions_the_exit_statuses() -> None:
    document = INDEX.read_text()
    for status in (0, 1, 2, 130):
        assert f"| {status} |" in document
