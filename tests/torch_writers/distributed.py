"""Checkpoints that torch itself writes, by ranks that are processes of this machine.

Run as ``python -m tests.torch_writers.distributed OUT``; fixtures do it once per session, so that
no test process has a process group or imports torch for it.
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.make_checkpoints import SIDE_FILES
from tests.torch_writers.lies import LIES
from tests.torch_writers.ranks import on_ranks


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 6)  # 13 rows: no number of ranks divides them
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 6, bias=False)])
        self.norm = nn.LayerNorm(1, bias=False)  # one row: all ranks but one have none
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("ids", torch.arange(5))


class Model(nn.Module):
    """Names as Hugging Face's models have them."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Layers()
        self.lm_head = nn.Linear(6, 13, bias=False)
        self.to(dtype)


def write_base(path: Path, model: nn.Module, side_files: bool = True) -> None:
    """Write the model whole, with safetensors' own writer: what tests compare with."""
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    if side_files:
        for name, text in SIDE_FILES.items():
            (path / name).write_text(text)


def sharded(seed: int, dtype: torch.dtype) -> nn.Module:
    """The model under FSDP 2, on as many ranks as there are."""
    model = Model(seed, dtype)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state, that has not moved the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def prime_rl(out: Path) -> None:
    """Model, optimizer, scheduler and progress in one checkpoint, as prime-rl has them."""
    for step in (1, 2):
        model = sharded(step, torch.float32)
        optimizer = stepped(model)
        state = {
            "app": {
                "model": get_model_state_dict(model),
                "optimizers": get_optimizer_state_dict(model, optimizer),
                "scheduler": {"last_epoch": step, "_last_lr": [0.1]},
                "progress": {"step": step, "total_tokens": 7},
            }
        }
        dcp.save(state, checkpoint_id=out / f"checkpoints/step_{step}/trainer")


def nemo_rl(out: Path) -> None:
    """The model under ``model.``, and elsewhere the optimizer."""
    for step in (1, 2):
        model = sharded(step, torch.bfloat16)
        inside = out / f"step_{step}/policy"
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=inside / "weights")
        optimizer = get_optimizer_state_dict(model, stepped(model))
        dcp.save({"optim": optimizer}, checkpoint_id=inside / "optimizer")


def nemo_rl_split(out: Path) -> None:
    """Safetensors that each rank writes, as NeMo-RL does by default; with two files each."""
    for step in (1, 2):
        state = get_model_state_dict(sharded(step, torch.bfloat16))
        inside = out / f"step_{step}/policy/weights/model"
        index = {name: 1 + number % 2 for number, name in enumerate(state)}
        writer = dcp.HuggingFaceStorageWriter(
            str(inside), fqn_to_index_mapping=index, save_distributed=True
        )
        dcp.save(state, storage_writer=writer)
        if dist.get_rank() == 0:
            hf = inside / ".hf_metadata"
            hf.mkdir()
            (hf / "config.json").write_text(SIDE_FILES["config.json"])


def consolidated(out: Path) -> None:
    """What torchtitan writes with ``last_save_in_hf``: parts in ``sharded/``, and whole files."""
    state = get_model_state_dict(sharded(1, torch.bfloat16))
    # torch 2.13 consolidates floats only, and scalars to zeros.
    del state["model.ids"], state["model.scale"]
    index = {name: 1 + number % 2 for number, name in enumerate(state)}
    writer = dcp.HuggingFaceStorageWriter(
        str(out / "step-1"),
        fqn_to_index_mapping=index,
        save_distributed=True,
        enable_consolidation=True,
    )
    dcp.save(state, storage_writer=writer)


def torchtitan(out: Path) -> None:
    """The model's tensors under their own names beside everything else."""
    model = sharded(1, torch.float32)
    state = {
        **get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, stepped(model)),
        "train_state": {"step": torch.tensor(1), "losses": [1.0, 2.0]},
        "lr_scheduler": {"last_epoch": 1},
        "dataloader": {"dp_rank_0": b"opaque"},
    }
    dcp.save(state, checkpoint_id=out / "step-1")


def accelerate(out: Path) -> None:
    """What accelerate's own functions write, and Hugging Face's Trainer through them.

    They get no Accelerator: on a machine without devices, none uses FSDP.
    """
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)  # for its log
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    ranks = SimpleNamespace(num_processes=dist.get_world_size(), process_index=dist.get_rank())
    model = sharded(1, torch.float32)
    inside = out / "checkpoint-1"
    save_fsdp_model(plugin, ranks, model, str(inside))
    save_fsdp_optimizer(plugin, ranks, stepped(model), model, str(inside))
    if dist.get_rank() == 0:
        (inside / "trainer_state.json").write_text("{}")


def meshes(out: Path) -> None:
    """Four ranks: replicated and split, and split in two dimensions."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(Model(1, torch.bfloat16), mesh=rows)
    dcp.save(get_model_state_dict(model), checkpoint_id=out / "hsdp/step-1")
    whole = Model(1, torch.bfloat16).state_dict()
    placements = {0: [Replicate(), Replicate()], 1: [Shard(0), Replicate()]}
    state = {
        name: distribute_tensor(tensor, rows, placements.get(tensor.ndim, [Shard(0), Shard(1)]))
        for name, tensor in whole.items()
    }
    dcp.save(state, checkpoint_id=out / "grid/step-1")
    writer = dcp.HuggingFaceStorageWriter(str(out / "grid_split/step-1"), save_distributed=True)
    dcp.save(state, storage_writer=writer)


def alone(out: Path) -> None:
    """One process without a process group; other ways to lay files out."""
    state = Model(1, torch.bfloat16).state_dict()
    writers = {
        "plain": dcp.FileSystemWriter(out / "plain/step-1"),
        "threads": dcp.FileSystemWriter(out / "threads/step-1", thread_count=3),
        "many": dcp.FileSystemWriter(out / "many/step-1", single_file_per_rank=False),
        "safetensors": dcp.FileSystemWriter(
            out / "safetensors/step-1",
            serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS,
        ),
        "whole": dcp.HuggingFaceStorageWriter(str(out / "whole/step-1")),
    }
    for writer in writers.values():
        dcp.save(state, storage_writer=writer, no_dist=True)
    others = {
        "transposed": {"w": torch.arange(6.0).reshape(2, 3).t()},
        "quantised": {"w": torch.ones(2, 3).to(torch.float8_e4m3fn), "w_scale": torch.ones(2)},
    }
    for name, tensors in others.items():
        dcp.save(tensors, checkpoint_id=out / f"{name}/step-1", no_dist=True)
    with_bytes = {"extra": {"note": "text", "numbers": [1, 2]}, "model": state}
    dcp.save(with_bytes, checkpoint_id=out / "bytes/step-1", no_dist=True)


RUNS: tuple[tuple[int, Callable[[Path], None]], ...] = (
    (2, prime_rl),
    (3, nemo_rl),
    (3, nemo_rl_split),
    (2, consolidated),
    (2, torchtitan),
    (2, accelerate),
    (4, meshes),
)


def read_again(out: Path) -> None:
    """What torch itself reads of one of the checkpoints: the model, and the metadata."""
    source = out / "prime_rl/checkpoints/step_2/trainer"
    merged = out / "merged"
    merged.mkdir()
    dcp_to_torch_save(source, merged / "all.pt")
    model = torch.load(merged / "all.pt", weights_only=False)["app"]["model"]
    save_file(model, merged / "model.safetensors")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    told = {
        "chunks": {
            key: [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks]
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        },
        "regions": [
            [place.relative_path, place.offset, place.length]
            for place in metadata.storage_data.values()
        ],
    }
    (merged / "metadata.json").write_text(json.dumps(told))


def tell_lies(out: Path) -> None:
    """Metadata of one of the checkpoints, changed; a file per change, by its number."""
    data = (out / "nemo_rl/step_1/policy/weights/.metadata").read_bytes()
    (out / "lies").mkdir()
    for number, change in enumerate(LIES):
        metadata = pickle.loads(data)
        scope = {
            "m": metadata,
            "w": metadata.state_dict_metadata["model.lm_head.weight"],
            "first": next(iter(metadata.storage_data)),
            "torch": torch,
            "MetadataIndex": MetadataIndex,
        }
        exec(change, scope)
        (out / f"lies/{number}").write_bytes(pickle.dumps(scope["m"]))


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    for step, seed in ((0, 0), (1, 1), (2, 2)):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            write_base(out / f"whole_{name}/step_{step}", Model(seed, dtype))
    alone(out / "alone")
    for world, write in RUNS:
        path = out / write.__name__
        path.mkdir()
        on_ranks(world, write, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
