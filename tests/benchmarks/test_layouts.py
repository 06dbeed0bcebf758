"""The `layouts` benchmark at tiny size, and what its writers write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks import layouts
from benchmarks.__main__ import cli
from benchmarks.trajectory import PRESETS


@pytest.mark.usefixtures("in_process")
def test_layouts_are_measured_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "RANKS", 2)
    chosen = (layouts.LAYOUTS[0], replace(layouts.LAYOUTS[2], builds=((), ("--as", "bf16"))))
    monkeypatch.setattr(layouts, "LAYOUTS", chosen)
    words = ["layouts", "--preset", "tiny", "--steps", "2", "--runs", "1"]
    words += ["--directory", str(tmp_path / "work"), "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["program"] for row in rows] == [
        *("only read", "build-store"),
        *("only read", "build-store", "build-store --as bf16"),
    ]
    whole, shards, cast = (row for row in rows if "store_bytes" in row)
    weights = 2 * PRESETS["tiny"].weights  # of two steps
    assert 2 * weights < whole["checkpoints_bytes"] < 2.2 * weights
    assert 4 * weights < shards["checkpoints_bytes"] < 4.4 * weights
    # The same bits, so the same store but for files that are kept.
    assert abs(cast["store_bytes"] - whole["store_bytes"]) < 5000
    assert shards["store_bytes"] > 10 * cast["store_bytes"]
    assert not list((tmp_path / "work").iterdir())
