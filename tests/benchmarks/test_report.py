"""Reports: units in the table, nothing that names the machine, and the command line's frame."""

from __future__ import annotations

import doctest
import getpass
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import COMMANDS, cli
from benchmarks.processes import Measurement
from benchmarks.report import Report, machine, median, process_row, publish, spread


@pytest.fixture
def report() -> Report:
    report = Report("Two programs", "peers", {"preset": "tiny", "out": Path("/some/where/run")})
    report.add({"program": "one", "wall_s": 1.2345, "peak_rss_bytes": 300 * 2**20, "runs": 5})
    report.add({"program": "two|three", "wall_s": 0.01234, "changed_share": 0.005, "warm": True})
    report.add({"program": "four", "weights": 8_190_735_360, "samples": [[0.0, 1]]})
    report.note("Run as /usr/local/bin/program --out=/some/where/run at 1.5 GB/s.")
    return report


def test_markdown_shows_units_and_leaves_out_series(report):
    assert report.markdown() == (
        "| program | wall, s | peak rss, MiB | runs | changed, % | warm | weights |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| one | 1.23 | 300 | 5 |  |  |  |\n"
        "| two\\|three | 0.0123 |  |  | 0.500 | yes |  |\n"
        "| four |  |  |  |  |  | 8,190,735,360 |\n"
        "\nRun as program --out=run at 1.5 GB/s.\n"
    )


def test_the_table_shows_the_same(report):
    table = report.table()
    assert table.row_count == 3
    assert [column.header for column in table.columns][:2] == ["program", "wall, s"]


def test_a_file_comes_back_as_it_was(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    report.write(path)
    again = Report.read(path)
    assert again.as_json() == report.as_json() == json.loads(path.read_text())
    assert again.settings == {"preset": "tiny", "out": "run"}
    assert again.rows[2]["samples"] == [[0.0, 1]]


def test_numpy_numbers_become_plain(tmp_path):
    report = Report("Numbers", "codec", {})
    report.add({"bits": np.float32(1.5), "count": np.int64(7), "series": (np.float64(2.0),)})
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == [
        {"bits": 1.5, "count": 7, "series": [2.0]}
    ]


def test_the_machine_is_described_and_not_named(tmp_path):
    described = machine(tmp_path / "not" / "there" / "yet")
    text = json.dumps(described)
    assert described["memory_bytes"] > 2**28
    assert described["cores"] >= 1
    assert described["file_system_free_bytes"] > 0
    assert {"relex-stream", "numpy", "zarr"} <= described["versions"].keys()
    for secret in (socket.gethostname(), str(tmp_path), os.path.expanduser("~"), os.getcwd()):
        assert secret not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_middle_and_spread():
    assert median([3, 1, 2]) == 2
    assert spread([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)


def test_a_row_of_runs():
    def run(wall_s: float, peak: int) -> Measurement:
        return Measurement("p", ("p",), 0, wall_s, 2 * wall_s, 0.5, peak, (), "", "")

    assert process_row([run(1.0, 10), run(3.0, 30), run(2.0, 20)]) == {
        "wall_s": 2.0,
        "wall_min_s": 1.0,
        "wall_max_s": 3.0,
        "cpu_s": 4.5,
        "peak_rss_bytes": 30,
        "runs": 3,
    }


@pytest.mark.parametrize("markdown", [True, False])
def test_publishing_prints_and_writes(report, tmp_path, capsys, markdown):
    publish(report, json_path=tmp_path / "report.json", markdown=markdown)
    printed = capsys.readouterr().out
    assert "8,190,735,360" in printed
    assert "at 1.5 GB/s" in printed
    assert Report.read(tmp_path / "report.json").rows == report.rows


@pytest.mark.parametrize("module", ["report", "trajectory"])
def test_examples(module):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{module}")).failed == 0


def test_help_lists_every_command_and_imports_none():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)
    code = "import sys, benchmarks.__main__; print('numba' in sys.modules, 'zarr' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    if name == "pictures":
        pytest.importorskip("matplotlib")
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "--help" in result.output


def test_a_failed_measurement_is_one_message(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "trajectory", str(tmp_path), "--preset", "tiny"]
    (tmp_path / "something").touch()
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "is not empty and holds no trajectory" in failed.stderr
    assert "Traceback" not in failed.stderr


class TestPictures:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_of_a_store(self, tmp_path):
        from relex_stream.demo.run import TRAJECTORY

        out = tmp_path / "new" / "store.png"
        result = CliRunner().invoke(cli, ["pictures", "--store", str(TRAJECTORY), str(out)])
        assert result.exit_code == 0, result.output
        assert out.read_bytes().startswith(b"\x89PNG")

    def test_of_a_report(self, report, tmp_path, monkeypatch):
        from benchmarks import pictures

        drawn = []

        def draw(given: Report):
            drawn.append(given.rows)
            return pictures.new_figure(2)[0]

        monkeypatch.setitem(pictures.DRAWINGS, "peers", draw)
        report.write(tmp_path / "report.json")
        arguments = ["pictures", str(tmp_path / "report.json"), str(tmp_path / "report.png")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert drawn == [report.rows]
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_of_something_else(self, tmp_path):
        from benchmarks.pictures import draw_report
        from benchmarks.processes import BenchmarkError

        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(BenchmarkError, match="not a report that a benchmark wrote"):
            draw_report(tmp_path / "other.json")

    def test_of_a_report_without_a_drawing(self, tmp_path):
        from benchmarks.pictures import draw_report
        from benchmarks.processes import BenchmarkError

        Report("Unknown", "none-such", {}).write(tmp_path / "report.json")
        with pytest.raises(BenchmarkError, match="a report of `none-such`"):
            draw_report(tmp_path / "report.json")
