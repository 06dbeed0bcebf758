"""Weights that are not read, each with what to run first."""

from __future__ import annotations

import pytest

from relex_stream.errors import SourceError
from relex_stream.sources import find_checkpoints, open_checkpoint
from relex_stream.sources.recognised import recognise_weights, refuse_adapter

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'

OTHERS = [
    # files of a step (a name, or a name and its text), what is said
    (["adapter_model.safetensors", "adapter_config.json"], "an adapter .*; merge it into its base"),
    (["iter_0000005/common.pt"], "a Megatron distributed checkpoint .*iter_0000005; convert it"),
    (["actor/dist_ckpt/metadata.json=" + METADATA, "actor/dist_ckpt/.metadata"], "Megatron distr"),
    (["policy/weights/iter_0000000/metadata.json=" + METADATA], "NeMo-RL's convert_megatron_to_hf"),
    (["mp_rank_00/model_optim_rng.pt"], "Megatron shards .*verl's model merger"),
    (
        ["global_step5/mp_rank_00_model_states.pt"],
        "DeepSpeed shards .*global_step5; run the zero_t",
    ),
    (["global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO shards .*zero_to_fp32.py"),
    (
        ["global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "ZeRO shards .*--safe_serial",
    ),
    (["__0.metadata", "__0_0.distcp"], "each rank described on its own"),
    (["__0_0.distcp"], "a PyTorch distributed checkpoint .*; merge to safetensors first"),
    (["model-00001-of-00002.safetensors"], "shards without their index"),
    (["policy.safetensors"], "other safetensors files .*name the model's file model.safetensors"),
    (["model-q4.gguf"], "a GGUF model .*; use the safetensors it was made from"),
    (["pytorch_model.bin"], "PyTorch weights .*; convert to safetensors first"),
    (["pytorch_model_fsdp.bin"], "PyTorch weights"),
    (["model.pth"], "PyTorch files"),
]


@pytest.mark.parametrize(("files", "said"), OTHERS)
def test_a_checkpoint_in_another_format_is_refused_with_the_remedy(tmp_path, files, said):
    for file in files:
        name, _, text = file.partition("=")
        path = tmp_path / "step_5" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(SourceError, match=rf"step_5: no weights: found .*{said}"):
        find_checkpoints(tmp_path)


def test_deepspeeds_own_directories_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "_actor/global_step5").mkdir(parents=True)
    (tmp_path / "_actor/global_step5/mp_rank_00_model_states.pt").touch()
    with pytest.raises(SourceError, match=r"global_step5: .*DeepSpeed shards.*zero_to_fp32"):
        find_checkpoints(tmp_path / "_actor")


@pytest.mark.parametrize(("files", "said"), [case for case in OTHERS if "/" not in case[0][0]])
def test_a_base_in_another_format_is_refused_with_the_remedy(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match=rf"no safetensors weights: .*{said}"):
        open_checkpoint(tmp_path, 0)


def test_what_is_no_weights_is_not_recognised(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    assert recognise_weights(tmp_path) is None
    (tmp_path / "metadata.json").unlink()
    (tmp_path / "metadata.json").mkdir()
    assert recognise_weights(tmp_path) is None
    assert recognise_weights(tmp_path / "none") is None


def test_tensors_of_an_adapter_are_refused(tmp_path):
    refuse_adapter(tmp_path, ["model.layers.0.weight", "flora_x.weight"])
    with pytest.raises(SourceError, match=r"'q.lora_A.weight' belongs to an adapter.*; merge it"):
        refuse_adapter(tmp_path, ["x", "q.lora_A.weight"])
