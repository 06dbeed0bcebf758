"""Every kernel run once on a few numbers, before memory is measured and work begins.

The first run after an installation compiles them (some ten seconds, and 100 MB that the compiler
keeps) and says so; later runs load them from numba's cache. Either way it has happened when the
planner asks what the process holds, and no worker waits for another's compilation.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from relex_stream.block_sweep import BlockRows, sweep_outputs, sweep_products
from relex_stream.checksum import extend_each
from relex_stream.codec import Changes, FrameCodec, take_frames
from relex_stream.scan import Reads, ScanBlocks, scan_buffers, scan_steps, scan_tables
from relex_stream.sketch import (
    SKETCH_WIDTH,
    ChangeRows,
    add_gram,
    add_products,
    add_weighted_rows,
    scatter_columns,
    subspace_of_gram,
    unpack_sketch,
)
from relex_stream.specs import Progress
from relex_stream.ulp import (
    FORMATS,
    FloatFormat,
    add_rounded,
    advance,
    advance_rows,
    advance_rows_half,
)

_ELEMENTS = 64


FIRST_RUN = "compile kernels (once per installation)"
"""The stage that `Progress` is told of when they are not in the cache."""


@contextmanager
def _announced(progress: Progress, largest: Any) -> Iterator[None]:
    """Tell of the compilation if there will be one: if the largest kernel is not in the cache."""
    if _is_compiled(largest):
        yield
        return
    progress.start(FIRST_RUN, 0)
    yield
    progress.finish()


def _is_compiled(function: Any) -> bool:
    if function.signatures:
        return True
    directory = function.stats.cache_path
    name = glob.escape(function.py_func.__qualname__)
    return directory is not None and any(Path(directory).glob(f"*.{name}-*.nbi"))


Pairs = frozenset[tuple[str, str]]
"""dtype codes of tensors, in the base and in the checkpoints; of `blocks.float_pairs`."""


def warm_up_encoding(pairs: Pairs, progress: Progress) -> None:
    """Prepare what a build of such tensors runs."""
    with _announced(progress, scan_steps):
        _warm_up_encoding(pairs)


def warm_up_decoding(pairs: Pairs, progress: Progress) -> None:
    """Prepare what an export, a verification or an opened store runs."""
    with _announced(progress, take_frames):
        _warm_up_decoding(pairs)


def warm_up_extrapolation(pairs: Pairs, progress: Progress) -> None:
    """Prepare what an extrapolation runs."""
    with _announced(progress, sweep_products):
        _warm_up_extrapolation(pairs)


def _warm_up_encoding(pairs: Pairs) -> None:
    for fmt in _formats(pairs):
        before, after, changes = _round_trip(fmt)
        buffers = scan_buffers(FrameCodec(_ELEMENTS, fmt.itemsize), changes)
        none, keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        blocks = ScanBlocks(np.zeros(1, np.int64), before, after, fmt.tag, none, keys)
        numbers, no_bytes = np.zeros(0, np.int32), np.zeros(0, np.uint8)
        nowhere = Reads(numbers, np.zeros(1, np.int64), numbers, none, none, none > 0, no_bytes)
        scan_steps(nowhere, 0, 0, 0, blocks, buffers, scan_tables(0, 0, SKETCH_WIDTH))


def _warm_up_decoding(pairs: Pairs) -> None:
    for fmt in _formats(pairs):
        before, _, changes = _round_trip(fmt)
        advance(before, changes.positions, changes.zigzags, changes.count)


def warm_up_half_deltas(pairs: Pairs) -> None:
    """Prepare what deltas in half precision need besides."""
    for fmt in _formats(pairs):
        before, _, changes = _round_trip(fmt)
        rows = np.zeros(1, np.int64), np.array([changes.count]), changes.positions, changes.zigzags
        advance_rows_half(before, before.copy(), *rows, fmt.tag, np.zeros(_ELEMENTS))


def _warm_up_extrapolation(pairs: Pairs) -> None:
    for fmt in _formats(pairs):
        before, _, changes = _round_trip(fmt)
        block = BlockRows(
            origin=before,
            tag=fmt.tag,
            rows=np.zeros(1, np.int64),
            starts=np.zeros(1, np.int64),
            ends=np.array([changes.count]),
            positions=changes.positions,
            zigzags=changes.zigzags,
            values=np.zeros(_ELEMENTS),
        )
        advance_rows(block.origin, *block[3:7], fmt.tag, block.values)
        one = np.ones((1, 1))
        sweep_products(block, one, np.zeros((_ELEMENTS, 1), np.float32), np.zeros((1, 1)))
        for base_fmt in {FORMATS[base] for base, code in pairs if code == fmt.code}:
            base = np.zeros(_ELEMENTS, base_fmt.bits_dtype)
            out = np.zeros((1, _ELEMENTS), base_fmt.bits_dtype)
            sweep_outputs(block, one, base, base_fmt.tag, np.zeros((_ELEMENTS, 1)), out)
    for code in {base for base, _ in pairs}:
        bits = np.zeros(_ELEMENTS, FORMATS[code].bits_dtype)
        add_rounded(bits, np.ones((_ELEMENTS, 1))[:, 0], FORMATS[code], bits)
    # One row is sparse enough for the pairs of the Gram matrix, one is not.
    for entries in (1, _ELEMENTS):
        rows = ChangeRows(
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
            np.array([entries]),
            np.arange(entries, dtype=np.uint32),
            np.ones(entries),
        )
        rows.split(0)
        projected = np.zeros((_ELEMENTS, 1), np.float32)
        add_weighted_rows(rows, 0, np.ones((1, 1)), projected)
        add_weighted_rows(rows, 0, np.ones((1, 1)), np.zeros((_ELEMENTS, 1)))
        add_products(rows, 0, projected, np.zeros((1, 1)))
        gram = np.zeros((1, 1))
        add_gram(rows, 0, _ELEMENTS, gram)
        subspace_of_gram(gram, 1)
        scatter_columns(rows, 0, np.zeros((1, _ELEMENTS)))
    unpack_sketch(np.zeros((1, 1), np.float16), np.zeros(1, np.float32))


def _formats(pairs: Pairs) -> list[FloatFormat]:
    return [FORMATS[code] for code in sorted({code for _, code in pairs})]


def _round_trip(fmt: FloatFormat) -> tuple[np.ndarray, np.ndarray, Changes]:
    """Encode and decode a sparse and a dense frame; return the last one's bits and changes."""
    codec = FrameCodec(_ELEMENTS, fmt.itemsize)
    changes, decoded = Changes(_ELEMENTS, fmt.itemsize), Changes(_ELEMENTS, fmt.itemsize)
    before = np.zeros(_ELEMENTS, fmt.bits_dtype)
    after = before.copy()
    for changed in (1, _ELEMENTS):
        after[:changed] += fmt.bits_dtype.type(1)
        changes.find(before, after)
        frame = codec.encode(0, changes, _ELEMENTS)
        codec.decode(memoryview(frame), _ELEMENTS, decoded)
    extend_each(np.zeros(1, np.uint8), np.array([0, 1]), np.zeros(1, np.uint32))
    return before, after, decoded
