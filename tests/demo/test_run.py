from __future__ import annotations

import json
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream.demo import run as demo
from relex_stream.errors import MissingDependencyError, OptionError

DATA = demo.TRAJECTORY.parent


def test_the_shipped_data_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 5_000_000
    summary = rs.verify(demo.TRAJECTORY)
    assert summary.problems == ()
    assert summary.steps == 120
    info = rs.info(demo.TRAJECTORY)
    assert info.base_included
    assert 200_000 < info.weights < 400_000


def test_the_shipped_run_was_still_rising() -> None:
    accuracy = json.loads((DATA / "trajectory.json").read_text())["held_out_accuracy"]
    assert 0.4 < accuracy["0"] < 0.6
    assert accuracy["0"] < accuracy["40"] < accuracy["80"] < accuracy["110"] < accuracy["120"]


def test_the_demonstration_runs_and_counts_honestly(tmp_path: Path) -> None:
    place = tmp_path / "demo"
    summary = demo.run_demo(place, problems=60)
    assert [(row.kind, row.step) for row in summary.rows] == [
        ("base", 0),
        ("last observed", 40),
        ("extrapolated", 60),
        ("extrapolated", 80),
        ("extrapolated", 120),
        ("true", 60),
        ("true", 80),
        ("true", 120),
    ]
    last = summary.rows[1]
    for row in summary.rows:
        assert 0.2 < row.accuracy < 0.9
        assert row.accuracy * 60 == pytest.approx(round(row.accuracy * 60))
        if row.kind in ("extrapolated", "true"):
            assert row.gain == pytest.approx(row.accuracy - last.accuracy)
    # The store it builds knows nothing later than the history.
    assert rs.open_store(place / "store").steps == tuple(range(1, 41))
    assert summary.build.steps_total == 40
    # Whoever has weights of the later steps under "extrapolated" would have cheated.
    for step in (60, 80, 120):
        predicted = (place / "extrapolated" / f"step_{step}" / "model.safetensors").read_bytes()
        truth = (place / "true" / f"step_{step}" / "model.safetensors").read_bytes()
        assert predicted != truth
    with pytest.raises(OptionError, match="not empty"):
        demo.run_demo(place, problems=60)


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'relex-stream\[demo\]'"):
        demo.run_demo()
