"""The examples on the commands' pages do what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.reference import EXAMPLES
from tests.test_docs import ROOT
from tests.worked import run_document

# The demonstration's own test runs it.
RUN = sorted(path for path in EXAMPLES.glob("*.md") if path.stem != "demo")


@pytest.mark.parametrize("example", RUN, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "relex_stream").symlink_to(ROOT / "relex_stream")
    monkeypatch.chdir(tmp_path)
    assert not run_document(example.read_text(), tmp_path)
