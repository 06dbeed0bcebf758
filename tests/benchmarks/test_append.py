"""The `append` benchmark at tiny size."""

from __future__ import annotations

import json
import shutil

from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.trajectory import PRESETS


def test_checkpoints_come_and_go_one_by_one(in_process, tmp_path):
    words = ["append", "--preset", "tiny", "--steps", "3", "--directory", str(tmp_path / "work")]
    words += ["--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    jobs = [row["job"] for row in report["rows"]]
    assert jobs == [*(f"append step {n}" for n in (1, 2, 3)), "extrapolate", "export", "verify"]
    assert not list((tmp_path / "work").iterdir())
    appends = report["rows"][:3]
    sizes = [row["store_bytes"] for row in appends]
    assert sizes == sorted(sizes)
    for row in appends:
        assert 0.003 < row["changed_weights"] / PRESETS["tiny"].weights < 0.007
        assert row["model_bytes"] > 2 * PRESETS["tiny"].weights
    # Every append saw one checkpoint and no more.
    for called in in_process[:3]:
        assert called[0] == "build-store"


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("benchmarks.append.shutil.disk_usage", lambda _: usage)
    words = ["append", "--preset", "tiny", "--directory", str(tmp_path)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code != 0
    assert "free disk are needed" in str(result.exception)
    assert not list(tmp_path.iterdir())
