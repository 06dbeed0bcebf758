"""The ``answers`` command: how long what reads no weights takes, at the shape of a large model.

The store has real records (tables, sketches of a made-up trajectory) and neither frames nor
weights; the base has real headers and holes. That is all that `analyze` and `extrapolate --dry-run`
look at.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from benchmarks.commands import program, work_directory
from benchmarks.processes import alternate
from benchmarks.report import Report, median, publish, report_options
from benchmarks.scaling.graphs import least_shape
from benchmarks.scaling.models import MODELS, write_hollow
from relex_stream.matching import describe_tensors
from relex_stream.sketch import SKETCH_MIN_ELEMENTS, SKETCH_WIDTH, pack_sketch
from relex_stream.sources import open_checkpoint
from relex_stream.specs import BLOCK_BYTES
from relex_stream.store import StoreWriter
from relex_stream.store.records import Commit, Manifest, place_tensors

NOISE = 2.0
"""|D_t| without the drift, as a multiple of it."""


def made_up_rows(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sketches of one tensor's D (rows, width), and ``|D_t|^2`` and ``|M_t|^2`` (rows,).

    A drift along one direction, and noise, in as many dimensions as the sketch has.
    """
    random = np.random.default_rng(seed)
    drift = random.standard_normal(SKETCH_WIDTH)
    changes = drift + NOISE * random.standard_normal((rows, SKETCH_WIDTH))
    deltas = np.cumsum(changes, axis=0)
    return changes, (changes**2).sum(axis=1), (deltas**2).sum(axis=1)


def write_store(
    root: Path, name: str, steps: int, *, sketch_min_elements: int = SKETCH_MIN_ELEMENTS
) -> Path:
    """Write a base of holes and a store of records alone; return the store."""
    model = MODELS[name]()
    for directory in ("base", "step_1"):
        write_hollow(model, root / directory)
    base = open_checkpoint(root / "base", 0)
    checkpoint = open_checkpoint(root / "step_1", 1)
    described = describe_tensors(base, checkpoint, sketch_min_elements)
    tensors, _ = place_tensors(described, BLOCK_BYTES)
    shape = least_shape(tensors)
    random = np.random.default_rng(0)
    sketched = [tensor for tensor in tensors if tensor.sketch_row >= 0]
    made = [made_up_rows(steps, tensor.index) for tensor in sketched]
    with StoreWriter(root / "store") as writer:
        files = tuple(map(writer.put_weights_file, base.weights_files))
        manifest = Manifest(
            tensors=tensors,
            block_bytes=BLOCK_BYTES,
            seed=0,
            sketch_width=SKETCH_WIDTH,
            base_hint="../base",
            base_files=files,
            base_crc=random.integers(1 << 32, size=shape.blocks, dtype=np.uint32),
            base_included=False,
            base_frame_bytes=np.zeros(shape.blocks, np.uint32),
        )
        touched = np.zeros(shape.blocks, np.bool_)
        for tensor in sketched:
            touched[tensor.first_block : tensor.first_block + tensor.blocks] = True
        commits = []
        no_rows, no_scales = pack_sketch(np.zeros((0, SKETCH_WIDTH)))
        for row in range(steps):
            packed = [pack_sketch(changes[row : row + 1]) for changes, _, _ in made]
            columns = {"change_sq": np.zeros(len(tensors)), "delta_sq": np.zeros(len(tensors))}
            for tensor, (_, change_sq, delta_sq) in zip(sketched, made, strict=True):
                columns["change_sq"][tensor.index] = change_sq[row]
                columns["delta_sq"][tensor.index] = delta_sq[row]
            commits.append(
                Commit(
                    step=10 * (row + 1),
                    row=row,
                    previous="",
                    source=f"step_{10 * (row + 1)}",
                    source_bytes=checkpoint.nbytes,
                    files=files,
                    nonfinite=False,
                    frame_bytes=_where(touched, random.integers(1, 9000, shape.blocks)),
                    frame_crc=_where(touched, random.integers(1 << 32, size=shape.blocks)),
                    changed=_where(touched, random.integers(1, 6000, shape.blocks)),
                    source_crc=random.integers(1 << 32, size=shape.blocks, dtype=np.uint32),
                    sketch=np.concatenate([no_rows, *(rows for rows, _ in packed)]),
                    sketch_scale=np.concatenate([no_scales, *(scales for _, scales in packed)]),
                    **columns,
                )
            )
        writer.commit(manifest, commits)
    return root / "store"


def _where(touched: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.where(touched, numbers, 0).astype(np.uint32)


@click.command("answers")
@click.option("--model", type=click.Choice(sorted(MODELS)), default="8B")
@click.option("--steps", type=click.IntRange(min=5), default=20, help="Steps of the history.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), help="Where to put the store."
)
@report_options
def command(
    model: str, steps: int, work: Path | None, runs: int, json_path: Path | None, *, markdown: bool
) -> None:
    """Time what answers from the store alone and reads no weights, as whole processes."""
    report = Report(
        "Answers from the store alone", "answers", {"model": model, "steps": steps, "runs": runs}
    )
    with work_directory(work) as place:
        store = write_store(place, model, steps)
        target = ("--target-step", 20 * steps)
        extrapolate = ("extrapolate", store, place / "out", *target, "--dry-run")
        chosen = ("--anchor", "latest", "--damping", "auto")
        page = ("--out", place / "report.html", "--overwrite")
        programs = [
            program("analyze", "analyze", store),
            program("extrapolate --dry-run", *extrapolate),
            program("extrapolate --damping auto --dry-run", *extrapolate, *chosen),
            program("backtest", "backtest", store),
            program("report", "report", store, *page),
            program("info", "info", store),
        ]
        measured = alternate(programs, runs=runs, warmup=1)
        for each in programs:
            found = measured[each.name]
            report.add(
                {
                    "command": each.name,
                    "wall_s": median(one.wall_s for one in found),
                    "peak_rss_bytes": max(one.peak_rss_bytes for one in found),
                }
            )
    publish(report, json_path=json_path, markdown=markdown)
