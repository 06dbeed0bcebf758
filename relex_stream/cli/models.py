"""What the commands that make models print: their plan, or what they made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from relex_stream import wording
from relex_stream.cli.plan import describe_plan

if TYPE_CHECKING:
    from relex_stream.summaries import ModelsSummary, Output

_MOST_OUTPUTS = 20
_MOST_WEIGHTS = 8

_OWN_OF_A_SWEEP = frozenset(
    {
        *("method", "name", "history_steps", "group_by", "svd", "power_iterations"),
        *("fit", "window", "refit_every", "fitted", "compat", "excluded_from"),
    }
)
"""What an output says of itself only where the outputs of a sweep differ in it."""


def describe(summary: ModelsSummary, *, verbose: bool) -> list[str]:
    """Return the plan of a dry run, or the closing summary."""
    rows = {"store": summary.store}
    models = _models(summary, verbose=verbose)
    if _is_sweep(summary):
        rows["models"] = f"{len(summary.outputs)} in {_common(summary)}, told apart below"
    else:
        rows |= dict(models)
    rows["history"] = wording.format_steps(summary.history, full=verbose)
    rows["method"] = _method(summary)
    if summary.excluded_tensors:
        source = summary.settings.get("excluded_from", "base")
        rows["left out"] = (
            f"{wording.format_count(summary.excluded_tensors, 'tensor')}, copied from the "
            f"{'base' if source == 'base' else 'last checkpoint'}"
        )
    if summary.dry_run:
        lines = ["dry run: nothing was written", "", *wording.pairs(rows)]
        return [*lines, *_table(summary, models), "", *describe_plan(summary.plan)]

    rows["tensors"] = f"{summary.tensors:,}, of which {summary.unchanged_tensors:,} never changed"
    if summary.median_explained_variance is not None:
        share = wording.format_share(summary.median_explained_variance)
        rows["explained variance"] = f"{share}, median"
    if summary.median_r2 is not None:
        rows["R2 of the fit"] = f"{wording.format_figure(summary.median_r2)}, median"
    rows["read"] = wording.format_bytes(summary.bytes_read)
    rows["written"] = wording.format_bytes(summary.bytes_written)
    if summary.plan.devices is not None:
        rows["devices"] = ", ".join(summary.plan.devices.names)
    rows["peak memory"] = wording.format_bytes(summary.peak_memory_bytes)
    rows["elapsed"] = wording.format_duration(summary.elapsed_s)
    lines = [*wording.pairs(rows), *_table(summary, models)]
    if weights := _weights(summary, verbose=verbose):
        lines += ["", *weights]
    if verbose:
        lines += ["", *describe_plan(summary.plan), "", *_figures(summary)]
    return lines


def _is_sweep(summary: ModelsSummary) -> bool:
    """Say whether outputs differ in more than what names them in a single command."""
    return any(_OWN_OF_A_SWEEP & output.what.keys() for output in summary.outputs)


def _common(summary: ModelsSummary) -> str:
    """Return the directory that all outputs lie in."""
    return os.path.commonpath([output.path for output in summary.outputs])


def _models(summary: ModelsSummary, *, verbose: bool) -> list[tuple[str, str]]:
    """Return for each output what tells it from others, and where it is."""
    shown = summary.outputs if verbose else summary.outputs[:_MOST_OUTPUTS]
    rows = []
    for output in shown:
        inside = " (inside the history)" if output.inside_history else ""
        if _is_sweep(summary):
            # Directories tell them apart.
            chosen = output.what.get("damping_chosen")
            note = "" if chosen is None else f"damping {chosen:.3f} chosen"
            rows.append((os.path.relpath(output.path, _common(summary)), f"{note}{inside}"))
        else:
            rows.append((_label(summary, output), f"{output.path}{inside}"))
    if len(shown) < len(summary.outputs):
        more = len(summary.outputs) - len(shown)
        rows.append(("...", f"and {more} more (--verbose lists all)"))
    return rows


def _table(summary: ModelsSummary, models: list[tuple[str, str]]) -> list[str]:
    """Return the outputs of a sweep."""
    if not _is_sweep(summary):
        return []
    return ["", *wording.table(("model", ""), models, "ll")]


def _label(summary: ModelsSummary, output: Output) -> str:
    """Return what tells an output from the others of a command."""
    what = output.what
    if "recipe" in what:
        return str(what["recipe"])
    parts = [f"step {what['target_step'] if 'target_step' in what else what['step']}"]
    for name in ("rank", "damping", "anchor"):
        if len({str(each.what.get(name)) for each in summary.outputs}) > 1:
            value = what[name]
            parts.append(f"{name} {f'{value:g}' if isinstance(value, float) else value}")
            if name == "damping" and "damping_chosen" in what:
                parts[-1] += f" ({what['damping_chosen']:.3f})"
    if "damping_chosen" in what and not any(part.startswith("damping") for part in parts):
        parts.append(f"damping {what['damping_chosen']:.3f} chosen")
    return ", ".join(parts)


def _method(summary: ModelsSummary) -> str:
    settings = summary.settings
    if "method" not in settings:
        methods = dict.fromkeys(output.what["method"] for output in summary.outputs)
        return "; ".join(methods)
    if "svd" not in settings or "group_by" not in settings:
        return str(settings["method"])
    ranks = sorted({output.what["rank"] for output in summary.outputs})
    parts = [f"rank {', '.join(map(str, ranks))}", f"{settings['svd']} SVD"]
    if settings["group_by"] != "tensor":
        parts[0] += f" of each {settings['group_by']}"
    if settings["svd"] == "randomized" and "power_iterations" in settings:
        passes = wording.format_count(settings["power_iterations"], "power iteration")
        parts[-1] += f" with {passes}"
    if settings.get("fit"):
        parts.append(f"{settings['fit']} fit")
        if settings.get("window"):
            parts[-1] += f" of the last {settings['window']} checkpoints"
        if settings.get("refit_every"):
            parts[-1] += f", again every {wording.format_count(settings['refit_every'], 'step')}"
    if settings.get("compat"):
        parts.append("as the scripts of RELEX's authors")
    return ", ".join(parts)


def _weights(summary: ModelsSummary, *, verbose: bool) -> list[str]:
    """Return a table of the effective weights of combinations."""
    rows: list[tuple[str, str, str]] = []
    for output in summary.outputs:
        steps = dict(output.what.get("weights", {}))
        if not steps:
            continue
        recipe = output.what["recipe"]
        rows.append((recipe, "base", f"{steps.pop('base'):.6g}"))
        by_weight = sorted(steps, key=lambda step: -abs(steps[step]))
        shown = set(by_weight if verbose else by_weight[:_MOST_WEIGHTS])
        rows += [(recipe, f"step {each}", f"{steps[each]:.6g}") for each in steps if each in shown]
        if rest := [steps[each] for each in steps if each not in shown]:
            rows.append((recipe, f"{len(rest)} others", f"{sum(rest):.6g}"))
    return wording.table(("recipe", "checkpoint", "weight"), rows, "llr") if rows else []


def _figures(summary: ModelsSummary) -> list[str]:
    name = summary.settings.get("group_by", "tensor")
    return wording.table(
        (name, "singular values", "explained variance", "R2"),
        [
            (
                each.name,
                " ".join(f"{value:.3g}" for value in each.singular_values),
                wording.format_share(each.explained_of()),
                " ".join(wording.format_figure(value) for value in each.r2),
            )
            for each in summary.figures
        ],
        "lrrr",
    )
