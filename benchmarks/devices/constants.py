"""What the measured rows say about the constants of `relex_stream.costs`.

Rows in, rows out: nothing is measured here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.devices.cases import START_CASE
from benchmarks.devices.on_cpu import CPU_CONSTANTS
from benchmarks.devices.one_block import BASIS, Float64
from benchmarks.report import median
from relex_stream import costs


def suggested_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    """Return values for constants of `costs`, as far as measured, and what each comes from.

    Parameters
    ----------
    rows : sequence of mapping
        All rows of the report.
    """
    found: dict[str, tuple[Any, str]] = {}
    starts = {
        row["program"]: row["wall_s"]
        for row in rows
        if row["part"] == "commands" and row["case"] == START_CASE.name
    }
    cpu = [seconds for name, seconds in starts.items() if name.startswith("cpu")]
    if "cuda" in starts and cpu:
        found["DEVICE_START_S"] = (
            max(0.0, starts["cuda"] - min(cpu)),
            "a command with hardly any work, with the device less without",
        )
    found |= _device_constants(rows)
    found |= _cpu_constants([row for row in rows if row["part"] == "cpu"])
    return found


def _device_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    peaks = {row["peak"]: row for row in rows if row["part"] == "peaks"}
    stages = [row for row in rows if row["part"] == "stages"]
    if not peaks or not stages:
        return {}
    copy = next(row["GB/s"] for name, row in peaks.items() if name.startswith("copy")) * 1e9
    flops = next(row["GFLOPS"] for row in peaks.values() if "GFLOPS" in row) * 1e9
    puts = [row for row in stages if row["stage"].startswith("put")]
    link = sum(row["link_bytes"] for row in puts) / sum(1e-3 * row["device ms"] for row in puts)
    per_dense: dict[str, float] = {}
    for row in stages:
        seconds, dense = 1e-3 * row["device ms"], row["dense"]
        if row["stage"].startswith("products"):
            seconds -= dense * 4 * BASIS / flops
            per_dense[f"{row['block']}, products"] = seconds * copy / dense
        elif row["stage"].startswith("outputs, o=1"):
            per_dense[f"{row['block']}, outputs"] = seconds * copy / dense - 24
    texts = "; ".join(f"{name}: {value:.0f}" for name, value in per_dense.items())
    return {
        "DEVICE_LINK_BYTES_PER_S": (link, "put of both blocks, scattering included"),
        "DEVICE_MEMORY_BYTES_PER_S": (copy, "the large copy"),
        "DEVICE_FLOPS": (flops, "the large product"),
        "DEVICE_DENSE_BYTES": (
            sum(per_dense.values()) / len(per_dense),
            f"the mean, at the bandwidth of the copy, of {texts}",
        ),
    }


def _cpu_constants(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    if not rows:
        return {}
    found: dict[str, tuple[Any, str]] = {}
    decoding = {}
    for itemsize in (2, 4):
        seen = [row for row in rows if row["work"] == "decode" and row["itemsize"] == itemsize]
        if seen:
            decoding[itemsize] = median(row["ns per change"] for row in seen)
    found["CPU_DECODE_NS"] = (decoding, "frames in the page cache, one thread")
    names = {"products": "CPU_PRODUCT_NS", "outputs": "CPU_OUTPUT_NS", "gram": "CPU_GRAM_NS"}
    for kind, name in names.items():
        seen = [row for row in rows if row["work"] == kind]
        fitted, worst = fit_nonnegative(
            [row["counts"] for row in seen], [1e6 * row["ms per block"] for row in seen]
        )
        # What no run tells about stays.
        told = np.any([row["counts"] for row in seen], axis=0)
        kept = zip(fitted, CPU_CONSTANTS[kind](), told, strict=True)
        values = tuple(float(new) if tells else old for new, old, tells in kept)
        found[name] = (values, f"one thread, least squares, largest error {100 * worst:.0f} %")
    staging = [row["ns per change"] for row in rows if row["work"] == "staging"]
    found["CPU_STAGING_NS"] = (max(staging), "a copy of 1 MiB to page-locked memory")
    return found


def fit_nonnegative(
    counts: Sequence[Sequence[float]], wanted: Sequence[float]
) -> tuple[Float64, float]:
    """Fit by least squares of relative errors, no coefficient below zero.

    Returns
    -------
    coefficients : ndarray of float64
    worst : float
        The largest relative error.

    Examples
    --------
    >>> fit_nonnegative([[1, 0], [1, 2], [1, 4]], [3, 7, 11])[0].round(6).tolist()
    [3.0, 2.0]
    """
    goal = np.maximum(np.asarray(wanted, np.float64), 1e-12)
    rows = np.asarray(counts, np.float64) / goal[:, None]
    best, least = np.zeros(rows.shape[1]), math.inf
    # Of so few, every choice of those above zero can be tried.
    for count in range(1, rows.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(rows.shape[1]), count)):
            found, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(goal)), rcond=None)
            error = float(np.square(rows[:, chosen] @ found - 1).sum())
            if found.min() >= 0 and error < least - 1e-12:
                best, least = np.zeros(rows.shape[1]), error
                best[chosen] = found
    return best, float(np.abs(rows @ best - 1).max())


def add_projections(
    rows: Sequence[dict[str, Any]], constants: Mapping[str, tuple[Any, str]]
) -> None:
    """Put beside each command what the cost model projects, now and with other constants."""
    measured = [row for row in rows if row["part"] == "commands"]
    starts = [
        row["in_process_s"]
        for row in measured
        if row["case"] == START_CASE.name and row["kind"] == "cpu"
    ]
    for row in measured:
        work, cores, kind = costs.DeviceWork(**row["work"]), row["workers"], row["kind"]
        projected = partial(costs.projected_cpu_s, work, cores)
        if kind != "cpu":
            projected = partial(costs.projected_device_s, work, cores, 1)
        # The model does not count what any command takes to begin.
        row["without_start_s"] = max(0.0, row["in_process_s"] - min(starts, default=0.0))
        row["projected_s"] = projected()
        values = {name: value for name, (value, _) in constants.items()}
        if values:
            with mock.patch.multiple(costs, **values):
                row["projected_anew_s"] = projected()


def constant_rows(constants: Mapping[str, tuple[Any, str]]) -> list[dict[str, Any]]:
    """Return a row per constant."""
    return [
        {
            "part": "constants",
            "constant": name,
            "now": _shown(getattr(costs, name)),
            "measured": _shown(value),
            "from": source,
            "value": list(value.items() if isinstance(value, dict) else np.ravel(value).tolist()),
        }
        for name, (value, source) in constants.items()
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one:.3g}" for key, one in value.items())
    if isinstance(value, tuple):
        return ", ".join(f"{one:.3g}" for one in value)
    return f"{value:.3g}"
