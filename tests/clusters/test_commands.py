"""Commands on a cluster as processes of their own: interrupted, killed, and several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import distributed
import pytest

import relex_stream as rs
from relex_stream.graph import connect
from tests.clusters.runs import client_of, processes, tree
from tests.clusters.slow import count, slow_down, speed_up
from tests.make_checkpoints import Trajectory, make_trajectory

REPOSITORY = Path(__file__).parents[2]

_COMMAND = """
import signal, sys
# A shell that runs tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from typing import Self
from relex_stream import costs
from relex_stream.cli.main import main
from relex_stream.graph import stages, threads
from tests.clusters.slow import slow_down
slow_down(Path(sys.argv.pop(1)), 0.7)
stages.TASK_BYTES = threads.TASK_BYTES = 1 << 10
costs.cluster_task_bytes = lambda *_: 1 << 10
main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """Three steps of forty tensors, each of which is a task."""
    tensors = {f"layers.{layer}.weight": (40, 30) for layer in range(40)}
    root = tmp_path_factory.mktemp("run")
    return make_trajectory(root, steps=range(1, 4), tensors=tensors, change_share=0.1)


@pytest.fixture(scope="module")
def whole(run: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a store and an output that nobody disturbed."""
    root = tmp_path_factory.mktemp("whole")
    rs.build_store(run.base, run.checkpoints, root / "store")
    rs.extrapolate(root / "store", root / "out", target_steps=[30])
    return root


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with processes(2, 2) as address:
        yield address


@pytest.fixture
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tasks leave marks."""
    return tmp_path_factory.mktemp("marks")


@contextmanager
def slow(scheduler: str, marks: Path, seconds: float) -> Iterator[distributed.Client]:
    with client_of(scheduler) as client:
        client.run(slow_down, marks, seconds)
        try:
            yield client
        finally:
            client.run(speed_up)


def start(marks: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, str(marks), *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(true, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


def begin(marks: Path, tasks: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a command; return once so many tasks have begun."""
    process = start(marks, *arguments)
    wait_until(lambda: count(marks, "begun") >= tasks or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command; return its status and what it said."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def tasks_known(dask_scheduler) -> int:  # type: ignore[no-untyped-def]
    return len(dask_scheduler.tasks)


def clients_known(dask_scheduler) -> int:  # type: ignore[no-untyped-def]
    return len([name for name in dask_scheduler.clients if name.startswith("Client-")])


def arguments_of(command: str, run: Trajectory, whole: Path, there: Path) -> list[object]:
    if command == "build-store":
        return [command, run.base, run.checkpoints, there / "store"]
    return [command, whole / "store", there / "out", "--target-step", 30]


def run_again(command: str, run: Trajectory, whole: Path, there: Path, scheduler: str) -> None:
    """Run a command to its end, and compare what it makes."""
    if command == "build-store":
        rs.build_store(run.base, run.checkpoints, there / "store", scheduler=scheduler)
        assert tree(there / "store") == tree(whole / "store")
    else:
        rs.extrapolate(whole / "store", there / "out", target_steps=[30], scheduler=scheduler)
        assert tree(there / "out") == tree(whole / "out")


# --- interrupted and killed --------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build-store", "extrapolate"])
@pytest.mark.parametrize("where", [pytest.param("threads", marks=pytest.mark.slow), "cluster"])
def test_an_interrupted_command_ends_its_tasks_and_leaves_nothing_that_looks_whole(
    run: Trajectory,
    whole: Path,
    tmp_path: Path,
    marks: Path,
    scheduler: str,
    command: str,
    where: str,
) -> None:
    on = ["--workers", 2] if where == "threads" else ["--scheduler", scheduler]
    # Longer than a command takes that does not wait for its tasks.
    with slow(scheduler, marks, 0.7) as client:
        process = begin(marks, 2, *arguments_of(command, run, whole, tmp_path), *on)
        os.killpg(process.pid, signal.SIGINT)
        status, errors = ended(process)
        begun = count(marks, "begun")
        assert count(marks, "ended") == begun < 15
        wait_until(lambda: client.run_on_scheduler(tasks_known) == 0)
        assert count(marks, "begun") == begun
    assert status == 130
    assert errors.endswith("interrupted; nothing committed is lost\n")
    assert "Traceback" not in errors
    assert "Error" not in errors
    if command == "extrapolate":
        assert list(tmp_path.iterdir()) == []
    else:
        assert not (tmp_path / "store" / "HEAD").exists()
    run_again(command, run, whole, tmp_path, scheduler)


@pytest.mark.parametrize("command", ["build-store", "extrapolate"])
def test_a_command_goes_on_beside_the_tasks_of_one_that_was_killed(
    run: Trajectory, whole: Path, tmp_path: Path, marks: Path, scheduler: str, command: str
) -> None:
    with slow(scheduler, marks, 0.1) as client:
        arguments = arguments_of(command, run, whole, tmp_path)
        process = begin(marks, 3, *arguments, "--scheduler", scheduler)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        client.run(speed_up)
        run_again(command, run, whole, tmp_path, scheduler)
        # And it is forgotten: what had not begun never does.
        wait_until(lambda: client.run_on_scheduler(tasks_known) == 0)
        wait_until(lambda: count(marks, "ended") == count(marks, "begun"))
        assert count(marks, "begun") < 35
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "store" if command == "build-store" else "out"
    ]
    if command == "build-store":
        assert (tmp_path / "store" / "LOCK").stat().st_size == 0
        assert rs.verify(tmp_path / "store").problems == ()


_INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import distributed
from relex_stream.cli.main import main
from relex_stream.graph.cluster import Cluster

def interrupting(function):
    def call(*arguments, **options):
        os.killpg(0, signal.SIGINT)  # as Ctrl-C, to all that the terminal has
        return function(*arguments, **options)
    return call

if __name__ == "__main__":
    if sys.argv.pop(1) == "start":
        distributed.LocalCluster.__init__ = interrupting(distributed.LocalCluster.__init__)
    else:
        Cluster.run = interrupting(Cluster.run)
    main()
"""


@pytest.mark.parametrize("when", ["start", "run"])
def test_an_interruption_is_for_the_command_not_for_the_processes_it_starts(
    run: Trajectory, tmp_path: Path, when: str
) -> None:
    command = ["build-store", run.base, run.checkpoints, tmp_path / "store", "--local-cluster", "2"]
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, when, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; nothing committed is lost\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store" / "HEAD").exists()


class Interrupted:
    """In the place of a local cluster: Ctrl-C comes while it starts."""

    scheduler_address = "tcp://nowhere:1"

    def __init__(self, events: list[str]) -> None:
        self.events = events
        signal.raise_signal(signal.SIGINT)
        events.append("started")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.events.append("closed")


def test_a_local_cluster_that_is_interrupted_as_it_starts_is_closed() -> None:
    events: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), connect._started(Interrupted, events=events):
            events.append("used")
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["started", "closed"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# --- several at once ---------------------------------------------------------------------------


@contextmanager
def held_until_two_are_there(client: distributed.Client, marks: Path) -> Iterator[None]:
    """Hold up the tasks of commands that are started here."""
    (marks / "hold").touch()
    yield
    wait_until(lambda: client.run_on_scheduler(clients_known) == 3)
    wait_until(lambda: count(marks, "begun") > 0)
    (marks / "hold").unlink()


def test_builds_of_two_stores_at_once_are_both_right_and_a_second_of_one_is_refused(
    run: Trajectory, whole: Path, tmp_path: Path, marks: Path, scheduler: str
) -> None:
    sources = ["build-store", run.base, run.checkpoints]
    with slow(scheduler, marks, 0.04) as client:
        with held_until_two_are_there(client, marks):
            one = begin(marks, 1, *sources, tmp_path / "one", "--scheduler", scheduler)
            same, two = (
                start(marks, *sources, tmp_path / name, "--scheduler", scheduler)
                for name in ("one", "two")
            )
            status, errors = ended(same)
        assert [ended(one)[0], ended(two)[0]] == [0, 0]
    assert status == 2
    (line,) = errors.splitlines()
    assert line.startswith(f"error: another process is writing to {tmp_path / 'one'} (process ")
    assert f"(process {one.pid} on " in line
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(whole / "store")


def test_extrapolations_of_a_store_at_once_are_both_right(
    whole: Path, tmp_path: Path, marks: Path, scheduler: str
) -> None:
    with slow(scheduler, marks, 0.04) as client:
        with held_until_two_are_there(client, marks):
            one, two = (
                start(
                    marks,
                    *["extrapolate", whole / "store", tmp_path / out, "--target-step", step],
                    *["--scheduler", scheduler],
                )
                for out, step in {"one": 30, "two": 40}.items()
            )
        assert [ended(one)[0], ended(two)[0]] == [0, 0]
    rs.extrapolate(whole / "store", tmp_path / "forty", target_steps=[40])
    assert tree(tmp_path / "one") == tree(whole / "out")
    assert tree(tmp_path / "two") == tree(tmp_path / "forty")
