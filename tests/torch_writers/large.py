"""300 M F32 weights on four ranks, as verl's FSDP workers and as torch DCP write them.

Run as ``python -m tests.torch_writers.large OUT``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.torch_writers.ranks import on_ranks
from tests.torch_writers.verl import save_step

STEPS = (1, 2)
SHAPES = {
    "model.embed_tokens.weight": (40_001, 2048),
    **{f"model.layers.{n}.mlp.weight": (8192, 2048) for n in range(13)},
    **{f"model.layers.{n}.norm.weight": (2048,) for n in range(13)},
}


def whole(name: str, step: int) -> torch.Tensor:
    """F32 weights at a step: all of them move."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    base = torch.empty(SHAPES[name]).normal_(0, 0.02, generator=generator)
    base = base.bfloat16().float()
    return base * (1 + 1e-4 * step) if step else base


def of_four(out: Path) -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    rank = dist.get_rank()
    for step in STEPS:
        state = {}
        for name, shape in SHAPES.items():
            rows = -(-shape[0] // 4)
            local = whole(name, step)[rows * rank : rows * (rank + 1)].clone()
            stride = (*shape[1:], 1)
            state[name] = DTensor.from_local(local, mesh, [Shard(0)], shape=shape, stride=stride)
        save_step(out / f"fsdp/global_step_{step}/actor", state, 4, rank)
        dcp.save(state, checkpoint_id=out / f"dcp/step-{step}")


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    (out / "base").mkdir()
    base = {name: whole(name, 0).bfloat16() for name in SHAPES}
    save_file(base, out / "base/model.safetensors", {"format": "pt"})
    del base
    on_ranks(4, of_four, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
