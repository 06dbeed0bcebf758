"""The `scale` benchmark: its model of cost, and the whole of it at tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import scale
from benchmarks.__main__ import cli
from benchmarks.trajectory import PRESETS, write_steps
from relex_stream import planner

NAMES = scale.FEATURES["build-store"]


def works(seed: int, count: int = 12) -> list[dict[str, float]]:
    generator = np.random.default_rng(seed)
    sizes = (1e9, 1e7, 1e7, 1e3)
    return [
        {
            name: float(size * generator.uniform(0.1, 3))
            for name, size in zip(NAMES, sizes, strict=True)
        }
        for _ in range(count)
    ]


def test_the_fit_finds_what_runs_were_made_of():
    truth = dict(zip(NAMES, (5e-10, 2e-8, 0.0, 3e-4), strict=True))
    seen = works(0)
    elapsed_s = [0.25 + sum(truth[name] * work[name] for name in NAMES) for work in seen]
    model = scale.fit_cost(NAMES, seen, elapsed_s, start_s=1.0)
    assert model.fixed_s == pytest.approx(0.25, rel=1e-6)
    for name in NAMES:
        assert model.per_unit_s[name] == pytest.approx(truth[name], rel=1e-6, abs=1e-16)
    assert model.worst_share < 1e-6
    later = works(1)[0]
    parallel_s = sum(truth[name] * later[name] for name in NAMES)
    assert model.predict_s(later) == pytest.approx(1.25 + parallel_s)
    assert model.predict_s(later, speedup=2) == pytest.approx(1.25 + parallel_s / 2)
    assert model.predict_s(later, speedup=2, waiting_s=100) == pytest.approx(101.25)


def test_no_cost_is_negative_though_the_runs_are_noisy():
    generator = np.random.default_rng(2)
    seen = works(3)
    elapsed_s = [1e-9 * work["bytes read"] * generator.uniform(0.5, 2) for work in seen]
    model = scale.fit_cost(NAMES, seen, elapsed_s, start_s=0.0)
    assert model.fixed_s >= 0
    assert min(model.per_unit_s.values()) >= 0
    assert model.worst_share > 0.05


def test_lines_and_powers():
    line = scale.fit_line([1, 2, 3, 4], [3, 5, 7, 9])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    assert scale.fit_line([1, 2, 4, 8], [3, 12, 48, 192]).exponent == pytest.approx(2)


def test_a_build_in_several_commits_reads_the_base_and_the_stored_changes_again():
    shape = scale.model_shape(8.2e9, 399)
    work = scale.build_work(
        base_bytes=16.4e9, checkpoint_bytes=16.4e9, changed=4e7, steps=100, shape=shape
    )
    batch = planner.commit_batch(shape, int(16.4e9), 0, 100, scale.STATISTICS_BYTES)
    assert batch == 16
    assert work["bytes read"] == pytest.approx((100 + 7) * 16.4e9)
    assert work["changed weight"] == pytest.approx(100 * 4e7)
    assert work["replayed weight"] == pytest.approx(sum(range(16, 100, 16)) * 4e7)
    assert work["tensor and step"] == 39_900


def test_an_append_reads_the_stored_changes_again():
    work = scale.build_work(
        base_bytes=100,
        checkpoint_bytes=100,
        changed=10,
        steps=3,
        shape=scale.model_shape(1e6, 5),
        rows=2,
        stored_changes=25,
    )
    assert work["bytes read"] == 400
    assert work["changed weight"] == 30
    assert work["replayed weight"] == 25


def test_a_projection_is_the_longer_of_computing_and_disk():
    models = {
        name: scale.CostModel(1.0, 0.5, dict.fromkeys(features, 1e-9))
        for name, features in scale.FEATURES.items()
    }
    plan = {"reserved_bytes": 200 << 20, "stages": [{"worker_bytes": 60 << 20}]}
    basis = scale.Basis(
        models=models,
        gains=dict.fromkeys(models, 0.5),
        change_share=0.005,
        bits_per_change=12.0,
        plans=dict.fromkeys(models, plan),
    )
    target = scale.Target("8B", 8e9, 400)
    slow, quick = (
        scale.project(basis, target, scale.Node(11, read, read), 100) for read in (1e9, 1e15)
    )
    assert [row["command"] for row in slow] == ["build-store", "extrapolate"]
    assert {row["bound by"] for row in slow} == {"disk"}
    assert {row["bound by"] for row in quick} == {"cores"}
    build, extrapolation = quick
    # 11 workers, each further one half as good: 6 times as fast as one.
    assert build["predicted_s"] == pytest.approx(1.5 + sum(build["work"].values()) * 1e-9 / 6)
    assert build["store GB"] == pytest.approx(0.005 * 8e9 * 100 * 12 / 8 / 1e9)
    for row in quick:
        assert row["memory_bytes"] > (200 << 20) + 11 * (60 << 20)
        assert 1 <= row["fit 768 MiB"] <= 9
    assert extrapolation["predicted_s"] < slow[1]["predicted_s"]


@pytest.mark.parametrize("weights", [1e6, 40e6])
def test_a_mixture_of_about_so_many_weights_in_many_tensors(weights):
    preset = scale.many_tensors(weights)
    assert preset.weights == pytest.approx(weights, rel=0.4)
    assert len(preset.shapes) > 200


def test_bandwidth_is_read_from_the_disk(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(100_000))
    assert scale.read_bandwidth(paths, 2) > 0
    assert scale._read(paths[0]) == 100_000


def test_predictions_are_held_against_a_run_of_yours(in_process, tmp_path):
    root, work = tmp_path / "run", tmp_path / "work"
    work.mkdir()
    write_steps(root, PRESETS["tiny"], range(4))
    before = sorted(root.rglob("*"))
    for cold in (False, True):
        results, waiting_s_per_byte = scale._Check(root, work / str(cold), cold, 1).results()
        assert [one.command for one in results] == ["build-store", "extrapolate"]
        assert [one.checkpoints for one in results] == [3, 3]
        assert results[0].weights == PRESETS["tiny"].weights
        assert (waiting_s_per_byte > 0) == cold
    assert sorted(root.rglob("*")) == before


def test_the_command_measures_predicts_and_draws(in_process, tmp_path):
    path = tmp_path / "scale.json"
    words = ["scale", "--size", "tiny", "--steps", 8, "--other-size", "tiny", "--size-steps", 2]
    words += ["--many-tensors", "1M", "--check-size", "tiny", "--check-steps", 2]
    words += ["--runs", 1, "--max-workers", 2, "--directory", tmp_path / "work", "--json", path]
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "work").iterdir())
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        *("checkpoints", "stride", "append", "workers", "size", "tensors", "check", "projection"),
    ]
    for row in rows:
        assert row["predicted_s"] > 0
        if row["part"] != "projection":
            assert row["wall_s"] >= row["in_process_s"] > 0
            assert row["measured / predicted"] == pytest.approx(row["wall_s"] / row["predicted_s"])
    counts = {row["checkpoints"] for row in rows if row["part"] == "checkpoints"}
    assert counts == {2, 4, 8}
    assert {row["workers"] for row in rows if row["part"] == "workers"} == {2}
    (append,) = (row for row in rows if row["part"] == "append")
    assert append["checkpoints"] == 4
    assert append["work"]["replayed weight"] > 0
    projected = [
        (row["weights"], row["checkpoints"]) for row in rows if row["part"] == "projection"
    ]
    assert sorted(set(projected)) == [(int(target.weights), 100) for target in scale.TARGETS]
    assert any("exponent" in note for note in report["notes"])
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scale.png"
    result = CliRunner().invoke(cli, ["pictures", str(path), str(picture)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
