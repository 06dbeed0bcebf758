"""Tiny runs to crash, and what must hold of a store whatever happened to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import zarr

from relex_stream import api
from relex_stream import build as build_module
from relex_stream.graph import Threads, run_in_order
from relex_stream.opened import OpenStore
from relex_stream.specs import STEP_GROUP
from relex_stream.store import Store, arrays
from tests.make_checkpoints import Trajectory, make_trajectory, raw
from tests.make_stores import build_store

TENSORS = {"a.weight": (30, 10), "b": (30,), "norm.weight": (8,)}
CONSTANTS = {"ids": raw(np.arange(5, dtype=np.uint64), "I64")}
BLOCK_BYTES = 256
"""Cuts ``a.weight`` into three blocks; many frames are empty, so chunks differ in length."""


def tiny_trajectory(
    root: Path,
    steps: range,
    *,
    change_share: float = 0.05,
    tensors: Mapping[str, tuple[int, ...]] = TENSORS,
) -> Trajectory:
    """Write base and checkpoints; the base depends on nothing but the seed."""
    trajectory = make_trajectory(
        root,
        steps=steps,
        tensors=tensors,
        constants=CONSTANTS,
        change_share=change_share,
        checkpoint_shards=1,
    )
    for directory in trajectory.directories.values():
        # Side files go through the same code; one is enough for thousands of runs.
        (directory / "generation_config.json").unlink()
        (directory / "tokenizer_config.json").unlink()
    return trajectory


def build(
    base: Path,
    checkpoints: Path,
    store: Path,
    *,
    steps: str | None = None,
    include_base: bool = False,
    commit_steps: int | None = 3,
    workers: int = 1,
) -> tuple[int, ...]:
    """Build or append with small blocks; return the steps added."""
    summary = build_store(
        base,
        checkpoints,
        store,
        steps=steps,
        workers=workers,
        include_base=include_base,
        block_bytes=BLOCK_BYTES,
        sketch_min_elements=0,
        commit_steps=commit_steps,
    )
    return summary.steps_added


@contextmanager
def in_order() -> Iterator[None]:
    """Run stages as plain loops: what is on the disk is the same."""

    def run_plainly(_, stage, groups, **__):
        return run_in_order(stage, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Threads, "run", run_plainly)
        yield


@contextmanager
def quick() -> Iterator[None]:
    """Run builds as plain loops and open each checkpoint once: what is on the disk is the same."""
    with in_order(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build_module, "open_checkpoint", lru_cache(maxsize=None)(build_module.open_checkpoint)
        )
        yield


Sources = Mapping[int, Trajectory]
"""By step: the trajectory that the step was taken from."""


def check_exports(store: Path, sources: Sources, base: Path | None = None) -> tuple[int, ...]:
    """Check that every committed step comes back bit for bit, files and all; return the steps."""
    opened = OpenStore(store, base)
    inside = Store(store)
    for row, step in enumerate(opened.steps):
        trajectory = sources[step]
        bits = {name: opened.checkpoint_bits(name, step) for name in opened.tensors}
        for name, expected in trajectory.bits[step].items():
            assert np.array_equal(bits[name], expected), f"step {step}: {name} differs"
        directory = trajectory.directories[step]
        entries = inside.commit(row).files
        assert {entry.path for entry in entries} == {path.name for path in directory.iterdir()}
        for entry in entries:
            if entry.blob is not None:
                data = inside.blob(entry.blob)
            else:
                parts = [
                    inside.blob(part.blob) if part.blob is not None else bits[part.tensor].tobytes()
                    for part in inside.recipe(entry)
                ]
                data = b"".join(parts)
            assert data == (directory / entry.path).read_bytes(), f"step {step}: {entry.path}"
    return opened.steps


def check_dense(store: Path, sources: Sources) -> None:
    """Check what plain zarr reads against differences of ordered bit patterns."""
    inside = Store(store)
    for name in next(iter(sources.values())).bits[0]:
        array = zarr.open_array(store / arrays.DELTAS / arrays.array_name(name), mode="r")
        dense = np.asarray(array[:])
        assert len(dense) == -(-len(inside.steps) // STEP_GROUP) * STEP_GROUP
        expected = np.zeros_like(dense)
        before = _ordered(next(iter(sources.values())).bits[0][name])
        for row, step in enumerate(inside.steps):
            now = _ordered(sources[step].bits[step][name])
            expected[row] = (now - before).ravel()
            before = now
        assert np.array_equal(dense, expected), f"zarr reads other differences of {name}"


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Ordered bit patterns as docs/design.md defines them, not as the package computes them."""
    signed = bits.view(np.int16)
    return (signed ^ ((signed >> 15) & 0x7FFF)).view(np.uint16)


def expected_files(store: Path) -> set[str]:
    """Return the files a store has when nothing is left over."""
    inside = Store(store)
    manifest = inside.manifest
    files = {"HEAD", "LOCK", "zarr.json", f"{arrays.DELTAS}/zarr.json", inside.head.manifest.path}
    blobs = inside.blobs_of(manifest.base_files)
    for row, name in enumerate(inside.head.commits):
        files.add(name.path)
        blobs |= inside.blobs_of(inside.commit(row).files)
    files |= {f"blobs/{name}" for name in blobs}
    if manifest.base_included:
        files.add(f"{arrays.BASE}/zarr.json")
    for tensor in manifest.tensors:
        directory = arrays.array_name(tensor.name)
        if tensor.kind == "tracked":
            files.add(f"{arrays.DELTAS}/{directory}/zarr.json")
        if manifest.base_included and tensor.kind != "tied":
            files.add(f"{arrays.BASE}/{directory}/zarr.json")
        for block in range(tensor.blocks):
            if manifest.base_frame_bytes[tensor.first_block + block]:
                files.add(arrays.chunk_key(arrays.BASE, tensor, 0, block))
    return files | {key for key, size in committed_chunks(inside).items() if size}


def committed_chunks(store: Store) -> dict[str, int]:
    """Return the committed bytes of every chunk of differences, from the records alone."""
    sizes: dict[str, int] = {}
    for row in range(len(store.steps)):
        frame_bytes = store.commit(row).frame_bytes
        for tensor in store.manifest.tensors:
            for block in range(tensor.blocks):
                key = arrays.chunk_key(arrays.DELTAS, tensor, row // STEP_GROUP, block)
                sizes[key] = sizes.get(key, 0) + int(frame_bytes[tensor.first_block + block])
    return sizes


def check_whole(store: Path, sources: Sources) -> None:
    """Check everything: exports, checksums, plain zarr, and that nothing is left over."""
    assert check_exports(store, sources) == tuple(sources)
    assert api.verify(store, workers=1).problems == ()
    check_dense(store, sources)
    found = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    assert found == expected_files(store)
    for key, size in committed_chunks(Store(store)).items():
        if size:
            assert (store / key).stat().st_size == size, f"{key} has more than is committed"
    assert (store / "LOCK").stat().st_size == 0
