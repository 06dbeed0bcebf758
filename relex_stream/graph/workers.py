"""What is asked of a cluster's scheduler and workers before they get work, and their answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relex_stream import machine
from relex_stream.errors import ClusterError, RelexStreamError
from relex_stream.graph.threads import WarmUp
from relex_stream.locations import Location
from relex_stream.specs import NoProgress
from relex_stream.versions import difference, versions

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 15.0
"""Seconds to wait for a scheduler, and for its first worker."""

GPU = "GPU"
"""The resource by which workers say that they have a device."""


@dataclass(frozen=True)
class Worker:
    """What a worker process says of itself.

    Attributes
    ----------
    address, host : str
    threads : int
    resident_bytes : int
        What it holds.
    available_bytes : int
        What is free on its machine.
    limit_bytes : int
        dask's own limit; 0 for none.
    missing : tuple of str
        Paths that it was asked about and does not see.
    """

    address: str
    host: str
    threads: int
    resident_bytes: int
    available_bytes: int
    limit_bytes: int
    missing: tuple[str, ...]


def check_scheduler(client: Client) -> None:
    """Check that a scheduler can take our graphs apart.

    Raises
    ------
    ClusterError
        If it has not this package, or other versions.
    """
    address = client.scheduler_info()["address"]
    try:
        there = client.run_on_scheduler(versions)
    except Exception as error:
        raise ClusterError(
            f"the scheduler at {address} cannot load relex-stream ({first_line(error)}); "
            "start it in the same environment as this command"
        ) from error
    if differs := difference(versions(), there):
        raise ClusterError(
            f"the scheduler at {address} has other versions: {differs}; "
            "start it in the same environment as this command"
        )


def worker_threads(client: Client) -> tuple[list[int], list[int]]:
    """Return the threads of each worker, and of each that declares a GPU.

    Raises
    ------
    ClusterError
        If there are no workers.
    """
    _wait_for_workers(client)
    return list(client.nthreads().values()), client.run_on_scheduler(_threads_beside_gpus)


def ask_workers(
    client: Client,
    warm_up: WarmUp | None = None,
    formats: Any = None,
    *,
    paths: Sequence[Location] = (),
) -> list[Worker]:
    """Have each worker load what it needs, if `warm_up` is given, and say what it is.

    Raises
    ------
    ClusterError
        If there are no workers, or one cannot do the work.
    """
    _wait_for_workers(client)
    threads = {address: count for address, count in client.nthreads().items() if count}
    asked = {
        address: client.submit(
            _answer,
            versions(),
            warm_up,
            formats,
            [str(path) for path in paths if isinstance(path, Path)],
            key=f"relex-prepare-{uuid.uuid4().hex}",
            workers=[address],
            pure=False,
        )
        for address in threads
    }
    found = []
    while asked:
        time.sleep(0.02)
        there = client.nthreads()
        for address, future in list(asked.items()):
            if future.done():
                found.append(_answered(address, asked.pop(address)))
            elif address not in there:
                # It went away; nobody else may answer for it.
                asked.pop(address).cancel()
    if not found:
        raise ClusterError("all workers of the cluster went away before they had work")
    return found


def _wait_for_workers(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError as error:
        raise ClusterError(
            f"the scheduler at {client.scheduler_info()['address']} has no workers; "
            "start some with: dask worker"
        ) from error


def _answer(
    expected: dict[str, str], warm_up: WarmUp | None, formats: Any, paths: Sequence[str]
) -> Worker:
    """Run on a worker: load kernels, and say what it is."""
    import os
    import socket

    from distributed import get_worker

    if differs := difference(expected, versions()):
        raise ClusterError(
            f"other versions than this command's: {differs}; install the same on all machines"
        )
    if warm_up is not None:
        warm_up(formats, NoProgress())
    worker = get_worker()
    return Worker(
        address=worker.address,
        host=socket.gethostname(),
        threads=worker.state.nthreads,
        resident_bytes=machine.resident_bytes(),
        available_bytes=machine.available_bytes(),
        limit_bytes=worker.memory_manager.memory_limit or 0,
        missing=tuple(path for path in paths if not os.path.lexists(path)),
    )


def _answered(address: str, future: Any) -> Worker:
    try:
        found: Worker = future.result()
    except RelexStreamError as error:
        raise ClusterError(f"worker {address}: {error}") from error
    except Exception as error:
        raise ClusterError(
            f"worker {address} cannot run relex-stream ({first_line(error)}); "
            "start it in the same environment as this command"
        ) from error
    return found


def _threads_beside_gpus(dask_scheduler: Any) -> list[int]:
    """Run on the scheduler: return the threads of each worker that declares a GPU."""
    workers = dask_scheduler.workers.values()
    return [worker.nthreads for worker in workers if worker.resources.get(GPU, 0) > 0]


def first_line(error: BaseException) -> str:
    """Return what one line can say of an error of somebody else's."""
    return (str(error) or type(error).__name__).splitlines()[0]
