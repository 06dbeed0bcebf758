"""Checkpoints as trainers leave them, made of Hugging Face models by torch, one process per rank.

Run it as ``python -m benchmarks.layout_writers FORMAT RANKS OUT MODEL...``; models are those of the
steps 1, 2 and so on. No rank holds more than its share of a model.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def write_verl(state: dict[str, Any], out: Path, step: int) -> None:
    """Write what verl's FSDP workers do: ``torch.save`` of each rank's state."""
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    actor = out / f"global_step_{step}/actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(state, actor / f"model_world_size_{ranks}_rank_{rank}.pt")
    if rank == 0:
        noted = {"FSDP_version": 2, "world_size": ranks}
        (actor / "fsdp_config.json").write_text(json.dumps(noted), encoding="utf-8")
        (out / "latest_checkpointed_iteration.txt").write_text(str(step), encoding="ascii")


def write_dcp(state: dict[str, Any], out: Path, step: int) -> None:
    """Write a PyTorch distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=out / f"step-{step}")


def write_split(state: dict[str, Any], out: Path, step: int) -> None:
    """Write safetensors of each rank's parts, as NeMo-RL does."""
    import torch.distributed.checkpoint as dcp

    inside = out / f"step_{step}/policy/weights/model"
    index = dict.fromkeys(state, 1)
    writer = dcp.HuggingFaceStorageWriter(
        str(inside), fqn_to_index_mapping=index, save_distributed=True
    )
    dcp.save(state, storage_writer=writer)


FORMATS: dict[str, Callable[[dict[str, Any], Path, int], None]] = {
    "verl": write_verl,
    "dcp": write_dcp,
    "split": write_split,
}


def main(format_name: str, ranks: int, out: Path, models: Sequence[Path]) -> None:
    """Write all models; each rank is a child process."""
    # Once, before the ranks begin: it takes seconds.
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.tensor

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    rendezvous = out.with_name(f"{out.name}.rendezvous")
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os._exit(_rank(format_name, rank, ranks, out, models, rendezvous))
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    rendezvous.unlink(missing_ok=True)
    if failed:
        sys.exit(f"{format_name}: a rank failed")


def _rank(
    format_name: str, rank: int, ranks: int, out: Path, models: Sequence[Path], rendezvous: Path
) -> int:
    try:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        method = f"file://{rendezvous.absolute()}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
        for step, model in enumerate(models, start=1):
            state = dict(_sharded(model, mesh, rank, ranks))
            FORMATS[format_name](state, out, step)
            dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 (of a child process: all that is left is to say so)
        traceback.print_exc()
        return 1
    return 0


def _sharded(model: Path, mesh: Any, rank: int, ranks: int) -> Iterator[tuple[str, Any]]:
    """Yield a model's tensors, each in as many parts as there are ranks, as FSDP cuts them."""
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor, Shard

    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                rows = file.get_slice(name)
                shape = tuple(rows.get_shape())
                share = -(-shape[0] // ranks)
                first = min(shape[0], rank * share)
                local = rows[first : min(shape[0], first + share)].clone()
                stride = tuple(_strides(shape))
                yield (
                    name,
                    DTensor.from_local(local, mesh, [Shard(0)], shape=shape, stride=stride),
                )


def _strides(shape: Sequence[int]) -> Iterator[int]:
    for dimension in range(len(shape)):
        stride = 1
        for extent in shape[dimension + 1 :]:
            stride *= extent
        yield stride


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], int(words[1]), Path(words[2]), [Path(word) for word in words[3:]])
