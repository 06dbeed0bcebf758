"""What a report says in words: its sections, captions, and the lines at its top."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from relex_stream.reporting import charts
from relex_stream.reporting.coefficients import BAND
from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.summaries import WEAK_SKILL
from relex_stream.wording import (
    format_bytes,
    format_count,
    format_figure,
    format_ratio,
    format_share,
    format_steps,
    printable,
)

_FEW_FORECASTS = 3
"""Of fewer, skill says little."""

MOST_ODD_STEPS = 40
"""Rows of the table of odd steps; the table of steps has all."""


CHARTS = (
    *("coefficients", "explained_variance", "r2", "singular_values", "steps", "skill"),
    *("storage", "memory"),
)
"""Names of all charts that there can be, in order."""


@dataclass(frozen=True)
class Table:
    """A small table: titles, and rows of as many texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A figure and what is said of it.

    Attributes
    ----------
    name : str
        Of its file, and in ids.
    title : str
        In a few words, for those who do not see it.
    draw : callable
    caption : str
        What is seen, and how to read it.
    """

    name: str
    title: str
    draw: Callable[[ReportNumbers], Figure]
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, what is said below it, charts and tables."""

    name: str
    heading: str
    paragraphs: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


def facts(numbers: ReportNumbers) -> dict[str, str]:
    """Return the figures at the top, by name."""
    info, analysis, model = numbers.info, numbers.analysis, numbers.analysis.model
    steps = [each.step for each in info.steps]
    found = {"store": printable(info.store), "steps": format_steps(steps)}
    if len(numbers.history) < len(steps):
        found["history"] = f"{format_steps(numbers.history)}: later steps show what it is worth"
    dtypes = ", ".join(sorted(info.dtypes))
    found["weights"] = (
        f"{info.weights:,} ({dtypes}) in {format_count(info.tensors, 'tensor')}, of which "
        f"{analysis.unchanged_tensors:,} never changed"
    )
    found["size"] = (
        f"{format_bytes(info.bytes_in)} of checkpoints in "
        f"{format_bytes(info.store_bytes - info.base_bytes_stored)}, "
        f"{format_ratio(info.ratio)} smaller"
    )
    figures = "from the weights"
    if not analysis.exact:
        figures = "from sketches, +- their standard error; tensors without a sketch exact"
    found["figures"] = figures
    shares = [
        _with_error(format_share(share), errors_of(model.explained_variance_error, place), 100, 1)
        for place, share in enumerate(model.explained_variance[:3])
    ]
    ranks = "rank 1" if len(shares) == 1 else f"ranks 1 to {len(shares)}"
    found["explained variance"] = f"{', '.join(shares)} ({ranks}, of all movement)"
    if numbers.has_fit:
        r2 = _with_error(format_figure(model.r2[0]), errors_of(model.r2_error, 0), 1, 3)
        text = f"{r2}, {analysis.fit} fit of the first component"
        if analysis.window is not None:
            text += f" through the last {analysis.window} checkpoints"
        if not numbers.fit_has_misses:
            text = "always 1: the fit goes through as many checkpoints as it must have"
        found["R2"] = text
        if not math.isnan(model.r2_elsewhere[0]):
            error = errors_of(model.r2_elsewhere_error, 0)
            elsewhere = _with_error(format_figure(model.r2_elsewhere[0]), error, 1, 3)
            found["R2 elsewhere"] = f"{elsewhere}, at stored steps that the fit has not seen"
    if not math.isnan(model.bend):
        bend = _with_error(format_figure(model.bend), model.bend_error, 1, 3)
        found["bend"] = f"{bend}: the movement {_bent(model.bend)}"
    odd = sum(bool(each.note) for each in analysis.steps)
    found["odd steps"] = f"{odd} of {len(steps)}, listed below" if odd else "none"
    if analysis.left_out_tensors:
        found["left out"] = (
            f"{format_count(len(analysis.left_out_tensors), 'small tensor')} without a sketch: "
            "the base is not there to look them up (--base names it)"
        )
    return found


def errors_of(errors: Sequence[float] | None, place: int) -> float | None:
    """Return one of several standard errors, if there are any."""
    return None if errors is None else errors[place]


def _with_error(text: str, error: float | None, factor: float, decimals: int) -> str:
    if error is None or text == "-":
        return text
    return f"{text} +- {factor * error:.{decimals}f}"


def _bent(bend: float) -> str:
    if abs(bend) < 0.02:
        return "is straight so far"
    return "slows down" if bend > 0 else "speeds up"


def verdict(numbers: ReportNumbers) -> tuple[str, str]:
    """Return whether the store speaks for extrapolating, in a word and in sentences.

    The word is ``"for"``, ``"weakly"``, ``"against"`` or ``"unknown"``.
    """
    if numbers.backtest is None:
        return "unknown", (
            "The store cannot say whether to extrapolate: no stored step can be forecast from "
            f"those before it ({numbers.backtest_reason})."
        )
    advice = numbers.backtest.recommendation
    if advice is None:
        return "against", (
            "The store speaks against extrapolating: no forecast of its stored steps from earlier "
            "ones was nearer to what came, on average, than staying at the last observed step."
        )
    damping = advice.damping if isinstance(advice.damping, str) else f"{advice.damping:g}"
    options = f"--rank {advice.rank} --fit {advice.fit}"
    if advice.window is not None:
        options += f" --window {advice.window}"
    options += f" --anchor {advice.anchor} --damping {damping}"
    weak = advice.mean_skill < WEAK_SKILL or advice.least_skill <= 0
    word = "weakly" if weak or advice.forecasts < _FEW_FORECASTS else "for"
    begin = "speaks for extrapolating" if word == "for" else "speaks weakly for extrapolating"
    worth = (
        f"mean of {format_count(advice.forecasts, 'forecast')}, least "
        f"{format_share(advice.least_skill)}"
    )
    if advice.forecasts == 1:
        worth = "in the only forecast that there could be"
    text = (
        f"The store {begin} with {options}: in squared distance, forecasts of its stored steps "
        f"from earlier ones were {format_share(advice.mean_skill)} nearer to what came than "
        f"staying at the last observed step ({worth}). "
    )
    if not advice.reach:
        text += "But not even all of the nearest forecasts were nearer than staying."
    else:
        text += f"All were nearer up to {advice.reach:.2f} times the history"
        text += "." if advice.reach_is_known else ", the furthest that could be tested."
    return word, text


CAVEATS = (
    (
        "High explained variance and R2 do not say that an extrapolation helps; skill, which "
        "compares with what really came, says more."
    ),
    (
        "Skill is about weights, and weights are not rewards: evaluate what you extrapolate, "
        "beside the last checkpoint."
    ),
)


def sections(numbers: ReportNumbers) -> list[Section]:
    """Return the sections of a report, in order."""
    return [
        _coefficients(numbers),
        _heat_maps(numbers),
        _singular_values(numbers),
        _steps(numbers),
        _skill(numbers),
        _storage(numbers),
    ]


# --- one by one ----------------------------------------------------------------------------------


def _coefficients(numbers: ReportNumbers) -> Section:
    heading = "Coefficients and their forecast"
    if len(numbers.info.steps) < 2:
        return Section("coefficients", heading, [_too_few(2, "a movement to be drawn")])
    first = numbers.coefficients[0]
    caption = (
        "How far the model has gone along the first component of its movement (large), along the "
        "second, and single tensors along their own: those that moved most. Dots are stored steps"
    )
    if first.history < len(first.steps):
        caption += "; hollow ones came after the history and are not used"
    caption += "."
    paragraphs = []
    if not numbers.has_fit:
        paragraphs.append(_too_few(numbers.least_points, f"the {numbers.asked_fit} fit"))
        chart = Chart("coefficients", "Coefficients over steps", charts.draw_coefficients, caption)
        return Section("coefficients", heading, paragraphs, [chart])
    caption += " The line is the fit and, dashed, where it leads."
    known = any(math.isfinite(width) for width in first.half_widths)
    if known:
        ends = format_count(first.past_histories, "earlier end")
        caption += (
            f" The band is what past forecasts were off by: from {ends} of the history, the same "
            "fit in their own subspace forecast the steps up to its last one. Their errors, as "
            "shares of the largest coefficient seen, are averaged (root mean square) over "
            "forecasts as far ahead in proportion (target by last step), never less than nearer "
            f"by; the band is {BAND:g} times that to either side, and ends where no past forecast "
            "reached. It takes the future to be as hard to foresee as the past, and says nothing "
            "of movement outside the component."
        )
    else:
        paragraphs.append(
            "There is no band: the history is too short for a forecast from an earlier end of it."
        )
    rows = [
        (
            str(point.step),
            _number(point.value, 4),
            f"\u00b1{_number(point.half_width, 3)}" if math.isfinite(point.half_width) else "-",
        )
        for point in first.forecasts
    ]
    table = Table(("target step", "first component, model", "band"), rows)
    chart = Chart(
        "coefficients",
        "Coefficients over steps, with fit, forecast and band",
        charts.draw_coefficients,
        caption,
    )
    return Section("coefficients", heading, paragraphs, [chart], [table])


def _number(value: float, digits: int) -> str:
    """Return a number with so many digits, without an exponent if it is of a usual size."""
    short = f"{value:.{digits}g}"
    if not 1e-5 <= abs(value) < 1e7:
        return short
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{float(short):,.{max(0, decimals)}f}"


def _too_few(least: int, what: str) -> str:
    return f"The history has too few checkpoints: {what} takes {least}."


def _heat_maps(numbers: ReportNumbers) -> Section:
    heading = "Modules and layers"
    if len(numbers.history) < 2:
        return Section("modules", heading, [_too_few(2, "a first component of several")])
    grid = numbers.grid
    modules, outside = charts.shown_modules(numbers)
    how = "Each cell is a tensor: its module is the row, its layer the column."
    if grid.averaged:
        how = (
            "Each cell is a tensor, or the mean of the tensors that share a row and a layer "
            "(experts, say), weighted by how far they moved: its module is the row, its layer the "
            "column."
        )
    if not grid.modules:
        how = "Each row is a tensor; none of them has a layer in its name."
    elif any((module, layer) not in grid.cells for module in modules for layer in grid.layers):
        how += " Hatched cells have no tensor that changed."
    hidden = len(grid.modules) - len(modules) + len(grid.outside) - len(outside)
    if hidden:
        how += (
            f" {format_count(hidden, 'row')} that moved least are left out (the tables have all)."
        )
    found = [
        Chart(
            "explained_variance",
            "Heat map of explained variance by module and layer",
            charts.draw_explained_variance,
            f"Explained variance: the share of a tensor's movement that lies along one direction, "
            f"its first component. {how} Brighter is more in one direction.",
        )
    ]
    paragraphs = []
    if numbers.fit_has_misses:
        found.append(
            Chart(
                "r2",
                "Heat map of R2 by module and layer",
                charts.draw_r2,
                f"R2 of the {numbers.analysis.fit} fit: how well it describes the coefficients of "
                "each tensor's first component, where it was made. Same cells. Brighter is "
                "straighter; note where the scale begins.",
            )
        )
    else:
        paragraphs.append(
            f"There is no heat map of R2: the history has too few checkpoints for the "
            f"{numbers.asked_fit} fit to miss any."
        )
    return Section("modules", heading, paragraphs, found)


def _singular_values(numbers: ReportNumbers) -> Section:
    heading = "Singular values"
    if len(numbers.history) < 2:
        return Section("singular_values", heading, [_too_few(2, "more than one component")])
    caption = (
        "Left, the singular values of the weight deltas as shares of the first, on a logarithmic "
        "scale: the faster they fall, the fewer directions the movement has. Right, the share of "
        "all movement that the first components have together. The line is the model, as one; "
        "grey is its tensors, each with components of its own."
    )
    if numbers.analysis.model.explained_variance_error is not None:
        caption += " Bars are two standard errors."
    chart = Chart(
        "singular_values",
        "Singular values and cumulative explained variance by component",
        charts.draw_singular_values,
        caption,
    )
    return Section("singular_values", heading, (), [chart])


def _steps(numbers: ReportNumbers) -> Section:
    heading = "What changed from step to step"
    steps = numbers.analysis.steps
    if len(steps) < 2:
        only = steps[0]
        text = (
            f"There is one step, {only.step}: {format_share(only.changed_share)} of the weights "
            f"differ from the base, from which it is {only.delta_norm:.4g} away (norm)."
        )
        return Section("steps", heading, [text])
    odd = [each for each in steps if each.note]
    caption = (
        "Above, the share of weights whose bits changed since the stored step before. Below, how "
        "far the model moved since then, and how far it is from the base."
    )
    tables = []
    paragraphs = []
    if odd:
        caption += " Crosses are odd steps, listed beneath."
        rows = [(str(each.step), each.note) for each in odd[:MOST_ODD_STEPS]]
        tables.append(Table(("odd step", "why"), rows))
        if len(odd) > MOST_ODD_STEPS:
            paragraphs.append(f"Of {len(odd)} odd steps the first {MOST_ODD_STEPS} are listed.")
    chart = Chart("steps", "Changed share and norms over steps", charts.draw_steps, caption)
    return Section("steps", heading, paragraphs, [chart], tables)


def _skill(numbers: ReportNumbers) -> Section:
    heading = "What forecasts would have been worth"
    if numbers.backtest is None:
        text = f"There is no backtest: {numbers.backtest_reason}."
        return Section("skill", heading, [text])
    plain = [
        charts.skill_of(row, "1")[0] for row in numbers.backtest.forecasts if row.anchor == "base"
    ]
    plain = [value for value in plain if math.isfinite(value)]
    paragraphs = []
    if plain:
        had = f"skills from {min(plain):.3f} to {max(plain):.3f}"
        if len(plain) == 1:
            had = f"a skill of {plain[0]:.3f} in the only forecast"
        paragraphs.append(f"Plain RELEX (anchor base, damping 1) had {had}.")
    caption = (
        "Skill of forecasts of stored steps, each panel from another end of the history, against "
        "how far ahead they were. 1 is perfect, 0 no nearer to what came than staying at the last "
        "observed step, below 0 worse than that; in the green part the forecast was nearer. Auto "
        "is the damping that the history chooses by itself, by a rule that was settled by reward: "
        "it may go further than is best here. The best one is known afterwards only."
    )
    if any(value < charts.LEAST_SKILL for value in plain):
        caption += f" Skills below {charts.LEAST_SKILL:g} are triangles at the edge."
    if any(row.best.error is not None for row in numbers.backtest.forecasts):
        caption += " Bars are two standard errors."
    chart = Chart("skill", "Backtest skill over horizon", charts.draw_skill, caption)
    return Section("skill", heading, paragraphs, [chart])


def _storage(numbers: ReportNumbers) -> Section:
    plan = numbers.memory
    found = [
        Chart(
            "storage",
            "Bytes of checkpoints and of the store",
            charts.draw_storage,
            "Left, the bytes of the checkpoints and those of the store that has all of them, "
            "without the base, on a logarithmic scale. Right, what each step added to the store.",
        ),
        Chart(
            "memory",
            "Projected memory of extrapolate by stage",
            charts.draw_memory,
            "What extrapolate is projected to hold while it makes one model from this store "
            f"({format_count(plan.workers, 'worker')}), stage by stage, at most. It does not "
            "depend on the model's size but for the tables.",
        ),
    ]
    projected, limit = map(format_bytes, (plan.projected_bytes, plan.memory_limit_bytes))
    text = f"The command extrapolate is projected to take {projected} of the {limit} that it may"
    if not numbers.memory_fits:
        text = f"The command extrapolate needs {projected} with one worker, more than its limit"
    text += (
        f", to read {format_bytes(sum(stage.read_bytes for stage in plan.stages))} and to write "
        f"{format_bytes(sum(stage.write_bytes for stage in plan.stages))}."
    )
    return Section("storage", "Storage and memory", [text], found)


def every_chart(found: Sequence[Section]) -> Iterator[Chart]:
    """Yield the charts of sections."""
    for section in found:
        yield from section.charts
