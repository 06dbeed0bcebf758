"""The ``memory`` command: peak resident memory of every command, beside what it projected.

Against the size of the model, the number of checkpoints and ``--memory-limit``, on generated
trajectories that are deleted in turn; or on a model and checkpoints of your own. Each command is a
whole process, sampled from outside.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from benchmarks.commands import (
    MEMORY_LIMIT,
    ModelSize,
    document,
    remove,
    run,
    work_directory,
)
from benchmarks.processes import BenchmarkError, Measurement, directory_bytes
from benchmarks.report import Report, median, publish, report_options
from benchmarks.trajectory import PRESETS, Preset, write_base, write_step, write_steps

LIMITS = ("256MiB", "384MiB", "512MiB", "768MiB", "1GiB")
COMMANDS = ("build-store", "extrapolate", "extrapolate --svd exact", "export", "verify")

_DISK_SHARE = 0.8
"""Of the free disk that a generated trajectory may take; a larger one is made step by step."""


@dataclass
class Source:
    """A base model and checkpoints, and where the commands write.

    ``grow`` makes the checkpoints one by one, calling its argument after each, when they do not
    fit the disk together. ``weights`` and ``steps`` are known once a store has been built.
    """

    base: Path
    checkpoints: Path
    work: Path
    pattern: str | None = None
    grow: Callable[[Callable[[], None]], None] | None = None
    weights: int | None = None
    steps: Sequence[int] = ()

    @property
    def store(self) -> Path:
        return self.work / "store"


@dataclass
class Peak:
    """What the runs of one command took."""

    command: str
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def widest(self) -> Measurement:
        return max(self.measurements, key=lambda one: one.peak_rss_bytes)


def measure_commands(source: Source, *, runs: int, options: Sequence[object] = ()) -> list[Peak]:
    """Run all commands on a trajectory; what they write is deleted, but for the store.

    A command that refuses its memory limit has no measurements.
    """
    build = _build(source, runs=runs, options=options)
    if not build.measurements:
        return [build]
    # Not the build's own list: of a grown store that has the last append alone.
    info = document(run("info", "info", source.store))
    source.weights = info["weights"]
    source.steps = [step["step"] for step in info["steps"]]
    last = source.steps[-1]
    out = source.work / "out"
    target = ("--target-step", 2 * last)
    base = ("--base", source.base)
    # `verify` takes no memory limit.
    calls: list[tuple[str, Sequence[object]]] = [
        ("extrapolate", ("extrapolate", source.store, out, *target, *base, *options)),
        (
            "extrapolate --svd exact",
            ("extrapolate", source.store, out, *target, *base, "--svd", "exact", *options),
        ),
        ("export", ("export", source.store, out, "--step", last, *base, *options)),
        ("verify", ("verify", source.store, *_workers_of(options))),
    ]
    peaks = [build]
    for name, arguments in calls:
        peak = Peak(name)
        for _ in range(runs):
            found = _run_or_refused(name, arguments, output=out)
            if found is not None:
                peak.measurements.append(found)
        remove(out)
        peaks.append(peak)
    return peaks


def _build(source: Source, *, runs: int, options: Sequence[object]) -> Peak:
    pattern = ("--pattern", source.pattern) if source.pattern else ()
    arguments = (
        "build-store",
        source.base,
        source.checkpoints,
        source.store,
        *pattern,
        *options,
    )
    peak = Peak("build-store")

    def build(output: Path | None) -> None:
        found = _run_or_refused("build-store", arguments, output=output)
        if found is not None:
            peak.measurements.append(found)

    if source.grow is None:
        for _ in range(runs):
            build(source.store)
    else:
        remove(source.store)
        source.grow(lambda: build(None))
    return peak


def _run_or_refused(
    name: str, arguments: Sequence[object], *, output: Path | None
) -> Measurement | None:
    try:
        return run(name, *arguments, output=output)
    except BenchmarkError as error:
        if "raise --memory-limit" in str(error):
            return None
        raise


def _workers_of(options: Sequence[object]) -> tuple[object, ...]:
    words = list(options)
    if "--workers" not in words:
        return ()
    place = words.index("--workers")
    return tuple(words[place : place + 2])


def rows_of(
    part: str, source: Source, peaks: Sequence[Peak], *, limit_bytes: int | None
) -> list[dict[str, Any]]:
    """Return a row per command."""
    rows = []
    for peak in peaks:
        row: dict[str, Any] = {
            "part": part,
            "command": peak.command,
            "weights": source.weights,
            "checkpoints": len(source.steps) or None,
            # `verify` takes none.
            "limit_bytes": limit_bytes if peak.command != "verify" else None,
        }
        if peak.measurements:
            row |= _figures(peak)
        else:
            row |= {"outcome": "refused"}
        rows.append(row)
    return rows


def _figures(peak: Peak) -> dict[str, Any]:
    widest = peak.widest
    found = document(widest)
    # `export` and `verify` print no plan.
    plan = found.get("plan") or {}
    projected = plan.get("projected_bytes")
    outcome = ""
    if projected is not None:
        outcome = "within" if widest.peak_rss_bytes <= projected else "ABOVE THE PROJECTION"
    limit = {"limit_bytes": plan["memory_limit_bytes"]} if plan else {}
    return limit | {
        "workers": plan.get("workers"),
        "projected_bytes": projected,
        "peak_rss_bytes": widest.peak_rss_bytes,
        "own_count_bytes": found.get("peak_memory_bytes"),
        "wall_s": median(one.wall_s for one in peak.measurements),
        "outcome": outcome,
        "samples": [list(sample) for sample in widest.samples],
    }


# --- generated trajectories ----------------------------------------------------------------------


def generated(work: Path, preset: Preset, steps: int, dtype: str) -> Source:
    """Write a trajectory, or only its base where all of it would not fit the disk."""
    work.mkdir(parents=True, exist_ok=True)
    model_bytes = preset.weights * (2 if dtype == "bf16" else 4)
    # The base, the checkpoints and one output.
    fits = (steps + 2) * model_bytes <= _DISK_SHARE * shutil.disk_usage(work).free
    if fits:
        write_steps(work, preset, range(steps + 1), dtype=dtype)
        return Source(work / "base", work / "checkpoints", work)
    write_base(work, preset, dtype=dtype)

    def grow(build: Callable[[], None]) -> None:
        for step in range(1, steps + 1):
            directory = write_step(work, preset, step, dtype=dtype)
            build()
            remove(directory)

    return Source(work / "base", work / "checkpoints", work, grow=grow)


def _sweep(
    report: Report,
    directory: Path,
    *,
    sizes: Sequence[Preset],
    size_steps: int,
    steps: Sequence[int],
    steps_size: Preset,
    limits: Sequence[int],
    dtype: str,
    runs: int,
    options: Sequence[object],
) -> None:
    def add(part: str, source: Source, *, limit_bytes: int | None = None) -> None:
        given = () if limit_bytes is None else ("--memory-limit", limit_bytes)
        peaks = measure_commands(source, runs=runs, options=(*given, *options))
        for row in rows_of(part, source, peaks, limit_bytes=limit_bytes):
            report.add(row)

    for preset in sizes:
        source = generated(directory / preset.name, preset, size_steps, dtype)
        add("size", source)
        if preset is sizes[-1]:
            if source.grow is None:
                for limit_bytes in limits:
                    add("limit", source, limit_bytes=limit_bytes)
            else:
                report.note(
                    f"{preset.name}: checkpoints were made, appended and deleted one by one; "
                    "the figures of build-store are those of its widest append."
                )
                if limits:
                    report.note("Limits were left out: they need a size that fits the disk.")
        remove(source.work)
    for count in steps:
        source = generated(directory / f"{count}-steps", steps_size, count, dtype)
        add("checkpoints", source)
        remove(source.work)


def _warm_up(directory: Path) -> None:
    """Run each kernel once: the very first run of all compiles them and holds more."""
    source = generated(directory / "warm-up", PRESETS["tiny"], 2, "bf16")
    measure_commands(source, runs=1)
    remove(source.work)


@click.command("memory", context_settings={"default_map": {"runs": 1}})
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Measure on this model, with --checkpoints, instead of generated ones.",
)
@click.option(
    "--checkpoints",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory that holds your checkpoints.",
)
@click.option("--pattern", help="Names of your checkpoints, as for build-store.")
@click.option(
    "--size",
    "sizes",
    type=ModelSize(),
    multiple=True,
    default=("20M", "80M", "320M"),
    help="Weights of a generated model (20M to 8B), or a preset; several times for several.",
)
@click.option(
    "--size-steps",
    type=click.IntRange(min=2),
    default=4,
    help="Checkpoints of the models of --size.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    multiple=True,
    default=(5, 20, 50, 100, 200),
    help="Numbers of checkpoints to compare, 2 or more; 0 for none.",
)
@click.option(
    "--steps-size", type=ModelSize(), default="10M", help="Weights of the model of --steps."
)
@click.option(
    "--memory-limit",
    "limits",
    type=MEMORY_LIMIT,
    multiple=True,
    default=LIMITS,
    help="Limits to compare, on the last --size; several times for several. On your own model only "
    "those that are named are compared.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Passed on.  [default: one per core]")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", help="Of generated models."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to generate and to write: needs room for a trajectory, or for the store and one "
    "output of your model.  [default: the system's temporary directory]",
)
@click.option(
    "--warm-up/--no-warm-up",
    default=True,
    help="First run every command once on a tiny model, unmeasured, so that the kernels are "
    "compiled.",
)
@report_options
@click.pass_context
def command(
    ctx: click.Context,
    *,
    base: Path | None,
    checkpoints: Path | None,
    pattern: str | None,
    sizes: tuple[Preset, ...],
    size_steps: int,
    steps: tuple[int, ...],
    steps_size: Preset,
    limits: tuple[int, ...],
    workers: int | None,
    dtype: str,
    directory: Path | None,
    warm_up: bool,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measure the peak memory of every command, against size, checkpoints and limit.

    With --base and --checkpoints: on your own model, which is only read.
    """
    if (base is None) != (checkpoints is None):
        raise click.UsageError("--base and --checkpoints go together")
    if 1 in steps:
        raise click.UsageError("nothing can be extrapolated from 1 checkpoint; take 2 or more")
    options = () if workers is None else ("--workers", workers)
    with work_directory(directory) as work:
        if warm_up:
            _warm_up(work)
        if base is not None and checkpoints is not None:
            report = Report(
                "Peak memory on your own checkpoints",
                "memory",
                {"base": base, "checkpoints": checkpoints, "workers": workers},
            )
            source = Source(base.resolve(), checkpoints.resolve(), work / "own", pattern)
            source.work.mkdir()
            named = ctx.get_parameter_source("limits") is ParameterSource.COMMANDLINE
            for limit_bytes in (None, *(limits if named else ())):
                given = () if limit_bytes is None else ("--memory-limit", limit_bytes)
                peaks = measure_commands(source, runs=runs, options=(*given, *options))
                part = "own" if limit_bytes is None else "own, limit"
                for row in rows_of(part, source, peaks, limit_bytes=limit_bytes):
                    report.add(row)
            store_bytes = directory_bytes(source.store) if source.store.exists() else 0
            report.note(f"The store takes {store_bytes / 2**20:,.1f} MiB.")
        else:
            report = Report(
                "Peak memory of whole processes",
                "memory",
                {
                    "sizes": [preset.weights for preset in sizes],
                    "size_steps": size_steps,
                    "steps": steps,
                    "steps_size": steps_size.weights,
                    "limits": limits,
                    "dtype": dtype,
                    "workers": workers,
                },
            )
            _sweep(
                report,
                work,
                sizes=sizes,
                size_steps=size_steps,
                steps=[count for count in steps if count],
                steps_size=steps_size,
                limits=limits,
                dtype=dtype,
                runs=runs,
                options=options,
            )
    report.note(
        "limit: given, or the default. projected: by the command itself, before the work, for the "
        "worst content (export and verify print no projection). peak rss: the most that the "
        f"process held in {runs} run(s), sampled every 5 ms from outside and by the kernel's own "
        "high-water mark. own count: what the command says it held."
    )
    above = [row for row in report.rows if row["outcome"].startswith("ABOVE")]
    if above:
        report.note(f"{len(above)} run(s) held more than projected.")
    publish(report, json_path=json_path, markdown=markdown)
