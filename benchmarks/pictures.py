"""The ``pictures`` command: figures for the documentation, from a report's JSON or from a store.

To draw one more report, write a function that takes the `Report` and returns a `Figure`, and enter
it in `DRAWINGS` under the command that makes the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import relex_stream as rs
from benchmarks.coefficients import coefficients, exact_grams
from benchmarks.processes import BenchmarkError
from benchmarks.report import Report
from relex_stream.fit import Fit, Forecast
from relex_stream.grouping import group_name

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
except ImportError as error:
    raise BenchmarkError("pictures need matplotlib: pip install matplotlib") from error

BLUE = "#2a6f8f"
RED = "#b04a3a"
OCHRE = "#c58b2a"
GREY = "#7a7a7a"
GREEN = "#5b8c5a"

MIB = 2**20


def new_figure(
    columns: int = 1, *, rows: int = 1, height: float = 3.6, width: float = 7
) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as a page of documentation, with plain axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for one in axes:
        one.grid(visible=True, which="major", alpha=0.3)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes


def draw_store(store: Path) -> Figure:
    """Draw the bytes of checkpoints and of a store against the number of checkpoints."""
    info = rs.info(store)
    count = np.arange(1, len(info.steps) + 1)
    checkpoints = np.cumsum([step.source_bytes for step in info.steps]) / 2**20
    per_step = [step.frame_bytes + step.record_bytes for step in info.steps]
    # What no step alone accounts for: array metadata, side files, the manifest.
    common = info.store_bytes - info.base_bytes_stored - sum(per_step)
    stored = (common + np.cumsum(per_step)) / 2**20
    figure, [axes] = new_figure()
    axes.plot(count, checkpoints, color=RED, label="checkpoints")
    axes.plot(count, stored, color=BLUE, label="delta store")
    for values, color in ((checkpoints, RED), (stored, BLUE)):
        axes.annotate(
            f"{values[-1]:,.0f} MiB" if values[-1] >= 100 else f"{values[-1]:.1f} MiB",
            (count[-1], values[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("checkpoints kept")
    axes.set_ylabel("MiB on disk")
    dtypes = " and ".join(dtype.lower() for dtype in info.dtypes)
    axes.set_title(
        f"{info.weights / 1e6:.1f} M {dtypes} weights: {checkpoints[-1] / stored[-1]:.0f} times "
        "smaller, every step bit for bit",
        fontsize=11,
    )
    axes.legend(frameon=False)
    return figure


_FITS = {
    "linear": ("line", RED),
    "polynomial:2": ("parabola", OCHRE),
    "sinusoid": ("sinusoid", GREEN),
}

_TENSORS_DRAWN = 3


def draw_coefficients(store: Path, last: int) -> Figure:
    """Draw the coefficients of all steps in the subspace of those up to `last`, and fits of these.

    A column for the model as one group and for the tensors that moved furthest, of each module one;
    a row for each of the first two components. Steps that subspace and fits have not seen are
    hollow.

    Raises
    ------
    BenchmarkError
        If there are too few steps up to `last` for the fits, or none after it.
    """
    steps, grams = exact_grams(store)
    rows = sum(step <= last for step in steps)
    least = max(Fit(curve).least_points for curve in _FITS)
    if not least <= rows < len(steps):
        raise BenchmarkError(
            f"{store}: {rows} of {len(steps)} steps are up to {last}; the fits take {least}, and "
            "some must come after them"
        )
    # Ascending, so that of each module what moved furthest stays.
    ascending = sorted(grams, key=lambda name: float(grams[name][-1, -1]))
    furthest = {group_name(name, "module"): name for name in ascending}.values()
    moved = sorted(furthest, key=ascending.index, reverse=True)[:_TENSORS_DRAWN]
    columns = {"model": sum(grams.values())} | {name: grams[name] for name in moved}
    figure, axes = new_figure(len(columns), rows=2, height=5, width=11)
    places = np.asarray(steps, np.float64)
    forecasts = {curve: Forecast(steps[:rows], steps, Fit(curve)) for curve in _FITS}
    for column, (name, gram) in enumerate(columns.items()):
        # As a share of how far the weights had moved when the history ended.
        found = coefficients(np.asarray(gram), rows, 2) / np.sqrt(gram[rows - 1, rows - 1])
        for component in range(2):
            one = axes[component * len(columns) + column]
            values = found[:, component]
            _draw_fits(one, places, values[:rows], forecasts)
            one.plot(
                places[:rows], values[:rows], "o", color=BLUE, markersize=2.5, label="observed"
            )
            one.plot(
                places[rows:],
                values[rows:],
                "o",
                color=BLUE,
                markerfacecolor="white",
                markersize=3,
                markeredgewidth=0.7,
                label="later steps, projected",
            )
            one.axvline(last, color=GREY, linewidth=0.8)
            if component == 0:
                one.set_title(name.removeprefix("model.").removesuffix(".weight"), fontsize=9)
            else:
                one.set_xlabel("step")
    for row, which in ((axes[: len(columns)], "first"), (axes[len(columns) :], "second")):
        row[0].set_ylabel(f"{which} coefficient", fontsize=9)
        _keep_in_view(row)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(
        f"In the subspace of steps up to {last}, as shares of the delta at step {last}", fontsize=10
    )
    return figure


def _draw_fits(
    axes: Axes, places: NDArray[Any], observed: NDArray[Any], forecasts: Mapping[str, Forecast]
) -> None:
    for curve, (label, color) in _FITS.items():
        predicted = forecasts[curve].predict(observed[:, None])[:, 0]
        axes.plot(places, predicted, color=color, linewidth=1.2, label=label)


def _keep_in_view(row: Sequence[Axes]) -> None:
    """Give axes one scale: room for lines that overshoot, not for parabolas that leave for good."""
    steps = np.concatenate(
        [
            np.asarray(line.get_ydata())
            for one in row
            for line in one.lines
            if line.get_marker() == "o"
        ]
    )
    least, most = min(steps.min(), 0.0), max(steps.max(), 0.0)
    limits = np.array([one.get_ylim() for one in row])
    room = 0.85 * (most - least)
    for one in row:
        one.set_ylim(max(limits[:, 0].min(), least - room), min(limits[:, 1].max(), most + room))


def draw_codec(report: Report) -> Figure:
    """Draw size and speed against the share of changed weights, a row per dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in report.rows))
    names = list(dict.fromkeys(row["codec"] for row in report.rows))
    styles = dict(zip(names, map(_codec_style, names), strict=True))
    columns = (
        ("bits per changed weight", "bits per changed weight"),
        ("encode GB/s", "encode, GB/s of checkpoint"),
        ("decode GB/s", "decode, GB/s of checkpoint"),
    )
    figure, axes = new_figure(3, rows=len(dtypes), height=1 + 2.6 * len(dtypes), width=9)
    for place, (dtype, (column, label)) in enumerate(itertools.product(dtypes, columns)):
        one = axes[place]
        for name in names:
            points = [
                (100 * row["changed_share"], row[column])
                for row in report.rows
                if (row["dtype"], row["codec"]) == (dtype, name) and row.get(column)
            ]
            # Bits of a mere copy say nothing and would squeeze the others.
            if points and not (name.startswith("copy") and column == columns[0][0]):
                one.plot(*zip(*points, strict=True), label=name, **styles[name])
        one.set_xscale("log")
        one.set_yscale("log")
        _plain_ticks(one)
        one.set_xlabel("weights changed, %")
        one.set_ylabel(label)
        one.set_title(dtype, fontsize=10)
    found: dict[str, Any] = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    ordered = [name for name in names if name in found]
    figure.legend(
        [found[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def _codec_style(name: str) -> dict[str, Any]:
    family = {"relex": BLUE, "zstd": RED, "blosc": OCHRE, "zipnn": GREEN}
    color = next((family[start] for start in family if name.startswith(start)), GREY)
    line = "-"
    if color == GREY:
        line = "--" if name.startswith("copy") else ":"
    elif "difference" in name:
        line = "-."
    elif "bitshuffle" in name or "split" in name:
        line = "--"
    elif "file" in name:
        line = ":"
    return {
        "color": color,
        "linestyle": line,
        "linewidth": 2.2 if color == BLUE else 1.2,
        "marker": "o" if color == BLUE else None,
        "markersize": 3,
    }


def _plain_ticks(axes: Axes) -> None:
    """Write 0.1, 1, 10 instead of powers; 2 and 5 too where there is room."""
    for axis in (axes.xaxis, axes.yaxis):
        least, most = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 50 * least else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


_COMMAND_COLORS = {
    "build-store": BLUE,
    "extrapolate": RED,
    "extrapolate --svd exact": OCHRE,
    "export": GREEN,
    "verify": GREY,
}


def draw_memory(report: Report) -> Figure:
    """Draw measured peaks (lines) and projections (dashed), and memory over time."""
    if any(row["part"].startswith("own") for row in report.rows):
        return _draw_own_memory(report)
    figure, axes = new_figure(2, rows=2, height=6.4, width=9)
    for one, part, column, label, scale in (
        (axes[0], "size", "weights", "weights, millions", 1e6),
        (axes[1], "checkpoints", "checkpoints", "checkpoints", 1),
        (axes[2], "limit", "limit_bytes", "--memory-limit, MiB", MIB),
    ):
        rows = [row for row in report.rows if row["part"] == part]
        for name, color in _COMMAND_COLORS.items():
            for figures, style in (("peak_rss_bytes", "o-"), ("projected_bytes", "--")):
                points = sorted(
                    (row[column] / scale, row[figures] / MIB)
                    for row in rows
                    if row["command"] == name and row.get(figures) and row.get(column)
                )
                if points:
                    one.plot(
                        *zip(*points, strict=True),
                        style,
                        color=color,
                        markersize=3,
                        label=name if style == "o-" else None,
                    )
        if part == "size":
            one.set_xscale("log")
            sizes = sorted({row["weights"] / scale for row in rows if row["weights"]})
            one.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
            one.xaxis.set_minor_locator(NullLocator())
        if part == "limit" and rows:
            limits = sorted({row["limit_bytes"] / MIB for row in rows if row.get("limit_bytes")})
            one.plot(limits, limits, color="black", linewidth=0.8)
            one.text(limits[-1], limits[-1], "the limit ", fontsize=8, ha="right")
        one.set_xlabel(label)
        one.set_ylabel("peak memory, MiB")
        one.set_ylim(bottom=0)
    _draw_over_time(axes[3], [row for row in report.rows if row["part"] == "size"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle("measured: solid; projected by the command: dashed", fontsize=10)
    return figure


def _draw_own_memory(report: Report) -> Figure:
    figure, [bars, curve] = new_figure(2, height=4, width=9)
    rows = [row for row in report.rows if row["part"] == "own" and row.get("peak_rss_bytes")]
    place = np.arange(len(rows))
    for figures, shift, color, label in (
        ("projected_bytes", -0.2, GREY, "projected"),
        ("peak_rss_bytes", 0.2, BLUE, "measured"),
    ):
        sizes = [(row.get(figures) or 0) / MIB for row in rows]
        bars.barh(place + shift, sizes, 0.4, color=color, label=label)
    bars.set_yticks(place, [row["command"] for row in rows], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel("peak memory, MiB")
    bars.legend(frameon=False, fontsize=8)
    _draw_over_time(curve, rows)
    curve.legend(frameon=False, fontsize=8)
    return figure


def _draw_over_time(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the resident memory of the build and the extrapolation of the largest model."""
    largest = max((row["weights"] or 0 for row in rows), default=0)
    for row in rows:
        if row["weights"] == largest and row["command"] in ("build-store", "extrapolate"):
            seconds, sizes = zip(*row.get("samples") or [(0, 0)], strict=True)
            color = _COMMAND_COLORS[row["command"]]
            axes.plot(seconds, np.array(sizes) / MIB, color=color, label=row["command"])
            if row.get("projected_bytes"):
                axes.axhline(row["projected_bytes"] / MIB, color=color, linestyle="--", linewidth=1)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("resident memory, MiB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{largest / 1e6:,.0f} M weights", fontsize=9)


def draw_scale(report: Report) -> Figure:
    """Draw cost against checkpoints, weights and workers, and predictions beside measurements."""
    figure, axes = new_figure(2, rows=2, height=6.4, width=9)
    commands = ("build-store", "extrapolate")
    for one, part, column, label, scale in (
        (axes[0], "checkpoints", "checkpoints", "checkpoints", 1),
        (axes[1], "size", "weights", "weights, millions", 1e6),
    ):
        for name in commands:
            points = sorted(
                (row[column] / scale, row["in_process_s"])
                for row in report.rows
                if row["part"] == part and row["command"] == name
            )
            _draw_line(one, points, name)
        one.set_xlabel(label)
        one.set_ylabel("one worker, in process, s")
        one.set_xlim(left=0)
        one.set_ylim(bottom=0)
        one.legend(frameon=False, fontsize=8)
    _draw_workers(axes[2], report, commands)
    _draw_predictions(axes[3], report, commands)
    return figure


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], name: str) -> None:
    if not points:
        return
    x, y = map(np.array, zip(*points, strict=True))
    color = _COMMAND_COLORS[name]
    axes.plot(x, y, "o", color=color, markersize=4, label=name)
    if len(set(x.tolist())) > 1:
        ends = np.array([0, x.max()])
        axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=color, linewidth=1)


def _draw_workers(axes: Axes, report: Report, commands: Sequence[str]) -> None:
    for name in commands:
        rows = [row for row in report.rows if row["command"] == name]
        most = max(row["checkpoints"] for row in rows if row["part"] == "checkpoints")
        points = sorted(
            (row["workers"], row["in_process_s"])
            for row in rows
            if row["part"] in ("checkpoints", "workers") and row["checkpoints"] == most
        )
        workers, seconds = map(np.array, zip(*points, strict=True))
        axes.plot(
            workers,
            seconds[0] / seconds,
            "o-",
            color=_COMMAND_COLORS[name],
            markersize=4,
            label=name,
        )
    counts = sorted({row["workers"] for row in report.rows if row["part"] == "workers"} | {1})
    axes.plot(counts, counts, color="black", linewidth=0.8, label="as many times as workers")
    axes.set_xticks(counts)
    axes.set_xlabel("workers")
    axes.set_ylabel("times as fast as one, in process")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _draw_predictions(axes: Axes, report: Report, commands: Sequence[str]) -> None:
    rows = [row for row in report.rows if row.get("predicted_s") and row.get("wall_s")]
    for name in commands:
        for check in (False, True):
            points = [
                (row["wall_s"], row["predicted_s"])
                for row in rows
                if row["command"] == name and (row["part"] == "check") == check
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "*" if check else "o",
                    color=_COMMAND_COLORS[name],
                    markersize=12 if check else 3,
                    label=f"{name}, largest run" if check else f"{name}, fitted to",
                )
    limits = [0.8 * min(row["wall_s"] for row in rows), 1.25 * max(row["wall_s"] for row in rows)]
    axes.plot(limits, limits, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("measured, whole process, s")
    axes.set_ylabel("predicted, s")
    axes.legend(frameon=False, fontsize=8)


_PEER_COLORS = {"relex-stream": BLUE, "authors": RED, "two plain": OCHRE, "mergekit": GREEN}


def draw_peers(report: Report) -> Figure:
    """Draw time and memory of whole processes as bars, and the time without start-up as marks."""
    rows = [row for row in report.rows if row["part"] == "whole process"]
    places: list[float] = []
    for row, before in zip(rows, [None, *rows], strict=False):
        gap = 0.9 if before is not None and before["job"] != row["job"] else 0
        places.append(places[-1] + 1 + gap if places else 0.0)
    figure, [times, memory] = new_figure(2, height=1.2 + 0.27 * len(rows), width=9)
    colors = [_peer_color(row["program"]) for row in rows]
    for axes, figures, label, scale in (
        (times, "wall_s", "seconds", 1),
        (memory, "peak_rss_bytes", "peak memory, MiB", MIB),
    ):
        values = [row[figures] / scale for row in rows]
        axes.barh(places, values, 0.8, color=colors)
        axes.set_xscale("log")
        axes.set_xlim(right=2.5 * max(values))
        for place, value in zip(places, values, strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(
                text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    inner = {
        (row["job"], row["program"], row["variant"]): row["wall_s"]
        for row in report.rows
        if row["part"] == "in process"
    }
    marks = [
        (inner[key], place)
        for row, place in zip(rows, places, strict=True)
        if (key := (row["job"], row["program"], row["variant"])) in inner
    ]
    if marks:
        seconds, heights = zip(*marks, strict=True)
        times.plot(
            seconds,
            heights,
            "|",
            color="black",
            markersize=9,
            markeredgewidth=1.5,
            label="without imports and start-up",
        )
        times.set_xlim(left=0.6 * min(seconds))
        figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    times.set_yticks(places, [_peer_label(row) for row in rows], fontsize=8)
    for job in dict.fromkeys(row["job"] for row in rows):
        first = next(place for row, place in zip(rows, places, strict=True) if row["job"] == job)
        times.annotate(
            job,
            (0, first - 0.7),
            xycoords=("axes fraction", "data"),
            ha="right",
            fontsize=8,
            fontweight="bold",
        )
    weights = report.settings["weights"] / 1e6
    state = "cold" if report.settings["cold"] else "warm"
    figure.suptitle(
        f"{weights:,.1f} M weights, {report.settings['steps']} checkpoints, page cache {state}",
        fontsize=10,
    )
    return figure


def _peer_color(program: str) -> str:
    return next((color for name, color in _PEER_COLORS.items() if program.startswith(name)), GREY)


def _peer_label(row: Mapping[str, Any]) -> str:
    if row["program"] == "limit":
        return f"limit: {row['variant']}"
    return ", ".join(word for word in (row["program"], row["variant"]) if word)


DRAWINGS: dict[str, Callable[[Report], Figure]] = {
    "codec": draw_codec,
    "memory": draw_memory,
    "peers": draw_peers,
    "scale": draw_scale,
}
"""By the command that makes a report, how it is drawn."""


def draw_report(path: Path) -> Figure:
    """Draw a report by the command that made it.

    Raises
    ------
    BenchmarkError
        If the file is no report, or there is no drawing for its command.
    """
    try:
        report = Report.read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path}: not a report that a benchmark wrote with --json ({error})"
        ) from error
    if report.command not in DRAWINGS:
        raise BenchmarkError(
            f"{path}: a report of `{report.command}`; there are drawings for {', '.join(DRAWINGS)}"
        )
    return DRAWINGS[report.command](report)


@click.command("pictures")
@click.option("--store", is_flag=True, help="SOURCE is a store: draw what it takes on the disk.")
@click.option(
    "--coefficients",
    "last",
    type=click.IntRange(min=1),
    metavar="STEP",
    help="SOURCE is a store: draw the coefficients of all steps in the subspace of those to STEP.",
)
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(source: Path, out: Path, *, store: bool, last: int | None) -> None:
    """Draw SOURCE, a report's JSON file, into OUT (.png, .svg)."""
    if last is not None:
        figure = draw_coefficients(source, last)
    else:
        figure = draw_store(source) if store else draw_report(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
