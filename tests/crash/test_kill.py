"""Real processes, really killed, at moments nobody chose."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relex_stream import api
from relex_stream.errors import StoreError
from relex_stream.store import Store
from tests.crash.replay import read_tree
from tests.crash.runs import Sources, build, check_exports, check_whole, tiny_trajectory
from tests.make_checkpoints import Trajectory

REPOSITORY = Path(__file__).parents[2]

_CHILD = """
import sys, time
from pathlib import Path
from relex_stream.store import files
from tests.crash.runs import build

def slowly(function):
    # Most of a real run is spent between these calls.
    def call(*arguments):
        time.sleep(0.004)
        return function(*arguments)
    return call

for name in ("write_file", "write_tail", "rename", "sync_many", "replace_file", "remove_file"):
    setattr(files, name, slowly(getattr(files, name)))
base, checkpoints, store, workers = sys.argv[1:]
print("begun", flush=True)
build(Path(base), Path(checkpoints), Path(store), commit_steps=2, workers=int(workers))
print("done", flush=True)
"""

_EXTRAPOLATE = """
import sys, time
from relex_stream import api, writer

write = writer.OutputDirectory.write
def slowly(*arguments, **keywords):
    time.sleep(0.02)
    return write(*arguments, **keywords)

writer.OutputDirectory.write = slowly
print("begun", flush=True)
api.extrapolate(sys.argv[1], sys.argv[2], target_steps=[30, 40], rank=2, workers=2)
print("done", flush=True)
"""


def _start(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def _run_for(code: str, seconds: float | None, *arguments: object) -> float | None:
    """Run a child and kill it after some time; return how long it took if it ended by itself."""
    with _start(code, *arguments) as process:
        began = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            if process.wait() == 0:  # it ended by itself in that very moment
                return time.monotonic() - began
            assert process.returncode == -signal.SIGKILL
            return None
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
        return time.monotonic() - began


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("run"), range(1, 21))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """The store of a build that nobody disturbed."""
    store = tmp_path_factory.mktemp("whole") / "store"
    build(run.base, run.checkpoints, store)
    check_whole(store, dict.fromkeys(run.steps, run))
    return store


def _kill_builds(run: Trajectory, whole: Path, store: Path, kills: int, seed: int) -> None:
    """Kill a build again and again, each time where it got to, until it is through."""
    rng = random.Random(seed)
    sources: Sources = dict.fromkeys(run.steps, run)
    longest = _run_for(
        _CHILD, None, run.base, run.checkpoints, store.with_name("measure"), rng.choice((1, 2))
    )
    assert longest is not None
    killed, before = 0, 0
    while killed < kills:
        # The longer one lives the more it commits: all moments of a build are to be met.
        seconds = longest * rng.uniform(0.05, 0.9 if before == 0 else 0.4)
        arguments = (run.base, run.checkpoints, store, rng.choice((1, 2)))
        ended = _run_for(_CHILD, seconds, *arguments)
        try:
            steps = check_exports(store, sources)
        except StoreError:
            assert not (store / "HEAD").exists()
            steps = ()
        assert steps == run.steps[: len(steps)]
        assert len(steps) >= before
        before = len(steps)
        if ended is not None or (killed % 4 == 3 and steps):
            build(run.base, run.checkpoints, store)
            check_whole(store, sources)
            assert read_tree(store) == read_tree(whole)
            before = 0
            store = store.with_name(store.name + "x")
        killed += ended is None
    build(run.base, run.checkpoints, store)
    check_whole(store, sources)
    assert read_tree(store) == read_tree(whole)


def test_killed_builds_lose_nothing(run, whole):
    # Beside the undisturbed store, so that the hint to the base is the same.
    _kill_builds(run, whole, whole.with_name("killed"), kills=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_builds_lose_nothing_often(run, whole, seed):
    _kill_builds(run, whole, whole.with_name(f"killed-{seed}-"), kills=25, seed=seed)


def test_steps_committed_before_a_kill_are_not_read_again(run, whole):
    store = whole.with_name("skips")
    assert _run_for(_CHILD, None, run.base, run.checkpoints, store, 1) is not None
    assert build(run.base, run.checkpoints, store) == ()
    assert Store(store).steps == run.steps


def _kill_extrapolations(whole: Path, out: Path, wanted: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    longest = _run_for(_EXTRAPOLATE, None, whole, out.with_name(out.name + "-measure"))
    assert longest is not None
    absent = 0
    while absent < kills:
        _run_for(_EXTRAPOLATE, longest * rng.uniform(0.0, 0.9), whole, out)
        if out.exists():
            # It was through, at least with its last rename.
            assert read_tree(out) == read_tree(wanted)
            out = out.with_name(out.name + "x")
        else:
            absent += 1
    api.extrapolate(whole, out, target_steps=[30, 40], rank=2, workers=1)
    assert read_tree(out) == read_tree(wanted)
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    assert left == []


@pytest.fixture(scope="module")
def predicted(whole) -> Path:
    out = whole.with_name("predicted")
    api.extrapolate(whole, out, target_steps=[30, 40], rank=2)
    return out


def test_killed_extrapolations_leave_nothing(whole, predicted):
    _kill_extrapolations(whole, whole.with_name("out"), predicted, kills=3, seed=0)


@pytest.mark.slow
def test_killed_extrapolations_leave_nothing_often(whole, predicted):
    _kill_extrapolations(whole, whole.with_name("often"), predicted, kills=15, seed=1)
