"""The ``codec`` command: size and speed of the store's frames beside general compressors.

One thread, one pair of checkpoints in memory, no file. Speed counts the bytes of the checkpoint
that is encoded or restored, whatever the codec makes of them. Every codec starts from the two
checkpoints and ends with the second one, bit for bit: forming a delta is part of the time.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numcodecs import Shuffle, blosc, zstd
from numpy.typing import NDArray

from benchmarks.processes import BenchmarkError
from benchmarks.report import Report, median, publish, report_options
from benchmarks.trajectory import LEARNING_RATE, Part, Replay
from relex_stream.codec import Changes, FrameCodec
from relex_stream.ulp import advance

Bits = NDArray[Any]
"""uint16 (bf16) or uint32 (fp32)."""

CHANGE_SHARES = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5)
BLOCK_BYTES = 2 << 20
ZSTD_LEVEL = 3
"""What the zstd program uses when no level is named."""

_ROWS_PER_CHUNK = 16


# --- a pair of checkpoints -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two checkpoints as bit patterns, and how many weights differ."""

    dtype: str
    before: Bits
    after: Bits
    changed: int


def make_pair(dtype: str, elements: int, share: float, *, seed: int) -> Pair:
    """Return two steps of the generator's trajectory, between which about `share` changes.

    bf16: by the learning rate, so more changes also mean larger ones. fp32: nearly every weight
    changes at any usual rate; here only so many of them, drawn at random, move at all (as when the
    others are frozen), at the generator's rate.
    """
    if dtype == "bf16":
        rate = _learning_rate(min(elements, 1 << 20), share, seed)
        before, after = _two_steps(dtype, elements, rate, seed)
    else:
        before, after = _two_steps(dtype, elements, LEARNING_RATE, seed)
        kept = np.random.default_rng(seed).random(elements, np.float32) >= share
        after[kept] = before[kept]
    return Pair(dtype, before, after, int(np.count_nonzero(before != after)))


def _two_steps(dtype: str, elements: int, rate: float, seed: int) -> tuple[Bits, Bits]:
    replay = Replay(seed, elements, rate)
    replay.start([Part("weight", 0, elements)])
    replay.advance(1)
    before = replay.saved(dtype).copy()
    replay.advance(2)
    bits = f"u{before.itemsize}"
    return before.view(bits), replay.saved(dtype).view(bits)


def _learning_rate(elements: int, share: float, seed: int) -> float:
    """Return the rate at which `share` of the weights change in bf16, by bisection."""
    low, high = 1e-11, 1.0
    for _ in range(30):
        rate = math.sqrt(low * high)
        before, after = _two_steps("bf16", elements, rate, seed)
        if np.count_nonzero(before != after) < share * elements:
            low = rate
        else:
            high = rate
    return high


# --- codecs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """A way to keep `after`, given `before`.

    Attributes
    ----------
    encode : callable
        From `before` and `after` to buffers of bytes.
    decode : callable
        Writes `after` to its third argument, from `before` and what `encode` returned.
    """

    name: str
    encode: Callable[[Bits, Bits], list[Any]]
    decode: Callable[[Bits, list[Any], Bits], None]


def relex_frames(itemsize: int) -> Codec:
    """Return the store's own frames, block by block: the only place here that knows relex-stream.

    A list has an entry per block; None where nothing changed.
    """
    block = BLOCK_BYTES // itemsize
    frames = FrameCodec(block, itemsize)
    changes = Changes(block, itemsize)

    def encode(before: Bits, after: Bits) -> list[Any]:
        encoded: list[Any] = []
        for start in range(0, before.size, block):
            part = slice(start, min(start + block, before.size))
            found = changes.find(before[part], after[part])
            row = len(encoded) % _ROWS_PER_CHUNK
            encoded.append(frames.encode(row, changes, part.stop - part.start) if found else None)
        return encoded

    def decode(before: Bits, encoded: list[Any], out: Bits) -> None:
        np.copyto(out, before)
        for number, frame in enumerate(encoded):
            if frame is not None:
                state = out[number * block : (number + 1) * block]
                frames.decode(memoryview(frame), state.size, changes)
                advance(state, changes.positions, changes.zigzags, changes.count)

    return Codec("relex-stream", encode, decode)


def copy() -> Codec:
    """Return the limit of any codec that reads and writes whole checkpoints."""
    room: list[Bits] = []

    def encode(_before: Bits, after: Bits) -> list[Any]:
        if not room or room[0].nbytes != after.nbytes:
            room[:] = [np.empty_like(after)]
        np.copyto(room[0], after)
        return [room[0]]

    def decode(_before: Bits, encoded: list[Any], out: Bits) -> None:
        np.copyto(out, encoded[0])

    return Codec("copy (the limit)", encode, decode)


def zstd_file() -> Codec:
    """Return zstd of the checkpoint as it is."""

    def encode(_before: Bits, after: Bits) -> list[Any]:
        return [zstd.compress(after, ZSTD_LEVEL)]

    def decode(_before: Bits, encoded: list[Any], out: Bits) -> None:
        zstd.decompress(encoded[0], out)

    return Codec(f"zstd -{ZSTD_LEVEL}, file", encode, decode)


class _Delta:
    """Differences of two checkpoints, in room that is kept: XOR, or zigzag code of a - b."""

    def __init__(self, kind: str, size: int, itemsize: int) -> None:
        self.kind = kind
        self.room: Bits = np.empty(size, f"u{itemsize}")
        self._signs: Bits = np.empty(size, f"u{itemsize}")

    def form(self, before: Bits, after: Bits) -> Bits:
        delta = self.room
        if self.kind == "xor":
            return np.bitwise_xor(after, before, out=delta)
        np.subtract(after, before, out=delta)
        signed = f"i{delta.itemsize}"
        np.right_shift(delta.view(signed), 8 * delta.itemsize - 1, out=self._signs.view(signed))
        np.left_shift(delta, 1, out=delta)
        return np.bitwise_xor(delta, self._signs, out=delta)

    def undo(self, before: Bits, delta: Bits, out: Bits) -> None:
        if self.kind == "xor":
            np.bitwise_xor(before, delta, out=out)
            return
        np.bitwise_and(delta, 1, out=self._signs)
        np.negative(self._signs, out=self._signs)
        np.right_shift(delta, 1, out=out)
        np.bitwise_xor(out, self._signs, out=out)
        np.add(out, before, out=out)


def zstd_delta(kind: str, size: int, itemsize: int, *, split: bool) -> Codec:
    """Return zstd of a delta, if wanted with the bytes of equal weight put together."""
    delta = _Delta(kind, size, itemsize)
    planes = Shuffle(itemsize)

    def encode(before: Bits, after: Bits) -> list[Any]:
        formed = delta.form(before, after)
        return [zstd.compress(planes.encode(formed) if split else formed, ZSTD_LEVEL)]

    def decode(before: Bits, encoded: list[Any], out: Bits) -> None:
        if split:
            joined = planes.decode(zstd.decompress(encoded[0]), delta.room)
            delta.undo(before, np.frombuffer(joined, out.dtype), out)
        else:
            zstd.decompress(encoded[0], delta.room)
            delta.undo(before, delta.room, out)

    return Codec(f"zstd -{ZSTD_LEVEL}, {kind}" + ", byte split" * split, encode, decode)


def blosc_delta(kind: str, size: int, itemsize: int, compressor: str, shuffle: str) -> Codec:
    """Return Blosc of a delta. Its shuffles work inside blocks that fit the cache."""
    delta = _Delta(kind, size, itemsize)
    code = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}[shuffle]
    level = 5 if compressor == "lz4" else ZSTD_LEVEL

    def encode(before: Bits, after: Bits) -> list[Any]:
        formed = delta.form(before, after)
        return [blosc.compress(formed, compressor.encode(), level, code)]

    def decode(before: Bits, encoded: list[Any], out: Bits) -> None:
        blosc.decompress(encoded[0], delta.room)
        delta.undo(before, delta.room, out)

    return Codec(f"blosc {compressor} -{level}, {kind}, {shuffle}", encode, decode)


def zipnn(kind: str, dtype: str, size: int, itemsize: int) -> Codec | None:
    """Return ZipNN of the file, or of the XOR delta; None where it is not installed."""
    try:
        package = importlib.import_module("zipnn")
    except ImportError:
        return None
    delta = _Delta("xor", size, itemsize)
    name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    codec = package.ZipNN(input_format="byte", bytearray_dtype=name, threads=1)

    def encode(before: Bits, after: Bits) -> list[Any]:
        source = after if kind == "file" else delta.form(before, after)
        # It takes bytes objects, and reorders a writable buffer in place.
        return [codec.compress(source.tobytes())]

    def decode(before: Bits, encoded: list[Any], out: Bits) -> None:
        restored = np.frombuffer(codec.decompress(encoded[0]), out.dtype)
        if kind == "file":
            np.copyto(out, restored)
        else:
            delta.undo(before, restored, out)

    return Codec(f"zipnn, {kind}", encode, decode)


def codecs(pair: Pair) -> list[Codec]:
    """Return the codecs to compare for this pair."""
    size, itemsize = pair.after.size, pair.after.itemsize
    optional = [zipnn(kind, pair.dtype, size, itemsize) for kind in ("file", "xor")]
    return [
        relex_frames(itemsize),
        zstd_file(),
        zstd_delta("xor", size, itemsize, split=False),
        zstd_delta("xor", size, itemsize, split=True),
        zstd_delta("difference", size, itemsize, split=True),
        blosc_delta("xor", size, itemsize, "zstd", "shuffle"),
        blosc_delta("xor", size, itemsize, "zstd", "bitshuffle"),
        blosc_delta("difference", size, itemsize, "lz4", "bitshuffle"),
        *[codec for codec in optional if codec is not None],
        copy(),
    ]


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class _Times:
    encoded_bytes: int
    encode_s: list[float]
    decode_s: list[float]


def compare(pair: Pair, contenders: Sequence[Codec], *, runs: int) -> list[dict[str, Any]]:
    """Return a row per codec; the codecs take turns, so that a drift meets all alike.

    Raises
    ------
    BenchmarkError
        If a codec does not give back `after`.
    """
    out = np.empty_like(pair.after)
    times: list[_Times] = []
    # The first round compiles, warms up and checks; it is not timed.
    for codec in contenders:
        encoded = codec.encode(pair.before, pair.after)
        out[:] = 0
        codec.decode(pair.before, encoded, out)
        if not np.array_equal(out, pair.after):
            raise BenchmarkError(f"{codec.name} did not restore the checkpoint")
        times.append(
            _Times(sum(memoryview(one).nbytes for one in encoded if one is not None), [], [])
        )
    for _ in range(runs):
        for codec, found in zip(contenders, times, strict=True):
            started = time.perf_counter()
            encoded = codec.encode(pair.before, pair.after)
            between = time.perf_counter()
            codec.decode(pair.before, encoded, out)
            found.encode_s.append(between - started)
            found.decode_s.append(time.perf_counter() - between)
    return [
        {
            "dtype": pair.dtype,
            "changed_share": pair.changed / pair.after.size,
            "codec": codec.name,
            "bits per changed weight": 8 * found.encoded_bytes / max(1, pair.changed),
            "times smaller": pair.after.nbytes / max(1, found.encoded_bytes),
            "encode GB/s": pair.after.nbytes / median(found.encode_s) / 1e9,
            "decode GB/s": pair.after.nbytes / median(found.decode_s) / 1e9,
        }
        for codec, found in zip(contenders, times, strict=True)
    ]


def entropy_bits(pair: Pair) -> float | None:
    """Return the entropy per changed weight, if changes are independent of place and weight.

    A code can be below it only by looking at the weights themselves. None where too few changes
    are there to estimate how their sizes are spread.
    """
    delta = (pair.after - pair.before)[pair.after != pair.before]
    _, counts = np.unique(delta, return_counts=True)
    if delta.size < 20 * counts.size:
        return None
    odds = counts / delta.size
    share = delta.size / pair.after.size
    where = -np.log2(share) - (1 - share) / share * np.log2(1 - share) if share < 1 else 0.0
    return float(where - (odds * np.log2(odds)).sum())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = blosc.set_nthreads(1)
    try:
        yield
    finally:
        blosc.set_nthreads(threads)


@click.command("codec")
@click.option(
    "--change-share",
    "shares",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=CHANGE_SHARES,
    help="Share of the weights that change; several times for several.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["bf16", "fp32"]),
    multiple=True,
    default=("bf16", "fp32"),
    help="Of the checkpoints.",
)
@click.option(
    "--elements",
    type=click.IntRange(min=1024),
    default=16 << 20,
    help="Weights of the pair of checkpoints.",
)
@click.option("--seed", type=int, default=0, help="Of the weights and changes.")
@report_options
def command(
    *,
    shares: tuple[float, ...],
    dtypes: tuple[str, ...],
    elements: int,
    seed: int,
    runs: int,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measure bits per changed weight and speed, one thread, beside zstd, Blosc and ZipNN."""
    report = Report(
        "Codecs on one step of a trajectory, one thread",
        "codec",
        {"change_shares": shares, "dtypes": dtypes, "elements": elements, "seed": seed},
    )
    missing = False
    with _one_thread():
        for dtype in dtypes:
            for share in shares:
                pair = make_pair(dtype, elements, share, seed=seed)
                contenders = codecs(pair)
                missing = not any(codec.name.startswith("zipnn") for codec in contenders)
                for row in compare(pair, contenders, runs=runs):
                    report.add(row)
                report.add(
                    {
                        "dtype": dtype,
                        "changed_share": pair.changed / pair.after.size,
                        "codec": "entropy of independent changes",
                        "bits per changed weight": entropy_bits(pair),
                    }
                )
    report.note(
        f"{elements:,} weights per checkpoint, medians of {runs} runs in turn, everything in "
        "memory. Speeds are bytes of the checkpoint per second of one thread, the delta and its "
        "undoing included; GB are 10^9 bytes. Every codec's result was compared bit by bit."
    )
    if missing:
        report.note("zipnn is not installed and was left out.")
    publish(report, json_path=json_path, markdown=markdown)
