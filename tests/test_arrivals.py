"""When a checkpoint counts as whole."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from relex_stream.arrivals import CLOCKS_AGREE_S, Arrival, Arrivals, Moment
from tests.make_checkpoints import SIDE_FILES, write_model

TENSORS = {"a": ("U8", (4,), b"abcd"), "b": ("U8", (2,), b"ef")}


class Look:
    """Looks at one step, at times that a test chooses."""

    def __init__(self, root: Path, settle_s: float = 30.0) -> None:
        self.directory = root / "step_5"
        self.arrivals = Arrivals(root, settle_s=settle_s)
        self.now_s = 1000.0
        self.file_clock_s = time.time()

    def __call__(self, after_s: float = 0.0) -> Arrival:
        self.now_s += after_s
        assert list(self.arrivals.steps()) == [5]
        return self.arrivals.look(5, self.directory, Moment(self.now_s, self.file_clock_s))


@pytest.fixture
def look(tmp_path) -> Look:
    return Look(tmp_path)


def test_it_is_whole_once_nothing_changed_for_a_while(look):
    write_model(look.directory, TENSORS, shards=2)
    assert look().is_settling
    assert look(29.9).is_settling
    arrival = look(0.1)
    assert arrival == Arrival(is_whole=True, lacks="", idle_s=30.0)
    assert not arrival.is_settling


def test_every_change_starts_the_time_anew(look):
    write_model(look.directory, TENSORS)
    look()
    for name, text in (("new", ""), ("new", "longer"), ("optim/rank_0", "x")):
        look(29)
        (look.directory / name).parent.mkdir(exist_ok=True)
        (look.directory / name).write_text(text)
        assert look(29).is_settling
    (look.directory / "new").unlink()
    assert look(29).is_settling
    (look.directory / "optim" / "rank_0").write_text("y")  # as long, but later
    assert look(29).is_settling
    assert look(30).is_whole


def test_old_files_need_not_be_watched(look):
    write_model(look.directory, TENSORS)
    look.file_clock_s += 30 + CLOCKS_AGREE_S - 1
    assert look().is_settling
    look.file_clock_s += 2
    assert look().is_whole


def test_a_copy_with_old_times_is_not_old(look):
    import os

    write_model(look.directory, TENSORS)
    for path in (look.directory, *look.directory.iterdir()):
        os.utime(path, (0, 0))
    assert look().is_settling


def test_a_missing_mark_is_named_once_nothing_changes(tmp_path):
    look = Look(tmp_path / "weights")
    write_model(look.directory, TENSORS)
    assert look().is_settling
    lacks = f"{look.directory} is not complete: no STABLE"
    assert look(30) == Arrival(is_whole=False, lacks=lacks, idle_s=30.0)
    (look.directory / "STABLE").touch()
    assert look().is_settling
    assert look(30).is_whole


def test_a_missing_shard_is_named(look):
    write_model(look.directory, TENSORS, shards=2)
    shard = look.directory / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    look()
    assert f"shard {shard.name}" in look(30).lacks
    shard.write_bytes(data[:-1])
    look()
    assert "truncated" in look(30).lacks
    shard.write_bytes(data)
    look()
    assert look(30).is_whole


def test_a_directory_without_weights_is_not_whole(look):
    look.directory.mkdir()
    (look.directory / "config.json").write_text(SIDE_FILES["config.json"])
    look()
    assert "no weights" in look(30).lacks


def test_a_refused_one_is_refused_until_it_changes(look):
    write_model(look.directory, TENSORS)
    look()
    assert look(30).is_whole
    look.arrivals.refuse(5, "no good")
    assert look(1000) == Arrival(is_whole=False, lacks="no good", idle_s=1030.0)
    write_model(look.directory, TENSORS)
    assert look().is_settling
    assert look(30).is_whole


def test_one_that_was_gone_is_looked_at_anew(look):
    write_model(look.directory, TENSORS)
    look()
    assert look(30).is_whole
    moved = look.directory.rename(look.directory.with_name("elsewhere"))
    assert look.arrivals.steps() == {}
    look.arrivals.refuse(5, "nobody is there")
    moved.rename(look.directory)
    assert look().is_settling


def test_with_no_time_to_settle_it_is_whole_at_once(tmp_path):
    look = Look(tmp_path, settle_s=0)
    write_model(look.directory, TENSORS)
    assert look().is_whole
