"""Runs whose checkpoints lie in several directories."""

from __future__ import annotations

import pytest

import relex_stream as rs
from relex_stream.errors import SourceError, TrajectoryError
from relex_stream.sources import Phase, find_run, parse_steps
from tests.make_checkpoints import make_trajectory
from tests.make_stores import build_store


def write(root, steps, family="step_{}"):
    for step in steps:
        (root / family.format(step)).mkdir(parents=True)
        (root / family.format(step) / "model.safetensors").touch()
    return root


@pytest.fixture
def phases(tmp_path):
    return [
        Phase(write(tmp_path / "first", (10, 20, 30))),
        Phase(write(tmp_path / "second", (5, 10), "checkpoint-{}"), 30),
    ]


def steps_of(run):
    return [step for step, _ in run.checkpoints]


def test_phases_are_joined(phases):
    run = find_run(phases)
    assert steps_of(run) == [10, 20, 30, 35, 40]
    assert [path.name for _, path in run.checkpoints][-2:] == ["checkpoint-5", "checkpoint-10"]
    assert run.layout == "step_N; checkpoint-N"


def test_one_directory_with_an_offset(phases):
    assert steps_of(find_run([Phase(phases[0].directory, 5)])) == [15, 25, 35]


@pytest.mark.parametrize(
    ("text", "found"),
    [("20:35", [20, 30, 35]), ("40", [40]), ("10:20", [10, 20]), ("10,35", [10, 35])],
)
def test_steps_are_selected_by_their_sums(phases, text, found):
    assert steps_of(find_run(phases, steps=parse_steps(text))) == found


@pytest.mark.parametrize("text", ["5", "10,45", "31:34"])
def test_steps_that_are_nowhere_are_named(phases, text):
    with pytest.raises(SourceError, match="steps there: 10, 20, 30, 35, 40"):
        find_run(phases, steps=parse_steps(text))


def test_steps_there_are_named_in_their_order(phases):
    overlapping = [phases[0], phases[1]._replace(offset=12)]
    with pytest.raises(SourceError, match="steps there: 10, 17, 20, 22, 30"):
        find_run(overlapping, steps=parse_steps("5"))


@pytest.mark.parametrize(("offset", "first"), [(0, 5), (20, 25), (25, 30)])
def test_a_phase_that_begins_too_early_is_a_fork(phases, offset, first):
    overlapping = [phases[0], phases[1]._replace(offset=offset)]
    with pytest.raises(
        TrajectoryError, match=rf"begins at step {first}, .*--replace-from {first} "
    ):
        find_run(overlapping)


@pytest.mark.parametrize(
    ("offset", "replace_from", "found"),
    [(20, 25, [10, 20, 25, 30]), (20, 21, [10, 20, 25, 30]), (15, 20, [10, 20, 25])],
)
def test_a_later_phase_replaces(phases, offset, replace_from, found):
    overlapping = [phases[0], phases[1]._replace(offset=offset)]
    run = find_run(overlapping, replace_from=replace_from)
    assert steps_of(run) == found
    assert run.there == tuple(sorted([10, 20, 30, offset + 5, offset + 10]))


def test_replacing_from_too_late_on_is_still_a_fork(phases):
    with pytest.raises(TrajectoryError, match="--replace-from 15"):
        find_run([phases[0], phases[1]._replace(offset=10)], replace_from=30)


def test_a_directory_without_checkpoints_is_named(phases, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: no checkpoints"):
        find_run([*phases, Phase(tmp_path / "empty", 100)])


@pytest.mark.parametrize(("gone", "found"), [((5,), [10, 20, 30, 40]), ((5, 10), [10, 20, 30])])
@pytest.mark.parametrize("text", [None, "10,20,30,35,40"])
def test_stored_steps_whose_weights_are_gone_are_passed_over(phases, gone, found, text):
    for step in gone:
        (phases[1].directory / f"checkpoint-{step}/model.safetensors").unlink()
    steps = None if text is None else parse_steps(text)
    run = find_run(phases, steps=steps, may_lack=[step + 30 for step in gone])
    assert steps_of(run) == found
    assert run.there == (10, 20, 30, 35, 40)
    with pytest.raises(SourceError, match="checkpoint-5: no weights"):
        find_run(phases, steps=steps, may_lack=gone)


def test_a_store_of_two_phases_is_that_of_one_run(tmp_path):
    run = make_trajectory(tmp_path, steps=(1, 2, 3, 4), tensors={"a": (30, 20)})
    (tmp_path / "second").mkdir()
    for step in (3, 4):
        directory = run.directories[step].parent
        directory.rename(tmp_path / f"second/global_step_{step - 2}")
    both = {"step_offset": 0, "then": [(tmp_path / "second", 2)]}
    summary = build_store(run.base, run.checkpoints, tmp_path / "store", **both)
    assert summary.steps_added == (1, 2, 3, 4)
    again = build_store(run.base, tmp_path / "second", tmp_path / "store", step_offset=2)
    assert again.steps_skipped == (3, 4)
    opened = rs.open_store(tmp_path / "store")
    for step in run.steps:
        assert (opened.checkpoint_bits("a", step) == run.bits[step]["a"]).all()
