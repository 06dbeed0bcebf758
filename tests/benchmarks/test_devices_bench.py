"""The `devices` benchmark with a pretend device, at tiny size."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import devices as bench
from benchmarks.__main__ import cli
from benchmarks.processes import BenchmarkError, Measurement, measure
from benchmarks.trajectory import PRESETS, write_steps
from relex_stream import costs, devices

PATIENCE_S = 30


@pytest.fixture
def pretend_in_process(in_process, monkeypatch) -> list[tuple[str, ...]]:
    """Run commands here, also those that have a pretend device; return what was called."""
    commands = importlib.import_module("benchmarks.processes").measure
    there = devices.find_devices

    def find(name: str, argv, **options: object) -> Measurement:
        words = list(map(str, argv))
        if words[1] != "-c":
            return commands(name, words, **options)
        assert words[2] == bench._PRETEND_PROGRAM
        monkeypatch.setattr(devices, "find_devices", lambda *_: (bench.PRETEND,))
        try:
            return commands(name, [words[0], "-m", "relex_stream", *words[3:]], **options)
        finally:
            monkeypatch.setattr(devices, "find_devices", there)

    monkeypatch.setattr("benchmarks.processes.measure", find)
    return in_process


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, ["devices", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(bench, "_powers", lambda most: [1, 2])


@pytest.mark.usefixtures("short_blocks")
def test_everything_is_measured_and_said_to_mean_nothing(pretend_in_process, tmp_path):
    path = tmp_path / "report.json"
    words = ["--pretend", "--runs", 1, "--workers", "1", "--no-cluster", "--json", path]
    output = invoke(*words, "--directory", tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())
    report = json.loads(path.read_text())
    assert report["settings"]["pretend"] is True
    assert bench.PRETEND_NOTE in report["notes"]
    assert bench.PRETEND_NOTE in output
    assert report["title"].startswith("PRETEND DEVICES, figures mean nothing")
    assert report["machine"]["device"] == {"name": "pretend device"}
    rows = {part: [r for r in report["rows"] if r["part"] == part] for part in bench.SECTIONS}
    assert all(rows.values())
    for part in bench.SECTIONS:
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
        for case in bench.pretend_sizes().cases
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
    sizes = bench.pretend_sizes()
    sizes = replace(sizes, cases=sizes.cases[:1])
    monkeypatch.setattr(bench, "pretend_sizes", lambda: sizes)
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


def test_checkpoints_of_others_stay_and_a_store_is_carried_on(in_process, tmp_path):
    case = bench.Case("case", PRESETS["tiny"], "bf16", 2)
    write_steps(tmp_path / "case", case.preset, [0, 1])
    base, store = bench.prepare(case, tmp_path, workers=1)
    assert rs.open_store(store).steps == (1, 2)
    checkpoints = tmp_path / "case" / "checkpoints"
    assert [each.name for each in checkpoints.iterdir()] == ["global_step_1"]
    longer = bench.Case("case", PRESETS["tiny"], "bf16", 3)
    assert bench.prepare(longer, tmp_path, workers=1) == (base, store)
    assert rs.open_store(store).steps == (1, 2, 3)
    assert len(in_process) == 2
    bench.prepare(longer, tmp_path, workers=1)
    assert len(in_process) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused_in_one_line(tmp_path):
    result = CliRunner().invoke(cli, ["devices", "--directory", str(tmp_path)])
    assert isinstance(result.exception, BenchmarkError)
    assert "cuda:0" in str(result.exception)
    assert "--pretend" in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_workers_above_the_cores_are_left_out():
    assert bench._worker_counts("4,1,64", 8) == (1, 4)
    assert bench._worker_counts("64", 8) == (1,)
    for text in ("", "0,1", "many"):
        result = CliRunner().invoke(cli, ["devices", "--pretend", "--workers", text])
        assert result.exit_code == 2
        assert "whole numbers" in result.output


def test_differences_are_counted_in_ulp(tmp_path):
    values = torch.arange(1, 101).to(torch.bfloat16)
    moved = values.clone().view(torch.int16)
    moved[3] += 1
    moved[7] -= 5
    for name, tensor in (("one", values), ("two", moved.view(torch.bfloat16))):
        (tmp_path / name).mkdir()
        plain = {"a": tensor.reshape(10, 10), "b": torch.tensor([-0.0, 1.5])}
        safetensors.torch.save_file(plain, tmp_path / name / "model.safetensors")
    one, two = tmp_path / "one", tmp_path / "two"
    assert bench.difference(one, two) == (2 / 102, 5)
    assert bench.difference(one, one) == (0.0, 0)
    assert bench.digest_of(one) == bench.digest_of(one) != bench.digest_of(two)
    (tmp_path / "none").mkdir()
    with pytest.raises(BenchmarkError, match="other tensors"):
        bench.difference(one, tmp_path / "none")


def test_no_round_begins_that_would_end_too_late(monkeypatch):
    def alternate(programs, **_: object):
        time.sleep(0.05)
        return {each.name: [object()] for each in programs}

    monkeypatch.setattr(bench, "alternate", alternate)
    programs = [bench.Program("a", ["a"]), bench.Program("b", ["b"])]
    for left_s, rounds in ((PATIENCE_S, 4), (-1, 1)):
        called = []
        found = bench.measure_rounds(
            programs,
            {},
            runs=3,
            deadline=bench.Deadline(time.monotonic() + left_s),
            after_first=lambda called=called: called.append(1),
        )
        assert called == [1]
        assert [len(each) for each in found.by_name.values()] == [rounds, rounds]


def test_threads_work_at_once_and_their_errors_are_told():
    meet = threading.Barrier(3, timeout=PATIENCE_S)
    assert bench.together(3, meet.wait, 2) > 0

    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        bench.together(2, fail, 1)


def test_fits_find_what_times_were_made_of():
    truth = np.array([1.5, 0.0, 6.0, 0.35])
    counts = np.random.default_rng(0).uniform(1, 1e6, (12, 4))
    found, worst = bench.fit_nonnegative(counts, counts @ truth)
    assert found == pytest.approx(truth, abs=1e-9)
    assert worst < 1e-9


def test_constants_come_from_the_rows_that_tell_of_them():
    assert bench.suggested_constants([]) == {}
    starts = [
        {"part": "commands", "case": "start", "program": name, "wall_s": wall_s}
        for name, wall_s in (("cpu, 1 worker(s)", 1.5), ("cuda", 6.0))
    ]
    assert bench.suggested_constants(starts)["DEVICE_START_S"][0] == 4.5
    peaks = bench.Peaks(2e12, 5e10, 5e10, 1e10, 4e13).rows()
    dense = 10**6
    stages = [
        {"stage": "put", "block": "b", "device ms": 1.0, "link_bytes": 4e7},
        # At 2e12 bytes per second, 250 and 300 bytes per element; the product takes its own.
        {"stage": "products, k=8", "block": "b", "device ms": 0.125 + 8e-7 * 1e3},
        {"stage": "outputs, o=1", "block": "b", "device ms": 0.162},
    ]
    rows = peaks + [{"part": "stages", "dense": dense} | row for row in stages]
    found = {name: value for name, (value, _) in bench.suggested_constants(rows).items()}
    assert found["DEVICE_LINK_BYTES_PER_S"] == pytest.approx(4e10)
    assert found["DEVICE_MEMORY_BYTES_PER_S"] == pytest.approx(2e12)
    assert found["DEVICE_FLOPS"] == pytest.approx(4e13)
    assert found["DEVICE_DENSE_BYTES"] == pytest.approx((250 + 300) / 2)


def test_a_pretend_program_has_a_pretend_device(monkeypatch, capsys):
    monkeypatch.setattr(devices, "find_devices", devices.find_devices)
    monkeypatch.setattr(sys, "argv", ["-c", "--version"])
    with pytest.raises(SystemExit):
        bench.pretend_main()
    assert devices.find_devices(devices.parse_devices("cuda")) == (bench.PRETEND,)


@pytest.mark.slow
def test_two_workers_of_a_cluster_share_the_device(tmp_path):
    case = bench.START_CASE
    base, store = bench.prepare(case, tmp_path, workers=1)
    with bench.gpu_cluster(tmp_path / "cluster", threads=1, pretend=True) as file:
        words = ["extrapolate", store, tmp_path / "out", "--target-step", "12", "--base", base]
        words += ["--devices", "cuda", "--scheduler", file, "--json"]
        argv = [sys.executable, "-m", "relex_stream", *words]
        summary = json.loads(measure("cluster", argv, env=bench._environment()).stdout)
    assert summary["plan"]["devices"]["names"] == ["2 GPU worker(s)"]
    rs.extrapolate(store, tmp_path / "here", target_steps=[12], base=base)
    share, _ = bench.difference(tmp_path / "here", Path(tmp_path / "out"))
    assert share < 1e-4
