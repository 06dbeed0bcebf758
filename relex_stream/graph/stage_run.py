"""One stage under way on a cluster: tasks handed over, results collected, the rest let go of."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dask

from relex_stream.errors import ClusterError, RelexStreamWarning
from relex_stream.graph.packed import TOPIC, abandon
from relex_stream.graph.tasks import TaskGraph
from relex_stream.graph.workers import first_line
from relex_stream.specs import Progress

if TYPE_CHECKING:
    from distributed import Client

Future = Any

NO_WORKERS_S = 60.0
"""Seconds without any worker after which the work is given up."""

ABANDON_S = 60.0
"""Seconds to wait for tasks that still run on workers after an error or an interruption."""

COLLECT_MOST = 256
COLLECT_S = 0.2
"""Results are collected so many at a time, or after so many seconds.

One by one each costs the scheduler and this process a round trip: a third of what a task takes them
(docs/scaling.md).
"""

_LOOK_S = 5.0


class StageRun:
    """One stage under way: futures of its results, and what its tasks tell meanwhile.

    Parameters
    ----------
    client : distributed.Client
    run : str
        As in `PackedStage`.
    graph : TaskGraph
        Its keys begin with `run`.
    progress : Progress
        Is told of bytes as tasks finish, once for each; the calling thread alone calls it.
    resources : dict, optional
        What each task takes of its worker's.
    warn : callable
        Is given what tasks warn of; from the calling thread too.
    """

    def __init__(
        self,
        client: Client,
        run: str,
        graph: TaskGraph,
        progress: Progress,
        resources: dict[str, float] | None,
        warn: Callable[[str], None],
    ) -> None:
        self._client = client
        self._run = run
        self._graph = graph
        self._progress = progress
        self._resources = resources
        self._warn = warn
        # Batches of finished futures, and what tasks told, for the thread that waits.
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reported: set[Any] = set()

    def results(self) -> Mapping[Any, list[Any]]:
        """Submit the graph and wait; return what its outputs give.

        Raises
        ------
        ClusterError
            If tasks end with their workers again and again, all workers are gone, or the scheduler.
        """
        from distributed import CancelledError, KilledWorker
        from distributed.comm.core import CommClosedError

        futures: list[Future] = []
        results: dict[Any, list[Any]] = {}
        self._client.subscribe_topic(TOPIC, self._hear)
        try:
            # dask's advice on large graphs is for those who write them.
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1PB"}):
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
                f"the cluster gave up the work ({first_line(error)}); "
                "is the scheduler still there? Run the command again"
            ) from error
        finally:
            with contextlib.suppress(Exception):
                self._client.unsubscribe_topic(TOPIC)
            if len(results) < len(self._graph.outputs):
                self._abandon(futures)
        return results

    def _hear(self, event: tuple[float, Any]) -> None:
        _, (run, key, nbytes, told) = event
        if run == self._run:
            self._news.put((tuple(key), nbytes, told))

    def _collect(self, futures: list[Future], results: dict[Any, list[Any]]) -> None:
        waiting = threading.Thread(
            target=self._wait, args=(list(futures),), name="relex-wait", daemon=True
        )
        waiting.start()
        left = len(futures)
        done: list[Future] = []
        collect_at = 0.0
        idle_s = 0.0
        while left:
            wait_s = _LOOK_S if not done else max(0.0, collect_at - time.monotonic())
            try:
                news = self._news.get(timeout=wait_s)
            except queue.Empty:
                news = []
            if isinstance(news, Exception):
                raise news
            if isinstance(news, tuple):
                key, nbytes, told = news
                self._report(key, nbytes)
                # Told before their task's result is: none is still on its way in the end.
                for text in told:
                    self._warn(text)
            elif news:
                if not done:
                    collect_at = time.monotonic() + COLLECT_S
                done += news
            elif not done:
                idle_s = 0.0 if self._client.nthreads() else idle_s + _LOOK_S
                _check_idle(idle_s)
            if done and (len(done) >= min(left, COLLECT_MOST) or time.monotonic() >= collect_at):
                self._take(done, results)
                left -= len(done)
                done = []

    def _take(self, done: Sequence[Future], results: dict[Any, list[Any]]) -> None:
        # Let go of at once: workers need not keep what is here.
        for future, result in zip(done, self._client.gather(done), strict=True):
            results[future.key] = result
            self._report(future.key, self._graph.nbytes.get(future.key, 0))
            future.release()

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


def _check_idle(idle_s: float) -> None:
    if idle_s >= NO_WORKERS_S:
        raise ClusterError(
            f"the cluster has had no workers for {NO_WORKERS_S:.0f} s; their logs say why they "
            "ended. Run the command again"
        )
