"""What is measured: trajectories made for it, and how much of each.

Of a trajectory its base and its store are kept; checkpoints are deleted when they are in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.commands import remove, run
from benchmarks.trajectory import PRESETS, Preset, step_directory, write_steps
from relex_stream import planner
from relex_stream.devices import Device
from relex_stream.store import Store

_STEPS_AT_ONCE = 16


@dataclass(frozen=True)
class Case:
    """A trajectory.

    Attributes
    ----------
    routes : tuple of str
        What is given for ``--svd``, one after the other.
    """

    name: str
    preset: Preset
    dtype: str
    steps: int
    routes: tuple[str, ...] = ("randomized",)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    block_elements : mapping
        Of the blocks that are taken apart, by dtype.
    rows : int
        Their steps.
    copy_bytes, link_bytes, matrix : int
        What bandwidths and the speed of products are measured with.
    """

    cases: tuple[Case, ...]
    block_elements: Mapping[str, int]
    rows: int
    copy_bytes: int
    link_bytes: int
    matrix: int


@dataclass(frozen=True)
class Settings:
    """What the command was asked for."""

    sizes: Sizes
    device: Device
    workers: tuple[int, ...]
    runs: int
    cluster: bool
    pretend: bool


def _cut_to(name: str, **config: int | bool) -> Preset:
    """Return a preset with fewer layers or words."""
    whole = PRESETS[name]
    return replace(whole, name=f"{name}, cut", config=dict(whole.config) | config)


START_CASE = Case("start", _cut_to("tiny", vocab_size=4096), "bf16", 6)
"""Hardly any work, but one tensor large enough for a device: what is left is starting."""


def full_sizes(*, steps: int, layers: int, fp32: Preset, fp32_steps: int) -> Sizes:
    """Return what is measured on a GPU."""
    sliced = _cut_to(
        "qwen3-8b", num_hidden_layers=layers, vocab_size=8192, tie_word_embeddings=True
    )
    return Sizes(
        cases=(
            START_CASE,
            Case("fp32", fp32, "fp32", fp32_steps, ("randomized", "exact")),
            Case("0.5b-bf16", PRESETS["qwen2.5-0.5b"], "bf16", steps),
            Case("8b-slice-bf16", sliced, "bf16", max(2, steps // 2)),
        ),
        block_elements={"bf16": 1 << 20, "fp32": 1 << 19},
        rows=50,
        copy_bytes=1 << 30,
        link_bytes=256 << 20,
        matrix=4096,
    )


def pretend_sizes() -> Sizes:
    """Return what a test can wait for; every tensor that matters is large enough for a device."""
    tiny = START_CASE.preset
    return Sizes(
        cases=(
            START_CASE,
            Case("fp32", tiny, "fp32", 4, ("randomized", "exact")),
            Case("0.5b-bf16", tiny, "bf16", 4),
        ),
        block_elements=dict.fromkeys(("bf16", "fp32"), planner.DEVICE_MIN_ELEMENTS),
        rows=5,
        copy_bytes=1 << 20,
        link_bytes=1 << 20,
        matrix=64,
    )


def block_cases(sizes: Sizes) -> list[Case]:
    """Return the models whose one large tensor is one block, one for each dtype."""
    config = {"hidden_size": 1024, "num_hidden_layers": 0}
    return [
        Case(
            f"block-{dtype}",
            _cut_to("40m", **config, vocab_size=elements // 1024),
            dtype,
            sizes.rows,
        )
        for dtype, elements in sizes.block_elements.items()
    ]


def prepare(case: Case, root: Path, *, workers: int) -> tuple[Path, Path]:
    """Return the directories of a base and of a store, made as far as they are not there.

    Checkpoints that were there before stay; those written here do not.
    """
    directory = root / case.name
    base, store = step_directory(directory, 0), directory / "store"
    if not base.exists():
        write_steps(directory, case.preset, [0], dtype=case.dtype)
    there = set(Store(store).steps) if store.exists() else set()
    missing = [step for step in range(1, case.steps + 1) if step not in there]
    for first in range(0, len(missing), _STEPS_AT_ONCE):
        batch = missing[first : first + _STEPS_AT_ONCE]
        to_write = [step for step in batch if not step_directory(directory, step).exists()]
        written = write_steps(directory, case.preset, to_write, dtype=case.dtype)
        options = ("--steps", f"{batch[0]}:{batch[-1]}", *worker_options(workers))
        run(case.name, "build-store", base, directory / "checkpoints", store, *options)
        for each in written:
            remove(each)
    return base, store


def worker_options(workers: int) -> tuple[object, ...]:
    """Return the options of a command that runs with so many workers."""
    # Room for any number of workers, and for torch and CUDA in the process.
    return ("--workers", workers, "--memory-limit", f"{6 + workers // 4}GiB")
