"""The `devices` benchmark with a pretend device, at tiny size."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.devices import main, on_device
from benchmarks.devices.cases import pretend_sizes
from benchmarks.devices.pretend import PRETEND_NOTE
from benchmarks.devices.tables import SECTIONS
from benchmarks.processes import BenchmarkError
from relex_stream import costs


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, ["devices", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(on_device, "_powers", lambda most: [1, 2])


@pytest.mark.slow
@pytest.mark.usefixtures("short_blocks")
def test_everything_is_measured_and_said_to_mean_nothing(pretend_in_process, tmp_path):
    path = tmp_path / "report.json"
    words = ["--pretend", "--runs", 1, "--workers", "1", "--no-cluster", "--json", path]
    output = invoke(*words, "--directory", tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
    report = json.loads(path.read_text())
    assert report["settings"]["pretend"] is True
    assert PRETEND_NOTE in report["notes"]
    assert PRETEND_NOTE in output
    assert report["title"].startswith("PRETEND DEVICES, figures mean nothing")
    assert report["machine"]["device"] == {"name": "pretend device"}
    rows = {part: [r for r in report["rows"] if r["part"] == part] for part in SECTIONS}
    assert all(rows.values())
    for part in SECTIONS:
        assert f"PRETEND: {part}" in output
    for row in rows["bits"]:
        assert row["same bits again"]
        assert row["same bits beside another"]
        if row["work"].startswith("outputs"):
            assert row["same bits as the CPU"]
        else:
            assert row["difference from the CPU"] < 1e-6
    for row in rows["stages"]:
        assert row["device ms"] > 0
        assert row["of_copy_share"] > 0
    commands = {(row["case"], row["route"], row["program"]): row for row in rows["commands"]}
    names = ("cpu, 1 worker(s)", "cuda")
    assert set(commands) == {
        (case.name, route, name)
        for case in pretend_sizes().cases
        for route in case.routes
        for name in names
    }
    for (*_, name), row in commands.items():
        assert row["differing_share"] <= (1e-4 if name == "cuda" else 0)
        assert row["same bits each run"]
        assert row["projected_s"] > 0
        assert row["projected_anew_s"] > 0
        assert (row["blocks at a time"] is None) == (name != "cuda")
    told = {row["constant"] for row in rows["constants"]}
    # CPU_AGAIN_..., for blocks whose changes are not kept, are for people to take from "cpu".
    cpu = {name for name in vars(costs) if re.fullmatch(r"CPU_(?!AGAIN_)\w+_NS", name)}
    assert told == cpu | {
        "DEVICE_START_S",
        "DEVICE_LINK_BYTES_PER_S",
        "DEVICE_MEMORY_BYTES_PER_S",
        "DEVICE_FLOPS",
        "DEVICE_DENSE_BYTES",
    }
    for kind in ("cpu", "cuda"):
        assert any(("--devices", kind) in itertools.pairwise(c) for c in pretend_in_process)


def test_parts_alone_use_what_was_prepared(pretend_in_process, tmp_path, monkeypatch):
    sizes = pretend_sizes()
    sizes = replace(sizes, cases=sizes.cases[:1])
    monkeypatch.setattr(main, "pretend_sizes", lambda: sizes)
    common = ["--pretend", "--run", tmp_path / "runs", "--workers", "1", "--runs", 1]
    common += ["--no-cluster", "--directory", tmp_path / "work"]
    invoke(*common, "--part", "prepare")
    assert [c[0] for c in pretend_in_process] == ["build-store"]
    assert not list((tmp_path / "runs" / "start" / "checkpoints").iterdir())
    pretend_in_process.clear()
    path = tmp_path / "report.json"
    # The time is over at once: a round of each is all there is.
    invoke(*common, "--part", "commands", "--json", path, "--budget-s", 1, "--markdown")
    assert {c[0] for c in pretend_in_process} == {"extrapolate"}
    report = json.loads(path.read_text())
    assert {row["part"] for row in report["rows"]} == {"commands", "constants"}
    assert [r["constant"] for r in report["rows"] if r["part"] == "constants"] == ["DEVICE_START_S"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused_in_one_line(tmp_path):
    result = CliRunner().invoke(cli, ["devices", "--directory", str(tmp_path)])
    assert isinstance(result.exception, BenchmarkError)
    assert "cuda:0" in str(result.exception)
    assert "--pretend" in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_workers_above_the_cores_are_left_out():
    assert main._worker_counts("4,1,64", 8) == (1, 4)
    assert main._worker_counts("64", 8) == (1,)
    for text in ("", "0,1", "many"):
        result = CliRunner().invoke(cli, ["devices", "--pretend", "--workers", text])
        assert result.exit_code == 2
        assert "whole numbers" in result.output
