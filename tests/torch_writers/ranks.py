"""Functions run by several processes that form a process group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def on_ranks(world: int, write: Callable[[Path], None], out: Path) -> None:
    """Call ``write(out)`` in `world` processes of one gloo group; fail if one of them does."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os._exit(_rank(world, rank, write, out))
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise SystemExit(f"{write.__name__}: a rank failed")


def _rank(world: int, rank: int, write: Callable[[Path], None], out: Path) -> int:
    try:
        torch.set_num_threads(1)
        # accelerate wants these, though there is a process group already.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        rendezvous = f"file://{out}.{write.__name__}.rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        write(out)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 (of a child process: all that is left is to say so)
        traceback.print_exc()
        return 1
    return 0
