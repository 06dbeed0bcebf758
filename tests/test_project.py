"""Files around the package agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import relex_stream

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_every_dependency_is_constrained() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    pinned = {requirement_name(line) for line in pins}
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    assert {requirement_name(line) for line in wanted} <= pinned
    # A local version such as +cpu exists on no public index.
    assert not [line for line in pins if "+" in line]


@pytest.mark.parametrize("marker", ["demo-command", "test-command"])
def test_the_readme_has_each_command_on_one_line(marker: str) -> None:
    blocks = re.findall(
        rf"^<!-- {marker} -->\n```sh\n(.*?)^```$",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert len(blocks) == 1
    assert blocks[0].count("\n") == 1


def test_the_version_is_the_same_everywhere() -> None:
    version = relex_stream.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_are_listed_once_and_sorted() -> None:
    assert list(relex_stream.__all__) == sorted(set(relex_stream.__all__))
    assert set(relex_stream.__all__) <= set(dir(relex_stream))
    assert relex_stream.StoreError is relex_stream.errors.StoreError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = relex_stream.nothing
