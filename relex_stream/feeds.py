"""Checkpoints that come one after the other, each of which may go once it is in the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from relex_stream.build import build
from relex_stream.locations import Location
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.summaries import BuildSummary, Plan


@dataclass(frozen=True)
class Arrival:
    """A checkpoint that is on the disk for a while.

    Attributes
    ----------
    step : int
    checkpoints, pattern : Path, str
        Where it is, as `build` takes it.
    left_out : tuple of str
        Names of files that did not come along.
    """

    step: int
    checkpoints: Path
    pattern: str
    left_out: tuple[str, ...] = ()


class Feed(AbstractContextManager["Feed"], Protocol):
    """Something that brings checkpoints, in ascending order of their steps."""

    def arrivals(self, progress: Progress) -> Iterator[Arrival]:
        """Yield each checkpoint when it is on the disk, waiting for it if need be."""

    def committed(self, step: int) -> None:
        """Take note that a step is in the store: its files are not needed any more."""


def build_from_feed(
    feed: Feed,
    base: Location,
    store: Location,
    *,
    layout: str,
    skipped: tuple[int, ...],
    include_base: bool,
    seed: int,
    progress: Progress | None,
    **options: Any,
) -> BuildSummary:
    """Build a store or append to it, with a commit for each checkpoint that a feed brings.

    Parameters
    ----------
    feed : Feed
    base, store : Path or Url
    layout : str
        Where the steps come from, for the summary.
    skipped : tuple of int
        Steps that the store has, for the summary.
    include_base, seed, progress, options
        As `build` takes them.

    Returns
    -------
    BuildSummary
        Of all commits together.

    Raises
    ------
    RelexStreamError
        As `build` does. What was committed before stays.
    """
    started = time.monotonic()
    told = _Once(progress or NoProgress())
    summaries: list[BuildSummary] = []
    left_out: set[str] = set()
    with feed:
        for arrival in feed.arrivals(told):
            summaries.append(
                build(
                    base,
                    arrival.checkpoints,
                    store,
                    pattern=arrival.pattern,
                    steps=str(arrival.step),
                    # Told once: later steps find them in the store.
                    include_base=include_base and not summaries,
                    seed=0 if summaries else seed,
                    progress=told,
                    **options,
                )
            )
            left_out.update(arrival.left_out)
            feed.committed(arrival.step)
    joined = _joined(summaries) if summaries else _nothing_added(store)
    return replace(
        joined,
        layout=layout,
        steps_skipped=skipped,
        skipped_files=tuple(sorted(left_out.union(joined.skipped_files))),
        elapsed_s=time.monotonic() - started,
    )


def _joined(summaries: list[BuildSummary]) -> BuildSummary:
    last = summaries[-1]
    bytes_in = sum(summary.bytes_in for summary in summaries)
    bytes_stored = sum(summary.bytes_stored for summary in summaries)
    changed = sum(summary.changed_weights for summary in summaries)
    bits = sum(summary.bits_per_changed_weight * summary.changed_weights for summary in summaries)
    return replace(
        last,
        steps_added=tuple(step for summary in summaries for step in summary.steps_added),
        bytes_in=bytes_in,
        bytes_stored=bytes_stored,
        ratio=bytes_in / bytes_stored if bytes_stored else 0.0,
        changed_weights=changed,
        bits_per_changed_weight=bits / changed if changed else 0.0,
        skipped_files=tuple({name for summary in summaries for name in summary.skipped_files}),
        peak_memory_bytes=max(summary.peak_memory_bytes for summary in summaries),
    )


def _nothing_added(path: Location) -> BuildSummary:
    store = Store(path)
    return BuildSummary(
        store=str(path),
        layout="",
        steps_added=(),
        steps_skipped=(),
        steps_total=len(store.steps),
        bytes_in=0,
        bytes_stored=0,
        base_bytes_stored=int(store.manifest.base_frame_bytes.sum(dtype="int64")),
        store_bytes=store.stored_bytes(),
        ratio=0.0,
        changed_weights=0,
        bits_per_changed_weight=0.0,
        skipped_files=(),
        peak_memory_bytes=0,
        elapsed_s=0.0,
        cast_savings=None,
        plan=Plan(0, 0, 0, 0, 0, 0, ()),
    )


class _Once:
    """A `Progress` that says the same thing once, however many builds say it."""

    def __init__(self, progress: Progress) -> None:
        self._said: set[str] = set()
        self._progress = progress
        self.start, self.advance, self.finish = progress.start, progress.advance, progress.finish

    def note(self, text: str) -> None:
        """Pass on what was not said before."""
        if text not in self._said:
            self._said.add(text)
            self._progress.note(text)
