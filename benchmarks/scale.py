"""The ``scale`` command: workers, cost against checkpoints and size, and what that means elsewhere.

A model of cost is fitted to many small runs of one worker: seconds per byte read, per changed
weight, per tensor and step, and to start. It is then held against a run that is larger than all
that it was fitted to, and carried on to models that do not fit here. The prediction for a node
takes the longer of computing and waiting for the disk; both are stated with what they assume.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.commands import (
    ModelSize,
    document,
    program,
    relex,
    remove,
    run,
    set_aside,
    work_directory,
)
from benchmarks.processes import (
    Measurement,
    Program,
    alternate,
    directory_bytes,
    evict,
)
from benchmarks.report import Report, median, publish, report_options
from benchmarks.trajectory import PRESETS, Preset, write_steps
from relex_stream import planner
from relex_stream.machine import usable_cores

BLOCK_ELEMENTS = 1 << 20
"""Of a bf16 block in the store."""

POWER_PASSES = 1
"""Of an extrapolation by default; the store and the base are read once more for the sum."""


# --- a model of cost -----------------------------------------------------------------------------

FEATURES = {
    "build-store": ("bytes read", "changed weight", "replayed weight", "tensor and step"),
    "extrapolate": ("bytes of the model", "changed weight", "tensor and step"),
}
"""What cost is counted by; a replayed weight is a stored change that an append reads again."""

Work = Mapping[str, float]
"""How much of each feature a run has."""


STATISTICS_BYTES = planner.statistics_bytes(planner.DEFAULT_LIMIT_BYTES)
"""Statistics of one commit under the default memory limit."""


@dataclass(frozen=True)
class CostModel:
    """Seconds that one worker takes.

    Attributes
    ----------
    start_s : float
        From the start of the process to the work: interpreter and imports.
    fixed_s : float
        Of the work, whatever its size.
    per_unit_s : mapping
        By feature.
    worst_share : float
        Largest error of the fit, as a share of the whole process measured.
    """

    start_s: float
    fixed_s: float
    per_unit_s: Mapping[str, float]
    worst_share: float = 0.0

    def parallel_s(self, work: Work) -> float:
        """Return what workers can share."""
        return sum(seconds * work[name] for name, seconds in self.per_unit_s.items())

    def predict_s(self, work: Work, *, speedup: float = 1.0, waiting_s: float = 0.0) -> float:
        """Return the time of a whole process that also waits so long for the disk meanwhile."""
        return self.start_s + self.fixed_s + max(self.parallel_s(work) / speedup, waiting_s)


def fit_cost(
    names: Sequence[str],
    works: Sequence[Work],
    elapsed_s: Sequence[float],
    *,
    start_s: float,
) -> CostModel:
    """Fit by least squares of errors relative to the whole process, no coefficient below zero.

    With so few features every choice of those that are not zero is tried: the best of the
    solutions without a negative is the constrained optimum.
    """
    seconds = np.asarray(elapsed_s, np.float64)
    columns = np.array([[1.0, *(work[name] for name in names)] for work in works])
    sizes = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    wall_s = start_s + seconds
    rows, wanted = columns / sizes / wall_s[:, None], seconds / wall_s
    best, best_error = np.zeros(len(sizes)), float("inf")
    for count in range(1, len(sizes) + 1):
        for chosen in itertools.combinations(range(len(sizes)), count):
            found, *_ = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)
            error = float(np.square(rows[:, chosen] @ found - wanted).sum())
            if found.min() >= 0 and error < best_error - 1e-12:
                best, best_error = np.zeros(len(sizes)), error
                best[list(chosen)] = found
    worst = float(np.abs(rows @ best - wanted).max())
    scaled = best / sizes
    return CostModel(
        start_s, float(scaled[0]), dict(zip(names, scaled[1:].tolist(), strict=True)), worst
    )


@dataclass(frozen=True)
class Line:
    """A line by least squares, and the exponent of a power law by least squares of logarithms."""

    slope: float
    intercept: float
    r2: float
    exponent: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line and a power law to at least two points."""
    slope, intercept = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = np.asarray(y) - np.mean(y)
    exponent, _ = np.polyfit(np.log(x), np.log(y), 1)
    r2 = 1 - float(left @ left) / max(float(spread @ spread), 1e-300)
    return Line(float(slope), float(intercept), r2, float(exponent))


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Both commands over the same checkpoints, with one number of workers."""

    part: str
    label: str
    steps: str
    """As for ``--steps``."""
    workers: int = 1
    appended_to: str | None = None
    """Steps that are in the store before."""


@dataclass(frozen=True)
class Result:
    """The medians of one command at one point."""

    part: str
    command: str
    weights: int
    checkpoints: int
    tensors: int
    workers: int
    work: Work
    wall_s: float
    elapsed_s: float

    def row(self, predicted_s: float | None) -> dict[str, Any]:
        return {
            "part": self.part,
            "command": self.command,
            "weights": self.weights,
            "checkpoints": self.checkpoints,
            "tensors": self.tensors,
            "workers": self.workers,
            "in_process_s": self.elapsed_s,
            "wall_s": self.wall_s,
            "predicted_s": predicted_s,
            "measured / predicted": None if predicted_s is None else self.wall_s / predicted_s,
            "work": dict(self.work),
        }


def run_points(root: Path, points: Sequence[Point], *, runs: int) -> list[Result]:
    """Measure builds of all points in turn, then extrapolations from what they built."""
    base, checkpoints = root / "base", root / "checkpoints"
    builds, extrapolations = [], []
    for point in points:
        store, out = root / f"{point.label}.store", root / f"{point.label}.out"
        options = _worker_options(point.workers)
        build = ("build-store", base, checkpoints, store, "--steps", point.steps, *options)
        if point.appended_to is None:
            builds.append(program(point.label, *build, output=store))
            target = ("extrapolate", store, out, "--target-step", 1000, *options)
            extrapolations.append(program(point.label, *target, output=out))
        else:
            builds.append(_append(point, store, base, checkpoints, relex(*build)))
    built = alternate(builds, runs=runs)
    predicted = alternate(extrapolations, runs=runs)
    results = []
    for point in points:
        facts = _Facts.of(root / f"{point.label}.store", base)
        results.append(facts.build(point, built[point.label]))
        if point.label in predicted:
            results.append(facts.extrapolation(point, predicted[point.label]))
    for point in points:
        set_aside(root / f"{point.label}.store")
        set_aside(root / f"{point.label}.out")
    return results


def _worker_options(workers: int) -> tuple[object, ...]:
    # Room for any number of workers: it is their speed that is measured here.
    return ("--workers", workers, "--memory-limit", f"{1 + workers // 4}GiB")


def _append(
    point: Point, store: Path, base: Path, checkpoints: Path, argv: tuple[str, ...]
) -> Program:
    """Return a build of a store that has the first steps already: a copy, made before each run."""
    begun = store.with_suffix(".begun")

    def prepare() -> None:
        if not begun.exists():
            run("begin", "build-store", base, checkpoints, begun, "--steps", point.appended_to)
        set_aside(store)
        shutil.copytree(begun, store)

    return Program(point.label, argv, prepare)


@dataclass(frozen=True)
class _Facts:
    """What a store says about the work that made it."""

    weights: int
    tensors: int
    changed: Sequence[int]
    source_bytes: Sequence[int]
    base_bytes: int

    @classmethod
    def of(cls, store: Path, base: Path) -> _Facts:
        info = document(run("info", "info", store))
        return cls(
            weights=info["weights"],
            tensors=info["tensors"],
            changed=[step["changed_weights"] for step in info["steps"]],
            source_bytes=[step["source_bytes"] for step in info["steps"]],
            base_bytes=directory_bytes(base),
        )

    def build(self, point: Point, measurements: Sequence[Measurement]) -> Result:
        added = len(document(measurements[0])["steps_added"])
        before = len(self.changed) - added
        work = build_work(
            base_bytes=self.base_bytes,
            checkpoint_bytes=sum(self.source_bytes[before:]) / added,
            changed=sum(self.changed[before:]) / added,
            steps=added,
            shape=model_shape(self.weights, self.tensors),
            rows=before,
            stored_changes=sum(self.changed[:before]),
        )
        return self._result("build-store", point, added, work, measurements)

    def extrapolation(self, point: Point, measurements: Sequence[Measurement]) -> Result:
        work = extrapolate_work(
            base_bytes=self.base_bytes,
            changed=sum(self.changed),
            tensors=self.tensors,
            steps=len(self.changed),
        )
        return self._result("extrapolate", point, len(self.changed), work, measurements)

    def _result(
        self,
        command: str,
        point: Point,
        checkpoints: int,
        work: Work,
        measurements: Sequence[Measurement],
    ) -> Result:
        return Result(
            part=point.part,
            command=command,
            weights=self.weights,
            checkpoints=checkpoints,
            tensors=self.tensors,
            workers=point.workers,
            work=work,
            wall_s=median(one.wall_s for one in measurements),
            elapsed_s=median(document(one)["elapsed_s"] for one in measurements),
        )


# --- work, and the planner's arithmetic ----------------------------------------------------------


def model_shape(weights: float, tensors: int) -> planner.ModelShape:
    """Return a bf16 model as the planner sees it, with every tensor sketched."""
    return planner.ModelShape(
        tensors=tensors,
        sketched=tensors,
        blocks=int(weights / BLOCK_ELEMENTS + tensors / 2) + 1,
        largest_block=BLOCK_ELEMENTS,
        largest_block_bytes=2 * BLOCK_ELEMENTS,
        sketch_width=256,
    )


def build_work(
    *,
    base_bytes: float,
    checkpoint_bytes: float,
    changed: float,
    steps: int,
    shape: planner.ModelShape,
    rows: int = 0,
    stored_changes: float = 0.0,
) -> Work:
    """Return the work of adding `steps` checkpoints to a store of `rows`.

    A commit after the first reads the base and the stored changes once more.
    """
    read = changed_weights = replayed = 0.0
    tensor_steps = shape.tensors * steps
    while steps:
        batch = planner.commit_batch(shape, int(checkpoint_bytes), rows, steps, STATISTICS_BYTES)
        read += base_bytes + batch * checkpoint_bytes
        replayed += stored_changes
        changed_weights += batch * changed
        stored_changes += batch * changed
        rows += batch
        steps -= batch
    return {
        "bytes read": read,
        "changed weight": changed_weights,
        "replayed weight": replayed,
        "tensor and step": tensor_steps,
    }


def extrapolate_work(*, base_bytes: float, changed: float, tensors: int, steps: int) -> Work:
    """Return the work of an extrapolation to one target, by the default route."""
    return {
        "bytes of the model": base_bytes,
        "changed weight": changed,
        "tensor and step": tensors * steps,
    }


def shared_bytes(command: str, shape: planner.ModelShape, steps: int, model_bytes: float) -> int:
    """Return what the planner counts once, however many the workers, for `steps` in the store."""
    if command == "extrapolate":
        return planner.extrapolate_shared_bytes(shape, steps, 1, 8, 1, shape.tensors)
    batch = planner.commit_batch(shape, int(model_bytes), 0, steps, STATISTICS_BYTES)
    return planner.ingest_shared_bytes(
        shape, batch, steps - batch, planner.SUM_TREE_ALIVE, shape.tensors
    )


# --- projections ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A model that does not fit here."""

    name: str
    weights: float
    tensors: int


TARGETS = (
    Target("8B", 8.2e9, 399),
    Target("70B", 70.6e9, 723),
    Target("1T", 1.0e12, 70_000),
)
"""Tensors as in Qwen3-8B, Llama-3-70B, and a mixture of 61 layers of 384 experts."""


@dataclass(frozen=True)
class Node:
    """A machine: cores, and bytes per second of its disk."""

    cores: int
    read_per_s: float
    write_per_s: float


@dataclass(frozen=True)
class Basis:
    """What a projection rests on, all of it measured here."""

    models: Mapping[str, CostModel]
    gains: Mapping[str, float]
    """By command, what each further worker adds to the speed of one."""
    change_share: float
    bits_per_change: float
    plans: Mapping[str, Mapping[str, Any]]
    """By command, the plan that it printed."""

    def speedup(self, command: str, workers: int) -> float:
        return 1 + (workers - 1) * self.gains[command]


def project(basis: Basis, target: Target, node: Node, steps: int) -> list[dict[str, Any]]:
    """Return a row per command: time, memory at so many workers, and the store."""
    model_bytes = 2 * target.weights
    changed = basis.change_share * target.weights
    store_bytes = basis.bits_per_change / 8 * changed * steps
    shape = model_shape(target.weights, target.tensors)
    works = {
        "build-store": build_work(
            base_bytes=model_bytes,
            checkpoint_bytes=model_bytes,
            changed=changed,
            steps=steps,
            shape=shape,
        ),
        "extrapolate": extrapolate_work(
            base_bytes=model_bytes, changed=changed * steps, tensors=target.tensors, steps=steps
        ),
    }
    passes = 1 + POWER_PASSES
    waiting = {
        "build-store": works["build-store"]["bytes read"] / node.read_per_s
        + store_bytes / node.write_per_s,
        "extrapolate": passes * (model_bytes + store_bytes) / node.read_per_s
        + model_bytes / node.write_per_s,
    }
    rows = []
    for name, work in works.items():
        model, plan = basis.models[name], basis.plans[name]
        speedup = basis.speedup(name, node.cores)
        per_worker = max(stage["worker_bytes"] for stage in plan["stages"])
        shared = shared_bytes(name, shape, steps, model_bytes)
        room = planner.DEFAULT_LIMIT_BYTES - plan["reserved_bytes"] - shared
        rows.append(
            {
                "part": "projection",
                "command": name,
                "weights": int(target.weights),
                "checkpoints": steps,
                "tensors": target.tensors,
                "workers": node.cores,
                "predicted_s": model.predict_s(work, speedup=speedup, waiting_s=waiting[name]),
                "bound by": (
                    "disk" if waiting[name] > model.parallel_s(work) / speedup else "cores"
                ),
                "memory_bytes": plan["reserved_bytes"] + shared + node.cores * per_worker,
                "fit 768 MiB": max(0, room // per_worker),
                "store GB": store_bytes / 1e9,
                "work": dict(work),
            }
        )
    return rows


def read_bandwidth(files: Sequence[Path], threads: int) -> float:
    """Return the bytes per second at which files that are not in memory are read."""
    evict(files)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(_read, files))
    return total / (time.perf_counter() - started)


def _read(path: Path) -> int:
    room = bytearray(8 << 20)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while count := os.preadv(descriptor, [room], offset):
            offset += count
    finally:
        os.close(descriptor)
    return offset


# --- the command ---------------------------------------------------------------------------------


def many_tensors(weights: float) -> Preset:
    """Return a mixture of experts of about so many weights, most of them in small matrices."""
    config = dict(PRESETS["moe-30k"].config)
    if weights < 20e6:
        config |= {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 512}
        config |= {"head_dim": 16, "num_experts": 64}
    per_layer = 3 * config["num_experts"] * config["hidden_size"] * config["moe_intermediate_size"]
    embedding = config["vocab_size"] * config["hidden_size"]
    config["num_hidden_layers"] = max(1, round((weights - embedding) / per_layer))
    return replace(PRESETS["moe-30k"], name="many-tensors", config=config)


def _worker_counts(most: int) -> list[int]:
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return sorted({*counts, most})


def _points_of_main(steps: int, counts: Sequence[int], workers: int) -> list[Point]:
    """Return what is run on the main trajectory.

    Steps with a stride have more changes in as many bytes, and appends read stored changes again:
    without them the costs per byte and per change could not be told apart.
    """
    points = [Point("checkpoints", f"first-{count}", f"1:{count}") for count in counts]
    stride = max(2, steps // 10)
    points.append(Point("stride", f"every-{stride}", f"{stride}:{steps}:{stride}"))
    half = steps // 2
    points.append(Point("append", "append", f"{half + 1}:{steps}", appended_to=f"1:{half}"))
    # One worker has been measured as the longest of the first.
    points += [
        Point("workers", f"{count}-workers", f"1:{steps}", count)
        for count in _worker_counts(workers)
        if count > 1
    ]
    return points


def _gains(
    results: Sequence[Result], steps: int, models: Mapping[str, CostModel]
) -> dict[str, float]:
    """Return what each further worker added, at the most workers there were, to what they share."""
    gains = {}
    for name, model in models.items():
        runs = [
            result
            for result in results
            if result.command == name
            and result.checkpoints == steps
            and result.part in ("checkpoints", "workers")
        ]
        one = next(result for result in runs if result.workers == 1)
        most = max(runs, key=lambda result: result.workers)
        # What one worker does alone, whatever their number, is not theirs to share.
        alone_s = min(model.fixed_s, 0.5 * most.elapsed_s)
        speedup = (one.elapsed_s - alone_s) / (most.elapsed_s - alone_s)
        gain = (speedup - 1) / (most.workers - 1) if most.workers > 1 else 1.0
        gains[name] = min(1.0, max(0.0, gain))
    return gains


def _line_notes(results: Sequence[Result]) -> list[str]:
    notes = []
    for part, of, unit, scale in (
        ("checkpoints", "checkpoints", "checkpoint", 1.0),
        ("size", "weights", "10^9 weights", 1e9),
    ):
        for name in FEATURES:
            runs = [one for one in results if one.part == part and one.command == name]
            if len({getattr(one, of) for one in runs}) < 2:
                continue
            line = fit_line(
                [getattr(one, of) / scale for one in runs], [one.elapsed_s for one in runs]
            )
            notes.append(
                f"{name} against {of}, one worker, in process: {line.slope:.3g} s per {unit} and "
                f"{line.intercept:.3g} s (linear least squares, R2 {line.r2:.4f}); as a power law "
                f"the exponent is {line.exponent:.2f} (least squares of logarithms)."
            )
    return notes


def _model_note(name: str, model: CostModel) -> str:
    parts = [
        f"{seconds * 1e9:.3g} ns per {feature.removesuffix(' read').replace('bytes', 'byte')}"
        for feature, seconds in model.per_unit_s.items()
    ]
    return (
        f"{name}, one worker: {model.start_s:.2f} s to start the process, {model.fixed_s:.2f} s to "
        f"begin, {', '.join(parts)} (least squares of errors relative to the whole "
        f"process, none negative; largest error {100 * model.worst_share:.0f} %)."
    )


@dataclass(frozen=True)
class _Check:
    """The larger run that predictions are held against."""

    root: Path
    out: Path
    cold: bool
    workers: int

    def results(self) -> tuple[list[Result], float]:
        """Run both commands once; return what they took, and seconds per byte of waiting."""
        base, checkpoints = self.root / "base", self.root / "checkpoints"
        waiting_s_per_byte = 0.0
        if self.cold:
            files = sorted(next(checkpoints.iterdir()).rglob("*.safetensors"))
            waiting_s_per_byte = 1 / read_bandwidth(files, self.workers)
        store, out = self.out / "check.store", self.out / "check.out"
        point = Point("check", "check", "", self.workers)
        options = _worker_options(self.workers)
        if self.cold:
            evict([base, checkpoints])
        build = run("build-store", "build-store", base, checkpoints, store, *options)
        facts = _Facts.of(store, base)
        if self.cold:
            evict([base, store])
        target = ("extrapolate", store, out, "--target-step", 100_000, *options)
        prediction = run("extrapolate", *target)
        results = [facts.build(point, [build]), facts.extrapolation(point, [prediction])]
        return results, waiting_s_per_byte


@click.command("scale", context_settings={"default_map": {"runs": 3}})
@click.argument(
    "run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False
)
@click.option(
    "--size", type=ModelSize(), default="40M", help="Weights of the main trajectory, or a preset."
)
@click.option(
    "--steps", type=click.IntRange(min=8), default=48, help="Checkpoints of the main trajectory."
)
@click.option(
    "--other-size",
    "other_sizes",
    type=ModelSize(),
    multiple=True,
    default=("10M", "20M", "80M", "160M"),
    help="Further sizes, for cost against size; several times for several.",
)
@click.option(
    "--size-steps", type=click.IntRange(min=2), default=8, help="Checkpoints of further sizes."
)
@click.option(
    "--many-tensors",
    "many",
    type=ModelSize(),
    default="40M",
    help="Weights of a mixture of experts, for the cost per tensor.",
)
@click.option("--max-workers", type=click.IntRange(min=1), help="[default: cores]")
@click.option(
    "--check-size",
    type=ModelSize(),
    default="320M",
    help="Weights of the run that predictions are held against, where no RUN_DIR is given.",
)
@click.option("--check-steps", type=click.IntRange(min=2), default=12, help="Its checkpoints.")
@click.option("--cold", is_flag=True, help="Take that run's files out of the page cache before.")
@click.option("--node-cores", type=click.IntRange(min=1), default=32)
@click.option("--node-read-gb-s", type=float, default=5.0, help="Of its disk, in 10^9 bytes.")
@click.option("--node-write-gb-s", type=float, default=2.0)
@click.option("--node-steps", type=click.IntRange(min=2), default=100, help="Checkpoints.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to generate.  [default: the system's temporary directory]",
)
@report_options
def command(
    *,
    run_dir: Path | None,
    size: Preset,
    steps: int,
    other_sizes: tuple[Preset, ...],
    size_steps: int,
    many: Preset,
    max_workers: int | None,
    check_size: Preset,
    check_steps: int,
    cold: bool,
    node_cores: int,
    node_read_gb_s: float,
    node_write_gb_s: float,
    node_steps: int,
    directory: Path | None,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measure workers, checkpoints and size; project the cost of 8B, 70B and 1T weights.

    RUN_DIR, if given, holds base/ and checkpoints/ as `trajectory` writes them: the largest run
    that fits here, which the prediction is held against.
    """
    workers = max_workers or usable_cores()
    node = Node(node_cores, node_read_gb_s * 1e9, node_write_gb_s * 1e9)
    report = Report(
        "Cost against workers, checkpoints and size; predictions",
        "scale",
        {
            "weights": size.weights,
            "steps": steps,
            "other_weights": [preset.weights for preset in other_sizes],
            "size_steps": size_steps,
            "node": {
                "cores": node_cores,
                "read_gb_s": node_read_gb_s,
                "write_gb_s": node_write_gb_s,
            },
            "cold": cold,
        },
    )
    with work_directory(directory) as work:
        results, basis = _measure_here(
            work,
            size=size,
            steps=steps,
            others=[(preset, size_steps, "size") for preset in other_sizes]
            + [(many_tensors(many.weights), size_steps, "tensors")],
            workers=workers,
            runs=runs,
        )
        for result in results:
            report.add(result.row(_predicted_s(basis, result)))
        root = run_dir
        if root is None:
            root = work / "check"
            write_steps(root, check_size, range(check_steps + 1))
        checked, waiting_s_per_byte = _Check(root, work, cold, workers).results()
    for result in checked:
        report.add(result.row(_predicted_s(basis, result, waiting_s_per_byte)))
    for target in TARGETS:
        for row in project(basis, target, node, node_steps):
            report.add(row)
    for text in [
        *_line_notes(results),
        *(_model_note(name, basis.models[name]) for name in FEATURES),
        _check_note(checked, waiting_s_per_byte),
        _node_note(basis, node),
    ]:
        report.note(text)
    publish(report, json_path=json_path, markdown=markdown)


def _measure_here(
    work: Path,
    *,
    size: Preset,
    steps: int,
    others: Sequence[tuple[Preset, int, str]],
    workers: int,
    runs: int,
) -> tuple[list[Result], Basis]:
    """Run everything that the model of cost is fitted to, and fit it."""
    root = work / "main"
    write_steps(root, size, range(steps + 1))
    counts = sorted({max(2, steps // divisor) for divisor in (8, 4, 2, 1)})
    points = _points_of_main(steps, counts, workers)
    results = run_points(root, points, runs=runs)
    # The main trajectory is also one of the sizes.
    sized = Point("size", "size", f"1:{others[0][1]}")
    results += run_points(root, [sized], runs=runs)
    share, bits, plans = _trajectory_facts(root, root / "plans")
    remove(root)
    for number, (preset, count, part) in enumerate(others):
        root = work / f"other-{number}"
        write_steps(root, preset, range(count + 1))
        results += run_points(root, [Point(part, "other", f"1:{count}")], runs=runs)
        remove(root)
    start_s = median(result.wall_s - result.elapsed_s for result in results)
    models = {}
    for name, features in FEATURES.items():
        single = [one for one in results if one.command == name and one.workers == 1]
        models[name] = fit_cost(
            features,
            [one.work for one in single],
            [one.elapsed_s for one in single],
            start_s=start_s,
        )
    return results, Basis(models, _gains(results, steps, models), share, bits, plans)


def _trajectory_facts(root: Path, work: Path) -> tuple[float, float, dict[str, Mapping[str, Any]]]:
    """Return changes per weight and step, bits per change, and both commands' plans."""
    work.mkdir()
    store = work / "store"
    built = document(run("build-store", "build-store", root / "base", root / "checkpoints", store))
    planned = document(
        run("extrapolate", "extrapolate", store, work / "out", "--target-step", 1000, "--dry-run")
    )
    info = document(run("info", "info", store))
    share = built["changed_weights"] / (info["weights"] * len(info["steps"]))
    bits = 8 * built["store_bytes"] / max(1, built["changed_weights"])
    return share, bits, {"build-store": built["plan"], "extrapolate": planned["plan"]}


def _predicted_s(basis: Basis, result: Result, waiting_s_per_byte: float = 0.0) -> float:
    # An extrapolation reads the base twice; from the second time on it is in the page cache.
    moved = result.work.get("bytes read", result.work.get("bytes of the model", 0.0))
    return basis.models[result.command].predict_s(
        result.work,
        speedup=basis.speedup(result.command, result.workers),
        waiting_s=waiting_s_per_byte * moved,
    )


def _check_note(checked: Sequence[Result], waiting_s_per_byte: float) -> str:
    first = checked[0]
    read = f"; read at {1e-9 / waiting_s_per_byte:.2f} GB/s, measured" if waiting_s_per_byte else ""
    return (
        f"check: {first.weights:,} weights, {first.checkpoints} checkpoints, {first.workers} "
        f"worker(s), one run that the model was not fitted to{read}."
    )


def _node_note(basis: Basis, node: Node) -> str:
    gains = ", ".join(f"{100 * gain:.0f} % ({name})" for name, gain in basis.gains.items())
    return (
        f"projection: a node of {node.cores} cores like these, its disk reading "
        f"{node.read_per_s / 1e9:g} and writing {node.write_per_s / 1e9:g} GB/s; each further core "
        f"adds {gains} of the first, as the last one here did; {100 * basis.change_share:.2f} % of "
        f"bf16 weights change per step, {basis.bits_per_change:.1f} bits each in the store. The "
        "longer of computing and disk counts, memory bandwidth does not; memory is the planner's "
        "projection at that many workers, every tensor sketched, and must be allowed with "
        "--memory-limit: within the default only as many workers run as fit 768 MiB. Not measured "
        "at that size."
    )
