"""The table of formats, and what says the same of it elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from relex_stream.cli.build_store import command
from relex_stream.sources.families import FAMILIES, RUN_DIRECTORIES
from relex_stream.sources.formats import FORMATS

ROOT = Path(__file__).parents[2]
TRAINERS = (ROOT / "docs/trainers.md").read_text()


def test_the_command_knows_all_formats():
    (option,) = (param for param in command.params if param.name == "source")
    assert list(option.type.choices) == ["auto", *(format_.name for format_ in FORMATS)]


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_documented(format_):
    row = next(line for line in TRAINERS.splitlines() if line.startswith(f"| `{format_.name}` |"))
    for place in format_.places:
        if place != ".":
            assert f"`{place}`" in row, f"{place} is not in the row of {format_.name}"


def test_families_are_documented():
    for family in FAMILIES:
        assert f"`{family.shown}`" in TRAINERS
    for name in RUN_DIRECTORIES[1:]:
        assert f"`{name}`" in TRAINERS


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_nothing_is_held_where_nothing_is(tmp_path, format_):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert not format_.holds(path)
