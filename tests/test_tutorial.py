"""The tutorial's commands run in order, and print what it says, but for the rewards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT
from tests.worked import run_document

TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, evaluations = re.subn(
        r"(python evaluate\.py [\w-]+) 2000 ", r"\1 20 ", TUTORIAL.read_text()
    )
    assert evaluations >= 2
    monkeypatch.chdir(tmp_path)
    assert not run_document(text, tmp_path)
    assert len(list((tmp_path / "candidates").rglob("model.safetensors"))) == 12
