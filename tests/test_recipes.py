"""Recipes against their formulas, on numbers in the place of checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
