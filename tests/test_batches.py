"""Batches of checkpoints: what is planned for, what a commit says, what is told of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from relex_stream import planner
from relex_stream.batches import Batches
from relex_stream.errors import RelexStreamWarning, SourceError
from relex_stream.planner import Capacity
from relex_stream.specs import NoProgress
from relex_stream.store import Store
from relex_stream.store.records import place_tensors
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model
from tests.make_stores import build_store

SHAPES = {"a": (60, 20), "b": (33,)}


def made(root: Path, steps: tuple[int, ...] = (1, 2, 3, 4), **options: Any) -> Trajectory:
    return make_trajectory(root, steps=steps, tensors=SHAPES, change_share=0.1, **options)


def rewrite(run: Trajectory, step: int, bits: dict[str, Any]) -> None:
    """Put other weights in the place of a step."""
    shutil.rmtree(run.directories[step])
    write_model(run.directories[step], {name: raw(b, run.dtype) for name, b in bits.items()})


# --- what a commit says --------------------------------------------------------------------------


def test_what_changed_is_counted_over_blocks_and_added_steps(tmp_path: Path) -> None:
    run = made(tmp_path)
    changed = {
        step: sum(
            int(np.count_nonzero(run.bits[step][name] != run.bits[step - 1][name]))
            for name in run.bits[0]
        )
        for step in run.steps
    }
    store = tmp_path / "store"
    for steps, rows in (((1, 2, 3), slice(0, 3)), ((4,), slice(3, 4))):
        summary = build_store(
            run.base,
            run.checkpoints,
            store,
            steps=f"1:{steps[-1]}",
            block_bytes=64,
            commit_steps=2,
        )
        assert summary.steps_added == steps
        assert summary.changed_weights == sum(changed[step] for step in steps)
        frame_bytes = int(Store(store).frame_bytes[rows].sum())
        assert summary.bits_per_changed_weight == 8 * frame_bytes / summary.changed_weights


def test_a_step_says_whether_any_of_its_weights_is_not_finite(tmp_path: Path) -> None:
    run = made(tmp_path)
    bits = {name: tensor.copy() for name, tensor in run.bits[2].items()}
    bits["a"][5, 5] = 0x7F80
    rewrite(run, 2, bits)
    build_store(run.base, run.checkpoints, tmp_path / "store", allow_nonfinite=True)
    store = Store(tmp_path / "store")
    assert [store.commit(row).nonfinite for row in range(4)] == [False, True, False, False]


def test_sketches_are_those_of_their_tensors(tmp_path: Path) -> None:
    run = made(tmp_path / "both")
    alone = make_trajectory(tmp_path / "alone", steps=run.steps, tensors={"b": (33,)})
    for step in (0, *run.steps):
        rewrite(alone, step, {"b": run.bits[step]["b"]})
    for root, here in ((tmp_path / "both", run), (tmp_path / "alone", alone)):
        build_store(here.base, here.checkpoints, root / "store", sketch_min_elements=1)
    both, single = Store(tmp_path / "both/store"), Store(tmp_path / "alone/store")
    for row in range(len(run.steps)):
        ours, its = both.commit(row), single.commit(row)
        assert (ours.sketch[1] == its.sketch[0]).all()
        assert ours.sketch_scale[1] == its.sketch_scale[0]
        assert ours.sketch[0].any()


def test_weights_that_go_back_to_the_base_are_at_no_distance_below_zero(tmp_path: Path) -> None:
    shapes = {f"w{i}": (50,) for i in range(20)}
    run = make_trajectory(tmp_path, steps=(1, 2, 3), tensors=shapes, dtype="F32")
    rng = np.random.default_rng(3)
    for step in (1, 2):
        # Of so many sizes that sums of squares are rounded.
        moved = {
            name: (10.0 ** rng.uniform(-6, 3, 50)).astype(np.float32).view(np.uint32)
            for name in shapes
        }
        rewrite(run, step, moved)
    rewrite(run, 3, run.bits[0])
    build_store(run.base, run.checkpoints, tmp_path / "store")
    distances = Store(tmp_path / "store").delta_sq
    assert (distances[2] >= 0).all()
    assert (distances[2] <= 1e-9 * distances[1]).all()
    assert distances[2].any()  # so some sums were rounded, and others the other way


# --- what is told --------------------------------------------------------------------------------


def test_steps_without_changes_are_named_with_the_one_before(tmp_path: Path) -> None:
    run = made(tmp_path, steps=(1, 3, 7, 9))
    rewrite(run, 1, run.bits[0])
    rewrite(run, 7, run.bits[3])
    with pytest.warns(RelexStreamWarning) as caught:
        build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:3")
    told = [str(warning.message).partition(",")[0] for warning in caught]
    assert told == ["step 1 has the same weights as step 0"]
    with pytest.warns(RelexStreamWarning, match="stop there. Leave .* --history-steps") as caught:
        build_store(run.base, run.checkpoints, tmp_path / "store")
    told = [str(warning.message).partition(",")[0] for warning in caught]
    assert told == ["step 7 has the same weights as step 3"]


def test_batches_are_named_by_their_steps(tmp_path: Path) -> None:
    run, names = made(tmp_path, steps=(1, 2, 5)), []

    class Names(NoProgress):
        def start(self, stage: str, total_bytes: int) -> None:
            names.append(stage)

    build_store(run.base, run.checkpoints, tmp_path / "store", commit_steps=2, progress=Names())
    assert [name for name in names if name.startswith("encode")] == [
        "encode steps 1 to 2",
        "encode step 5",
    ]


# --- what is kept from being written -------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 2])
def test_a_file_that_changed_while_it_was_read_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = made(tmp_path, checkpoint_shards=1)
    encode = Batches._encode

    def and_touch(self: Batches, *arguments: Any) -> Any:
        results = encode(self, *arguments)
        (run.directories[step] / "model.safetensors").touch()
        return results

    monkeypatch.setattr(Batches, "_encode", and_touch)
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        build_store(run.base, run.checkpoints, tmp_path / "store")
    assert not (tmp_path / "store/HEAD").exists()


def test_an_append_does_not_write_the_base_again(tmp_path: Path) -> None:
    run = made(tmp_path)
    options = {"include_base": True, "block_bytes": 512}
    build_store(run.base, run.checkpoints, tmp_path / "store", steps="1:2", **options)
    before = {path: path.stat() for path in (tmp_path / "store/base").rglob("c.*")}
    assert before
    build_store(run.base, run.checkpoints, tmp_path / "store", **options)
    for path, status in before.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


# --- what is planned for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "left", "commit_steps", "widest"),
    [
        (0, 30, None, 16),
        (10, 30, None, 16),  # the group begun has 6 more, later ones 16
        (10, 3, None, 3),
        (0, 30, 4, 4),
        (0, 3, 100, 3),
    ],
)
def test_the_widest_batch_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, rows: int, left: int, commit_steps: int | None, widest: int
) -> None:
    described: dict[str, Any] = {"name": "a", "kind": "tracked", "shape": (40, 5), "tied_to": None}
    described |= {"base_dtype": "BF16", "dtype": "BF16", "sketch_row": 0}
    tensors, blocks = place_tensors([described], 64)
    monkeypatch.setattr(planner, "COMMIT_TARGET_BYTES", 16 * 1000)
    asked: dict[str, Any] = {}

    def shared_bytes(*arguments: Any) -> int:
        asked["shared"] = arguments[1:]
        return 1000

    def worker_bytes(shape: planner.ModelShape, steps: int) -> int:
        asked["worker"] = steps
        return 10

    monkeypatch.setattr(planner, "ingest_shared_bytes", shared_bytes)
    monkeypatch.setattr(planner, "ingest_worker_bytes", worker_bytes)
    monkeypatch.setattr("relex_stream.batches.unpacking_bytes", lambda block_bytes: block_bytes)
    others = ("block_bytes", "executor", "files", "base_files", "base_hint", "seed")
    others += ("include_base", "allow_nonfinite", "progress")
    settled: dict[str, Any] = {
        "writer": SimpleNamespace(store=SimpleNamespace(steps=range(rows)), transfer_bytes=50),
        "reader": SimpleNamespace(reading_bytes=7),
        "tensors": tensors,
        "sketch_width": 4,
        "commit_steps": commit_steps,
        "base_checkpoint": SimpleNamespace(nbytes=400),
        "capacity": Capacity(1, 1, True, reserved_bytes=0, memory_limit_bytes=1 << 30),
    }
    batches = Batches(**settled, **dict.fromkeys(others))
    table = SimpleNamespace(file=np.zeros(9))
    places: Any = [SimpleNamespace(nbytes=1000, table=table, patch=None)] * (left - 1)
    places.append(SimpleNamespace(nbytes=1000, table=table, patch=object()))
    plan = batches.plan(places)
    assert asked == {"worker": widest, "shared": (widest, rows + left, blocks, 9, 1)}
    assert plan.shared_bytes == 1000 + 50 + 7
    (stage,) = plan.stages
    assert (stage.tasks, stage.read_bytes) == (blocks, 1000 * left + 400)
    assert stage.worker_bytes == 64  # of unpacking, which is more
