"""What a stage is: groups of tasks, what is done with each, and how results are put together.

A stage is a list of groups, one per tensor, usually. A group is a list of tasks, the leaves of a
tree: their results are combined eight at a time, in the order given, and the root is finished to
the group's value. Which leaves are run together, and where, changes neither the tree nor a bit.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

FAN_IN = 8
"""Results combined to one of the next level: 13 to 16 of 2,000 tasks' are alive at a time."""

MAX_TASKS = 512
"""Tasks per group. ``dask.order`` takes time quadratic in the tasks of a connected component."""

TASK_BYTES = 8 << 20
"""Bytes that are worth a task of a thread: dask takes 0.05 to 0.1 ms for each."""

Task = TypeVar("Task")
Value = TypeVar("Value")
Partial = TypeVar("Partial")
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Group(Generic[Task, Value]):
    """Tasks whose results belong together.

    Attributes
    ----------
    key : hashable
    tasks : tuple
    task_bytes : tuple of int
        The bytes each handles, for progress.
    given : object
        What `Stage.begin` makes the group's first value from.
    passes : int
        How often all tasks are run; each pass finishes to the value that the next begins with.
    """

    key: Any
    tasks: tuple[Task, ...]
    task_bytes: tuple[int, ...]
    given: Value | None = None
    passes: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all passes."""
        return sum(self.task_bytes) * self.passes


class Stage(ABC, Generic[Task, Value, Partial]):
    """What is done with groups; the base of every stage.

    Methods are called from several threads. A stage can be pickled if what it holds can: a cluster
    runs a copy in each of its processes.
    """

    begins = False
    """Whether `begin` is worth a task of its own."""

    fetches = False
    """Whether `fetch` should be called."""

    device_share = 0.0
    """The share of a device that each task takes; a cluster chooses workers by it."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def of_thread(self, make: Callable[[], Kept]) -> Kept:
        """Return what `make` made when this thread first asked for it; for buffers and the like."""
        kept: dict[Any, Kept] = self._local.__dict__
        if make not in kept:
            kept[make] = make()
        return kept[make]

    def begin(self, groups: Sequence[Group[Task, Value]]) -> Sequence[Value | None]:
        """Return the values that groups begin with; by default what they were given."""
        return [group.given for group in groups]

    @abstractmethod
    def work(self, tasks: Sequence[Task], values: Sequence[Value | None]) -> Sequence[Partial]:
        """Return a partial result for each task; `values` are those of the tasks' groups."""

    @abstractmethod
    def combine(self, partials: list[Partial]) -> Partial:
        """Combine partial results that stand next to each other in a group's order.

        One after the other and all at once give the same bits: ``combine([combine([a, b]), c])`` is
        ``combine([a, b, c])``. What is given stays as it is.
        """

    @abstractmethod
    def finish(self, key: Hashable, value: Value | None, total: Partial, *, last: bool) -> Any:
        """Return a group's value from that before the pass and the combined results.

        `last` says that no other pass follows.
        """

    def fetch(self, tasks: Sequence[Task]) -> None:
        """Ask the system for what `work` will read, without waiting."""

    def settle(self) -> None:
        """Put on the disk what this thread's calls of `work` wrote since the last call.

        A cluster calls it before a task counts as done: the machine may be gone a moment later.
        """


def grouped(
    items: Iterable[tuple[Hashable, Sequence[Any], Callable[[Any], int]]],
    *,
    given: Callable[[Any], Any] = lambda _: None,
    passes: Callable[[Any], int] = lambda _: 1,
) -> list[Group[Any, Any]]:
    """Cut each group's items into tasks: runs of neighbours of `TASK_BYTES` or a little more.

    Parameters
    ----------
    items : iterable of (key, items, bytes of an item)
    given, passes : callable
        By key, as in `Group`.

    Returns
    -------
    list of Group
        Every task is a tuple of items, worked on one after the other; a group has at most
        `MAX_TASKS`.
    """
    groups = []
    for key, members, bytes_of in items:
        runs: list[list[Any]] = []
        sizes: list[int] = []
        least = -(-len(members) // MAX_TASKS)
        for member in members:
            if not runs or (sizes[-1] >= TASK_BYTES and len(runs[-1]) >= least):
                runs.append([])
                sizes.append(0)
            runs[-1].append(member)
            sizes[-1] += bytes_of(member)
        tasks = tuple(tuple(run) for run in runs)
        groups.append(Group(key, tasks, tuple(sizes), given(key), passes(key)))
    return groups


class Tree(Generic[Partial]):
    """Combines partial results as they come: one for each level is alive at a time.

    Parameters
    ----------
    combine : callable
        `Stage.combine`.
    level : int, optional
        The level whose nodes are wanted, where there are more leaves beside those added; by default
        the root is.
    """

    def __init__(
        self, combine: Callable[[list[Partial]], Partial], level: int | None = None
    ) -> None:
        self._combine = combine
        self._level = level
        self._nodes: list[Partial] = []  # of the level wanted
        self._begun: list[list[Partial]] = []  # by level: what the node begun there has, as one
        self._counts: list[int] = []  # and of how many nodes

    def add(self, partial: Partial, level: int = 0) -> None:
        """Take the next node of a level."""
        if level == self._level:
            self._nodes.append(partial)
            return
        if level == len(self._begun):
            self._begun.append([])
            self._counts.append(0)
        begun = [*self._begun[level], partial]
        self._begun[level] = begun if len(begun) == 1 else [self._combine(begun)]
        self._counts[level] += 1
        if self._counts[level] == FAN_IN:
            self._end(level)

    def _end(self, level: int) -> None:
        if self._begun[level]:
            (node,) = self._begun[level]
            self._begun[level], self._counts[level] = [], 0
            self.add(node, level + 1)

    def nodes(self) -> list[Partial]:
        """Return the nodes of the level wanted; the last may have fewer leaves."""
        assert self._level is not None
        for below in range(self._level):
            if below < len(self._begun):
                self._end(below)
        return self._nodes

    def root(self) -> Partial:
        """Return the one result of all leaves; at least one was added."""
        level = 0
        while not self._begun[level] or any(self._begun[level + 1 :]):
            self._end(level)
            level += 1
        return self._begun[level][0]


def bundles(
    groups: Iterable[Group[Task, Value]], task_bytes: int
) -> Iterator[list[Group[Task, Value]]]:
    """Put neighbouring groups together that are less than a task, until they are worth one."""
    bundle: list[Group[Task, Value]] = []
    size = 0
    for group in groups:
        if not group.tasks:
            continue
        small = group.nbytes < task_bytes
        if bundle and (not small or size >= task_bytes):
            yield bundle
            bundle, size = [], 0
        if not small:
            yield [group]
            continue
        bundle.append(group)
        size += group.nbytes
    if bundle:
        yield bundle


def calls(groups: Iterable[Group[Task, Value]]) -> Iterator[tuple[list[Task], int]]:
    """Yield what each call of `Stage.work` gets, in the order that `run_here` has, and its bytes.

    A task of a group, or those of several small groups together.
    """
    for bundle in bundles(groups, TASK_BYTES):
        if all(len(group.tasks) == 1 for group in bundle):
            for number in range(max(group.passes for group in bundle)):
                some = [group for group in bundle if group.passes > number]
                yield (
                    [group.tasks[0] for group in some],
                    sum(group.task_bytes[0] for group in some),
                )
            continue
        for group in bundle:
            for _ in range(group.passes):
                for task, nbytes in zip(group.tasks, group.task_bytes, strict=True):
                    yield [task], nbytes


def run_here(
    stage: Stage[Task, Value, Partial],
    groups: Sequence[Group[Task, Value]],
    check_wanted: Callable[[], None] = lambda: None,
) -> list[Value]:
    """Run whole groups on this thread, one call of `Stage.work` after the other.

    `check_wanted` is called before each, and may raise.
    """
    ahead = _fetching_ahead(stage, [tasks for tasks, _ in calls(groups)], check_wanted)
    finished: list[Any] = []
    for bundle in bundles(groups, TASK_BYTES):
        values = list(stage.begin(bundle))
        if all(len(group.tasks) == 1 for group in bundle):
            for number in range(max(group.passes for group in bundle)):
                places = [i for i, group in enumerate(bundle) if group.passes > number]
                next(ahead)
                totals = stage.work(
                    [bundle[i].tasks[0] for i in places], [values[i] for i in places]
                )
                for i, total in zip(places, totals, strict=True):
                    last = number == bundle[i].passes - 1
                    values[i] = stage.finish(bundle[i].key, values[i], total, last=last)
        else:
            for i, group in enumerate(bundle):
                for number in range(group.passes):
                    tree = Tree(stage.combine)
                    for task in group.tasks:
                        next(ahead)
                        tree.add(stage.work([task], [values[i]])[0])
                    last = number == group.passes - 1
                    values[i] = stage.finish(group.key, values[i], tree.root(), last=last)
        finished += values
    return finished


def run_leaves(
    stage: Stage[Task, Value, Partial],
    tasks: Sequence[Task],
    value: Value | None,
    level: int,
    check_wanted: Callable[[], None] = lambda: None,
) -> list[Partial]:
    """Run some neighbouring tasks of a group that has more; return their nodes of a level.

    `check_wanted` as in `run_here`.
    """
    ahead = _fetching_ahead(stage, [[task] for task in tasks], check_wanted)
    tree = Tree(stage.combine, level)
    for task in tasks:
        next(ahead)
        tree.add(stage.work([task], [value])[0])
    return tree.nodes()


def _fetching_ahead(
    stage: Stage[Task, Value, Partial],
    together: Sequence[Sequence[Task]],
    check_wanted: Callable[[], None],
) -> Iterator[None]:
    """Ask, before each call of `Stage.work`, for what the next one reads."""
    for tasks in (*together[1:], ()):
        check_wanted()
        if stage.fetches and tasks:
            stage.fetch(tasks)
        yield


def run_in_order(
    stage: Stage[Task, Value, Partial], groups: Sequence[Group[Task, Value]]
) -> dict[Hashable, Value]:
    """Run a stage as a plain loop over the tasks: the reference for every executor."""
    results: dict[Hashable, Any] = {}
    for group in groups:
        if not group.tasks:
            continue
        (value,) = stage.begin([group])
        for number in range(group.passes):
            level = [stage.work([task], [value])[0] for task in group.tasks]
            while len(level) > 1:
                level = [stage.combine(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
            last = number == group.passes - 1
            value = stage.finish(group.key, value, level[0], last=last)
        results[group.key] = value
    return results
