"""What models are made of: how much each stored step weighs in them.

Every model that is made from a store is ``theta_0 + M^T w`` in each tensor, where row t of M is the
weight delta ``theta_t - theta_0``: it is made by its vectors w alone. A method gives those of one
or more models, its products. They are written together, in one pass over the store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relex_stream.errors import OptionError
from relex_stream.fit import Fit, Forecast
from relex_stream.recipes import Recipe

Float64 = NDArray[np.float64]

ANCHORS = ("base", "latest")

AUTO = "auto"
"""In the place of a damping: one that the history chooses (`nested`)."""


@dataclass(frozen=True)
class Product:
    """One model.

    Attributes
    ----------
    levels : tuple of (str, value)
        What tells it from others of its method, and names its directory: outermost first.
    facts : dict
        What it is, for records; plain values.
    """

    levels: tuple[tuple[str, Any], ...]
    facts: dict[str, Any]


def product_paths(products: Sequence[Product]) -> list[str]:
    """Return the directory of each product below the output: ``""`` for the only one.

    Those that have the same levels, by name, have the same depth: a level is left out where it has
    one value in all of them. The outermost is left out only where it has one value in all.

    Raises
    ------
    OptionError
        If two have the same.

    Examples
    --------
    >>> levels = [(("step", 500), ("rank", 1), ("damping", 0.3)), (("step", 500), ("rank", 1),
    ...     ("damping", 1.0))]
    >>> product_paths([Product(each, {}) for each in levels])
    ['damping_0.3', 'damping_1']
    """
    values: dict[Any, set[str]] = {}
    for each in products:
        names = tuple(name for name, _ in each.levels)
        for depth, (name, value) in enumerate(each.levels):
            values.setdefault((names if depth else (), name), set()).add(_text(value))
    paths = []
    for each in products:
        names = tuple(name for name, _ in each.levels)
        parts = [
            f"{name}_{_text(value)}"
            for depth, (name, value) in enumerate(each.levels)
            if len(values[names if depth else (), name]) > 1
        ]
        paths.append("/".join(parts))
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise OptionError(f"two outputs are the same: {twice or 'with all their settings'}")
    return paths


def _text(value: Any) -> str:
    # Enough digits to tell any two apart, and no more: 0.3, 1, 1e-05.
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


class Method(ABC):
    """How the weights of some products come about.

    Attributes
    ----------
    history : tuple of int
        The stored steps it uses, from the first on: row t of its weights is of the t-th.
    products : tuple of Product
    """

    history: tuple[int, ...]
    products: tuple[Product, ...]

    @property
    def forecast(self) -> Forecast | None:
        """The fit that the weights come from, if they do."""
        return None

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What all products have in common, for records; plain values."""

    @abstractmethod
    def weights(self, vectors: Float64) -> Float64:
        """Return w of each product, shape (T, products), of a group of tensors.

        Parameters
        ----------
        vectors : ndarray of float64, shape (T, r)
            Orthonormal left singular vectors of the group's M; of no column where it needs none.
        """

    def copies(self, name: str) -> dict[int, int]:
        """Return the products that have a tensor as it is at some step: number of product to step.

        Parameters
        ----------
        name : str
            The tensor's.
        """
        return {}


@dataclass(frozen=True)
class Extrapolation(Method):
    """RELEX (arXiv 2605.21468): the rank-r subspace and fits of the coefficients in it.

    Attributes
    ----------
    history : tuple of int
    targets : tuple of int
        Steps to predict.
    ranks : tuple of int
    dampings : tuple of float or "auto"
        lambda, which the predicted delta is multiplied by (`anchor` ``"base"``) or the predicted
        change since the last step (``"latest"``).
    anchors : tuple of str
        ``"base"``: ``theta_0 + lambda p(target)``, where p is the predicted delta. ``"latest"``:
        ``theta_K + lambda (p(target) - p(K))``, where K is the last step, which keeps what lies
        outside the subspace.
    fit : Fit
        If it is `as_relex`, over the rows and not over the steps.
    step_scale : float
        By which targets are multiplied, for a fit over rows.
    chosen : dict of (int, int) to float
        The damping for each target and rank, where `dampings` has ``"auto"``.
    """

    history: tuple[int, ...]
    targets: tuple[int, ...]
    ranks: tuple[int, ...] = (1,)
    dampings: tuple[float | str, ...] = (1.0,)
    anchors: tuple[str, ...] = ("base",)
    fit: Fit = field(default_factory=Fit)
    step_scale: float = 1.0
    chosen: dict[tuple[int, int], float] = field(default_factory=dict)

    @cached_property
    def products(self) -> tuple[Product, ...]:  # type: ignore[override]
        """Every combination of target, rank, damping and anchor."""
        names = ("step", "rank", "damping", "anchor")
        found = []
        for each in self._combinations:
            facts: dict[str, Any] = dict(zip(("target_step", *names[1:]), each, strict=True))
            target, rank, damping, _ = each
            if damping == AUTO:
                facts["damping_chosen"] = self.chosen.get((target, rank))
            found.append(Product(tuple(zip(names, each, strict=True)), facts))
        return tuple(found)

    @property
    def _combinations(self) -> list[tuple[int, int, float | str, str]]:
        return list(product(self.targets, self.ranks, self.dampings, self.anchors))

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Method`."""
        return {
            "method": "RELEX (arXiv 2605.21468)",
            "history": list(self.history),
            "fit": self.fit.curve,
            "window": self.fit.window,
            "refit_every": self.fit.refit_every,
        }

    @cached_property
    def forecast(self) -> Forecast:
        """The fit, with the last step behind the targets.

        Raises
        ------
        FitError
            If the history is too short for it.
        """
        last = self.history[-1]
        if not self.fit.as_relex:
            return Forecast(self.history, [*self.targets, last], self.fit)
        rows = len(self.history)
        places = [rows - 1 + (round(target * self.step_scale) - last) for target in self.targets]
        return Forecast(range(rows), [*places, rows - 1], self.fit)

    def weights(self, vectors: Float64) -> Float64:
        """As in `Method`; of a group of lower rank than wanted, all components."""
        predicted = {rank: self.forecast.weights(vectors[:, :rank]) for rank in self.ranks}
        number = {target: i for i, target in enumerate(self.targets)}
        out = np.empty((len(self.history), len(self._combinations)))
        for column, (target, rank, asked, anchor) in enumerate(self._combinations):
            here = predicted[rank]
            damping = self.chosen[target, rank] if isinstance(asked, str) else asked
            if anchor == "base":
                out[:, column] = damping * here[:, number[target]]
                continue
            out[:, column] = damping * (here[:, number[target]] - here[:, -1])
            out[-1, column] += 1.0
        return out


@dataclass(frozen=True)
class Reconstruction(Method):
    """Stored steps projected into the rank-r subspace and back (RELEX, finding 1).

    Attributes
    ----------
    history, ranks
        As in `Extrapolation`.
    steps : tuple of int
        Of the history.
    fit : Fit, optional
        The point of the fitted curve at each step, in place of its own coefficients.
    """

    history: tuple[int, ...]
    steps: tuple[int, ...]
    ranks: tuple[int, ...] = (1,)
    fit: Fit | None = None

    @cached_property
    def products(self) -> tuple[Product, ...]:  # type: ignore[override]
        """Every combination of step and rank."""
        return tuple(
            Product((("step", step), ("rank", rank)), {"step": step, "rank": rank})
            for step, rank in product(self.steps, self.ranks)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Method`."""
        return {
            "method": "projection into the RELEX subspace (arXiv 2605.21468)",
            "history": list(self.history),
            "fitted": self.fit is not None,
            "fit": None if self.fit is None else self.fit.curve,
            "window": None if self.fit is None else self.fit.window,
        }

    @cached_property
    def forecast(self) -> Forecast | None:
        """The fit at the steps.

        Raises
        ------
        FitError
            If the history is too short for it.
        """
        return None if self.fit is None else Forecast(self.history, self.steps, self.fit)

    def weights(self, vectors: Float64) -> Float64:
        """As in `Method`."""
        rows = [self.history.index(step) for step in self.steps]
        by_rank = []
        for rank in self.ranks:
            left = vectors[:, :rank]
            if self.forecast is not None:
                by_rank.append(self.forecast.weights(left))
            else:
                by_rank.append(left @ left[rows].T)
        # Steps first, then ranks.
        return np.stack(by_rank, axis=2).reshape(len(self.history), -1)


@dataclass(frozen=True)
class Combination(Method):
    """Fixed sums of stored steps, the same in every tensor: published recipes, or weights given.

    Attributes
    ----------
    history : tuple of int
    recipes : tuple of Recipe
    """

    history: tuple[int, ...]
    recipes: tuple[Recipe, ...]

    @cached_property
    def products(self) -> tuple[Product, ...]:  # type: ignore[override]
        """One for each recipe."""
        return tuple(
            Product(
                (("recipe", recipe.label),),
                {
                    "recipe": recipe.text,
                    "source": recipe.source,
                    "weights": {"base": recipe.base_weight, **recipe.step_weights},
                },
            )
            for recipe in self.recipes
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Method`."""
        return {"method": "linear combination of checkpoints", "history": list(self.history)}

    def weights(self, vectors: Float64) -> Float64:
        """As in `Method`; needs no vectors."""
        out = np.zeros((len(self.history), len(self.recipes)))
        for column, recipe in enumerate(self.recipes):
            for step, weight in recipe.step_weights.items():
                out[self.history.index(step), column] = weight
        return out

    def copies(self, name: str) -> dict[int, int]:
        """As in `Method`: normalisation layers, where the recipe says so."""
        return {
            number: recipe.norms_from
            for number, recipe in enumerate(self.recipes)
            if recipe.norms_from is not None and recipe.copies(name)
        }
