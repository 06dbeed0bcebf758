from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import relex_stream as rs
from relex_stream.demo.run import TRAJECTORY
from relex_stream.demo.task import (
    Problem,
    draw_problems,
    reward,
    split_of,
    splits_of_keys,
    vocabulary,
)


def test_the_answer_is_the_sum_written_backwards() -> None:
    problem = Problem(345, 678)
    assert problem.answer == "3201"
    assert reward(problem, "3201") == 1.0
    for wrong in ("1023", "3202", "320", "32010", "", "3201 "):
        assert reward(problem, wrong) == 0.0


def test_nothing_held_out_is_trained_on_in_either_order() -> None:
    held_out = draw_problems("held-out", 3000)
    assert all(split_of(problem) == "held-out" for problem in held_out)
    assert all(split_of(Problem(p.right, p.left)) == "held-out" for p in held_out)
    trained = {(p.left, p.right) for p in draw_problems("train", 3000, seed=5)}
    assert not trained & {(p.left, p.right) for p in held_out}


def test_problems_are_the_same_every_time_and_differ_by_seed() -> None:
    assert draw_problems("held-out", 50) == draw_problems("held-out", 50)
    assert draw_problems("train", 50, seed=1) != draw_problems("train", 50, seed=2)


def test_a_tenth_is_held_out_and_a_tenth_validates() -> None:
    splits = splits_of_keys(np.arange(100_000, dtype=np.uint64))
    assert abs(splits.count("held-out") - 10_000) < 500
    assert abs(splits.count("validation") - 10_000) < 500


def test_the_shipped_tokenizer_knows_the_tasks_characters(tmp_path: Path) -> None:
    rs.export(TRAJECTORY, tmp_path / "base", step=0)
    shipped = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    assert shipped["model"]["vocab"] == {token: at for at, token in enumerate(vocabulary())}


def test_importing_the_task_loads_no_torch() -> None:
    code = "import sys, relex_stream.demo.task; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
