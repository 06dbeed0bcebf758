"""A stage under way on a cluster: which workers get its tasks, how results come back."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import distributed
import pytest

from relex_stream.errors import RelexStreamWarning, telling, warn_from_task
from relex_stream.graph import run_in_order, stage_run
from relex_stream.graph.stage_run import StageRun
from relex_stream.graph.tasks import TaskGraph
from relex_stream.specs import NoProgress
from tests.clusters.runs import Numbers, client_of, prepared, processes, run_stage, within
from tests.test_graph import groups_of


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What runs ask of workers' resources."""
    found: list[object] = []
    get = distributed.Client.get

    def spy(*arguments, **options):  # type: ignore[no-untyped-def]
        found.append(options.get("resources"))
        return get(*arguments, **options)

    monkeypatch.setattr(distributed.Client, "get", spy)
    return found


# --- which workers -----------------------------------------------------------------------------


class Places(Numbers):
    """Says on which worker each task ran, and how many did at a time."""

    running = 0

    def __init__(self, share: float | None) -> None:
        super().__init__()
        self.device_share = share  # type: ignore[assignment]

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        Places.running += 1
        time.sleep(0.02)
        found = Places.running
        Places.running -= 1
        return [(distributed.get_worker().name, found)] * len(tasks)

    def combine(self, partials):  # type: ignore[no-untyped-def]
        return partials[0]


@pytest.fixture
def one_gpu() -> Iterator[distributed.Client]:
    """A cluster of two workers, of which one says that it has a GPU."""
    with (
        within(
            {"nthreads": 4, "name": "without"},
            {"nthreads": 4, "name": "with", "resources": {"GPU": 1}},
        ) as scheduler,
        client_of(scheduler) as client,
    ):
        yield client


@pytest.mark.usefixtures("each_a_task")
def test_tasks_with_a_device_go_where_there_is_one_and_share_it(
    one_gpu: distributed.Client, asked_for: list[object]
) -> None:
    found = run_stage(one_gpu, Places(0.5), groups_of([1] * 12), workers=4).values()
    assert {name for name, _ in found} == {"with"}
    assert max(running for _, running in found) == 2
    assert asked_for == [{"GPU": 0.5}]


@pytest.mark.usefixtures("each_a_task")
@pytest.mark.parametrize("share", [0.0, None])
def test_tasks_without_a_device_go_to_all(
    one_gpu: distributed.Client, asked_for: list[object], share: float | None
) -> None:
    found = run_stage(one_gpu, Places(share), groups_of([1] * 24), workers=4).values()
    assert {name for name, _ in found} == {"with", "without"}
    assert asked_for == [None]


# --- how results come back ---------------------------------------------------------------------


class Collecting:
    """In the place of a client: keeps what is collected together, and whether it is let go of."""

    def __init__(self) -> None:
        self.together: list[list[str]] = []
        self.released: list[str] = []
        self.collected = threading.Semaphore(0)

    def future(self, key: str) -> Any:
        return SimpleNamespace(key=key, release=lambda: self.released.append(key))

    def gather(self, futures: Sequence[Any]) -> list[list[str]]:
        self.together.append([future.key for future in futures])
        self.collected.release()
        return [[future.key.upper()] for future in futures]


def collect(
    monkeypatch: pytest.MonkeyPatch, finish: Any, count: int
) -> tuple[Collecting, dict[Any, list[Any]]]:
    """Collect results that come as `finish` gives them to a function, one or more at a time."""
    client, results = Collecting(), {}
    futures = [client.future(f"key {number}") for number in range(count)]
    monkeypatch.setattr(
        StageRun, "_wait", lambda self, futures: finish(client, futures, self._news.put)
    )
    run = StageRun(client, "run", TaskGraph(), NoProgress(), None, print)  # type: ignore[arg-type]
    run._collect(futures, results)
    return client, results


def test_results_that_come_one_by_one_are_collected_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_run, "COLLECT_S", 60.0)

    def one_by_one(client, futures, put):  # type: ignore[no-untyped-def]
        for future in futures:
            put([future])

    client, results = collect(monkeypatch, one_by_one, 600)
    assert [len(some) for some in client.together] == [256, 256, 88]
    assert results == {f"key {number}": [f"KEY {number}"] for number in range(600)}
    assert client.released == list(results)


def test_results_do_not_wait_long_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_run, "COLLECT_S", 0.01)
    waited = []

    def trickle(client, futures, put):  # type: ignore[no-untyped-def]
        for future in futures:
            put([future])
            waited.append(client.collected.acquire(timeout=2))

    client, results = collect(monkeypatch, trickle, 3)
    assert [len(some) for some in client.together] == [1, 1, 1]
    assert all(waited[:2])
    assert len(results) == 3


def test_neither_other_results_nor_news_put_off_what_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_run, "COLLECT_S", 0.02)
    collected_after = []

    def go_on(client, futures, put):  # type: ignore[no-untyped-def]
        for number, future in enumerate(futures):
            put([future])
            put((("another task",), 1, []))
            if client.collected.acquire(timeout=0.004):
                collected_after.append(number)

    collect(monkeypatch, go_on, 100)
    assert collected_after[0] < 50


@pytest.mark.usefixtures("each_a_task")
def test_many_results_of_a_cluster_cost_few_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    gather = distributed.Client.gather

    def spy(self, futures, *arguments, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(futures))
        return gather(self, futures, *arguments, **options)

    groups = groups_of([1] * 300)
    with within({"nthreads": 2}) as scheduler, client_of(scheduler) as client:
        monkeypatch.setattr(distributed.Client, "gather", spy)
        began = time.monotonic()
        found = run_stage(client, Numbers(), groups, workers=2)
        rounds = (time.monotonic() - began) / stage_run.COLLECT_S
    assert sum(sizes) == 300
    assert len(sizes) <= 2 + rounds
    for key, total in run_in_order(Numbers(), groups).items():
        assert found[key].tobytes() == total.tobytes()


def test_tasks_of_other_commands_are_not_listened_to() -> None:
    run = StageRun(None, "ours", TaskGraph(), NoProgress(), None, print)  # type: ignore[arg-type]
    run._hear((0.0, ("theirs", ["a key"], 3, ["a warning"])))
    run._hear((0.0, ("ours", ["our key"], 5, [])))
    assert run._news.get() == (("our key",), 5, [])
    assert run._news.empty()


@pytest.mark.usefixtures("each_a_task")
def test_an_interruption_before_there_are_futures_leaves_nothing_on_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get = distributed.Client.get

    def interrupted(*arguments, **options):  # type: ignore[no-untyped-def]
        futures = get(*arguments, **options)  # the traceback keeps them
        raise KeyboardInterrupt(len(futures))

    with within({"nthreads": 2}) as scheduler, client_of(scheduler) as client:
        monkeypatch.setattr(distributed.Client, "get", interrupted)
        with pytest.raises(KeyboardInterrupt, match="30") as caught:
            run_stage(client, Numbers(), groups_of([1] * 30))
        until = time.monotonic() + 5
        while client.run_on_scheduler(_tasks_known) and time.monotonic() < until:
            time.sleep(0.02)
        assert client.run_on_scheduler(_tasks_known) == 0
        assert caught


def _tasks_known(dask_scheduler) -> int:  # type: ignore[no-untyped-def]
    return len(dask_scheduler.tasks)


# --- what tasks warn of ------------------------------------------------------------------------


class Warns(Numbers):
    """Warns in each of its methods, with the same words in many tasks."""

    begins = True

    def begin(self, groups):  # type: ignore[no-untyped-def]
        warn_from_task("begun")
        return super().begin(groups)

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        warn_from_task("worked")
        warn_from_task(f"worked on {tasks[0][1] % 3}")
        return super().work(tasks, values)

    def combine(self, partials):  # type: ignore[no-untyped-def]
        warn_from_task("combined")
        return super().combine(partials)

    def finish(self, key, value, total, *, last):  # type: ignore[no-untyped-def]
        warn_from_task(f"finished {key}")
        return super().finish(key, value, total, last=last)


@pytest.mark.usefixtures("cut_to_leaves")
@pytest.mark.parametrize("where", ["a process of its own", "this process"])
def test_what_tasks_warn_of_is_given_once_by_who_sent_them(where: str) -> None:
    begun = processes(1) if where == "a process of its own" else within({"nthreads": 2})
    with (
        begun as scheduler,
        client_of(scheduler) as client,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        executor = prepared(client)
        for _ in range(2):
            executor.run(Warns(), groups_of([20]), workers=2, name="w", progress=NoProgress())
    assert {warning.category for warning in caught} == {RelexStreamWarning}
    texts = [str(warning.message) for warning in caught]
    assert texts[0] == "begun"
    assert texts[-1] == "finished tensor 0"
    assert sorted(texts[1:-1]) == ["combined", "worked", *(f"worked on {n}" for n in range(3))]


def test_without_a_cluster_they_are_warnings_as_any() -> None:
    with pytest.warns(RelexStreamWarning, match="^once$"):
        warn_from_task("once")
    told: list[str] = []
    with telling(told.append):
        warn_from_task("here")
        elsewhere = threading.Thread(target=_warn_elsewhere)
        elsewhere.start()
        elsewhere.join()
    assert told == ["here"]
    with pytest.warns(RelexStreamWarning, match="^again$"):
        warn_from_task("again")


def _warn_elsewhere() -> None:
    with pytest.warns(RelexStreamWarning, match="^elsewhere$"):
        warn_from_task("elsewhere")
