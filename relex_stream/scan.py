"""Blocks through many checkpoints in one compiled call: read, check, compare, measure, pack.

This loop is where a build spends its time, so nothing of Python runs in it: a piece of the block is
read into a buffer that stays in the processor's cache, its checksum taken, compared with the step
before, and only what changed is looked at again. Rows with so many changes that a dense frame might
be smaller, and errors of the disk, are handed back to the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from relex_stream import checksum
from relex_stream.codec import Changes, FrameCodec, crc_of_frame, frame_room, put_frame
from relex_stream.intrinsics import read_at
from relex_stream.kernels import kernel
from relex_stream.pages import PAGE_BYTES, page_lead
from relex_stream.sketch import add_to_sketch
from relex_stream.specs import STEP_GROUP
from relex_stream.ulp import (
    MASKS_SHAPE,
    Bits,
    find_changes,
    retreat,
    round_to_bf16,
    take_changes,
)

PIECE_BYTES = 256 << 10
"""Bytes read at a time: they and the state they are compared with fit a core's own cache."""

FRAMES_BYTES = 2 << 20
"""Frames that a worker keeps before it writes them, beside room for one more."""

_WIDE_BYTES = 4
"""Of an element that is cast."""

DONE, FULL, UNREADABLE = range(3)
"""Why `scan_steps` returned: all steps are done; there is no room for the next step's frame; the
next step could not be read (the state is before it)."""


FETCHED = -1
"""In place of a file: the bytes are at hand already."""


class Reads(NamedTuple):
    """Where the bytes of n blocks are at T steps: pair p is of block ``p // T``, step ``p % T``.

    Attributes
    ----------
    descriptors : ndarray of int32
        Open files.
    bounds : ndarray of int64, shape (n * T + 1,)
        Pair p is made of the runs ``bounds[p] : bounds[p + 1]``, one behind the other.
    file : ndarray of int32, shape (runs,)
        Number of the descriptor, or `FETCHED`.
    offset, nbytes : ndarray of int64, shape (runs,)
        Where each run begins in its file (or in `fetched`), and its bytes.
    is_cast : ndarray of bool, shape (T,)
        Whether the bytes of a step are F32, to be rounded to BF16.
    fetched : ndarray of uint8
    """

    descriptors: NDArray[np.int32]
    bounds: NDArray[np.int64]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    is_cast: NDArray[np.bool_]
    fetched: NDArray[np.uint8]


class ScanBuffers(NamedTuple):
    """Buffers of one worker for blocks of one dtype; see `scan_buffers`.

    ``wide`` and ``after`` are views of ``raw``; ``cast_bytes`` is one of ``cast``.
    """

    raw: NDArray[np.uint8]
    after: Bits
    wide: NDArray[np.uint32]
    cast: Bits
    cast_bytes: NDArray[np.uint8]
    masks: NDArray[np.uint64]
    values: NDArray[np.float64]
    positions: NDArray[np.uint32]
    zigzags: Bits
    streams: NDArray[np.uint8]
    handles: NDArray[np.uint64]
    frames: NDArray[np.uint8]


class ScanBlocks(NamedTuple):
    """Blocks of one format, one behind the other.

    Attributes
    ----------
    bounds : ndarray of int64, shape (n + 1,)
        Block i has the elements ``bounds[i] : bounds[i + 1]`` of `base` and `state`.
    base, state : ndarray of uint16 or uint32, shape (b,)
        Bit patterns at the base, and at the last step taken.
    tag : tuple of int
        `FloatFormat.tag` of them.
    first_elements : ndarray of int64, shape (n,)
        Offset of each block in its tensor, for the sketch.
    keys : ndarray of uint64, shape (n,)
        Of the sketches.
    """

    bounds: NDArray[np.int64]
    base: Bits
    state: Bits
    tag: tuple[int, ...]
    first_elements: NDArray[np.int64]
    keys: NDArray[np.uint64]


class ScanTables(NamedTuple):
    """What `scan_steps` finds out, one entry per block and step.

    Attributes
    ----------
    changed : ndarray of int64, shape (n, T)
        Changed elements.
    source_crc : ndarray of uint32, shape (n, T)
        CRC-32C of the block's bytes.
    change_sq, delta_sq_growth : ndarray of float64, shape (n, T)
        Sum of squares of the changes; what they add to that of ``step - base``.
    nonfinite_at : ndarray of int64, shape (n, T)
        First element of the block that is not finite where the base is; -1 for none.
    sketch : ndarray of float64, shape (n, T, width)
        ``D Omega``; width 0 for tensors without a sketch.
    frame_bytes, frame_crc : ndarray of uint32, shape (n, T)
        Bytes and CRC-32C of the step's frame; 0 for none.
    """

    changed: NDArray[np.int64]
    source_crc: NDArray[np.uint32]
    change_sq: NDArray[np.float64]
    delta_sq_growth: NDArray[np.float64]
    nonfinite_at: NDArray[np.int64]
    sketch: NDArray[np.float64]
    frame_bytes: NDArray[np.uint32]
    frame_crc: NDArray[np.uint32]


def scan_buffers(codec: FrameCodec, changes: Changes) -> ScanBuffers:
    """Return buffers for the blocks that `codec` is for, around its own and those of `changes`."""
    raw = np.empty(PIECE_BYTES + PAGE_BYTES, np.uint8)
    after = raw.view(changes.zigzags.dtype)
    cast = np.empty(raw.size // _WIDE_BYTES, after.dtype)
    return ScanBuffers(
        raw=raw,
        after=after,
        wide=raw.view(np.uint32),
        cast=cast,
        cast_bytes=cast.view(np.uint8),
        masks=np.empty(MASKS_SHAPE, np.uint64),
        values=np.empty(after.size),
        positions=changes.positions,
        zigzags=changes.zigzags,
        streams=codec.streams,
        handles=codec.contexts.handles,
        frames=np.empty(frame_room(codec.elements, codec.itemsize) + FRAMES_BYTES, np.uint8),
    )


def scan_tables(blocks: int, steps: int, sketch_width: int) -> ScanTables:
    """Return empty tables for `blocks` blocks at `steps` steps."""
    shape = (blocks, steps)
    return ScanTables(
        changed=np.zeros(shape, np.int64),
        source_crc=np.zeros(shape, np.uint32),
        change_sq=np.zeros(shape),
        delta_sq_growth=np.zeros(shape),
        nonfinite_at=np.full(shape, -1, np.int64),
        sketch=np.zeros((*shape, sketch_width)),
        frame_bytes=np.zeros(shape, np.uint32),
        frame_crc=np.zeros(shape, np.uint32),
    )


_page_lead = njit(inline="always")(page_lead)


@kernel
def _read_piece(reads, run, done, raw):  # type: ignore[no-untyped-def]
    """Fill `raw` from `done` bytes behind the start of a run on; return where that ended.

    Both are negative where a file cannot be read so far.
    """
    filled = 0
    while filled < raw.size:
        if done == reads.nbytes[run]:
            run, done = run + 1, 0
            continue
        size = min(raw.size - filled, reads.nbytes[run] - done)
        at = reads.offset[run] + done
        rest = raw[filled : filled + size]
        if reads.file[run] == FETCHED:
            rest[:] = reads.fetched[at : at + size]
            count = size
        else:
            descriptor = reads.descriptors[reads.file[run]]
            count = read_at(descriptor, rest.ctypes, np.uint64(size), at)
        if count <= 0:
            return -1, -1
        filled += count
        done += count
    return run, done


@njit
def _scan_step(reads, pair, number, blocks, buffers, tables, block, step):  # type: ignore[no-untyped-def]
    """Take a block through one step; return how many elements changed, -1 if it is unreadable."""
    here = slice(blocks.bounds[block], blocks.bounds[block + 1])
    base, state = blocks.base[here], blocks.state[here]
    is_cast = reads.is_cast[number]
    itemsize = _WIDE_BYTES if is_cast else state.itemsize
    piece = (buffers.raw.size - PAGE_BYTES) // itemsize
    found = 0
    crc = np.uint32(0)
    run, done = reads.bounds[pair], np.int64(0)
    lead = _page_lead(np.int64(buffers.raw.ctypes.data), reads.offset[run])
    after = buffers.cast if is_cast else buffers.after[lead // itemsize :]
    for first in range(0, state.size, piece):
        stop = min(state.size, first + piece)
        raw = buffers.raw[lead : lead + (stop - first) * itemsize]
        run, done = _read_piece(reads, run, done, raw)
        if run < 0:
            retreat(state, buffers.positions, buffers.zigzags, found)
            tables.sketch[block, step] = 0.0
            tables.change_sq[block, step] = tables.delta_sq_growth[block, step] = 0.0
            tables.nonfinite_at[block, step] = -1
            return -1
        if is_cast:
            round_to_bf16(buffers.wide[lead // itemsize :][: stop - first], buffers.cast)
            raw = buffers.cast_bytes[: (stop - first) * state.itemsize]
        crc = checksum.extend(crc, raw)
        positions = buffers.positions[found:]
        count = find_changes(
            state[first:stop],
            after[: stop - first],
            buffers.masks,
            positions,
            buffers.zigzags[found:],
        )
        if count == 0:
            continue
        change_sq, growth, nonfinite_at = take_changes(
            base,
            state,
            after,
            first,
            positions,
            count,
            blocks.tag,
            buffers.values,
        )
        tables.change_sq[block, step] += change_sq
        tables.delta_sq_growth[block, step] += growth
        if tables.nonfinite_at[block, step] < 0:
            tables.nonfinite_at[block, step] = nonfinite_at
        if tables.sketch.shape[2] > 0:
            add_to_sketch(
                positions,
                buffers.values,
                count,
                blocks.first_elements[block],
                blocks.keys[block],
                tables.sketch[block, step],
            )
        found += count
    tables.source_crc[block, step] = crc
    tables.changed[block, step] = found
    return found


@kernel
def scan_steps(  # type: ignore[no-untyped-def]
    reads, done, first_step, first_row, blocks, buffers, tables
):
    """Take blocks from the state before step `first_step` through the steps after it.

    One block after the other, each through all the steps.

    Parameters
    ----------
    reads : Reads
        Where the blocks are at the steps ``first_step`` to ``first_step + T - 1`` of the tables.
    done : int
        Pairs taken by earlier calls.
    first_step : int
        Column of the tables that the first step of `reads` belongs to.
    first_row : int
        Row of its frame within the chunk; later rows count on from 0 behind the chunk's last.
    blocks : ScanBlocks
        Their `state` is brought up to the last step taken.
    buffers : ScanBuffers
        Frames are put one behind the other, from the start of ``buffers.frames``.
    tables : ScanTables
        Out.

    Returns
    -------
    done : int
        Pairs taken by now.
    reason : int
        `DONE`, `FULL` or `UNREADABLE`.
    """
    steps = reads.is_cast.size
    pairs = reads.bounds.size - 1
    room = buffers.frames.size - FRAMES_BYTES
    used = 0
    for pair in range(done, pairs):
        if buffers.frames.size - used < room:
            return pair, FULL
        block, number = pair // steps, pair % steps
        step = first_step + number
        found = _scan_step(reads, pair, number, blocks, buffers, tables, block, step)
        if found < 0:
            return pair, UNREADABLE
        if found > 0:
            frame = buffers.frames[used:]
            size = put_frame(
                (first_row + number) % STEP_GROUP,
                buffers.positions,
                buffers.zigzags,
                found,
                blocks.bounds[block + 1] - blocks.bounds[block],
                buffers.streams,
                buffers.handles,
                frame,
            )
            tables.frame_bytes[block, step] = size
            tables.frame_crc[block, step] = crc_of_frame(frame)
            used += size
    return pairs, DONE
