"""What stands between two runs of a benchmark."""

from __future__ import annotations

import pytest

from benchmarks import commands
from benchmarks.commands import set_aside


def test_earlier_outputs_are_out_of_the_way_but_not_deleted(tmp_path):
    out = tmp_path / "out"
    for content in ("one", "two"):
        out.mkdir()
        (out / "file").write_text(content)
        set_aside(out)
        assert not out.exists()
    set_aside(out)  # nothing there
    assert sorted(path.read_text() for path in tmp_path.rglob("file")) == ["one", "two"]


def test_large_ones_are_deleted(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands, "_MOST_SET_ASIDE_BYTES", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("one")
    set_aside(tmp_path / "out")
    assert not any(tmp_path.iterdir())
