"""The store of records alone, and what is timed on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import answers
from benchmarks.__main__ import cli
from benchmarks.answers import made_up_rows, write_store
from benchmarks.report import Report


def test_made_up_sketches_agree_with_their_norms() -> None:
    changes, change_sq, delta_sq = made_up_rows(6, seed=3)
    np.testing.assert_allclose((changes**2).sum(axis=1), change_sq)
    np.testing.assert_allclose((np.cumsum(changes, axis=0) ** 2).sum(axis=1), delta_sq)


def test_the_store_is_one_that_answers(tmp_path: Path) -> None:
    store = write_store(tmp_path, "tiny", 6, sketch_min_elements=1000)
    assert len(rs.info(store).steps) == 6
    summary = rs.analyze(store, rank=1)
    assert summary.model.explained_variance[0] > 0.5
    assert summary.bytes_read == 0
    plan = rs.extrapolate(store, tmp_path / "out", target_steps=[200], dry_run=True)
    assert plan.dry_run


def test_every_command_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(write_store, sketch_min_elements=1000)
    monkeypatch.setattr(answers, "write_store", small)
    file = tmp_path / "report.json"
    arguments = ["answers", "--model", "tiny", "--steps", "5", "--runs", "1", "--json", str(file)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = Report.read(file).rows
    assert [row["command"] for row in rows] == [
        "analyze",
        "extrapolate --dry-run",
        "extrapolate --damping auto --dry-run",
        "backtest",
        "report",
        "info",
    ]
    assert all(row["wall_s"] > 0 for row in rows)
