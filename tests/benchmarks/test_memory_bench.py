"""The `memory` benchmark at tiny size; the measuring of processes has tests of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks import commands, memory
from benchmarks.__main__ import cli
from benchmarks.processes import BenchmarkError
from benchmarks.trajectory import PRESETS, write_steps

MIB = 1 << 20


def run_command(*arguments: object) -> dict[str, Any]:
    """Run the benchmark and return its report."""
    path = Path(str(arguments[0])) / "report.json"
    words = ["memory", "--directory", *arguments, "--no-warm-up", "--json", path]
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    assert not list(path.parent.iterdir()), "what was generated was not deleted"
    return report


def draw(report: dict[str, Any], directory: Path) -> None:
    pytest.importorskip("matplotlib")
    (directory / "report.json").write_text(json.dumps(report))
    arguments = ["pictures", directory / "report.json", directory / "report.png"]
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (directory / "report.png").stat().st_size > 10_000


def test_sizes_checkpoints_and_limits(in_process, tmp_path):
    report = run_command(
        tmp_path / "work",
        *("--size", "tiny", "--size-steps", 2, "--steps", 3, "--steps-size", "tiny"),
        *("--memory-limit", "768MiB", "--memory-limit", "1MiB", "--runs", 2, "--workers", 1),
    )
    found = {}
    for row in report["rows"]:
        found.setdefault(row["part"], []).append(row)
    weights = PRESETS["tiny"].weights
    for part, checkpoints in (("size", 2), ("checkpoints", 3)):
        assert [row["command"] for row in found[part]] == list(memory.COMMANDS)
        for row in found[part]:
            assert (row["weights"], row["checkpoints"]) == (weights, checkpoints)
            assert row["peak_rss_bytes"] == 100 * MIB
            assert row["wall_s"] > 0
            assert len(row["samples"]) == 2
        assert [row["limit_bytes"] for row in found[part]] == [768 * MIB] * 3 + [None] * 2
        for row in found[part][:3]:
            assert row["outcome"] == "within"
            assert row["projected_bytes"] > 100 * MIB
            assert row["workers"] == 1
    assert [row["command"] for row in found["limit"]] == [*memory.COMMANDS, "build-store"]
    assert found["limit"][-1]["outcome"] == "refused"
    assert found["limit"][-1]["limit_bytes"] == MIB
    assert sum(words[0] == "verify" for words in in_process) == 6
    draw(report, tmp_path)


def test_your_own_checkpoints_stay_as_they_are(in_process, tmp_path):
    root = tmp_path / "own"
    write_steps(root, PRESETS["tiny"], range(3))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    own = ("--base", root / "base", "--checkpoints", root / "checkpoints")
    report = run_command(tmp_path / "work", *own)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert [row["command"] for row in report["rows"]] == list(memory.COMMANDS)
    assert {row["part"] for row in report["rows"]} == {"own"}
    assert str(tmp_path) not in json.dumps(report)
    draw(report, tmp_path)

    limited = run_command(tmp_path / "work", *own, "--memory-limit", "600MiB")
    assert [row["limit_bytes"] for row in limited["rows"] if row["part"] == "own, limit"] == [
        *[600 * MIB] * 4,
        None,
    ]


def test_what_does_not_fit_the_disk_is_appended_step_by_step(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_DISK_SHARE", 0.0)
    report = run_command(tmp_path / "work", *("--size", "tiny", "--size-steps", 3, "--steps", 0))
    builds = [words for words in in_process if words[0] == "build-store"]
    assert len(builds) == 3
    assert {row["checkpoints"] for row in report["rows"]} == {3}
    assert {row["part"] for row in report["rows"]} == {"size"}
    assert any("one by one" in note for note in report["notes"])


def test_a_peak_above_the_projection_is_told(in_process, tmp_path, monkeypatch):
    measure = commands.measure
    monkeypatch.setattr(
        commands,
        "measure",
        lambda *arguments: replace(measure(*arguments), peak_rss_bytes=1 << 40),
    )
    report = run_command(
        tmp_path / "work",
        *("--size", "tiny", "--size-steps", 2, "--steps", 0, "--memory-limit", "1GiB"),
    )
    assert report["rows"][0]["outcome"] == "ABOVE THE PROJECTION"
    assert any("held more than projected" in note for note in report["notes"])


def test_a_command_that_fails_for_another_reason_is_an_error(in_process, tmp_path):
    (tmp_path / "empty").mkdir()
    source = memory.Source(tmp_path / "empty", tmp_path / "empty", tmp_path)
    with pytest.raises(BenchmarkError, match="build-store"):
        memory.measure_commands(source, runs=1)


def test_a_base_without_checkpoints_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["memory", "--base", str(tmp_path)])
    assert result.exit_code == 2
    assert "go together" in result.output


def test_a_single_checkpoint_is_refused():
    result = CliRunner().invoke(cli, ["memory", "--steps", "1"])
    assert result.exit_code == 2
    assert "2 or more" in result.output


def test_a_command_is_measured_as_a_whole_process(tmp_path):
    write_steps(tmp_path, PRESETS["tiny"], range(2))
    arguments = (tmp_path / "base", tmp_path / "checkpoints", tmp_path / "store")
    found = commands.run("build-store", "build-store", *arguments, output=tmp_path / "store")
    document = commands.document(found)
    assert document["steps_added"] == [1]
    # What the process says of itself, but for what it took to print it.
    assert 0.8 < document["peak_memory_bytes"] / found.peak_rss_bytes <= 1
    assert max(size for _, size in found.samples) <= found.peak_rss_bytes


@pytest.mark.parametrize(
    ("text", "weights"), [("20M", 20e6), ("8b", 8e9), ("1.5T", 1.5e12), ("5e6", 5e6)]
)
def test_sizes_are_numbers_of_weights(text, weights):
    assert commands.parse_weights(text) == weights


def test_a_size_is_a_preset_or_about_so_many_weights():
    size = commands.ModelSize()
    assert size.convert("tiny", None, None) is PRESETS["tiny"]
    assert size.convert("20M", None, None).weights == pytest.approx(20e6, rel=0.1)
    for wrong in ("many", "0", "", "-5M", "nan", "M"):
        with pytest.raises(click.BadParameter, match="20M or 8B"):
            size.convert(wrong, None, None)
