"""What is asked of models to be made, checked against the store before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from relex_stream.errors import FitError, OptionError
from relex_stream.fit import Fit
from relex_stream.grouping import GROUPINGS, Selection
from relex_stream.methods import (
    ANCHORS,
    AUTO,
    Combination,
    Extrapolation,
    Method,
    Product,
    Reconstruction,
)
from relex_stream.recipes import parse_recipe, parse_weights
from relex_stream.store import Store
from relex_stream.store.read import describe_steps
from relex_stream.subspaces import SVD_ROUTES, SubspaceOptions


@dataclass(frozen=True)
class Job:
    """Models to be made: how their weights come about, and from which statistics.

    Attributes
    ----------
    method : Method
    subspaces : SubspaceOptions, optional
        None: the weights need none.
    selection : Selection
        Tensors that are not of it are copied.
    levels : tuple of (str, value)
        What tells its products from those of other jobs, as in `methods.Product`.
    """

    method: Method
    subspaces: SubspaceOptions | None = None
    selection: Selection = field(default_factory=Selection)
    levels: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """What it makes."""
        return tuple(
            replace(each, levels=(*self.levels, *each.levels)) for each in self.method.products
        )

    @property
    def rows(self) -> int:
        """Rows of the store that are used, from the first."""
        return len(self.method.history)

    @property
    def group_by(self) -> str:
        """What has weights of its own."""
        return "tensor" if self.subspaces is None else self.subspaces.group_by

    @property
    def half_deltas(self) -> bool:
        """As in `SubspaceOptions`."""
        return self.subspaces is not None and self.subspaces.half_deltas

    @property
    def settings(self) -> dict[str, Any]:
        """All that the products have in common, by name, for records."""
        settings = dict(self.method.settings)
        if self.subspaces is not None:
            settings |= {
                "svd": self.subspaces.svd,
                "power_iterations": self.subspaces.power_iterations,
                "group_by": self.subspaces.group_by,
            }
            if self.subspaces.half_deltas:
                settings["compat"] = "relex"
        if self.selection.include or self.selection.exclude:
            settings |= {
                "include": list(self.selection.include),
                "exclude": list(self.selection.exclude),
                "excluded_from": self.selection.excluded_from,
            }
        return settings


@dataclass(frozen=True)
class Batch:
    """Jobs with the same statistics, whose models are written in the same passes.

    Attributes
    ----------
    jobs : tuple of Job
        At least one.
    """

    jobs: tuple[Job, ...]

    @property
    def rows(self) -> int:
        """As in `Job`: the same for all."""
        return self.jobs[0].rows

    @cached_property
    def subspaces(self) -> SubspaceOptions | None:
        """As in `Job`, with the highest rank."""
        first = self.jobs[0].subspaces
        if first is None:
            return None
        ranks = [job.subspaces.rank for job in self.jobs if job.subspaces is not None]
        return replace(first, rank=max(ranks))

    @property
    def selection(self) -> Selection:
        """As in `Job`: the same for all."""
        return self.jobs[0].selection

    @property
    def group_by(self) -> str:
        """As in `Job`: the same for all."""
        return self.jobs[0].group_by

    @property
    def half_deltas(self) -> bool:
        """As in `Job`: the same for all."""
        return self.jobs[0].half_deltas

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """What its jobs make, one job after the other."""
        return tuple(product for job in self.jobs for product in job.products)


def batches_of(jobs: Sequence[Job]) -> list[Batch]:
    """Put jobs with the same statistics together; all else stays in its order."""
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        options = None if job.subspaces is None else replace(job.subspaces, rank=1)
        found.setdefault((job.rows, options, job.selection), []).append(job)
    return [Batch(tuple(each)) for each in found.values()]


def check_extrapolation(
    store: Store,
    *,
    target_steps: Sequence[int],
    history_steps: int | None = None,
    rank: int | Sequence[int] = 1,
    svd: str = "randomized",
    power_iterations: int = 1,
    fit: str = "linear",
    window: int | None = None,
    refit_every: int | None = None,
    damping: float | str | Sequence[float | str] = 1.0,
    anchor: str | Sequence[str] = "base",
    group_by: str = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
    compat: str | None = None,
    step_scale: float = 1.0,
) -> Job:
    """Check what is asked of an extrapolation; `api.extrapolate` says what it is.

    Raises
    ------
    OptionError, FitError
        Naming the option and what it may be.
    """
    targets = _distinct("--target-step", target_steps)
    if min(targets) < 1:
        raise OptionError(f"--target-step must be at least 1, not {min(targets)}")
    dampings = tuple(_damping(each) for each in _distinct("--damping", _sequence(damping)))
    anchors = _distinct("--anchor", _sequence(anchor))
    for name in anchors:
        if name not in ANCHORS:
            raise OptionError(f"--anchor must be one of {', '.join(ANCHORS)}, not {name!r}")
    if AUTO in dampings and anchors != ("latest",):
        raise OptionError(
            "--damping auto chooses for the change since the last checkpoint; it goes with "
            "--anchor latest alone"
        )
    as_relex = compat is not None
    if as_relex:
        _check_compat(
            compat,
            fit=fit,
            anchors=anchors,
            group_by=group_by,
            refit_every=refit_every,
            step_scale=step_scale,
        )
    elif step_scale != 1:
        raise OptionError(
            "--step-scale is for --compat relex, which fits over rows; here fits run over the "
            "steps themselves"
        )
    history = history_of(store, history_steps)
    ranks = _ranks(rank, history)
    selection = _selection(store, include, exclude, excluded_from)
    method = Extrapolation(
        history=history,
        targets=targets,
        ranks=ranks,
        dampings=dampings,
        anchors=anchors,
        fit=Fit(fit, window, refit_every, as_relex),
        step_scale=step_scale,
    )
    method.forecast  # noqa: B018 - refuses a history too short for the fit
    subspaces = _subspaces(history, ranks, svd, power_iterations, group_by, selection)
    return Job(method, replace(subspaces, half_deltas=as_relex), selection)


def check_reconstruction(
    store: Store,
    *,
    steps: Sequence[int],
    history_steps: int | None = None,
    rank: int | Sequence[int] = 1,
    svd: str = "randomized",
    power_iterations: int = 1,
    fitted: bool = False,
    fit: str = "linear",
    window: int | None = None,
    group_by: str = "tensor",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
) -> Job:
    """Check what is asked of a reconstruction; `api.reconstruct` says what it is.

    Raises
    ------
    OptionError, FitError
        Naming the option and what it may be.
    """
    wanted = _distinct("--step", steps)
    history = history_of(store, history_steps)
    for step in wanted:
        if step not in history:
            raise OptionError(
                f"--step {step} is not in the history, which has {describe_steps(history)}"
            )
    ranks = _ranks(rank, history)
    selection = _selection(store, include, exclude, excluded_from)
    method = Reconstruction(history, wanted, ranks, Fit(fit, window) if fitted else None)
    method.forecast  # noqa: B018 - refuses a history too short for the fit
    subspaces = _subspaces(history, ranks, svd, power_iterations, group_by, selection)
    return Job(method, subspaces, selection)


def check_combination(
    store: Store,
    *,
    recipes: Sequence[str] = (),
    weights: Sequence[str] = (),
    history_steps: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    excluded_from: str = "base",
) -> Job:
    """Check what is asked of a combination; `api.combine` says what it is.

    Raises
    ------
    OptionError
        Naming the option and what it may be.
    """
    history = history_of(store, history_steps)
    parsed = [parse_recipe(text, history) for text in recipes]
    parsed += [parse_weights(text, history) for text in weights]
    if not parsed:
        raise OptionError("name at least one --recipe, or --weights")
    selection = _selection(store, include, exclude, excluded_from)
    return Job(Combination(history, tuple(parsed)), None, selection)


def _check_compat(
    compat: str | None,
    *,
    fit: str,
    anchors: Sequence[str],
    group_by: str,
    refit_every: int | None,
    step_scale: float,
) -> None:
    if compat != "relex":
        raise OptionError(f"--compat must be relex, not {compat!r}")
    if not (math.isfinite(step_scale) and step_scale > 0):
        raise OptionError(f"--step-scale must be a number above 0, not {step_scale}")
    for clash, found in (
        ("--fit linear-origin", fit == "linear-origin"),
        ("--anchor latest", "latest" in anchors),
        (f"--group-by {group_by}", group_by != "tensor"),
        ("--refit-every with a --step-scale", refit_every is not None and step_scale != 1),
    ):
        if found:
            raise OptionError(f"--compat relex does what its authors' scripts do: no {clash}")


def _damping(value: float | str) -> float | str:
    if value == AUTO:
        return AUTO
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"--damping must be a number or auto, not {value}")
    return number


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _distinct(option: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if not values:
        raise OptionError(f"name at least one {option}")
    if len(set(values)) != len(values):
        raise OptionError(f"a {option} is given twice")
    return tuple(values)


def history_of(store: Store, history_steps: int | None) -> tuple[int, ...]:
    """Return the stored steps up to one, or all.

    Raises
    ------
    FitError
        If there are none.
    """
    limit = history_steps if history_steps is not None else max(store.steps, default=0)
    history = tuple(step for step in store.steps if step <= limit)
    if not history:
        raise FitError(
            f"no checkpoint of {store.path} is at step {limit} or before; "
            f"it holds {describe_steps(store.steps)}"
        )
    return history


def _ranks(rank: int | Sequence[int], history: Sequence[int]) -> tuple[int, ...]:
    ranks = _distinct("--rank", _sequence(rank))
    for each in ranks:
        if not 1 <= each <= len(history):
            raise OptionError(
                f"--rank must be from 1 to the number of checkpoints in the history "
                f"({len(history)}), not {each}"
            )
    return ranks


def _selection(
    store: Store, include: Sequence[str], exclude: Sequence[str], excluded_from: str
) -> Selection:
    selection = Selection(tuple(include), tuple(exclude), excluded_from)
    tensors = store.manifest.tensors
    selection.check(
        (tensor.name for tensor in tensors if tensor.tied_to is None),
        [(tensor.name, tensor.tied_to) for tensor in tensors if tensor.tied_to is not None],
    )
    return selection


def _subspaces(
    history: Sequence[int],
    ranks: Sequence[int],
    svd: str,
    power_iterations: int,
    group_by: str,
    selection: Selection,
) -> SubspaceOptions:
    if svd not in SVD_ROUTES:
        raise OptionError(f"--svd must be one of {', '.join(SVD_ROUTES)}, not {svd!r}")
    if power_iterations < 1:
        raise OptionError(f"--power-iterations must be at least 1, not {power_iterations}")
    if group_by not in GROUPINGS:
        raise OptionError(f"--group-by must be one of {', '.join(GROUPINGS)}, not {group_by!r}")
    return SubspaceOptions(len(history), max(ranks), svd, power_iterations, group_by, selection)
