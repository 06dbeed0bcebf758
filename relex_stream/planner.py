"""Memory and passes as plain arithmetic: what a stage will hold, read and write.

Everything here is numbers in, numbers out. Each formula lists the buffers of one worker in the
order the code takes them; tests hold the measured peak of whole processes under the projection.
Projections are for the worst content (every weight changes at every step), so usual runs stay
well below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relex_stream.errors import MemoryLimitError
from relex_stream.specs import STEP_GROUP
from relex_stream.summaries import Plan, StagePlan

DEFAULT_LIMIT_BYTES = 768 << 20
"""Memory limit when the user names none (less if less is free)."""

SLACK_BYTES = 40 << 20
"""Thread stacks, the allocator's arenas and small objects, beside the buffers counted here."""

ENTRY_BYTES = 16
"""Of a change kept between sweeps: position, difference, value."""

GRAM_COLUMNS_BYTES = 24 << 20
"""Room of one worker for the columns it handles at a time in the exact route."""

FRAMES_AT_HAND_BYTES = 4 << 20
"""Frames that a worker reads, or keeps before it writes them, at a time (at least one)."""

SUM_TREE_ALIVE = 16
"""Partial results alive in a sum tree of fan-in 8 (measured 13 to 16 of 2,000)."""

COMMIT_TARGET_BYTES = 256 << 30
"""Checkpoint bytes after which a build commits: what an interruption costs at most."""

SKETCHES_BYTES = 16 << 20
"""Sketches at hand, twice: those being worked on while the next are read."""

CONTEXTS_BYTES = 4 << 20
"""What zstd keeps for a compressor and a decompressor.

0.65 MiB measured for blocks of 2 MiB at level 1; larger blocks take more.
"""


@dataclass(frozen=True)
class ModelShape:
    """What the planner needs to know of a model.

    Attributes
    ----------
    tensors : int
        Tensors kept in the store.
    sketched : int
        Those of them with a sketch.
    blocks : int
        Blocks of all tensors.
    largest_block : int
        Elements of the largest block.
    largest_block_bytes : int
        Its bytes at one step (the wider of base and checkpoint).
    sketch_width : int
    """

    tensors: int
    sketched: int
    blocks: int
    largest_block: int
    largest_block_bytes: int
    sketch_width: int


def codec_bytes(shape: ModelShape) -> int:
    """Count one frame codec and its changes: streams, zstd's contexts, positions, differences."""
    # Planes of all elements, or symbols, low bits and varints (13 bytes) of half of them.
    streams = max(shape.largest_block_bytes, 7 * shape.largest_block)
    changes = 4 * shape.largest_block + shape.largest_block_bytes
    return streams + changes + CONTEXTS_BYTES


def _frames_at_hand_bytes(shape: ModelShape) -> int:
    """Frames read together: as many as `FRAMES_AT_HAND_BYTES` hold, but at least one."""
    return FRAMES_AT_HAND_BYTES + shape.largest_block_bytes + 64


def ingest_worker_bytes(shape: ModelShape, steps: int) -> int:
    """One worker of build-store, for a batch of `steps`.

    Base as read, base widened, the state, one more for a tied head; the piece being compared with
    its values; the codec; two frames (a sparse and a dense one to choose from) beside those not
    yet written; frames of earlier steps, for the state an append begins with; the block's
    statistics.
    """
    blocks = 4 * shape.largest_block_bytes
    piece = 2 << 20
    frames = shape.largest_block_bytes + max(shape.largest_block_bytes, 7 * shape.largest_block)
    frames += 2 << 20
    codec = codec_bytes(shape) + _frames_at_hand_bytes(shape)
    return blocks + piece + codec + frames + _ingest_partial_bytes(shape, steps) * 2


def _ingest_partial_bytes(shape: ModelShape, steps: int) -> int:
    return steps * (8 * shape.sketch_width + 40)


def ingest_shared_bytes(
    shape: ModelShape, steps: int, rows: int, largest_tensor_blocks: int
) -> int:
    """Count what all workers of build-store share for a batch: sums, results, tables."""
    tree = min(largest_tensor_blocks, SUM_TREE_ALIVE) * _ingest_partial_bytes(shape, steps)
    results = steps * (shape.sketched * (2 * shape.sketch_width + 4) + shape.tensors * 20)
    tables = (rows + 2 * steps) * shape.blocks * 16
    places = steps * shape.tensors * 12
    return tree + 2 * results + tables + places


def statistics_bytes(memory_limit_bytes: int) -> int:
    """Return the share of the memory limit that the statistics of one commit batch may take."""
    return memory_limit_bytes // 4


def commit_batch(
    shape: ModelShape, checkpoint_bytes: int, rows: int, left: int, most_statistics: int
) -> int:
    """Return how many of the `left` steps the next commit takes, with `rows` committed.

    Whole step groups, as many as `COMMIT_TARGET_BYTES` of checkpoints hold but at least one;
    fewer steps when their statistics take more than `most_statistics` bytes; the first batch fills
    the group begun.
    """
    per_step = 2 * shape.sketched * (2 * shape.sketch_width + 4) + shape.blocks * 24 + 1
    groups = max(1, COMMIT_TARGET_BYTES // max(1, checkpoint_bytes * STEP_GROUP))
    steps = groups * STEP_GROUP - rows % STEP_GROUP
    return max(1, min(left, steps, most_statistics // per_step))


def sweep_worker_bytes(shape: ModelShape, entry_capacity: int) -> int:
    """Buffers of one worker that sweeps a block: base, state, codec, frames, changes."""
    blocks = 2 * shape.largest_block_bytes
    frames = _frames_at_hand_bytes(shape)
    entries = ENTRY_BYTES * max(entry_capacity, shape.largest_block)
    return blocks + codec_bytes(shape) + frames + entries


def power_worker_bytes(shape: ModelShape, entry_capacity: int, basis: int) -> int:
    """One worker of a power pass: a sweep and the float32 projection of the block."""
    return sweep_worker_bytes(shape, entry_capacity) + 4 * basis * shape.largest_block


def gram_columns(rows: int) -> int:
    """Columns of D that a worker handles at a time for a Gram matrix of `rows` steps."""
    return max(64, GRAM_COLUMNS_BYTES // (8 * max(1, rows)))


def gram_worker_bytes(shape: ModelShape, entry_capacity: int, rows: int) -> int:
    """One worker of the exact route: a sweep, the columns at hand, the Gram matrix twice."""
    entries = 16 * max(entry_capacity, shape.largest_block)
    return (
        sweep_worker_bytes(shape, entry_capacity)
        + min(GRAM_COLUMNS_BYTES, entries + GRAM_COLUMNS_BYTES // 2)
        + entries
        + 3 * 8 * rows * rows
    )


def write_worker_bytes(shape: ModelShape, entry_capacity: int, outputs: int) -> int:
    """One worker of the writing stage: a sweep, float64 accumulators, a rounded block each."""
    accumulators = 8 * outputs * shape.largest_block
    rounded = outputs * shape.largest_block_bytes
    return sweep_worker_bytes(shape, entry_capacity) + accumulators + rounded


def copy_worker_bytes(shape: ModelShape) -> int:
    """One worker of export: base, state, codec, frames."""
    blocks = 3 * shape.largest_block_bytes
    return blocks + codec_bytes(shape) + _frames_at_hand_bytes(shape)


def extrapolate_shared_bytes(
    shape: ModelShape, rows: int, basis: int, outputs: int, exact_tensors: int
) -> int:
    """Count what all workers share: tables, sums in flight, each tensor's small matrices."""
    tables = rows * (shape.blocks * 16 + shape.tensors * 8)
    passes = 3 * 8 * rows * basis * shape.tensors
    grams = (SUM_TREE_ALIVE + 2) * 8 * rows * rows if exact_tensors else 0
    weights = 2 * 8 * rows * outputs * shape.tensors
    sketches = SKETCHES_BYTES if basis else 0
    return tables + passes + grams + weights + sketches


def make_plan(
    stages: Sequence[StagePlan],
    *,
    reserved_bytes: int,
    shared_bytes: int,
    memory_limit_bytes: int,
    workers: int,
    workers_fixed: bool,
) -> Plan:
    """Choose the number of workers and project the peak.

    Parameters
    ----------
    stages : sequence of StagePlan
    reserved_bytes : int
        What the process holds before the work.
    shared_bytes : int
    memory_limit_bytes : int
    workers : int
        Wanted.
    workers_fixed : bool
        Whether the user named that number; else it is lowered until the projection fits.

    Raises
    ------
    MemoryLimitError
        If the work does not fit; the message has all quantities.

    Examples
    --------
    >>> stage = StagePlan("write", 10, 0, 0, 100 << 20)
    >>> plan = make_plan([stage], reserved_bytes=200 << 20, shared_bytes=0,
    ...     memory_limit_bytes=512 << 20, workers=8, workers_fixed=False)
    >>> plan.workers
    2
    """
    widest = max(stages, key=lambda stage: stage.worker_bytes)
    fixed = reserved_bytes + SLACK_BYTES + shared_bytes
    room = memory_limit_bytes - fixed
    fitting = room // max(1, widest.worker_bytes)
    if fitting < 1 or (workers_fixed and workers > fitting):
        wanted = workers if workers_fixed else 1
        raise MemoryLimitError(
            f"stage '{widest.name}' with {wanted} worker(s) needs "
            f"{_mib(fixed + wanted * widest.worker_bytes)} MiB "
            f"({_mib(reserved_bytes + SLACK_BYTES)} for the process, {_mib(shared_bytes)} shared, "
            f"{_mib(widest.worker_bytes)} per worker), the memory limit is "
            f"{_mib(memory_limit_bytes)} MiB; raise --memory-limit"
            + (" or lower --workers" if workers_fixed and fitting >= 1 else "")
        )
    chosen = max(1, min(workers, fitting))
    return Plan(
        workers=chosen,
        memory_limit_bytes=memory_limit_bytes,
        reserved_bytes=reserved_bytes + SLACK_BYTES,
        shared_bytes=shared_bytes,
        projected_bytes=fixed + chosen * widest.worker_bytes,
        stages=tuple(stages),
    )


def _mib(size: int) -> int:
    return -(-size // (1 << 20))
