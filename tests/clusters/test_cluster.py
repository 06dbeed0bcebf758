"""Stages on real clusters of processes: the same bits, and refusals that say why."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import distributed
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import relex_stream as rs
from relex_stream import costs, machine, planner
from relex_stream.base_weights import open_base
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.errors import (
    ClusterError,
    CorruptionError,
    MemoryLimitError,
    MissingDependencyError,
    OptionError,
    SourceError,
    StoreError,
)
from relex_stream.graph import (
    cluster,
    connect,
    open_executor,
    packed,
    stages,
    workers,
)
from relex_stream.graph.workers import Worker
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import NoProgress
from relex_stream.store import Store
from tests.clusters.runs import (
    Numbers,
    build,
    client_of,
    no_warm_up,
    run_stage,
    tree,
    within,
)
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.test_graph import Recorder, groups_of

# --- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.usefixtures("small_tasks")
def test_a_store_has_the_bytes_of_a_local_build(
    run: Trajectory, tmp_path: Path, scheduler: str, include_base: bool
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    # In two goes, so that one is an append.
    for steps in ("1:7", "1:20"):
        build(run, there, steps=steps, include_base=include_base, scheduler=scheduler)
        build(run, here, steps=steps, include_base=include_base)
        assert tree(there) == tree(here)
    assert rs.verify(there).problems == ()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"power_iterations": 3, "rank": 2, "target_steps": [25, 40]},
        {"svd": "exact"},
        {"history_steps": 9},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_tasks")
def test_an_output_has_the_bytes_of_a_local_run(
    run: Trajectory, tmp_path: Path, scheduler: str, options: dict[str, object]
) -> None:
    build(run, tmp_path / "store")
    options = {"target_steps": [30]} | options
    here = rs.extrapolate(tmp_path / "store", tmp_path / "here", **options)  # type: ignore[arg-type]
    there = rs.extrapolate(
        tmp_path / "store",
        tmp_path / "there",
        scheduler=scheduler,
        **options,  # type: ignore[arg-type]
    )
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.figures == here.figures
    assert there.plan.processes == 2


@pytest.mark.usefixtures("small_tasks")
def test_work_is_cut_into_tasks_that_both_processes_share(
    run: Trajectory, tmp_path: Path, scheduler: str
) -> None:
    # Else the comparisons above would be of one task with itself.
    with distributed.Client(scheduler, set_as_default=False) as client:
        before = _stream_of(client)
        build(run, tmp_path / "store", scheduler=scheduler)
        done = _stream_of(client)[len(before) :]
    blocks = [task for task in done if "-blocks" in task["key"]]
    assert len(blocks) > 20
    assert len({task["worker"] for task in blocks}) == 2
    assert sum("-sum" in task["key"] for task in done) >= 2


def _stream_of(client: distributed.Client) -> list[dict[str, str]]:
    return [
        {"key": str(task["key"]), "worker": str(task["worker"])}
        for task in client.get_task_stream()
    ]


def test_a_cluster_of_this_machine_does_the_same(run: Trajectory, tmp_path: Path) -> None:
    build(run, tmp_path / "here")
    build(run, tmp_path / "there", local_cluster=2, workers=1)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_relative_paths_are_those_of_the_command(
    run: Trajectory, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.base.parent)
    store = Path(os.path.relpath(tmp_path / "store"))
    build(run, tmp_path / "here")
    relative = Trajectory(
        **run.__dict__ | {"base": Path("base"), "checkpoints": Path("checkpoints")}
    )
    build(relative, store, scheduler=scheduler)
    assert tree(tmp_path / "store") == tree(tmp_path / "here")
    for base in (None, "base"):
        rs.extrapolate(
            store, f"{store}.out", target_steps=[30], base=base, scheduler=scheduler, overwrite=True
        )
    rs.extrapolate(tmp_path / "here", tmp_path / "here.out", target_steps=[30])
    assert tree(tmp_path / "store.out") == tree(tmp_path / "here.out")


def test_a_scheduler_file_is_as_good_as_an_address(
    run: Trajectory, tmp_path: Path, scheduler: str
) -> None:
    (tmp_path / "scheduler.json").write_text(f'{{"address": "{scheduler}"}}')
    build(run, tmp_path / "store", scheduler=str(tmp_path / "scheduler.json"))
    assert rs.open_store(tmp_path / "store").steps == run.steps


# --- what travels ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tasks")
def test_tasks_carry_descriptions_and_no_weights(
    run: Trajectory, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, list[int]] = {}
    get = distributed.Client.get

    def weigh(client, graph, *arguments, **options):  # type: ignore[no-untyped-def]
        for key, task in graph.items():
            kind = key[0].rpartition("-")[2]
            sizes.setdefault(kind, []).append(len(distributed.protocol.pickle.dumps(task)))
        return get(client, graph, *arguments, **options)

    monkeypatch.setattr(distributed.Client, "get", weigh)
    build(run, tmp_path / "store", scheduler=scheduler)
    rs.extrapolate(tmp_path / "store", tmp_path / "out", target_steps=[30], scheduler=scheduler)
    # A stage says which files there are, once; a block is some 100 bytes in a task.
    assert max(sizes["stage"]) < 20_000
    assert len(sizes["blocks"]) > 40
    assert max(sizes["blocks"]) < 3_000
    assert max(sizes["sum"] + sizes["begin"]) < 2_000


def test_a_stage_is_opened_once_in_a_process_and_closed_when_it_is_done(scheduler: str) -> None:
    groups = groups_of([40, 3])
    with distributed.Client(scheduler, set_as_default=False) as client:
        client.run(_forget_openings)
        executor = cluster.Cluster(client)
        executor.prepare(no_warm_up, None, NoProgress())
        executor.run(Opens(), groups, workers=2, name="opens", progress=NoProgress())
        opened = client.run(_openings)
        assert all(count["opened"] <= 1 for count in opened.values())
        assert any(count["opened"] == 1 for count in opened.values())
        until = time.monotonic() + 20
        while any(each["opened"] != each["closed"] for each in client.run(_openings).values()):
            assert time.monotonic() < until, "a stage is still open"
            time.sleep(0.05)


_OPENINGS: Counter[str] = Counter()


def _openings() -> Counter[str]:
    gc.collect()
    return _OPENINGS


def _forget_openings() -> None:
    _OPENINGS.clear()


class Opens(Numbers):
    """Counts, in each process, how often it is opened and closed."""

    def __setstate__(self, state):  # type: ignore[no-untyped-def]
        super().__setstate__(state)
        _OPENINGS["opened"] += 1

    def __del__(self) -> None:
        _OPENINGS["closed"] += 1


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_tasks_run_in_a_process_than_it_has_memory_for(
    scheduler: str, workers: int
) -> None:
    groups = groups_of([1] * 12)
    with distributed.Client(scheduler, set_as_default=False) as client:
        executor = cluster.Cluster(client)
        executor.prepare(no_warm_up, None, NoProgress())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costs, "cluster_task_bytes", lambda *_: 1)
            most = executor.run(
                AtATime(), groups, workers=workers, name="at a time", progress=NoProgress()
            )
    assert max(most.values()) == workers


class AtATime(Numbers):
    running = 0

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        AtATime.running += 1
        time.sleep(0.1)
        found = AtATime.running
        AtATime.running -= 1
        return [found] * len(tasks)


class Slow(Numbers):
    """Says which process worked on each task, after a while."""

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        return [np.eye(1, 2, os.getpid() % 2) for _ in tasks]


def test_processes_get_equal_shares(
    mortal: distributed.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # dask spreads what depends on little, by the prefix of keys: whole tensors must not share
    # theirs with what finishes others.
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
    monkeypatch.setattr(stages, "TASK_BYTES", 1)
    pids = list(mortal.run(os.getpid).values())
    if len({pid % 2 for pid in pids}) < 2:
        mortal.run(_add_to_pid, workers=[next(iter(mortal.nthreads()))])
    executor = cluster.Cluster(mortal)
    executor.prepare(no_warm_up, None, NoProgress())
    groups = groups_of([9, *[1] * 150, 9, 9])
    found = executor.run(Slow(), groups, workers=1, name="slow", progress=NoProgress())
    shares = sum(found.values())[0]
    assert shares.sum() == 150 + 27
    assert shares.min() > 0.3 * shares.sum(), shares


def _add_to_pid() -> None:
    getpid = os.getpid
    os.getpid = lambda: getpid() + 1


class Blas(Numbers):
    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        libraries = [each for each in threadpool_info() if each["user_api"] == "blas"]
        return [max(each["num_threads"] for each in libraries)] * len(tasks)

    def combine(self, partials):  # type: ignore[no-untyped-def]
        return max(partials)


def test_workers_use_one_thread_for_blas(scheduler: str) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        executor = cluster.Cluster(client)
        executor.prepare(no_warm_up, None, NoProgress())
        client.run(_give_blas_threads)
        found = executor.run(
            Blas(), groups_of([1] * 4), workers=2, name="blas", progress=NoProgress()
        )
        assert set(found.values()) == {1}


def _give_blas_threads() -> None:
    threadpool_limits(3, user_api="blas")


class FullDisk(Numbers):
    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")


def test_errors_of_the_disk_are_not_blamed_on_the_scheduler(scheduler: str) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        executor = cluster.Cluster(client)
        executor.prepare(no_warm_up, None, NoProgress())
        with pytest.raises(OSError, match="No space left on device: '/data/x'"):
            executor.run(FullDisk(), groups_of([1]), workers=1, name="full", progress=NoProgress())


def test_a_pickled_store_shows_the_steps_it_showed(run: Trajectory, tmp_path: Path) -> None:
    build(run, tmp_path / "store", steps="1:5")
    state = pickle.dumps(Store(tmp_path / "store"))
    build(run, tmp_path / "store", steps="1:9")
    assert pickle.loads(state).steps == tuple(range(1, 6))
    rs.drop(tmp_path / "store", after=2)
    build(run, tmp_path / "store", steps="1:2,6:9")
    with pytest.raises(StoreError, match="is not the store it was"):
        pickle.loads(state)


def test_a_pickled_reader_expects_the_files_that_were_there(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=range(1, 2))
    checkpoint = open_checkpoint(run.base, 0)
    with CheckpointReader() as reader:
        reader.expect(checkpoint)
        state = pickle.dumps(reader)
    (path, *_) = checkpoint.weights_paths
    os.utime(path, ns=(1, 1))
    with (
        pickle.loads(state) as copy,
        pytest.raises(SourceError, match="changed while it was being read"),
    ):
        copy.read(path, 0, np.empty(8, np.uint8))


def test_a_batch_is_told_of_its_own_files(
    run: Trajectory, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    packed_stage = packed.PackedStage.__init__

    def keep(self, stage, *arguments):  # type: ignore[no-untyped-def]
        sent.append(pickle.dumps(stage))
        packed_stage(self, stage, *arguments)

    monkeypatch.setattr(packed.PackedStage, "__init__", keep)
    build(run, tmp_path / "store", scheduler=scheduler, commit_steps=8)
    steps = [{int(step) for step in re.findall(rb"step_(\d+)/", state)} for state in sent]
    assert steps == [set(range(1, 9)), set(range(9, 17)), set(range(17, 21))]


def test_a_pickled_base_expects_the_files_that_were_there(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=range(1, 3))
    build(run, tmp_path / "store")
    store = Store(tmp_path / "store")
    with CheckpointReader() as reader:
        base = open_base(store, None, reader)
        state = pickle.dumps(base)
        (path, *_) = open_checkpoint(run.base, 0).weights_paths
        # The same bytes: checksums would not tell.
        os.utime(path, ns=(1, 1))
        at = BlockOf(next(each for each in store.manifest.tensors if each.blocks), 0)
        for each in (base, pickle.loads(state)):
            with pytest.raises(SourceError, match=f"{path}: changed while it was being read"):
                each.read(at, Workspace())


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "tcp://h:1", "local_cluster": 2}, "exclude each other"),
        ({"scheduler": "tcp://h:1", "workers": 2}, "--workers does not go with --scheduler"),
        ({"local_cluster": 0}, "--local-cluster must be at least 1, not 0"),
        ({"scheduler": "nothing-here"}, "neither an address like tcp://host:8786 nor"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message), open_executor(**options):  # type: ignore[arg-type]
        pass


def test_a_file_that_is_no_scheduler_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[]")
    with (
        pytest.raises(OptionError, match="file is not the scheduler file of a dask cluster"),
        open_executor(scheduler=str(tmp_path / "file")),
    ):
        pass


def test_without_distributed_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with (
        pytest.raises(MissingDependencyError, match=r"pip install 'relex-stream\[cluster\]'"),
        open_executor(local_cluster=1),
    ):
        pass


def test_a_scheduler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CONNECT_S", 0.3)
    with (
        pytest.raises(ClusterError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:1"),
        open_executor(scheduler="tcp://127.0.0.1:1"),
    ):
        pass


def test_a_scheduler_without_workers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_S", 0.5)
    with (
        distributed.LocalCluster(
            n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as empty,
        open_executor(scheduler=empty.scheduler_address) as executor,
        pytest.raises(ClusterError, match="has no workers; start some with: dask worker"),
    ):
        executor.prepare(no_warm_up, None, NoProgress())


def _pretend_other_numpy() -> None:
    found = packed.versions() | {"numpy": "1.0"}
    packed.versions = workers.versions = lambda: found  # type: ignore[assignment]


def _pretend_nothing() -> None:
    from relex_stream.versions import versions

    packed.versions = workers.versions = versions  # type: ignore[assignment]


def test_workers_of_other_versions_are_refused(
    run: Trajectory, tmp_path: Path, scheduler: str
) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        one = next(iter(client.nthreads()))
        client.run(_pretend_other_numpy, workers=[one])
        try:
            with pytest.raises(ClusterError, match=rf"worker {one}: other versions.*numpy 1\.0 "):
                build(run, tmp_path / "store", scheduler=scheduler)
        finally:
            client.run(_pretend_nothing)
    assert not (tmp_path / "store" / "HEAD").exists()


def test_workers_of_other_versions_that_come_later_are_refused(scheduler: str) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        executor = cluster.Cluster(client)
        executor.prepare(no_warm_up, None, NoProgress())
        client.run(_pretend_other_numpy)
        try:
            with pytest.raises(
                ClusterError, match=r"a worker has other versions.*numpy 1\.0 \(here"
            ):
                executor.run(
                    Numbers(), groups_of([9]), workers=1, name="late", progress=NoProgress()
                )
        finally:
            client.run(_pretend_nothing)


def test_paths_that_a_worker_does_not_see_are_named(scheduler: str, tmp_path: Path) -> None:
    with open_executor(scheduler=scheduler) as executor:
        executor.check_sees([tmp_path])
        with pytest.raises(ClusterError, match=f"does not see {tmp_path}/elsewhere; all machines"):
            executor.check_sees([tmp_path, tmp_path / "elsewhere"])


_lexists = os.path.lexists


def _blind_to(*prefixes: str) -> None:
    os.path.lexists = lambda path: not path.startswith(prefixes) and _lexists(path)  # type: ignore[assignment]


@contextmanager
def one_worker_blind_to(scheduler: str, path: Path) -> Iterator[None]:
    with client_of(scheduler) as client:
        client.run(_blind_to, str(path), workers=[next(iter(client.nthreads()))])
        try:
            yield
        finally:
            client.run(_blind_to)


@pytest.mark.parametrize("unseen", ["base", "checkpoints", "store"])
def test_a_build_needs_workers_that_see_all_it_reads_and_writes(
    run: Trajectory, tmp_path: Path, scheduler: str, unseen: str
) -> None:
    store = tmp_path / "store"
    path = {"base": run.base, "checkpoints": run.checkpoints, "store": store}[unseen]
    with (
        one_worker_blind_to(scheduler, path),
        pytest.raises(ClusterError, match=f"does not see {path}"),
    ):
        build(run, store, scheduler=scheduler)
    assert not (store / "HEAD").exists()
    assert not list(store.rglob("c.*"))


@pytest.mark.parametrize("unseen", ["base", "store", ".out.relex-partial"])
def test_an_extrapolation_needs_workers_that_see_all_it_reads_and_writes(
    run: Trajectory, tmp_path: Path, scheduler: str, unseen: str
) -> None:
    build(run, tmp_path / "store")
    path = run.base if unseen == "base" else tmp_path / unseen
    with (
        one_worker_blind_to(scheduler, path),
        pytest.raises(ClusterError, match=f"does not see {path}"),
    ):
        rs.extrapolate(tmp_path / "store", tmp_path / "out", target_steps=[30], scheduler=scheduler)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_errors_in_tasks_are_those_of_a_local_run(
    run: Trajectory, tmp_path: Path, scheduler: str
) -> None:
    build(run, tmp_path / "store")
    chunk = next((tmp_path / "store" / "deltas" / "a.weight").glob("c.0.*"))
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    messages = []
    for options in ({}, {"scheduler": scheduler}):
        with pytest.raises(CorruptionError, match=r"tensor a\.weight, block") as caught:
            rs.extrapolate(tmp_path / "store", tmp_path / "out", target_steps=[30], **options)
        messages.append(str(caught.value))
        assert not (tmp_path / "out").exists()
    assert messages[0] == messages[1]
    # And nothing of the output is left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_checkpoints_that_change_while_workers_read_are_noticed(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_trajectory(tmp_path, steps=range(1, 4))
    path = min(run.directories[2].glob("*.safetensors"))
    execute = cluster.Cluster.run

    def change_after(*arguments, **options):  # type: ignore[no-untyped-def]
        results = execute(*arguments, **options)
        os.utime(path, ns=(1, 1))
        return results

    monkeypatch.setattr(cluster.Cluster, "run", change_after)
    with pytest.raises(SourceError, match=f"{path}: changed while it was being read"):
        build(run, tmp_path / "store", scheduler=scheduler)
    assert not (tmp_path / "store" / "HEAD").exists()


def test_the_memory_limit_is_of_each_process(
    run: Trajectory, tmp_path: Path, scheduler: str
) -> None:
    with pytest.raises(MemoryLimitError, match="in each process of the cluster; raise"):
        build(run, tmp_path / "store", scheduler=scheduler, memory_limit=1 << 20)


def test_the_peak_is_that_of_any_process(scheduler: str) -> None:
    with distributed.Client(scheduler, set_as_default=False) as client:
        peak = cluster.Cluster(client).peak_bytes()
        assert peak >= max(machine.peak_bytes(), *client.run(machine.peak_bytes).values())
    huge = SimpleNamespace(run=lambda *_, **__: {"tcp://a": 1, "tcp://b": 1 << 50})
    assert cluster.Cluster(huge).peak_bytes() == 1 << 50


def test_limits_of_workers_are_kept() -> None:
    found = SimpleNamespace(resident_bytes=100 << 20, available_bytes=8 << 30, limit_bytes=0)
    limit = cluster.Cluster(None)._limit_of
    assert limit(found, 1) == planner.DEFAULT_LIMIT_BYTES
    # Sixteen on a machine share what is free there.
    assert limit(found, 16) == (100 << 20) + (8 << 30) // 16
    # dask gives a worker nothing to do above 0.8 of its limit.
    assert limit(SimpleNamespace(**found.__dict__ | {"limit_bytes": 400 << 20}), 1) == 300 << 20
    asked = cluster.Cluster(None, 2 << 30)._limit_of
    assert asked(found, 16) == 2 << 30
    assert asked(SimpleNamespace(**found.__dict__ | {"limit_bytes": 1 << 30}), 1) == 768 << 20


def test_a_plan_is_for_the_least_of_unlike_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20

    def worker(host: str, threads: int, resident: int, available: int, limit: int = 0) -> Worker:
        return Worker("tcp://w", host, threads, resident * mib, available * mib, limit * mib, ())

    found = [
        worker("roomy", 5, 101, 64_000),
        worker("shared", 2, 103, 211),
        worker("shared", 3, 97, 211),
        worker("capped", 7, 107, 64_000, 401),
    ]
    monkeypatch.setattr(cluster, "ask_workers", lambda *_, **__: found)
    monkeypatch.setattr(machine, "resident_bytes", lambda: 601 * mib)
    monkeypatch.setattr(machine, "available_bytes", lambda: 64_000 * mib)
    capacity = cluster.Cluster(None).prepare(no_warm_up, None, NoProgress())
    assert capacity == planner.Capacity(
        processes=4,
        workers=7,
        workers_fixed=False,
        reserved_bytes=107 * mib,
        memory_limit_bytes=97 * mib + 211 * mib // 2,
        command_reserved_bytes=601 * mib,
        # One that holds much already gets half the default on top.
        command_limit_bytes=601 * mib + planner.DEFAULT_LIMIT_BYTES // 2,
    )
    # Whoever asks for more than is free gets it, but not more than dask lets a worker have.
    capacity = cluster.Cluster(None, 499 * mib).prepare(no_warm_up, None, NoProgress())
    assert capacity.memory_limit_bytes == int(0.75 * 401 * mib)
    capacity = cluster.Cluster(None, 251 * mib).prepare(no_warm_up, None, NoProgress())
    assert capacity.memory_limit_bytes == capacity.command_limit_bytes == 251 * mib


def test_tasks_are_cut_for_the_threads_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        costs, "cluster_task_bytes", lambda *arguments: asked.append(arguments) or 1
    )
    groups = groups_of([3, 1])
    with within({"nthreads": 1}, {"nthreads": 3}) as scheduler, client_of(scheduler) as client:
        capacity = cluster.Cluster(client).prepare(no_warm_up, None, NoProgress())
        run_stage(client, Numbers(), groups)
    assert (capacity.processes, capacity.workers) == (2, 3)
    assert asked == [(sum(group.nbytes for group in groups), 4, stages.TASK_BYTES)]


def test_the_dashboard_is_named(scheduler: str) -> None:
    progress = Recorder()
    with open_executor(scheduler=scheduler, progress=progress):
        pass
    (event,) = progress.events
    assert event[0] == "note"
    assert re.fullmatch(
        rf"dask scheduler at {scheduler}, dashboard at http://127\.0\.0\.1:\d+/status( \(.*\))?",
        event[1],
    )


def test_nothing_of_distributed_is_loaded_without_a_cluster() -> None:
    import subprocess
    import sys

    program = "import relex_stream.api, sys; print('distributed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


def test_warnings_are_given_once_by_the_command(tmp_path: Path, scheduler: str) -> None:
    run = make_trajectory(tmp_path, steps=range(1, 3), change_share=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(run, tmp_path / "store", scheduler=scheduler)
    assert [str(warning.message).partition(" has")[0] for warning in caught] == ["step 1", "step 2"]
