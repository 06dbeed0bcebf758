"""The tasks: one answer is right, and no split knows another's problems."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rlvr.tasks import (
    CLOSING,
    OPEN_BRACKETS,
    OPENING,
    SORTED_DIGITS,
    TASKS,
    Brackets,
    Product,
    Sorting,
)
from relex_stream.demo.task import build_tokenizer

DIGITS = "0123456789"

IDENTITIES: dict[str, Callable[[Any], object]] = {
    "addition": lambda problem: frozenset((problem.left, problem.right)),
    "sorting": lambda problem: problem.answer,
    "product": lambda problem: (problem.left, problem.right),
    "brackets": lambda problem: problem.prefix,
}
"""What must never be in two splits."""


@pytest.mark.parametrize("name", TASKS)
def test_no_split_knows_problems_of_another(name):
    draw = TASKS[name].draw
    drawn = {
        "train": [*draw("train", 3000, seed=(4, 0, 1)), *draw("train", 3000, seed=(5, 1, 2))],
        "validation": draw("validation", 2000),
        "held-out": draw("held-out", 2000),
    }
    met = {split: set(map(IDENTITIES[name], problems)) for split, problems in drawn.items()}
    for one, other in itertools.combinations(met.values(), 2):
        assert not one & other
    # Enough of them that an accuracy says something about problems never met.
    assert len(met["held-out"]) > 300


@pytest.mark.parametrize("name", TASKS)
def test_every_text_has_the_tasks_length_and_characters(name):
    task = TASKS[name]
    tokenizer = build_tokenizer(task.symbols)
    for problem in task.draw("train", 300, seed=1):
        assert len(problem.prompt) == task.prompt_tokens - 1
        assert len(problem.answer) == task.completion_tokens - 1
        text = problem.prompt + problem.answer
        assert set(text) <= set(task.symbols)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_the_same_every_time_and_differ_by_seed(name):
    draw = TASKS[name].draw
    assert draw("held-out", 50) == draw("held-out", 50)
    assert draw("held-out", 50) == draw("held-out", 80)[:50]
    assert draw("train", 50, seed=(1, 2)) != draw("train", 50, seed=(2, 2))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        draw("test", 1)


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_right_and_what_differs_is_wrong(name):
    for problem in TASKS[name].draw("train", 100, seed=2):
        answer = problem.answer
        assert problem.solved_by(answer)
        for wrong in (answer[:-1], answer + answer[-1], " " + answer, "", "<pad>" + answer[1:]):
            assert not problem.solved_by(wrong)


@given(st.text(DIGITS, min_size=SORTED_DIGITS, max_size=SORTED_DIGITS))
def test_of_all_orders_of_the_digits_the_ascending_one_is_right(digits):
    right = {
        "".join(order)
        for order in itertools.permutations(digits)
        if Sorting(digits).solved_by("".join(order))
    }
    (answer,) = right
    assert all(left <= right for left, right in itertools.pairwise(answer))


@given(st.integers(0, 999), st.integers(0, 9))
def test_of_all_numbers_the_product_is_right(left, right):
    problem = Product(left, right)
    numbers = ("".join(digits) for digits in itertools.product(DIGITS, repeat=4))
    (answer,) = filter(problem.solved_by, numbers)
    assert sum(int(digit) * 10**place for place, digit in enumerate(answer)) == left * right


def test_digits_of_other_scripts_are_wrong():
    assert Product(1, 2).solved_by("2000")
    assert not Product(1, 2).solved_by("\u0662000")


def balanced(text: str) -> bool:
    """Return whether nothing is left when pairs are crossed out again and again."""
    pairs = [left + right for left, right in zip(OPENING, CLOSING, strict=True)]
    while any(pair in text for pair in pairs):
        for pair in pairs:
            text = text.replace(pair, "")
    return not text


@given(st.integers(0, 2**32))
def test_of_all_endings_the_one_that_balances_is_right(seed):
    (problem,) = TASKS["brackets"].draw("train", 1, seed=seed)
    assert isinstance(problem, Brackets)
    endings = map("".join, itertools.product(CLOSING, repeat=OPEN_BRACKETS))
    solved = [ending for ending in endings if problem.solved_by(ending)]
    assert solved == [problem.answer]
    assert balanced(problem.prefix + problem.answer)


@given(st.text(OPENING + CLOSING, max_size=6), st.text(OPENING + CLOSING + "p", max_size=4))
def test_an_ending_is_right_if_and_only_if_all_is_balanced(prefix, ending):
    expected = balanced(prefix + ending) and len(ending) == OPEN_BRACKETS
    assert Brackets(prefix).solved_by(ending) == expected
