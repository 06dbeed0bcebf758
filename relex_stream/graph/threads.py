"""Stages on threads of this process, by dask's threaded scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import dask.threaded
from dask.callbacks import Callback
from threadpoolctl import threadpool_limits

from relex_stream import costs, machine, planner
from relex_stream.graph.stages import TASK_BYTES, Group, Stage, calls
from relex_stream.graph.tasks import build_graph
from relex_stream.locations import Location
from relex_stream.specs import Progress

FETCH_BYTES = 256 << 20
"""Work that tasks are fetched ahead of: enough to keep a disk with many requests at a time busy."""

WarmUp = Callable[[Any, Progress], None]
"""A function of `warmup`, and what it is called with."""


class Executor(Protocol):
    """Where the tasks of stages run."""

    is_local: bool
    """Whether that is this process."""

    def places(self) -> planner.Places:
        """Say what there is to work with."""

    def prepare(self, warm_up: WarmUp, formats: Any, progress: Progress) -> planner.Capacity:
        """Run a warm-up wherever tasks will run, and say what a plan may count on there."""

    def check_sees(self, paths: Sequence[Location]) -> None:
        """Check that paths are there wherever tasks will run.

        Raises
        ------
        ClusterError
            Naming the worker and the path.
        """

    def peak_bytes(self) -> int:
        """Return the most that any process held in memory, this one included."""

    def run(
        self,
        stage: Stage[Any, Any, Any],
        groups: Sequence[Group[Any, Any]],
        *,
        workers: int,
        name: str,
        progress: Progress,
    ) -> dict[Any, Any]:
        """Run a stage.

        Parameters
        ----------
        stage : Stage
        groups : sequence of Group
            Those without tasks are left out of the result.
        workers : int
            Tasks that may run at a time in each process; `Plan.workers`.
        name : str
            Of the stage, for `progress`.
        progress : Progress

        Returns
        -------
        dict
            What `Stage.finish` returned last, by the groups' keys, in their order.
        """


def one_blas_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS uses one thread.

    Our products are small: BLAS threads beside the workers only fight with them, and their number
    would show in the last bits of the sums.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


class Threads:
    """Runs stages on threads of this process; an `Executor`.

    Parameters
    ----------
    workers : int, optional
        Threads wanted; one per usable core if not given.
    memory_limit : int, optional
        Bytes this process may hold.

    Raises
    ------
    OptionError
        If fewer than one thread is wanted.
    """

    is_local = True

    def __init__(self, workers: int | None = None, memory_limit: int | None = None) -> None:
        self._workers = machine.wanted_workers(workers)
        self._workers_fixed = workers is not None
        self._memory_limit = memory_limit

    def places(self) -> planner.Places:
        """As in `Executor`."""
        return planner.Places(self._workers)

    def prepare(self, warm_up: WarmUp, formats: Any, progress: Progress) -> planner.Capacity:
        """As in `Executor`."""
        warm_up(formats, progress)
        return planner.Capacity(
            processes=1,
            workers=self._workers,
            workers_fixed=self._workers_fixed,
            reserved_bytes=machine.resident_bytes(),
            memory_limit_bytes=machine.memory_limit(
                self._memory_limit, planner.DEFAULT_LIMIT_BYTES
            ),
        )

    def check_sees(self, paths: Sequence[Location]) -> None:
        """Do nothing: they are this process's own."""

    def peak_bytes(self) -> int:
        """As in `Executor`."""
        return machine.peak_bytes()

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

        Tasks begin in the order given: neighbours in a file are read one after the other, which is
        what the system reads ahead for.
        """
        total = sum(group.nbytes for group in groups)
        here = _InProcess(stage)
        graph = build_graph(
            here,
            groups,
            begins=stage.begins,
            task_bytes=costs.thread_task_bytes(total, TASK_BYTES),
            name="relex",
        )
        progress.start(name, sum(graph.nbytes.values()))
        place_of = {key: place for place, key in enumerate(graph.nbytes)}

        def begin_in_order(_: Any, state: dict[str, Any]) -> None:
            # dask.order knows what waits for a task, not where its bytes lie. What is taken next is
            # the last of this list; sums are put there once they can be run, and go first.
            state["ready"].sort(key=place_of.__getitem__, reverse=True)

        fetcher = Fetcher(groups, stage.fetch if stage.fetches else None)

        def report(key: Any, _: Any, __: Any, state: dict[str, Any], *___: Any) -> None:
            released = graph.releases.get(key)
            if released:
                ready = state["ready"]
                ready[-released:] = sorted(
                    ready[-released:], key=place_of.__getitem__, reverse=True
                )
            size = graph.nbytes.get(key)
            if size:
                progress.advance(size)
                fetcher.advance(size)

        with (
            fetcher,
            ThreadPoolExecutor(workers, thread_name_prefix="relex") as pool,
            Callback(start_state=begin_in_order, posttask=report),
            one_blas_thread(),
        ):
            try:
                results = dask.threaded.get(
                    graph.tasks, list(graph.outputs), pool=pool, num_workers=workers
                )
            except BaseException:
                # The pool waits for the tasks that run.
                here.give_up()
                raise
        progress.finish()
        return {
            key: result
            for keys, some in zip(graph.outputs.values(), results, strict=True)
            for key, result in zip(keys, some, strict=True)
        }


class _InProcess:
    """A stage in the process that it was made in; a `StageAt`."""

    def __init__(self, stage: Stage[Any, Any, Any]) -> None:
        self._stage = stage
        self._given_up = False

    @contextmanager
    def turn(self, _key: Hashable, _nbytes: int) -> Iterator[Stage[Any, Any, Any]]:
        """Return the stage; how many tasks run at a time is for the pool of threads."""
        yield self._stage

    def check_wanted(self) -> None:
        """As in `StageAt`."""
        if self._given_up:
            raise _GivenUpError

    def give_up(self) -> None:
        """Have tasks that run end before their next call of the stage."""
        self._given_up = True


class _GivenUpError(Exception):
    """Ends a task whose result nobody waits for."""


class Fetcher:
    """Goes through tasks ahead of those that work on them, on a thread; a context manager.

    No further ahead than `FETCH_BYTES`: what is fetched too early is gone when it is wanted.

    Parameters
    ----------
    groups : sequence of Group
    fetch : callable or None
        `Stage.fetch`; nothing is done without.
    """

    def __init__(
        self,
        groups: Sequence[Group[Any, Any]],
        fetch: Callable[[Sequence[Any]], None] | None,
    ) -> None:
        self._groups = groups
        self._fetch = fetch
        self._changed = threading.Condition()
        self._ahead = 0
        self._ended = fetch is None
        self._thread = threading.Thread(target=self._run, name="relex-fetch", daemon=True)

    def __enter__(self) -> None:
        if self._fetch is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._fetch is not None:
            with self._changed:
                self._ended = True
                self._changed.notify()
            self._thread.join()

    def advance(self, done_bytes: int) -> None:
        """Take note of finished work."""
        with self._changed:
            self._ahead -= done_bytes
            self._changed.notify()

    def _run(self) -> None:
        assert self._fetch is not None
        for tasks, size in calls(self._groups):
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._ahead < FETCH_BYTES)
                if self._ended:
                    return
                self._ahead += size
            self._fetch(tasks)
