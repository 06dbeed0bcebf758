"""Runs of several steps in the layouts of trainers, and each step whole, written by torch.

Run as ``python -m tests.torch_writers.runs OUT``; a fixture does it once per session.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.torch_writers.distributed import stepped, write_base
from tests.torch_writers.ranks import on_ranks
from tests.torch_writers.verl import save_step

STEPS = (1, 2, 5)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(37, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 50), nn.Linear(50, 24, bias=False)])
        self.norm = nn.LayerNorm(24, bias=False)
        self.register_buffer("ids", torch.arange(5))


class Model(nn.Module):
    """At a step: BF16 weights of the base, and on top of them small changes in F32."""

    def __init__(self, step: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.model = Layers()
        self.lm_head = nn.Linear(24, 37, bias=False)
        self.to(torch.bfloat16).float()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=step * 2e-4)
        self.to(dtype)


def sharded(step: int, dtype: torch.dtype, mesh: dist.DeviceMesh) -> nn.Module:
    model = Model(step, dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_three(out: Path) -> None:
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("fsdp",))
    for step in STEPS:
        model = sharded(step, torch.float32, mesh)
        state = get_model_state_dict(model)
        actor = out / f"fsdp/global_step_{step}/actor"
        save_step(actor, model.state_dict(), 3, dist.get_rank())
        dcp.save({"model": state}, checkpoint_id=out / f"dcp/step-{step}")
        both = {"model": state, "optim": get_optimizer_state_dict(model, stepped(model))}
        dcp.save(both, checkpoint_id=out / f"dcp_with_state/step-{step}")
    # What is not a tensor is in the file of one rank alone.
    progress = {"model": state, "progress": {"step": step}}
    dcp.save(progress, checkpoint_id=out / f"dcp_with_progress/step-{step}")


def of_four(out: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    masters = sharded(STEPS[0], torch.float32, mesh).state_dict()
    save_step(out / "hsdp_fp32/global_step_1/actor", masters, 4, dist.get_rank())
    for step in STEPS:
        model = sharded(step, torch.bfloat16, mesh)
        actor = out / f"hsdp/global_step_{step}/actor"
        save_step(actor, model.state_dict(), 4, dist.get_rank())
        # Columns: every block is made of many short runs.
        whole = Model(step, torch.bfloat16).state_dict()
        grid = {
            name: distribute_tensor(tensor, mesh, [Shard(0), Shard(tensor.ndim - 1)])
            for name, tensor in whole.items()
        }
        writer = dcp.HuggingFaceStorageWriter(
            str(out / f"split/step_{step}/policy/weights/model"), save_distributed=True
        )
        dcp.save(grid, storage_writer=writer)


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    write_base(out / "base", Model(0, torch.bfloat16))
    for step in STEPS:
        write_base(out / f"whole_fp32/step_{step}", Model(step, torch.float32))
        write_base(out / f"whole_bf16/step_{step}", Model(step, torch.bfloat16))
    on_ranks(3, of_three, out)
    on_ranks(4, of_four, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
