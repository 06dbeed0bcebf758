"""Stores from checkpoints of the Hub: what they hold, and what is on the disk on the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

import relex_stream as rs
from relex_stream.errors import (
    HubError,
    OptionError,
    OutputError,
    RelexStreamError,
    RelexStreamWarning,
    SourceError,
    StoreError,
    TrajectoryError,
)
from relex_stream.hub import download, feed
from relex_stream.specs import NoProgress
from relex_stream.store import Store
from relex_stream.summaries import BuildSummary
from tests.hub.server import FakeHub, Request, content_of
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_deltas import publish_slime, slime_run

RUN = "hf://org/run"


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are fetched in the order of their names."""
    monkeypatch.setattr(download, "CONNECTIONS", 1)


class Notes(NoProgress):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: dict[str, list[int]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, stage: str, total_bytes: int) -> None:
        self.stages[stage] = [total_bytes, 0]

    def advance(self, done_bytes: int) -> None:
        self.stages[list(self.stages)[-1]][1] += done_bytes


def build(run: Trajectory, store: Path, url: str = RUN, **options: Any) -> BuildSummary:
    return rs.build_store(options.pop("base", run.base), url, store, **options)


def check_exports(run: Trajectory, store: Path, steps: tuple[int, ...] | None = None) -> None:
    """Check that the store gives every checkpoint back as it was, with all of its files."""
    assert rs.info(store).steps[-1].step == (steps or run.steps)[-1]
    for step in steps or run.steps:
        out = store.with_name(f"{store.name}-{step}")
        rs.export(store, out, step=step, base=run.base)
        assert content_of(out) == content_of(run.directories[step])
        shutil.rmtree(out)


def weights_asked(hub: FakeHub) -> list[str]:
    """Return the requests for weights, by commit and file."""
    return [r.path.split("/resolve/")[1] for r in hub.asked("/resolve/") if "model" in r.path]


def used_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def test_branches_become_a_store_and_nothing_else_is_left(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    one = used_bytes(run.directories[10])
    most, homes = [0], set()

    def measure(request: Request) -> None:
        most.append(used_bytes(tmp_path / "store.download"))
        homes.add(tuple(sorted(p.name for p in (tmp_path / "store.download").glob("step_*"))))

    published.before = measure
    progress = Notes()
    summary = build(run, tmp_path / "store", progress=progress)
    assert summary.steps_added == run.steps
    assert summary.layout == "hf://org/run@step_N"
    check_exports(run, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    # Two on the disk at most, and once it is under way the next one is fetched ahead.
    assert one < max(most) < 2.5 * one
    assert max(map(len, homes)) == 2
    commit = published.repositories["org/run"].branches["step_20"]
    assert Store(tmp_path / "store").commit(1).source == f"step_20/org/run@{commit}"
    assert progress.notes[0].startswith("hf://org/run: 4 checkpoints to fetch, through ")
    for total_bytes, done_bytes in progress.stages.values():
        assert total_bytes == done_bytes or not total_bytes
    sums = [rs.build_store(run.base, run.checkpoints, tmp_path / "local")]
    for figure in ("bytes_in", "changed_weights", "bits_per_changed_weight", "steps_total"):
        assert getattr(summary, figure) == pytest.approx(getattr(sums[0], figure), rel=0.02)


def test_directories_of_one_revision(hub: FakeHub, run: Trajectory, tmp_path: Path) -> None:
    content = {"README.md": b"a run", "global_step_5/actor/optim.pt": b"x" * 5000}
    for step in run.steps:
        prefix = f"global_step_{step}/actor/huggingface/"
        content |= content_of(run.directories[step], prefix)
        content[prefix + "optimizer.pt"] = b"x" * 5000
    del content["global_step_5/actor/optim.pt"]
    commit = hub.add("org/run").commit(content, branch="main")
    summary = build(run, tmp_path / "store", steps="10:30", download_dir=tmp_path / "through")
    assert summary.layout == "hf://org/run@main/global_step_N"
    assert summary.steps_added == (10, 20, 30)
    assert summary.skipped_files == ("optimizer.pt",)
    assert not hub.asked("optimizer")
    check_exports(run, tmp_path / "store", (10, 20, 30))
    source = f"step_10/org/run@{commit}/global_step_10/actor/huggingface"
    assert Store(tmp_path / "store").commit(0).source == source
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize("names", ["directories", "branches"])
def test_changes_that_slime_publishes(hub: FakeHub, tmp_path: Path, names: str) -> None:
    shapes = {"embed": (64, 24), "norm": (24,)}
    run = make_trajectory(tmp_path, steps=(1, 2, 3), tensors=shapes, layout="step_{step}")
    feed = slime_run(run, tmp_path / "feed")
    # Nothing changed: an index alone.
    publish_slime(feed, 4, run.bits[3], run.bits[3])
    repository = hub.add("org/run")
    content: dict[str, bytes] = {}
    for version in sorted(feed.iterdir()):
        content |= content_of(version, f"{version.name}/")
        if names == "branches":
            repository.commit(content_of(version), branch=version.name)
    repository.commit(content if names == "directories" else {"README.md": b""}, branch="main")
    store = tmp_path / "store"
    with pytest.raises(TrajectoryError, match="holds only what changed since step 1, and"):
        build(run, store, steps="2:3")
    assert build(run, store, steps="1:2").steps_added == (1, 2)
    with pytest.warns(RelexStreamWarning, match="step 4 has the same weights as step 3"):
        assert build(run, store).steps_added == (3, 4)
    opened = rs.open_store(store, base=run.base)
    for step in (1, 2, 3, 4):
        for name, bits in run.bits[min(step, 3)].items():
            assert (opened.checkpoint_bits(name, step) == bits).all()
    assert not (tmp_path / "store.download").exists()


@pytest.mark.usefixtures("one_by_one")
def test_a_run_that_failed_goes_on(published: FakeHub, run: Trajectory, tmp_path: Path) -> None:
    commits = published.repositories["org/run"].branches
    shard = f"{commits['step_30']}/model-00002"
    published.fault = lambda request: 418 if shard in request.path else None
    progress = Notes()
    with pytest.raises(HubError, match=r"org/run@.*: model-00002-of-00002.safetensors: .*418"):
        build(run, tmp_path / "store", progress=progress)
    assert rs.info(tmp_path / "store").steps[-1].step == 20
    assert progress.notes[-1].endswith(
        "store.download keeps what was fetched; the same command goes on from there"
    )
    published.fault = lambda request: None
    published.requests.clear()
    summary = build(run, tmp_path / "store")
    assert (summary.steps_skipped, summary.steps_added) == ((10, 20), (30, 40))
    # Neither what is in the store nor what is on the disk is fetched again.
    assert not [
        path
        for path in weights_asked(published)
        if path[:40] in {commits["step_10"], commits["step_20"]}
    ]
    assert [path for path in weights_asked(published) if path.startswith(commits["step_30"])] == [
        f"{shard}-of-00002.safetensors"
    ]
    check_exports(run, tmp_path / "store")
    assert not (tmp_path / "store.download").exists()
    assert build(run, tmp_path / "store").steps_added == ()


@pytest.mark.usefixtures("one_by_one")
def test_segments_of_a_file_are_fetched_once(
    published: FakeHub, run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SEGMENT_BYTES", 10_000)
    asked: list[Request] = []

    def break_at(number: int) -> Callable[[Request], int | None]:
        def fault(request: Request) -> int | None:
            if "/cdn/" not in request.path:
                return None
            asked.append(request)
            return 418 if len(asked) == number else None

        return fault

    for number in (5, 9, 14):
        published.fault = break_at(number)
        with pytest.raises(HubError, match="418"):
            build(run, tmp_path / "store", steps="10")
    published.fault = break_at(0)
    build(run, tmp_path / "store", steps="10")
    check_exports(run, tmp_path / "store", (10,))
    ranges = [(request.path, request.range) for request in asked]
    # Twice only what failed, and what was just asked for then. Begun anew it would be 25 in all.
    assert len(ranges) <= len(set(ranges)) + 6 < 20
    assert {request.range for request in asked} > {"bytes=0-9999", "bytes=10000-19999"}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("what", ["content", "shorter", "longer", "journal", "torn"])
def test_what_was_left_is_not_trusted(
    published: FakeHub, run: Trajectory, tmp_path: Path, what: str
) -> None:
    commits = published.repositories["org/run"].branches
    published.fault = lambda request: (
        418 if f"{commits['step_10']}/model-00002" in request.path else None
    )
    with pytest.raises(HubError):
        build(run, tmp_path / "store", steps="10")
    home = tmp_path / "store.download" / "step_10"
    [shard] = home.rglob("model-00001*")
    data = bytearray(shard.read_bytes())
    assert any(data)
    if what == "content":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif what == "shorter":
        shard.write_bytes(data[:-1])
    elif what == "longer":
        shard.write_bytes(data + b"x")
    elif what == "journal":
        (home / "journal").unlink()
    else:
        lines = (home / "journal").read_bytes()
        (home / "journal").write_bytes(
            b'\xff\n["model-00001-of-00002.safetensors", {}]\n' + lines[:-9]
        )
    published.fault = lambda request: None
    build(run, tmp_path / "store", steps="10")
    check_exports(run, tmp_path / "store", (10,))


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "config.json"])
def test_other_bytes_than_the_hub_says_are_refused(
    published: FakeHub, run: Trajectory, tmp_path: Path, path: str
) -> None:
    repository = published.repositories["org/run"]
    good = repository.commits[repository.branches["step_10"]][path]
    published.tamper = lambda data: data[:-1] + b"?" if data == good else data
    with pytest.raises(HubError, match=f"{path} arrives with another checksum than the Hub says"):
        build(run, tmp_path / "store", steps="10")
    assert not (tmp_path / "store" / "HEAD").exists()
    published.tamper = lambda data: data
    build(run, tmp_path / "store", steps="10")
    check_exports(run, tmp_path / "store", (10,))


def test_a_branch_that_moved_is_fetched_anew(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    repository = published.repositories["org/run"]
    old = repository.branches["step_10"]
    published.fault = lambda request: 418 if "model-00002" in request.path else None
    with pytest.raises(HubError):
        build(run, tmp_path / "store", steps="10")
    published.fault = lambda request: None
    published.requests.clear()
    content = repository.commits[old] | {"config.json": b'{"new": 1}'}
    new = repository.commit(content, branch="step_10")
    build(run, tmp_path / "store", steps="10")
    assert {path[:40] for path in weights_asked(published)} == {new}
    assert Store(tmp_path / "store").commit(0).source == f"step_10/org/run@{new}"


def test_other_formats_are_refused_before_anything_is_fetched(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    repository = published.repositories["org/run"]
    repository.commit({"pytorch_model.bin": b"x" * 9000, "config.json": b"{}"}, branch="step_30")
    with pytest.raises(SourceError, match=r"step 30 \(step_30\) has no .*PyTorch weights"):
        build(run, tmp_path / "store")
    assert not published.asked("/resolve/")
    assert not (tmp_path / "store.download").exists()
    assert build(run, tmp_path / "store", steps="10,20,40").steps_added == (10, 20, 40)


def test_a_missing_shard_is_found_before_the_others_are_fetched(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    repository = published.repositories["org/run"]
    content = dict(repository.commits[repository.branches["step_10"]])
    del content["model-00001-of-00002.safetensors"]
    repository.commit(content, branch="step_10")
    with pytest.raises(SourceError, match=r"shard model-00001-of-00002.safetensors, named"):
        build(run, tmp_path / "store", steps="10")
    assert not published.asked("/cdn/")


def test_paths_do_not_lead_out_of_the_directory(
    published: FakeHub, run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relex_stream.hub import steps

    monkeypatch.setattr(
        steps,
        "_place",
        lambda step, inside, files: steps.WeightsPlace("", {f.path: f for f in files}, {}),
    )
    repository = published.repositories["org/run"]
    content = repository.commits[repository.branches["step_10"]]
    repository.commit(content | {"../../../../evil.json": b"x"}, branch="step_10")
    with pytest.raises(HubError, match=r"unsafe path '../../../../evil.json'"):
        build(run, tmp_path / "store", steps="10")
    assert not list(tmp_path.rglob("evil.json"))


class Disk(NamedTuple):
    free: int


def test_without_room_for_two_one_is_fetched_at_a_time(
    published: FakeHub, run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sum(len(data) for data in content_of(run.directories[10]).values())
    through = tmp_path / "store.download"
    monkeypatch.setattr(
        feed.shutil,
        "disk_usage",
        lambda _: Disk(feed.SPARE_BYTES + 3 * one // 2 - min(one, used_bytes(through))),
    )
    most: list[int] = []
    published.before = lambda request: most.append(used_bytes(through))
    build(run, tmp_path / "store")
    check_exports(run, tmp_path / "store")
    assert max(most) < 1.5 * one
    monkeypatch.setattr(feed.shutil, "disk_usage", lambda _: Disk(1000))
    with pytest.raises(
        OutputError,
        match=r"1000 B are free, and step 10 of hf://org/run takes .*"
        "make room, or name another disk with --download-dir",
    ):
        build(run, tmp_path / "other")
    assert not (tmp_path / "other" / "HEAD").exists()


def test_a_directory_of_others_is_left_alone(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    through = tmp_path / "through"
    (through / "step_1").mkdir(parents=True)
    with pytest.raises(OptionError, match="holds other files; name a new or empty directory"):
        build(run, tmp_path / "store", download_dir=through)
    assert [path.name for path in through.iterdir()] == ["step_1"]
    with pytest.raises(OptionError, match="lies inside STORE"):
        build(run, tmp_path / "store", download_dir=tmp_path / "store" / "through")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "notes.txt").write_text("mine")
    (ours / "lock").touch()
    (ours / "step_99").mkdir()
    build(run, tmp_path / "store", download_dir=ours)
    assert [path.name for path in ours.iterdir()] == ["notes.txt"]


def test_two_runs_do_not_share_a_directory(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    through = tmp_path / "through"
    through.mkdir()
    with (through / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another relex-stream fetches into it"):
            build(run, tmp_path / "store", download_dir=through)
    with pytest.raises(StoreError, match="not a store's"):
        build(run, through)
    assert not published.asked("/cdn/")


def test_a_base_that_cannot_be_read_is_found_first(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        build(run, tmp_path / "store", base=tmp_path / "none")
    with pytest.raises(SourceError, match=r"hf://org/run@step_10/x has no model.safetensors"):
        build(run, tmp_path / "store", base="hf://org/run@step_10/x")
    assert not published.asked("/cdn/")


def test_checkpoints_that_do_not_belong_stay_for_the_next_try(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    repository = published.repositories["org/run"]
    repository.branches["step_20"] = repository.commit(
        content_of(run.directories[20]) | {"model.safetensors.index.json": b"{}"}
    )
    with pytest.raises(RelexStreamError, match="bad index"):
        build(run, tmp_path / "store")
    assert rs.info(tmp_path / "store").steps[-1].step == 10
    # The user may have other plans: what is not asked for any more goes.
    assert build(run, tmp_path / "store", steps="30:").steps_added == (30, 40)
    assert not (tmp_path / "store.download").exists()
    with pytest.warns(RelexStreamWarning, match="already goes to step 40: step 20"):
        assert build(run, tmp_path / "store", steps="20").steps_added == ()


def test_options_of_a_store_are_told_once(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    build(run, tmp_path / "store", steps="10", seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(run, tmp_path / "store", seed=8, include_base=True, workers=1)
    assert sorted(str(each.message)[:14] for each in caught) == [
        "--include-base",
        "--seed 8 is lef"[:14],
    ]
    progress = Notes()
    build(run, tmp_path / "more", include_base=True, seed=7, progress=progress)
    assert rs.info(tmp_path / "more").base_included
    assert rs.info(tmp_path / "more").seed == 7
    assert len(progress.notes) == len(set(progress.notes))
    summary = build(run, tmp_path / "more")
    assert summary.base_bytes_stored == rs.info(tmp_path / "more").base_bytes_stored > 0


# --- bases ---------------------------------------------------------------------------------------


def test_a_base_stays_in_the_cache_of_the_hub(
    published: FakeHub, run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Notes()
    build(run, tmp_path / "store", steps="10:30", base=RUN, progress=progress)
    base = Path(rs.open_store(tmp_path / "store").path, rs.info(tmp_path / "store").base).resolve()
    assert base.is_relative_to(tmp_path / "hf" / "hub")
    assert any("with --include-base the store would not need it" in each for each in progress.notes)
    size = (run.base / "model.safetensors").stat().st_size
    assert progress.stages["fetch base org/run"][1] >= size
    # The checkpoints went elsewhere.
    assert len(list((tmp_path / "hf").rglob("blobs/*"))) == len(list(run.base.iterdir()))
    check_exports(run, tmp_path / "store", (10, 20, 30))
    published.requests.clear()
    again = Notes()
    rs.build_store(RUN, run.checkpoints, tmp_path / "store", progress=again)
    assert "fetch base org/run" not in again.stages
    rs.export(tmp_path / "store", tmp_path / "out", step=40, base=RUN)
    rs.extrapolate(tmp_path / "store", tmp_path / "model", target_steps=[60], base=RUN)
    assert not published.asked("/cdn/")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not rs.verify(tmp_path / "store", base=RUN).problems
    with pytest.raises(HubError, match=r"not in the Hugging Face cache, and offline mode is on"):
        rs.verify(tmp_path / "store", base="hf://org/other")


def test_a_base_in_shards_and_in_a_directory(hub: FakeHub, run: Trajectory, tmp_path: Path) -> None:
    content = content_of(run.directories[10], "models/start/") | {
        "models/big.safetensors": b"x" * 99
    }
    hub.add("org/base").commit(content, tag="v1")
    rs.build_store("hf://org/base@v1/models/start", run.checkpoints, tmp_path / "store", steps="20")
    rs.export(tmp_path / "store", tmp_path / "out", step=0)
    assert content_of(tmp_path / "out") == content_of(run.directories[10])
    assert not list((tmp_path / "hf").rglob("big.safetensors"))


def test_a_base_of_other_bytes_is_refused(
    published: FakeHub, run: Trajectory, tmp_path: Path
) -> None:
    repository = published.repositories["org/run"]
    good = repository.commits[repository.branches["main"]]["config.json"]
    published.tamper = lambda data: data[:-1] + b"?" if data == good else data
    with pytest.raises(HubError, match=r"config.json has another checksum than the Hub says; rem"):
        build(run, tmp_path / "store", base=RUN)


def test_a_base_that_may_not_be_read(hub: FakeHub, run: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="org/none@main: no such repository"):
        rs.build_store("hf://org/none", run.checkpoints, tmp_path / "store")
    repository = hub.add("org/base")
    repository.commit(content_of(run.base), branch="main")
    hub.fault = lambda request: 403 if "/cdn/" in request.path else None
    with pytest.raises(HubError, match=r"^org/base@main: the token may not read it"):
        rs.build_store("hf://org/base", run.checkpoints, tmp_path / "store")


def test_a_directory_for_downloads_needs_downloads(run: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--download-dir is for checkpoints of the Hub"):
        rs.build_store(run.base, run.checkpoints, tmp_path / "store", download_dir=tmp_path / "x")


def test_options_that_are_for_directories(run: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--source dcp: of the Hub's files only safetensors are"):
        build(run, tmp_path / "store", source="dcp")
    with pytest.raises(OptionError, match="take the steps back with relex-stream drop --after 19"):
        build(run, tmp_path / "store", replace_from=20)
