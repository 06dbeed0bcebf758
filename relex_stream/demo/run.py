"""The demonstration: the main job on a real trajectory, and what the models it makes are worth.

The shipped store holds every step of a small reinforcement-learning run
(``addition`` of ``benchmarks/rlvr``). The demonstration takes the first checkpoints out of it as a
user would find them on disk, builds a store from those alone, extrapolates, and measures the
accuracy of every model on problems that no training saw, beside the true later checkpoints.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from relex_stream import api
from relex_stream.demo.task import draw_problems, greedy_solved
from relex_stream.errors import MissingDependencyError, OptionError
from relex_stream.specs import NoProgress, Progress
from relex_stream.summaries import BuildSummary, DemoRow, DemoSummary

TRAJECTORY = Path(__file__).parent / "data" / "trajectory"
"""The shipped delta store, base included."""

HISTORY_STEPS = 40
"""Last step the extrapolation sees."""

TARGET_STEPS = (60, 80, 120)
"""Steps it predicts; the true checkpoints of these are in the shipped store."""

PROBLEMS = 2000
"""Held-out problems per model: a standard error of about 1 % in the accuracy."""


def run_demo(
    directory: Path | None = None,
    *,
    problems: int = PROBLEMS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DemoSummary:
    """Run the main job on the shipped trajectory and measure every model.

    Parameters
    ----------
    directory : Path, optional
        Where to leave checkpoints, store and models; must not exist or be empty. A temporary
        directory if not given.
    problems : int
        Held-out problems per model.
    workers : int, optional
        As in `api.build_store`.

    Returns
    -------
    DemoSummary

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.
    OptionError
        If `directory` holds something.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            "the demonstration evaluates models with transformers, which is not installed; "
            "run pip install 'relex-stream[demo]'"
        )
    if problems < 1:
        raise OptionError(f"--problems must be at least 1, not {problems}")
    started = time.monotonic()
    progress = progress or NoProgress()
    with _workplace(directory) as place:
        build = prepare(place, workers=workers, progress=progress)
        extrapolated = api.extrapolate(
            place / "store",
            place / "extrapolated",
            target_steps=TARGET_STEPS,
            workers=workers,
            progress=progress,
        )
        models = [
            (0, "base", place / "base"),
            (HISTORY_STEPS, "last observed", checkpoint_directory(place, HISTORY_STEPS)),
            *(
                (output.target_step, "extrapolated", Path(output.path))
                for output in extrapolated.outputs
            ),
        ]
        for target in TARGET_STEPS:
            truth = place / "true" / f"step_{target}"
            api.export(TRAJECTORY, truth, step=target, workers=workers)
            models.append((target, "true", truth))
        rows = tuple(_measure(models, problems, progress))
    return DemoSummary(
        directory=None if directory is None else str(directory),
        history_steps=HISTORY_STEPS,
        problems=problems,
        build=build,
        median_explained_variance=extrapolated.median_explained_variance,
        median_r2=extrapolated.median_r2,
        rows=rows,
        elapsed_s=time.monotonic() - started,
    )


def prepare(place: Path, *, workers: int | None, progress: Progress) -> BuildSummary:
    """Lay out base and first checkpoints in `place` as a trainer leaves them; build a store."""
    api.export(TRAJECTORY, place / "base", step=0, workers=workers)
    base_bytes = _directory_bytes(place / "base")
    progress.start(f"export steps 1 to {HISTORY_STEPS}", HISTORY_STEPS * base_bytes)
    for step in range(1, HISTORY_STEPS + 1):
        api.export(TRAJECTORY, checkpoint_directory(place, step), step=step, workers=workers)
        progress.advance(base_bytes)
    progress.finish()
    return api.build_store(
        place / "base",
        place / "checkpoints",
        place / "store",
        workers=workers,
        progress=progress,
    )


def checkpoint_directory(place: Path, step: int) -> Path:
    """Return where the demonstration puts a step's checkpoint."""
    return place / "checkpoints" / f"global_step_{step}" / "huggingface"


def _measure(
    models: Sequence[tuple[int, str, Path]], problems: int, progress: Progress
) -> Iterator[DemoRow]:
    drawn = draw_problems("held-out", problems)
    from transformers.utils import logging

    # Its bars for models of this size would hide the results.
    logging.disable_progress_bar()
    sizes = [_directory_bytes(path) for _, _, path in models]
    progress.start("evaluate models", sum(sizes))
    observed = np.zeros(problems)
    for (step, kind, path), size in zip(models, sizes, strict=True):
        now = greedy_solved(path, drawn).astype(float)
        if kind == "last observed":
            observed = now
        gain = now - observed if kind in ("extrapolated", "true") else np.zeros(problems)
        progress.advance(size)
        yield DemoRow(
            step=step,
            kind=kind,
            accuracy=float(now.mean()),
            standard_error=_standard_error(now),
            gain=float(gain.mean()),
            gain_error=_standard_error(gain),
        )
    progress.finish()


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std() / math.sqrt(values.size))


def _directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


@contextmanager
def _workplace(directory: Path | None) -> Iterator[Path]:
    if directory is None:
        with TemporaryDirectory(prefix="relex-demo-") as temporary:
            yield Path(temporary)
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OptionError(f"{directory} is not empty; name a directory that does not exist yet")
    directory.mkdir(parents=True, exist_ok=True)
    yield directory
