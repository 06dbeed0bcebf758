"""Steps as verl's FSDP workers leave them, written by torch, one process per rank.

Run as ``python -m tests.torch_writers.verl OUT``; a fixture does it once per session. What verl's
checkpoint manager does is repeated here call by call: the state dict of the sharded model goes
through ``torch.save``, one file per rank, with the other files beside it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._shard_utils import _create_chunk_dtensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.make_checkpoints import SIDE_FILES
from tests.torch_writers.distributed import Model, write_base
from tests.torch_writers.ranks import on_ranks


def save_step(actor: Path, state: dict, world: int, rank: int, version: int = 2) -> None:
    """What ``FSDPCheckpointManager.save_checkpoint`` writes; optimizer and RNG cut short."""
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(state, actor / f"model_world_size_{world}_rank_{rank}.pt")
    torch.save({"state": {}}, actor / f"optim_world_size_{world}_rank_{rank}.pt")
    torch.save({"rng": 1}, actor / f"extra_state_world_size_{world}_rank_{rank}.pt")
    if rank:
        return
    model = actor / "huggingface"
    model.mkdir()
    for name, text in SIDE_FILES.items():
        (model / name).write_text(text)
    noted = {"FSDP_version": version, "world_size": world}
    (actor / "fsdp_config.json").write_text(json.dumps(noted, indent=4))


def fsdp2(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Model(1, dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The state dict of FSDP 1, which itself wants an accelerator: its parameters by the function
    that it calls for each; buffers whole."""
    state = Model(1, torch.float32).state_dict()
    return {
        name: _create_chunk_dtensor(tensor, dist.get_rank(), mesh)
        if name.endswith(("weight", "bias"))
        else tensor
        for name, tensor in state.items()
    }


def placed(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Every way of placing tensors on a mesh of two dimensions that is read."""
    ways = [
        [Shard(0), Shard(0)],
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Replicate(), Shard(1)],
        [Shard(1), Replicate()],
        [Replicate(), Replicate()],
    ]
    state = Model(1, torch.bfloat16).state_dict()
    return {
        f"{name}.{number}": distribute_tensor(tensor, mesh, way)
        for name, tensor in state.items()
        if tensor.ndim == 2
        for number, way in enumerate(ways)
    }


def of_one(out: Path) -> None:
    save_step(out / "plain/global_step_1/actor", Model(1, torch.float32).state_dict(), 1, 0, 1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    save_step(out / "fsdp2_1/global_step_1/actor", fsdp2(mesh).state_dict(), 1, 0)


def of_two(out: Path) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model = fsdp2(mesh)
    save_step(out / "fsdp2_2/global_step_1/actor", model.state_dict(), 2, rank)
    save_step(out / "bf16/global_step_1/actor", fsdp2(mesh, torch.bfloat16).state_dict(), 2, rank)
    save_step(out / "fsdp1_2/global_step_1/actor", fsdp1(mesh), 2, rank, 1)
    tied = model.state_dict()
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    save_step(out / "tied", tied, 2, rank)
    # Refused.
    local = torch.ones(2, 3)
    refused = {
        "partial": DTensor.from_local(local, mesh, [Partial()]),
        "strided": DTensor.from_local(
            local, mesh, [_StridedShard(0, split_factor=2)], shape=(4, 3), stride=(3, 1)
        ),
        "columns": DTensor.from_local(
            torch.ones(3, 2).T, mesh, [Shard(0)], shape=(4, 3), stride=(3, 1)
        ),
        "unlike": torch.ones(2 + rank, 3),
        "shorter": DTensor.from_local(
            local[: 2 - rank], mesh, [Shard(0)], shape=(4, 3), stride=(3, 1)
        ),
    }
    for name, tensor in refused.items():
        save_step(out / "refused" / name, {"model.norm": tensor}, 2, rank)


def of_three(out: Path) -> None:
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("fsdp",))
    save_step(out / "fsdp2_3/global_step_1/actor", fsdp2(mesh).state_dict(), 3, dist.get_rank())
    save_step(out / "fsdp1_3/global_step_1/actor", fsdp1(mesh), 3, dist.get_rank(), 1)


def of_four(out: Path) -> None:
    rank = dist.get_rank()
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    save_step(out / "fsdp2_4/global_step_1/actor", fsdp2(line).state_dict(), 4, rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    save_step(out / "hsdp/global_step_1/actor", fsdp2(mesh).state_dict(), 4, rank)
    save_step(out / "hsdp1/global_step_1/actor", fsdp1(mesh), 4, rank, 1)
    # Each half of the ranks on a mesh of its own, that is a row of the other; or a column.
    save_step(out / "rows/global_step_1/actor", fsdp2(mesh["fsdp"]).state_dict(), 4, rank)
    save_step(out / "columns/global_step_1/actor", fsdp2(mesh["ddp"]).state_dict(), 4, rank)
    save_step(out / "placed", placed(mesh), 4, rank)
    shuffled = DeviceMesh("cpu", [[2, 3], [0, 1]])
    tensor = distribute_tensor(torch.ones(4, 3), shuffled, [Shard(0), Replicate()])
    save_step(out / "refused/shuffled", {"model.norm": tensor}, 4, rank)


WORLDS: tuple[tuple[int, Callable[[Path], None]], ...] = (
    (1, of_one),
    (2, of_two),
    (3, of_three),
    (4, of_four),
)


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        write_base(out / f"whole_{name}", Model(1, dtype))
    write_base(out / "base", Model(0, torch.float32))
    for world, write in WORLDS:
        on_ranks(world, write, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
