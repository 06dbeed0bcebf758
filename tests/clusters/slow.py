"""Work that takes its time, in this process and others, and leaves marks as it begins and ends."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from relex_stream.ingest import Ingest
from relex_stream.model_writes import BlockWrite

_WORK = {stage: stage.work for stage in (Ingest, BlockWrite)}


def slow_down(marks: Path, seconds: float) -> None:
    """Have this process leave a mark when a task begins and when it ends, `seconds` later.

    Meanwhile none goes on that finds a file ``hold`` there.
    """

    def slowed(stage):  # type: ignore[no-untyped-def]
        def work(*arguments):  # type: ignore[no-untyped-def]
            name = uuid.uuid4().hex
            (marks / f"begun {name}").touch()
            try:
                time.sleep(seconds)
                while (marks / "hold").exists():
                    time.sleep(0.02)
                return _WORK[stage](*arguments)
            finally:
                (marks / f"ended {name}").touch()

        return work

    for stage in _WORK:
        stage.work = slowed(stage)  # type: ignore[method-assign]


def speed_up() -> None:
    """End that."""
    for stage, work in _WORK.items():
        stage.work = work  # type: ignore[method-assign]


def count(marks: Path, what: str) -> int:
    """How many tasks have ``begun`` or ``ended``."""
    return len(list(marks.glob(f"{what} *")))
