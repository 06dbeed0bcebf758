"""Runs that were taken up again from an earlier checkpoint."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import relex_stream as rs
from relex_stream.forks import _telling
from relex_stream.specs import NoProgress
from relex_stream.store import Store
from tests.make_checkpoints import make_trajectory
from tests.make_stores import build_store

TENSORS = {"a.weight": (40, 30), "b.weight": (64,), "c": (3,)}


@pytest.fixture
def run(tmp_path):
    return make_trajectory(tmp_path / "run", steps=range(1, 6), tensors=TENSORS)


@pytest.fixture
def other(run, tmp_path):
    """The same up to step 2, then other weights under the same numbers, and more of them."""
    other = make_trajectory(
        tmp_path / "other", steps=range(1, 8), tensors=TENSORS, change_share=0.02
    )
    for step in (1, 2):
        shutil.rmtree(other.directories[step])
        shutil.copytree(run.directories[step], other.directories[step])
    return other


@pytest.fixture
def store(run, tmp_path):
    build_store(run.base, run.checkpoints, tmp_path / "store")
    return tmp_path / "store"


def test_a_fork_is_refused_with_the_step_it_begins_at(other, store):
    before = Store(store).head
    with pytest.raises(rs.TrajectoryError, match=r"step 3 in .*--replace-from 3"):
        build_store(other.base, other.checkpoints, store)
    assert Store(store).head == before


def test_a_fork_whose_last_common_step_is_gone_from_the_directory(other, store):
    for step in (4, 5):
        shutil.rmtree(other.directories[step].parent)
    with pytest.raises(rs.TrajectoryError, match="--replace-from 3"):
        build_store(other.base, other.checkpoints, store)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_run_of_another_dtype_goes_on(tmp_path, dtype):
    run = make_trajectory(tmp_path, steps=(1, 2, 3), tensors=TENSORS, dtype=dtype)
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:2")
    assert build_store(run.base, run.checkpoints, tmp_path / "store").steps_added == (3,)


def test_the_same_run_goes_on(run, tmp_path):
    first = [step for step in run.steps if step < 4]
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:3")
    summary = build_store(run.base, run.checkpoints, tmp_path / "store")
    assert summary.steps_skipped == tuple(first)
    assert summary.steps_added == (4, 5)


def test_stored_steps_are_replaced(other, store, tmp_path):
    summary = build_store(other.base, other.checkpoints, store, replace_from=3)
    assert summary.steps_skipped == (1, 2)
    assert summary.steps_added == (3, 4, 5, 6, 7)
    assert rs.verify(store).problems == ()
    for step, directory in other.directories.items():
        if step:
            rs.export(store, tmp_path / f"{step}", step=step)
            for path in directory.iterdir():
                assert (tmp_path / f"{step}" / path.name).read_bytes() == path.read_bytes()


def test_all_stored_steps_are_replaced(other, store):
    notes = []

    class Notes(NoProgress):
        def note(self, text):
            notes.append(text)

    summary = build_store(other.base, other.checkpoints, store, replace_from=1, progress=Notes())
    assert summary.steps_added == Store(store).steps == tuple(range(1, 8))
    assert rs.verify(store).problems == ()
    assert "taken back, to be replaced: 5 steps from 1 to 5" in notes


def test_where_there_is_nothing_to_add_nothing_is_compared(other, store):
    summary = build_store(other.base, other.checkpoints, store, steps="1:5")
    assert (summary.steps_added, summary.steps_skipped) == ((), (1, 2, 3, 4, 5))


def test_nothing_is_taken_back_for_other_models_or_dtypes(other, store, tmp_path):
    for name, options, message in (
        ("shapes", {"tensors": {**TENSORS, "c": (4,)}}, "another model"),
        ("dtypes", {"tensors": TENSORS, "dtype": "F32", "base_dtype": "BF16"}, "give --as bf16"),
    ):
        run = make_trajectory(tmp_path / name, steps=(6,), **options)
        shutil.rmtree(other.directories[6])
        shutil.copytree(run.directories[6], other.directories[6])
        with pytest.raises(rs.TrajectoryError, match=rf"step 6: .*{message}"):
            build_store(other.base, other.checkpoints, store, replace_from=3)
        assert Store(store).steps == (1, 2, 3, 4, 5)


def test_blocks_that_changed_most_are_looked_at():
    changed = np.array([0, 9, 3, 3, *range(20, 30), 0, 1], np.uint32)
    assert _telling(changed) == [1, 3, *range(4, 14)]
    assert _telling(changed[:3]) == [0, 1, 2]


def test_a_replacement_from_too_late_on_is_still_a_fork(other, store):
    with pytest.raises(rs.TrajectoryError, match="--replace-from 3"):
        build_store(other.base, other.checkpoints, store, replace_from=5)
    assert Store(store).steps == (1, 2, 3, 4, 5)


def test_nothing_is_taken_back_for_nothing(other, store):
    with pytest.raises(rs.OptionError, match=r"no steps from there on"):
        build_store(other.base, other.checkpoints, store, replace_from=3, steps="1:2")
    assert Store(store).steps == (1, 2, 3, 4, 5)


def test_nothing_is_taken_back_for_checkpoints_that_cannot_come_instead(other, store):
    (other.directories[6] / "model.safetensors").unlink(missing_ok=True)
    for path in other.directories[6].glob("*.safetensors"):
        path.unlink()
    with pytest.raises(rs.SourceError):
        build_store(other.base, other.checkpoints, store, replace_from=3)
    assert Store(store).steps == (1, 2, 3, 4, 5)


def test_nothing_is_taken_back_over_another_base(other, store, tmp_path):
    """One of the same shapes, and one of another dtype."""
    alike = make_trajectory(tmp_path / "alike", seed=1, steps=(), tensors=TENSORS).base
    with pytest.raises(rs.SourceError, match="the base has changed"):
        build_store(alike, other.checkpoints, store, replace_from=3)
    wider = make_trajectory(tmp_path / "wider", steps=(), tensors=TENSORS, dtype="F32").base
    with pytest.raises(rs.SourceError, match=r"is F32 .*, the store was built over BF16"):
        build_store(wider, other.checkpoints, store, replace_from=3)
    assert Store(store).steps == (1, 2, 3, 4, 5)


def test_a_store_of_f32_weights_takes_no_rounded_ones(tmp_path):
    run = make_trajectory(
        tmp_path / "run", steps=(1, 2), tensors=TENSORS, dtype="F32", base_dtype="BF16"
    )
    store = tmp_path / "store"
    build_store(run.base, run.checkpoints, store, steps="1")
    for options in ({}, {"replace_from": 1}, {"steps": "1"}):
        with pytest.raises(rs.OptionError, match=r"--as bf16: .* was begun without it and holds F"):
            build_store(run.base, run.checkpoints, store, cast="bf16", **options)
    assert Store(store).steps == (1,)


def test_replacing_from_beyond_the_last_step_only_appends(run, tmp_path):
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:3")
    summary = build_store(run.base, run.checkpoints, tmp_path / "store", replace_from=4)
    assert summary.steps_added == (4, 5)


# --- weights that are gone, because the store has them ------------------------------------------


def test_stored_steps_whose_weights_are_gone_are_passed_over(run, tmp_path):
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:3")
    for step in (1, 2, 3):
        for path in run.directories[step].glob("*.safetensors*"):
            path.unlink()
    summary = build_store(run.base, run.checkpoints, tmp_path / "store")
    assert summary.steps_added == (4, 5)
    for step in (4, 5):
        for path in run.directories[step].glob("*.safetensors*"):
            path.unlink()
    again = build_store(run.base, run.checkpoints, tmp_path / "store")
    assert (again.steps_added, again.steps_total) == ((), 5)


def test_an_index_without_its_shards_is_passed_over_too(run, other, tmp_path):
    """As a watch leaves it that deletes weights."""
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:4")
    for step in (3, 4):
        for path in run.directories[step].glob("*.safetensors"):
            path.unlink()
        assert (run.directories[step] / "model.safetensors.index.json").exists()
    summary = build_store(run.base, run.checkpoints, tmp_path / "store")
    assert summary.steps_added == (5,)
    # The last that is there is compared.
    for step in (1, 2):
        shutil.rmtree(run.directories[step])
        shutil.copytree(other.directories[step + 3], run.directories[step])
    rs.drop(tmp_path / "store", after=4)
    with pytest.raises(rs.TrajectoryError, match=r"step 1 in .*--replace-from 1"):
        build_store(run.base, run.checkpoints, tmp_path / "store")


def test_other_steps_without_weights_are_named(run, tmp_path):
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:3")
    for path in run.directories[5].glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(rs.SourceError, match="global_step_5: no weights"):
        build_store(run.base, run.checkpoints, tmp_path / "store")
