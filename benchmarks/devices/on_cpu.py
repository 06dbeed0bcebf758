"""What one thread of the CPU takes for a block, beside what the constants of `costs` say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.devices.one_block import BASIS, OneBlock
from relex_stream import costs

CPU_CONSTANTS: dict[str, Callable[[], tuple[float, ...]]] = {
    "products": lambda: costs.CPU_PRODUCT_NS,
    "outputs": lambda: costs.CPU_OUTPUT_NS,
    "gram": lambda: costs.CPU_GRAM_NS,
}
"""By kind of work; what each of a kind's constants is multiplied with is a row's ``counts``."""


def cpu_rows(block: OneBlock, runs: int) -> list[dict[str, Any]]:
    """Time what one thread of the CPU takes, beside what the constants of `costs` say."""
    rows = []
    for steps in sorted({max(2, block.rows // 3), block.rows}):
        stage, changes = block.statistics(steps), block.changes(steps)
        common = {"part": "cpu", "block": block.name, "steps": steps}
        decoding_s = _best(partial(block.decode, steps), runs)
        model = 1e-9 * changes * costs.CPU_DECODE_NS[block.itemsize]
        rows.append(_cpu_row(common, block, "decode", 0, changes, decoding_s, model))
        jobs: list[tuple[str, int, Callable[[], Any]]] = [
            ("gram", 0, partial(block.share, stage, None))
        ]
        for columns in (1, BASIS, 16):
            basis = block.basis(columns, steps)
            jobs.append(("products", columns, partial(block.share, stage, basis)))
        for columns in (1, 8):
            weights = block.weights(columns, steps)
            jobs.append(("outputs", columns, partial(block.cpu_outputs, weights)))
        for kind, columns, job in jobs:
            # What decoding costs is counted once, by its own constant.
            seconds = max(_best(job, runs) - decoding_s, 0.0)
            modelled = sum(
                1e-9 * constant * count
                for constant, count in zip(
                    CPU_CONSTANTS[kind](),
                    _cpu_counts(kind, block, changes, steps, columns),
                    strict=True,
                )
            )
            rows.append(_cpu_row(common, block, kind, columns, changes, seconds, modelled))
    room = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    source = np.zeros_like(room)
    per_byte = _best(lambda: np.copyto(room, source), runs) / room.size
    modelled = 1e-9 * costs.CPU_STAGING_NS * block.changes()
    seconds = per_byte * (4 + block.itemsize) * block.changes()
    common = {"part": "cpu", "block": block.name, "steps": block.rows}
    return [
        *rows,
        _cpu_row(common, block, "staging", 0, block.changes(), seconds, modelled),
    ]


def _cpu_row(
    common: Mapping[str, Any],
    block: OneBlock,
    kind: str,
    columns: int,
    changes: int,
    seconds: float,
    modelled: float,
) -> dict[str, Any]:
    return {
        **common,
        "work": kind,
        "columns": columns,
        "ms per block": seconds * 1e3,
        "by the model, ms": modelled * 1e3,
        "measured / model": seconds / modelled if modelled else None,
        "ns per change": 1e9 * seconds / max(1, changes),
        "counts": _cpu_counts(kind, block, changes, common["steps"], columns)
        if kind in CPU_CONSTANTS
        else [changes],
    }


def _cpu_counts(kind: str, block: OneBlock, changes: int, steps: int, columns: int) -> list[float]:
    """Return how often each of a kind's constants counts."""
    elements = block.elements
    if kind != "gram":
        return [elements, elements * columns, changes, changes * columns]
    _, few, many, pair = costs.CPU_GRAM_NS
    if changes * few <= changes * many + elements * steps**2 * pair:
        return [elements, changes, 0, 0]
    return [elements, 0, changes, elements * steps**2]


def _best(work: Callable[[], Any], runs: int) -> float:
    """Return the seconds of the quickest run: what constants of a model stand for."""
    work()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
