"""Where stages run: threads, a cluster that is there, or one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relex_stream import machine
from relex_stream.errors import ClusterError, MissingDependencyError, OptionError
from relex_stream.graph.cluster import Cluster
from relex_stream.graph.threads import Executor, Threads
from relex_stream.graph.workers import CONNECT_S, GPU, check_scheduler, first_line
from relex_stream.specs import NoProgress, Progress

if TYPE_CHECKING:
    from distributed import Client

_ADDRESS = re.compile(r"(?:[a-z]+://)?[^\s/]+:\d+", re.ASCII)


@contextmanager
def open_executor(
    *,
    scheduler: str | None = None,
    local_cluster: int | None = None,
    local_gpus: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Executor]:
    """Return a context whose value runs stages: threads of this process if no cluster is named.

    Parameters
    ----------
    scheduler : str, optional
        Address of a dask scheduler, like ``tcp://host:8786``, or the path of its scheduler file.
    local_cluster : int, optional
        Start a cluster of so many processes on this machine instead.
    local_gpus : bool
        Give each of them a GPU of its own.
    workers : int, optional
        Threads; of each process with `local_cluster`. By default all cores are used once.
    memory_limit : int, optional
        Bytes that this process, or each process of a cluster, may hold.
    progress : Progress, optional
        Is told where the cluster's dashboard is.

    Raises
    ------
    OptionError
        If options exclude each other, or `scheduler` is neither an address nor a file.
    MissingDependencyError
        If the package distributed is not installed.
    ClusterError
        If there is no scheduler, or it has no workers.
    """
    progress = progress or NoProgress()
    if scheduler is None and local_cluster is None:
        yield Threads(workers, memory_limit)
        return
    if scheduler is not None and local_cluster is not None:
        raise OptionError("--scheduler and --local-cluster exclude each other")
    if scheduler is not None and workers is not None:
        raise OptionError(
            "--workers does not go with --scheduler: workers of a cluster have the threads they "
            "were started with (--nthreads of dask worker)"
        )
    if local_cluster is not None and local_cluster < 1:
        raise OptionError(f"--local-cluster must be at least 1, not {local_cluster}")
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "a cluster needs the package distributed: pip install 'relex-stream[cluster]'"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_client())
        if local_cluster is not None:
            threads = machine.wanted_workers(workers)
            if workers is None:
                threads = max(1, threads // local_cluster)
            start = _local_gpu_cluster if local_gpus else _local_cluster
            address = stack.enter_context(start(local_cluster, threads))
        else:
            assert scheduler is not None
            address = _address_of(scheduler)
        client = stack.enter_context(_connected(address))
        check_scheduler(client)
        progress.note(_description(client))
        yield Cluster(client, memory_limit)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep dask's log of lost connections off the terminal: what matters is raised, and once.

    Whoever debugs ("relex_stream" logs from DEBUG on) sees it all.
    """
    if logging.getLogger("relex_stream").isEnabledFor(logging.DEBUG):
        yield
        return
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _address_of(scheduler: str) -> str:
    if Path(scheduler).is_file():
        import json

        try:
            address = json.loads(Path(scheduler).read_bytes())["address"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{scheduler} is not the scheduler file of a dask cluster") from error
        return str(address)
    if not _ADDRESS.fullmatch(scheduler):
        raise OptionError(
            f"--scheduler {scheduler} is neither an address like tcp://host:8786 nor a scheduler "
            "file that is there"
        )
    return scheduler


def _local_cluster(processes: int, threads: int) -> AbstractContextManager[str]:
    from distributed import LocalCluster

    return _started(
        LocalCluster,
        n_workers=processes,
        threads_per_worker=threads,
        processes=True,
        # The planner's limit holds; dask's own would pause and kill at a share of another.
        memory_limit=0,
        # Errors come to the command, which says them once.
        silence_logs=logging.CRITICAL,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )


@contextmanager
def _started(kind: Any, **options: Any) -> Iterator[str]:
    """Start a cluster of this machine, whose processes leave Ctrl-C to this one."""
    with contextlib.ExitStack() as stack:
        with _interrupts_put_off():
            try:
                cluster = stack.enter_context(kind(**options))
            except RuntimeError as error:
                raise ClusterError(f"no processes could be started: {first_line(error)}") from error
        yield cluster.scheduler_address


@contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Have Ctrl-C wait for the end of the block; processes that begin in it never get it."""
    # Its own start would let the signal through again, on the thread that starts processes.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _local_gpu_cluster(processes: int, threads: int) -> AbstractContextManager[str]:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingDependencyError(
            "a GPU for each process of --local-cluster needs the package dask-cuda "
            "(https://docs.rapids.ai/api/dask-cuda); without it, give --devices cuda alone: one "
            "process uses all GPUs"
        ) from error
    return _started(
        LocalCUDACluster,
        n_workers=processes,
        threads_per_worker=threads,
        # dask-cuda does not declare the resource by itself.
        resources={GPU: 1},
        memory_limit=0,
        silence_logs=logging.CRITICAL,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except Exception as error:  # of any kind: what answers may be anything
        raise ClusterError(
            f"no dask scheduler answers at {address}: {first_line(error)}"
        ) from error
    try:
        yield client
    finally:
        client.close()


def _description(client: Client) -> str:
    """Return one line for people: where the scheduler is, and its dashboard."""
    info = client.scheduler_info()
    line = f"dask scheduler at {info['address']}"
    if "dashboard" not in info.get("services", {}):
        return line
    line += f", dashboard at {client.dashboard_link}"
    if not client.run_on_scheduler(_has_bokeh):
        line += " (once the package bokeh is installed there)"
    return line


def _has_bokeh() -> bool:
    """Run on the scheduler: say whether it can draw its dashboard."""
    import importlib.util

    return importlib.util.find_spec("bokeh") is not None
