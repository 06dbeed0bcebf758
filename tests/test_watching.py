"""A store follows a run: what arrives is stored in order, verified, and only then deleted."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import relex_stream as rs
from relex_stream import watching
from relex_stream.arrivals import Moment
from relex_stream.errors import (
    OptionError,
    RelexStreamWarning,
    SourceError,
    StoreBusyError,
)
from relex_stream.freeing import KeptError, Remover
from relex_stream.sources import open_checkpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.summaries import WatchEvent, WatchSummary
from relex_stream.watch_ledger import Ledger, VerifiedFile
from relex_stream.watch_options import BuildOptions, WatchOptions
from relex_stream.watching import Watch
from tests.crash.runs import tiny_trajectory
from tests.make_checkpoints import Trajectory, make_trajectory, raw, round_to, write_model
from tests.test_export import digests

Act = Callable[[], object]


class FakeClock:
    """Time that passes only while the watch waits; something may happen then."""

    def __init__(self, acts: Sequence[Act] = ()) -> None:
        self.now_s = 0.0
        self.acts = list(acts)
        self.waits = 0

    def now(self) -> Moment:
        # As old as their files' own times may be: only what was seen counts.
        return Moment(self.now_s, 0.0)

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self.now_s += seconds
        self.waits += 1
        if self.acts:
            self.acts.pop(0)()
        elif self.waits > 200:
            raise AssertionError("the watch does not end")


class Run:
    """A run whose checkpoints lie elsewhere until they arrive."""

    def __init__(self, root: Path, made: Trajectory) -> None:
        self.root = root
        self.base = made.base
        self.made = made
        self.checkpoints = root / "checkpoints"
        self.store = root / "run.store"
        self.events: list[WatchEvent] = []
        self.clock = FakeClock()
        self.stop = threading.Event()

    def arrive(self, *steps: int) -> None:
        for step in steps:
            shutil.copytree(
                self.made.directories[step].parent, self.checkpoints / f"global_step_{step}"
            )

    def directory(self, step: int) -> Path:
        return self.checkpoints / f"global_step_{step}" / "huggingface"

    def weights(self, step: int) -> Path:
        return self.directory(step) / "model.safetensors"

    def watch(
        self,
        *acts: Act,
        build: BuildOptions | None = None,
        kept: bool = True,
        tell: Callable[[WatchEvent], None] = lambda _: None,
        **options: Any,
    ) -> WatchSummary:
        def note(event: WatchEvent) -> None:
            self.events.append(event)
            tell(event)

        self.events.clear()
        self.clock = FakeClock(acts)
        settings = {"settle_s": 30.0, "poll_s": 10.0, "once": not acts} | options
        return Watch(
            self.base,
            self.checkpoints,
            self.store,
            options=WatchOptions(base_kept_elsewhere=kept, **settings),
            build_options=build or {"workers": 1},
            tell=note,
            stop=self.stop,
            clock=self.clock,
        ).run()

    def told(self, kind: str) -> list[int]:
        return [event.step for event in self.events if event.kind == kind]

    @property
    def stored(self) -> tuple[int, ...]:
        return Store(self.store).steps

    @property
    def with_weights(self) -> list[int]:
        return [step for step in self.made.steps if self.weights(step).exists()]

    def assert_exports(self, *steps: int) -> None:
        for step in steps or self.stored:
            out = self.root / f"export-{step}"
            rs.export(self.store, out, step=step, base=self.base)
            assert digests(out) == digests(self.made.directories[step])
            shutil.rmtree(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("made"), range(1, 21))


@pytest.fixture
def run(tmp_path, made) -> Run:
    return Run(tmp_path, made)


# --- arriving ------------------------------------------------------------------------------------


def test_what_is_there_is_stored_and_verified(run):
    run.arrive(1, 2, 3)
    summary = run.watch()
    assert (summary.ended, summary.steps_added, summary.steps_verified) == (
        *("once", (1, 2, 3)),
        (1, 2, 3),
    )
    assert run.told("stored") == [1, 2, 3]
    for event in run.events:
        assert event.verified
        assert event.problems == ()
        assert event.ratio == event.bytes_in / event.bytes_stored
        files = [path.stat().st_size for path in run.directory(event.step).iterdir()]
        assert event.bytes_in == sum(files)
    assert summary.bytes_in == sum(event.bytes_in for event in run.events)
    assert summary.bytes_stored == sum(event.bytes_stored for event in run.events)
    assert run.with_weights == [1, 2, 3]
    run.assert_exports()


def test_what_a_step_takes_is_told(run):
    run.arrive(1, 2)
    run.watch()
    store = Store(run.store)
    for row, event in enumerate(event for event in run.events if event.kind == "stored"):
        assert event.bytes_in == store.commit(row).source_bytes
        assert event.bytes_stored == store.frame_bytes[row].sum() + store.record_bytes(row)
        assert event.ratio == event.bytes_in / event.bytes_stored


def test_nothing_need_be_there_at_first(run):
    summary = run.watch(
        *[lambda: None] * 3, lambda: run.arrive(1), *[lambda: None] * 20, run.stop.set
    )
    assert (summary.ended, summary.steps_added) == ("stopped", (1,))


def test_checkpoints_are_taken_as_they_arrive(run):
    steps_seen: list[tuple[int, ...]] = []

    def next_one() -> None:
        step = (run.stored[-1] if (run.store / "HEAD").exists() else 0) + 1
        steps_seen.append((step,))
        run.arrive(step)

    idle = [lambda: None] * 3
    acts = [act for _ in range(3) for act in (next_one, *idle)]
    summary = run.watch(*acts, until=3)
    assert summary.ended == "until"
    assert summary.steps_added == run.stored == (1, 2, 3)
    assert steps_seen == [(1,), (2,), (3,)]


def test_nothing_is_taken_while_it_changes(run):
    run.arrive(1)
    extra = run.directory(1) / "more.json"

    def write() -> None:
        assert not (run.store / "HEAD").exists()
        extra.write_text(f"{run.clock.now_s:9}")

    run.watch(*[write] * 9, until=1)
    assert run.clock.now_s == 90 + 30
    rs.export(run.store, run.root / "out", step=1)
    assert (run.root / "out" / "more.json").read_text() == "     90.0"


def test_a_newer_step_does_not_overtake_an_incomplete_older_one(run):
    run.arrive(1, 2, 3)
    data = run.weights(2).read_bytes()
    run.weights(2).write_bytes(data[:-1])
    summary = run.watch()
    assert summary.steps_added == (1,)
    (event,) = [event for event in run.events if event.kind == "waiting"]
    assert event.step == 2
    assert "truncated" in event.message
    assert summary.steps_given_up == ()
    # Said once, however long it lasts; and taken once it is whole.
    summary = run.watch(
        *[lambda: None] * 50, lambda: run.weights(2).write_bytes(data), *[lambda: None] * 5, until=3
    )
    assert run.told("waiting") == [2]
    assert summary.steps_added == (2, 3)
    run.assert_exports()


def test_one_that_is_given_up_is_passed_over_for_good(run):
    run.arrive(1, 2, 3)
    data = run.weights(2).read_bytes()
    run.weights(2).write_bytes(data[:-1])
    began: list[float] = []

    def tell(event: WatchEvent) -> None:
        if event.kind == "given-up":
            began.append(run.clock.now_s)

    summary = run.watch(*[lambda: None] * 50, give_up_s=200.0, until=3, tell=tell)
    assert began == [200.0]
    assert summary.steps_added == run.stored == (1, 3)
    assert summary.steps_given_up == (2,)
    assert run.told("given-up") == [2]
    assert run.told("left-out") == []
    # It is whole now, and too late.
    run.weights(2).write_bytes(data)
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert (summary.steps_added, run.told("left-out")) == ((), [2])
    assert run.with_weights == [2]


def test_one_given_up_that_changes_is_waited_for_again(run):
    run.arrive(1)
    data = run.weights(1).read_bytes()
    run.weights(1).write_bytes(data[:-1])
    summary = run.watch(
        *[lambda: None] * 25,
        lambda: run.weights(1).write_bytes(data),
        *[lambda: None] * 5,
        run.stop.set,
        give_up_s=200.0,
    )
    assert run.told("given-up") == [1]
    assert summary.steps_added == (1,)
    assert summary.steps_given_up == ()


def test_one_given_up_that_changes_may_be_given_up_again(run):
    run.arrive(1)
    data = run.weights(1).read_bytes()
    run.weights(1).write_bytes(data[:-1])
    change = [*[lambda: None] * 25, lambda: run.weights(1).write_bytes(data[:-2])]
    summary = run.watch(*change, *[lambda: None] * 25, run.stop.set, give_up_s=200.0)
    assert run.told("given-up") == [1, 1]
    assert summary.steps_given_up == (1,)


def test_one_given_up_may_be_whole_at_once(run):
    run.arrive(1)
    data = run.weights(1).read_bytes()
    run.weights(1).write_bytes(data[:-1])
    acts = [*[lambda: None] * 9, lambda: run.weights(1).write_bytes(data), run.stop.set]
    summary = run.watch(*acts, settle_s=0.0, give_up_s=50.0)
    assert run.told("given-up") == [1]
    assert (summary.steps_added, summary.steps_given_up) == ((1,), ())


def test_an_end_at_a_step_that_is_given_up(run):
    run.arrive(1)
    (run.checkpoints / "global_step_2").mkdir()
    summary = run.watch(*[lambda: None] * 50, give_up_s=100.0, until=2)
    assert (summary.ended, summary.steps_added) == ("until", (1,))


def test_steps_that_are_not_wanted_are_not_waited_for(run):
    run.arrive(2, 4, 5)
    (run.checkpoints / "global_step_1").mkdir()
    (run.checkpoints / "tmp_global_step_3").mkdir()
    assert run.watch(steps="2:100:2").steps_added == (2, 4)


def test_a_pattern_names_other_directories(run):
    run.arrive(1)
    run.directory(1).parent.rename(run.checkpoints / "epoch-7")
    build: BuildOptions = {"pattern": "epoch-{step}", "workers": 1}
    assert run.watch(build=build).steps_added == (7,)


def test_several_kinds_of_checkpoints_are_an_error(run):
    run.arrive(1)
    shutil.copytree(run.directory(1), run.checkpoints / "checkpoint-2")
    with pytest.raises(SourceError, match="several kinds"):
        run.watch()


def test_idleness_ends_it_and_work_does_not(run):
    def another() -> None:
        run.arrive(len(list(run.checkpoints.iterdir())) + 1)

    run.checkpoints.mkdir()
    idle = [lambda: None] * 8
    summary = run.watch(*[act for _ in range(3) for act in (another, *idle)], idle_exit_s=100.0)
    assert summary.ended == "idle"
    assert summary.steps_added == (1, 2, 3)
    assert 240 <= run.clock.now_s <= 350


def test_steps_that_arrive_behind_one_that_is_waited_for_are_no_idleness(run):
    run.arrive(1)
    run.weights(1).unlink()
    acts = [lambda: None] * 9
    arrivals = [(lambda step=step: run.arrive(step)) for step in (2, 3)]
    summary = run.watch(*acts, arrivals[0], *acts, arrivals[1], idle_exit_s=100.0)
    assert (summary.ended, summary.steps_added) == ("idle", ())
    assert 300 <= run.clock.now_s <= 330


def test_a_checkpoint_that_is_being_written_is_no_idleness(run):
    run.arrive(1)
    grow = [
        lambda n=n: (run.directory(1) / "optimizer.pt").write_bytes(bytes(n)) for n in range(25)
    ]
    summary = run.watch(*grow, idle_exit_s=100.0)
    assert (summary.ended, summary.steps_added) == ("idle", (1,))


def test_a_watch_of_nothing_ends_when_it_was_asked_to(run):
    run.checkpoints.mkdir()
    assert run.watch(*[lambda: None] * 20, idle_exit_s=100.0).ended == "idle"
    assert run.clock.now_s == 100.0


def test_idleness_begins_when_work_ends(run):
    run.arrive(1)

    def take_long(event: WatchEvent) -> None:
        run.clock.now_s += 500.0

    run.watch(*[lambda: None] * 3, idle_exit_s=100.0, tell=take_long)
    assert run.clock.now_s >= 30 + 500 + 100


def test_the_time_of_an_append_is_shared_among_its_steps(run, monkeypatch):
    build = watching.build

    def take_long(*arguments: Any, **options: Any) -> Any:
        run.clock.now_s += 90.0
        return build(*arguments, **options)

    run.arrive(1, 2, 3)
    monkeypatch.setattr(watching, "build", take_long)
    run.watch()
    assert [event.elapsed_s for event in run.events if event.kind == "stored"] == [30.0] * 3


# --- what cannot be stored -----------------------------------------------------------------------


def broken(run: Run, step: int) -> None:
    """Make a checkpoint that is whole, and of another model."""
    shutil.rmtree(run.directory(step).parent)
    shutil.copytree(run.directory(1).parent, run.directory(step).parent)
    data = run.weights(step).read_bytes()
    assert data.count(b'"b"') == 1
    run.weights(step).write_bytes(data.replace(b'"b"', b'"c"'))


def test_one_bad_step_does_not_keep_those_before_it_out(run, monkeypatch):
    builds, build = [], watching.build

    def noted(*arguments: Any, **options: Any) -> Any:
        builds.append(options["steps"])
        return build(*arguments, **options)

    monkeypatch.setattr(watching, "build", noted)
    run.arrive(1, 2, 3, 4)
    broken(run, 3)
    summary = run.watch()
    # All at once, then one by one.
    assert builds == ["1,2,3,4", "1", "1,2", "2,3"]
    assert summary.steps_added == (1, 2)
    (event,) = [event for event in run.events if event.kind == "waiting"]
    assert event.step == 3
    assert "lacks tensor b" in event.message
    # Not tried again and again.
    assert run.clock.waits < 9


def test_a_bad_step_is_not_read_again_until_it_changes(run, monkeypatch):
    run.arrive(1, 2)
    broken(run, 2)
    built: list[str] = []
    build = watching.build

    def counted(*paths: Path, steps: str, **options: Any) -> Any:
        built.append(steps)
        return build(*paths, steps=steps, **options)

    monkeypatch.setattr(watching, "build", counted)

    def mend() -> None:
        shutil.rmtree(run.directory(2).parent)
        run.arrive(2)

    run.watch(*[lambda: None] * 20, mend, *[lambda: None] * 5, until=2)
    assert built == ["1,2", "1", "1,2", "1,2"]


def test_a_step_that_is_gone_on_the_way_is_not_the_end(run, monkeypatch):
    run.arrive(1, 2)
    build = watching.build

    def rotate(*paths: Path, steps: str, **options: Any) -> Any:
        if run.directory(1).exists():
            shutil.rmtree(run.directory(1).parent)
        return build(*paths, steps=steps, **options)

    monkeypatch.setattr(watching, "build", rotate)
    assert run.watch().steps_added == (2,)


def test_another_writer_is_waited_for(run):
    run.arrive(1, 2)
    writer = StoreWriter(run.store)
    writer.__enter__()
    acts = [lambda: None] * 6 + [lambda: writer.__exit__(None, None, None)] + [lambda: None] * 3
    summary = run.watch(*acts, until=2)
    assert "another process is writing" in run.events[0].message
    assert run.told("waiting") == [1]
    assert summary.steps_added == (1, 2)


def test_a_second_watch_is_refused(run):
    run.arrive(1)
    with Ledger(run.store, run.checkpoints), pytest.raises(StoreBusyError, match="another watch"):
        run.watch()
    assert not run.store.exists()


def test_what_builds_warn_of_is_said_once(run):
    run.arrive(1, 2, 3)
    (run.checkpoints / "global_step_0").mkdir()
    arrive = [lambda: run.arrive(4), *[lambda: None] * 4]
    with pytest.warns(RelexStreamWarning) as caught:
        run.watch(*[lambda: None] * 4, *arrive, until=4)
    assert len([w for w in caught if "the base stands for step 0" in str(w.message)]) == 1


def test_the_store_keeps_its_choice_of_the_base(run):
    run.arrive(1)
    run.watch(build={"include_base": True, "workers": 1})
    run.arrive(2)
    run.watch()
    assert Store(run.store).manifest.base_included
    assert run.stored == (1, 2)


def test_a_base_that_cannot_be_included_any_more_is_warned_of_once(run):
    run.arrive(1)
    run.watch()
    run.arrive(2)
    acts = [*[lambda: None] * 4, lambda: run.arrive(3), *[lambda: None] * 4]
    with pytest.warns(RelexStreamWarning) as caught:
        run.watch(*acts, until=3, build={"include_base": True, "workers": 1})
    assert len([w for w in caught if "--include-base is left out" in str(w.message)]) == 1
    assert run.stored == (1, 2, 3)


def test_a_run_that_forked_is_not_followed_until_its_steps_are_dropped(run):
    run.arrive(1, 2)
    run.watch()
    # Taken up again at step 1: other weights, under the same number.
    shutil.rmtree(run.directory(2).parent)
    shutil.copytree(run.made.directories[4].parent, run.directory(2).parent)
    run.arrive(3)
    acts = [*[lambda: None] * 20, lambda: rs.drop(run.store, after=1), *[lambda: None] * 9]
    summary = run.watch(*acts, until=3)
    (event,) = [event for event in run.events if event.kind == "waiting"]
    assert event.step == 3
    assert "a fork" in event.message
    assert summary.steps_added == (2, 3)
    assert run.stored == (1, 2, 3)


def test_what_could_not_be_read_once_is_read_again(run, monkeypatch):
    run.arrive(1)
    build, calls = watching.build, []

    def at_second_try(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:
            raise SourceError("the network is down")
        return build(*arguments, **options)

    monkeypatch.setattr(watching, "build", at_second_try)
    assert run.watch(*[lambda: None] * 9, until=1).steps_added == (1,)
    assert run.told("waiting") == [1]


# --- verifying -----------------------------------------------------------------------------------


def spoil(path: Path, *, keep_times: bool = False) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[open_checkpoint(path.parent, 1).tensors["b"].offset] ^= 1
    path.write_bytes(data)
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_source_that_differs_is_named_and_stays(run, monkeypatch):
    run.arrive(1, 2, 3)
    build = watching.build

    def and_spoil(*arguments: Any, **options: Any) -> Any:
        result = build(*arguments, **options)
        spoil(run.weights(2), keep_times=True)
        return result

    monkeypatch.setattr(watching, "build", and_spoil)
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert summary.steps_added == (1, 2, 3)
    assert summary.steps_verified == summary.steps_deleted == (1, 3)
    assert summary.steps_differing == (2,)
    (event,) = [event for event in run.events if event.problems]
    assert (event.step, event.verified) == (2, False)
    assert "tensor b, block 0: 1 of 30 elements are not as in" in event.problems[0]
    assert run.with_weights == [2]
    run.assert_exports(1, 2, 3)


def test_steps_that_were_stored_by_a_build_are_verified_and_freed(run):
    run.arrive(1, 2, 3, 4)
    rs.build_store(run.base, run.checkpoints, run.store, steps="1:3", workers=1)
    spoil(run.weights(2))
    summary = run.watch(delete_ingested=True)
    assert summary.steps_added == (4,)
    assert run.told("stored") == [4]
    assert run.told("verified") == [1, 2, 3]
    assert summary.steps_verified == (1, 3, 4)
    assert summary.steps_differing == (2,)
    assert run.with_weights == [2, 4]


def test_what_was_verified_before_is_not_read_again(run, monkeypatch):
    run.arrive(1, 2, 3)
    assert run.watch().steps_verified == (1, 2, 3)
    assert run.watch().steps_verified == ()
    # And may be deleted, as it is still what was verified.
    monkeypatch.setattr(watching, "compare_step", None)
    assert run.watch(delete_ingested=True).steps_deleted == (1, 2)
    assert run.with_weights == [3]


def test_a_step_that_was_dropped_and_stored_again_is_verified_again(run):
    run.arrive(1, 2)
    run.watch()
    rs.drop(run.store, after=1)
    spoil(run.weights(2))
    rs.build_store(run.base, run.checkpoints, run.store, workers=1)
    summary = run.watch()
    assert summary.steps_verified == (2,)


def test_one_whose_source_is_gone_is_not_verified(run, monkeypatch):
    run.arrive(1, 2)
    build = watching.build

    def and_rotate(*arguments: Any, **options: Any) -> Any:
        result = build(*arguments, **options)
        shutil.rmtree(run.directory(1).parent, ignore_errors=True)
        return result

    monkeypatch.setattr(watching, "build", and_rotate)
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert (summary.steps_added, summary.steps_verified) == ((1, 2), (2,))
    assert run.events[0].message.startswith("not verified: ")


def test_a_comparison_that_fails_is_tried_again(run, monkeypatch):
    run.arrive(1)
    compare, calls = watching.compare_step, []

    def at_second_try(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise SourceError("the network is down")
        return compare(*arguments, **options)

    monkeypatch.setattr(watching, "compare_step", at_second_try)
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert [event.kind for event in run.events] == ["waiting", "stored", "verified", "deleting"]
    assert summary.steps_verified == summary.steps_deleted == (1,)


def test_a_comparison_that_goes_on_failing_is_waited_for(run, monkeypatch):
    compare, moments = watching.compare_step, []

    def at_fourth_try(*arguments: Any, **options: Any) -> Any:
        moments.append(run.clock.now_s)
        if len(moments) < 4:
            raise SourceError("the network is down")
        return compare(*arguments, **options)

    run.arrive(1)
    monkeypatch.setattr(watching, "compare_step", at_fourth_try)
    assert run.watch(*[lambda: None] * 9, run.stop.set).steps_verified == (1,)
    assert moments == [30.0, 30.0, 40.0, 50.0]


def test_steps_are_compared_over_the_base_that_is_in_the_store(run):
    run.arrive(1, 2)
    run.base = Path(shutil.copytree(run.base, run.root / "base"))
    build: BuildOptions = {"include_base": True, "workers": 1}
    rs.build_store(run.base, run.checkpoints, run.store, include_base=True, workers=1)
    spoil(run.base / "model.safetensors")
    assert run.watch(build=build).steps_verified == (1, 2)


# --- deleting ------------------------------------------------------------------------------------


def test_weights_are_deleted_and_nothing_else(run):
    run.arrive(1, 2, 3)
    for step in (1, 2, 3):
        (run.directory(step).parent / "optim_world_size_1_rank_0.pt").write_text("state")
        (run.directory(step) / "optimizer.pt").write_text("state")
    before = set(run.checkpoints.rglob("*"))
    sizes = {step: run.weights(step).stat().st_size for step in (1, 2)}
    summary = run.watch(delete_ingested=True)
    after = set(run.checkpoints.rglob("*"))
    assert before - after == {run.weights(1), run.weights(2)}
    assert summary.steps_deleted == (1, 2)
    assert summary.bytes_deleted == sum(sizes.values())
    deleting = [event for event in run.events if event.kind == "deleting"]
    assert [(event.files, event.bytes_deleted) for event in deleting] == [
        ((f"global_step_{step}/huggingface/model.safetensors",), sizes[step]) for step in (1, 2)
    ]
    run.assert_exports()
    # Again: there is nothing to do, and nothing is wrong.
    summary = run.watch(delete_ingested=True)
    assert summary.steps_verified == summary.steps_deleted == ()
    assert not run.events


def test_deletion_is_told_before_it_happens_and_after_the_step_was_verified(run):
    run.arrive(1, 2)
    there: dict[int, bool] = {}

    def look(event: WatchEvent) -> None:
        if event.kind == "deleting":
            there[event.step] = run.weights(event.step).exists()
            assert event.step in [e.step for e in run.events if e.kind == "stored" and e.verified]

    run.watch(delete_ingested=True, keep_last=0, tell=look)
    assert there == {1: True, 2: True}
    assert run.with_weights == []


def test_steps_are_kept_as_asked(run):
    run.arrive(*range(1, 11))
    run.watch(delete_ingested=True, keep_every=4, keep_last=2)
    assert run.with_weights == [4, 8, 9, 10]
    run.watch(delete_ingested=True, keep_every=8)
    assert run.with_weights == [8, 10]


def test_nothing_is_deleted_unless_the_base_is_safe(run):
    run.arrive(1, 2)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"--base-kept-elsewhere, or .* --include-base"):
            run.watch(delete_ingested=True, kept=False)
        run.watch()
    # What a store is begun with counts, not what is asked for later.
    with pytest.raises(OptionError, match="--base-kept-elsewhere"):
        run.watch(delete_ingested=True, kept=False, build={"include_base": True, "workers": 1})
    assert run.with_weights == [1, 2]
    assert run.watch(delete_ingested=True, kept=True).steps_deleted == (1,)


def test_with_the_base_in_the_store_it_is(run):
    run.arrive(1, 2)
    build: BuildOptions = {"include_base": True, "workers": 1}
    assert run.watch(delete_ingested=True, kept=False, build=build).steps_deleted == (1,)
    run.arrive(3)
    assert run.watch(delete_ingested=True, kept=False).steps_deleted == (2,)
    rs.export(run.store, run.root / "out", step=1, base=None)
    assert digests(run.root / "out") == digests(run.made.directories[1])


def test_without_the_option_nothing_is_deleted(run):
    run.arrive(1, 2)
    assert run.watch(keep_last=0, kept=False).steps_deleted == ()
    assert run.with_weights == [1, 2]


def test_a_file_that_changed_since_stays(run):
    run.arrive(1, 2, 3)
    run.watch()
    run.weights(1).touch()
    with pytest.warns(RelexStreamWarning, match="step 1 stays where it is: .* has changed since"):
        summary = run.watch(delete_ingested=True)
    assert summary.steps_deleted == (2,)
    assert run.with_weights == [1, 3]


def test_a_deletion_that_fails_is_a_warning_and_not_the_end(run, monkeypatch):
    run.arrive(1, 2, 3)
    remove = Remover.remove

    def refuse(self: Remover, file: VerifiedFile) -> int:
        if "step_1" in file.path:
            raise KeptError(f"{file.path} cannot be removed: Permission denied")
        return remove(self, file)

    monkeypatch.setattr(Remover, "remove", refuse)
    with pytest.warns(RelexStreamWarning, match="step 1 stays .* Permission denied"):
        summary = run.watch(*[lambda: None] * 9, run.stop.set, delete_ingested=True)
    assert summary.steps_deleted == (2,)
    assert run.told("deleting") == [1, 2]  # not at every look
    run.stop.clear()
    monkeypatch.undo()
    assert run.watch(delete_ingested=True).steps_deleted == (1,)


def test_steps_that_somebody_drops_meanwhile_are_not_deleted(run):
    run.arrive(1, 2)

    def drop() -> None:
        assert run.stored == (1, 2)
        rs.drop(run.store, after=0)
        # It is being written again, so that none is stored again soon.
        (run.directory(1) / "new.json").touch()

    acts = [*[lambda: None] * 4, drop, lambda: None, run.stop.set]
    summary = run.watch(*acts, delete_ingested=True, keep_last=2)
    assert summary.steps_verified == (1, 2)
    assert (run.stored, summary.steps_deleted, run.with_weights) == ((), (), [1, 2])


def test_steps_that_are_stored_of_another_run_meanwhile_are_not_deleted(run):
    run.arrive(1, 2)
    other = run.root / "other"
    for step in (1, 2, 3, 4):
        shutil.copytree(run.made.directories[step + 10], other / f"global_step_{step}/huggingface")

    def store_another() -> None:
        assert run.stored == (1, 2)
        rs.drop(run.store, after=0)
        rs.build_store(run.base, other, run.store, workers=1)

    acts = [*[lambda: None] * 4, store_another, lambda: None, run.stop.set]
    summary = run.watch(*acts, delete_ingested=True, keep_last=2)
    assert summary.steps_verified == (1, 2)
    assert run.stored == (1, 2, 3, 4)
    assert (summary.steps_deleted, run.with_weights) == ((), [1, 2])


def test_the_store_is_left_to_others_while_nothing_is_due(run, monkeypatch):
    def refuse(path: Path) -> StoreWriter:
        raise AssertionError("nothing is due")

    run.arrive(1, 2)
    monkeypatch.setattr(watching, "StoreWriter", refuse)
    assert run.watch(delete_ingested=True, keep_last=2).steps_verified == (1, 2)


def test_no_step_can_be_dropped_while_its_source_is_deleted(run, monkeypatch):
    run.arrive(1, 2)
    refused = []

    def and_drop(self: Remover, file: VerifiedFile) -> int:
        with pytest.raises(StoreBusyError, match="another process is writing to"):
            rs.drop(run.store, after=0)
        refused.append(file)
        return remove(self, file)

    remove = Remover.remove
    monkeypatch.setattr(Remover, "remove", and_drop)
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert summary.steps_deleted == (1, 2)
    assert len(refused) >= 2
    assert run.stored == (1, 2)


def test_what_is_due_waits_for_another_writer(run):
    run.arrive(1, 2)
    run.watch()
    with StoreWriter(run.store):
        summary = run.watch(delete_ingested=True, keep_last=0)
    assert (summary.steps_deleted, run.with_weights) == ((), [1, 2])
    summary = run.watch(delete_ingested=True, keep_last=0)
    assert (summary.steps_deleted, run.with_weights) == ((1, 2), [])


def test_links_out_of_the_checkpoints_are_not_followed(run):
    run.arrive(1, 2)
    moved = run.root / "elsewhere"
    shutil.move(run.directory(1), moved)
    run.directory(1).symlink_to(moved)
    with pytest.warns(RelexStreamWarning, match="step 1 stays .* lies outside the checkpoints"):
        summary = run.watch(delete_ingested=True)
    assert summary.steps_verified == (1, 2)
    assert (moved / "model.safetensors").exists()


def test_the_base_is_not_deleted_as_a_checkpoint(run):
    run.arrive(1, 2, 3)
    base = run.root / "base"
    shutil.copytree(run.base, base)
    run.base = base
    shutil.rmtree(run.directory(2))
    run.directory(2).mkdir()
    for path in base.iterdir():
        os.link(path, run.directory(2) / path.name)
    with pytest.warns(RelexStreamWarning, match="step 2 stays .* a file of the base"):
        run.watch(delete_ingested=True)
    assert run.with_weights == [2, 3]


def test_a_deletion_that_was_cut_short_is_finished(run, monkeypatch, tmp_path_factory):
    made = tiny_sharded(tmp_path_factory)
    run.made, run.base = made, made.base
    run.arrive(1, 2)
    remove, removed = Remover.remove, []

    def die_after_one(self: Remover, file: VerifiedFile) -> int:
        if removed:
            raise OSError("power failure")
        removed.append(file)
        return remove(self, file)

    monkeypatch.setattr(Remover, "remove", die_after_one)
    with pytest.raises(OSError, match="power failure"):
        run.watch(delete_ingested=True)
    monkeypatch.undo()
    assert len(list(run.directory(1).glob("*.safetensors"))) == 2
    # It would be kept now; but half of it is gone.
    summary = run.watch(delete_ingested=True, keep_every=1)
    assert not list(run.directory(1).glob("*.safetensors"))
    assert summary.steps_deleted == (1,)
    assert run.told("deleting") == [1]
    run.assert_exports()


def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(
        tmp_path_factory.mktemp("sharded"),
        steps=(1, 2),
        tensors={"a": (30, 10), "b": (30,), "c": (9, 9)},
        change_share=0.3,
        checkpoint_shards=3,
    )


def test_a_killed_deletion_without_notes_leaves_what_is_left(run, tmp_path_factory):
    run.made = tiny_sharded(tmp_path_factory)
    run.base = run.made.base
    run.arrive(1, 2)
    run.watch()
    sorted(run.directory(1).glob("*.safetensors"))[0].unlink()
    (run.root / "run.store.watch").unlink()
    summary = run.watch(delete_ingested=True)
    assert summary.steps_deleted == ()
    assert len(list(run.directory(1).glob("*.safetensors"))) == 2


# --- a dry run -----------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run):
    run.arrive(1, 2, 3, 4)
    rs.build_store(run.base, run.checkpoints, run.store, steps="1:2", workers=1)
    run.weights(4).write_bytes(b"")
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    summary = run.watch(dry_run=True, delete_ingested=True, settle_s=0)
    assert summary.ended == "dry-run"
    assert summary.steps_added == ()
    assert run.told("would-store") == [3]
    assert run.told("would-delete") == [1, 2]
    assert run.told("waiting") == [4]
    run.watch(dry_run=True)
    assert run.told("would-store") == []
    assert run.told("waiting") == [3]
    assert run.events[0].message.endswith("changed a moment ago")
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


def test_a_dry_run_tells_of_what_is_gone_and_of_what_would_stay(run):
    run.arrive(1, 2, 3, 4)
    rs.build_store(run.base, run.checkpoints, run.store, steps="1:3", workers=1)
    run.weights(1).unlink()
    moved = shutil.move(run.directory(2), run.root / "elsewhere")
    run.directory(2).symlink_to(moved)
    with pytest.warns(RelexStreamWarning, match="step 2 would stay .* lies outside"):
        run.watch(dry_run=True, delete_ingested=True, keep_last=0, settle_s=0)
    assert (run.told("would-store"), run.told("would-delete")) == ([4], [3, 4])


def test_a_dry_run_makes_no_store(run):
    run.arrive(1)
    run.watch(dry_run=True, settle_s=0)
    assert run.told("would-store") == [1]
    assert [path.name for path in run.root.iterdir()] == ["checkpoints"]
    with pytest.raises(OptionError, match="base-kept-elsewhere"):
        run.watch(dry_run=True, delete_ingested=True, kept=False)


# --- stopping ------------------------------------------------------------------------------------


def test_a_stop_between_steps_begins_no_other(run):
    run.arrive(1, 2)

    def stop(event: WatchEvent) -> None:
        run.stop.set()

    summary = run.watch(tell=stop, delete_ingested=True)
    assert summary.ended == "stopped"
    # What was appended with it is there; the next watch verifies it.
    assert summary.steps_added == run.stored == (1, 2)
    assert summary.steps_verified == (1,)
    assert run.events[-1].message == "not verified yet"
    run.stop.clear()
    assert run.watch().steps_verified == (2,)


def test_an_interruption_after_a_stop_gives_up_what_is_under_way(run, monkeypatch):
    run.arrive(1, 2)
    run.watch(steps="1")
    build = watching.build

    def interrupt(*arguments: Any, **options: Any) -> Any:
        run.stop.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "build", interrupt)
    assert run.watch().ended == "stopped"
    monkeypatch.setattr(watching, "build", build)
    run.stop.clear()
    assert run.stored == (1,)
    assert run.watch().steps_added == (2,)


def test_an_interruption_that_nobody_asked_for_goes_on(run, monkeypatch):
    run.arrive(1)

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.watch()
    monkeypatch.undo()
    assert run.watch().steps_added == (1,)  # and nothing is locked


def test_nothing_is_begun_once_it_is_stopped(run):
    run.arrive(1)
    run.stop.set()
    assert run.watch(settle_s=0).ended == "stopped"
    assert not run.store.exists()


# --- the hook, the arguments ---------------------------------------------------------------------


def test_the_hook_is_run_after_each_step(run):
    run.arrive(1, 2)
    out = run.root / "told"
    code = (
        "import os, sys; e = os.environ; print(*(e['RELEX_STREAM_' + n] for n in "
        "('STEP', 'STORE', 'SOURCE', 'VERIFIED')), file=open(sys.argv[1], 'a'))"
    )
    run.watch(on_commit=(sys.executable, "-c", code, str(out)))
    assert out.read_text().splitlines() == [
        f"{step} {run.store} {run.directory(step)} 1" for step in (1, 2)
    ]


def test_the_hook_is_told_of_a_step_that_differs(run, monkeypatch):
    run.arrive(1, 2)
    build, told = watching.build, []

    def and_spoil(*arguments: Any, **options: Any) -> Any:
        result = build(*arguments, **options)
        spoil(run.weights(2), keep_times=True)
        return result

    monkeypatch.setattr(watching, "build", and_spoil)
    monkeypatch.setattr(watching, "run_hook", lambda command, values, **_: told.append(values))
    run.watch(on_commit=("true",))
    assert [values["RELEX_STREAM_VERIFIED"] for values in told] == ["1", "0"]


def test_other_names_and_a_cast_are_those_of_the_build(run, tmp_path):
    made = make_trajectory(
        tmp_path,
        steps=(1, 2),
        dtype="F32",
        base_dtype="BF16",
        tensors={"a": (30, 10), "b": (30,)},
        change_share=0.3,
    )
    for step in made.steps:
        shutil.rmtree(made.directories[step])
        tensors = {f"wrapped.x{n}": raw(bits, "F32") for n, bits in made.bits[step].items()}
        write_model(made.directories[step], tensors)
    run.made, run.base, run.checkpoints = made, made.base, made.checkpoints
    build: BuildOptions = {
        "source": "safetensors",
        "strip_prefix": "wrapped.",
        "map_names": (("^x", ""),),
        "cast": "bf16",
        "workers": 1,
    }
    assert run.watch(build=build, steps="1").steps_added == (1,)  # and nothing to warn of
    with pytest.warns(RelexStreamWarning, match="what is deleted cannot be had back as it was"):
        summary = run.watch(build=build, delete_ingested=True, steps="1:2")
    assert summary.steps_verified == (2,)
    assert summary.steps_deleted == (1,)
    store = rs.open_store(run.store, base=made.base)
    for step in made.steps:
        expected = round_to(made.values(step, "a"), "BF16")
        assert (store.checkpoint_bits("a", step) == expected).all()


def test_masters_of_a_store_of_rounded_weights_stay_unless_rounding_is_asked_for(run, tmp_path):
    made = make_trajectory(
        tmp_path,
        steps=(1, 2),
        dtype="F32",
        base_dtype="BF16",
        tensors={"a": (30, 10)},
        change_share=0.3,
    )
    run.base, run.checkpoints = made.base, made.checkpoints
    masters = {path: path.stat().st_size for path in made.checkpoints.rglob("*.safetensors")}
    rs.build_store(run.base, run.checkpoints, run.store, cast="bf16", workers=1)
    with pytest.warns(
        RelexStreamWarning, match=r"step [12] would stay where it is: .*give --as bf16"
    ):
        run.watch(delete_ingested=True, keep_last=0, dry_run=True)
    assert run.told("would-delete") == []
    rounding: BuildOptions = {"cast": "bf16", "workers": 1}
    # Nor may what a watch that rounds has verified be deleted by one that does not.
    for _ in range(2):
        summary = run.watch(delete_ingested=True, keep_last=0)
        assert summary.steps_differing == (1, 2)
        assert run.events[0].problems[0].endswith("give --as bf16, as the store was begun")
        assert run.watch(build=rounding).steps_verified == (1, 2)
    assert {path: path.stat().st_size for path in masters if path.exists()} == masters
    with pytest.warns(RelexStreamWarning, match="what is deleted cannot be had back as it was"):
        summary = run.watch(build=rounding, delete_ingested=True, keep_last=0)
    assert summary.steps_deleted == (1, 2)


def test_a_hook_that_fails_does_not_end_the_watch(run):
    run.arrive(1, 2)
    with pytest.warns(
        RelexStreamWarning, match="^step [12]: --on-commit: .*failed with exit status 3"
    ):
        summary = run.watch(on_commit=(sys.executable, "-c", "raise SystemExit(3)"))
    assert summary.steps_added == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settle_s": -1.0}, "--settle must be a number of 0 or more, not -1"),
        ({"poll_s": float("nan")}, "--poll must be"),
        ({"give_up_s": float("inf")}, "--give-up must be"),
        ({"idle_exit_s": -5.0}, "--idle-exit must be"),
        ({"keep_last": -1}, "--keep-last must be"),
        ({"keep_every": 0}, "--keep-every must be 1 or more, not 0"),
        ({"until": 0}, "--until must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        WatchOptions(**options)


def test_a_base_that_is_not_that_of_the_store_is_refused_at_once(run, tmp_path_factory):
    run.arrive(1)
    run.watch()
    other = tiny_sharded(tmp_path_factory)
    run.base = other.base
    with pytest.raises(SourceError, match="is not the base of"):
        run.watch()


def test_the_public_function_does_all_of_it(run):
    run.arrive(1, 2)
    events: list[WatchEvent] = []
    summary = rs.watch(
        *(run.base, run.checkpoints, run.store),
        settle_s=0,
        poll_s=0.01,
        until=2,
        workers=1,
        include_base=True,
        delete_ingested=True,
        on_event=events.append,
    )
    assert summary.steps_deleted == (1,)
    assert [event.kind for event in events] == ["stored", "deleting", "stored"]
    assert events[0].time[10] == "T"
