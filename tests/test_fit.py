from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream.errors import FitError
from relex_stream.fit import FITS, hat_vector, output_weights, r_squared

histories = st.lists(st.integers(0, 100_000), min_size=2, max_size=40, unique=True).map(sorted)


def line_by_lstsq(steps, values, target):
    """Predict with numpy's least squares on a centred and scaled regressor."""
    steps = np.array(steps, np.float64)
    mean, width = steps.mean(), np.ptp(steps)
    design = np.stack([np.ones_like(steps), (steps - mean) / width], axis=1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return solution[0] + solution[1] * (target - mean) / width


@settings(max_examples=100, deadline=None)
@given(steps=histories, target=st.integers(0, 200_000), seed=st.integers(0, 2**32 - 1))
def test_hat_vector_predicts_as_least_squares_does(steps, target, seed):
    values = np.random.default_rng(seed).standard_normal((len(steps), 3))
    hat = hat_vector(steps, target)
    assert hat.shape == (len(steps),)
    expected = line_by_lstsq(steps, values, target)
    np.testing.assert_allclose(hat @ values, expected, rtol=1e-9, atol=1e-9 * np.abs(hat).sum())


@settings(max_examples=100, deadline=None)
@given(
    steps=histories,
    target=st.integers(0, 200_000),
    intercept=st.floats(-100, 100),
    slope=st.floats(-10, 10),
)
def test_lines_are_reproduced(steps, target, intercept, slope):
    values = intercept + slope * np.array(steps, np.float64)
    hat = hat_vector(steps, target)
    largest = np.abs(hat).sum() * np.abs(values).max(initial=1)
    assert hat @ values == pytest.approx(intercept + slope * target, rel=0, abs=1e-13 * largest)


def test_the_regressor_is_the_step_not_the_row():
    # On rows 0, 1, 2 the answer would be another.
    assert hat_vector([0, 10, 100], 100) @ np.array([0.0, 10.0, 100.0]) == pytest.approx(100)
    assert hat_vector([5, 7], 6).tolist() == [0.5, 0.5]


def test_at_the_mean_of_the_steps_the_hat_vector_is_the_mean():
    np.testing.assert_allclose(hat_vector([1, 2, 6], 3), np.full(3, 1 / 3), atol=1e-15)


@pytest.mark.parametrize("start", [0, 2**40, 2**52])
def test_huge_steps_lose_nothing(start):
    steps = [start, start + 1, start + 3, start + 4]
    expected = hat_vector([0, 1, 3, 4], 10)
    np.testing.assert_allclose(hat_vector(steps, start + 10), expected, rtol=1e-14)


def test_widely_spread_steps():
    steps = [0, 1, 2**40]
    assert hat_vector(steps, 2**41) @ np.array(steps, np.float64) == pytest.approx(2**41)


def test_the_order_of_steps_does_not_matter():
    assert hat_vector([30, 10, 20], 40).tolist() == hat_vector([10, 20, 30], 40)[[2, 0, 1]].tolist()


@pytest.mark.parametrize("steps", [[], [10]])
def test_a_line_needs_two_steps(steps):
    with pytest.raises(FitError, match=rf"at least 2 checkpoints, the history has {len(steps)}"):
        hat_vector(steps, 20)


def test_an_unknown_fit_is_refused():
    with pytest.raises(FitError, match="'cubic' is not one of linear"):
        hat_vector([1, 2], 3, "cubic")
    assert FITS == ("linear",)


# --- the coefficient of determination ----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(steps=histories, seed=st.integers(0, 2**32 - 1))
def test_r_squared_is_the_share_the_line_explains(steps, seed):
    rng = np.random.default_rng(seed)
    coefficients = rng.standard_normal((len(steps), 4)) + rng.standard_normal(4) * np.linspace(
        0, 3, len(steps)
    ).reshape(-1, 1)
    fitted = np.stack([line_by_lstsq(steps, coefficients, step) for step in steps])
    residual = ((coefficients - fitted) ** 2).sum(axis=0)
    total = ((coefficients - coefficients.mean(axis=0)) ** 2).sum(axis=0)
    found = r_squared(steps, coefficients)
    np.testing.assert_allclose(found, 1 - residual / total, atol=1e-8)


def test_r_squared_of_a_line_and_of_no_line():
    steps = [1, 2, 4, 9]
    columns = np.array([[3.0, 1.0], [5.0, -1.0], [9.0, 1.0], [19.0, -1.0]])
    found = r_squared(steps, columns)
    assert found[0] == pytest.approx(1, abs=1e-14)
    assert found[1] < 0.5


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e-20, 1e30])
@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_a_column_that_does_not_vary_is_hit(constant, count):
    # The mean of equal numbers need not be the number: 0.1 three times is off in the last bit.
    assert r_squared(range(count), np.full((count, 1), constant)).tolist() == [1.0]


def test_r_squared_does_not_depend_on_the_unit():
    steps = [0, 1, 2, 5]
    column = np.array([[1.0], [2.0], [2.0], [4.0]])
    expected = r_squared(steps, column)
    for unit in (1e-12, 1e12):
        np.testing.assert_allclose(r_squared(steps, column * unit), expected, rtol=1e-12)


# --- the weights of an output ------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_output_weights_give_the_rank_r_line(rank):
    rng = np.random.default_rng(0)
    steps, targets = [2, 3, 5, 8, 13], [13, 21, 100]
    deltas = rng.standard_normal((5, 40))
    left, values, right = np.linalg.svd(deltas, full_matrices=False)
    hats = np.stack([hat_vector(steps, target) for target in targets], axis=1)
    weights = output_weights(left[:, :rank], hats)
    assert weights.shape == (5, 3)
    # The definition: fit each coefficient on the steps, predict it, and expand in V.
    coefficients = left[:, :rank] * values[:rank]
    for column, target in enumerate(targets):
        predicted = line_by_lstsq(steps, coefficients, target) @ right[:rank]
        np.testing.assert_allclose(deltas.T @ weights[:, column], predicted, atol=1e-11)


def test_output_weights_do_not_depend_on_signs_and_rotations():
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    turned = vectors @ np.linalg.qr(rng.standard_normal((2, 2)))[0]
    hats = rng.standard_normal((6, 3))
    np.testing.assert_allclose(output_weights(vectors, hats), output_weights(turned, hats))


def test_output_weights_of_full_rank_are_the_hat_vectors():
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
    hats = hat_vector([1, 2, 3, 4], 9)[:, None]
    np.testing.assert_allclose(output_weights(vectors, hats), hats, atol=1e-14)


def test_output_weights_of_a_tensor_that_never_changed_are_zero():
    weights = output_weights(np.zeros((4, 0)), np.ones((4, 2)))
    assert weights.shape == (4, 2)
    assert not weights.any()
