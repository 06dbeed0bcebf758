"""A stage's groups as a dask graph: which tasks they are cut into, and how those depend.

The graph holds descriptions alone: keys, block numbers, and the stage as one more key that every
task depends on, so that a cluster sends it once to each of its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from relex_stream.graph.stages import (
    FAN_IN,
    Group,
    Stage,
    bundles,
    run_here,
    run_leaves,
)

Key = tuple[Any, ...]

_LARGEST = 4 / 3
"""Of the bytes wanted of a task: they can be doubled or not, so from 2/3 of that to 4/3."""


class StageAt(Protocol):
    """A stage as a task finds it where it runs."""

    def turn(self, key: Hashable, nbytes: int) -> AbstractContextManager[Stage[Any, Any, Any]]:
        """Return a context in which a task of so many bytes may work with the stage."""

    def check_wanted(self) -> None:
        """Raise an exception if the work has been given up: a task may be long."""


@dataclass
class TaskGraph:
    """A dask graph and what its keys are.

    Attributes
    ----------
    tasks : dict
        The graph.
    outputs : dict
        Keys that end it; each gives the values of some groups, whose keys stand here.
    nbytes : dict
        Bytes that a key works on, for those that do; in the order to begin in.
    releases : dict
        How many keys of `nbytes` wait for this one alone.
    """

    tasks: dict[Key, Any] = field(default_factory=dict)
    outputs: dict[Key, tuple[Hashable, ...]] = field(default_factory=dict)
    nbytes: dict[Key, int] = field(default_factory=dict)
    releases: dict[Key, int] = field(default_factory=dict)


def build_graph(
    stage: StageAt,
    groups: Sequence[Group[Any, Any]],
    *,
    begins: bool,
    task_bytes: int,
    name: str,
) -> TaskGraph:
    """Return the graph of a stage.

    Parameters
    ----------
    stage : StageAt
    groups : sequence of Group
        Those without tasks are left out.
    begins : bool
        `Stage.begins`.
    task_bytes : int
        Bytes that are worth a dask task, or a third more: smaller groups share one, larger ones are
        cut at nodes of their tree of sums, which stays as it is.
    name : str
        Begins every key; unique on a cluster.
    """
    graph = TaskGraph()
    largest = int(_LARGEST * task_bytes)
    at = (f"{name}-stage",)
    graph.tasks[at] = stage
    for number, bundle in enumerate(bundles(groups, task_bytes)):
        keys = tuple(group.key for group in bundle)
        if all(group.nbytes <= largest or len(group.tasks) == 1 for group in bundle):
            # A prefix of their own: a cluster spreads evenly what depends on nothing, by prefixes.
            done: Key = (f"{name}-tensors", number)
            size = sum(group.nbytes for group in bundle)
            graph.tasks[done] = (_Call(_run_whole, bundle, done, size), at)
            graph.nbytes[done], graph.outputs[done] = size, keys
            continue
        (group,) = bundle
        done = _add_group(graph, at, group, number, largest, name, begins=begins)
        graph.outputs[done] = keys
    return graph


def _add_group(
    graph: TaskGraph,
    at: Key,
    group: Group[Any, Any],
    number: int,
    largest: int,
    name: str,
    *,
    begins: bool,
) -> Key:
    """Add the tasks of a group that is more than one; return the key that ends it."""
    leaves, level = _cut(group, largest)
    starts = range(0, len(group.tasks), leaves)
    value: list[Key] = []  # the key that gives it, if there is one
    if begins:
        key: Key = (f"{name}-begin", number)
        graph.tasks[key] = (_Call(_begin, group.key, group.given), at)
        graph.nbytes[key], graph.releases[key] = 0, len(starts)
        value = [key]
    elif group.given is not None:
        # Once, and not with each of many tasks: it may be large.
        key = (f"{name}-given", number)
        graph.tasks[key] = _Value(group.given)
        value = [key]
    for count in range(group.passes):
        nodes: list[Key] = []
        for start in starts:
            key = (f"{name}-blocks", number, count, start)
            stop = start + leaves
            size = sum(group.task_bytes[start:stop])
            call = _Call(_run_part, group.tasks[start:stop], level, key, size)
            graph.tasks[key] = (call, at, *value)
            graph.nbytes[key] = size
            nodes.append(key)
        last = count == group.passes - 1
        key = (f"{name}-finish", number) if last else (f"{name}-pass", number, count)
        nodes = _add_sums(graph, at, nodes, leaves, level, (f"{name}-sum", number, count))
        graph.tasks[key] = (_Call(_finish, group.key, last), at, *value, *nodes)
        if not last:
            graph.releases[key] = len(starts)
        value = [key]
    return key


def _add_sums(
    graph: TaskGraph, at: Key, nodes: list[Key], leaves: int, level: int, name: Key
) -> list[Key]:
    """Add what combines the nodes of a level up to the children of the root, which are returned.

    Each key of `nodes` has those of some `leaves`, at least two keys do.
    """
    per_node = FAN_IN ** (level + 1) // leaves
    while len(nodes) > per_node:
        level += 1
        above: list[Key] = []
        for start in range(0, len(nodes), per_node):
            key = (*name, level, start)
            graph.tasks[key] = (_Call(_combine), at, *nodes[start : start + per_node])
            above.append(key)
        nodes, per_node = above, FAN_IN
    return nodes


def _cut(group: Group[Any, Any], largest: int) -> tuple[int, int]:
    """Return how many leaves a dask task has, and the highest level of which that is whole nodes.

    As many as `largest` bytes hold, but at least one.

    A power of two, so that tasks end where nodes do: 1, 2 or 4 leaves, or nodes of 8, of 64.
    """
    mean = max(1, sum(group.task_bytes) // len(group.tasks))
    leaves = 1
    while 2 * leaves * mean <= largest and 2 * leaves < len(group.tasks):
        leaves *= 2
    return leaves, (leaves.bit_length() - 1) // 3


class _Call:
    """A function and its first arguments, opaque to dask (which looks into tuples and lists)."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function = function
        self._arguments = arguments

    def __call__(self, *inputs: Any) -> Any:
        return self._function(*self._arguments, *inputs)


@dataclass(frozen=True)
class _Value:
    """A group's value on its way from task to task, opaque to dask."""

    value: Any


def _begin(key: Hashable, given: Any, at: StageAt) -> _Value:
    with at.turn(None, 0) as stage:
        (value,) = stage.begin([Group(key, (), (), given)])
    return _Value(value)


def _run_whole(bundle: Sequence[Group[Any, Any]], key: Key, nbytes: int, at: StageAt) -> list[Any]:
    with at.turn(key, nbytes) as stage:
        return run_here(stage, bundle, at.check_wanted)


def _run_part(
    tasks: Sequence[Any],
    level: int,
    key: Key,
    nbytes: int,
    at: StageAt,
    *inputs: Any,
) -> list[Any]:
    value, _ = _value_first(inputs)
    with at.turn(key, nbytes) as stage:
        return run_leaves(stage, tasks, value, level, at.check_wanted)


def _combine(at: StageAt, *nodes: list[Any]) -> list[Any]:
    with at.turn(None, 0) as stage:
        return [stage.combine(list(chain.from_iterable(nodes)))]


def _finish(
    key: Hashable,
    last: bool,  # noqa: FBT001 - called by dask
    at: StageAt,
    *inputs: Any,
) -> Any:
    value, nodes = _value_first(inputs)
    with at.turn(None, 0) as stage:
        total = stage.combine(list(chain.from_iterable(nodes)))
        finished = stage.finish(key, value, total, last=last)
    return [finished] if last else _Value(finished)


def _value_first(inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Take the group's value, if there is one, from the rest of what a task depends on."""
    if inputs and isinstance(inputs[0], _Value):
        return inputs[0].value, inputs[1:]
    return None, inputs
