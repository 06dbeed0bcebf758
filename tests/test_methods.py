"""Weights of rows: what products there are, what they are called, and what they add up to."""

from __future__ import annotations

import numpy as np
import pytest

from relex_stream.errors import OptionError
from relex_stream.fit import Fit, Forecast
from relex_stream.methods import (
    Combination,
    Extrapolation,
    Product,
    Reconstruction,
    product_paths,
)
from relex_stream.recipes import parse_recipe

HISTORY = (2, 3, 5, 8, 13, 20)


def vectors(columns: int = 4) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((6, columns)))[0]


def test_products_are_every_combination_and_their_weights_lie_in_that_order() -> None:
    method = Extrapolation(
        HISTORY, targets=(30, 50), ranks=(1, 3), dampings=(0.25, 1.0), anchors=("base", "latest")
    )
    weights = method.weights(vectors())
    assert weights.shape == (6, 16) == (6, len(method.products))
    for column, product in enumerate(method.products):
        facts = product.facts
        left = vectors()[:, : facts["rank"]]
        forecast = Forecast(HISTORY, [facts["target_step"], 20], Fit())
        there, here = forecast.weights(left).T
        if facts["anchor"] == "base":
            expected = facts["damping"] * there
        else:
            expected = facts["damping"] * (there - here) + np.eye(6)[-1]
        np.testing.assert_allclose(weights[:, column], expected, atol=1e-14)
    assert [tuple(each.facts.values()) for each in method.products[:3]] == [
        (30, 1, 0.25, "base"),
        (30, 1, 0.25, "latest"),
        (30, 1, 1.0, "base"),
    ]


def test_without_damping_the_latest_is_the_last_checkpoint() -> None:
    method = Extrapolation(HISTORY, (90,), dampings=(0.0,), anchors=("latest", "base"))
    np.testing.assert_array_equal(method.weights(vectors()).T, [np.eye(6)[-1], np.zeros(6)])


def test_a_group_of_lower_rank_than_wanted_has_what_it_has() -> None:
    few = Extrapolation(HISTORY, (90,), ranks=(1, 5)).weights(vectors(1))
    np.testing.assert_array_equal(few[:, 0], few[:, 1])
    assert not Extrapolation(HISTORY, (90,)).weights(vectors()[:, :0]).any()


@pytest.mark.parametrize(("scale", "place"), [(1.0, 85), (2.0, 175), (0.5, 40)])
def test_the_authors_fit_over_rows(scale: float, place: int) -> None:
    # Row of the target: T - 1 + (target * scale - last step) = 5 + (90 * scale - 20), less 10 for
    # the numbers above.
    fit = Fit(as_relex=True)
    method = Extrapolation(HISTORY, (90,), fit=fit, step_scale=scale)
    expected = Forecast(range(6), [5 + (90 * scale - 20)], Fit()).weights(vectors(1))
    np.testing.assert_allclose(method.weights(vectors(1)), expected)
    assert 5 + (90 * scale - 20) - place == -10


def test_a_reconstruction_is_a_projection() -> None:
    method = Reconstruction(HISTORY, steps=(13, 3), ranks=(2, 4))
    weights = method.weights(vectors())
    facts = [tuple(each.facts.values()) for each in method.products]
    assert facts == [(13, 2), (13, 4), (3, 2), (3, 4)]
    for column, (step, rank) in enumerate(facts):
        left = vectors()[:, :rank]
        unit = np.eye(6)[HISTORY.index(step)]
        np.testing.assert_allclose(weights[:, column], left @ (left.T @ unit), atol=1e-14)


def test_a_fitted_reconstruction_is_the_fit_at_that_step() -> None:
    found = Reconstruction(HISTORY, steps=(13, 3), ranks=(1, 2), fit=Fit("polynomial:2"))
    for rank in (1, 2):
        expected = Extrapolation(HISTORY, (13, 3), ranks=(rank,), fit=Fit("polynomial:2"))
        columns = [rank - 1, rank + 1]
        np.testing.assert_allclose(
            found.weights(vectors())[:, columns], expected.weights(vectors()), atol=1e-13
        )


def test_a_combination_has_the_weights_of_its_recipes() -> None:
    recipes = ("lawa:last=2", "two-point:target=40,from=5,to=8")
    method = Combination(HISTORY, tuple(parse_recipe(text, HISTORY) for text in recipes))
    expected = [[0, 0, 0, 0, 0.5, 0.5], [0, 0, 1 - 35 / 3, 35 / 3, 0, 0]]
    np.testing.assert_allclose(method.weights(np.zeros((6, 0))).T, expected)
    assert method.copies("layers.0.norm.weight") == {1: 8}
    assert method.copies("layers.0.mlp.weight") == {}
    assert method.products[0].facts["weights"] == {"base": 0.0, 13: 0.5, 20: 0.5}


def test_levels_that_have_one_value_name_no_directory() -> None:
    def paths(**changed: tuple[object, ...]) -> list[str]:
        return product_paths(Extrapolation(HISTORY, **{"targets": (500,), **changed}).products)  # type: ignore[arg-type]

    assert paths() == [""]
    assert paths(targets=(500, 600)) == ["step_500", "step_600"]
    assert paths(ranks=(1, 2), dampings=(0.3, 1.0)) == [
        "rank_1/damping_0.3",
        "rank_1/damping_1",
        "rank_2/damping_0.3",
        "rank_2/damping_1",
    ]
    every = paths(targets=(500, 600), ranks=(1, 2), dampings=(0.3, 1.0), anchors=("base", "latest"))
    assert every[0] == "step_500/rank_1/damping_0.3/anchor_base"
    assert len(set(every)) == 16


def test_values_that_differ_have_names_that_differ() -> None:
    products = [Product((("damping", value),), {}) for value in (0.1, 0.1 + 1e-15, 1e-5, 20.0)]
    assert product_paths(products) == [
        "damping_0.1",
        "damping_0.100000000000001",
        "damping_1e-05",
        "damping_20",
    ]
    with pytest.raises(OptionError, match="two outputs are the same"):
        product_paths(products[:1] * 2)
