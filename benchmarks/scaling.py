"""The ``scaling`` command: what larger models, more checkpoints and more nodes would take.

Nothing here reads a weight. Models are lists of tensors; their checkpoints are files with real
headers and holes for weights. The tables, stages, groups and graphs made of them are those that
the commands make; a real scheduler, in a process of its own, hands out the tasks of such graphs to
real workers, which do nothing or wait as long as the work would take. What times and bandwidths
make of that for other machines is arithmetic, and said to be.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import cloudpickle
import numpy as np
import psutil

from benchmarks.commands import work_directory
from benchmarks.processes import BenchmarkError
from benchmarks.report import Report, median, output_options, publish
from benchmarks.trajectory import PRESETS, Preset, Shapes
from relex_stream import costs, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY
from relex_stream.blocks import BlockOf, model_shape
from relex_stream.errors import MemoryLimitError
from relex_stream.extrapolation import BlockWrite
from relex_stream.graph import Group, Stage, grouped
from relex_stream.graph.cluster import Cluster
from relex_stream.graph.packed import PackedStage
from relex_stream.graph.stages import TASK_BYTES
from relex_stream.graph.tasks import build_graph
from relex_stream.ingest import Ingest
from relex_stream.machine import resident_bytes
from relex_stream.matching import CheckpointPlaces, describe_tensors, match_checkpoint
from relex_stream.sketch import OVERSAMPLING, SKETCH_MIN_ELEMENTS, SKETCH_WIDTH
from relex_stream.sources import CheckpointReader, open_checkpoint
from relex_stream.specs import BLOCK_BYTES, STEP_GROUP, NoProgress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.store.records import Commit, Manifest, StoredTensor, place_tensors
from relex_stream.subspaces import BlockTotals, Statistics, SubspaceOptions
from relex_stream.summaries import Plan, StagePlan
from relex_stream.writer import OutputDirectory

STAGES = ("build", "statistics", "write")
"""One commit of build-store, and the two stages of extrapolate."""

RANK = 1
BASIS = RANK + OVERSAMPLING

_IDLE_S = 4.0

_OPENED = 2
"""Checkpoints that are made, opened and committed; more of them are more of the same."""

# From docs/benchmarks.md: whole builds and extrapolations of one worker, fitted to many sizes.
BUILD_NS = {"byte": 0.33, "change": 39.0, "tensor": 36e3}
"""Of one core, per byte read, changed weight, tensor and step."""
EXTRAPOLATE_NS = {"byte": 2.0, "change": 33.0, "tensor": 32e3}
"""The same for both stages together, per byte of the model and per change in the history."""
STORED_BITS = 12.7
"""Of the whole store, per changed weight."""
RESIDENT_BYTES = 150 << 20
"""Of a worker process before the work."""


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The shape of a bf16 model.

    Attributes
    ----------
    name : str
    shapes : dict
        Shapes by name, as they lie in the files.
    shard_bytes : int
        Most bytes of tensors in a weights file.
    """

    name: str
    shapes: Shapes
    shard_bytes: int = 5_000_000_000

    @cached_property
    def weights(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return 2 * self.weights


def _llama_3(*, hidden: int, inner: int, layers: int, heads: int) -> Shapes:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    }
    return Preset("llama-3", config, steps=0).shapes


def mixture_shapes(
    *,
    hidden: int,
    inner: int,
    dense_inner: int,
    layers: int,
    experts: int,
    heads: int,
    vocabulary: int,
) -> Shapes:
    """Return a mixture of experts with compressed attention, like DeepSeek-V3 and Kimi-K2."""
    q_rank, kv_rank, plain, rotary, value = 1536, 512, 128, 64, 128
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}

    def add_mlp(prefix: str, width: int) -> None:
        shapes[prefix + "gate_proj.weight"] = (width, hidden)
        shapes[prefix + "up_proj.weight"] = (width, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, width)

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes[attention + "q_a_proj.weight"] = (q_rank, hidden)
        shapes[attention + "q_a_layernorm.weight"] = (q_rank,)
        shapes[attention + "q_b_proj.weight"] = (heads * (plain + rotary), q_rank)
        shapes[attention + "kv_a_proj_with_mqa.weight"] = (kv_rank + rotary, hidden)
        shapes[attention + "kv_a_layernorm.weight"] = (kv_rank,)
        shapes[attention + "kv_b_proj.weight"] = (heads * (plain + value), kv_rank)
        shapes[attention + "o_proj.weight"] = (hidden, heads * value)
        if layer == 0:
            add_mlp(prefix + "mlp.", dense_inner)
        else:
            shapes[prefix + "mlp.gate.weight"] = (experts, hidden)
            shapes[prefix + "mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                add_mlp(f"{prefix}mlp.experts.{expert}.", inner)
            add_mlp(prefix + "mlp.shared_experts.", inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


MODELS: dict[str, Callable[[], Model]] = {
    "tiny": lambda: Model("tiny", PRESETS["tiny"].shapes, 200_000),
    "8B": lambda: Model("8B", PRESETS["qwen3-8b"].shapes, PRESETS["qwen3-8b"].shard_bytes),
    "70B": lambda: Model("70B", _llama_3(hidden=8192, inner=28_672, layers=80, heads=64)),
    "405B": lambda: Model("405B", _llama_3(hidden=16_384, inner=53_248, layers=126, heads=128)),
    "1T": lambda: Model(
        "1T",
        mixture_shapes(
            hidden=7168,
            inner=2048,
            dense_inner=18_432,
            layers=61,
            experts=384,
            heads=64,
            vocabulary=163_840,
        ),
    ),
}
"""Qwen3-8B, Llama-3-70B, Llama-3.1-405B, and a mixture like Kimi-K2; one for the tests."""


def shards(model: Model) -> list[Shapes]:
    """Return what each weights file holds, in the model's order."""
    files: list[Shapes] = [{}]
    size = 0
    for name, shape in model.shapes.items():
        nbytes = 2 * math.prod(shape)
        if files[-1] and size + nbytes > model.shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += nbytes
    return files


def write_hollow(model: Model, directory: Path) -> None:
    """Write a checkpoint with real headers and holes in place of weights."""
    directory.mkdir(parents=True)
    files = shards(model)
    weight_map = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            name = "model.safetensors"
        header, offset = {}, 0
        for tensor, shape in shapes.items():
            end = offset + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor] = name
            offset = end
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 8)
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + offset)
    if len(files) > 1:
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# --- groups, as the commands make them ------------------------------------------------------------


def describe(model: Model) -> tuple[StoredTensor, ...]:
    """Return the tensors as the store keeps them, without files."""
    described = [
        {
            "name": name,
            "kind": "tracked",
            "base_dtype": "BF16",
            "dtype": "BF16",
            "shape": model.shapes[name],
            "tied_to": None,
            "sketch_row": -1,
        }
        for name in sorted(model.shapes)
    ]
    large = [one for one in described if math.prod(one["shape"]) >= SKETCH_MIN_ELEMENTS]
    for row, one in enumerate(large):
        one["sketch_row"] = row
    return place_tensors(described, BLOCK_BYTES)[0]


def build_groups(tensors: Sequence[StoredTensor], steps: int) -> list[Group[Any, Any]]:
    """Return the groups of a commit of `steps`."""
    return grouped(
        (
            tensor.index,
            [BlockOf(tensor, block) for block in range(tensor.blocks)],
            lambda at: at.elements * at.tensor.itemsize * steps,
        )
        for tensor in tensors
        if tensor.blocks
    )


def totals_of(tensors: Sequence[StoredTensor], steps: int, share: float) -> BlockTotals:
    """Return what a store of `steps` would hold per block where `share` changes at each."""
    changes: list[int] = []
    for tensor in tensors:
        starts = [tensor.block_range(block) for block in (0, max(0, tensor.blocks - 1))]
        first, last = (math.ceil((stop - start) * share * steps) for start, stop in starts)
        changes += [first] * (tensor.blocks - 1) + [last] * (tensor.blocks > 0)
    return BlockTotals(changes, [math.ceil(count * STORED_BITS / 8) for count in changes])


def statistics_groups(
    tensors: Sequence[StoredTensor], totals: BlockTotals
) -> list[Group[Any, Any]]:
    """Return the groups of the statistics, one pass."""
    return grouped((tensor.index, totals.changed_blocks(tensor), totals.work) for tensor in tensors)


def write_groups(
    tensors: Sequence[StoredTensor], totals: BlockTotals, steps: int
) -> list[Group[Any, Any]]:
    """Return the groups of writing one output."""
    return grouped(
        (
            (
                tensor.index,
                [BlockOf(tensor, block) for block in range(tensor.blocks)],
                lambda at: totals.work(at) + at.elements * at.tensor.base_itemsize,
            )
            for tensor in tensors
        ),
        given=lambda _: np.zeros((steps, 1)),
    )


def groups_of(
    stage: str, tensors: Sequence[StoredTensor], steps: int, share: float
) -> list[Group[Any, Any]]:
    """Return the groups of a stage; for a build `steps` are those of the commit."""
    if stage == "build":
        return build_groups(tensors, steps)
    totals = totals_of(tensors, steps, share)
    if stage == "statistics":
        return statistics_groups(tensors, totals)
    return write_groups(tensors, totals, steps)


def least_shape(tensors: Sequence[StoredTensor]) -> planner.ModelShape:
    """Return the shape that the planner takes."""
    return model_shape(tensors, SKETCH_WIDTH)


# --- graphs ---------------------------------------------------------------------------------------


def graph_rows(
    name: str,
    stage: str,
    groups: Sequence[Group[Any, Any]],
    steps: int,
    threads: Sequence[int],
) -> list[dict[str, Any]]:
    """Build a stage's graph for so many threads; count and weigh it.

    The pickled size is taken once: the descriptions are the same however they are cut.
    """
    total = sum(group.nbytes for group in groups)
    rows: list[dict[str, Any]] = []
    for count in threads:
        task_bytes = costs.cluster_task_bytes(total, count, TASK_BYTES)
        started = time.process_time()
        graph = build_graph(
            _Nowhere(), groups, begins=stage == "statistics", task_bytes=task_bytes, name="relex-1"
        )
        graph_s = time.process_time() - started
        if not rows:
            started = time.process_time()
            pickled = len(cloudpickle.dumps(graph.tasks, protocol=5))
            pickle_s = time.process_time() - started
        at_work = [size for size in graph.nbytes.values() if size]
        rows.append(
            {
                "part": "graphs",
                "model": name,
                "stage": stage,
                "steps": steps,
                "threads": count,
                "wanted_bytes": task_bytes,
                "work_bytes": total,
                "tasks": len(graph.tasks) - 1,  # one is the stage
                "at work": len(at_work),
                "sums": len(graph.tasks) - 1 - len(at_work),
                "mean_bytes": sum(at_work) / max(1, len(at_work)),
                "largest_bytes": max(at_work, default=0),
                "outputs": len(graph.outputs),
                "pickled_bytes": pickled,
                "graph_s": graph_s,
                "pickle_s": pickle_s,
            }
        )
    return rows


class _Nowhere:
    """In the place of a stage in graphs that nobody runs."""

    def turn(self, _key: Any, _nbytes: int) -> Any:
        raise NotImplementedError


# --- what a client does and holds -----------------------------------------------------------------


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
    name: str, root: Path, steps: Sequence[int], threads: Sequence[int], share: float
) -> Client:
    """Do what the commands do before, between and after stages; in a process of its own.

    Times are of the processor, of which there is one: others may be at work here.
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
    record_bytes = store.record_path(store.head.commits[-1]).stat().st_size
    packed = _packed_bytes(root, store, base, places, max(steps))
    opened_bytes = resident_bytes() - before
    graphs: list[dict[str, Any]] = []
    held = 0
    for stage in STAGES:
        for count in [STEP_GROUP] if stage == "build" else steps:
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
    return store, took


def _packed_bytes(
    root: Path,
    store: Store,
    base: SourceCheckpoint,
    places: Sequence[CheckpointPlaces],
    steps: int,
) -> dict[str, int]:
    """Return what each stage is as it is sent to every process.

    A build is told of the files of all checkpoints that it found, though each commit reads some.
    """
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
            store, weights, filler, [assembly], _OPENED, DEFAULT_ENTRY_CAPACITY, None
        )
        sizes = {name: _packed(stage) for name, stage in found.items()}
    for name, known in (("packed commit_bytes", STEP_GROUP), ("packed last commit_bytes", steps)):
        with CheckpointReader() as reader, StoreWriter(root / "run.store") as writer:
            weights = BaseWeights(store, base, reader)
            for step in range(1, known + 1):
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
            sizes[name] = _packed(stage)
    return sizes


def _packed(stage: Stage[Any, Any, Any]) -> int:
    return len(pickle.dumps(PackedStage(stage, "relex-1", 16), protocol=5))


# --- the scheduler, measured ----------------------------------------------------------------------


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


def element_ns(stage: str, steps: int, share: float) -> float:
    """Return what a weight takes of one core in a stage, in nanoseconds."""
    if stage == "build":
        return steps * (2 * BUILD_NS["byte"] + share * BUILD_NS["change"])
    both = 2 * EXTRAPOLATE_NS["byte"] + steps * share * EXTRAPOLATE_NS["change"]
    return both / 2


@contextlib.contextmanager
def running_cluster(root: Path, processes: int, threads: int) -> Iterator[Running]:
    """Start a scheduler and workers in processes of their own, and end them."""
    where = root / f"scheduler-{processes}-{threads}.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(
            _process(
                root,
                environment,
                *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"),
                *("--dashboard-address", "127.0.0.1:0", "--no-show", "--scheduler-file", where),
            )
        )
        _wait_for(where, scheduler)
        for number in range(processes):
            stack.enter_context(
                _process(
                    root,
                    environment,
                    *("distributed.cli.dask_worker", "--scheduler-file", where, "--no-nanny"),
                    *("--nthreads", threads, "--memory-limit", 0, "--no-dashboard"),
                    *("--local-directory", root / f"worker-{number}", "--name", number),
                    *("--host", "127.0.0.1"),
                )
            )
        from distributed import Client as DaskClient

        address = json.loads(where.read_bytes())["address"]
        client = stack.enter_context(DaskClient(address, timeout=30, set_as_default=False))
        client.wait_for_workers(processes, timeout=60)
        there = psutil.Process(scheduler.pid)
        time.sleep(1)
        before = _cpu_s(there)
        time.sleep(_IDLE_S)
        idle_share = (_cpu_s(there) - before) / _IDLE_S
        yield Running(client, there, processes, threads, idle_share)


@contextlib.contextmanager
def _process(
    root: Path, environment: Mapping[str, str], *words: object
) -> Iterator[subprocess.Popen[bytes]]:
    with open(root / "cluster.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        if process.poll() is not None or time.monotonic() > until:
            raise BenchmarkError("the scheduler did not start; is distributed installed?")
        time.sleep(0.05)


def _warm_up_nothing(_formats: Any, _progress: Any) -> None:
    pass


@dataclass(frozen=True)
class Running:
    """A cluster that runs here.

    Attributes
    ----------
    threads : int
        Of each process.
    idle_share : float
        Of a processor, that the scheduler takes without tasks.
    """

    client: Any
    scheduler: psutil.Process
    processes: int
    threads: int
    idle_share: float

    def measure(
        self,
        name: str,
        stage: str,
        groups: Sequence[Group[Any, Any]],
        steps: int,
        share: float,
        *,
        paced: bool = False,
    ) -> dict[str, Any]:
        """Run a stage's graph through `Cluster`; return a row."""
        cluster = Cluster(self.client)
        cluster.prepare(_warm_up_nothing, None, NoProgress())
        work = stand_in(stage, steps, share, paced=paced)
        load = os.getloadavg()[0]
        here = psutil.Process()
        cpu = _cpu_s(self.scheduler), _cpu_s(here)
        started = time.perf_counter()
        cluster.run(work, groups, workers=self.threads, name=stage, progress=NoProgress())
        wall_s = time.perf_counter() - started
        scheduler_s, client_s = _cpu_s(self.scheduler) - cpu[0], _cpu_s(here) - cpu[1]
        net_s = max(0.0, scheduler_s - self.idle_share * wall_s)
        update = self._last_update()
        threads = self.processes * self.threads
        row = graph_counts(groups, threads, begins=work.begins)
        tasks = row["tasks"]
        elements = sum(at.elements for group in groups for task in group.tasks for at in task)
        work_s = element_ns(stage, steps, share) * 1e-9 * elements / threads if paced else None
        return {
            "part": "paced" if paced else "no work",
            "model": name,
            "stage": stage,
            "processes": self.processes,
            "threads": threads,
            **row,
            "wall_s": wall_s,
            "alone_s": work_s,
            "wall per task, ms": 1e3 * wall_s / tasks,
            "scheduler per task, ms": 1e3 * net_s / tasks,
            "client per task, ms": 1e3 * client_s / tasks,
            "scheduler_share": scheduler_s / wall_s,
            "order per task, ms": 1e3 * update["ordering"] / tasks,
            "take apart per task, ms": 1e3 * update["materialization"] / tasks,
            "enter per task, ms": 1e3 * update["state_initialization"] / tasks,
            "scheduler rss_bytes": self.scheduler.memory_info().rss,
            "load before": load,
        }

    def _last_update(self) -> dict[str, float]:
        events = [event for _, event in self.client.get_events("scheduler")]
        metrics = [e["metrics"] for e in events if e.get("action") == "update-graph"][-1]
        # Some are differences the wrong way round.
        return {
            name: abs(metrics[f"{name}_duration_seconds"])
            for name in ("materialization", "ordering", "state_initialization")
        }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def graph_counts(
    groups: Sequence[Group[Any, Any]], threads: int, *, begins: bool
) -> dict[str, int]:
    """Return how many tasks a stage is on so many threads, and how many of them work on blocks."""
    total = sum(group.nbytes for group in groups)
    graph = build_graph(
        _Nowhere(),
        groups,
        begins=begins,
        task_bytes=costs.cluster_task_bytes(total, threads, TASK_BYTES),
        name="relex-1",
    )
    return {
        "tasks": len(graph.tasks) - 1,
        "at work": sum(size > 0 for size in graph.nbytes.values()),
    }


# --- projections: arithmetic ---------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Machines, as a projection takes them.

    Attributes
    ----------
    cores : int
        Of each node; one process of so many threads.
    node_per_s, all_per_s : float
        Bytes per second that a node, and all together, read or write on the shared file system.
    task_s : float
        What a task costs the scheduler.
    """

    cores: int
    node_per_s: float
    all_per_s: float
    task_s: float

    def moved_per_s(self, nodes: int) -> float:
        return min(nodes * self.node_per_s, self.all_per_s)


def plan_build(
    tensors: Sequence[StoredTensor], nbytes: int, steps: int, limit: int, *, threads: int
) -> Plan:
    """Return the plan of building `steps`, as `build` makes it."""
    shape = least_shape(tensors)
    batch = batch_steps(shape, nbytes, 0, steps, limit)
    stage = StagePlan("encode", shape.blocks, 0, 0, planner.ingest_worker_bytes(shape, batch))
    largest = max(tensor.blocks for tensor in tensors)
    shared = planner.ingest_shared_bytes(shape, batch, steps, largest)
    return planner.make_plan([stage], _capacity(limit, threads), shared_bytes=shared)


def plan_extrapolate(
    tensors: Sequence[StoredTensor], steps: int, limit: int, *, threads: int
) -> Plan:
    """Return the plan of one output, as `extrapolate` makes it."""
    shape = least_shape(tensors)
    exact = shape.tensors - shape.sketched
    basis = min(steps, BASIS)
    capacity = DEFAULT_ENTRY_CAPACITY
    workers = [
        planner.power_worker_bytes(shape, capacity, basis),
        planner.write_worker_bytes(shape, capacity, 1),
    ]
    if exact:
        workers.append(planner.gram_worker_bytes(shape, capacity, steps))
    stages = [StagePlan("stage", shape.blocks, 0, 0, size) for size in workers]
    shared = planner.extrapolate_shared_bytes(shape, steps, basis, 1, exact)
    return planner.make_plan(stages, _capacity(limit, threads), shared_bytes=shared)


def _capacity(limit: int, threads: int) -> planner.Capacity:
    return planner.Capacity(
        processes=1,
        workers=threads,
        workers_fixed=threads == 1,
        reserved_bytes=RESIDENT_BYTES,
        memory_limit_bytes=limit,
    )


def batch_steps(shape: planner.ModelShape, nbytes: int, rows: int, left: int, limit: int) -> int:
    """Return the steps of the next commit under a memory limit."""
    return planner.commit_batch(shape, nbytes, rows, left, planner.statistics_bytes(limit))


def least_limit(plan: Callable[[int], Plan], workers: int) -> int:
    """Return the least memory limit, in whole MiB, with which so many threads work.

    A build makes larger commits where it may, so not every larger limit does.
    """

    def works(mib: int) -> bool:
        try:
            return plan(mib << 20).workers >= workers
        except MemoryLimitError:
            return False

    low, high = 0, 1
    while not works(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high << 20


def memory_rows(model: Model, steps: int, threads: int) -> list[dict[str, Any]]:
    """Return what the planner wants of each process, and what it does with the default."""
    tensors = describe(model)
    shape = least_shape(tensors)
    rows = []
    for command, plan in (
        ("build-store", partial(plan_build, tensors, model.nbytes, steps)),
        ("extrapolate", partial(plan_extrapolate, tensors, steps)),
    ):
        try:
            default = plan(planner.DEFAULT_LIMIT_BYTES, threads=threads).workers
        except MemoryLimitError:
            default = 0
        whole = least_limit(partial(plan, threads=threads), threads)
        rows.append(
            {
                "part": "memory",
                "model": model.name,
                "command": command,
                "checkpoints": steps,
                "threads of 768 MiB": default,
                "one thread_bytes": least_limit(partial(plan, threads=1), 1),
                "all threads_bytes": whole,
                "commit with 768 MiB, steps": batch_steps(
                    shape, model.nbytes, 0, steps, planner.DEFAULT_LIMIT_BYTES
                ),
                "commit, steps": batch_steps(shape, model.nbytes, 0, steps, whole),
                "tables_bytes": 12 * steps * shape.blocks,
            }
        )
    return rows


def project(
    model: Model,
    client: Mapping[str, Any],
    tasks: Mapping[tuple[str, int, int], int],
    site: Site,
    nodes: int,
    steps: int,
    share: float,
) -> list[dict[str, Any]]:
    """Return a row per command: what each part would take by itself, and the longest of them.

    Parameters
    ----------
    client : mapping
        The row of `measure_client`.
    tasks : mapping
        By stage, steps and threads.
    """
    threads = nodes * site.cores
    moved = site.moved_per_s(nodes)
    changes = share * model.weights
    stored = changes * STORED_BITS / 8
    records = client["record_bytes"]
    per_step = 16 * client["blocks"] + (2 * SKETCH_WIDTH + 4 + 17) * client["tensors"]
    back = {
        "build-store": min(steps, STEP_GROUP) * per_step + 8 * client["blocks"],
        "extrapolate": 8 * steps * RANK * client["tensors"],
    }
    build = {"read": 0.0, "cores": 0.0, "scheduler": 0.0, "opening": 0.0, "client": 0.0}
    commits = 0
    for rows in range(0, steps, STEP_GROUP):
        batch = min(STEP_GROUP, steps - rows)
        commits += 1
        # The base and the frames of all earlier steps again; each process its own tables of them.
        build["read"] += ((batch + 1) * model.nbytes + (rows + batch) * stored) / moved
        build["read"] += nodes * rows * records / moved
        nanoseconds = batch * (BUILD_NS["byte"] * model.nbytes + BUILD_NS["change"] * changes)
        nanoseconds += batch * BUILD_NS["tensor"] * client["tensors"]
        nanoseconds += BUILD_NS["byte"] * model.nbytes
        nanoseconds += rows * costs.CPU_DECODE_NS[2] * changes
        build["cores"] += nanoseconds * 1e-9 / threads
        build["scheduler"] += tasks["build", STEP_GROUP, threads] * site.task_s
        build["opening"] += client["open store_s"] + rows * client["tables_s"]
        build["client"] += batch * (
            client["open next_s"] + client["match_s"] + client["commit_s"] + client["tables_s"]
        )
    extrapolate = {
        # What is written counts as read: the file system has one bandwidth here.
        "read": 2 * (model.nbytes + steps * stored + nodes * steps * records) / moved
        + model.nbytes / moved,
        "cores": 1e-9
        * (
            EXTRAPOLATE_NS["byte"] * model.nbytes
            + EXTRAPOLATE_NS["change"] * changes * steps
            + EXTRAPOLATE_NS["tensor"] * client["tensors"] * steps
        )
        / threads,
        "scheduler": sum(
            tasks[stage, steps, threads] * site.task_s for stage in ("statistics", "write")
        ),
        "opening": 2 * (client["open store_s"] + steps * client["tables_s"]),
        "client": client["open store_s"] + steps * client["tables_s"],
    }
    found = []
    for command, parts, stages in (
        ("build-store", build, ("build",)),
        ("extrapolate", extrapolate, ("statistics", "write")),
    ):
        together = {name: parts[name] for name in ("read", "cores", "scheduler")}
        longest = max(together, key=lambda name: together[name])
        alone = parts["opening"] + parts["client"]
        found.append(
            {
                "part": "projection",
                "model": model.name,
                "command": command,
                "checkpoints": steps,
                "nodes": nodes,
                "threads": threads,
                "tasks": sum(
                    tasks[stage, STEP_GROUP if stage == "build" else steps, threads]
                    for stage in stages
                )
                * (commits if command == "build-store" else 1),
                **{f"{name}_s": seconds for name, seconds in parts.items()},
                "projected_s": together[longest] + alone,
                "bound by": longest if together[longest] > alone else "opening and client",
                "scheduler of work_share": together["scheduler"]
                / max(together["read"], together["cores"]),
                "read TB": parts["read"] * moved / 1e12,
                "back at a time_bytes": back[command],
                "store GB": stored * steps / 1e9,
            }
        )
    return found


def size_rows(
    shares: Sequence[float], threads: Sequence[int], task_s: float
) -> list[dict[str, Any]]:
    """Return how large a task has to be for scheduling to take a share, by the work per core."""
    return [
        {
            "part": "sizes",
            "threads": count,
            **{
                f"{100 * share:g} % at {rate / 1e9:g} GB/s_bytes": count * task_s / share * rate
                for share in shares
                for rate in (0.125e9, 1e9, 2.3e9)
            },
        }
        for count in threads
    ]


# --- the command ---------------------------------------------------------------------------------


@click.command("scaling")
@click.option(
    "--model",
    "names",
    type=click.Choice(list(MODELS)),
    multiple=True,
    default=("8B", "70B", "405B", "1T"),
    help="Several times for several.",
)
@click.option("--steps", type=click.IntRange(min=2), multiple=True, default=(100, 1000))
@click.option("--nodes", type=click.IntRange(min=1), multiple=True, default=(1, 4, 16, 64))
@click.option("--node-cores", type=click.IntRange(min=1), default=16)
@click.option("--node-gb-s", type=float, default=2.0, help="That a node reads, in 10^9 bytes.")
@click.option("--all-gb-s", type=float, default=50.0, help="That all nodes read together.")
@click.option("--change-share", type=float, default=0.005, help="Weights changed per step.")
@click.option(
    "--most-tasks", type=click.IntRange(min=1), default=40_000, help="Of a graph that is run."
)
@click.option("--processes", type=click.IntRange(min=1), default=2, help="That graphs run on.")
@click.option("--process-threads", type=click.IntRange(min=1), default=8, help="Of each.")
@click.option("--paced", multiple=True, default=("8B",), help="Models also run at their speed.")
@click.option("--quick", is_flag=True, help="A tiny model, few tasks: whether it runs at all.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write headers and tables.  [default: the system's temporary directory]",
)
@output_options
def command(
    *,
    names: tuple[str, ...],
    steps: tuple[int, ...],
    nodes: tuple[int, ...],
    node_cores: int,
    node_gb_s: float,
    all_gb_s: float,
    change_share: float,
    most_tasks: int,
    processes: int,
    process_threads: int,
    paced: tuple[str, ...],
    quick: bool,
    directory: Path | None,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Count tasks and bytes of models that do not fit here, run their graphs without work, project.

    Graphs, tables and times of the scheduler and the client are made and measured here; what
    larger machines would take is arithmetic with the bandwidths given.
    """
    if quick:
        names, steps, nodes, paced = ("tiny",), (20,), (1, 2), ("tiny",)
        processes, process_threads = 1, 2
    threads = [count * node_cores for count in nodes]
    report = Report(
        "Tasks, bytes and times at scale",
        "scaling",
        {
            "models": list(names),
            "steps": list(steps),
            "nodes": list(nodes),
            "node_cores": node_cores,
            "node_gb_s": node_gb_s,
            "all_gb_s": all_gb_s,
            "change_share": change_share,
        },
    )
    clients, tasks = {}, {}
    with work_directory(directory) as work:
        for name in names:
            # A process of its own: memory is measured, and given back.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(
                    measure_client, name, work, steps, threads, change_share
                ).result()
            clients[name] = found.row
            for row in found.graphs:
                report.add(row)
                tasks[name, row["stage"], row["steps"], row["threads"]] = row["tasks"]
        for name in names:
            report.add(clients[name])
        with running_cluster(work, processes, process_threads) as cluster:
            rows = run_graphs(
                cluster, names, steps[0], change_share, most_tasks=most_tasks, paced=paced
            )
    for row in rows:
        report.add(row)
    measured_ms = [row["scheduler per task, ms"] for row in rows if row["part"] == "no work"]
    site = Site(node_cores, node_gb_s * 1e9, all_gb_s * 1e9, median(measured_ms) / 1e3)
    for row in size_rows((costs.SCHEDULER_SHARE,), threads, site.task_s):
        report.add(row)
    for name in names:
        model = MODELS[name]()
        of_model = {key[1:]: count for key, count in tasks.items() if key[0] == name}
        for count in steps:
            for row in memory_rows(model, count, node_cores):
                report.add(row)
            for number in nodes:
                for row in project(
                    model, clients[name], of_model, site, number, count, change_share
                ):
                    report.add(row)
    report.note(
        f"A task costs the scheduler {1e3 * site.task_s:.2f} ms of its processor here (median of "
        "the runs without work, less what it takes without tasks, "
        f"{100 * cluster.idle_share:.1f} % of a processor); `costs` counts "
        f"{1e3 * costs.SCHEDULER_TASK_S:.2f}."
    )
    _publish_parts(report, json_path=json_path, markdown=markdown)


def _publish_parts(report: Report, *, json_path: Path | None, markdown: bool) -> None:
    """Print a table for each part: their columns have little in common."""
    for name in dict.fromkeys(row["part"] for row in report.rows):
        part = Report(name, report.command, report.settings, machine=report.machine)
        for row in report.rows:
            if row["part"] == name:
                part.add({column: value for column, value in row.items() if column != "part"})
        if markdown:
            click.echo(f"\n## {name}\n")
        publish(part, json_path=None, markdown=markdown)
    for note in report.notes:
        click.echo(note)
    if json_path is not None:
        report.write(json_path)


def run_graphs(
    cluster: Running,
    names: Sequence[str],
    steps: int,
    share: float,
    *,
    most_tasks: int,
    paced: Sequence[str],
) -> list[dict[str, Any]]:
    """Run graphs without work: all stages of the first two models, the builds of the others.

    Those of the models in `paced` also as fast as the work would go.
    """
    rows = []
    # The first run loads what later ones have.
    cluster.measure("tiny", "build", build_groups(describe(MODELS["tiny"]()), 2), 2, share)
    for number, name in enumerate(names):
        tensors = describe(MODELS[name]())
        for stage in STAGES if number < 2 else STAGES[:1]:
            count = STEP_GROUP if stage == "build" else steps
            groups = groups_of(stage, tensors, count, share)
            threads = cluster.processes * cluster.threads
            counts = graph_counts(groups, threads, begins=stage == "statistics")
            if counts["tasks"] > most_tasks:
                continue
            rows.append(cluster.measure(name, stage, groups, count, share))
            if name in paced:
                rows.append(cluster.measure(name, stage, groups, count, share, paced=True))
    return rows
