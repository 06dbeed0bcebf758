"""The `rlvr` command."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.rlvr import main


def test_the_command_makes_the_run_of_that_name(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(main.RUNS, "product", tiny)
    words = ["rlvr", "product", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"store", "trajectory.json"}
    record = json.loads((tmp_path / "out" / "trajectory.json").read_text())
    assert record["settings"]["seed"] == tiny.seed
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 2
    assert "exists; name a new directory" in again.stderr
    wrong = CliRunner().invoke(cli, ["rlvr", "nothing", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "addition-seed1" in wrong.stderr


def test_help_loads_no_transformers():
    code = "import sys, benchmarks.rlvr; print('transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
