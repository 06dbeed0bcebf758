from __future__ import annotations

import functools
import math
import operator
import pickle
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from itertools import chain

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from relex_stream import costs
from relex_stream.graph import Group, Stage, Threads, grouped, run_in_order
from relex_stream.graph import threads as threads_module
from relex_stream.graph.stages import (
    FAN_IN,
    MAX_TASKS,
    TASK_BYTES,
    Tree,
    run_here,
    run_leaves,
)
from relex_stream.graph.tasks import build_graph
from relex_stream.specs import NoProgress


class Recorder:
    """A `Progress` that keeps what it is told, and from which thread."""

    def __init__(self):
        self.events = []
        self.threads = set()

    def _note(self, *event):
        self.events.append(event)
        self.threads.add(threading.get_ident())

    def note(self, text):
        self._note("note", text)

    def start(self, stage, total_bytes):
        self._note("start", stage, total_bytes)

    def advance(self, done_bytes):
        self._note("advance", done_bytes)

    def finish(self):
        self._note("finish")


def groups_of(sizes):
    """Groups of numbered tasks; sums of floats that show every change of their order.

    Each task of several is worth one of dask's.
    """
    return [
        Group(
            f"tensor {g}",
            tuple((g, i) for i in range(size)),
            tuple(i + (TASK_BYTES if size > 1 else 1) for i in range(size)),
        )
        for g, size in enumerate(sizes)
    ]


def value_of(task):
    group, place = task
    return np.random.default_rng([group, place]).standard_normal(3) * 10.0 ** (place % 17 - 8)


def add(partials):
    total = np.zeros(3)
    for partial in partials:
        total = total + partial
    return total


def keep(key, total):
    return key, total


def assert_same_results(found, expected):
    assert list(found) == list(expected)
    for key, (name, total) in expected.items():
        assert found[key][0] == name == key
        assert found[key][1].tobytes() == total.tobytes()


class Functions(Stage):
    """A stage of functions: `work` of one task, `combine`, `finish` of key and total."""

    def __init__(self, work=value_of, combine=add, finish=keep, fetch=None):
        super().__init__()
        self._functions = work, combine, finish
        self._fetch = fetch
        self.fetches = fetch is not None

    def work(self, tasks, values):
        return [self._functions[0](task) for task in tasks]

    def combine(self, partials):
        return self._functions[1](partials)

    def finish(self, key, value, total, *, last):
        return self._functions[2](key, total)

    def fetch(self, tasks):
        for task in tasks:
            self._fetch(task)


def run_plainly(groups, *functions):
    return run_in_order(Functions(*functions), groups)


def run(groups, *functions, workers=2, progress=None):
    return Threads().run(
        Functions(*functions),
        groups,
        workers=workers,
        name="test",
        progress=progress or NoProgress(),
    )


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_threads_give_the_bits_of_the_plain_loop_whoever_is_faster(workers):
    groups = groups_of([1, 5, 70, 8, 9, 64, 65])
    expected = run_plainly(groups, value_of, add, keep)

    for seed in range(3):

        def delayed(task, seed=seed):
            time.sleep(np.random.default_rng([seed, *task]).random() * 0.003)
            return value_of(task)

        assert_same_results(run(groups, delayed, workers=workers), expected)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 80), max_size=6), workers=st.sampled_from([1, 2, 4]))
def test_threads_give_the_bits_of_the_plain_loop_for_any_groups(sizes, workers):
    groups = groups_of(sizes)
    expected = run_plainly(groups, value_of, add, keep)
    assert list(expected) == [f"tensor {g}" for g, size in enumerate(sizes) if size]
    assert_same_results(run(groups, workers=workers), expected)


def test_the_plain_loop_adds_in_another_order_than_one_sum():
    # Else the comparisons above would say nothing about the order.
    groups = groups_of([70])
    tree = run_plainly(groups, value_of, add, keep)["tensor 0"][1]
    flat = add([value_of(task) for task in groups[0].tasks])
    assert tree.tobytes() != flat.tobytes()
    np.testing.assert_allclose(tree, flat)


@pytest.mark.parametrize("runner", [run, run_plainly])
def test_the_tree_of_sums_is_fixed(runner):
    def nest(partials):
        return functools.reduce(lambda left, right: f"({left}{right})", partials)

    letters = "abcdefghijklmnopqrs"
    groups = [Group("g", tuple(letters), (1,) * 19)]
    found = runner(groups, lambda letter: letter, nest, lambda _, tree: tree)["g"]
    assert found == nest([nest("abcdefgh"), nest("ijklmnop"), nest("qrs")])
    assert FAN_IN == 8


def test_a_single_task_is_not_combined():
    def refuse(partials):
        raise AssertionError(partials)

    assert run([Group("g", (7,), (1,))], lambda x: x, refuse, lambda k, x: (k, x)) == {
        "g": ("g", 7)
    }


def test_tasks_partials_and_keys_of_any_kind_pass_through():
    # dask looks into tuples and lists, and takes tuples with a callable for tasks, and strings
    # and tuples that are keys for other tasks' results.
    tasks = ((sum, [1, 2]), ("block", 0, 0), [("block", 0, 1)], {"finish": ("finish", 0, 0)}, None)
    groups = [Group(("finish", 0, 0), tasks, (1,) * 5), Group(3, tasks[:1], (1,))]
    found = run(groups, lambda task: [task], lambda parts: list(chain(*parts)), lambda k, x: (k, x))
    assert found == {("finish", 0, 0): (("finish", 0, 0), list(tasks)), 3: (3, [tasks[0]])}


def test_no_groups():
    progress = Recorder()
    assert run([], progress=progress) == {}
    assert run([Group("empty", (), ())]) == {}
    assert progress.events == [("start", "test", 0), ("finish",)]


# --- how it runs -------------------------------------------------------------------------------


def test_building_a_graph_computes_nothing():
    def refuse(*_):
        raise AssertionError("computed while building")

    graph = build_graph(refuse, groups_of([20, 0, 3]), begins=False, task_bytes=1, name="x")
    kinds = Counter(key[0] for key in graph.tasks)
    assert kinds == {"x-stage": 1, "x-blocks": 23, "x-sum": 3, "x-finish": 2}
    assert list(graph.outputs.values()) == [("tensor 0",), ("tensor 2",)]
    assert sum(graph.nbytes.values()) == 23 * TASK_BYTES + sum(range(20)) + sum(range(3))


def test_small_groups_share_a_task():
    many = [Group(f"small {i}", (i,), (TASK_BYTES // 4,)) for i in range(9)]
    large = [Group("large", (100,), (TASK_BYTES,)), Group("two", (101, 102), (TASK_BYTES, 1))]
    groups = [*many[:3], *large, *many[3:]]
    graph = build_graph(None, groups, begins=False, task_bytes=TASK_BYTES, name="x")
    # Three before the large one, then four as worth a task, then the rest.
    assert [len(keys) for keys in graph.outputs.values()] == [3, 1, 1, 4, 2]
    assert sum(graph.nbytes.values()) == sum(sum(group.task_bytes) for group in groups)
    progress = Recorder()
    parts = (lambda task: task, sum, lambda key, total: (key, total))
    found = run(groups, *parts, progress=progress)
    assert found == run_plainly(groups, *parts)
    assert list(found) == [group.key for group in groups]
    assert sum(event[1] for event in progress.events if event[0] == "advance") == sum(
        graph.nbytes.values()
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_tasks_run_at_a_time_than_there_are_workers(workers):
    running, most, lock = 0, 0, threading.Lock()

    def work(task):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return np.zeros(3)

    run(groups_of([10, 10, 10]), work, workers=workers)
    assert most == workers


def test_few_partial_results_are_alive_at_a_time():
    alive, most, lock = 0, 0, threading.Lock()

    class Partial:
        def __init__(self):
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self):
            nonlocal alive
            with lock:
                alive -= 1

    run(groups_of([MAX_TASKS]), lambda _: Partial(), lambda _: Partial(), lambda *_: None)
    assert most <= 3 * FAN_IN + 4


def test_blas_runs_on_one_thread_inside_and_as_before_outside():
    def blas_threads(_=None):
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    before = blas_threads()
    inside = run([Group("g", (1,), (1,))], blas_threads, add, lambda _, threads: threads)["g"]
    assert set(inside) == {1}
    assert blas_threads() == before


@pytest.mark.parametrize("place", ["work", "combine", "finish"])
@pytest.mark.parametrize("workers", [1, 4])
def test_errors_come_through_as_they_were_raised(place, workers):
    class OddError(Exception):
        pass

    error = OddError("tensor 1", 5)

    def fail_at(name, function):
        def wrapped(*arguments):
            if name == place:
                raise error
            return function(*arguments)

        return wrapped

    progress = Recorder()
    with pytest.raises(OddError) as caught:
        run(
            groups_of([20, 20]),
            fail_at("work", value_of),
            fail_at("combine", add),
            fail_at("finish", keep),
            workers=workers,
            progress=progress,
        )
    assert caught.value is error
    # A stage that broke off must not be reported as done.
    assert ("finish",) not in progress.events


@pytest.mark.parametrize("large", [True, False], ids=["part of a group", "whole groups"])
def test_after_an_error_long_tasks_end_early(monkeypatch, large):
    # Two tasks of dask's, each many calls of the stage.
    monkeypatch.setattr(costs, "thread_task_bytes", lambda *_: 100 * TASK_BYTES)
    groups = [
        Group(number, tuple((number, i) for i in range(size)), (TASK_BYTES,) * size)
        for number, size in enumerate([256] if large else [100, 100])
    ]
    worked = []
    both = threading.Barrier(2, timeout=30)

    def work(task):
        worked.append(task)
        if len(worked) <= 2:
            both.wait()
            if worked[0] == task:
                raise ValueError("first")
        time.sleep(0.02)
        return np.zeros(3)

    with pytest.raises(ValueError, match="first"):
        run(groups, work, workers=2)
    assert 2 <= len(worked) < 50


def test_after_an_error_no_thread_goes_on():
    def work(task):
        if task == (0, 0):
            raise ValueError("first")
        time.sleep(0.001)
        return np.zeros(3)

    with pytest.raises(ValueError, match="first"):
        run(groups_of([200]), work, workers=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("relex")]


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_hears_of_all_bytes_from_the_calling_thread(workers):
    progress = Recorder()
    groups = groups_of([30, 1, 9])
    run(groups, workers=workers, progress=progress)
    advances = [event[1] for event in progress.events if event[0] == "advance"]
    every = [size for group in groups for size in group.task_bytes]
    assert progress.events[0] == ("start", "test", sum(every))
    assert Counter(advances) == Counter(every)
    assert progress.events[-1] == ("finish",)
    assert len(progress.events) == 2 + len(every)
    assert progress.threads == {threading.get_ident()}


def test_tasks_begin_in_the_order_given():
    # Neighbours of a file are then read one after the other: read in dask's own order, a cold disk
    # made a build take half as long again.
    begun = []
    groups = groups_of([40, 3, 1, 70, 1])
    run(groups, lambda task: begun.append(task) or np.zeros(3), workers=1)
    assert begun == [task for group in groups for task in group.tasks]


# --- bundles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "tasks", "run_length"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (MAX_TASKS, MAX_TASKS, 1),
        (MAX_TASKS + 1, MAX_TASKS // 2 + 1, 2),
        (2 * MAX_TASKS, MAX_TASKS, 2),
        (2 * MAX_TASKS + 1, 342, 3),
    ],
)
def test_groups_of_very_many_items_are_cut_into_runs_of_neighbours(members, tasks, run_length):
    (group,) = grouped([("key", range(members), lambda member: TASK_BYTES + member)])
    assert group.key == "key"
    assert len(group.tasks) == len(group.task_bytes) == tasks <= MAX_TASKS
    assert [member for task in group.tasks for member in task] == list(range(members))
    assert all(len(task) == run_length for task in group.tasks[:-1])
    assert group.task_bytes == tuple(sum(TASK_BYTES + m for m in task) for task in group.tasks)


@given(sizes=st.lists(st.integers(0, 3 * TASK_BYTES), max_size=40))
def test_a_task_is_worth_its_overhead_and_little_more(sizes):
    (group,) = grouped([("key", range(len(sizes)), lambda member: sizes[member])])
    assert [member for task in group.tasks for member in task] == list(range(len(sizes)))
    for task, size in zip(group.tasks, group.task_bytes, strict=True):
        assert size == sum(sizes[member] for member in task)
        assert size - sizes[task[-1]] < TASK_BYTES  # it ended when it was large enough
        assert task is group.tasks[-1] or size >= TASK_BYTES


def test_groups_keep_their_order_and_their_own_sizes():
    groups = grouped([("b", [1, 2], lambda m: m * TASK_BYTES), ("a", [3], lambda m: 10 * m)])
    assert groups == [
        Group("b", ((1,), (2,)), (TASK_BYTES, 2 * TASK_BYTES)),
        Group("a", ((3,),), (30,)),
    ]


# --- fetching ----------------------------------------------------------------------------------


def fetched(groups, work, fetch, workers=2):
    return Threads().run(
        Functions(work, add, keep, fetch),
        groups,
        workers=workers,
        name="test",
        progress=NoProgress(),
    )


def test_every_task_is_fetched_in_order_on_a_thread_of_its_own():
    groups = groups_of([5, 0, 1, 30])
    seen, threads = [], set()

    def fetch(task):
        threads.add(threading.current_thread().name)
        seen.append(task)

    def slow(task):
        time.sleep(0.002)
        return value_of(task)

    assert_same_results(fetched(groups, slow, fetch), run_plainly(groups, value_of, add, keep))
    assert seen == [task for group in groups for task in group.tasks]
    assert threads == {"relex-fetch"}


def test_fetching_goes_no_further_ahead_than_it_may(monkeypatch):
    size = TASK_BYTES
    monkeypatch.setattr(threads_module, "FETCH_BYTES", 2.5 * size)
    lock, ahead, most = threading.Lock(), 0, 0
    groups = [
        Group(f"tensor {g}", tuple((g, i) for i in range(20)), (size,) * 20) for g in range(3)
    ]

    def fetch(_):
        nonlocal ahead, most
        with lock:
            ahead += size
            most = max(most, ahead)

    def work(task):
        nonlocal ahead
        time.sleep(0.001)
        with lock:
            ahead -= size
        return value_of(task)

    fetched(groups, work, fetch, workers=2)
    # What is begun when two tasks are ahead, and what is done but not yet reported.
    assert 3 * size <= most <= 3 * size + size


def test_fetching_ends_with_the_work_and_when_it_fails():
    def fetch(_):
        time.sleep(0.001)

    fetched(groups_of([1, 2]), value_of, fetch)

    def fail(task):
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fetched(groups_of([500]), fail, fetch)
    assert not [t for t in threading.enumerate() if t.name.startswith("relex")]


# --- larger tasks, as a cluster has them -------------------------------------------------------


class InTurn:
    """A `StageAt` that notes turns and checks that tasks take no other way to the stage."""

    def __init__(self, stage):
        self.stage = stage
        self.turns = []

    @contextmanager
    def turn(self, key, nbytes):
        self.turns.append((key, nbytes))
        yield self.stage

    def check_wanted(self):
        pass


class Passes(Functions):
    """Groups go through several passes; each value depends on the one before and on its place."""

    def __init__(self, begins):
        super().__init__()
        self.begins = begins

    def begin(self, groups):
        return [np.full(3, float(group.given)) for group in groups]

    def work(self, tasks, values):
        return [
            value_of(task) * (1 + np.sum(value)) for task, value in zip(tasks, values, strict=True)
        ]

    def finish(self, key, value, total, *, last):
        return (key, total + value) if last else np.tanh(total + value)


@settings(max_examples=200, deadline=None)
@given(
    leaves=st.lists(st.integers(0, 200), max_size=5),
    task_leaves=st.sampled_from([0.5, 1, 2, 3, 4, 8, 9, 16, 64, 100, 512, 4000]),
    passes=st.integers(1, 3),
    begins=st.booleans(),
)
def test_larger_tasks_give_the_bits_of_the_plain_loop(leaves, task_leaves, passes, begins):
    groups = [
        Group(
            group.key,
            group.tasks,
            group.task_bytes,
            # Where the stage does not begin, what was given is the value.
            given=number if begins else np.full(3, float(number)),
            passes=1 + (passes - 1) * (number % 2),
        )
        for number, group in enumerate(groups_of(leaves))
    ]
    stage = Passes(begins)
    if not begins:
        stage.begin = lambda groups: [group.given for group in groups]
    expected = run_in_order(stage, groups)
    at = InTurn(stage)
    size = int(task_leaves * TASK_BYTES)
    graph = build_graph(at, groups, begins=begins, task_bytes=size, name="x")
    results = dask.get(graph.tasks, list(graph.outputs))
    found = {
        key: value
        for keys, some in zip(graph.outputs.values(), results, strict=True)
        for key, value in zip(keys, some, strict=True)
    }
    assert_same_results(found, expected)
    # Every byte is told of once, by the key that worked on it.
    assert dict(turn for turn in at.turns if turn[0]) == {
        key: nbytes for key, nbytes in graph.nbytes.items() if "begin" not in key[0]
    }
    assert sum(graph.nbytes.values()) == sum(group.nbytes for group in groups)


def test_what_a_group_is_given_is_in_the_graph_once():
    given = np.zeros(10_000)
    group = Group("g", tuple(range(100)), (TASK_BYTES,) * 100, given=given)
    graph = build_graph(None, [group], begins=False, task_bytes=TASK_BYTES, name="x")
    large = [key for key, task in graph.tasks.items() if len(pickle.dumps(task)) > given.nbytes]
    assert large == [("x-given", 0)]


@given(leaves=st.integers(2, 512), task_leaves=st.floats(0.1, 600))
def test_tasks_are_about_as_large_as_asked_for(leaves, task_leaves):
    group = Group("g", tuple(range(leaves)), (TASK_BYTES,) * leaves)
    wanted = max(1, int(task_leaves * TASK_BYTES))
    graph = build_graph(None, [group], begins=False, task_bytes=wanted, name="x")
    sizes = [nbytes for key, nbytes in graph.nbytes.items() if key[0] == "x-blocks"]
    if 3 * group.nbytes <= 4 * wanted:
        assert not sizes  # one task for all
        return
    whole = sizes[:-1]
    assert len(set(whole)) == 1
    assert 3 * whole[0] <= 4 * wanted or whole[0] == TASK_BYTES
    assert 3 * whole[0] >= 2 * (wanted - 1) or 2 * whole[0] >= group.nbytes


@given(leaves=st.integers(1, 1000))
def test_few_nodes_of_a_tree_are_alive(leaves):
    alive = Counter()
    tree = Tree(lambda parts: "(" + "".join(parts) + ")")
    for leaf in range(leaves):
        tree.add(f"{leaf} ")
        alive[sum(map(len, tree._begun))] += 1
    assert max(alive) <= 1 + math.log(leaves, FAN_IN)
    assert [int(leaf) for leaf in re.findall(r"\d+", tree.root())] == list(range(leaves))


@given(leaves=st.integers(1, 600), level=st.integers(0, 3))
def test_nodes_are_those_of_the_tree(leaves, level):
    parts = np.random.default_rng(leaves).standard_normal(leaves)
    tree, whole = Tree(in_order, level), Tree(in_order)
    for part in parts:
        tree.add(part)
        whole.add(part)
    expected = list(parts)
    for _ in range(level):
        expected = [in_order(expected[i : i + FAN_IN]) for i in range(0, len(expected), FAN_IN)]
    assert tree.nodes() == expected
    while len(expected) > 1:
        expected = [in_order(expected[i : i + FAN_IN]) for i in range(0, len(expected), FAN_IN)]
    assert [whole.root()] == expected


def in_order(parts):
    return functools.reduce(operator.add, parts)


def test_work_in_one_task_is_fetched_a_call_ahead():
    seen = []
    stage = Functions(
        lambda task: seen.append(("work", task)) or value_of(task),
        fetch=lambda task: seen.append(("fetch", task)),
    )
    tasks = [(0, 0), (0, 1), (0, 2)]
    run_here(stage, [Group("g", tuple(tasks), (TASK_BYTES,) * 3)])
    fetched = [("fetch", tasks[1]), ("work", tasks[0]), ("fetch", tasks[2]), ("work", tasks[1])]
    assert seen == [*fetched, ("work", tasks[2])]
    seen.clear()
    run_leaves(stage, tasks, None, 0)
    assert seen == [*fetched, ("work", tasks[2])]


def test_buffers_of_a_thread_are_its_own_and_do_not_travel():
    stage = Functions(None, None, None)
    mine = stage.of_thread(dict)
    assert stage.of_thread(dict) is mine
    others = []
    thread = threading.Thread(target=lambda: others.append(stage.of_thread(dict)))
    thread.start()
    thread.join()
    assert others[0] is not mine
    assert pickle.loads(pickle.dumps(stage)).of_thread(dict) is not mine


def test_values_that_begin_a_group_are_made_in_its_turn():
    # A basis of every tensor, made before all work, would be memory that nobody needs yet.
    events = []

    class Begins(Functions):
        begins = True

        def begin(self, groups):
            events.extend(group.key for group in groups)
            return [None] * len(groups)

        def work(self, tasks, values):
            events.extend(tasks)
            return super().work(tasks, values)

    groups = groups_of([9, 9, 9])
    Threads().run(Begins(), groups, workers=1, name="test", progress=NoProgress())
    assert events == [event for group in groups for event in (group.key, *group.tasks)]
