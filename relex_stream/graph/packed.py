"""A stage on its way to a cluster, and what is left of it in each process there."""

from __future__ import annotations

import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from relex_stream.errors import ClusterError, telling
from relex_stream.graph.stages import Stage
from relex_stream.versions import difference, versions

TOPIC = "relex-stream"
"""Of the events by which tasks tell what they have done: run, key, bytes, warnings."""


class PackedStage:
    """A stage for other processes; a `StageAt`.

    Until a task works with it, it is bytes that nobody looks into: the scheduler of a cluster,
    which takes graphs apart, has no use for its files. In each process it is opened once, and
    closed when the cluster lets go of it there.

    Parameters
    ----------
    stage : Stage
    run : str
        Names this run of it; unique.
    workers : int
        Tasks that may work with it at a time in each process.
    """

    def __init__(self, stage: Stage[Any, Any, Any], run: str, workers: int) -> None:
        self._state = _State(run, workers, versions(), pickle.dumps(stage))
        self._opened: _Opened | None = None

    def __getstate__(self) -> _State:
        return self._state

    def __setstate__(self, state: _State) -> None:
        self._state, self._opened = state, None

    @contextmanager
    def turn(self, key: Hashable, nbytes: int) -> Iterator[Stage[Any, Any, Any]]:
        """Wait for one of the process's workers; tell the client once the work is done."""
        told: list[str] = []
        with _counted(self._state.run):
            opened = self._open()
            with opened.slots:
                _check_wanted(self._state.run)
                with telling(told.append):
                    yield opened.stage
                opened.stage.settle()
        keys = list(key) if isinstance(key, tuple) else []
        if keys or told:
            from distributed import get_worker

            get_worker().log_event(TOPIC, [self._state.run, keys, nbytes, told])

    def check_wanted(self) -> None:
        """As in `StageAt`."""
        _check_wanted(self._state.run)

    def _open(self) -> _Opened:
        with _lock:
            if self._opened is None:
                # Another copy may be here: one that the worker wrote to its disk and read again.
                run = self._state.run
                self._opened = _by_run.get(run) or _Opened(self._state)
                _by_run[run] = self._opened
            return self._opened


class _State(NamedTuple):
    """What of a stage travels."""

    run: str
    workers: int
    versions: dict[str, str]
    stage: bytes


class _Opened:
    """A stage in this process."""

    def __init__(self, state: _State) -> None:
        if differs := difference(state.versions, versions()):
            raise ClusterError(
                f"a worker has other versions than the command that sends it work: {differs}; "
                "install the same on all machines"
            )
        _blas.limit()
        weakref.finalize(self, _blas.release)
        # Who may send tasks may have any code run: the cluster is trusted with that already.
        self.stage: Stage[Any, Any, Any] = pickle.loads(state.stage)  # noqa: S301
        self.slots = threading.BoundedSemaphore(state.workers)


class _Blas:
    """Keeps BLAS at one thread while any stage is open here.

    Our products are small, and a number of threads would show in the bits of sums.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None

    def limit(self) -> None:
        with self._lock:
            if not self._users:
                self._limits = threadpool_limits(1, user_api="blas")
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._limits.restore_original_limits()


_blas = _Blas()
_lock = threading.Lock()
_by_run: weakref.WeakValueDictionary[str, _Opened] = weakref.WeakValueDictionary()
_running: Counter[str] = Counter()
_abandoned: set[str] = set()


@contextmanager
def _counted(run: str) -> Iterator[None]:
    """Count a task from before it opens anything, or refuse it."""
    with _lock:
        _check_wanted(run)
        _running[run] += 1
    try:
        yield
    finally:
        with _lock:
            _running[run] -= 1


def _check_wanted(run: str) -> None:
    if run in _abandoned:
        raise ClusterError("the command that sent this task has given it up")


def abandon(run: str) -> int:
    """Have this process begin no more tasks of a run; return how many still work."""
    with _lock:
        _abandoned.add(run)
        return _running[run]
