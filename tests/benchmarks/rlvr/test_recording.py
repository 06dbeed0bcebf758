"""Making a run: what it leaves, and that it leaves the same again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import relex_stream as rs
from benchmarks.rlvr.recording import checkpoint_directory, record_run
from benchmarks.rlvr.runs import accuracy


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny) -> Path:
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    record_run(out_dir, tiny, keep_checkpoints=True)
    return out_dir


def test_a_run_leaves_a_store_of_its_checkpoints_and_a_record(finished, tmp_path, tiny):
    store = rs.open_store(finished / "store")
    assert store.steps == (2, 4, 6, 8, 10)
    for step in (0, 4, 10):
        rs.export(finished / "store", tmp_path / f"{step}", step=step)
        assert weights_of(tmp_path / f"{step}") == weights_of(checkpoint_directory(finished, step))
    record = json.loads((finished / "trajectory.json").read_text())
    assert record["settings"] == json.loads(json.dumps(asdict(tiny)))
    assert record["weights"] == rs.info(finished / "store").weights
    assert record["supervised_steps"] % 5 == 0
    assert 0 < record["mean_changed_share"] < 1
    assert len(record["train_reward"]) == tiny.steps
    assert record["elapsed_s"] > 0
    assert set(record["versions"]) == {"python", "torch", "transformers"}
    assert record["held_out_accuracy"] == {
        str(step): accuracy(checkpoint_directory(finished, step), "product", 50).mean()
        for step in (0, 10)
    }


def test_the_same_settings_give_the_same_bits(finished, tmp_path, tiny):
    record_run(tmp_path / "again", tiny)
    # Without --keep-checkpoints only what is worth keeping stays.
    left = {path.name for path in (tmp_path / "again").iterdir()}
    assert left == {"store", "trajectory.json"}
    for step in (0, 2, 10):
        out = tmp_path / f"again-{step}"
        rs.export(tmp_path / "again" / "store", out, step=step)
        assert weights_of(out) == weights_of(checkpoint_directory(finished, step))


def test_no_path_of_the_machine_is_kept(finished):
    hint = str(finished.parent).encode()
    for directory in (finished / "store", finished / "trajectory.json"):
        for path in (directory, *directory.rglob("*")):
            assert path.is_dir() or hint not in path.read_bytes()


def test_torch_is_left_as_it_was(tmp_path, tiny, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        record_run(tmp_path / "run", tiny, log_every=5)
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "step 5",
        "step 10",
    ]
