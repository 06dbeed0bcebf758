"""The page on the Hub is true, of a Hub that holds what it tells of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.server import FakeHub, content_of
from tests.make_checkpoints import Trajectory
from tests.test_docs import ROOT
from tests.worked import run_document


def test_the_page_on_the_hub(
    published: FakeHub, run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.add("org/base").commit(content_of(run.base), branch="main")
    other = published.add("org/other")
    for step in run.steps[:2]:
        other.commit(content_of(run.directories[step]), branch=f"stage1-step{step}-tokens5B")
    monkeypatch.chdir(tmp_path)
    assert not run_document((ROOT / "docs" / "hub.md").read_text(), tmp_path)
    stores = ["other.store", "run.store", "run2.store"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hf",
        *stores[:1],
        *stores[1:],
        "scratch",
    ]
