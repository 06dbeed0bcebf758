"""Which of the steps that were found go into a store."""

from __future__ import annotations

import warnings

import pytest

from relex_stream.additions import split_found
from relex_stream.errors import OptionError, RelexStreamWarning
from relex_stream.store.records import MAX_STEP


def found(*steps: int) -> list[tuple[int, str]]:
    return [(step, f"step_{step}") for step in steps]


@pytest.mark.parametrize(
    ("there", "stored", "todo", "skipped"),
    [
        ((1, 2), (), (1, 2), ()),
        ((1, 2, 3), (1, 2), (3,), (1, 2)),
        ((2, 3), (1, 2), (3,), (2,)),
        ((1, 2), (1, 2), (), (1, 2)),
        ((), (1, 2), (), ()),
        ((MAX_STEP,), (1,), (MAX_STEP,), ()),
    ],
)
def test_steps_behind_the_stored_ones_are_added(there, stored, todo, skipped):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_found(found(*there), stored) == (found(*todo), skipped)


@pytest.mark.parametrize(
    ("there", "stored", "late", "before"),
    [
        ((1, 2, 3, 7), (1, 3, 5), "step 2", 1),
        ((2, 4), (3, 5), "step 2, 4", 0),
        ((4, 5), (1, 3, 5), "step 4", 3),
    ],
)
def test_steps_between_stored_ones_are_left_out_with_a_remedy(there, stored, late, before):
    message = f"goes to step 5: {late}; to take them in, first drop --after {before}, then build"
    with pytest.warns(RelexStreamWarning, match=message):
        todo, skipped = split_found(found(*there), stored)
    assert todo == found(*(step for step in there if step > 5))
    assert set(skipped) == set(there) & set(stored)


def test_a_step_that_is_too_large_is_refused():
    with pytest.raises(OptionError, match=rf"step {MAX_STEP + 1} is larger .* --steps"):
        split_found(found(1, MAX_STEP + 1), ())
