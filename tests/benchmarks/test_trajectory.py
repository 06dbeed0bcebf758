"""Synthetic trajectories: pure functions of the seed, real layouts, a realistic rate of change."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import relex_stream as rs
from benchmarks import trajectory
from benchmarks.__main__ import cli
from benchmarks.processes import BenchmarkError
from benchmarks.trajectory import (
    LEARNING_RATE,
    PRESETS,
    changed_share,
    preset_of_size,
    step_directory,
    weights,
    write_base,
    write_step,
    write_steps,
)

TINY = PRESETS["tiny"]
SHARDED = replace(TINY, shard_bytes=200_000)
EMBEDDING = "model.embed_tokens.weight"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    write_steps(out, SHARDED, range(5), seed=3)
    return out


def test_a_step_alone_equals_the_step_of_a_whole_run(run, tmp_path):
    write_step(tmp_path, SHARDED, 4, seed=3)
    assert files_of(step_directory(tmp_path, 4)) == files_of(step_directory(run, 4))
    write_base(tmp_path, SHARDED, seed=3)
    assert files_of(tmp_path / "base") == files_of(run / "base")


def test_blocks_and_threads_do_not_show(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "BLOCK_ELEMENTS", 1009)
    write_steps(tmp_path, SHARDED, [0, 3], seed=3, threads=3)
    for step in (0, 3):
        assert files_of(step_directory(tmp_path, step)) == files_of(step_directory(run, step))


def test_groups_of_open_files_do_not_show(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "_STEPS_AT_ONCE", 2)
    write_steps(tmp_path, SHARDED, [4, 0, 2, 1, 3], seed=3)
    for step in range(5):
        assert files_of(step_directory(tmp_path, step)) == files_of(step_directory(run, step))


@given(start=st.integers(0, 300), count=st.integers(1, 300), step=st.integers(0, 4))
@settings(max_examples=30)
def test_any_run_of_elements_can_be_had_alone(start, count, step):
    whole = weights(EMBEDDING, step, 0, 600, seed=5)
    assert np.array_equal(
        weights(EMBEDDING, step, start, start + count, seed=5), whole[start:][:count]
    )


def test_elements_far_into_a_large_tensor():
    far = 3 * 2**30
    assert not np.array_equal(weights("a", 1, far, far + 8), weights("a", 1, 0, 8))
    assert np.array_equal(weights("a", 1, far, far + 8)[4:], weights("a", 1, far + 4, far + 8))


def test_files_hold_the_masters_rounded(run):
    saved = _load(step_directory(run, 2))
    for name, tensor in saved.items():
        masters = torch.from_numpy(weights(name, 2, 0, tensor.numel(), seed=3))
        assert torch.equal(tensor.flatten(), masters.bfloat16()), name


def test_fp32_files_hold_the_masters(tmp_path):
    write_step(tmp_path, TINY, 2, dtype="fp32")
    saved = _load(step_directory(tmp_path, 2))
    assert sum(tensor.numel() for tensor in saved.values()) == TINY.weights
    for name, tensor in saved.items():
        assert np.array_equal(tensor.flatten(), weights(name, 2, 0, tensor.numel())), name


def _load(directory: Path) -> dict[str, torch.Tensor]:
    loaded = {}
    for path in directory.glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(path)
    return loaded


def test_the_same_seed_gives_the_same_bits_everywhere(tmp_path):
    # Never to be changed: published figures were measured on these trajectories.
    digests = {}
    for step in (0, 3):
        directory = write_step(tmp_path, TINY, step)
        content = (directory / "model.safetensors").read_bytes()
        digests[step] = hashlib.sha256(content).hexdigest()[:16]
    assert digests == {0: "e191092b0e71ff31", 3: "93497747c01b826b"}


def test_another_seed_gives_another_run():
    assert not np.array_equal(weights(EMBEDDING, 1, 0, 9), weights(EMBEDDING, 1, 0, 9, seed=1))


COUNT = 1 << 17
STEPS = 8


@pytest.fixture(scope="module")
def moves() -> np.ndarray:
    """Return moves in learning rates, shape (STEPS, COUNT)."""
    masters = [weights("m.weight", step, 0, COUNT) for step in range(STEPS + 1)]
    return np.diff(np.array(masters, np.float64), axis=0) / LEARNING_RATE


class TestMoves:
    def test_are_bounded_as_adams(self, moves):
        # Masters below 2^-3 are spaced by less than a tenth of the learning rate.
        assert np.abs(moves).max() < 2 + 2**-27 / LEARNING_RATE
        assert (np.abs(moves) > 1.9).mean() > 0.1

    def test_have_no_direction_in_common(self, moves):
        assert np.abs(moves.mean(axis=1)).max() < 0.02

    def test_are_drift_and_noise_in_equal_parts(self, moves):
        correlation = np.corrcoef(moves)
        between = correlation[~np.eye(STEPS, dtype=bool)]
        assert between.min() > 0.4
        assert between.max() < 0.55
        # Less the drift, steps have nothing to do with one another.
        apart = np.corrcoef(moves - moves.mean(axis=0)) + 1 / (STEPS - 1)
        assert np.abs(apart[~np.eye(STEPS, dtype=bool)]).max() < 0.02

    def test_of_neighbours_are_independent(self, moves):
        for distance in (1, 2, 64, 4096):
            lagged = np.corrcoef(moves[0][distance:], moves[0][:-distance])[0, 1]
            assert abs(lagged) < 0.02

    def test_values_at_the_start(self):
        values = weights("m.weight", 0, 0, COUNT)
        assert abs(values.mean()) < 0.0003
        assert abs(values.std() - 0.02) < 0.0003
        # Nearly normal: as many lie within one standard deviation.
        assert abs((np.abs(values) < 0.02).mean() - 0.683) < 0.02
        assert len(np.unique(values)) > 0.99 * COUNT
        norm = weights("model.norm.weight", 0, 0, 10_000)
        assert abs(norm.mean() - 1) < 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_half_a_percent_of_the_weights_changes_per_step(name):
    preset = PRESETS[name]
    share = changed_share(preset, 2, sample=min(preset.weights, 2_000_000))
    assert 0.004 < share < 0.006


def test_the_rate_does_not_change_along_the_run():
    shares = [changed_share(TINY, step) for step in (1, 2, 20, 100)]
    assert max(shares) < 1.15 * min(shares)


def test_the_rate_told_is_the_rate_in_the_files(run):
    before, after = (_load(step_directory(run, step)) for step in (1, 2))
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    assert changed / TINY.weights == pytest.approx(changed_share(TINY, 2, seed=3))


def test_in_fp32_nearly_every_weight_changes():
    assert changed_share(TINY, 2, dtype="fp32") > 0.98


def test_sizes_of_the_presets():
    sizes = {name: preset.weights for name, preset in PRESETS.items()}
    assert sizes == {
        "tiny": 354_528,
        "40m": 40_509_952,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-8b": 8_190_735_360,
        "moe-30k": 1_001_683_200,
    }
    assert len(PRESETS["moe-30k"].shapes) == 30_386
    files = [shard.data_bytes for shard in trajectory._shards(PRESETS["qwen3-8b"], "bf16")]
    assert files == [3996241408, 3993146880, 3959591936, 3187830784, 1244659712]


@pytest.mark.parametrize("size", [2e6, 20e6, 300e6, 8e9, 70e9])
def test_presets_of_any_size(size):
    assert abs(preset_of_size(size).weights / size - 1) < 0.25


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "moe-30k"])
def test_transformers_makes_a_model_of_these_tensors(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**PRESETS[name].config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert state == PRESETS[name].shapes


@pytest.mark.parametrize("experts", [0, 4])
def test_transformers_loads_what_is_written(tmp_path, experts):
    transformers = pytest.importorskip("transformers")
    preset = SHARDED
    if experts:
        small = {"num_experts": experts, "num_hidden_layers": 2, "vocab_size": 64}
        preset = replace(
            PRESETS["moe-30k"], config=dict(PRESETS["moe-30k"].config) | small, shard_bytes=400_000
        )
    directory = write_step(tmp_path, preset, 1)
    assert (directory / "model.safetensors.index.json").exists()
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert not any(told.values()), told


def test_files_are_those_that_the_library_writes(run, tmp_path):
    directory = step_directory(run, 1)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * TINY.weights
    assert set(index["weight_map"]) == set(TINY.shapes)
    paths = sorted(directory.glob("*.safetensors"))
    assert len(paths) == 4
    for path in paths:
        tensors = safetensors.torch.load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        safetensors.torch.save_file(tensors, tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_store_takes_it(run, tmp_path):
    rs.build_store(run / "base", run / "checkpoints", tmp_path / "store")
    info = rs.info(tmp_path / "store")
    assert info.weights == TINY.weights
    assert [step.step for step in info.steps] == [1, 2, 3, 4]


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trajectory, "_write_all", fail)
    with pytest.raises(OSError, match="No space"):
        write_steps(tmp_path, TINY, [0, 1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "base").exists()


def test_too_little_room_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    little = shutil.disk_usage(tmp_path)._replace(free=10_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(BenchmarkError, match=r"16\.4 GB to write, 10\.0 GB free"):
        write_base(tmp_path / "out", PRESETS["qwen3-8b"])
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_step_is_not_overwritten(run):
    before = files_of(step_directory(run, 2))
    with pytest.raises(BenchmarkError, match="global_step_2 exists"):
        write_step(run, SHARDED, 2, seed=4)
    assert files_of(step_directory(run, 2)) == before


class TestCommand:
    def invoke(self, *arguments: object):
        return CliRunner().invoke(cli, ["trajectory", *map(str, arguments)])

    def steps_in(self, out: Path) -> list[str]:
        return sorted(path.name for path in (out / "checkpoints").iterdir())

    def test_base_and_steps(self, tmp_path):
        result = self.invoke(tmp_path / "run", "--preset", "tiny", "--steps", 2)
        assert result.exit_code == 0, result.output
        assert "354,528 bf16 weights in 38 tensors: 3 models written" in result.output
        assert "% of the weights change per step" in result.output
        assert self.steps_in(tmp_path / "run") == ["global_step_1", "global_step_2"]
        assert sorted(path.name for path in (tmp_path / "run" / "base").iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]

    def test_one_step_at_a_time_is_the_same_run(self, tmp_path):
        self.invoke(tmp_path / "all", "--preset", "tiny", "--seed", 7)
        for step in (1, 3):
            out = tmp_path / "single"
            result = self.invoke(out, "--preset", "tiny", "--seed", 7, "--only-step", step)
            assert result.exit_code == 0, result.output
            assert self.steps_in(out) == [f"global_step_{step}"]
            assert files_of(step_directory(out, step)) == files_of(
                step_directory(tmp_path / "all", step)
            )
            shutil.rmtree(step_directory(out, step))
        assert files_of(tmp_path / "single" / "base") == files_of(tmp_path / "all" / "base")

    def test_more_steps_are_added(self, tmp_path):
        self.invoke(tmp_path / "run", "--preset", "tiny", "--steps", 2)
        result = self.invoke(tmp_path / "run", "--preset", "tiny", "--first-step", 2, "--steps", 4)
        assert result.exit_code == 0, result.output
        assert "2 models written" in result.output
        assert self.steps_in(tmp_path / "run") == [f"global_step_{step}" for step in range(1, 5)]

    @pytest.mark.parametrize(
        "other",
        [("--seed", 1), ("--dtype", "fp32"), ("--preset", "40m")],
        ids=lambda other: other[0],
    )
    def test_two_trajectories_are_not_mixed(self, tmp_path, other):
        self.invoke(tmp_path / "run", "--preset", "tiny", "--steps", 0)
        result = self.invoke(tmp_path / "run", "--preset", "tiny", *other)
        assert isinstance(result.exception, BenchmarkError)
        assert "holds another trajectory" in str(result.exception)
