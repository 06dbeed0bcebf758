"""Shapes of large models, and checkpoints of them: real headers, and holes for weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.trajectory import PRESETS, Preset, Shapes


@dataclass(frozen=True)
class Model:
    """The shape of a bf16 model.

    Attributes
    ----------
    name : str
    shapes : dict
        Shapes by name, as they lie in the files.
    shard_bytes : int
        Most bytes of tensors in a weights file.
    """

    name: str
    shapes: Shapes
    shard_bytes: int = 5_000_000_000

    @cached_property
    def weights(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return 2 * self.weights


def _llama_3(*, hidden: int, inner: int, layers: int, heads: int) -> Shapes:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    }
    return Preset("llama-3", config, steps=0).shapes


def mixture_shapes(
    *,
    hidden: int,
    inner: int,
    dense_inner: int,
    layers: int,
    experts: int,
    heads: int,
    vocabulary: int,
) -> Shapes:
    """Return a mixture of experts with compressed attention, like DeepSeek-V3 and Kimi-K2."""
    q_rank, kv_rank, plain, rotary, value = 1536, 512, 128, 64, 128
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}

    def add_mlp(prefix: str, width: int) -> None:
        shapes[prefix + "gate_proj.weight"] = (width, hidden)
        shapes[prefix + "up_proj.weight"] = (width, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, width)

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes[attention + "q_a_proj.weight"] = (q_rank, hidden)
        shapes[attention + "q_a_layernorm.weight"] = (q_rank,)
        shapes[attention + "q_b_proj.weight"] = (heads * (plain + rotary), q_rank)
        shapes[attention + "kv_a_proj_with_mqa.weight"] = (kv_rank + rotary, hidden)
        shapes[attention + "kv_a_layernorm.weight"] = (kv_rank,)
        shapes[attention + "kv_b_proj.weight"] = (heads * (plain + value), kv_rank)
        shapes[attention + "o_proj.weight"] = (hidden, heads * value)
        if layer == 0:
            add_mlp(prefix + "mlp.", dense_inner)
        else:
            shapes[prefix + "mlp.gate.weight"] = (experts, hidden)
            shapes[prefix + "mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                add_mlp(f"{prefix}mlp.experts.{expert}.", inner)
            add_mlp(prefix + "mlp.shared_experts.", inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


MODELS: dict[str, Callable[[], Model]] = {
    "tiny": lambda: Model("tiny", PRESETS["tiny"].shapes, 200_000),
    "8B": lambda: Model("8B", PRESETS["qwen3-8b"].shapes, PRESETS["qwen3-8b"].shard_bytes),
    "70B": lambda: Model("70B", _llama_3(hidden=8192, inner=28_672, layers=80, heads=64)),
    "405B": lambda: Model("405B", _llama_3(hidden=16_384, inner=53_248, layers=126, heads=128)),
    "1T": lambda: Model(
        "1T",
        mixture_shapes(
            hidden=7168,
            inner=2048,
            dense_inner=18_432,
            layers=61,
            experts=384,
            heads=64,
            vocabulary=163_840,
        ),
    ),
}
"""Qwen3-8B, Llama-3-70B, Llama-3.1-405B, and a mixture like Kimi-K2; one for the tests."""


def shards(model: Model) -> list[Shapes]:
    """Return what each weights file holds, in the model's order."""
    files: list[Shapes] = [{}]
    size = 0
    for name, shape in model.shapes.items():
        nbytes = 2 * math.prod(shape)
        if files[-1] and size + nbytes > model.shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += nbytes
    return files


def write_hollow(model: Model, directory: Path) -> None:
    """Write a checkpoint with real headers and holes in place of weights."""
    directory.mkdir(parents=True)
    files = shards(model)
    weight_map = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            name = "model.safetensors"
        header, offset = {}, 0
        for tensor, shape in shapes.items():
            end = offset + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor] = name
            offset = end
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 8)
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + offset)
    if len(files) > 1:
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
