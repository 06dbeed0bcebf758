"""Whole programs in turn, round by round until a deadline, and the models that they wrote."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import document
from benchmarks.processes import BenchmarkError, Measurement, Program, alternate
from benchmarks.report import median, process_row
from relex_stream.ulp import Bits, ordered

_PIECE = 1 << 24


@dataclass(frozen=True)
class Deadline:
    """When to stop beginning things."""

    at: float

    @property
    def left_s(self) -> float:
        """Seconds left, perhaps less than none."""
        return self.at - time.monotonic()

    def share(self, parts: int) -> Deadline:
        """Return when the first of so many equal parts of what is left ends."""
        return Deadline(time.monotonic() + max(0.0, self.left_s) / parts)


@dataclass
class Rounds:
    """What some programs took, round by round, and checksums of what they wrote."""

    by_name: dict[str, list[Measurement]]
    digests: dict[str, set[int]]

    def row(self, name: str) -> dict[str, Any]:
        """Return the columns that a program's runs fill; the first counts only if alone."""
        first, *later = self.by_name[name]
        measured = later or [first]
        return {
            **process_row(measured),
            "first_s": first.wall_s,
            "in_process_s": self.in_process_s(name),
            "same bits each run": len(self.digests[name]) == 1 if later else None,
        }

    def in_process_s(self, name: str) -> float:
        """Return the median of what the command says that it took."""
        first, *later = self.by_name[name]
        return median(document(each)["elapsed_s"] for each in later or [first])


def measure_rounds(
    programs: Sequence[Program],
    outputs: Mapping[str, Path],
    *,
    runs: int,
    deadline: Deadline,
    after_first: Callable[[], None] = lambda: None,
) -> Rounds:
    """Run programs in turn, once to warm up and `runs` times more, or as often as time is left."""
    found = Rounds({each.name: [] for each in programs}, {each.name: set() for each in programs})
    for number in range(runs + 1):
        started = time.monotonic()
        for name, (measured,) in alternate(programs, runs=1, warmup=0).items():
            found.by_name[name].append(measured)
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(
                found.digests, pool.map(digest_of, map(outputs.get, found.digests)), strict=True
            ):
                found.digests[name].add(digest)
        if number == 0:
            after_first()
        if time.monotonic() - started > deadline.left_s:
            break
    return found


def digest_of(model: Path | None) -> int:
    """Return a checksum of a model's weights."""
    total = 0
    for file in sorted(model.glob("*.safetensors")) if model is not None else ():
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE):
                total = zlib.crc32(piece, total)
    return total


def difference(one: Path, other: Path) -> tuple[float, int]:
    """Return the share of weights in which two models differ, and by how many ULP at most.

    Raises
    ------
    BenchmarkError
        If they do not have the same tensors.
    """
    ours, theirs = dict(_weights_of(one)), dict(_weights_of(other))
    if ours.keys() != theirs.keys():
        raise BenchmarkError(f"{one.name} and {other.name} have other tensors")
    differing = total = most = 0
    for name, bits in ours.items():
        for first in range(0, bits.size, _PIECE):
            pair = [each[first : first + _PIECE] for each in (bits, theirs[name])]
            unlike = np.flatnonzero(pair[0] != pair[1])
            if unlike.size:
                left, right = (ordered(each[unlike]) for each in pair)
                signed = f"i{left.itemsize}"
                apart = left.view(signed).astype(np.int64) - right.view(signed)
                most = max(most, int(np.abs(apart).max()))
            differing += unlike.size
        total += bits.size
    return differing / max(1, total), most


def _weights_of(model: Path) -> Iterator[tuple[str, Bits]]:
    """Yield each tensor's name and bit patterns, flat, mapped from the file."""
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                width = {"BF16": 2, "F16": 2, "F32": 4}[entry["dtype"]]
                yield name, data[first:last].view(f"u{width}")
