"""The grid of a sweep: settings with several values each, and the jobs that they come to."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from relex_stream.errors import OptionError, RelexStreamError
from relex_stream.request import (
    Job,
    check_combination,
    check_extrapolation,
    check_reconstruction,
)
from relex_stream.store import Store

Entry = Mapping[str, Any]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, float) or _integer(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _damping(value: Any) -> bool:
    return _number(value) or value == "auto"


@dataclass(frozen=True)
class Setting:
    """A key of an entry.

    Attributes
    ----------
    takes : callable
        Says whether a value is of its type.
    of : str
        What that is, for people.
    argument : str
        The argument of the check, if it has another name.
    together : bool
        All values go to one job; else each is of a job of its own.
    absent : str
        What None is called, where it may be one of several values.
    """

    takes: Callable[[Any], bool]
    of: str
    argument: str = ""
    together: bool = False
    absent: str = ""


_COMMON = {
    "history_steps": Setting(_integer, "a step", absent="all"),
    "include": Setting(_text, "a pattern", together=True),
    "exclude": Setting(_text, "a pattern", together=True),
    "excluded_from": Setting(_text, "base or latest"),
}
_SUBSPACE = {
    "group_by": Setting(_text, "a word"),
    "svd": Setting(_text, "a word"),
    "power_iterations": Setting(_integer, "a whole number"),
    "fit": Setting(_text, "a fit"),
    "window": Setting(_integer, "a whole number", absent="all"),
    "rank": Setting(_integer, "a whole number", together=True),
}
_METHODS: dict[str, tuple[Callable[..., Job], dict[str, Setting]]] = {
    "extrapolate": (
        check_extrapolation,
        {
            "target_step": Setting(_integer, "a step", "target_steps", together=True),
            **_COMMON,
            **_SUBSPACE,
            "refit_every": Setting(_integer, "a whole number", absent="never"),
            "damping": Setting(_damping, "a number or auto", together=True),
            "anchor": Setting(_text, "base or latest", together=True),
            "compat": Setting(_text, "relex", absent="none"),
            "step_scale": Setting(_number, "a number"),
        },
    ),
    "reconstruct": (
        check_reconstruction,
        {
            "step": Setting(_integer, "a step", "steps", together=True),
            **_COMMON,
            **_SUBSPACE,
            "fitted": Setting(_truth, "true or false"),
        },
    ),
    "combine": (
        check_combination,
        {
            "recipe": Setting(_text, "a recipe", "recipes", together=True),
            "weights": Setting(_text, "a list like 100=0.5,200=0.5", together=True),
            **_COMMON,
        },
    ),
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_grid(path: Path) -> list[Entry]:
    """Read the entries of a grid from a YAML file: a list of them, or one.

    Raises
    ------
    OptionError
        If it cannot be read, or has another form.
    """
    try:
        with path.open(encoding="utf-8") as file:
            found = yaml.load(file, _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise OptionError(f"--grid {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--grid {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or "cannot be parsed"
        raise OptionError(f"--grid {path}{line} is not YAML: {what}") from error
    entries = [found] if isinstance(found, dict) else found
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise OptionError(f"--grid {path} has to be a list of entries, each with its settings")
    return entries


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses what YAML takes silently: a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - as in yaml
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is there twice", problem_mark=node.value[number][0].start_mark
                )
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def jobs_of(store: Store, entries: Sequence[Entry]) -> list[Job]:
    """Return a job for each combination of an entry's settings, entry by entry.

    Parameters
    ----------
    store : Store
    entries : sequence of mapping
        Keys are those of `extrapolate`, `reconstruct` or `combine`, which ``method`` says
        (``"extrapolate"`` unless it is there), in the singular, with _ or -; each has a value or a
        list of values. ``name`` tells entries apart that differ by nothing else.

    Raises
    ------
    OptionError, FitError
        Naming the entry and what is wrong with it.
    """
    if not entries:
        raise OptionError("the grid has no entry; name at least one")
    jobs: list[Job] = []
    for number, entry in enumerate(entries, start=1):
        try:
            jobs += _jobs_of_entry(store, entry)
        except RelexStreamError as error:
            if len(entries) == 1:
                raise
            raise type(error)(f"entry {number} of the grid: {error}") from error
    return jobs


def _jobs_of_entry(store: Store, entry: Entry) -> list[Job]:
    given = {str(key).replace("-", "_"): value for key, value in entry.items()}
    method = given.pop("method", "extrapolate")
    if method not in _METHODS:
        raise OptionError(f"method must be one of {', '.join(_METHODS)}, not {method!r}")
    name = given.pop("name", None)
    if name is not None and not (_text(name) and _NAME.fullmatch(name)):
        raise OptionError(f"name must be letters, digits, '.', '_' and '-', not {name!r}")
    check, settings = _METHODS[method]
    values: dict[str, list[Any]] = {}
    for key, value in given.items():
        if key not in settings:
            raise OptionError(
                f"{method} has no setting {key!r}; it has {', '.join(sorted(settings))}, and every "
                "entry may have method and name"
            )
        values[key] = _values(key, settings[key], value)
    # Outermost first, in the order of the table and not of the entry.
    swept = [key for key, setting in settings.items() if not setting.together and key in values]
    together = {
        settings[key].argument or key: values[key] for key in values if settings[key].together
    }
    if method in ("extrapolate", "reconstruct"):
        together.setdefault("target_steps" if method == "extrapolate" else "steps", [])
    jobs = []
    for chosen in product(*(values[key] for key in swept)):
        here = dict(zip(swept, chosen, strict=True))
        job = check(store, **together, **here)
        own = [(key, _level(key, settings[key], here, job)) for key in settings if key in _LEVELS]
        levels = (("method", method), ("name", name or "unnamed"), *own)
        jobs.append(replace(job, levels=levels))
    return jobs


_LEVELS = (
    *("history_steps", "excluded_from", "group_by", "svd", "power_iterations"),
    *("fit", "window", "refit_every", "compat", "step_scale", "fitted"),
)
"""Settings that name directories, where they differ."""

_DEFAULTS = {
    "excluded_from": "base",
    "group_by": "tensor",
    "svd": "randomized",
    "power_iterations": 1,
    "fit": "linear",
    "step_scale": 1.0,
    "fitted": False,
}


def _level(key: str, setting: Setting, here: Mapping[str, Any], job: Job) -> Any:
    if key == "history_steps":
        return job.method.history[-1]
    value = here.get(key, _DEFAULTS.get(key))
    if value is None:
        return setting.absent
    # polynomial:2 would not be a name everywhere.
    return value.replace(":", "-") if isinstance(value, str) else value


def _values(key: str, setting: Setting, value: Any) -> list[Any]:
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several:
        raise OptionError(f"{key} has no value")
    for position, each in enumerate(several):
        if each in several[:position] and not setting.together:
            raise OptionError(f"{key} has {each!r} twice")
        absent = each is None or (bool(setting.absent) and each == setting.absent)
        if absent and setting.absent:
            several[position] = None
        elif not setting.takes(each):
            also = f", or {setting.absent}" if setting.absent else ""
            raise OptionError(f"{key} must be {setting.of}{also}, not {each!r}")
    return several
