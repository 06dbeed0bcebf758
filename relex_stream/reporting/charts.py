"""The charts of a report: one function per figure, from its numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from relex_stream.reporting.coefficients import BAND
from relex_stream.reporting.modules import short_name
from relex_stream.reporting.numbers import Cell, Coefficients, ReportNumbers
from relex_stream.summaries import ForecastSkill
from relex_stream.wording import byte_unit, format_bytes, printable

Float64 = NDArray[np.float64]

BLUE = "#2a6f8f"
RED = "#b04a3a"
OCHRE = "#c58b2a"
GREY = "#7a7a7a"
GREEN = "#5b8c5a"
PALE = "#eef3f5"

WIDTH = 9.6
"""Of a figure, in inches."""

MOST_MODULES = 40
MOST_OUTSIDE = 12
"""Rows of a heat map; those that moved least are left out of the picture, not of the tables."""

_FEW_LAYERS = 8
"""Cells of so many layers have their numbers written in them."""

LEAST_SKILL = -1.0
"""Skill below is drawn at the edge: how far below does not matter any more."""

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    # Names come from checkpoints: a dollar sign in one is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Return a context in which figures are made and written, whatever the user's settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        parameters: Any = mpl.rcParams  # newer versions list what keys there are
        parameters.update(_STYLE)
        yield


def _grid(axes: Axes) -> None:
    axes.grid(visible=True, which="major")


def _short(name: str, most: int = 44) -> str:
    """Return a name as it can be drawn; the middle of a long one is left out."""
    text = printable(name)
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _plain_numbers(axes: Axes) -> None:
    """Write numbers in full: a factor above the axis would be overlooked, or meet the title."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def _plain_log(axes: Axes) -> None:
    """Write 0.1, 1, 10 instead of powers; 2 and 5 too where there is room."""
    axes.set_yscale("log")
    least, most = axes.yaxis.get_view_interval()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


# --- coefficients --------------------------------------------------------------------------------


def draw_coefficients(numbers: ReportNumbers) -> Figure:
    """Draw the coefficients of the model and of the tensors that moved most."""
    first, *others = numbers.coefficients
    columns = max(1, len(others))
    figure = Figure(figsize=(WIDTH, 6.6 if others else 4.2), layout="constrained")
    places = figure.add_gridspec(
        2 if others else 1, columns, height_ratios=[1.7, 1][: 1 + (1 if others else 0)]
    )
    main = figure.add_subplot(places[0, :])
    _draw_coefficients(main, first)
    main.set_title("Model, first component")
    main.set_ylabel("coefficient, weight units")
    main.legend(loc="best")
    for column, each in enumerate(others):
        axes = figure.add_subplot(places[1, column])
        _draw_coefficients(axes, each, small=True)
        ordinal = {1: "first", 2: "second"}.get(each.component, f"{each.component}.")
        title = "Model" if each.name == "model" else _short(short_name(each.name), 32)
        axes.set_title(f"{title}\n{ordinal} component", fontsize=8)
    return figure


def _draw_coefficients(axes: Axes, found: Coefficients, *, small: bool = False) -> None:
    steps, values = np.array(found.steps), np.array(found.values)
    size = (2.4 if small else 4.5) if len(steps) > 40 else (3.5 if small else 5.0)
    seen = found.history
    if found.places:
        places, fitted = np.array(found.places), np.array(found.fitted)
        widths = np.array(found.half_widths)
        last = steps[seen - 1]
        known = np.isfinite(widths) & (places >= last)
        if known.any():
            axes.fill_between(
                places[known],
                (fitted - widths)[known],
                (fitted + widths)[known],
                color=OCHRE,
                alpha=0.25,
                linewidth=0,
                label=f"{BAND:g} x the errors of past forecasts",
            )
        inside, ahead = places <= last, places >= last
        axes.plot(places[inside], fitted[inside], color=RED, linewidth=1.4, label="fit")
        axes.plot(places[ahead], fitted[ahead], "--", color=RED, linewidth=1.4, label="forecast")
        targets = [point for point in found.forecasts if point.step > last]
        axes.plot(
            [point.step for point in targets],
            [point.value for point in targets],
            "D",
            color=RED,
            markersize=size,
            label="target steps",
        )
        _room(axes, values, fitted, widths)
    axes.plot(steps[:seen], values[:seen], "o", color=BLUE, markersize=size, label="history")
    if seen < len(steps):
        axes.plot(
            steps[seen:],
            values[seen:],
            "o",
            markerfacecolor="none",
            markeredgecolor=BLUE,
            markeredgewidth=0.8,
            markersize=size,
            label="stored later, not used",
        )
    axes.axhline(0, color="black", linewidth=0.6)
    _grid(axes)
    _plain_numbers(axes)
    _step_axis(axes)
    if small:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
        axes.tick_params(labelsize=7.5)
    axes.margins(x=0.02)


def _room(axes: Axes, values: Float64, fitted: Float64, widths: Float64) -> None:
    """Limit the axis to a few times what is observed and forecast: a wide band may leave it."""
    inner = np.concatenate([values, fitted, [0.0]])
    low, high = float(inner.min()), float(inner.max())
    span = (high - low) or 1.0
    band = np.where(np.isfinite(widths), widths, 0.0)
    bottom = max(float((fitted - band).min()), low - span)
    top = min(float((fitted + band).max()), high + span)
    axes.set_ylim(min(bottom, low) - 0.05 * span, max(top, high) + 0.05 * span)


# --- heat maps -----------------------------------------------------------------------------------


def shown_modules(numbers: ReportNumbers) -> tuple[list[str], list[str]]:
    """Return the modules and the tensors outside of layers that heat maps have rows for."""
    grid = numbers.grid
    moved = dict.fromkeys(grid.modules, 0.0)
    for (module, _), cell in grid.cells.items():
        moved[module] += cell.movement
    outside = {name: cell.movement for name, cell in grid.outside.items()}
    # Where there are no layers, there is all the room.
    most_outside = MOST_OUTSIDE if grid.modules else MOST_MODULES
    return _most(moved, MOST_MODULES), _most(outside, most_outside)


def _most(moved: dict[str, float], most: int) -> list[str]:
    kept = set(sorted(moved, key=lambda name: -moved[name])[:most])
    return [name for name in moved if name in kept]


def draw_explained_variance(numbers: ReportNumbers) -> Figure:
    """Draw the explained variance of the first component by module and layer."""
    return _draw_heat_map(
        numbers, lambda cell: cell.explained_variance, "viridis", "explained variance"
    )


def draw_r2(numbers: ReportNumbers) -> Figure:
    """Draw the R2 of the first component's fit by module and layer."""
    return _draw_heat_map(numbers, lambda cell: cell.r2, "cividis", "R2 of the fit")


def _draw_heat_map(
    numbers: ReportNumbers, figure_of: Callable[[Cell], float], colors: str, label: str
) -> Figure:
    grid = numbers.grid
    modules, outside = shown_modules(numbers)
    inner = np.full((len(modules), len(grid.layers)), np.nan)
    for row, module in enumerate(modules):
        for column, layer in enumerate(grid.layers):
            if (module, layer) in grid.cells:
                inner[row, column] = figure_of(grid.cells[module, layer])
    alone = np.array([[figure_of(grid.outside[name])] for name in outside]).reshape(-1, 1)
    norm = _scale(np.concatenate([inner.ravel(), alone.ravel()]))
    colormap = mpl.colormaps[colors].resampled(48)  # more, and the scale beside it would be pixels
    parts = [part for part in ("inner", "outside") if (modules if part == "inner" else outside)]
    heights = {"inner": max(len(modules), 1), "outside": max(len(outside), 1)}
    figure = Figure(
        figsize=(WIDTH, 1.5 + 0.24 * sum(heights[part] for part in parts) + 0.4 * len(parts)),
        layout="constrained",
    )
    ratios = [heights[part] + 0.4 for part in parts]
    places = figure.add_gridspec(len(parts), 1, height_ratios=ratios)
    every: list[Axes] = []
    for row, part in enumerate(parts):
        axes = figure.add_subplot(places[row, 0])
        every.append(axes)
        if part == "inner":
            _draw_cells(
                axes, inner, modules, colormap, norm, numbers=len(grid.layers) <= _FEW_LAYERS
            )
            _layer_ticks(axes, grid.layers)
            stack = f" of {_short(grid.stack)}" if grid.stack else ""
            axes.set_xlabel(f"layer{stack}")
        else:
            _draw_cells(axes, alone, outside, colormap, norm, numbers=True)
            axes.set_xticks([])
            if modules:
                axes.set_title("outside of the layers", fontsize=9)
    mappable = mpl.cm.ScalarMappable(norm=norm, cmap=colormap)
    values = np.concatenate([inner.ravel(), alone.ravel()])
    below = (
        bool((values[np.isfinite(values)] < norm.vmin).any()) if norm.vmin is not None else False
    )
    scale = figure.colorbar(
        mappable,
        ax=every,
        label=label,
        fraction=0.04,
        pad=0.015,
        aspect=30,
        extend="min" if below else "neither",
    )
    if scale.solids is not None:
        # Else browsers show what is behind between one colour and the next.
        scale.solids.set_edgecolor("face")
    return figure


def _scale(values: Float64) -> Normalize:
    """Return colours from a little below the least value, but not for outliers, to 1."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Normalize(0.0, 1.0)
    low, high = max(0.0, float(np.quantile(finite, 0.02))), float(finite.max())
    # So that differences show where all is near 1, with ends that are read easily.
    part = 20 if high - low > 0.05 else 100
    low = min(np.floor(part * low) / part, 0.98)
    return Normalize(low, max(min(1.0, np.ceil(part * high) / part), low + 0.02))


def _draw_cells(
    axes: Axes,
    values: Float64,
    names: Sequence[str],
    colormap: Colormap,
    norm: Normalize,
    *,
    numbers: bool,
) -> None:
    axes.patch.set(facecolor="#f0f0f0", hatch="////", edgecolor="#c4c4c4")
    axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=colormap, norm=norm, edgecolors="white", linewidth=0.6
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, [_short(name, 40) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if not numbers:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = sum(colormap(norm(value))[:3]) > 1.5
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.3f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="black" if light else "white",
            )


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    every = next(each for each in (1, 2, 5, 10, 20, 50, 10_000) if len(layers) <= 40 * each)
    shown = [place for place, layer in enumerate(layers) if layer % every == 0]
    axes.set_xticks([place + 0.5 for place in shown], [str(layers[place]) for place in shown])


# --- singular values -----------------------------------------------------------------------------


def draw_singular_values(numbers: ReportNumbers) -> Figure:
    """Draw how singular values fall, and what components explain together."""
    model, tensors = numbers.analysis.model, numbers.analysis.tensors
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    decay, explained = figure.subplots(1, 2)
    values = np.array(model.singular_values)
    places = np.arange(1, len(values) + 1)
    of_tensors = np.array([each.singular_values for each in tensors])
    with np.errstate(invalid="ignore"):
        _quantiles(decay, places, of_tensors / of_tensors[:, :1])
    decay.plot(places, values / values[0], "o-", color=BLUE, markersize=4, label="model")
    _plain_log(decay)
    decay.set_ylabel("singular value, as a share of the first")
    shares = np.array([each.explained_variance for each in tensors])
    _quantiles(explained, places, shares)
    errors = model.explained_variance_error
    explained.errorbar(
        places,
        model.explained_variance,
        yerr=None if errors is None else 2 * np.nan_to_num(np.array(errors)),
        fmt="o-",
        color=BLUE,
        markersize=4,
        capsize=2,
        label="model",
    )
    explained.set_ylim(
        min(0.95 * float(np.nanmin([np.nanmin(shares), *model.explained_variance])), 0.9), 1.005
    )
    explained.set_ylabel("explained variance, cumulative")
    for axes in (decay, explained):
        _grid(axes)
        axes.set_xlabel("component")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.legend()
    return figure


def _quantiles(axes: Axes, places: NDArray[np.int64], values: Float64) -> None:
    known = np.isfinite(values).any(axis=0)
    if len(values) < 3 or not known.any():
        return
    low, middle, high = np.nanquantile(values[:, known], (0.1, 0.5, 0.9), axis=0)
    axes.fill_between(
        places[known], low, high, color=GREY, alpha=0.25, linewidth=0, label="tensors, 10 to 90 %"
    )
    axes.plot(places[known], middle, color=GREY, linewidth=1, label="tensors, median")


# --- steps ---------------------------------------------------------------------------------------


def draw_steps(numbers: ReportNumbers) -> Figure:
    """Draw how much changed from step to step, and how far that went."""
    steps = numbers.analysis.steps
    at = np.array([each.step for each in steps])
    odd = np.array([bool(each.note) for each in steps])
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    changed, moved = figure.subplots(2, 1, sharex=True)
    shares = 100 * np.array([each.changed_share for each in steps])
    changed.plot(at, shares, "o-", color=BLUE, markersize=3, linewidth=1)
    changed.set_ylabel("weights changed\nsince the step before, %")
    norms = np.array([each.change_norm for each in steps])
    lengths = np.array([each.delta_norm for each in steps])
    moved.plot(
        at, lengths, "o-", color=GREEN, markersize=3, linewidth=1, label="distance from the base"
    )
    moved.plot(
        at, norms, "o-", color=BLUE, markersize=3, linewidth=1, label="change since the step before"
    )
    moved.set_ylabel("norm, weight units")
    for axes, values, most in ((changed, shares, shares), (moved, norms, lengths)):
        if odd.any():
            axes.plot(at[odd], values[odd], "X", color=RED, markersize=8, label="odd step")
        axes.set_ylim(0, 1.08 * max(float(most.max()), float(values.max())))
        _plain_numbers(axes)
        _grid(axes)
    if odd.any():
        changed.legend(loc="best")
    moved.legend(loc="best")
    _step_axis(moved)
    return figure


# --- skill ---------------------------------------------------------------------------------------

_CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("base", "1", "plain RELEX: base, x 1", {"color": RED, "marker": "o"}),
    ("latest", "1", "latest, x 1", {"color": OCHRE, "marker": "s"}),
    ("latest", "auto", "latest, auto", {"color": BLUE, "marker": "o"}),
    (
        "latest",
        "best",
        "latest, best in hindsight",
        {"color": GREY, "marker": None, "linestyle": ":"},
    ),
)


def skill_of(row: ForecastSkill, which: str) -> tuple[float, float]:
    """Return the skill with damping "1", "auto" or the "best", and its error; NaN for none."""
    found = {"best": row.best, "auto": row.auto}.get(which)
    if which == "1":
        found = next((each for each in row.skills if each.damping == 1), None)
    if found is None:
        return float("nan"), 0.0
    return found.skill, found.error or 0.0


def draw_skill(numbers: ReportNumbers) -> Figure:
    """Draw the skill of forecasts against how far ahead they were, for each history."""
    assert numbers.backtest is not None
    forecasts = numbers.backtest.forecasts
    ends = list(dict.fromkeys(row.history_step for row in forecasts))
    columns = min(2, len(ends))
    lines = -(-len(ends) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.7 * lines), layout="constrained")
    every = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    values = [skill_of(row, which)[0] for row in forecasts for _, which, *_ in _CURVES]
    known = [value for value in values if np.isfinite(value)] or [0.0]
    low = max(LEAST_SKILL, min(known))
    high = max(0.1, *known)
    low, high = min(-0.1, low) - 0.06 * (high - low), high + 0.08 * (high - low)
    furthest = max(row.horizon for row in forecasts)
    places = list(every.flat)
    for end, axes in zip(ends, places, strict=False):
        rows = [row for row in forecasts if row.history_step == end]
        axes.axhspan(0, high, color=GREEN, alpha=0.1, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        for anchor, which, label, look in _CURVES:
            _draw_skill(
                axes, [row for row in rows if row.anchor == anchor], which, label, look, low
            )
        axes.set_title(f"forecasts from step {end}")
        axes.set_ylim(low, high)
        axes.set_xlim(1, furthest + 0.05 * (furthest - 1))
        _grid(axes)
        axes.text(
            0.985,
            high - 0.03 * (high - low),
            "nearer than staying",
            ha="right",
            va="top",
            transform=axes.get_yaxis_transform(),
            fontsize=8,
            color="#3d6b3c",
        )
    for axes in places[len(ends) :]:
        axes.set_visible(False)
    for axes in places[: len(ends)][-columns:]:
        axes.set_xlabel("horizon: target step by last step of the history")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in every[:, 0]:
        axes.set_ylabel("skill")
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _draw_skill(
    axes: Axes,
    rows: Sequence[ForecastSkill],
    which: str,
    label: str,
    look: dict[str, Any],
    low: float,
) -> None:
    horizons = np.array([row.horizon for row in rows])
    found = np.array([skill_of(row, which) for row in rows]).reshape(-1, 2)
    values, errors = found.T
    axes.errorbar(
        horizons,
        values,
        yerr=2 * errors if errors.any() else None,
        label=label,
        markersize=4,
        linewidth=1.3,
        capsize=2,
        **look,
    )
    below = values < low
    if below.any():
        edge = np.full(int(below.sum()), low)
        axes.plot(horizons[below], edge, "v", color=look["color"], markersize=7, clip_on=False)


# --- storage and memory --------------------------------------------------------------------------


def draw_storage(numbers: ReportNumbers) -> Figure:
    """Draw the bytes of checkpoints and of the store, and what each step takes."""
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    total, by_step = figure.subplots(1, 2)
    _draw_totals(total, numbers)
    _draw_step_bytes(by_step, numbers)
    return figure


def _draw_totals(axes: Axes, numbers: ReportNumbers) -> None:
    kept = np.arange(1, len(numbers.info.steps) + 1)
    checkpoints, stored = numbers.checkpoint_bytes, numbers.stored_bytes
    unit, size = byte_unit(stored[-1])
    marker = "o" if len(kept) < 30 else None
    for sizes, color, label, up in (
        (checkpoints, RED, "checkpoints", 7),
        (stored, BLUE, "store", -15),
    ):
        axes.plot(kept, np.array(sizes) / size, color=color, marker=marker, markersize=3)
        axes.annotate(
            f"{label}: {format_bytes(sizes[-1])}",
            (kept[-1], sizes[-1] / size),
            xytext=(0, up),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.set_yscale("log")
    axes.set_ylim(max(1, stored[0]) / size / 3, max(checkpoints[-1], stored[-1]) / size * 4)
    _plain_log(axes)
    _grid(axes)
    axes.set_title("in all")
    axes.set_xlabel("checkpoints kept")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlim(*(_around(kept)))


def _draw_step_bytes(axes: Axes, numbers: ReportNumbers) -> None:
    steps = [each.step for each in numbers.info.steps]
    frames = np.array([each.frame_bytes for each in numbers.info.steps], np.float64)
    records = np.array([each.record_bytes for each in numbers.info.steps], np.float64)
    most = float((frames + records).max())
    unit, size = byte_unit(most)
    width = 0.85 * min(np.diff(steps), default=1)
    axes.bar(steps, frames / size, width, color=BLUE, alpha=0.8, label="changes")
    axes.bar(
        steps,
        records / size,
        width,
        bottom=frames / size,
        color=OCHRE,
        alpha=0.8,
        label="records and sketches",
    )
    axes.set_ylim(0, 1.25 * most / size)
    _grid(axes)
    axes.set_title("by step")
    axes.set_ylabel(unit)
    axes.legend(loc="upper right", ncols=2)
    _step_axis(axes)
    if len(steps) == 1:
        axes.set_xlim(*_around(np.array(steps)))


def _around(places: NDArray[np.int64]) -> tuple[float, float]:
    """Return limits of an axis on which single places do not stand alone in the void."""
    margin = max(1.0, 0.03 * float(places[-1] - places[0]))
    return float(places[0]) - margin, float(places[-1]) + margin


def draw_memory(numbers: ReportNumbers) -> Figure:
    """Draw what a process that extrapolates holds, stage by stage."""
    plan = numbers.memory
    names = [stage.name for stage in plan.stages]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(names))
    workers = "worker" if plan.workers == 1 else "workers"
    for label, color, sizes in (
        ("the process", GREY, [plan.reserved_bytes] * len(names)),
        ("shared tables", OCHRE, [plan.shared_bytes] * len(names)),
        (f"{plan.workers} {workers}", BLUE, [plan.workers * s.worker_bytes for s in plan.stages]),
    ):
        width = np.array(sizes) / 2**20
        axes.barh(names, width, left=left, color=color, alpha=0.8, height=0.6, label=label)
        left += width
    axes.axvline(
        plan.memory_limit_bytes / 2**20, color=RED, linestyle="--", label="limit"
    ) if numbers.memory_fits else None
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("memory, MiB")
    axes.grid(visible=True, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
