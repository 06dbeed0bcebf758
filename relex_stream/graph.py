"""The dask graphs: block tasks, their sums in a fixed order, and what is done with each sum.

The only module that imports dask. A stage is a list of groups (one per tensor, usually); a group
is a list of tasks whose results are combined by a tree of fan-in 8, so that few partial results
are alive at a time, and in an order that the graph fixes, so that results do not depend on how
many workers there are or which is faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import dask.threaded
from dask.callbacks import Callback
from threadpoolctl import threadpool_limits

from relex_stream.specs import Progress

if TYPE_CHECKING:
    from dask.array import Array

    DaskArray: TypeAlias = Array

FAN_IN = 8
"""Results combined at a time: 13 to 16 of them are alive out of 2,000."""

MAX_TASKS = 512
"""Tasks per group. ``dask.order`` takes time quadratic in the tasks of a connected component."""

TASK_BYTES = 8 << 20
"""Bytes that are worth a task: dask takes 0.05 to 0.1 ms for each."""

FETCH_BYTES = 256 << 20
"""Work that tasks are fetched ahead of: enough to keep a disk with many requests at a time busy."""

Task = TypeVar("Task")
Partial = TypeVar("Partial")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Group(Generic[Task]):
    """Tasks whose results belong together, with the bytes each handles (for progress)."""

    key: Hashable
    tasks: tuple[Task, ...]
    task_bytes: tuple[int, ...]


def grouped(
    items: Iterable[tuple[Hashable, Sequence[Task], Callable[[Task], int]]],
) -> list[Group[tuple[Task, ...]]]:
    """Cut each group's items into tasks: runs of neighbours of `TASK_BYTES` or a little more.

    Parameters
    ----------
    items : iterable of (key, items, bytes of an item)

    Returns
    -------
    list of Group
        Every task is a tuple of items, worked on one after the other; a group has at most
        `MAX_TASKS`.
    """
    groups = []
    for key, members, bytes_of in items:
        runs: list[list[Task]] = []
        sizes: list[int] = []
        least = -(-len(members) // MAX_TASKS)
        for member in members:
            if not runs or (sizes[-1] >= TASK_BYTES and len(runs[-1]) >= least):
                runs.append([])
                sizes.append(0)
            runs[-1].append(member)
            sizes[-1] += bytes_of(member)
        groups.append(Group(key, tuple(tuple(run) for run in runs), tuple(sizes)))
    return groups


def one_blas_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS uses one thread.

    Our products are small: BLAS threads beside the workers only fight with them, and their number
    would show in the last bits of the sums.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def map_in_threads(
    function: Callable[[Task], Result], items: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield ``function(item)`` in the items' order, some at a time; for work without blocks."""
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="relex") as pool, one_blas_thread():
        while some := list(islice(remaining, 32 * workers)):
            yield from pool.map(function, some)


class _Call:
    """A function and its first argument, opaque to dask (which looks into tuples and lists)."""

    def __init__(self, function: Callable[..., Any], argument: Any) -> None:
        self._function = function
        self._argument = argument

    def __call__(self, *inputs: Any) -> Any:
        return self._function(self._argument, *inputs)


def run_groups(
    groups: Sequence[Group[Task]],
    work: Callable[[Sequence[Task]], Sequence[Partial]],
    combine: Callable[[list[Partial]], Partial],
    finish: Callable[[Hashable, Partial], Result],
    *,
    workers: int,
    stage: str,
    progress: Progress,
    fetch: Callable[[Sequence[Task]], None] | None = None,
) -> dict[Hashable, Result]:
    """Run a stage on threads of this process.

    Tasks begin in the order given: neighbours in a file are read one after the other, which is what
    the system reads ahead for.

    Parameters
    ----------
    groups : sequence of Group
        Groups without tasks are left out of the result.
    work : callable
        Called on a worker thread with one task, or with several small ones; returns a partial
        result for each.
    combine : callable
        Combines partial results that stand next to each other in the group's order.
    finish : callable
        Called with a group's key and combined result.
    workers : int
        Threads; never more tasks than this run at a time.
    stage : str
        Name of the stage for `progress`.
    progress : Progress
    fetch : callable, optional
        Called as `work` is and a while before it, on a thread of its own: to ask the system for
        the tasks' bytes.

    Returns
    -------
    dict
        What `finish` returned, by the groups' keys.
    """
    graph, outputs, sizes = build_graph(groups, work, combine, finish)
    progress.start(stage, sum(sizes.values()))
    place_of = {key: place for place, key in enumerate(sizes)}

    def begin_in_order(_: Any, state: dict[str, Any]) -> None:
        # dask.order knows what waits for a task, not where its bytes lie. What is taken next is the
        # last of this list; sums are put there once they can be run, and go first.
        state["ready"].sort(key=place_of.__getitem__, reverse=True)

    fetcher = Fetcher(groups, fetch)

    def report(key: Any, *_: Any) -> None:
        size = sizes.get(key)
        if size is not None:
            progress.advance(size)
            fetcher.advance(size)

    with (
        fetcher,
        ThreadPoolExecutor(workers, thread_name_prefix="relex") as pool,
        Callback(start_state=begin_in_order, posttask=report),
        one_blas_thread(),
    ):
        results = dask.threaded.get(graph, list(outputs), pool=pool, num_workers=workers)
    progress.finish()
    return {
        key: result
        for keys, some in zip(outputs.values(), results, strict=True)
        for key, result in zip(keys, some, strict=True)
    }


class Fetcher(Generic[Task]):
    """Goes through tasks ahead of those that work on them, on a thread; a context manager.

    No further ahead than `FETCH_BYTES`: what is fetched too early is gone when it is wanted.

    Parameters
    ----------
    groups : sequence of Group
    fetch : callable or None
        Called with tasks as `run_groups` calls `work`; nothing is done without.
    """

    def __init__(
        self, groups: Sequence[Group[Task]], fetch: Callable[[Sequence[Task]], None] | None
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
        for tasks, size in _together(self._groups):
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._ahead < FETCH_BYTES)
                if self._ended:
                    return
                self._ahead += size
            self._fetch(tasks)


def build_graph(
    groups: Sequence[Group[Task]],
    work: Callable[[Sequence[Task]], Sequence[Partial]],
    combine: Callable[[list[Partial]], Partial],
    finish: Callable[[Hashable, Partial], Result],
) -> tuple[dict[Any, Any], dict[Any, tuple[Hashable, ...]], dict[Any, int]]:
    """Return a dask graph, whose results each key that ends it lists, and each task's bytes."""
    graph: dict[Any, Any] = {}
    outputs: dict[Any, tuple[Hashable, ...]] = {}
    sizes: dict[Any, int] = {}
    for number, bundle in enumerate(_bundles(groups)):
        done = ("finish", number, 0)
        outputs[done] = tuple(group.key for group in bundle)
        if len(bundle) > 1:
            graph[done] = (_Call(_run_bundle, (bundle, work, finish)),)
            sizes[done] = sum(sum(group.task_bytes) for group in bundle)
            continue
        (group,) = bundle
        level = []
        for place, (task, size) in enumerate(zip(group.tasks, group.task_bytes, strict=True)):
            key = ("block", number, place)
            graph[key] = (_Call(_work_on_one, (work, task)),)
            sizes[key] = size
            level.append(key)
        depth = 0
        while len(level) > 1:
            depth += 1
            above = []
            for place, start in enumerate(range(0, len(level), FAN_IN)):
                key = (f"sum-{depth}", number, place)
                graph[key] = (_Call(_combine_all, combine), *level[start : start + FAN_IN])
                above.append(key)
            level = above
        graph[done] = (_Call(_finish_one, (group.key, finish)), level[0])
    return graph, outputs, sizes


def _bundles(groups: Sequence[Group[Task]]) -> Iterator[list[Group[Task]]]:
    """Put neighbouring groups of a single small task together, up to `TASK_BYTES`."""
    bundle: list[Group[Task]] = []
    size = 0
    for group in groups:
        if not group.tasks:
            continue
        small = len(group.tasks) == 1 and group.task_bytes[0] < TASK_BYTES
        if bundle and (not small or size >= TASK_BYTES):
            yield bundle
            bundle, size = [], 0
        if not small:
            yield [group]
            continue
        bundle.append(group)
        size += group.task_bytes[0]
    if bundle:
        yield bundle


def _together(groups: Sequence[Group[Task]]) -> Iterator[tuple[list[Task], int]]:
    """Yield tasks as they are worked on, those of a bundle together, with their bytes."""
    for bundle in _bundles(groups):
        if len(bundle) > 1:
            yield [group.tasks[0] for group in bundle], sum(group.task_bytes[0] for group in bundle)
            continue
        (group,) = bundle
        for task, size in zip(group.tasks, group.task_bytes, strict=True):
            yield [task], size


def _work_on_one(
    parts: tuple[Callable[[Sequence[Task]], Sequence[Partial]], Task],
) -> Partial:
    work, task = parts
    (partial,) = work([task])
    return partial


def _run_bundle(
    parts: tuple[
        list[Group[Task]],
        Callable[[Sequence[Task]], Sequence[Partial]],
        Callable[[Hashable, Partial], Result],
    ],
) -> list[Result]:
    bundle, work, finish = parts
    partials = work([group.tasks[0] for group in bundle])
    return [finish(group.key, partial) for group, partial in zip(bundle, partials, strict=True)]


def _finish_one(
    parts: tuple[Hashable, Callable[[Hashable, Partial], Result]], total: Partial
) -> list[Result]:
    key, finish = parts
    return [finish(key, total)]


def _combine_all(combine: Callable[[list[Any]], Any], *partials: Any) -> Any:
    return combine(list(partials))


def run_in_order(
    groups: Sequence[Group[Task]],
    work: Callable[[Sequence[Task]], Sequence[Partial]],
    combine: Callable[[list[Partial]], Partial],
    finish: Callable[[Hashable, Partial], Result],
) -> dict[Hashable, Result]:
    """Run a stage as a plain loop with the same tree of sums: the reference for `run_groups`."""
    results: dict[Hashable, Result] = {}
    for group in groups:
        level = [_work_on_one((work, task)) for task in group.tasks]
        while len(level) > 1:
            level = [combine(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
        if level:
            results[group.key] = finish(group.key, level[0])
    return results


class _ChunkCall:
    """One chunk of a lazy array: a function and the ranges it is called with."""

    def __init__(self, function: Callable[..., Any], *ranges: tuple[int, int]) -> None:
        self._function = function
        self._ranges = ranges

    def __call__(self) -> Any:
        return self._function(*self._ranges)


def lazy_array(
    function: Callable[[tuple[int, int], tuple[int, int]], Any],
    *,
    token: str,
    shape: tuple[int, ...],
    chunk: tuple[int, int],
    dtype: Any,
) -> DaskArray:
    """Return a dask array cut along its first two axes.

    Parameters
    ----------
    function : callable
        Called with the ranges of the first and the second axis; returns that chunk.
    token : str
        Equal for equal content.
    shape : tuple of int
        At least two axes.
    chunk : tuple of int
        Lengths of a chunk along the first two axes.
    """
    import dask.array
    from dask.base import tokenize

    name = "relex-" + tokenize(token, shape, chunk)
    cuts = [
        [(low, min(low + size, length)) for low in range(0, length, size)] or [(0, 0)]
        for length, size in zip(shape, chunk, strict=False)
    ]
    rest = (0,) * (len(shape) - 2)
    graph: dict[Any, Any] = {
        (name, i, j, *rest): (_ChunkCall(function, rows, slab),)
        for i, rows in enumerate(cuts[0])
        for j, slab in enumerate(cuts[1])
    }
    chunks = (
        tuple(high - low for low, high in cuts[0]),
        tuple(high - low for low, high in cuts[1]),
        *((length,) for length in shape[2:]),
    )
    return dask.array.Array(graph, name, chunks, dtype=dtype)
