"""A first run says what it waits for; no other run does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.make_checkpoints import make_trajectory

_STEPS = """
import sys
from pathlib import Path
from relex_stream import build_store, extrapolate

class Told:
    def start(self, stage, total_bytes):
        print(stage)
    def note(self, text):
        pass
    def advance(self, done_bytes):
        pass
    def finish(self):
        pass

base, checkpoints, store, what = sys.argv[1:]
for name in what.split():
    if name == "build":
        build_store(base, checkpoints, store, progress=Told())
    else:
        extrapolate(store, store + name, target_steps=[9], progress=Told())
"""


@pytest.mark.slow
def test_each_kind_of_work_announces_its_first_compilation(tmp_path):
    run = make_trajectory(tmp_path, steps=(1, 2))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def told(store: str, what: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _STEPS, run.base, run.checkpoints, tmp_path / store, what],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.count("compile kernels")

    assert told("a", "build") == 1
    assert told("b", "build") == 0
    # Its kernels are others; a second one in the same process waits for nothing.
    assert told("b", "x y") == 1
    assert told("b", "z") == 0
