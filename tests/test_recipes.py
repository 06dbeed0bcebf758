"""Recipes against their formulas, on numbers in the place of checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.errors import OptionError
from relex_stream.recipes import RECIPES, Recipe, parse_recipe, parse_weights

STEPS = (10, 20, 30, 40, 50)
BASE, THETA = 3.0, dict(zip(STEPS, (5.0, 4.0, 7.5, 6.0, 9.0), strict=True))


def value(recipe: Recipe) -> float:
    """Return what a recipe makes of the numbers above."""
    return recipe.base_weight * BASE + sum(
        weight * THETA[step] for step, weight in recipe.step_weights.items()
    )


def ema(decay: float, last: int = 50) -> float:
    average = BASE
    for step in STEPS:
        if step <= last:
            average = decay * average + (1 - decay) * THETA[step]
    return average


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two-point:target=100", BASE + 2 * (9.0 - BASE)),
        ("two-point:target=100,to=40", BASE + 2.5 * (6.0 - BASE)),
        ("two-point:target=100,from=0,to=40", BASE + 2.5 * (6.0 - BASE)),
        ("two-point:target=100,from=20,to=40", 4.0 + 4 * (6.0 - 4.0)),
        ("two-point:target=30,from=20,to=40,norms=extrapolate", 5.0),
        ("expo:alpha=0.5", 9.0 + 0.5 * (9.0 - BASE)),
        ("expo:alpha=-0.25,step=20", 4.0 - 0.25 * (4.0 - BASE)),
        ("first-update:scale=7", BASE + 7 * (5.0 - BASE)),
        ("ema:decay=0.9", ema(0.9)),
        ("ema:decay=0.5,to=30", ema(0.5, 30)),
        ("ema:decay=1", BASE),
        ("ema:decay=0", 9.0),
        ("lawa:last=3", (7.5 + 6.0 + 9.0) / 3),
        ("lawa:last=2,to=20", (5.0 + 4.0) / 2),
    ],
)
def test_a_recipe_is_its_formula(text: str, expected: float) -> None:
    recipe = parse_recipe(text, STEPS)
    assert value(recipe) == pytest.approx(expected, rel=1e-12)
    assert recipe.text == text


def test_every_recipe_is_tested() -> None:
    (mark,) = test_a_recipe_is_its_formula.pytestmark
    assert {text.partition(":")[0] for text, _ in mark.args[1]} == set(RECIPES)


def test_norms_are_those_of_the_second_point_unless_they_are_wanted() -> None:
    recipe = parse_recipe("two-point:target=100,to=40", STEPS)
    assert recipe.norms_from == 40
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "h.0.ln_1.bias"):
        assert recipe.copies(name)
    assert not recipe.copies("model.layers.0.mlp.weight")
    other = parse_recipe("two-point:target=100,norms=extrapolate", STEPS)
    assert not other.copies("model.norm.weight")
    assert not parse_recipe("expo:alpha=1", STEPS).copies("model.norm.weight")


@given(st.dictionaries(st.sampled_from(STEPS), st.floats(-9, 9), min_size=1))
def test_weights_given_leave_the_rest_to_the_base(weights: dict[int, float]) -> None:
    text = ",".join(f"{step}={weight!r}" for step, weight in weights.items())
    recipe = parse_weights(text, STEPS)
    assert recipe.step_weights == weights
    expected = BASE + sum(weight * (THETA[step] - BASE) for step, weight in weights.items())
    assert value(recipe) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    again = parse_weights(f"{text},0={recipe.base_weight!r}", STEPS)
    assert again.step_weights == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two-point:target", r"'target' is not key=value, .*; write two-point:target=N"),
        ("two-point:target=1,target=2", "'target=2' is not key=value, or is there twice"),
        ("expo:alpha=1, alpha=2", "' alpha=2' is not key=value, or is there twice"),
        ("none:x=1", "there is no recipe 'none'; .*lawa:last=K"),
        ("two-point:target=-1", "target must be a number from 0 to inf, not '-1'"),
        ("two-point:target=inf", "target must be a number"),
        ("two-point:target=nan", "target must be a number"),
        ("expo:alpha=inf", "alpha must be a number, not 'inf'"),
        ("expo:alpha=nan", "alpha must be a number, not 'nan'"),
        ("expo:step=20", "lacks alpha; write expo:alpha=X"),
        ("expo:alpha=1,step=0", "step must be a step that the store holds, not '0'"),
        ("two-point:target=9,from=5", "from must be a step that the store holds or 0 for the base"),
        ("two-point:target=9,from=20,to=20", "'to' must be a later step than 'from'"),
        ("two-point:target=9,norms=no", "norms must be copy or extrapolate, not 'no'"),
        ("ema:decay=1.5", "decay must be a number from 0 to 1"),
        ("ema:decay=-0.1", "decay must be a number from 0 to 1"),
        ("lawa:last=3,to=20", "last must be a number from 1 to 2"),
        ("lawa:last=0", "last must be a number from 1 to 5"),
        ("lawa:last=1.5", "last must be a whole number"),
        ("lawa:last=1,from=1", "knows no 'from'; write lawa:last=K"),
    ],
)
def test_a_recipe_that_cannot_be_says_why(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_recipe(text, STEPS)


def test_a_recipe_needs_steps() -> None:
    with pytest.raises(OptionError, match="the store holds no steps"):
        parse_recipe("first-update:scale=2", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10=inf", "'10=inf' is not STEP=WEIGHT"),
        ("10=nan", "'10=nan' is not STEP=WEIGHT"),
        ("10", "'10' is not STEP=WEIGHT, like 100=0.5"),
        ("-1=1", "'-1=1' is not STEP=WEIGHT"),
        ("10=1,10=2", "step 10 is there twice"),
        ("15=1", "the store holds no step 15"),
        ("10=0.5,0=0.4", r"the base \(step 0\) has 0.5, not 0.4"),
    ],
)
def test_weights_that_cannot_be_say_why(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_weights(text, STEPS)


def test_norms_are_found_whatever_their_case() -> None:
    recipe = parse_recipe("two-point:target=100", STEPS)
    assert recipe.copies("transformer.h.0.LayerNorm.weight")
    assert recipe.copies("h.0.LN_1.weight")


def test_labels_are_names_of_files() -> None:
    labels = [
        parse_recipe("two-point:target=100,from=20", STEPS).label,
        parse_weights("10=0.5,20=-1e-3", STEPS).label,
    ]
    assert labels == ["two-point-target-100-from-20", "weights-10-0.5-20--1e-3"]


def test_weights_sum_to_one_in_float64() -> None:
    recipe = parse_recipe("lawa:last=3", STEPS)
    assert recipe.base_weight == 0.0
    assert np.isclose(sum(recipe.step_weights.values()), 1.0)
