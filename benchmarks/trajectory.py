"""The ``trajectory`` command: synthetic checkpoints of any size, in the layout of Hugging Face.

A weight's float32 master starts at a value of its own and moves, at each step, by the learning rate
times a constant drift plus noise, clipped to two as Adam bounds it. What is saved is the master, or
its rounding to bf16, where most moves are too small to show: about 0.5 % of the weights change per
step, as in reinforcement learning of large models (arXiv 2602.03839).

Values and noise are hashes of seed, tensor, element and step. So a weight at a step depends on
nothing else, no master is ever stored, and any block of any step can be made alone: it is replayed
from the base in memory that holds one block. The same seed gives the same bits everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import BenchmarkError
from relex_stream.kernels import kernel
from relex_stream.machine import usable_cores

Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]
Shapes = dict[str, tuple[int, ...]]

BLOCK_ELEMENTS = 1 << 17
"""Elements replayed at a time: master, drift and rounded copy fit a core's second-level cache."""

LEARNING_RATE = 8.5e-8
"""At this 0.4 to 0.6 % of bf16 weights change per step, in every preset."""

_STEPS_AT_ONCE = 256
"""Files that are open at the same time, well under the usual limit of 1024."""

_ITEM_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Preset:
    """The shape of a model.

    Attributes
    ----------
    config : mapping
        What ``config.json`` holds; the tensors follow from it.
    steps : int
        Checkpoints that are written unless told otherwise.
    shard_bytes : int
        Largest weights file; a model that fits one is not sharded.
    """

    name: str
    config: Mapping[str, Any]
    steps: int
    shard_bytes: int = 5_000_000_000

    @property
    def shapes(self) -> Shapes:
        """Shapes of all tensors, in the model's order."""
        return _shapes(self.config)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(_size(shape) for shape in self.shapes.values())


def _shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a Llama, Qwen2, Qwen3 or Qwen3-MoE model as they lie in its files."""
    kind, hidden = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        for name, rows in (
            ("q_proj", heads * head_dim),
            ("k_proj", kv_heads * head_dim),
            ("v_proj", kv_heads * head_dim),
        ):
            shapes[f"{attention}{name}.weight"] = (rows, hidden)
            if kind == "qwen2":
                shapes[f"{attention}{name}.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, heads * head_dim)
        if kind in ("qwen3", "qwen3_moe"):
            shapes[attention + "q_norm.weight"] = (head_dim,)
            shapes[attention + "k_norm.weight"] = (head_dim,)
        if kind == "qwen3_moe":
            shapes[prefix + "mlp.gate.weight"] = (config["num_experts"], hidden)
            modules = [f"{prefix}mlp.experts.{expert}." for expert in range(config["num_experts"])]
            inner = config["moe_intermediate_size"]
        else:
            modules, inner = [prefix + "mlp."], config["intermediate_size"]
        for module in modules:
            shapes[module + "gate_proj.weight"] = (inner, hidden)
            shapes[module + "up_proj.weight"] = (inner, hidden)
            shapes[module + "down_proj.weight"] = (hidden, inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _config(model_type: str, **fields: Any) -> dict[str, Any]:
    classes = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
    }
    common = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
    }
    return {
        "architectures": [classes[model_type]],
        "model_type": model_type,
        **dict(sorted((common | fields).items())),
    }


def _llama(*, hidden: int, layers: int, kv_heads: int) -> dict[str, Any]:
    return _config(
        "llama",
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        head_dim=64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        max_position_embeddings=4096,
        mlp_bias=False,
        num_attention_heads=hidden // 64,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        vocab_size=32000,
    )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            _config(
                "qwen2",
                bos_token_id=1,
                eos_token_id=2,
                hidden_size=96,
                intermediate_size=256,
                max_position_embeddings=512,
                max_window_layers=3,
                num_attention_heads=4,
                num_hidden_layers=3,
                num_key_value_heads=2,
                rope_theta=10000.0,
                tie_word_embeddings=True,
                use_sliding_window=False,
                vocab_size=512,
            ),
            steps=6,
        ),
        Preset("40m", _llama(hidden=512, layers=8, kv_heads=2), steps=50),
        Preset(
            "qwen2.5-0.5b",
            _config(
                "qwen2",
                bos_token_id=151643,
                eos_token_id=151643,
                hidden_size=896,
                intermediate_size=4864,
                max_position_embeddings=32768,
                max_window_layers=24,
                num_attention_heads=14,
                num_hidden_layers=24,
                num_key_value_heads=2,
                rope_theta=1000000.0,
                sliding_window=32768,
                tie_word_embeddings=True,
                use_mrope=False,
                use_sliding_window=False,
                vocab_size=151936,
            ),
            steps=16,
        ),
        Preset(
            "qwen3-8b",
            _config(
                "qwen3",
                attention_bias=False,
                bos_token_id=151643,
                eos_token_id=151645,
                head_dim=128,
                hidden_size=4096,
                intermediate_size=12288,
                max_position_embeddings=40960,
                max_window_layers=36,
                num_attention_heads=32,
                num_hidden_layers=36,
                num_key_value_heads=8,
                rope_scaling=None,
                rope_theta=1000000,
                sliding_window=None,
                tie_word_embeddings=False,
                use_sliding_window=False,
                vocab_size=151936,
            ),
            steps=6,
            # As published: five files, the last with the output head alone.
            shard_bytes=4_000_000_000,
        ),
        Preset(
            "moe-30k",
            _config(
                "qwen3_moe",
                attention_bias=False,
                bos_token_id=1,
                decoder_sparse_step=1,
                eos_token_id=2,
                head_dim=64,
                hidden_size=256,
                intermediate_size=768,
                max_position_embeddings=4096,
                max_window_layers=48,
                mlp_only_layers=[],
                moe_intermediate_size=128,
                norm_topk_prob=True,
                num_attention_heads=4,
                num_experts=208,
                num_experts_per_tok=8,
                num_hidden_layers=48,
                num_key_value_heads=2,
                output_router_logits=False,
                rope_scaling=None,
                rope_theta=1000000.0,
                router_aux_loss_coef=0.001,
                sliding_window=None,
                tie_word_embeddings=True,
                use_sliding_window=False,
                vocab_size=32000,
            ),
            steps=4,
        ),
    )
}
"""By name. The two of Qwen have the shapes of the published models; the others are made up."""


def preset_of_size(weights: float) -> Preset:
    """Return a Llama of about so many weights, for curves against size.

    Width grows with the cube root of the size, and depth makes up the rest.

    >>> [f"{preset_of_size(size).weights:,}" for size in (2e6, 20e6, 1e9, 8e9)]
    ['2,102,592', '20,084,352', '1,004,924,096', '7,977,525,824']
    """
    hidden = 64 * max(1, round(8 * (weights / 40e6) ** (1 / 3)))
    # A small model would be all embedding.
    vocabulary = min(32000, 64 * max(1, round(weights / 3 / hidden / 64)))
    per_layer = 13 * hidden**2 + 2 * hidden
    layers = max(1, round((weights - vocabulary * hidden) / per_layer))
    config = _llama(hidden=hidden, layers=layers, kv_heads=hidden // 64)
    config["vocab_size"] = vocabulary
    return Preset(f"llama-{weights:.3g}", config, steps=10)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


# --- Weights as a function of seed, tensor, element and step.


@kernel
def _hash(element: Any, first_key: Any, second_key: Any) -> Any:
    """Return 32 bits of an element; each pair of keys gives another, independent stream.

    The multipliers and shifts are Wellons' low-bias ones. All arithmetic is in 32 bits, so that
    the loops around this become vector instructions.
    """
    bits = element ^ first_key
    bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))
    bits = np.uint32(bits * np.uint32(0x7FEB352D))
    # A second key in the middle: with the first alone, streams would be reorderings of one another.
    bits = np.uint32(bits ^ second_key)
    bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(15)))
    bits = np.uint32(bits * np.uint32(0x846CA68B))
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))


@kernel
def _start(values: Float32, first: int, keys: UInt32, mean: Any, deviation: Any) -> None:
    """Fill with the values of elements from `first` on: sums of four uniform numbers."""
    # Four uniform 32-bit integers have this standard deviation together.
    scale = deviation * np.float32(3**0.5 / 2**32)
    a, b, c, d, e, f, g, h = keys
    for index in range(values.size):
        element = np.uint32(first + index)
        total = np.float32(np.int32(_hash(element, a, b)))
        total += np.float32(np.int32(_hash(element, c, d)))
        total += np.float32(np.int32(_hash(element, e, f)))
        total += np.float32(np.int32(_hash(element, g, h)))
        values[index] = mean + scale * total


@kernel
def _advance(values: Float32, drifts: Float32, first: int, keys: UInt32, rate: Any) -> None:
    """Move elements from `first` on by one step."""
    # The sum of a hash's four bytes is nearly normal: mean 510, standard deviation 147.8.
    scale = np.float32(1 / 147.8)
    least, most = np.float32(-2), np.float32(2)
    first_key, second_key = keys[0], keys[1]
    for index in range(values.size):
        bits = _hash(np.uint32(first + index), first_key, second_key)
        pairs = np.uint32(
            np.uint32(bits & np.uint32(0xFF00FF))
            + np.uint32(np.uint32(bits >> np.uint32(8)) & np.uint32(0xFF00FF))
        )
        total = np.uint32(np.uint32(pairs & np.uint32(0xFFFF)) + np.uint32(pairs >> np.uint32(16)))
        move = drifts[index] + scale * np.float32(np.int32(total) - np.int32(510))
        values[index] += rate * min(max(move, least), most)


@kernel
def _round(patterns: UInt32, rounded: NDArray[np.uint16]) -> None:
    """Round float32 patterns (of finite numbers) to bf16, to nearest even."""
    for index in range(patterns.size):
        bits = patterns[index]
        even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded[index] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


def _keys(seed: int, name: str, use: str, streams: int = 1) -> UInt32:
    text = f"{seed}/{use}/{name}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * streams).digest(), "<u4")


def _distribution(name: str) -> tuple[np.float32, np.float32]:
    """Return mean and standard deviation of a tensor's values."""
    if "norm" in name:
        return np.float32(1), np.float32(0.1)
    return np.float32(0), np.float32(0.1 if name.endswith(".bias") else 0.02)


@dataclass(frozen=True)
class Part:
    """A run of a tensor's elements."""

    name: str
    first: int
    count: int


class Replay:
    """Masters of some parts, moved on step by step.

    Parameters
    ----------
    capacity : int
        Most elements that are held at a time; the buffers are made once.
    """

    def __init__(self, seed: int, capacity: int, learning_rate: float = LEARNING_RATE) -> None:
        self._seed = seed
        self._rate = np.float32(learning_rate)
        self._values = np.empty(capacity, np.float32)
        self._drifts = np.empty(capacity, np.float32)
        self._rounded = np.empty(capacity, np.uint16)
        self._parts: list[tuple[Part, Float32, Float32]] = []
        self._count = self._step = 0

    def start(self, parts: Iterable[Part], *, drifts: bool = True) -> None:
        """Take up parts, at step 0. Without drifts they stay there."""
        self._parts.clear()
        self._count = self._step = 0
        for part in parts:
            place = slice(self._count, self._count + part.count)
            held = (part, self._values[place], self._drifts[place])
            # Not the base rounded to bf16: masters in the middle of their rounding interval would
            # all have far to go, and next to nothing would change in the first steps.
            _start(
                held[1],
                part.first,
                _keys(self._seed, part.name, "base", 4),
                *_distribution(part.name),
            )
            if drifts:
                keys = _keys(self._seed, part.name, "drift", 4)
                _start(held[2], part.first, keys, np.float32(0), np.float32(1))
            self._parts.append(held)
            self._count += part.count

    def advance(self, step: int) -> None:
        """Move on to a step."""
        while self._step < step:
            self._step += 1
            for part, values, drifts in self._parts:
                keys = _keys(self._seed, part.name, str(self._step))
                _advance(values, drifts, part.first, keys, self._rate)

    def masters(self) -> Float32:
        """Return the values now, a view that the next step overwrites."""
        return self._values[: self._count]

    def bf16(self) -> NDArray[np.uint16]:
        """Return the bit patterns of the values rounded to bf16, a view as above."""
        rounded = self._rounded[: self._count]
        _round(self.masters().view(np.uint32), rounded)
        return rounded

    def saved(self, dtype: str) -> NDArray[Any]:
        """Return what a file holds."""
        return self.bf16() if dtype == "bf16" else self.masters()


def weights(name: str, step: int, start: int, stop: int, *, seed: int = 0) -> Float32:
    """Return masters of elements ``start`` to ``stop`` of a tensor at a step."""
    replay = Replay(seed, stop - start)
    replay.start([Part(name, start, stop - start)])
    replay.advance(step)
    return replay.masters()


def changed_share(
    preset: Preset, step: int = 1, *, seed: int = 0, sample: int = 4_000_000, dtype: str = "bf16"
) -> float:
    """Return the share of saved weights that a step changes, from blocks spread over the model."""
    pieces = [piece for shard in _shards(preset, dtype) for piece in shard.pieces()]
    stride = max(1, preset.weights // sample)
    changed = total = 0
    replay = Replay(seed, BLOCK_ELEMENTS)
    for piece in pieces[::stride]:
        replay.start(piece.parts)
        replay.advance(step - 1)
        before = replay.saved(dtype).copy()
        replay.advance(step)
        changed += int(np.count_nonzero(before != replay.saved(dtype)))
        total += before.size
    return changed / total


# --- Files.


@dataclass(frozen=True)
class _Piece:
    """Parts that lie one after another in a file."""

    offset: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Shard:
    """One safetensors file; tensors in the order of their names, as the library writes them."""

    file_name: str
    tensors: Shapes
    dtype: str

    @property
    def data_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * sum(_size(shape) for shape in self.tensors.values())

    def header(self) -> bytes:
        code = {"bf16": "BF16", "fp32": "F32"}[self.dtype]
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self.tensors.items():
            end = offset + _ITEM_BYTES[self.dtype] * _size(shape)
            entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def pieces(self) -> Iterator[_Piece]:
        """Cut the data into pieces of one block; small tensors share one."""
        offset = count = 0
        parts: list[Part] = []
        for name, shape in self.tensors.items():
            first, size = 0, _size(shape)
            while first < size:
                length = min(size - first, BLOCK_ELEMENTS - count)
                parts.append(Part(name, first, length))
                first += length
                count += length
                if count == BLOCK_ELEMENTS:
                    yield _Piece(offset, tuple(parts))
                    offset += _ITEM_BYTES[self.dtype] * count
                    count = 0
                    parts = []
        if parts:
            yield _Piece(offset, tuple(parts))


def _shards(preset: Preset, dtype: str) -> list[_Shard]:
    """Fill files in the model's order, each as far as it goes."""
    groups: list[Shapes] = [{}]
    filled = 0
    for name, shape in preset.shapes.items():
        if _size(shape) >= 2**32:
            raise BenchmarkError(f"{name}: {shape} has more elements than the noise can number")
        size = _ITEM_BYTES[dtype] * _size(shape)
        if groups[-1] and filled + size > preset.shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    return [
        _Shard(
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05}-of-{len(groups):05}.safetensors",
            dict(sorted(group.items())),
            dtype,
        )
        for number, group in enumerate(groups, 1)
    ]


def step_directory(out: Path, step: int) -> Path:
    """Return where a step's model lies; step 0 is the base."""
    return out / "base" if step == 0 else out / "checkpoints" / f"global_step_{step}"


def write_base(
    out: Path, preset: Preset, *, seed: int = 0, dtype: str = "bf16", threads: int | None = None
) -> Path:
    """Write ``OUT/base``."""
    return write_steps(out, preset, [0], seed=seed, dtype=dtype, threads=threads)[0]


def write_step(
    out: Path,
    preset: Preset,
    step: int,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    threads: int | None = None,
) -> Path:
    """Write ``OUT/checkpoints/global_step_N``, replayed from the base, which need not be there."""
    return write_steps(out, preset, [step], seed=seed, dtype=dtype, threads=threads)[0]


def write_steps(
    out: Path,
    preset: Preset,
    steps: Sequence[int],
    *,
    seed: int = 0,
    dtype: str = "bf16",
    threads: int | None = None,
) -> list[Path]:
    """Write several steps in one pass over the weights.

    Parameters
    ----------
    steps : sequence of int
        0 stands for the base.
    dtype : str
        ``bf16`` or ``fp32``.
    threads : int, optional
        One per core if not given.

    Returns
    -------
    list of Path
        The models' directories. Each gets its name when it is whole and on the disk.

    Raises
    ------
    BenchmarkError
        If one of them exists or the disk has too little room.
    """
    shards = _shards(preset, dtype)
    directories = [step_directory(out, step) for step in steps]
    for directory in directories:
        if directory.exists():
            raise BenchmarkError(f"{directory} exists; delete it or take another directory")
    out.mkdir(parents=True, exist_ok=True)
    needed = len(steps) * sum(shard.data_bytes for shard in shards)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise BenchmarkError(
            f"{out}: {needed / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free; write single steps "
            "with --only-step, and delete each when it has served"
        )
    ordered = sorted(steps)
    for first in range(0, len(ordered), _STEPS_AT_ONCE):
        _write_group(
            out,
            preset,
            shards,
            ordered[first : first + _STEPS_AT_ONCE],
            seed=seed,
            threads=threads or usable_cores(),
        )
    return directories


def _write_group(
    out: Path,
    preset: Preset,
    shards: Sequence[_Shard],
    steps: Sequence[int],
    *,
    seed: int,
    threads: int,
) -> None:
    partial = {}
    for step in steps:
        directory = step_directory(out, step)
        partial[step] = directory.with_name(f".{directory.name}.partial")
    try:
        for directory in partial.values():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            _write_side_files(directory, preset, shards)
        for shard in shards:
            with contextlib.ExitStack() as stack:
                files = {}
                for step, directory in partial.items():
                    file = stack.enter_context((directory / shard.file_name).open("wb"))
                    files[step] = file.fileno()
                _write_shard(shard, files, seed=seed, threads=threads)
    except BaseException:
        for directory in partial.values():
            shutil.rmtree(directory, ignore_errors=True)
        raise
    for step, directory in partial.items():
        directory.rename(step_directory(out, step))


def _write_shard(shard: _Shard, files: Mapping[int, int], *, seed: int, threads: int) -> None:
    """Write a shard of several steps, given as open files by step, block by block."""
    header = shard.header()
    for descriptor in files.values():
        _write_all(descriptor, memoryview(header), 0)
    pieces = shard.pieces()
    taking = threading.Lock()
    stopped = threading.Event()

    def work() -> None:
        replay = Replay(seed, BLOCK_ELEMENTS)
        while not stopped.is_set():
            with taking:
                piece = next(pieces, None)
            if piece is None:
                return
            replay.start(piece.parts, drifts=max(files) > 0)
            for step, descriptor in files.items():
                replay.advance(step)
                _write_all(descriptor, replay.saved(shard.dtype).data, len(header) + piece.offset)

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            stopped.set()
    for descriptor in files.values():
        # Or the disk would still be busy with these when something is measured on them.
        os.fsync(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    rest = data.cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest = rest[written:]
        offset += written


def _write_side_files(directory: Path, preset: Preset, shards: Sequence[_Shard]) -> None:
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[shards[0].dtype]
    _write_json(directory / "config.json", dict(preset.config) | {"torch_dtype": dtype})
    generation = {name: preset.config[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", generation | {"do_sample": False})
    if len(shards) > 1:
        places = {name: shard.file_name for shard in shards for name in shard.tensors}
        total = sum(shard.data_bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- The command.


def _claim(out: Path, preset: Preset, *, seed: int, dtype: str) -> None:
    """Note what a directory holds; refuse to mix two trajectories in it."""
    wanted = {
        "preset": preset.name,
        "weights": preset.weights,
        "dtype": dtype,
        "seed": seed,
        "learning_rate": LEARNING_RATE,
    }
    path = out / "trajectory.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            raise BenchmarkError(f"{out} holds another trajectory: {found}; wanted: {wanted}")
        return
    if out.exists() and any(out.iterdir()):
        raise BenchmarkError(f"{out} is not empty and holds no trajectory; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, wanted)


@click.command("trajectory", context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default="40m")
@click.option("--steps", type=click.IntRange(min=0), help="Last step.  [default: the preset's]")
@click.option("--first-step", type=click.IntRange(min=1), default=1)
@click.option(
    "--only-step",
    "only_steps",
    type=click.IntRange(min=1),
    multiple=True,
    help="Write this step and no other, besides the base; may be repeated.",
)
@click.option("--dtype", type=click.Choice(list(_ITEM_BYTES)), default="bf16")
@click.option("--seed", type=int, default=0)
def command(
    out: Path,
    *,
    preset_name: str,
    steps: int | None,
    first_step: int,
    only_steps: tuple[int, ...],
    dtype: str,
    seed: int,
) -> None:
    """Write OUT/base and OUT/checkpoints/global_step_N.

    What is there already stays: run it again to add steps.
    """
    preset = PRESETS[preset_name]
    _claim(out, preset, seed=seed, dtype=dtype)
    last = preset.steps if steps is None else steps
    wanted = [0, *(only_steps or range(first_step, last + 1))]
    missing = sorted({step for step in wanted if not step_directory(out, step).exists()})
    started = time.perf_counter()
    write_steps(out, preset, missing, seed=seed, dtype=dtype)
    share = changed_share(preset, max(1, *wanted), seed=seed, dtype=dtype)
    click.echo(
        f"{preset.weights:,} {dtype} weights in {len(preset.shapes):,} tensors: "
        f"{len(missing)} models written in {time.perf_counter() - started:.1f} s; "
        f"{100 * share:.2f} % of the weights change per step"
    )
