"""Processes that share a pretend device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import relex_stream as rs
from benchmarks.devices.cases import START_CASE, prepare
from benchmarks.devices.command_runs import gpu_cluster
from benchmarks.devices.pretend import environment
from benchmarks.devices.rounds import difference
from benchmarks.processes import measure


@pytest.mark.slow
def test_two_workers_of_a_cluster_share_the_device(tmp_path):
    case = START_CASE
    base, store = prepare(case, tmp_path, workers=1)
    with gpu_cluster(tmp_path / "cluster", threads=1, pretend=True) as file:
        words = ["extrapolate", store, tmp_path / "out", "--target-step", "12", "--base", base]
        words += ["--devices", "cuda", "--scheduler", file, "--json"]
        argv = [sys.executable, "-m", "relex_stream", *words]
        summary = json.loads(measure("cluster", argv, env=environment()).stdout)
    assert summary["plan"]["devices"]["names"] == ["2 GPU worker(s)"]
    rs.extrapolate(store, tmp_path / "here", target_steps=[12], base=base)
    share, _ = difference(tmp_path / "here", Path(tmp_path / "out"))
    assert share < 1e-4
