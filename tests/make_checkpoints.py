"""Tiny checkpoints for tests: safetensors files byte by byte, model directories, trajectories.

Nothing here uses the code under test. Tensors are given as ``{name: (dtype code, shape, bytes)}``,
so that bf16, empty tensors and odd layouts need no special case and no torch.

Examples
--------
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     run = make_trajectory(Path(folder), steps=(1, 2), tensors={"w": (3, 5)})
...     sorted(path.name for path in run.checkpoints.iterdir()), run.bits[2]["w"].shape
(['global_step_1', 'global_step_2'], (3, 5))
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RawTensor = tuple[str, Sequence[int], bytes]
"""A tensor as it lies in a file: safetensors dtype code, shape, bytes."""

Bits = NDArray[Any]
"""Bit patterns of weights: uint16 for BF16 and F16, uint32 for F32, in the tensor's shape."""

DEFAULT_SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 24),
    "model.layers.0.mlp.weight": (300, 512),  # over 64 Ki elements: large enough for a sketch
    "model.layers.0.mlp.bias": (10007,),  # prime: no block size divides it
    "model.layers.0.norm.weight": (24,),
    "scale": (),
    "unused": (0, 4),
}
"""Shapes that `make_trajectory` uses when told none; ``norm`` tensors never change."""

SIDE_FILES: dict[str, str] = {
    "config.json": '{\n  "architectures": ["TinyForCausalLM"],\n  "model_type": "tiny"\n}\n',
    "generation_config.json": '{\n  "eos_token_id": 1\n}\n',
    "tokenizer_config.json": '{\n  "model_max_length": 32\n}\n',
}
"""Small files written next to the weights, by name."""


def write_safetensors(
    path: Path,
    tensors: Mapping[str, RawTensor],
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    padding: int | None = None,
) -> Path:
    """Write a safetensors file byte by byte.

    Parameters
    ----------
    path : Path
        The file to write; its parents are made.
    tensors : mapping
        Tensors in the order their names take in the header.
    metadata : mapping, optional
        The header's ``__metadata__``; written first, as the official writer does.
    order : sequence of str, optional
        Order of the tensors' bytes in the file, where it differs from the header's.
    padding : int, optional
        Spaces after the header. By default as many as align the data to 8 bytes.

    Returns
    -------
    Path
        `path`.
    """
    offsets: dict[str, list[int]] = {}
    end = 0
    for name in tensors if order is None else order:
        offsets[name] = [end, end + len(tensors[name][2])]
        end = offsets[name][1]
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, (dtype, shape, _) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets[name]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if padding is None else padding)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in offsets:
            file.write(tensors[name][2])
    return path


def write_model(
    directory: Path,
    tensors: Mapping[str, RawTensor],
    shards: int = 1,
    config: bool = True,
) -> Path:
    """Write a Hugging Face model directory.

    Parameters
    ----------
    directory : Path
        The directory to write; it is made with its parents.
    tensors : mapping
        All tensors of the model.
    shards : int
        1 writes ``model.safetensors``; more deal the tensors out in turn to
        ``model-0000i-of-0000n.safetensors`` and write the index. A shard may hold no tensor.
    config : bool
        Whether to write `SIDE_FILES` too.

    Returns
    -------
    Path
        `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config:
        for name, text in SIDE_FILES.items():
            (directory / name).write_text(text, encoding="utf-8")
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for index in range(shards):
        part = dict(list(tensors.items())[index::shards])
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(directory / name, part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    total = sum(len(data) for _, _, data in tensors.values())
    index_text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        indent=2,
    )
    (directory / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    return directory


def round_to(values: NDArray[np.float32], dtype: str) -> Bits:
    """Return the bit patterns of float32 values rounded to nearest even in BF16, F16 or F32.

    Examples
    --------
    >>> [hex(bits) for bits in round_to(np.array([1.0, 1.00390625, 1.01171875]), "BF16")]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    values = np.asarray(values, dtype=np.float32)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    if dtype != "BF16":
        raise ValueError(f"dtype {dtype!r} is not one of BF16, F16, F32")
    wide = values.view(np.uint32).astype(np.uint64)
    rounded = (wide + 0x7FFF + ((wide >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    # The addition would carry some NaNs into infinity or zero: cut those and set the quiet bit.
    quiet = (wide >> np.uint64(16)) | np.uint64(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def widen(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """Return the float32 values of BF16, F16 or F32 bit patterns, exactly.

    Examples
    --------
    >>> widen(np.array([0x3F80, 0xC000], dtype=np.uint16), "BF16").tolist()
    [1.0, -2.0]
    """
    bits = np.asarray(bits)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype != "BF16":
        raise ValueError(f"dtype {dtype!r} is not one of BF16, F16, F32")
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def raw(bits: Bits, dtype: str) -> RawTensor:
    """Return bit patterns as a tensor for `write_safetensors` and `write_model`."""
    return dtype, bits.shape, bits.tobytes()


@dataclass(frozen=True)
class Trajectory:
    """A base and its checkpoints on disk, with what they hold.

    Attributes
    ----------
    base, checkpoints : Path
        Directory of the base; directory that holds one directory per step.
    directories : dict
        Weights directory by step; 0 is the base.
    dtype, base_dtype : str
        Dtype of the checkpoints and of the base.
    bits : dict
        ``bits[step][name]``: the exact bit patterns, in the tensor's shape; step 0 is the base.
    """

    base: Path
    checkpoints: Path
    directories: dict[int, Path]
    dtype: str
    base_dtype: str
    bits: dict[int, dict[str, Bits]]

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints' steps, without the base."""
        return tuple(step for step in self.bits if step)

    def values(self, step: int, name: str) -> NDArray[np.float32]:
        """Return a tensor's weights at a step (0: the base) as float32, exactly."""
        dtype = self.dtype if step else self.base_dtype
        return widen(self.bits[step][name], dtype)


def make_trajectory(
    root: Path,
    *,
    seed: int = 0,
    steps: Iterable[int] = (1, 2, 3, 4, 5),
    dtype: str = "BF16",
    base_dtype: str | None = None,
    tensors: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, RawTensor] | None = None,
    change_share: float = 0.01,
    base_shards: int = 1,
    checkpoint_shards: int = 2,
    layout: str = "global_step_{step}/huggingface",
) -> Trajectory:
    """Write a base and checkpoints that move as RL training moves them.

    Every tensor has fp32 masters that drift along one fixed direction (in proportion to the step
    number, so that rank 1 and a line explain most of it) plus fresh noise. A checkpoint holds the
    masters rounded to `dtype`.

    Parameters
    ----------
    root : Path
        ``root/base`` and ``root/checkpoints`` are written.
    seed : int
        Everything is a function of the arguments.
    steps : iterable of int
        Ascending step numbers of the checkpoints, gaps allowed, none below 1.
    dtype, base_dtype : str
        BF16, F16 or F32; the base's is the checkpoints' unless given.
    tensors : mapping, optional
        Shapes by name; `DEFAULT_SHAPES` if not given. Names that hold ``norm`` never change.
    constants : mapping, optional
        Tensors of any dtype that every checkpoint and the base repeat (buffers, say).
    change_share : float
        Expected share of weights whose bits change per step number. With F32 nearly all do;
        the masters then move as they do for BF16.
    base_shards, checkpoint_shards : int
        Weights files per directory.
    layout : str
        Where a step's weights lie under ``root/checkpoints``, with ``{step}``.

    Returns
    -------
    Trajectory
        The directories and the exact bits of every step.
    """
    steps = tuple(steps)
    if list(steps) != sorted({step for step in steps if step > 0}):
        raise ValueError(f"steps must be ascending and at least 1, got {steps}")
    shapes = DEFAULT_SHAPES if tensors is None else tensors
    base_dtype = base_dtype or dtype
    bits: dict[int, dict[str, Bits]] = {step: {} for step in (0, *steps)}
    for index, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng([seed, index])
        masters = (0.02 * rng.standard_normal(tuple(shape))).astype(np.float32)
        bits[0][name] = round_to(masters, base_dtype)
        if dtype != base_dtype:
            # Masters widened from a narrower base: otherwise its rounding would dwarf the drift.
            masters = widen(bits[0][name], base_dtype)
        # A move of x spacings crosses a rounding boundary with probability x.
        mantissa_bits = 10 if dtype == "F16" else 7
        exponent = np.floor(np.log2(np.maximum(np.abs(masters), 2.0**-12)))
        spacing = np.exp2(exponent - mantissa_bits) * math.sqrt(math.pi / 2)
        move = 0.0 if "norm" in name else change_share * spacing
        drift = 0.8 * rng.standard_normal(tuple(shape))
        walk = np.zeros(tuple(shape))
        for before, step in zip((0, *steps), steps, strict=False):
            noise = 0.6 * math.sqrt(step - before) * rng.standard_normal(tuple(shape))
            walk = walk + drift * (step - before) + noise
            moved = np.asarray(masters + move * walk, dtype=np.float32)
            bits[step][name] = round_to(moved, dtype)
    checkpoints = root / "checkpoints"
    directories = {0: root / "base"}
    directories |= {step: checkpoints / layout.format(step=step) for step in steps}
    for step, directory in directories.items():
        step_dtype = dtype if step else base_dtype
        content = {name: raw(tensor, step_dtype) for name, tensor in bits[step].items()}
        content.update(constants or {})
        write_model(directory, content, checkpoint_shards if step else base_shards)
    return Trajectory(root / "base", checkpoints, directories, dtype, base_dtype, bits)
