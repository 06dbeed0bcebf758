"""What a model would take on other machines: arithmetic with times, tasks and bandwidths.

A command takes as long as what bounds it: reading, the cores, or the scheduler; opening and the
client's own work come on top of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling.figures import BUILD_NS, EXTRAPOLATE_NS, RANK, STORED_BITS
from benchmarks.scaling.models import Model
from relex_stream import costs
from relex_stream.sketch import SKETCH_WIDTH


@dataclass(frozen=True)
class Site:
    """Machines, as a projection takes them.

    Attributes
    ----------
    cores : int
        Of each node; one process of so many threads.
    node_per_s, all_per_s : float
        Bytes per second that a node, and all together, read or write on the shared file system.
    task_s : float
        What a task costs the scheduler.
    """

    cores: int
    node_per_s: float
    all_per_s: float
    task_s: float

    def moved_per_s(self, nodes: int) -> float:
        return min(nodes * self.node_per_s, self.all_per_s)


def project(
    model: Model,
    client: Mapping[str, Any],
    tasks: Mapping[tuple[str, int, int], int],
    site: Site,
    nodes: int,
    steps: int,
    share: float,
    commit: int,
) -> list[dict[str, Any]]:
    """Return a row per command: what each part would take by itself, and the longest of them.

    Parameters
    ----------
    client : mapping
        The row of `measure_client`.
    tasks : mapping
        By stage, steps and threads.
    commit : int
        Steps of a commit.
    """
    threads = nodes * site.cores
    moved = site.moved_per_s(nodes)
    changes = share * model.weights
    stored = changes * STORED_BITS / 8
    records = client["record_bytes"]
    columns = 12 * client["blocks"] + 8 * client["tensors"]
    per_step = 16 * client["blocks"] + (2 * SKETCH_WIDTH + 4 + 17) * client["tensors"]
    back = {
        "build-store": commit * per_step + 8 * client["blocks"],
        "extrapolate": 8 * steps * RANK * client["tensors"],
    }
    build = {"read": 0.0, "cores": 0.0, "scheduler": 0.0, "opening": 0.0, "client": 0.0}
    commits = 0
    for rows in range(0, steps, commit):
        batch = min(commit, steps - rows)
        commits += 1
        # The base and the frames of all earlier steps again; each process its own tables of them.
        build["read"] += ((batch + 1) * model.nbytes + (rows + batch) * stored) / moved
        build["read"] += nodes * rows * columns / moved
        nanoseconds = batch * (BUILD_NS["byte"] * model.nbytes + BUILD_NS["change"] * changes)
        nanoseconds += batch * BUILD_NS["tensor"] * client["tensors"]
        nanoseconds += BUILD_NS["byte"] * model.nbytes
        nanoseconds += rows * costs.CPU_DECODE_NS[2] * changes
        build["cores"] += nanoseconds * 1e-9 / threads
        build["scheduler"] += tasks["build", commit, threads] * site.task_s
        build["opening"] += client["open store_s"] + rows * client["columns_s"]
        build["client"] += batch * (client["open next_s"] + client["match_s"] + client["commit_s"])
        build["client"] += client["open store_s"] + (rows + batch) * client["tables_s"]
    extrapolate = {
        # What is written counts as read: the file system has one bandwidth here.
        "read": 2 * (model.nbytes + steps * stored + nodes * steps * columns) / moved
        + (steps * (records - columns) + model.nbytes) / moved,
        "cores": 1e-9
        * (
            EXTRAPOLATE_NS["byte"] * model.nbytes
            + EXTRAPOLATE_NS["change"] * changes * steps
            + EXTRAPOLATE_NS["tensor"] * client["tensors"] * steps
        )
        / threads,
        "scheduler": sum(
            tasks[stage, steps, threads] * site.task_s for stage in ("statistics", "write")
        ),
        "opening": 2 * (client["open store_s"] + steps * client["columns_s"]),
        "client": client["open store_s"] + steps * client["tables_s"],
    }
    found = []
    for command, parts, stages in (
        ("build-store", build, ("build",)),
        ("extrapolate", extrapolate, ("statistics", "write")),
    ):
        together = {name: parts[name] for name in ("read", "cores", "scheduler")}
        longest = max(together, key=lambda name: together[name])
        alone = parts["opening"] + parts["client"]
        found.append(
            {
                "part": "projection",
                "model": model.name,
                "command": command,
                "checkpoints": steps,
                "commit": commit if command == "build-store" else None,
                "nodes": nodes,
                "threads": threads,
                "tasks": sum(
                    tasks[stage, commit if stage == "build" else steps, threads] for stage in stages
                )
                * (commits if command == "build-store" else 1),
                **{f"{name}_s": seconds for name, seconds in parts.items()},
                "projected_s": together[longest] + alone,
                "bound by": longest if together[longest] > alone else "opening and client",
                "scheduler of work_share": together["scheduler"]
                / max(together["read"], together["cores"]),
                "read TB": parts["read"] * moved / 1e12,
                "back at a time_bytes": back[command],
                "store GB": stored * steps / 1e9,
            }
        )
    return found


def size_rows(
    shares: Sequence[float], threads: Sequence[int], task_s: float
) -> list[dict[str, Any]]:
    """Return how large a task has to be for scheduling to take a share, by the work per core."""
    return [
        {
            "part": "sizes",
            "threads": count,
            **{
                f"{100 * share:g} % at {rate / 1e9:g} GB/s_bytes": count * task_s / share * rate
                for share in shares
                for rate in (0.125e9, 1e9, 2.3e9)
            },
        }
        for count in threads
    ]
