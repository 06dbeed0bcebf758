"""Builds of single steps, joined: what is told, and when a checkpoint may go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from relex_stream import feeds
from relex_stream.errors import SourceError
from relex_stream.feeds import Arrival, build_from_feed
from relex_stream.specs import NoProgress, Progress
from relex_stream.summaries import BuildSummary
from tests.cli.conftest import BUILD


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class ThreeSteps:
    """A feed that notes what happens to it."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __enter__(self) -> Self:
        self.events.append("begin")
        return self

    def __exit__(self, *error: object) -> None:
        self.events.append("end")

    def arrivals(self, progress: Progress) -> Iterator[Arrival]:
        for step in (1, 2, 4):
            self.events.append(step)
            yield Arrival(step, Path("here"), f"at-{step}/{{step}}", (f"left-{step}", "left"))

    def committed(self, step: int) -> None:
        self.events.append(f"{step} is stored")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `build` is called with, instead of building; step 4 fails if a test says so."""
    calls: list[dict[str, Any]] = []

    def build(base: Path, checkpoints: Path, store: Path, **options: Any) -> BuildSummary:
        calls.append({"checkpoints": checkpoints} | options)
        step = int(options["steps"])
        options["progress"].note("2 of 8 threads work")
        if options.get("fail") and step == 4:
            raise SourceError("no")
        return replace(
            BUILD,
            steps_added=(step,),
            steps_total=step,
            bytes_in=100 * step,
            bytes_stored=step,
            changed_weights=10 * step,
            bits_per_changed_weight=float(step),
            skipped_files=("optimizer.pt",),
            peak_memory_bytes=1000 - step,
        )

    monkeypatch.setattr(feeds, "build", build)
    return calls


def build(feed: ThreeSteps, progress: Progress, **options: Any) -> BuildSummary:
    return build_from_feed(
        feed,
        Path("base"),
        Path("store"),
        layout="somewhere",
        skipped=(7,),
        include_base=True,
        seed=5,
        progress=progress,
        workers=3,
        **options,
    )


def test_builds_of_single_steps_are_one(built: list[dict[str, Any]]) -> None:
    feed, progress = ThreeSteps(), Notes()
    summary = build(feed, progress)
    stored = [1, "1 is stored", 2, "2 is stored", 4, "4 is stored"]
    assert feed.events == ["begin", *stored, "end"]
    assert [(call["pattern"], call["steps"], call["workers"]) for call in built] == [
        (f"at-{step}/{{step}}", str(step), 3) for step in (1, 2, 4)
    ]
    # A store has them from its first step on, and warns of other ones.
    assert [(call["include_base"], call["seed"]) for call in built] == [
        (True, 5),
        (False, 0),
        (False, 0),
    ]
    assert progress.notes == ["2 of 8 threads work"]
    assert summary.steps_added == (1, 2, 4)
    assert (summary.steps_skipped, summary.steps_total, summary.layout) == ((7,), 4, "somewhere")
    assert (summary.bytes_in, summary.bytes_stored, summary.ratio) == (700, 7, 100.0)
    assert summary.changed_weights == 70
    assert summary.bits_per_changed_weight == (10 + 40 + 160) / 70
    assert summary.peak_memory_bytes == 999
    assert summary.skipped_files == ("left", "left-1", "left-2", "left-4", "optimizer.pt")


def test_a_step_that_failed_is_not_let_go(built: list[dict[str, Any]]) -> None:
    feed = ThreeSteps()
    with pytest.raises(SourceError, match="no"):
        build(feed, Notes(), fail=True)
    assert feed.events == ["begin", 1, "1 is stored", 2, "2 is stored", 4, "end"]
