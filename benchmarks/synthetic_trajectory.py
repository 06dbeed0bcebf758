"""A synthetic trajectory at any size: float32 masters drift and jitter, saved as bf16 per step.

Run it as ``python -m benchmarks.synthetic_trajectory OUT_DIR``. Each step adds to every master a
constant drift of its own plus noise, clipped as Adam's steps are, times the learning rate; most
updates are too small to move the bf16 weight. At the default rate about 0.6 % of the weights change
per step, as in reinforcement learning of large models (arXiv 2602.03839). Masters stay in memory:
4 bytes per weight twice.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def shapes_of(weights: int, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return tensors of about `weights` in all: an embedding and a matrix and a norm per layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (weights // 4 // width, width)
    }
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.weight"] = (
            (weights - weights // 4) // layers // width,
            width,
        )
        shapes[f"model.layers.{layer}.norm.weight"] = (width,)
    return shapes


def bf16_bits(values: Float32) -> NDArray[np.uint16]:
    """Round to bf16, to nearest even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def save(directory: Path, tensors: dict[str, Float32]) -> None:
    """Write a model directory with one safetensors file, tensor by tensor."""
    directory.mkdir(parents=True)
    header, offset = {}, 0
    for name, values in tensors.items():
        end = offset + 2 * values.size
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(bf16_bits(values).tobytes())
    (directory / "config.json").write_text("{}\n")


@click.command()
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--weights", type=float, default=40.5e6, show_default=True)
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--layers", type=int, default=8, show_default=True)
@click.option("--width", type=int, default=512, show_default=True)
@click.option("--learning-rate", type=float, default=1e-7, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out_dir: Path,
    *,
    weights: float,
    steps: int,
    layers: int,
    width: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Write OUT_DIR/base and OUT_DIR/checkpoints/global_step_N."""
    generator = np.random.default_rng(seed)
    shapes = shapes_of(int(weights), layers, width)
    masters = {
        name: generator.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()
    }
    drifts = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save(out_dir / "base", masters)
    for step in range(1, steps + 1):
        for name, master in masters.items():
            noise = generator.standard_normal(master.shape, np.float32)
            noise += drifts[name]
            np.clip(noise, -2, 2, out=noise)
            noise *= np.float32(learning_rate)
            masters[name] = master + noise
        save(out_dir / "checkpoints" / f"global_step_{step}", masters)


if __name__ == "__main__":
    main()
