"""PyTorch distributed checkpoints: as torch and accelerate write them, and damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from relex_stream.errors import SourceError
from relex_stream.sources import Naming, find_checkpoints
from relex_stream.sources.dcp import holds_dcp, open_dcp
from relex_stream.sources.dcp_metadata import Region, SavedTensor, read_metadata
from relex_stream.specs import Box
from tests.split_checkpoints import assert_holds, assert_rebuilds, whole_model
from tests.torch_writers.lies import LIES

RUNS = [
    # run, dtype, layout
    ("nemo_rl", "bf16", "step_N/policy/weights, PyTorch DCP"),
    ("accelerate", "fp32", "checkpoint-N/pytorch_model_fsdp_0, PyTorch DCP"),
    ("meshes/hsdp", "bf16", "step-N, PyTorch DCP"),
    ("meshes/grid", "bf16", "step-N, PyTorch DCP"),
    ("alone/plain", "bf16", "step-N, PyTorch DCP"),
    ("alone/threads", "bf16", "step-N, PyTorch DCP"),
    ("alone/many", "bf16", "step-N, PyTorch DCP"),
    ("alone/safetensors", "bf16", "step-N, PyTorch DCP"),
]
RUNS_WITH_STATE = [
    ("prime_rl", "fp32", "checkpoints/step_N/trainer, PyTorch DCP"),
    ("torchtitan", "fp32", "step-N, PyTorch DCP"),
    ("alone/bytes", "bf16", "step-N, PyTorch DCP"),
]


def opened(torch_checkpoints, run, dtype, layout):
    """Yield each step's checkpoint and the whole model that it must hold."""
    found = find_checkpoints(torch_checkpoints / run)
    assert (found.layout, found.format.name) == (layout, "dcp")
    for step, path in found.checkpoints:
        wanted = whole_model(torch_checkpoints / f"whole_{dtype}/step_{step}")
        yield found.open(path, step, Naming(frozenset(wanted))), wanted


@pytest.mark.parametrize(("run", "dtype", "layout"), RUNS)
def test_models_are_read_and_rebuilt_bit_for_bit(torch_checkpoints, run, dtype, layout):
    for checkpoint, wanted in opened(torch_checkpoints, run, dtype, layout):
        assert_holds(checkpoint, wanted)
        assert_rebuilds(checkpoint, wanted)
        assert checkpoint.side_files[0].endswith(".metadata")
        assert checkpoint.copies == {}


@pytest.mark.parametrize(("run", "dtype", "layout"), RUNS_WITH_STATE)
def test_of_files_with_state_only_the_model_is_read(torch_checkpoints, run, dtype, layout):
    for checkpoint, wanted in opened(torch_checkpoints, run, dtype, layout):
        assert_holds(checkpoint, wanted)
        assert {file.parts for file in checkpoint.weights_files} == {None}
        assert checkpoint.side_files == ()
        assert ".metadata" in checkpoint.skipped_files


def test_torch_reads_the_same(torch_checkpoints):
    # The reference of the other tests is what the writers were given; here it is torch's reader.
    merged = whole_model(torch_checkpoints / "merged")
    path = torch_checkpoints / "prime_rl/checkpoints/step_2/trainer"
    assert_holds(open_dcp(path, 2, Naming(frozenset(merged))), merged)


def test_chunks_are_where_the_ranks_put_them(torch_checkpoints):
    (checkpoint, _), *_ = opened(torch_checkpoints, *RUNS[0])
    embedding = checkpoint.tensors["model.embed_tokens.weight"]
    assert [piece.box.start for piece in embedding.pieces] == [(0, 0), (5, 0), (10, 0)]
    assert [piece.path.rsplit("/")[-1] for piece in embedding.pieces] == [
        f"__{rank}_0.distcp" for rank in range(3)
    ]
    # One row: two of the ranks have none of it.
    assert not checkpoint.tensors["model.norm.weight"].pieces


def test_files_around_the_weights_are_kept(torch_checkpoints, tmp_path):
    step = shutil.copytree(torch_checkpoints / "nemo_rl/step_1", tmp_path / "step_1")
    for name in ("config.yaml", "policy/tokenizer/tokenizer.json", "policy/tokenizer/x/y.txt"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_text(name)
    (step / "train_dataloader.pt").write_text("state")
    wanted = whole_model(torch_checkpoints / "whole_bf16/step_1")
    checkpoint = open_dcp(step / "policy/weights", 1, Naming(frozenset(wanted)))
    assert checkpoint.directory == str(step)
    assert sorted(checkpoint.side_files) == [
        *("config.yaml", "policy/tokenizer/tokenizer.json", "policy/tokenizer/x/y.txt"),
        "policy/weights/.metadata",
    ]
    assert checkpoint.skipped_files == ("train_dataloader.pt",)
    assert_rebuilds(checkpoint, wanted)


def test_a_file_of_another_ranks_state_is_left_out(torch_checkpoints):
    for checkpoint, _ in opened(torch_checkpoints, *RUNS[1]):
        assert "trainer_state.json" in checkpoint.side_files
        # Directories of its own; files are none of its.
        assert [name for name in checkpoint.skipped_files if "optimizer" in name] == [
            "optimizer_0/"
        ]


def test_foreign_tensors_are_left_to_be_complained_of(torch_checkpoints):
    wanted = whole_model(torch_checkpoints / "whole_fp32/step_1")
    path = torch_checkpoints / "torchtitan/step-1"
    fewer = frozenset(wanted) - {"lm_head.weight"}
    assert set(open_dcp(path, 1, Naming(fewer)).tensors) == set(wanted)


def test_names_may_be_mapped(torch_checkpoints):
    path = torch_checkpoints / "alone/plain/step-1"
    wanted = whole_model(torch_checkpoints / "whole_bf16/step_1")
    renamed = {name.replace("model.layers", "blocks"): value for name, value in wanted.items()}
    naming = Naming(frozenset(renamed), replacements=((r"^model\.layers", "blocks"),))
    checkpoint = open_dcp(path, 1, naming)
    assert_holds(checkpoint, renamed)
    assert_rebuilds(checkpoint, renamed)


@pytest.fixture
def damaged(torch_checkpoints, tmp_path):
    """A checkpoint of three ranks to be damaged, and how to open it."""
    path = shutil.copytree(torch_checkpoints / "nemo_rl/step_1/policy/weights", tmp_path / "x")
    wanted = frozenset(whole_model(torch_checkpoints / "whole_bf16/step_1"))
    return path, lambda: open_dcp(path, 1, Naming(wanted))


def test_a_missing_file_is_named(damaged):
    path, open_it = damaged
    (path / "__1_0.distcp").unlink()
    with pytest.raises(SourceError, match=r"__1_0\.distcp: missing, and \.metadata says .*; copy"):
        open_it()


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_a_file_that_is_cut_off_is_named(damaged, kept):
    path, open_it = damaged
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"__1_0\.distcp: truncated: .* bytes where at least"):
        open_it()


def test_a_file_of_another_checkpoint_is_refused(damaged):
    path, open_it = damaged
    (path / "__1_0.distcp").write_bytes(2 * (path / "__0_0.distcp").read_bytes())
    with pytest.raises(SourceError, match=r"__1_0\.distcp, tensor 'model\..*'"):
        open_it()


def test_a_file_that_is_none_is_refused(damaged):
    path, open_it = damaged
    (path / "__1_0.distcp").unlink()
    (path / "__1_0.distcp").mkdir()
    with pytest.raises(SourceError, match="not a regular file"):
        open_it()


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_refused(torch_checkpoints, damaged, lie):
    path, open_it = damaged
    lies = torch_checkpoints / f"lies/{list(LIES).index(lie)}"
    shutil.copy(lies, path / ".metadata")
    with pytest.raises(SourceError, match=LIES[lie]) as caught:
        open_it()
    assert str(path) in str(caught.value)
    assert "; " in str(caught.value)


def test_metadata_that_is_damaged_or_too_long_is_refused(damaged, monkeypatch):
    path, open_it = damaged
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(data[:-10])
    with pytest.raises(SourceError, match=r"\.metadata: bad pickle"):
        open_it()
    monkeypatch.setattr("relex_stream.sources.dcp_metadata.MAX_PICKLE_BYTES", 100)
    with pytest.raises(SourceError, match="more than the 100 that are read; save the model apart"):
        open_it()
    (path / ".metadata").unlink()
    with pytest.raises(SourceError, match=r"\.metadata: cannot be read"):
        open_it()


def test_metadata_is_what_torch_says(torch_checkpoints):
    told = json.loads((torch_checkpoints / "merged/metadata.json").read_text())
    metadata = read_metadata(torch_checkpoints / "prime_rl/checkpoints/step_2/trainer")
    assert {
        key: {tuple(map(tuple, box)) for box in boxes} for key, boxes in told["chunks"].items()
    } == {key: set(map(tuple, tensor.chunks)) for key, tensor in metadata.tensors.items()}
    regions = {region for tensor in metadata.tensors.values() for region in tensor.chunks.values()}
    assert regions | {*metadata.other} == {Region(*place) for place in told["regions"]}
    assert metadata.other


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ("transposed", r"__0_0\.distcp, tensor 'w': its elements do not lie in row-major order"),
        ("quantised", "the weights are quantised: tensor 'w' is F8_E4M3"),
    ],
)
def test_tensors_that_are_not_read_are_refused(torch_checkpoints, run, problem):
    with pytest.raises(SourceError, match=problem):
        open_dcp(torch_checkpoints / f"alone/{run}/step-1", 1, Naming(frozenset({"w", "w_scale"})))


def test_two_parts_of_a_tensor_in_one_safetensors_file_are_refused(torch_checkpoints, monkeypatch):
    # The writer would have put only the second into the file.
    path = torch_checkpoints / "alone/safetensors/step-1"
    metadata = read_metadata(path)
    head = metadata.tensors["lm_head.weight"]
    ((box, region),) = head.chunks.items()
    both = {box: region, Box((13, 0), box.shape): region}
    metadata.tensors["lm_head.weight"] = SavedTensor(head.dtype, (26, 6), both)
    monkeypatch.setattr("relex_stream.sources.dcp.read_metadata", lambda _: metadata)
    with pytest.raises(SourceError, match="holds only one of several parts of a tensor; save"):
        open_dcp(path, 1, Naming(frozenset(metadata.tensors)))


def test_the_models_own_directory_beside_the_weights_is_kept(torch_checkpoints, tmp_path):
    path = shutil.copytree(torch_checkpoints / "alone/plain/step-1", tmp_path / "x")
    (path / "huggingface").mkdir()
    (path / "huggingface/config.json").write_text("{}")
    (path / "elsewhere").mkdir()
    (path / "elsewhere/config.json").write_text("{}")
    (path / "critic").mkdir()
    (path / "critic/value.distcp").write_text("{}")
    wanted = frozenset(whole_model(torch_checkpoints / "whole_bf16/step_1"))
    checkpoint = open_dcp(path, 1, Naming(wanted))
    assert checkpoint.side_files == (
        *(".metadata", "huggingface/config.json", "elsewhere/config.json"),
    )
    assert checkpoint.skipped_files == ("critic/",)


def test_a_safetensors_file_of_other_tensors_is_refused(torch_checkpoints, tmp_path):
    path = shutil.copytree(torch_checkpoints / "alone/safetensors/step-1", tmp_path / "x")
    shutil.copy(torch_checkpoints / "whole_fp32/step_1/model.safetensors", path / "__0_0.distcp")
    wanted = frozenset(whole_model(torch_checkpoints / "whole_bf16/step_1"))
    with pytest.raises(SourceError, match=r"does not hold the part of tensor '.*' that \.metadata"):
        open_dcp(path, 1, Naming(wanted))


def test_what_is_megatrons_is_not_taken_for_a_models(torch_checkpoints, tmp_path):
    assert not holds_dcp(tmp_path / "none")
    path = shutil.copytree(torch_checkpoints / "alone/plain/step-1", tmp_path / "x")
    assert holds_dcp(path)
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert not holds_dcp(path)
    (path / "metadata.json").write_text("{}")
    assert holds_dcp(path)
    (path / "common.pt").touch()
    assert not holds_dcp(path)


def test_reading_needs_no_torch():
    code = "import sys, relex_stream.sources; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
