"""Whole processes hold no more memory than their plans say, whatever the size of the model.

The peak is the child's own high-water mark: what `resource` says of a child also counts the
process that started it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.make_checkpoints import make_trajectory
from tests.make_deltas import changed_run, grail_run, slime_run

MIB = 1 << 20

CHILD = """
import json, pathlib, resource, sys
from relex_stream.cli.main import cli
try:
    cli.main(sys.argv[2:], prog_name="relex-stream")
except SystemExit as end:
    status = end.code
try:
    found = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    peak = int(found) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(status)
"""


@dataclass(frozen=True)
class Run:
    """What a command said, and the most its process held."""

    document: dict[str, Any]
    peak_bytes: int

    @property
    def projected_bytes(self) -> int:
        projected: int = self.document["plan"]["projected_bytes"]
        return projected


def run(directory: Path, *arguments: object) -> Run:
    """Run a command in a process of its own."""
    peak = directory / "peak"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, peak, *map(str, arguments), "--json", "--quiet"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Run(json.loads(done.stdout), int(peak.read_text()))


# --- synthetic checkpoints -----------------------------------------------------------------------


class Model:
    """Weights in a few equal tensors, written and moved fast enough for hundreds of millions.

    Parameters
    ----------
    weights : int
        In all; rounded down to a multiple of 8 Ki.
    dtype : str
        BF16 or F32.
    """

    def __init__(self, weights: int, dtype: str) -> None:
        rows = weights // (8 << 10)
        shapes = {f"model.layers.{layer}.mlp.weight": (rows, 1024) for layer in range(8)}
        self._rng = np.random.default_rng(3)
        self._bits: list[NDArray[Any]] = []
        header, end = {}, 0
        for name, shape in shapes.items():
            normal = self._rng.standard_normal(shape[0] * shape[1], np.float32)
            single = (np.float32(0.02) * normal).view(np.uint32)
            bits = single if dtype == "F32" else (single >> np.uint32(16)).astype(np.uint16)
            self._bits.append(bits)
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + bits.nbytes],
            }
            end += bits.nbytes
        text = json.dumps(header).encode()
        self._header = len(text).to_bytes(8, "little") + text

    def move(self, share: float) -> None:
        """Raise the bit patterns of some weights by one; of all of them by up to 250 if 1."""
        for bits in self._bits:
            if share == 1:
                distance = self._rng.integers(0, 250, bits.size, np.uint32)
                np.add(bits, distance.astype(bits.dtype), out=bits)
            else:
                bits[self._rng.integers(0, bits.size, int(share * bits.size))] += 1

    def replace(self) -> None:
        """Draw all patterns anew: deltas that nothing compresses."""
        for bits in self._bits:
            # Positive exponents around 1, so that all of them are finite.
            random = self._rng.integers(0, 1 << 30, bits.size, np.uint32)
            shift = 8 * (4 - bits.itemsize)
            bits[:] = random >> np.uint32(shift)

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        with (directory / "model.safetensors").open("wb") as file:
            file.write(self._header)
            for bits in self._bits:
                file.write(bits.data)


def write_run(
    root: Path, weights: int, steps: int, dtype: str = "BF16", change: str = "sparse"
) -> Path:
    model = Model(weights, dtype)
    model.write(root / "base")
    for step in range(1, steps + 1):
        if change == "replaced":
            model.replace()
        else:
            model.move(0.005 if change == "sparse" else 1)
        model.write(root / "checkpoints" / f"step_{step}")
    return root


@dataclass(frozen=True)
class Peaks:
    """The runs of both commands over one trajectory."""

    build: Run
    randomized: Run
    exact: Run

    def __iter__(self) -> Iterator[Run]:
        return iter((self.build, self.randomized, self.exact))


def measure(root: Path, *options: object) -> Peaks:
    """Build a store from `root` and extrapolate from it by both routes; what they wrote goes."""
    store, out = root / "store", root / "out"
    shutil.rmtree(store, ignore_errors=True)
    extrapolate = ("extrapolate", store, out, "--target-step", 100, "--overwrite", *options)
    try:
        peaks = Peaks(
            run(root, "build-store", root / "base", root / "checkpoints", store, *options),
            run(root, *extrapolate),
            run(root, *extrapolate, "--svd", "exact", "--rank", 3, "--target-step", 200),
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    for name, found in zip(("build", "randomized", "exact"), peaks, strict=True):
        print(  # noqa: T201 - shown by pytest -s and on failure
            f"{root.name} {name}: peak {found.peak_bytes / MIB:.0f} MiB, "
            f"projected {found.projected_bytes / MIB:.0f} MiB, "
            f"{found.document['plan']['workers']} workers, {found.document['elapsed_s']:.1f} s"
        )
    return peaks


def assert_within(peaks: Peaks, limit_bytes: int) -> None:
    for found in peaks:
        assert found.peak_bytes <= found.projected_bytes <= limit_bytes
        # And the command says so itself, but for what it takes to print that.
        assert found.document["peak_memory_bytes"] <= found.peak_bytes
        assert found.document["peak_memory_bytes"] >= 0.9 * found.peak_bytes


# --- tests ---------------------------------------------------------------------------------------


def test_the_peak_of_both_commands_stays_under_the_projection(tmp_path: Path) -> None:
    root = write_run(tmp_path, 16 << 20, 4)
    assert_within(measure(root, "--workers", 2), 768 * MIB)


def test_dense_changes_stay_under_the_projection(tmp_path: Path) -> None:
    # The worst there is: whole blocks, nothing compresses, more steps than a group.
    root = write_run(tmp_path, 4 << 20, 17, "F32", "replaced")
    assert_within(measure(root, "--workers", 2, "--memory-limit", "512MiB"), 512 * MIB)


def test_a_limit_is_kept_with_fewer_workers(tmp_path: Path) -> None:
    root = write_run(tmp_path, 8 << 20, 2)
    generous = run(
        root, "build-store", root / "base", root / "checkpoints", root / "a", "--workers", 2
    )
    plan = generous.document["plan"]
    (stage,) = plan["stages"]
    # Room for less than two: a worker's share less than both need.
    limit = generous.projected_bytes - stage["worker_bytes"] // 2
    tight = run(
        root,
        "build-store",
        root / "base",
        root / "checkpoints",
        root / "b",
        "--memory-limit",
        limit,
    )
    assert tight.document["plan"]["workers"] == 1
    assert tight.peak_bytes <= tight.projected_bytes <= limit


def test_a_parent_that_holds_much_does_not_count(tmp_path: Path) -> None:
    held = np.ones(300 * MIB, np.uint8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 300 * MIB / 1024
    root = write_run(tmp_path, 8 << 10, 2)
    found = run(root, "build-store", root / "base", root / "checkpoints", root / "store")
    assert found.document["peak_memory_bytes"] < held.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("BF16", "sparse"),
        ("BF16", "dense"),
        ("BF16", "replaced"),
        ("F32", "dense"),
        ("F32", "replaced"),
    ],
)
def test_any_content_stays_under_the_projection(tmp_path: Path, dtype: str, change: str) -> None:
    # More than one group of steps, and whole blocks.
    root = write_run(tmp_path / f"{dtype} {change}", 8 << 20, 20, dtype, change)
    assert_within(measure(root, "--workers", 3), 768 * MIB)
    assert_within(measure(root, "--memory-limit", "512MiB"), 512 * MIB)
    shutil.rmtree(root)


@pytest.mark.slow
def test_the_peak_does_not_grow_with_checkpoints(tmp_path: Path) -> None:
    peaks = []
    for steps in (8, 32):
        root = write_run(tmp_path / f"{steps} checkpoints", 24 << 20, steps)
        peaks.append(measure(root, "--workers", 2, "--memory-limit", "512MiB"))
        assert_within(peaks[-1], 512 * MIB)
        shutil.rmtree(root)
    for few, many in zip(*peaks, strict=True):
        assert many.peak_bytes < 1.1 * few.peak_bytes


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for weights in (20_000_000, 160_000_000):
        root = write_run(tmp_path / f"{weights} weights", weights, 8)
        peaks.append(measure(root, "--workers", 2, "--memory-limit", "512MiB"))
        assert_within(peaks[-1], 512 * MIB)
        shutil.rmtree(root)
    for small, large in zip(*peaks, strict=True):
        assert large.peak_bytes < 1.1 * small.peak_bytes


OBJECTS = """
import gc, sys
from relex_stream import machine, planner
from relex_stream.blocks import BlockOf, model_shape
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.specs import NoProgress
from relex_stream.store.records import place_tensors

class Nothing(Stage):
    def work(self, tasks, values):
        return [0] * len(tasks)
    def combine(self, partials):
        return 0
    def finish(self, key, value, total, *, last):
        return 0

tensors, blocks = map(int, sys.argv[1:])
kind = {"kind": "tracked", "base_dtype": "BF16", "dtype": "BF16", "tied_to": None}
tensors, _ = place_tensors(
    [{"name": f"t{i}", "shape": (blocks << 10,), "sketch_row": i, **kind} for i in range(tensors)],
    2 << 10,
)
gc.collect()
before = machine.resident_bytes()
groups = grouped(
    (tensor.index, [BlockOf(tensor, b) for b in range(tensor.blocks)], lambda _: 32 << 20)
    for tensor in tensors
)
Threads(1).run(Nothing(), groups, workers=1, name="x", progress=NoProgress())
print(machine.peak_bytes() - before, planner._objects_bytes(model_shape(tensors, 256)))
"""


@pytest.mark.parametrize(("tensors", "blocks"), [(20, 1000), (2000, 10), (2000, 40)])
def test_what_describes_a_stage_stays_under_what_is_planned_for_it(
    tensors: int, blocks: int
) -> None:
    command = [sys.executable, "-c", OBJECTS, str(tensors), str(blocks)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, planned = map(int, done.stdout.split())
    assert taken <= planned <= 3 * taken


def test_every_process_of_a_cluster_stays_under_the_projection(tmp_path: Path) -> None:
    root = write_run(tmp_path, 8 << 20, 3)
    for found in measure(root, "--local-cluster", 2, "--workers", 1):
        assert found.document["plan"]["processes"] == 2
        # That of any process; of the command's own what it takes to print is not in it.
        peak = max(found.peak_bytes, found.document["peak_memory_bytes"])
        assert peak <= found.projected_bytes <= 768 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("publish", [slime_run, grail_run, changed_run])
@pytest.mark.parametrize("share", [0.005, 0.3])
def test_feeds_of_changes_stay_under_the_default_limit(
    tmp_path: Path, publish: Callable[..., Path], share: float
) -> None:
    shapes = {"embed": (60_001, 1024), "up": (8192, 4096), "norm": (4096,)}
    moved = make_trajectory(tmp_path / "run", steps=(1, 2), tensors=shapes, change_share=share)
    feed = publish(moved, tmp_path / "feed")
    store = tmp_path / "store"
    source = ("--source", "changed-safetensors") if publish is changed_run else ()
    built = run(tmp_path, "build-store", moved.base, feed, store, *source)
    assert built.peak_bytes <= built.projected_bytes <= 768 * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 M F32 weights on four ranks, written by torch."""
    out = tmp_path_factory.mktemp("large")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.torch_writers.large", str(out)]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    yield out
    shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("cast", [(), ("--as", "bf16")])
@pytest.mark.parametrize("layout", ["fsdp", "dcp"])
def test_shards_of_ranks_stay_under_the_default_limit(
    large: Path, tmp_path: Path, layout: str, cast: tuple[str, ...]
) -> None:
    store = tmp_path / "store"
    built = run(tmp_path, "build-store", large / "base", large / layout, store, *cast)
    exported = run(tmp_path, "export", store, tmp_path / "out", "--step", 2, "--format", "hf")
    assert built.peak_bytes <= built.projected_bytes <= 768 * MIB
    assert exported.peak_bytes <= 768 * MIB
