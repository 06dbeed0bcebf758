"""Stores to report on, and a report that all tests of pages may look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream.demo.run import TRAJECTORY
from relex_stream.reporting.gather import gather
from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.summaries import ReportSummary
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.mlp.weight": (200, 131),
    "model.layers.0.mlp.bias": (1009,),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.weight": (180, 131),
    "model.layers.1.mlp.bias": (500,),
}
STEPS = (1, 2, 4, 7, 11, 16, 17, 25, 40, 41)
HISTORY = 17


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("reporting")
    return make_trajectory(root, steps=STEPS, tensors=SHAPES, change_share=0.05)


@pytest.fixture(scope="package")
def store(run: Trajectory) -> Path:
    path = run.base.parent / "store"
    build_store(run.base, run.checkpoints, path, sketch_min_elements=15_000)
    return path


def numbers_of(store: Path, **asked: object) -> ReportNumbers:
    settings: dict[str, object] = {
        "history_steps": None,
        "target_steps": (),
        "rank": 10,
        "fit": "linear",
        "window": None,
        "exact": False,
        "title": None,
        "base": None,
        "memory_limit": None,
        "workers": 2,
        "progress": None,
    }
    return gather(store, **(settings | asked))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Written:
    """A report of the demonstration's trajectory, at 40 of 120 steps, and what it came from."""

    summary: ReportSummary
    page: str
    pictures: Path
    tables: Path


@pytest.fixture(scope="package")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("shipped")
    summary = rs.report(
        TRAJECTORY,
        root / "report.html",
        history_steps=40,
        target_steps=[60, 100],
        pictures=root / "pictures",
        picture_format=["png", "svg"],
        csv=root / "tables",
        workers=2,
    )
    page = (root / "report.html").read_text(encoding="utf-8")
    return Written(summary, page, root / "pictures", root / "tables")
