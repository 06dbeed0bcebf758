"""Memory and passes as plain arithmetic: what a stage will hold, read and write (time: `costs`).

Everything here is numbers in, numbers out. Each formula lists the buffers of one worker in the
order the code takes them; tests hold the measured peak of whole processes under the projection.
Projections are for the worst content (every weight changes at every step), so usual runs stay
well below them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from relex_stream.costs import MOST_TASKS
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

GRAMS_AT_HAND_BYTES = 8 << 20
"""Gram matrices of small tensors that are worked on together (at least one)."""

FRAMES_AT_HAND_BYTES = 4 << 20
"""Frames that a worker reads, or keeps before it writes them, at a time (at least one)."""

SUM_TREE_ALIVE = 16
"""Results of finished tasks alive in a sum tree of fan-in 8 (measured 13 to 16 of 2,000)."""

PARTIALS_AT_HAND = 8
"""Of a task that sums several: one of each level but the last, up to 4 of that, and a new one."""

BLOCK_OBJECTS_BYTES = 320
"""Python's objects for each block of a stage: 225 measured, and two numbers."""

TASK_OBJECTS_BYTES = 6000
"""The same for each of dask's tasks, with those that add up: 4.5 to 5 kB measured per block where
each is a task."""

TENSOR_OBJECTS_BYTES = 3000
"""The same for what is known of each tensor in the end: ten small arrays."""

COMMIT_TARGET_BYTES = 256 << 30
"""Checkpoint bytes that each process works on between commits.

What an interruption costs at most; of more processes it costs the same time, and each commit makes
all of them wait for the slowest.
"""

SKETCHES_BYTES = 24 << 20
"""Sketches at hand, three times: those that threads work on, and those being read."""

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


def _objects_bytes(shape: ModelShape) -> int:
    """Count what describes a stage's blocks and tasks."""
    # A tensor is cut into tasks at nodes of its tree of sums: they may be half as large.
    tasks = min(shape.blocks, 2 * MOST_TASKS)
    blocks = BLOCK_OBJECTS_BYTES * shape.blocks
    return blocks + TASK_OBJECTS_BYTES * tasks + TENSOR_OBJECTS_BYTES * shape.tensors


def ingest_worker_bytes(shape: ModelShape, steps: int) -> int:
    """One worker of build-store, for a batch of `steps`.

    Base as read, base widened, the state, one more for a tied head or a replica; a block as its
    files hold it, where it is fetched whole or cast from F32; the piece being compared with its
    values; the codec; two frames (a sparse and a dense one to choose from) beside those not
    yet written; frames of earlier steps, for the state an append begins with; the block's
    statistics.
    """
    blocks = 6 * shape.largest_block_bytes
    piece = 2 << 20
    frames = shape.largest_block_bytes + max(shape.largest_block_bytes, 7 * shape.largest_block)
    frames += 2 << 20
    codec = codec_bytes(shape) + _frames_at_hand_bytes(shape)
    partials = (2 + PARTIALS_AT_HAND) * _ingest_partial_bytes(shape, steps)
    return blocks + piece + codec + frames + partials


def _ingest_partial_bytes(shape: ModelShape, steps: int) -> int:
    return steps * (8 * shape.sketch_width + 40)


def ingest_shared_bytes(
    shape: ModelShape,
    steps: int,
    rows: int,
    largest_tensor_blocks: int,
    pieces: int,
    patched_steps: int = 0,
) -> int:
    """Count what all workers of build-store share for a batch: sums, results, tables, objects.

    `pieces` are those that the tensors of one checkpoint lie in; of `patched_steps` only changes
    are there.
    """
    tree = min(largest_tensor_blocks, SUM_TREE_ALIVE) * _ingest_partial_bytes(shape, steps)
    results = steps * (shape.sketched * (2 * shape.sketch_width + 4) + shape.tensors * 20)
    tables = (rows + 2 * steps) * shape.blocks * 16
    # Files and offsets may differ from step to step; where in the tensors they are does not.
    places = steps * pieces * 12 + pieces * 40
    # Where the changes of each block are unpacked, and those of each tensor packed.
    patches = patched_steps * (20 * shape.blocks + 100 * shape.tensors)
    return tree + 2 * results + tables + places + patches + _objects_bytes(shape)


def statistics_bytes(memory_limit_bytes: int) -> int:
    """Return the share of the memory limit that the statistics of one commit batch may take."""
    return memory_limit_bytes // 4


def commit_batch(
    shape: ModelShape,
    checkpoint_bytes: int,
    rows: int,
    left: int,
    most_statistics: int,
    processes: int = 1,
) -> int:
    """Return how many of the `left` steps the next commit takes, with `rows` committed.

    Whole step groups, as many as `COMMIT_TARGET_BYTES` of checkpoints hold for each of the
    `processes` but at least one; fewer steps when their statistics take more than
    `most_statistics` bytes; the first batch fills the group begun.
    """
    per_step = 2 * shape.sketched * (2 * shape.sketch_width + 4) + shape.blocks * 24 + 1
    target = COMMIT_TARGET_BYTES * processes
    groups = max(1, target // max(1, checkpoint_bytes * STEP_GROUP))
    steps = groups * STEP_GROUP - rows % STEP_GROUP
    return max(1, min(left, steps, most_statistics // per_step))


def sweep_worker_bytes(shape: ModelShape, entry_capacity: int) -> int:
    """Buffers of one worker that sweeps a block: base, state, codec, frames, changes."""
    blocks = 2 * shape.largest_block_bytes
    frames = _frames_at_hand_bytes(shape)
    entries = ENTRY_BYTES * max(entry_capacity, shape.largest_block)
    return blocks + codec_bytes(shape) + frames + entries


def power_worker_bytes(shape: ModelShape, entry_capacity: int, rows: int, basis: int) -> int:
    """One worker of a power pass: a sweep, the float32 projection of the block, sums and bases."""
    projection = 4 * basis * shape.largest_block
    sums = (2 + PARTIALS_AT_HAND) * 8 * rows * basis
    return sweep_worker_bytes(shape, entry_capacity) + projection + sums


def gram_columns(rows: int) -> int:
    """Columns of D that a worker handles at a time for a Gram matrix of `rows` steps."""
    return max(64, GRAM_COLUMNS_BYTES // (8 * max(1, rows)))


def gram_worker_bytes(shape: ModelShape, entry_capacity: int, rows: int) -> int:
    """One worker of the exact route: a sweep, the columns at hand, Gram matrices.

    Those are its block's, twice, and the sums begun; of small tensors many at a time, but then
    no more than `GRAMS_AT_HAND_BYTES`.
    """
    entries = 16 * max(entry_capacity, shape.largest_block)
    gram = 8 * rows * rows
    return (
        sweep_worker_bytes(shape, entry_capacity)
        + min(GRAM_COLUMNS_BYTES, entries + GRAM_COLUMNS_BYTES // 2)
        + entries
        + (2 + PARTIALS_AT_HAND) * gram
        + min(GRAMS_AT_HAND_BYTES, shape.tensors * gram)
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


def compare_worker_bytes(shape: ModelShape) -> int:
    """One worker of a comparison: what export has, and the block of the checkpoint, F32 if cast.

    A copy of it, and where it differs.
    """
    wide = 4 * shape.largest_block
    differences = shape.largest_block + 8 * shape.largest_block
    return copy_worker_bytes(shape) + 2 * shape.largest_block_bytes + wide + differences


def extrapolate_shared_bytes(
    shape: ModelShape,
    rows: int,
    rank: int,
    basis: int,
    outputs: int,
    exact_tensors: int,
    *,
    outputs_at_once: int | None = None,
) -> int:
    """Count what all workers share: tables, sums in flight, each tensor's vectors, objects."""
    sums = SUM_TREE_ALIVE * 8 * rows * (basis + (rows if exact_tensors else 0))
    # Singular vectors, and the weights of the stored changes; those of a pass as they travel, too.
    at_once = outputs if outputs_at_once is None else outputs_at_once
    vectors = 8 * rows * (rank + outputs + at_once) * shape.tensors
    sketches = SKETCHES_BYTES if basis else 0
    return tables_bytes(shape, rows) + sums + vectors + sketches + _objects_bytes(shape)


def export_shared_bytes(shape: ModelShape, rows: int) -> int:
    """Count what all workers of export share: tables and objects."""
    return tables_bytes(shape, rows) + _objects_bytes(shape)


def tables_bytes(shape: ModelShape, rows: int) -> int:
    """Count a store's tables of `rows` steps, and a record while it is read."""
    return rows * (shape.blocks * 16 + shape.tensors * 8)


@dataclass(frozen=True)
class Capacity:
    """What a plan may count on: processes alike, each with its threads and its memory.

    Attributes
    ----------
    processes : int
    workers : int
        Threads of each, wanted or there.
    workers_fixed : bool
        Whether the user named that number.
    reserved_bytes : int
        What a process holds before the work; the most that any does.
    memory_limit_bytes : int
        What each may hold; the least that any may.
    command_reserved_bytes, command_limit_bytes : int
        The same of this process, where others do the work; 0 if it does itself.
    """

    processes: int
    workers: int
    workers_fixed: bool
    reserved_bytes: int
    memory_limit_bytes: int
    command_reserved_bytes: int = 0
    command_limit_bytes: int = 0


@dataclass(frozen=True)
class Places:
    """Where tasks may run.

    Attributes
    ----------
    cores : int
        Threads of all processes.
    gpu_workers : int or None
        Processes of a cluster that have a device; None where there is no cluster.
    gpu_cores : int
        Threads of these.
    """

    cores: int
    gpu_workers: int | None = None
    gpu_cores: int = 0


def make_plan(stages: Sequence[StagePlan], capacity: Capacity, *, shared_bytes: int) -> Plan:
    """Choose the number of workers and project the peak.

    Parameters
    ----------
    stages : sequence of StagePlan
    capacity : Capacity
        If its workers are not fixed, fewer are taken until the projection fits.
    shared_bytes : int
        What the workers of a process share.

    Raises
    ------
    MemoryLimitError
        If the work does not fit; the message has all quantities.

    Examples
    --------
    >>> stage = StagePlan("write", 10, 0, 0, 100 << 20)
    >>> here = Capacity(1, 8, False, reserved_bytes=200 << 20, memory_limit_bytes=512 << 20)
    >>> make_plan([stage], here, shared_bytes=0).workers
    2
    """
    widest = max(stages, key=lambda stage: stage.worker_bytes)
    reserved_bytes = capacity.reserved_bytes + SLACK_BYTES
    fixed = reserved_bytes + shared_bytes
    fitting = (capacity.memory_limit_bytes - fixed) // max(1, widest.worker_bytes)
    if fitting < 1 or (capacity.workers_fixed and capacity.workers > fitting):
        wanted = capacity.workers if capacity.workers_fixed else 1
        raise MemoryLimitError(
            f"stage '{widest.name}' with {wanted} worker(s) needs "
            f"{_mib(fixed + wanted * widest.worker_bytes)} MiB "
            f"({_mib(reserved_bytes)} for the process, {_mib(shared_bytes)} shared, "
            f"{_mib(widest.worker_bytes)} per worker), the memory limit is "
            f"{_mib(capacity.memory_limit_bytes)} MiB"
            + (" in each process of the cluster" if capacity.processes > 1 else "")
            + "; raise --memory-limit"
            + (" or lower --workers" if capacity.workers_fixed and fitting >= 1 else "")
        )
    command = 0
    if capacity.command_reserved_bytes:
        # It puts together what the others find: all that their workers share it has as well.
        command = capacity.command_reserved_bytes + SLACK_BYTES + shared_bytes
        if command > capacity.command_limit_bytes:
            raise MemoryLimitError(
                f"this command, which puts results together, needs {_mib(command)} MiB "
                f"({_mib(command - shared_bytes)} for the process, {_mib(shared_bytes)} for tables "
                f"and results), the memory limit is {_mib(capacity.command_limit_bytes)} MiB; "
                "raise --memory-limit"
            )
    chosen = max(1, min(capacity.workers, fitting))
    return Plan(
        processes=capacity.processes,
        workers=chosen,
        memory_limit_bytes=capacity.memory_limit_bytes,
        reserved_bytes=reserved_bytes,
        shared_bytes=shared_bytes,
        projected_bytes=max(fixed + chosen * widest.worker_bytes, command),
        stages=tuple(stages),
    )


def joint_plan(plans: Sequence[Plan]) -> Plan:
    """Return the plan of what is done one after the other.

    Memory and devices are those of the part that takes most; workers the fewest that any has.

    Parameters
    ----------
    plans : sequence of Plan
        At least one, of the same processes. Stages of several are numbered by part.
    """
    if len(plans) == 1:
        return plans[0]
    most = max(plans, key=lambda plan: plan.projected_bytes)
    on_devices = [plan for plan in plans if plan.devices is not None]
    device = max(on_devices, key=_device_bytes, default=most)
    return replace(
        most,
        workers=min(plan.workers for plan in plans),
        stages=tuple(
            replace(stage, name=f"{number}: {stage.name}")
            for number, plan in enumerate(plans, start=1)
            for stage in plan.stages
        ),
        devices=device.devices,
        devices_reason=device.devices_reason,
    )


def _device_bytes(plan: Plan) -> int:
    return 0 if plan.devices is None else plan.devices.projected_bytes


def idle_workers(plan: Plan, capacity: Capacity) -> str | None:
    """Return a line that says so where the memory limit keeps workers from working.

    Examples
    --------
    >>> stage = StagePlan("write", 10, 0, 0, 100 << 20)
    >>> here = Capacity(1, 8, False, reserved_bytes=200 << 20, memory_limit_bytes=512 << 20)
    >>> idle_workers(make_plan([stage], here, shared_bytes=0), here)
    '2 of 8 threads work, for the memory limit of 512 MiB; all do with --memory-limit 1040MiB'
    """
    if plan.workers >= capacity.workers:
        return None
    widest = max(stage.worker_bytes for stage in plan.stages)
    wanted = plan.reserved_bytes + plan.shared_bytes + capacity.workers * widest
    return (
        f"{plan.workers} of {capacity.workers} threads work"
        + (" in each process" if capacity.processes > 1 else "")
        + f", for the memory limit of {_mib(plan.memory_limit_bytes)} MiB; "
        f"all do with --memory-limit {_mib(wanted)}MiB"
    )


def _mib(size: int) -> int:
    return -(-size // (1 << 20))


# --- devices -----------------------------------------------------------------------------------

DEVICE_TILE_COLUMNS = 1 << 16
"""Most columns of D that a device makes at a time where it needs all rows of them."""

DEVICE_MIN_ELEMENTS = 2 * DEVICE_TILE_COLUMNS
"""Blocks of fewer elements are not worth a device.

From here on a block has at least two tiles, so that one that must be cut is cut between tiles and
its sums keep their bits.
"""

DEVICE_SCRATCH_BYTES = 256 << 20
"""Room for those columns of D, and for making them."""

DEVICE_OUTPUT_ROWS = 16
DEVICE_OUTPUT_COLUMNS = 1 << 18
"""Rows and columns of D that a device makes at a time for weighted sums.

They are summed row by row, so many rows are many small operations: few columns would make them
many more.
"""

DEVICE_LIBRARY_BYTES = 48 << 20
"""Of a worker, for cuBLAS (32 MiB on Hopper, 8 elsewhere, by torch's defaults) and rounding up."""

_CHANGES_BYTES = 17
"""Per element of D while it is made: the patterns, their signs (then D), which are not finite."""


def device_tile_columns(rows: int) -> int:
    """Return how many columns of D a device makes at a time, with all `rows` of them.

    A power of two, and the same for every block: what is summed tile by tile has the same bits
    however a block is cut between tiles.

    Examples
    --------
    >>> device_tile_columns(50), device_tile_columns(10_000)
    (65536, 1024)
    """
    fitting = max(1, DEVICE_SCRATCH_BYTES // (_CHANGES_BYTES * (rows + 1)))
    return min(DEVICE_TILE_COLUMNS, max(64, 1 << fitting.bit_length() - 1))


def device_block_bytes(
    elements: int,
    rows: int,
    itemsize: int,
    base_itemsize: int,
    *,
    basis: int = 0,
    gram: bool = False,
    outputs: int = 0,
) -> int:
    """Count what one block takes of a device's memory at most.

    Parameters
    ----------
    elements, rows : int
        b and T.
    itemsize, base_itemsize : int
        Bytes of a weight of the checkpoints and of the base.
    basis, gram, outputs
        What is made of it, any of them: columns of C, the Gram matrix, outputs written.
    """
    differences = (rows + 1) * elements * itemsize
    # A run that arrives: positions and codes, row numbers and counts; then index, and twice row
    # offsets, or differences with their signs and, later, in their own width.
    needs = [elements * (4 + itemsize + 4 * 8) + 16 * rows]
    # Ordered patterns before the first row, with what they are made from, and after the last.
    states = 3 * 8
    if basis or gram:
        tile = min(elements, device_tile_columns(rows))
        made = (_CHANGES_BYTES * (rows + 1) + states) * tile
        # P of the tile; C, the sum, and what is added to it.
        needs.append(made + 8 * basis * tile + 3 * 8 * rows * basis)
        needs.append(made + 2 * 8 * rows * rows if gram else 0)
    if outputs:
        tile = min(elements, DEVICE_OUTPUT_COLUMNS)
        made = _CHANGES_BYTES * (min(rows, DEVICE_OUTPUT_ROWS) + 1) + states
        # The base; the sums with a term of each and D, or with rounded patterns and, an output at
        # a time, what rounding takes: 8 numbers and 3 marks.
        summing = (2 * 8 * outputs + made) * tile
        rounding = ((8 + base_itemsize) * outputs + 8 * 8 + 3) * tile
        held = elements * base_itemsize + 8 * rows * outputs
        needs.append(held + max(summing, rounding))
    return differences + max(needs) + DEVICE_LIBRARY_BYTES


def device_staging_bytes(elements: int, itemsize: int, base_itemsize: int, outputs: int) -> int:
    """Count the page-locked host memory of a worker that uses a device.

    Two buffers for a run of changes (or the base's patterns, which take less), and one for a
    tile's outputs. torch rounds each up to a power of two.
    """
    going = elements * (4 + itemsize) + 4096
    coming = min(elements, DEVICE_OUTPUT_COLUMNS) * base_itemsize * outputs
    return 2 * (1 << going.bit_length()) + (1 << coming.bit_length())


def device_slots(limit_bytes: int, block_bytes: int, workers: int, devices: int) -> int:
    """Return how many blocks may be on a device at a time, at least one.

    As many as `limit_bytes` holds of `block_bytes` each, but no more than its share of `workers`.

    Examples
    --------
    >>> device_slots(8 << 30, 1 << 30, workers=6, devices=2)
    3
    """
    return max(1, min(limit_bytes // max(1, block_bytes), -(-workers // devices)))
