"""What dies, fails or is given up on a cluster, and that files are whole all the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import distributed
import numpy as np
import pytest

import relex_stream as rs
from relex_stream import costs, ingest
from relex_stream.errors import ClusterError, CorruptionError, StoreError
from relex_stream.graph import cluster, packed, run_in_order, stages
from relex_stream.specs import NoProgress
from relex_stream.store import StoreWriter, files
from relex_stream.store.write import Fence
from relex_stream.writer import Filler
from tests.clusters.runs import Numbers, build, no_warm_up, run_stage, tree, within
from tests.make_checkpoints import Trajectory
from tests.test_graph import Recorder, groups_of


class KillsOnce(Numbers):
    """Ends the first processes that come to a task, in the middle of it."""

    def __init__(self, marks: Path, deaths: int) -> None:
        super().__init__()
        self.marks = marks
        self.deaths = deaths

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        if tasks[0][1] == 5:
            for death in range(self.deaths):
                try:
                    (self.marks / str(death)).mkdir()
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().work(tasks, values)


def test_what_a_dead_worker_did_is_done_again(
    mortal: distributed.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
    groups = groups_of([20, 1, 9])
    progress = Recorder()
    executor = cluster.Cluster(mortal)
    executor.prepare(no_warm_up, None, NoProgress())
    found = executor.run(KillsOnce(tmp_path, 2), groups, workers=1, name="kills", progress=progress)
    assert len(list(tmp_path.iterdir())) == 2
    expected = run_in_order(Numbers(), groups)
    assert list(found) == list(expected)
    for key, total in expected.items():
        assert found[key].tobytes() == total.tobytes()
    # What was done twice is told of once.
    advances = [event[1] for event in progress.events if event[0] == "advance"]
    assert sum(advances) == sum(group.nbytes for group in groups)
    assert progress.threads == {threading.get_ident()}


def test_a_task_that_ends_every_worker_is_given_up(
    mortal: distributed.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
    executor = cluster.Cluster(mortal)
    executor.prepare(no_warm_up, None, NoProgress())
    with pytest.raises(ClusterError, match="was running on 4 workers when they died"):
        executor.run(
            KillsOnce(tmp_path, 9), groups_of([9]), workers=1, name="kills", progress=NoProgress()
        )


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("stage", ["build", "extrapolate"])
def test_files_are_whole_after_workers_were_killed_at_random(
    mortal: distributed.Client, run: Trajectory, tmp_path: Path, stage: str
) -> None:
    build(run, tmp_path / "here")
    here = tmp_path / "here"
    if stage == "extrapolate":
        here = tmp_path / "here.out"
        rs.extrapolate(tmp_path / "here", here, target_steps=[30], power_iterations=6)
    stop = threading.Event()
    killed = 0

    def kill() -> None:
        nonlocal killed
        rng = np.random.default_rng(0)
        while not stop.wait(rng.random() * 0.4) and killed < 3:
            pids = list(mortal.run(os.getpid, on_error="ignore").values())
            if pids:
                os.kill(int(rng.choice(pids)), signal.SIGKILL)
                killed += 1

    killer = threading.Thread(target=kill)
    address = mortal.scheduler_info()["address"]
    executor_prepare = cluster.Cluster.prepare

    def prepare(*arguments):  # type: ignore[no-untyped-def]
        capacity = executor_prepare(*arguments)
        killer.start()  # not before: a worker that dies there is asked again by hand
        return capacity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.Cluster, "prepare", prepare)
        there = tmp_path / "there"
        if stage == "build":
            build(run, there, scheduler=address)
        else:
            rs.extrapolate(
                tmp_path / "here", there, target_steps=[30], power_iterations=6, scheduler=address
            )
    stop.set()
    killer.join()
    assert killed
    assert tree(there) == tree(here)


class Stuck(Numbers):
    """Fails in one task while another goes on for a while; marks when that ends."""

    def __init__(self, marks: Path) -> None:
        super().__init__()
        self.marks = marks

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        if tasks[0][1] == 0:
            (self.marks / "begun").touch()
            time.sleep(1.5)
            (self.marks / "ended").touch()
        elif tasks[0][1] == 1:
            while not (self.marks / "begun").exists():
                time.sleep(0.01)
            raise CorruptionError("tensor x, block 1: damaged")
        return super().work(tasks, values)


def test_after_an_error_no_task_is_left_running(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
    with distributed.Client(scheduler, set_as_default=False) as client:
        with pytest.raises(CorruptionError, match="tensor x, block 1: damaged"):
            run_stage(client, Stuck(tmp_path), groups_of([9]), workers=2)
        assert (tmp_path / "ended").exists()
        time.sleep(0.2)
        assert not any(client.processing().values())


def test_a_task_of_a_build_that_has_ended_writes_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        fence = writer.fence
        fence.check()
    with pytest.raises(StoreError, match="is not held by the build"):
        fence.check()
    with StoreWriter(tmp_path / "store") as writer:
        writer.fence.check()
        with pytest.raises(StoreError, match="is not held by the build"):
            fence.check()


def test_frames_are_written_only_while_the_build_holds_its_lock(
    run: Trajectory, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = StoreWriter.__enter__

    def of_another(self: StoreWriter) -> StoreWriter:
        enter(self)
        self.fence = Fence(self.path, b"another")
        return self

    monkeypatch.setattr(StoreWriter, "__enter__", of_another)
    with pytest.raises(StoreError, match="is not held by the build"):
        build(run, tmp_path / "store", scheduler=scheduler)
    assert not [path for path in tmp_path.rglob("c.*.*") if path.stat().st_size]


@pytest.fixture
def unsynced_when_counted(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What the thread of a task wrote and did not sync, for each task as it counts as done.

    Files that are new count with their directory, where names are made by tasks.
    """
    found: list[set[str]] = []
    of_thread = threading.local()

    def dirty() -> set[str]:
        return of_thread.__dict__.setdefault("dirty", set())

    def note(*paths: object) -> None:
        dirty().update(map(str, paths))

    write_frames, fill, fsync = ingest.write_frames, Filler.write, os.fsync
    log_event = distributed.Worker.log_event

    def write_and_note(root, *arguments):  # type: ignore[no-untyped-def]
        key = write_frames(root, *arguments)
        note(root / key, (root / key).parent)
        return key

    def fill_and_note(self, relative_path, *arguments):  # type: ignore[no-untyped-def]
        fill(self, relative_path, *arguments)
        note(self.directory / relative_path)

    def fsync_and_note(descriptor):  # type: ignore[no-untyped-def]
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced = {path for path in dirty() if os.path.samestat(os.stat(path), status)}
        dirty().difference_update(synced)
        of_thread.synced = getattr(of_thread, "synced", 0) + len(synced)

    def look(self, topic, message):  # type: ignore[no-untyped-def]
        if topic == packed.TOPIC and getattr(of_thread, "synced", 0) + len(dirty()):
            found.append(set(dirty()))
            of_thread.synced = 0
        log_event(self, topic, message)

    monkeypatch.setattr(ingest, "write_frames", write_and_note)
    monkeypatch.setattr(Filler, "write", fill_and_note)
    monkeypatch.setattr(os, "fsync", fsync_and_note)
    # One call for the whole file system is as good, and hides what it is called for.
    monkeypatch.setattr(files, "_sync_file_system", lambda root: False)
    monkeypatch.setattr(distributed.Worker, "log_event", look)
    return found


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("command", ["build", "extrapolate"])
def test_tasks_sync_all_that_they_wrote_before_they_count(
    run: Trajectory, tmp_path: Path, unsynced_when_counted: list[set[str]], command: str
) -> None:
    if command == "extrapolate":
        build(run, tmp_path / "store")
    with within({"nthreads": 2}, {"nthreads": 1}) as scheduler:
        if command == "build":
            build(run, tmp_path / "store", scheduler=scheduler, include_base=True)
        else:
            rs.extrapolate(
                tmp_path / "store", tmp_path / "out", target_steps=[30, 40], scheduler=scheduler
            )
    assert len(unsynced_when_counted) > 10
    assert set().union(*unsynced_when_counted) == set()


class Settles(Numbers):
    """Marks when it works and when it settles."""

    def __init__(self, marks: Path) -> None:
        super().__init__()
        self.marks = marks

    def work(self, tasks, values):  # type: ignore[no-untyped-def]
        self.of_thread(list).append(tasks[0])
        return super().work(tasks, values)

    def settle(self) -> None:
        for group, place in self.of_thread(list):
            (self.marks / f"{group}-{place}").touch()
        self.of_thread(list).clear()

    def finish(self, key, value, total, *, last):  # type: ignore[no-untyped-def]
        # What came before is on the disk by then.
        return len(list(self.marks.iterdir()))


def test_what_a_task_wrote_is_on_the_disk_before_it_counts(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "cluster_task_bytes", lambda *_: stages.TASK_BYTES)
    with distributed.Client(scheduler, set_as_default=False) as client:
        found = run_stage(client, Settles(tmp_path), groups_of([9]), workers=2)
    assert list(found.values()) == [9]
