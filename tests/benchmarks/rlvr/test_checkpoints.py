"""The bf16 image of a float32 policy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.rlvr.checkpoints import RoundedCopy
from benchmarks.rlvr.tasks import TASKS
from benchmarks.rlvr.training import build_model
from relex_stream.demo.task import build_tokenizer


@pytest.fixture
def masters(tiny):
    torch.manual_seed(0)
    return build_model(tiny)


@pytest.fixture
def rounded(masters, tiny):
    return RoundedCopy(masters, build_tokenizer(TASKS[tiny.task].symbols))


def test_the_share_counts_weights_whose_rounding_changed(masters, rounded):
    assert rounded.refresh() == 0
    norm = masters.model.norm.weight
    with torch.no_grad():
        norm[:4] += 1.0
        norm[4] += 1e-6  # far less than bf16 resolves
    total = sum(parameter.numel() for parameter in masters.parameters())
    assert rounded.refresh() == 4 / total
    assert rounded.refresh() == 0


def test_masters_can_start_from_what_is_saved(masters, rounded):
    assert any((p != p.bfloat16().float()).any() for p in masters.parameters())
    rounded.widen_into_masters()
    assert all(torch.equal(p, p.bfloat16().float()) for p in masters.parameters())
    assert rounded.refresh() == 0


def test_a_checkpoint_holds_the_rounded_weights_and_a_tokenizer(masters, rounded, tmp_path):
    rounded.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in masters.named_parameters():
        assert torch.equal(saved[name], parameter.detach().bfloat16())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
