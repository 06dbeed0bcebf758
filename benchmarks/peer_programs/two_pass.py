"""RELEX in two plain passes over safetensors files, without a store.

The straightforward program for one target: read a block of a tensor from all checkpoints, add its
share to the tensor's Gram matrix; when the tensor is through, take the first eigenvector and the
line; then read all blocks again, add the weighted deltas to the base, round, write. Memory is a few
blocks. Every new target reads every checkpoint twice again.

Run it as ``python two_pass.py BASE CHECKPOINTS OUT --target-step N``. The last line it prints is
JSON: the seconds it took without start-up and imports.
"""

from __future__ import annotations

import os

# Threads take blocks; more threads inside a matrix product would only be in their way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import argparse
import json
import math
import mmap
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 64 << 20
"""Deltas of one block at all steps, as float32: what a thread holds. Faster than more or less."""

FLOATS: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""Dtypes of weights, and how numpy sees their bytes; it has no bf16."""

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    descriptor: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Model:
    """The safetensors files of a model directory, open for reading."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Place] = {}
        self.headers: dict[Path, bytes] = {}
        for file in sorted(directory.glob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            text = os.pread(descriptor, length, 8)
            self.headers[file] = length.to_bytes(8, "little") + text
            for name, entry in json.loads(text).items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    self.tensors[name] = Place(
                        file,
                        descriptor,
                        8 + length + start,
                        entry["dtype"],
                        tuple(entry["shape"]),
                        end - start,
                    )
        if not self.headers:
            raise SystemExit(f"{directory}: no safetensors file")

    def close(self) -> None:
        """Close the files."""
        for descriptor in {place.descriptor for place in self.tensors.values()}:
            os.close(descriptor)


def read(place: Place, start: int, stop: int, buffer: NDArray[np.uint8]) -> NDArray[Any]:
    """Return elements ``start`` to ``stop``, as they lie in the file, in a reused buffer."""
    item_bytes = np.dtype(FLOATS[place.dtype]).itemsize
    done, offset = 0, place.offset + start * item_bytes
    # With its address in the file's phase of a page: some processors copy at a fifth of the speed
    # where the one is a few bytes ahead of the other.
    lead = (offset - buffer.ctypes.data) % mmap.PAGESIZE // 64 * 64
    view = buffer[lead : lead + (stop - start) * item_bytes]
    while done < view.size:
        count = os.preadv(place.descriptor, [view[done:].data], offset + done)
        if count == 0:
            raise SystemExit(f"{place.file} is too short")
        done += count
    return view.view(FLOATS[place.dtype])


def widen(bits: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Write weights as float32."""
    if bits.dtype == np.uint16:  # bf16 is the upper half of a float32
        np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = bits


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round finite float32 numbers to a dtype, to nearest even."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype])
    bits = values.view(np.uint32)
    rounded: NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


@dataclass(frozen=True)
class Block:
    """A run of a tensor's elements."""

    name: str
    start: int
    stop: int


class TwoPasses:
    """The method, for one target.

    Parameters
    ----------
    base : Model
    checkpoints : sequence of (int, Model)
        By step.
    """

    def __init__(
        self, base: Model, checkpoints: Sequence[tuple[int, Model]], threads: int, block_bytes: int
    ) -> None:
        self._base = base
        self._steps = np.array([step for step, _ in checkpoints], np.float64)
        self._models = [model for _, model in checkpoints]
        self._pool = ThreadPoolExecutor(threads)
        self._local = threading.local()
        self._block = max(1, block_bytes // (4 * len(checkpoints)))
        # A tied head, or anything else that no checkpoint holds, is copied from the base.
        self.tracked = [
            name
            for name, place in base.tensors.items()
            if place.dtype in FLOATS and any(name in model.tensors for model in self._models)
        ]
        for step, model in checkpoints:
            for name in self.tracked:
                if name not in model.tensors:
                    raise SystemExit(f"step {step} has no tensor {name}")
                if model.tensors[name].shape != base.tensors[name].shape:
                    raise SystemExit(f"{name} has another shape at step {step}")

    def blocks(self, name: str) -> Iterator[Block]:
        """Cut a tensor."""
        elements = self._base.tensors[name].elements
        for start in range(0, elements, self._block):
            yield Block(name, start, min(elements, start + self._block))

    def deltas(self, block: Block) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the base's weights and the deltas of all steps, in this thread's buffers."""
        local = self._local
        if not hasattr(local, "deltas"):
            local.raw = np.empty(4 * self._block + mmap.PAGESIZE, np.uint8)
            local.base = np.empty(self._block, np.float32)
            local.deltas = np.empty((len(self._models), self._block), np.float32)
        count = block.stop - block.start
        base = local.base[:count]
        widen(read(self._base.tensors[block.name], block.start, block.stop, local.raw), base)
        # Rows of a shorter block lie close, as a matrix product wants them.
        deltas = local.deltas.reshape(-1)[: len(self._models) * count].reshape(-1, count)
        for row, model in zip(deltas, self._models, strict=True):
            widen(read(model.tensors[block.name], block.start, block.stop, local.raw), row)
            np.subtract(row, base, out=row)
        return base, deltas

    def _gram(self, block: Block) -> NDArray[np.float64]:
        _, deltas = self.deltas(block)
        return (deltas @ deltas.T).astype(np.float64)

    def weights(self, target: int) -> dict[str, NDArray[np.float32]]:
        """First pass: what each step's delta weighs in the prediction, per tensor."""
        centred = self._steps - self._steps.mean()
        slope_part = (target - self._steps.mean()) * centred / (centred @ centred)
        hat = 1 / len(self._steps) + slope_part
        blocks = [block for name in self.tracked for block in self.blocks(name)]
        grams = {name: np.zeros((len(hat), len(hat))) for name in self.tracked}
        for block, gram in zip(blocks, self._pool.map(self._gram, blocks), strict=True):
            grams[block.name] += gram
        weights = {}
        for name, gram in grams.items():
            first = np.linalg.eigh(gram)[1][:, -1]
            weights[name] = (first * (first @ hat)).astype(np.float32)
        return weights

    def write(self, out: Path, weights: dict[str, NDArray[np.float32]]) -> None:
        """Second pass: base plus weighted deltas, in the base's files."""
        out.mkdir(parents=True)
        for file in self._base.directory.iterdir():
            if file.is_file() and file not in self._base.headers:
                shutil.copyfile(file, out / file.name)
        targets = {}
        for file, header in self._base.headers.items():
            targets[file] = os.open(out / file.name, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(targets[file], header, 0)
        blocks = [block for name in weights for block in self.blocks(name)]

        def fill(block: Block) -> None:
            place = self._base.tensors[block.name]
            base, deltas = self.deltas(block)
            predicted = narrow(base + weights[block.name] @ deltas, place.dtype)
            offset = place.offset + block.start * predicted.itemsize
            os.pwrite(targets[place.file], predicted.tobytes(), offset)

        for _ in self._pool.map(fill, blocks):
            pass
        for name, place in self._base.tensors.items():
            if name not in weights:
                for first in range(0, place.nbytes, _COPY_BYTES):
                    data = os.pread(
                        place.descriptor,
                        min(_COPY_BYTES, place.nbytes - first),
                        place.offset + first,
                    )
                    os.pwrite(targets[place.file], data, place.offset + first)
        for descriptor in targets.values():
            os.close(descriptor)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def find_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return the model directories below ``global_step_N``, by step."""
    found = []
    for path in directory.iterdir():
        match = re.fullmatch(r"global_step_(\d+)", path.name)
        if match:
            inner = [path / "actor" / "huggingface", path / "huggingface", path]
            found.append((int(match[1]), next(one for one in inner if one.is_dir())))
    if len(found) < 2:
        raise SystemExit(f"{directory}: fewer than two directories global_step_N")
    return sorted(found)


def run(
    base: Path,
    checkpoints: Path,
    out: Path,
    *,
    target_step: int,
    threads: int,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Predict one step; return the figures that are printed."""
    started = time.perf_counter()
    base_model = Model(base)
    models = [(step, Model(path)) for step, path in find_checkpoints(checkpoints)]
    job = TwoPasses(base_model, models, threads, block_bytes)
    try:
        job.write(out, job.weights(target_step))
    finally:
        job.close()
        for model in [base_model, *(model for _, model in models)]:
            model.close()
    return {"call_s": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target-step", type=int, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    figures = run(
        options.base,
        options.checkpoints,
        options.out,
        target_step=options.target_step,
        threads=options.threads,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
