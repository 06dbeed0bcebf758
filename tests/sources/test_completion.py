"""Marks of trainers: what is written last, and is due."""

from __future__ import annotations

from pathlib import Path

import pytest

from relex_stream.errors import OptionError, SourceError
from relex_stream.sources import list_steps, missing_mark, parse_steps


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_directory_without_known_marks_lacks_none(tmp_path):
    for name in ("step_5", "global_step_5", "checkpoint-5", "epoch-5"):
        write(tmp_path / name / "model.safetensors")
        assert missing_mark(tmp_path / name) is None
    assert missing_mark(tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("latest", "lacks"), [("5", False), ("6\n", False), ("4", True), ("", True), ("x", True)]
)
def test_verl_notes_the_step_beside_it(tmp_path, latest, lacks):
    step = tmp_path / "global_step_5"
    write(step / "actor" / "huggingface" / "config.json")
    write(tmp_path / "latest_checkpointed_iteration.txt", latest)
    mark = "its number in latest_checkpointed_iteration.txt"
    assert missing_mark(step) == (mark if lacks else None)


@pytest.mark.parametrize("kind", ["weights", "broadcasts"])
def test_prime_rl_marks_weights_and_broadcasts(tmp_path, kind):
    step = tmp_path / kind / "step_5"
    write(step / "model.safetensors")
    assert missing_mark(step) == "the mark STABLE"
    write(step / "STABLE")
    assert missing_mark(step) is None
    write(tmp_path / "checkpoints" / "step_5" / "model.safetensors")
    assert missing_mark(tmp_path / "checkpoints" / "step_5") is None


@pytest.mark.parametrize("state", ["optimizer.pt", "scheduler.pt", "rng_state_3.pth"])
def test_the_trainer_writes_its_state_after_the_weights(tmp_path, state):
    step = tmp_path / "checkpoint-5"
    write(step / "model.safetensors")
    write(step / state)
    assert missing_mark(step) == "trainer_state.json"
    write(step / "trainer_state.json")
    assert missing_mark(step) is None


def test_what_one_checkpoint_of_the_trainer_has_is_due_in_the_next(tmp_path):
    write(tmp_path / "checkpoint-5" / "trainer_state.json")
    step = write(tmp_path / "checkpoint-10" / "model.safetensors").parent
    assert missing_mark(step) == "trainer_state.json"


@pytest.mark.parametrize("inside", ["", "actor/", "policy/weights/model/"])
def test_a_distributed_checkpoint_is_whole_with_its_metadata(tmp_path, inside):
    step = tmp_path / "step_5"
    write(step / f"{inside}__0_0.distcp")
    assert missing_mark(step) == f"{inside}.metadata"
    write(step / f"{inside}.metadata")
    assert missing_mark(step) is None


# --- steps that may still be empty ---------------------------------------------------------------


def test_steps_are_listed_whatever_is_in_them(tmp_path):
    for name in ("step_10", "step_9", "step_0", "tmp_step_11", "step_12.tmp"):
        (tmp_path / name).mkdir()
    write(tmp_path / "step_13")
    assert list(list_steps(tmp_path).items()) == [
        (9, tmp_path / "step_9"),
        (10, tmp_path / "step_10"),
    ]
    assert list(list_steps(tmp_path, steps=parse_steps("10:"))) == [10]
    assert list_steps(tmp_path, "epoch-{step}") == {}
    assert list_steps(tmp_path / "not-yet") == {}


def test_what_waiting_does_not_mend_is_refused(tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(SourceError, match="several kinds"):
        list_steps(tmp_path)
    (tmp_path / "step_01").mkdir()
    with pytest.raises(SourceError, match="both step_01 and step_1 are step 1"):
        list_steps(tmp_path, "step_{step}")
    with pytest.raises(OptionError, match="exactly once"):
        list_steps(tmp_path / "not-yet", "step")
