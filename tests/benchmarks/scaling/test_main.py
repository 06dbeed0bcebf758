"""The `scaling` benchmark: all of it runs on a tiny model."""

from __future__ import annotations

import json
import math

from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.trajectory import PRESETS
from relex_stream import planner


def test_the_command_counts_runs_and_projects(tmp_path):
    path = tmp_path / "scaling.json"
    words = ["scaling", "--quick", "--directory", tmp_path / "work", "--json", path]
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "work").iterdir())
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        *("graphs", "client", "no work", "paced", "sizes", "memory", "projection"),
    ]
    (client,) = (row for row in rows if row["part"] == "client")
    assert client["weights"] == sum(map(math.prod, PRESETS["tiny"].shapes.values()))
    for row in rows:
        if row["part"] in ("no work", "paced"):
            assert 0 < row["at work"] <= row["tasks"]
            assert row["wall_s"] > 0
        if row["part"] == "memory":
            limits = row["one thread_bytes"], row["all threads_bytes"]
            assert 0 < limits[0] <= limits[1]
            assert (row["threads of 768 MiB"] > 0) == (limits[0] <= planner.DEFAULT_LIMIT_BYTES)
    assert "A task costs the scheduler" in result.output
