"""Quantised models, which are refused, and what merely has tensors like theirs."""

from __future__ import annotations

import json

import pytest

from relex_stream.errors import SourceError
from relex_stream.sources import Naming, open_checkpoint
from relex_stream.sources.split_safetensors import open_split
from tests.make_checkpoints import write_model, write_safetensors


def model(path, tensors, quantization=None):
    """Write a model of tensors of one element, given as name to dtype."""
    sizes = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}
    raw = {name: (code, (1,), bytes(sizes.get(code, 1))) for name, code in tensors.items()}
    write_model(path, {"model.norm.weight": ("BF16", (1,), bytes(2)), **raw}, config=False)
    config = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"}, "FP8 with a scale per block"),
        ({"experts.up_proj": "F8_E4M3", "experts.up_proj_scale_inv": "F32"}, "FP8 with a scale"),
        ({"q.weight": "F8_E4M3", "q.weight_scale": "F32"}, "FP8 or integers with scales"),
        ({"q.weight": "U8", "q.weight_scale": "F8_E4M3"}, "FP8 or integers with scales"),
        ({"mlp.up_blocks": "U8", "mlp.up_scales": "U8"}, "MXFP4"),
        ({"q.qweight": "I32", "q.qzeros": "I32", "q.scales": "BF16"}, "GPTQ or AWQ"),
        ({"q.weight_packed": "I32", "q.weight_scale": "BF16"}, "compressed-tensors"),
        ({"q.weight": "U8", "q.weight.absmax": "F32"}, "4-bit weights of bitsandbytes"),
        ({"q.weight": "I8", "q.SCB": "F32"}, "8-bit weights of bitsandbytes"),
    ],
)
def test_refused(tmp_path, tensors, kind):
    directory = model(tmp_path / "model", tensors)
    with pytest.raises(SourceError, match=rf"model: the weights are quantised: .*{kind}.*; dequan"):
        open_checkpoint(directory, 0)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32"])
def test_refused_if_the_configuration_says_so(tmp_path, code):
    directory = model(tmp_path / "model", {"q.weight": code}, {"quant_method": "new"})
    with pytest.raises(SourceError, match=rf"'q.weight' is {code} \('new', says config.json\)"):
        open_checkpoint(directory, 0)


@pytest.mark.parametrize(
    ("tensors", "quantization"),
    [
        ({"q.weight": "BF16", "ids": "I64"}, {"quant_method": "left over"}),
        ({"q.weight": "F8_E4M3"}, None),
        ({"ids": "I32", "mask": "U8"}, None),
        ({"q.weight": "BF16", "q.weight_scale": "F32"}, None),
        ({"text_blocks": "U8"}, None),
        ({"mask": "U8"}, "not an object"),
    ],
)
def test_taken(tmp_path, tensors, quantization):
    directory = model(tmp_path / "model", tensors, quantization)
    assert set(tensors) <= set(open_checkpoint(directory, 0).tensors)


def test_split_checkpoints_are_looked_at_too(tmp_path):
    info = {
        "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0]} for name in ("q", "q_scale")})
    }
    tensors = {"q": ("F8_E4M3", (1,), b"a"), "q_scale": ("F32", (1,), bytes(4))}
    write_safetensors(tmp_path / "shard-00001-model-00001-of-00001.safetensors", tensors, info)
    with pytest.raises(SourceError, match="the weights are quantised"):
        open_split(tmp_path, 1, Naming())


def test_a_configuration_that_cannot_be_read_says_nothing(tmp_path):
    directory = model(tmp_path / "model", {"mask": "U8"})
    (directory / "config.json").write_text("{")
    assert open_checkpoint(directory, 0).tensors
    (directory / "config.json").unlink()
    assert open_checkpoint(directory, 0).tensors
    with (directory / "config.json").open("wb") as file:
        file.truncate(20 << 20)
    assert open_checkpoint(directory, 0).tensors
