"""What the client of a cluster does before, between and after stages, and what it holds.

Files, tables and stages are made for real and measured; only frames are left out.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.figures import RANK
from benchmarks.scaling.graphs import STAGES, commit_steps, graph_rows, groups_of, least_shape
from benchmarks.scaling.models import MODELS, Model, write_hollow
from relex_stream import planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.graph import Stage
from relex_stream.graph.packed import PackedStage
from relex_stream.ingest import Ingest
from relex_stream.machine import resident_bytes
from relex_stream.matching import CheckpointPlaces, describe_tensors, match_checkpoint
from relex_stream.model_writes import BlockWrite, Source
from relex_stream.sketch import SKETCH_MIN_ELEMENTS, SKETCH_WIDTH
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import BLOCK_BYTES, STEP_GROUP, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.store.records import Commit, Manifest, StoredTensor, place_tensors
from relex_stream.subspaces import Statistics, SubspaceOptions
from relex_stream.writer import OutputDirectory

_OPENED = 2
"""Checkpoints that are made, opened and committed; more of them are more of the same."""


@dataclass(frozen=True)
class Client:
    """What was measured of one model at the client.

    Attributes
    ----------
    row : dict
        For the report.
    graphs : list of dict
        As of `graph_rows`.
    """

    row: dict[str, Any]
    graphs: list[dict[str, Any]]


def measure_client(
    name: str, root: Path, steps: Sequence[int], nodes: Sequence[int], cores: int, share: float
) -> Client:
    """Do what the commands do before, between and after stages; in a process of its own.

    Nodes have one process of `cores` threads each. Times are of the processor, of which there is
    one: others may be at work here.
    """
    model = MODELS[name]()
    root = root / name
    took: dict[str, float] = {}
    before = resident_bytes()
    for directory in ("base", *(f"step_{step}" for step in range(1, _OPENED + 1))):
        write_hollow(model, root / directory)
    with _timed(took, "open first_s"):
        base = open_checkpoint(root / "base", 0)
    with _timed(took, "open next_s", _OPENED):
        checkpoints = [
            open_checkpoint(root / f"step_{step}", step) for step in range(1, _OPENED + 1)
        ]
    tensors, _ = place_tensors(
        describe_tensors(base, checkpoints[0], SKETCH_MIN_ELEMENTS), BLOCK_BYTES
    )
    places: list[CheckpointPlaces] = []
    with _timed(took, "match_s", _OPENED):
        for checkpoint in checkpoints:
            last = places[-1] if places else None
            places.append(match_checkpoint(checkpoint, tensors, checkpoint.directory, last))
    shape = least_shape(tensors)
    store, more = _committed(root, base, checkpoints, tensors, shape)
    took |= more
    record_bytes = store.record_bytes(len(store.steps) - 1)
    packed = _packed_bytes(root, store, base, places)
    opened_bytes = resident_bytes() - before
    graphs: list[dict[str, Any]] = []
    held = 0
    for stage in STAGES:
        for count, threads in _sizes(stage, model, shape, steps, nodes, cores).items():
            bare = resident_bytes()
            started = time.process_time()
            groups = groups_of(stage, tensors, count, share)
            groups_s = time.process_time() - started
            held = max(held, resident_bytes() - bare)
            rows = graph_rows(name, stage, groups, count, threads)
            graphs += [row | {"groups_s": groups_s} for row in rows]
            del groups
    row = {
        "part": "client",
        "model": name,
        "weights": model.weights,
        "tensors": len(tensors),
        "blocks": shape.blocks,
        "files": len(base.weights_files),
        **took,
        "record_bytes": record_bytes,
        **packed,
        "opened_bytes": opened_bytes,
        "groups_bytes": held,
    }
    return Client(row, graphs)


def _sizes(
    stage: str,
    model: Model,
    shape: planner.ModelShape,
    steps: Sequence[int],
    nodes: Sequence[int],
    cores: int,
) -> dict[int, list[int]]:
    """Return which numbers of threads see a stage of how many steps: commits grow with nodes."""
    found: dict[int, list[int]] = {}
    for number in nodes:
        for count in steps:
            here = commit_steps(model, shape, count, number) if stage == "build" else count
            threads = found.setdefault(here, [])
            if number * cores not in threads:
                threads.append(number * cores)
    return found


@contextlib.contextmanager
def _timed(took: dict[str, float], name: str, times: int = 1) -> Iterator[None]:
    started = time.process_time()
    yield
    took[name] = (time.process_time() - started) / times


def _committed(
    root: Path,
    base: SourceCheckpoint,
    checkpoints: Sequence[SourceCheckpoint],
    tensors: tuple[StoredTensor, ...],
    shape: planner.ModelShape,
) -> tuple[Store, dict[str, float]]:
    """Commit steps of noise, with real tables and no frames; open the store again."""
    took: dict[str, float] = {}
    noise = np.random.default_rng(0)
    with StoreWriter(root / "run.store") as writer:
        files = {
            checkpoint.step: tuple(map(writer.put_weights_file, checkpoint.weights_files))
            for checkpoint in (base, *checkpoints)
        }
        manifest = Manifest(
            tensors=tensors,
            block_bytes=BLOCK_BYTES,
            seed=0,
            sketch_width=SKETCH_WIDTH,
            base_hint="../base",
            base_files=files[0],
            base_crc=noise.integers(1 << 32, size=shape.blocks, dtype=np.uint32),
            base_included=False,
            base_frame_bytes=np.zeros(shape.blocks, np.uint32),
        )
        commits = [
            Commit(
                step=checkpoint.step,
                row=row,
                previous="",
                source=f"step_{checkpoint.step}",
                source_bytes=checkpoint.nbytes,
                files=files[checkpoint.step],
                nonfinite=False,
                frame_bytes=noise.integers(1, 9000, shape.blocks, np.uint32),
                frame_crc=noise.integers(1 << 32, size=shape.blocks, dtype=np.uint32),
                changed=noise.integers(1, 6000, shape.blocks, np.uint32),
                source_crc=noise.integers(1 << 32, size=shape.blocks, dtype=np.uint32),
                change_sq=noise.random(len(tensors)),
                delta_sq=noise.random(len(tensors)),
                sketch=noise.standard_normal((shape.sketched, SKETCH_WIDTH)).astype(np.float16),
                sketch_scale=noise.random(shape.sketched, np.float32),
            )
            for row, checkpoint in enumerate(checkpoints)
        ]
        with _timed(took, "commit_s", len(commits)):
            writer.commit(manifest, commits)
    with _timed(took, "open store_s"):
        store = Store(root / "run.store")
    with _timed(took, "tables_s", len(commits)):
        assert store.frame_bytes.shape == (len(commits), shape.blocks)
    copy = pickle.loads(pickle.dumps(store))
    with _timed(took, "columns_s", len(commits)):
        assert copy.frame_bytes.shape == (len(commits), shape.blocks)
    return store, took


def _packed_bytes(
    root: Path,
    store: Store,
    base: SourceCheckpoint,
    places: Sequence[CheckpointPlaces],
) -> dict[str, int]:
    """Return what each stage is as it is sent to every process; a commit is one of a group."""
    found: dict[str, Stage[Any, Any, Any]] = {}
    with CheckpointReader() as reader:
        weights = BaseWeights(store, base, reader)
        options = SubspaceOptions(rows=_OPENED, rank=RANK, svd="randomized", power_iterations=1)
        found["packed statistics_bytes"] = Statistics(
            store, weights, options, DEFAULT_ENTRY_CAPACITY
        )
        assembly = Assembly(store, store.manifest.base_files, prefix="", in_base_dtype=True)
        filler = OutputDirectory(root / "out").filler
        found["packed write_bytes"] = BlockWrite(
            Source(store, weights, _OPENED, DEFAULT_ENTRY_CAPACITY), filler, [assembly], None
        )
        sizes = {name: _packed(stage) for name, stage in found.items()}
    with CheckpointReader() as reader, StoreWriter(root / "run.store") as writer:
        weights = BaseWeights(store, base, reader)
        for step in range(1, STEP_GROUP + 1):
            reader.expect(replace(base, directory=str(root / f"step_{step}")))
        stage = Ingest(
            root=store.path,
            fence=writer.fence,
            store=store,
            base=weights,
            reader=reader,
            checkpoints=[
                replace(
                    places[0],
                    step=step,
                    files=tuple(path.replace("step_1", f"step_{step}") for path in files),
                )
                for step, files in enumerate([places[0].files] * STEP_GROUP, 1)
            ],
            seed=0,
            sketch_width=SKETCH_WIDTH,
            allow_nonfinite=False,
            include_base=False,
            tied_tensors=(),
        )
        sizes["packed commit_bytes"] = _packed(stage)
    return sizes


def _packed(stage: Stage[Any, Any, Any]) -> int:
    return len(pickle.dumps(PackedStage(stage, "relex-1", 16), protocol=5))
