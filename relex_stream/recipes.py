"""Published recipes that combine checkpoints linearly, as the weight of each checkpoint.

A recipe is written ``name:key=value,key=value``; `RECIPES` has them. All are affine: the weights of
the base and of the steps sum to 1, so the base's is what the others leave.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relex_stream.errors import OptionError

_NORM_NAMES = ("norm", "ln_")
"""What RLVR-Linearity's script looks for in the names of tensors that it does not extrapolate."""


@dataclass(frozen=True)
class Recipe:
    """A combination of checkpoints.

    Attributes
    ----------
    text : str
        As it was asked for.
    source : str
        Where it was published.
    step_weights : dict of int to float
        By step; steps that have none are not in it.
    norms_from : int, optional
        Step from which tensors of normalisation layers are copied; None: they are as all others.
    """

    text: str
    source: str
    step_weights: dict[int, float]
    norms_from: int | None = None

    @property
    def base_weight(self) -> float:
        """What the steps leave to the base; 0 but for rounding is 0."""
        rest = math.fsum([1.0, *(-weight for weight in self.step_weights.values())])
        return rest if abs(rest) > 1e-15 else 0.0

    @property
    def label(self) -> str:
        """The text as part of a directory's name.

        Examples
        --------
        >>> Recipe("expo:alpha=0.3", "", {}).label
        'expo-alpha-0.3'
        """
        return re.sub(r"[^A-Za-z0-9.+-]+", "-", self.text)

    def copies(self, tensor: str) -> bool:
        """Say whether a tensor is copied from step `norms_from`."""
        lower = tensor.lower()
        return self.norms_from is not None and any(name in lower for name in _NORM_NAMES)


class _Arguments:
    """The ``key=value`` of a recipe, taken one by one."""

    def __init__(self, text: str, steps: Sequence[int]) -> None:
        self.text = text
        self.steps = steps
        self.name, _, rest = text.partition(":")
        self._left: dict[str, str] = {}
        for part in rest.split(",") if rest else ():
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key in self._left:
                raise OptionError(
                    f"recipe {text!r}: {part!r} is not key=value, or is there twice; "
                    f"write {_RECIPES_HELP.get(self.name, 'name:key=value,key=value')}"
                )
            self._left[key] = value

    def number(self, key: str, *, low: float = -math.inf, high: float = math.inf) -> float:
        """Take a number that must be there, within bounds."""
        text = self._take(key)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            within = "" if math.isinf(low) else f" from {low:g} to {high:g}"
            raise OptionError(f"recipe {self.text!r}: {key} must be a number{within}, not {text!r}")
        return value

    def step(self, key: str, default: int | None = None, *, base: bool = False) -> int:
        """Take a stored step, or 0 where the base will do."""
        if key not in self._left and default is not None:
            return default
        text = self._take(key)
        step = int(text) if text.isascii() and text.isdigit() else -1
        if step not in self.steps and not (base and step == 0):
            raise OptionError(
                f"recipe {self.text!r}: {key} must be a step that the store holds"
                f"{' or 0 for the base' if base else ''}, not {text!r}"
            )
        return step

    def flag(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Take one of some words."""
        word = self._left.pop(key, default)
        if word not in choices:
            raise OptionError(
                f"recipe {self.text!r}: {key} must be {' or '.join(choices)}, not {word!r}"
            )
        return word

    def finish(self) -> None:
        """Refuse what was not taken."""
        if self._left:
            raise OptionError(
                f"recipe {self.text!r} knows no {next(iter(self._left))!r}; "
                f"write {_RECIPES_HELP[self.name]}"
            )

    def _take(self, key: str) -> str:
        if key not in self._left:
            raise OptionError(f"recipe {self.text!r} lacks {key}; write {_RECIPES_HELP[self.name]}")
        return self._left.pop(key)


def _two_point(arguments: _Arguments) -> Recipe:
    """Return the line through two checkpoints; 2601.04537, section on weight extrapolation."""
    start = arguments.step("from", 0, base=True)
    end = arguments.step("to", arguments.steps[-1])
    target = arguments.number("target", low=0)
    if end <= start:
        raise OptionError(f"recipe {arguments.text!r}: 'to' must be a later step than 'from'")
    factor = (target - start) / (end - start)
    norms = arguments.flag("norms", "copy", ("copy", "extrapolate"))
    weights = {end: factor} if start == 0 else {start: 1 - factor, end: factor}
    return Recipe(
        arguments.text,
        "RLVR-Linearity (arXiv 2601.04537)",
        weights,
        norms_from=end if norms == "copy" else None,
    )


def _expo(arguments: _Arguments) -> Recipe:
    """Return ``theta_t + alpha (theta_t - theta_0)``; 2404.16792, equation 1."""
    step = arguments.step("step", arguments.steps[-1])
    return Recipe(arguments.text, "ExPO (arXiv 2404.16792)", {step: 1 + arguments.number("alpha")})


def _first_update(arguments: _Arguments) -> Recipe:
    scale = arguments.number("scale")
    return Recipe(arguments.text, "first update, scaled", {arguments.steps[0]: scale})


def _ema(arguments: _Arguments) -> Recipe:
    """Return the moving average that begins at the base and takes each step up to `to`."""
    decay = arguments.number("decay", low=0, high=1)
    last = arguments.step("to", arguments.steps[-1])
    steps = [step for step in arguments.steps if step <= last]
    return Recipe(
        arguments.text,
        "exponential moving average",
        {step: (1 - decay) * decay**age for age, step in enumerate(reversed(steps))},
    )


def _lawa(arguments: _Arguments) -> Recipe:
    """Return the mean of the last checkpoints; 2306.03241, section 3."""
    end = arguments.step("to", arguments.steps[-1])
    steps = [step for step in arguments.steps if step <= end]
    count = arguments.number("last", low=1, high=len(steps))
    if count != int(count):
        raise OptionError(f"recipe {arguments.text!r}: last must be a whole number")
    return Recipe(
        arguments.text, "LAWA (arXiv 2306.03241)", dict.fromkeys(steps[-int(count) :], 1 / count)
    )


RECIPES: dict[str, Callable[[_Arguments], Recipe]] = {
    "two-point": _two_point,
    "expo": _expo,
    "first-update": _first_update,
    "ema": _ema,
    "lawa": _lawa,
}

_RECIPES_HELP = {
    "two-point": "two-point:target=N[,from=A][,to=B][,norms=copy|extrapolate]",
    "expo": "expo:alpha=X[,step=N]",
    "first-update": "first-update:scale=X",
    "ema": "ema:decay=X[,to=N]",
    "lawa": "lawa:last=K[,to=N]",
}


def parse_recipe(text: str, steps: Sequence[int]) -> Recipe:
    """Return the recipe that `text` asks for.

    Parameters
    ----------
    text : str
    steps : sequence of int
        That the store holds, ascending.

    Raises
    ------
    OptionError
        Naming what is wrong and how it is written.

    Examples
    --------
    >>> recipe = parse_recipe("two-point:target=40", [5, 10])
    >>> recipe.step_weights, recipe.base_weight
    ({10: 4.0}, -3.0)
    """
    arguments = _Arguments(text, steps)
    if arguments.name not in RECIPES:
        raise OptionError(
            f"there is no recipe {arguments.name!r}; those there are: "
            f"{', '.join(_RECIPES_HELP.values())}"
        )
    if not steps:
        raise OptionError(f"recipe {text!r}: the store holds no steps")
    recipe = RECIPES[arguments.name](arguments)
    arguments.finish()
    return recipe


def parse_weights(text: str, steps: Sequence[int]) -> Recipe:
    """Return the combination that ``STEP=WEIGHT,STEP=WEIGHT`` asks for; the base has the rest.

    Raises
    ------
    OptionError
        If it is not of that form, names a step twice or one that is not stored, or gives the base
        (step 0) another weight than the rest.

    Examples
    --------
    >>> recipe = parse_weights("5=0.5,10=0.75", [5, 10])
    >>> recipe.step_weights, recipe.base_weight
    ({5: 0.5, 10: 0.75}, -0.25)
    """
    weights: dict[int, float] = {}
    for part in text.split(","):
        step, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (step.isascii() and step.isdigit()) or not math.isfinite(value):
            raise OptionError(f"--weights {text!r}: {part!r} is not STEP=WEIGHT, like 100=0.5")
        if int(step) in weights:
            raise OptionError(f"--weights {text!r}: step {step} is there twice")
        if int(step) not in (0, *steps):
            raise OptionError(f"--weights {text!r}: the store holds no step {step}")
        weights[int(step)] = value
    base = weights.pop(0, None)
    recipe = Recipe(f"weights:{text}", "weights given", weights)
    if base is not None and abs(base - recipe.base_weight) > 1e-9:
        raise OptionError(
            f"--weights {text!r}: the weights must sum to 1, so the base (step 0) has "
            f"{recipe.base_weight:g}, not {base:g}"
        )
    return recipe
