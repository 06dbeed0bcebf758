"""All numbers of a report as tables: CSV (RFC 4180), figures in full precision."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.summaries import ForecastSkill, GroupAnalysis, SkillOfDamping

Row = Sequence[Any]

TABLES = (
    *("summary.csv", "steps.csv", "model.csv", "layers.csv", "modules.csv", "tensors.csv"),
    *("heatmap.csv", "coefficients.csv", "curves.csv", "skill.csv", "tensor_skill.csv"),
    *("storage.csv", "memory.csv"),
)
"""Names of all tables that there can be."""


def csv_tables(numbers: ReportNumbers) -> dict[str, bytes]:
    """Return the tables by file name.

    Cells are empty where there is no figure. Floats are written so that they read back the same.
    """
    tables: dict[str, tuple[Row, Iterable[Row]]] = {
        "summary.csv": (("name", "value"), _summary(numbers)),
        "steps.csv": (_STEPS, _steps(numbers)),
        "coefficients.csv": (_COEFFICIENTS, _coefficients(numbers)),
        "curves.csv": (_CURVES, _curves(numbers)),
        "heatmap.csv": (_HEATMAP, _heatmap(numbers)),
        "storage.csv": (_STORAGE, _storage(numbers)),
        "memory.csv": (_MEMORY, _memory(numbers)),
    }
    analysis = numbers.analysis
    groupings = {
        "model": (analysis.model,),
        "layers": analysis.layers,
        "modules": analysis.modules,
        "tensors": analysis.tensors,
    }
    header = _group_header(analysis.rank)
    for name, groups in groupings.items():
        tables[f"{name}.csv"] = (header, (_group(group) for group in groups))
    if numbers.backtest is not None:
        tables["skill.csv"] = (_SKILL, _skill(numbers.backtest.forecasts))
        tables["tensor_skill.csv"] = (
            ("tensor", "skill", "best_damping", "moved"),
            ((t.name, t.skill, t.best_damping, t.moved) for t in numbers.backtest.groups),
        )
    return {name: write_csv(header, rows) for name, (header, rows) in sorted(tables.items())}


def write_csv(header: Row, rows: Iterable[Row]) -> bytes:
    r"""Return a table as CSV.

    Examples
    --------
    >>> write_csv(("a", "b"), [(0.1, float("nan")), ("x, y", None)])
    b'a,b\r\n0.1,\r\n"x, y",\r\n'
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    # A name that UTF-8 cannot encode is escaped, not lost.
    return file.getvalue().encode("utf-8", "backslashreplace")


def _plain(cell: Any) -> Any:
    if isinstance(cell, bool):
        return int(cell)
    return "" if isinstance(cell, float) and math.isnan(cell) else cell


def _summary(numbers: ReportNumbers) -> Iterable[Row]:
    info, analysis = numbers.info, numbers.analysis
    yield from (
        ("store", info.store),
        ("steps", len(info.steps)),
        ("history_checkpoints", len(numbers.history)),
        ("history_last_step", numbers.history[-1]),
        ("tensors", info.tensors),
        ("weights", info.weights),
        ("checkpoint_bytes", info.bytes_in),
        ("store_bytes", info.store_bytes),
        ("base_bytes", info.base_bytes_stored),
        ("ratio", info.ratio),
        ("bits_per_changed_weight", info.bits_per_changed_weight),
        ("exact", analysis.exact),
        ("fit", analysis.fit),
        ("window", analysis.window),
        ("unchanged_tensors", analysis.unchanged_tensors),
        ("left_out_tensors", len(analysis.left_out_tensors)),
    )
    advice = numbers.backtest.recommendation if numbers.backtest is not None else None
    if advice is not None:
        for name in ("rank", "fit", "window", "anchor", "damping", "mean_skill", "least_skill"):
            yield f"recommended_{name}", getattr(advice, name)
        yield "recommended_forecasts", advice.forecasts
        yield "recommended_reach", advice.reach
        yield "recommended_reach_is_known", advice.reach_is_known


_STEPS = ("step", "in_history", "changed_share", "change_norm", "delta_norm", "note")


def _steps(numbers: ReportNumbers) -> Iterable[Row]:
    last = numbers.history[-1]
    for each in numbers.analysis.steps:
        yield (
            each.step,
            each.step <= last,
            each.changed_share,
            each.change_norm,
            each.delta_norm,
            each.note,
        )


_PER_COMPONENT = ("singular_values", "explained_variance", "r2", "r2_elsewhere")


def _group_header(rank: int) -> Row:
    columns = ["name", "tensors", "weights", "delta_norm", "bend", "bend_error"]
    for name in _PER_COMPONENT:
        for suffix in ("", "_error"):
            columns += [f"{name}{suffix}_{number}" for number in range(1, rank + 1)]
    return columns


def _group(group: GroupAnalysis) -> Row:
    cells: list[Any] = [group.name, group.tensors, group.weights, group.delta_norm]
    cells += [group.bend, group.bend_error]
    for name in _PER_COMPONENT:
        values = getattr(group, name)
        errors = getattr(group, f"{name}_error")
        cells += [*values, *([None] * len(values) if errors is None else errors)]
    return cells


_COEFFICIENTS = ("name", "component", "step", "in_history", "coefficient")


def _coefficients(numbers: ReportNumbers) -> Iterable[Row]:
    for each in numbers.coefficients:
        for row, (step, value) in enumerate(zip(each.steps, each.values, strict=True)):
            yield each.name, each.component, step, row < each.history, value


_CURVES = ("name", "component", "step", "is_target", "fitted", "band_half_width")


def _curves(numbers: ReportNumbers) -> Iterable[Row]:
    for each in numbers.coefficients:
        rows = zip(each.places, each.fitted, each.half_widths, strict=True)
        for place, value, width in rows:
            yield each.name, each.component, place, False, value, width
        for point in each.forecasts:
            yield each.name, each.component, point.step, True, point.value, point.half_width


_HEATMAP = ("module", "layer", "tensors", "explained_variance", "r2", "movement")


def _heatmap(numbers: ReportNumbers) -> Iterable[Row]:
    grid = numbers.grid
    for (module, layer), cell in grid.cells.items():
        yield module, layer, cell.tensors, cell.explained_variance, cell.r2, cell.movement
    for name, cell in grid.outside.items():
        yield name, None, cell.tensors, cell.explained_variance, cell.r2, cell.movement


_STORAGE = (
    "step",
    "changed_weights",
    "source_bytes",
    "frame_bytes",
    "record_bytes",
    "checkpoint_bytes_so_far",
    "store_bytes_so_far",
)


def _storage(numbers: ReportNumbers) -> Iterable[Row]:
    rows = zip(numbers.info.steps, numbers.checkpoint_bytes, numbers.stored_bytes, strict=True)
    for each, checkpoints, stored in rows:
        yield (
            each.step,
            each.changed_weights,
            each.source_bytes,
            each.frame_bytes,
            each.record_bytes,
            checkpoints,
            stored,
        )


_MEMORY = (
    "stage",
    "tasks",
    "read_bytes",
    "write_bytes",
    "process_bytes",
    "shared_bytes",
    "worker_bytes",
    "workers",
)


def _memory(numbers: ReportNumbers) -> Iterable[Row]:
    plan = numbers.memory
    for stage in plan.stages:
        yield (
            stage.name,
            stage.tasks,
            stage.read_bytes,
            stage.write_bytes,
            plan.reserved_bytes,
            plan.shared_bytes,
            stage.worker_bytes,
            plan.workers,
        )


_SKILL = (
    "history_step",
    "target_step",
    "horizon",
    "rank",
    "fit",
    "window",
    "anchor",
    "choice",
    "damping",
    "skill",
    "skill_error",
    "missed",
    "moved",
)


def _skill(forecasts: Iterable[ForecastSkill]) -> Iterable[Row]:
    for row in forecasts:
        found: list[tuple[str, SkillOfDamping]] = [("asked", each) for each in row.skills]
        if row.auto is not None:
            found.append(("auto", row.auto))
        found.append(("best", row.best))
        for choice, each in found:
            yield (
                row.history_step,
                row.target_step,
                row.horizon,
                row.rank,
                row.fit,
                row.window,
                row.anchor,
                choice,
                each.damping,
                each.skill,
                each.error,
                each.missed,
                row.moved,
            )
