"""Least squares of coefficients on steps, as hat vectors.

A fit that is linear in the coefficients predicts at a target step by a fixed combination of the
observed ones: ``c(target) = C^T h`` with a hat vector h that depends on the steps alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import FitError

Float64 = NDArray[np.float64]

FITS = ("linear",)
"""Names `hat_vector` knows."""

_ROUNDING = 1e-13
"""Variation of coefficients below this share of their size is rounding."""


def hat_vector(steps: Sequence[int], target_step: int, fit: str = "linear") -> Float64:
    """Return h (T,): the weights with which observed values predict the value at `target_step`.

    Parameters
    ----------
    steps : sequence of int
        Distinct steps observed; the regressor.
    target_step : int
    fit : str
        ``"linear"``: an intercept and a slope (RELEX, arXiv 2605.21468).

    Raises
    ------
    FitError
        If there are too few steps for the fit.

    Examples
    --------
    >>> hat_vector([10, 20], 30).tolist()
    [-1.0, 2.0]
    """
    if fit not in FITS:
        raise FitError(f"fit {fit!r} is not one of {', '.join(FITS)}")
    if len(steps) < 2:
        raise FitError(
            f"a line needs at least 2 checkpoints, the history has {len(steps)}; "
            "add checkpoints with build-store or raise --history-steps"
        )
    regressor = np.asarray(steps, np.float64)
    mean = regressor.mean()
    centred = regressor - mean
    slope_weights = centred / (centred @ centred)
    hat: Float64 = 1.0 / len(steps) + (target_step - mean) * slope_weights
    return hat


def r_squared(steps: Sequence[int], coefficients: Float64) -> Float64:
    """Return the coefficient of determination of a line per column of `coefficients` (T, r).

    A column that does not vary, but for float64's rounding, has 1: the line hits it.
    """
    regressor = np.asarray(steps, np.float64)
    centred = regressor - regressor.mean()
    varied = coefficients - coefficients.mean(axis=0)
    total = (varied**2).sum(axis=0)
    explained = (centred @ varied) ** 2 / (centred @ centred)
    varies = total > _ROUNDING**2 * (coefficients**2).sum(axis=0)
    return np.where(varies, explained / np.where(varies, total, 1.0), 1.0)


def output_weights(vectors: Float64, hats: Float64) -> Float64:
    """Return ``w = U U^T h`` for several hat vectors at once.

    Parameters
    ----------
    vectors : ndarray of float64, shape (T, r)
        Orthonormal left singular vectors U.
    hats : ndarray of float64, shape (T, outputs)

    Returns
    -------
    ndarray of float64, shape (T, outputs)
        ``theta* = theta_0 + M^T w``: the rank-r line's prediction (docs/design.md).
    """
    weights: Float64 = vectors @ (vectors.T @ hats)
    return weights
