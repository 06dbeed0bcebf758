"""Stages on the workers of a dask.distributed cluster, and the choice between that and threads.

What travels are descriptions, and small results: workers read and write the files themselves, which
they see under the same paths. A task that is run again, because a worker died, writes the same
bytes to the same places.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relex_stream import costs, machine, planner
from relex_stream.errors import (
    ClusterError,
    MissingDependencyError,
    OptionError,
    RelexStreamError,
    RelexStreamWarning,
)
from relex_stream.graph.packed import TOPIC, PackedStage, abandon
from relex_stream.graph.stages import TASK_BYTES, Group, Stage
from relex_stream.graph.tasks import TaskGraph, build_graph
from relex_stream.graph.threads import Executor, Threads, WarmUp
from relex_stream.specs import NoProgress, Progress
from relex_stream.versions import difference, versions

if TYPE_CHECKING:
    from distributed import Client

Future = Any

CONNECT_S = 15.0
"""Seconds to wait for a scheduler, and for its first worker."""

GPU = "GPU"
"""The resource by which workers say that they have a device."""

DASK_SHARE = 0.75
"""Of the memory limit that a worker has from dask, what we plan with."""

NO_WORKERS_S = 60.0
"""Seconds without any worker after which the work is given up."""

ABANDON_S = 60.0
"""Seconds to wait for tasks that still run on workers after an error or an interruption."""

_LOOK_S = 5.0

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
        cluster = Cluster(client, memory_limit)
        cluster.check_scheduler()
        progress.note(cluster.describe())
        yield cluster


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


@contextmanager
def _local_cluster(processes: int, threads: int) -> Iterator[str]:
    from distributed import LocalCluster

    with _started(
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
    ) as cluster:
        yield cluster.scheduler_address


def _started(kind: Any, **options: Any) -> Any:
    """Start a cluster of this machine, whose processes leave Ctrl-C to this one."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        return kind(**options)
    except RuntimeError as error:
        raise ClusterError(f"no processes could be started: {_first_line(error)}") from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _local_gpu_cluster(processes: int, threads: int) -> Iterator[str]:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingDependencyError(
            "a GPU for each process of --local-cluster needs the package dask-cuda "
            "(https://docs.rapids.ai/api/dask-cuda); without it, give --devices cuda alone: one "
            "process uses all GPUs"
        ) from error
    with _started(
        LocalCUDACluster,
        n_workers=processes,
        threads_per_worker=threads,
        # dask-cuda does not declare the resource by itself.
        resources={GPU: 1},
        memory_limit=0,
        silence_logs=logging.CRITICAL,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield cluster.scheduler_address


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except Exception as error:  # of any kind: what answers may be anything
        raise ClusterError(
            f"no dask scheduler answers at {address}: {_first_line(error)}"
        ) from error
    try:
        yield client
    finally:
        client.close()


@dataclass(frozen=True)
class _Found:
    """What a worker process says of itself."""

    address: str
    host: str
    threads: int
    resident_bytes: int
    available_bytes: int
    limit_bytes: int
    """dask's own; 0 for none."""
    missing: tuple[str, ...]


class Cluster:
    """Runs stages on a cluster; an `Executor`.

    Parameters
    ----------
    client : distributed.Client
    memory_limit : int, optional
        Bytes that each worker process may hold.
    """

    is_local = False

    def __init__(self, client: Client, memory_limit: int | None = None) -> None:
        self._client = client
        self._memory_limit = memory_limit
        self._threads = 1  # of all processes, once they were asked

    def check_scheduler(self) -> None:
        """Check that the scheduler can take our graphs apart.

        Raises
        ------
        ClusterError
            If it has not this package, or other versions.
        """
        address = self._client.scheduler_info()["address"]
        try:
            there = self._client.run_on_scheduler(versions)
        except Exception as error:
            raise ClusterError(
                f"the scheduler at {address} cannot load relex-stream ({_first_line(error)}); "
                "start it in the same environment as this command"
            ) from error
        if differs := difference(versions(), there):
            raise ClusterError(
                f"the scheduler at {address} has other versions: {differs}; "
                "start it in the same environment as this command"
            )

    def describe(self) -> str:
        """Return one line for people: where the scheduler is, and its dashboard."""
        info = self._client.scheduler_info()
        line = f"dask scheduler at {info['address']}"
        if "dashboard" not in info.get("services", {}):
            return line
        line += f", dashboard at {self._client.dashboard_link}"
        if not self._client.run_on_scheduler(_has_bokeh):
            line += " (once the package bokeh is installed there)"
        return line

    def places(self) -> planner.Places:
        """As in `Executor`; a worker has a device if it says so by the resource ``GPU``."""
        self._wait_for_workers()
        with_gpu = self._client.run_on_scheduler(_threads_beside_gpus)
        return planner.Places(
            cores=sum(self._client.nthreads().values()),
            gpu_workers=len(with_gpu),
            gpu_cores=sum(with_gpu),
        )

    def prepare(self, warm_up: WarmUp, formats: Any, progress: Progress) -> planner.Capacity:
        """As in `Executor`.

        Raises
        ------
        ClusterError
            If there are no workers, or they have other versions than this process.
        """
        progress.start("prepare workers", 0)
        found = self._ask_workers(warm_up, formats, ())
        progress.finish()
        self._threads = sum(worker.threads for worker in found)
        on_host: dict[str, int] = {}
        for worker in found:
            on_host[worker.host] = on_host.get(worker.host, 0) + 1
        return planner.Capacity(
            processes=len(found),
            workers=max(worker.threads for worker in found),
            workers_fixed=False,
            reserved_bytes=max(worker.resident_bytes for worker in found),
            memory_limit_bytes=min(
                self._limit_of(worker, on_host[worker.host]) for worker in found
            ),
        )

    def _limit_of(self, worker: _Found, beside: int) -> int:
        """Return what a worker may hold, of as many `beside` each other on its machine."""
        default = planner.DEFAULT_LIMIT_BYTES
        limit = self._memory_limit or min(
            max(default, worker.resident_bytes + default // 2),
            worker.resident_bytes + worker.available_bytes // beside,
        )
        if not worker.limit_bytes:
            return limit
        # Above 0.8 of that limit dask gives a worker nothing to do, and buffers stay as they are.
        return min(limit, int(DASK_SHARE * worker.limit_bytes))

    def peak_bytes(self) -> int:
        """As in `Executor`; of workers, since they were started."""
        there: dict[str, int] = self._client.run(machine.peak_bytes, on_error="ignore")
        return max([machine.peak_bytes(), *there.values()])

    def check_sees(self, paths: Sequence[Path]) -> None:
        """As in `Executor`."""
        for worker in self._ask_workers(None, None, paths):
            if worker.missing:
                raise ClusterError(
                    f"worker {worker.address} on {worker.host} does not see {worker.missing[0]}; "
                    "all machines of a cluster need base, checkpoints, store and output under the "
                    "same paths"
                )

    def _wait_for_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError as error:
            raise ClusterError(
                f"the scheduler at {self._client.scheduler_info()['address']} has no workers; "
                "start some with: dask worker"
            ) from error

    def _ask_workers(
        self, warm_up: WarmUp | None, formats: Any, paths: Sequence[Path]
    ) -> list[_Found]:
        """Have each worker load what it needs, and say what it is."""
        self._wait_for_workers()
        threads = {address: count for address, count in self._client.nthreads().items() if count}
        asked = {
            address: self._client.submit(
                _prepare_worker,
                versions(),
                warm_up,
                formats,
                [str(path) for path in paths],
                key=f"relex-prepare-{uuid.uuid4().hex}",
                workers=[address],
                pure=False,
            )
            for address in threads
        }
        found = []
        while asked:
            time.sleep(0.02)
            there = self._client.nthreads()
            for address, future in list(asked.items()):
                if future.done():
                    found.append(_answer(address, asked.pop(address)))
                elif address not in there:
                    # It went away; nobody else may answer for it.
                    asked.pop(address).cancel()
        if not found:
            raise ClusterError("all workers of the cluster went away before they had work")
        return found

    def run(
        self,
        stage: Stage[Any, Any, Any],
        groups: Sequence[Group[Any, Any]],
        *,
        workers: int,
        name: str,
        progress: Progress,
    ) -> dict[Any, Any]:
        """As in `Executor`.

        Raises
        ------
        ClusterError
            If tasks end with their workers again and again, or the scheduler is lost.
        """
        total = sum(group.nbytes for group in groups)
        run = f"{re.sub('[^a-z]+', '-', name)}-{uuid.uuid4().hex[:8]}"
        graph = build_graph(
            PackedStage(stage, run, workers),
            groups,
            begins=stage.begins,
            task_bytes=costs.cluster_task_bytes(total, self._threads, TASK_BYTES),
            name=run,
        )
        progress.start(name, total)
        resources = {GPU: stage.device_share} if stage.device_share else None
        results: Mapping[Any, list[Any]] = {}
        if graph.outputs:
            results = _Run(self._client, run, graph, progress, resources).results()
        progress.finish()
        return {
            key: result
            for done, keys in graph.outputs.items()
            for key, result in zip(keys, results[done], strict=True)
        }


class _Run:
    """One stage under way: futures of its results, and what its tasks tell meanwhile."""

    def __init__(
        self,
        client: Client,
        run: str,
        graph: TaskGraph,
        progress: Progress,
        resources: dict[str, float] | None,
    ) -> None:
        self._client = client
        self._run = run
        self._graph = graph
        self._progress = progress
        self._resources = resources
        # Batches of finished futures, and keys of finished tasks, for the thread that waits.
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reported: set[Any] = set()

    def results(self) -> Mapping[Any, list[Any]]:
        """Submit the graph and wait; return what its outputs give."""
        from distributed import CancelledError, KilledWorker
        from distributed.comm.core import CommClosedError

        futures: list[Future] = []
        results: dict[Any, list[Any]] = {}
        self._client.subscribe_topic(TOPIC, self._hear)
        try:
            futures = self._client.get(
                self._graph.tasks,
                list(self._graph.outputs),
                resources=self._resources,
                sync=False,
            )
            self._collect(futures, results)
        except KilledWorker as error:
            raise ClusterError(
                f"a task was running on {error.allowed_failures + 1} workers when they died, the "
                f"last of them {error.last_worker.address}; their logs say why (most often it is "
                "memory: give --memory-limit, or start workers with fewer threads)"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise ClusterError(
                f"the cluster gave up the work ({_first_line(error)}); "
                "is the scheduler still there? Run the command again"
            ) from error
        finally:
            with contextlib.suppress(Exception):
                self._client.unsubscribe_topic(TOPIC)
            if len(results) < len(self._graph.outputs):
                self._abandon(futures)
        return results

    def _hear(self, event: tuple[float, Any]) -> None:
        _, (run, key, nbytes) = event
        if run == self._run:
            self._news.put((tuple(key), nbytes))

    def _collect(self, futures: list[Future], results: dict[Any, list[Any]]) -> None:
        waiting = threading.Thread(
            target=self._wait, args=(list(futures),), name="relex-wait", daemon=True
        )
        waiting.start()
        left = len(futures)
        idle_s = 0.0
        while left:
            try:
                news = self._news.get(timeout=_LOOK_S)
            except queue.Empty:
                idle_s = 0.0 if self._client.nthreads() else idle_s + _LOOK_S
                if idle_s >= NO_WORKERS_S:
                    raise ClusterError(
                        f"the cluster has had no workers for {NO_WORKERS_S:.0f} s; their logs say "
                        "why they ended. Run the command again"
                    ) from None
                continue
            if isinstance(news, Exception):
                raise news
            if isinstance(news, tuple):
                self._report(*news)
                continue
            # Some at a time, and let go of at once: workers need not keep what is here.
            for future, result in zip(news, self._client.gather(news), strict=True):
                results[future.key] = result
                self._report(future.key, self._graph.nbytes.get(future.key, 0))
                future.release()
            left -= len(news)

    def _wait(self, futures: list[Future]) -> None:
        from distributed import as_completed

        try:
            done = as_completed(futures, loop=self._client.loop, raise_errors=False)
            for batch in done.batches():
                self._news.put(list(batch))
        except Exception as error:  # noqa: BLE001 - the waiting thread raises it
            self._news.put(error)

    def _report(self, key: Any, nbytes: int) -> None:
        # Once: a task may be run again, and what it tells may come after its result.
        if nbytes and key not in self._reported:
            self._reported.add(key)
            self._progress.advance(nbytes)

    def _abandon(self, futures: list[Future]) -> None:
        """Let go of everything, and wait for tasks that go on all the same: nothing stops them.

        Who goes on after an error may write to the same files.
        """

        def wait() -> None:
            # On a thread: a worker that was stopped would never answer.
            with contextlib.suppress(Exception):
                self._cancel(futures)
                while any(self._client.run(abandon, self._run, on_error="ignore").values()):
                    time.sleep(0.1)

        thread = threading.Thread(target=wait, name="relex-abandon", daemon=True)
        thread.start()
        thread.join(ABANDON_S)
        if thread.is_alive():
            warnings.warn(
                "tasks still run on workers, or these do not answer; what they write is left out, "
                "but restart them before the next run",
                RelexStreamWarning,
                stacklevel=2,
            )

    def _cancel(self, futures: list[Future]) -> None:
        from distributed import Future as FutureOf

        # By keys: an interruption may have come before there were futures.
        wanted = {future.key for future in futures}
        more: list[Future] = [
            FutureOf(key, self._client) for key in self._graph.outputs if key not in wanted
        ]
        self._client.cancel([*futures, *more])


def _prepare_worker(
    expected: dict[str, str], warm_up: WarmUp | None, formats: Any, paths: Sequence[str]
) -> _Found:
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
    return _Found(
        address=worker.address,
        host=socket.gethostname(),
        threads=worker.state.nthreads,
        resident_bytes=machine.resident_bytes(),
        available_bytes=machine.available_bytes(),
        limit_bytes=worker.memory_manager.memory_limit or 0,
        missing=tuple(path for path in paths if not os.path.lexists(path)),
    )


def _answer(address: str, future: Future) -> _Found:
    try:
        found: _Found = future.result()
    except RelexStreamError as error:
        raise ClusterError(f"worker {address}: {error}") from error
    except Exception as error:
        raise ClusterError(
            f"worker {address} cannot run relex-stream ({_first_line(error)}); "
            "start it in the same environment as this command"
        ) from error
    return found


def _threads_beside_gpus(dask_scheduler: Any) -> list[int]:
    """Run on the scheduler: return the threads of each worker that declares a GPU."""
    workers = dask_scheduler.workers.values()
    return [worker.nthreads for worker in workers if worker.resources.get(GPU, 0) > 0]


def _has_bokeh() -> bool:
    """Run on the scheduler: say whether it can draw its dashboard."""
    import importlib.util

    return importlib.util.find_spec("bokeh") is not None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
