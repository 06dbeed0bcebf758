"""Stages without work, to see what their graphs cost by themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.scaling.figures import BASIS, RANK, element_ns
from relex_stream.graph import Group, Stage
from relex_stream.sketch import SKETCH_WIDTH


class NoWork(Stage[Any, Any, Any]):
    """A stage whose work is to wait as long as the work would take, or not at all.

    Parameters
    ----------
    partial_bytes, result_bytes : int
        Of what a call, and a group, give.
    begins : bool
    element_s : float
        Seconds of work per element of a block.
    """

    def __init__(
        self,
        partial_bytes: int,
        result_bytes: int,
        *,
        begins: bool,
        element_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.begins = begins
        self._partial_bytes = partial_bytes
        self._result_bytes = result_bytes
        self._element_s = element_s

    def begin(self, groups: Sequence[Group[Any, Any]]) -> list[Any]:
        return [np.zeros(self._partial_bytes, np.uint8) if self.begins else None for _ in groups]

    def work(self, tasks: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        if self._element_s:
            time.sleep(self._element_s * sum(at.elements for task in tasks for at in task))
        return [np.zeros(self._partial_bytes, np.uint8) for _ in tasks]

    def combine(self, partials: list[Any]) -> Any:
        return partials[0]

    def finish(self, key: Any, value: Any, total: Any, *, last: bool) -> Any:
        return np.zeros(self._result_bytes, np.uint8)


def stand_in(stage: str, steps: int, share: float, *, paced: bool) -> NoWork:
    """Return a stage that gives as much as the real one; `paced` takes as long on one core."""
    element_s = element_ns(stage, steps, share) * 1e-9 if paced else 0.0
    if stage == "build":
        # Sketch and tables of a block; rounded, for a tensor of some blocks.
        return NoWork(
            steps * (8 * SKETCH_WIDTH + 40),
            steps * (2 * SKETCH_WIDTH + 4 + 14 * 20),
            begins=False,
            element_s=element_s,
        )
    if stage == "statistics":
        return NoWork(8 * steps * BASIS, 8 * steps * RANK + 200, begins=True, element_s=element_s)
    return NoWork(200, 200, begins=False, element_s=element_s)
