from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from relex_stream import graph as graph_module
from relex_stream.graph import (
    FAN_IN,
    MAX_TASKS,
    TASK_BYTES,
    Group,
    build_graph,
    grouped,
    run_groups,
    run_in_order,
)
from relex_stream.specs import NoProgress


class Recorder:
    """A `Progress` that keeps what it is told, and from which thread."""

    def __init__(self):
        self.events = []
        self.threads = set()

    def _note(self, *event):
        self.events.append(event)
        self.threads.add(threading.get_ident())

    def start(self, stage, total_bytes):
        self._note("start", stage, total_bytes)

    def advance(self, done_bytes):
        self._note("advance", done_bytes)

    def finish(self):
        self._note("finish")


def groups_of(sizes):
    """Groups of numbered tasks; sums of floats that show every change of their order."""
    return [
        Group(f"tensor {g}", tuple((g, i) for i in range(size)), tuple(range(1, size + 1)))
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


def each(work):
    """Return `work` for one task as a function of several."""
    return lambda tasks: [work(task) for task in tasks]


def run_plainly(groups, work, combine, finish):
    return run_in_order(groups, each(work), combine, finish)


def run(groups, work=value_of, combine=add, finish=keep, *, workers=2, progress=None):
    return run_groups(
        groups,
        each(work),
        combine,
        finish,
        workers=workers,
        stage="test",
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
        return tuple(partials)

    letters = "abcdefghijklmnopqrs"
    groups = [Group("g", tuple(letters), (1,) * 19)]
    found = runner(groups, lambda letter: letter, nest, lambda _, tree: tree)["g"]
    assert found == (tuple("abcdefgh"), tuple("ijklmnop"), tuple("qrs"))
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

    graph, outputs, sizes = build_graph(groups_of([20, 0, 3]), refuse, refuse, refuse)
    assert Counter(key[0] for key in graph) == {"block": 23, "sum-1": 4, "sum-2": 1, "finish": 2}
    assert list(outputs.values()) == [("tensor 0",), ("tensor 2",)]
    assert sum(sizes.values()) == 20 * 21 // 2 + 3 * 4 // 2


def test_small_groups_share_a_task():
    many = [Group(f"small {i}", (i,), (TASK_BYTES // 4,)) for i in range(9)]
    large = [Group("large", (100,), (TASK_BYTES,)), Group("two", (101, 102), (1, 1))]
    groups = [*many[:3], *large, *many[3:]]
    parts = (list, sum, lambda key, total: (key, total))
    _, outputs, sizes = build_graph(groups, *parts)
    # Three before the large one, then four as worth a task, then the rest.
    assert [len(keys) for keys in outputs.values()] == [3, 1, 1, 4, 2]
    assert sum(sizes.values()) == sum(sum(group.task_bytes) for group in groups)
    progress = Recorder()
    found = run_groups(groups, *parts, workers=2, stage="test", progress=progress)
    assert found == run_in_order(groups, *parts)
    assert list(found) == [group.key for group in groups]
    assert sum(event[1] for event in progress.events if event[0] == "advance") == sum(
        sizes.values()
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
    inside = run([Group("g", (1,), (1,))], blas_threads, None, lambda _, threads: threads)["g"]
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
    return run_groups(
        groups,
        each(work),
        add,
        keep,
        workers=workers,
        stage="test",
        progress=NoProgress(),
        fetch=lambda tasks: [fetch(task) for task in tasks],
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
    monkeypatch.setattr(graph_module, "FETCH_BYTES", 100)
    lock, ahead, most = threading.Lock(), 0, 0
    groups = [Group(f"tensor {g}", tuple((g, i) for i in range(20)), (40,) * 20) for g in range(3)]

    def fetch(_):
        nonlocal ahead, most
        with lock:
            ahead += 40
            most = max(most, ahead)

    def work(task):
        nonlocal ahead
        time.sleep(0.001)
        with lock:
            ahead -= 40
        return value_of(task)

    fetched(groups, work, fetch, workers=2)
    # What is begun when 99 bytes are ahead, and what is done but not yet reported.
    assert 100 <= most <= 100 + 40


def test_fetching_ends_with_the_work_and_when_it_fails():
    def fetch(_):
        time.sleep(0.001)

    fetched(groups_of([1, 2]), value_of, fetch)

    def fail(task):
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fetched(groups_of([500]), fail, fetch)
    assert not [t for t in threading.enumerate() if t.name.startswith("relex")]
