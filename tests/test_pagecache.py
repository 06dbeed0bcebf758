"""Bytes are asked for when they are not in memory; whatever is wrong is left to the reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream import graph, pagecache, writer
from relex_stream.base_weights import open_base
from relex_stream.block_reader import fetch_blocks
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.pagecache import ask_for, start_writing
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.writer import OutputDirectory
from tests.make_checkpoints import Trajectory, make_trajectory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"), reason="Linux only"
)

Asked = list[tuple[str, int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the system is asked for, of files of which nothing is in memory, before work begins."""
    found: Asked = []

    def note(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", note)

    def fetch_all(fetcher: graph.Fetcher[object]) -> None:
        if fetcher._fetch is not None:
            fetcher._run()

    monkeypatch.setattr(pagecache, "_in_memory", lambda *_: False)
    # On its thread it may come too late for tasks as small as these.
    monkeypatch.setattr(graph.Fetcher, "__enter__", fetch_all)
    monkeypatch.setattr(graph.Fetcher, "__exit__", lambda *_: None)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("pagecache")
    shapes = {"a.weight": (40, 30), "b.norm.weight": (7,)}
    trajectory = make_trajectory(root, steps=range(1, 19), tensors=shapes, change_share=0.1)
    rs.build_store(trajectory.base, trajectory.checkpoints, root / "store")
    return trajectory


def test_what_is_in_memory_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert not ask_for(descriptor, 0, 1 << 20)
        assert not ask_for(descriptor, 12345, 1)
    finally:
        os.close(descriptor)


def test_what_is_not_in_memory_is_asked_for(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert ask_for(descriptor, 10, 500)
    finally:
        os.close(descriptor)
    assert asked == [(str(path), 10, 500)]


def test_systems_that_cannot_be_asked_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    assert not ask_for(-1, 0, 10)


def test_base_and_frames_of_blocks_are_asked_for(run: Trajectory, asked: Asked) -> None:
    store = Store(run.base.parent / "store")
    with CheckpointReader() as reader:
        base = open_base(store, None, reader)
        tensor = store.tensors["a.weight"]
        fetch_blocks(store, base, 18, [(BlockOf(tensor, 0),)])
    chunks = store.path / "deltas" / "a.weight"
    (path, _, nbytes), *frames = asked
    assert Path(path).parent == run.base
    assert nbytes == 40 * 30 * 2
    assert frames == [
        (str(chunks / "c.0.0"), 0, (chunks / "c.0.0").stat().st_size),
        (str(chunks / "c.1.0"), 0, (chunks / "c.1.0").stat().st_size),
    ]
    asked.clear()
    with CheckpointReader() as reader:
        base = open_base(store, None, reader)
        fetch_blocks(store, base, 16, [(BlockOf(store.tensors["b.norm.weight"], 0),)])
    assert len(asked) == 1  # it never changed


def test_frames_are_taken_to_be_in_memory_where_the_base_is(
    run: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(run.base.parent / "store")
    monkeypatch.setattr(Store, "advise", None)  # would not survive a call
    with CheckpointReader() as reader:
        base = open_base(store, None, reader)
        block = BlockOf(store.tensors["a.weight"], 0)
        base.read(block, Workspace())
        fetch_blocks(store, base, 18, [(block,)])


def test_what_is_missing_is_left_to_the_reader(
    run: Trajectory, tmp_path: Path, asked: Asked
) -> None:
    store = Store(run.base.parent / "store")
    with CheckpointReader() as reader:
        assert not reader.advise(str(tmp_path / "nothing"), 0, 10)
    chunk = store.path / "deltas" / "a.weight" / "c.1.0"
    whole = chunk.read_bytes()
    chunk.unlink()
    try:
        store.advise(store.tensors["a.weight"], 0, 18)
        assert len(asked) == 1
        with pytest.raises(rs.CorruptionError, match=r"tensor a\.weight, block 0: .* missing"):
            rs.extrapolate(store.path, tmp_path / "out", target_steps=[30])
    finally:
        chunk.write_bytes(whole)


def test_an_append_of_one_checkpoint_asks_and_a_build_of_many_leaves_it_to_the_system(
    run: Trajectory, tmp_path: Path, asked: Asked
) -> None:
    rs.build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:17")
    assert not asked
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    read = {Path(path).parent for path, _, _ in asked}
    chunks = tmp_path / "store" / "deltas" / "a.weight"
    assert read == {run.base, run.directories[18], chunks}


@pytest.mark.parametrize("base", [False, True])
def test_a_verification_asks_for_frames_and_for_the_base_if_it_is_given(
    run: Trajectory, asked: Asked, base: bool
) -> None:
    rs.verify(run.base.parent / "store", base=run.base if base else None)
    assert [Path(path).name for path, _, _ in asked].count("c.1.0") == 1
    assert any(Path(path).parent == run.base for path, _, _ in asked) == base


@pytest.mark.parametrize("command", ["extrapolate", "export"])
def test_commands_ask_before_they_read(
    run: Trajectory, tmp_path: Path, asked: Asked, command: str
) -> None:
    store = run.base.parent / "store"
    if command == "extrapolate":
        rs.extrapolate(store, tmp_path / "out", target_steps=[30])
    else:
        rs.export(store, tmp_path / "out", step=18)
    names = [Path(path).name for path, _, _ in asked]
    # For Gram matrices of tensors that have no sketch, while kernels are loaded, for statistics,
    # and for the output.
    passes = {"extrapolate": 4, "export": 1}[command]
    assert names.count("c.1.0") == passes
    assert sum(Path(path).parent == run.base for path, _, _ in asked) >= passes


# --- writing -----------------------------------------------------------------------------------


def test_large_writes_are_started_and_small_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, int]] = []

    def note(descriptor: int, offset: int, nbytes: int) -> None:
        assert os.fstat(descriptor).st_size == 2 << 20
        started.append((offset, nbytes))

    monkeypatch.setattr(writer, "start_writing", note)
    with OutputDirectory(tmp_path / "out") as output:
        output.preallocate("a", 2 << 20)
        output.write("a", 0, bytes(100))
        output.write("a", 100, bytes((2 << 20) - 100))
        output.finish()
    assert started == [(100, (2 << 20) - 100)]


def test_starting_changes_nothing_and_refuses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 10_000)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        start_writing(descriptor, 3, 20_000)
        start_writing(descriptor, 1 << 40, 5)
    finally:
        os.close(descriptor)
    start_writing(descriptor, 0, 5)  # closed: advice that cannot be taken
    assert path.read_bytes() == b"abc" * 10_000


def test_systems_without_the_call_write_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pagecache._sync_file_range.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    try:
        assert pagecache._sync_file_range() is None
        start_writing(-1, 0, 5)
    finally:
        pagecache._sync_file_range.cache_clear()
