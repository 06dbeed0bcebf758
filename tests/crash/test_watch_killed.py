"""A soak: checkpoints arrive while a watch runs that is killed again and again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream.store import Store
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.test_export import digests

ROOT = Path(__file__).parents[2]

# Most of a real run is spent between these calls, so they are where most kills are to fall.
_CHILD = """
import os, time
from relex_stream.store import files
from relex_stream import comparing, freeing

def slowly(function, seconds):
    def call(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)
    return call

for name in ("write_tail", "rename", "sync_many", "replace_file"):
    setattr(files, name, slowly(getattr(files, name), 0.001))
comparing.forget = slowly(comparing.forget, 0.002)
freeing.os.unlink = slowly(os.unlink, 0.01)
from relex_stream.cli.main import main
print("begun", flush=True)
main()
"""


class Trainer(threading.Thread):
    """Writes checkpoints file by file, and notes their checksums."""

    def __init__(self, made: Trajectory, checkpoints: Path, pause_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._made = made
        self._checkpoints = checkpoints
        self._pause_s = pause_s
        self._rng = random.Random(seed)
        self.digests: dict[int, dict[str, str]] = {}

    def run(self) -> None:
        for step in self._made.steps:
            source = self._made.directories[step]
            target = self._checkpoints / f"global_step_{step}" / "huggingface"
            target.mkdir(parents=True)
            self.digests[step] = digests(source)
            names = sorted(path.name for path in source.iterdir())
            self._rng.shuffle(names)
            for name in names:
                data = (source / name).read_bytes()
                half = self._rng.randrange(len(data) + 1)
                with (target / name).open("wb") as file:
                    for part in (data[:half], data[half:]):
                        file.write(part)
                        file.flush()
                        time.sleep(self._pause_s * self._rng.random() / len(names))


def start(made: Trajectory, checkpoints: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _CHILD, "watch", made.base, checkpoints, store, "--workers"),
            *("1", "--settle", "0.3", "--poll", "0.05", "--delete-ingested", "--include-base"),
            *("--json", "--keep-every", "7", "--idle-exit", "3", *options),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def soak(root: Path, *, steps: int, kills: int, pause_s: float, seed: int) -> None:
    made = make_trajectory(
        root / "made",
        steps=range(1, steps + 1),
        tensors={"a.weight": (64, 40), "b": (333,), "norm.weight": (8,)},
        change_share=0.05,
        checkpoint_shards=3,
    )
    checkpoints, store = root / "checkpoints", root / "run.store"
    trainer = Trainer(made, checkpoints, pause_s, seed)
    rng = random.Random(seed)
    trainer.start()
    told: list[dict[str, object]] = []
    for number in range(kills):
        with start(made, checkpoints, store) as process:
            assert process.stdout is not None
            # Most moments are near something that was said.
            wait_for = rng.randrange(1, 2 + 2 * steps // kills)
            lines = [process.stdout.readline() for _ in range(wait_for if number else 1)]
            told += [json.loads(line) for line in lines if line]
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            # Not by communicate(), which forgets what was read ahead of the lines above.
            told += [json.loads(line) for line in process.stdout if line.endswith("}\n")]
    trainer.join()
    with start(made, checkpoints, store, "--until", str(steps)) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    told += [json.loads(line) for line in out.splitlines()]

    # No step is lost, and each comes back as it was written.
    assert Store(store).steps == made.steps
    for step in made.steps:
        exported = rs.export(store, root / "out", step=step)
        assert {file.path: file.sha256 for file in exported.files} == trainer.digests[step]
        shutil.rmtree(root / "out")
    assert not rs.verify(store).problems
    # None is left undeleted, and none was deleted that was to stay.
    left = {
        step
        for step in made.steps
        if list((checkpoints / f"global_step_{step}" / "huggingface").glob("*.safetensors"))
    }
    assert left == {step for step in made.steps if step % 7 == 0 or step == steps}
    for step in left:
        assert digests(checkpoints / f"global_step_{step}" / "huggingface") == trainer.digests[step]
    # Nothing was deleted but weights, nothing before it was told, and nothing differed.
    for step in made.steps:
        names = {path.name for path in (checkpoints / f"global_step_{step}").rglob("*.json*")}
        assert names == {name for name in trainer.digests[step] if ".json" in name}
    assert not any(event.get("problems") for event in told)
    deleted = {event["step"] for event in told if event.get("kind") == "deleting"}
    assert deleted == set(made.steps) - left


def test_a_watch_that_is_killed_loses_and_forgets_nothing(tmp_path):
    soak(tmp_path, steps=12, kills=3, pause_s=0.2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_watch_that_is_killed_often_loses_and_forgets_nothing(tmp_path, seed):
    soak(tmp_path, steps=60, kills=10, pause_s=0.5, seed=seed)
