"""Time as plain arithmetic: what work costs the CPU, a device, and a cluster's scheduler.

Models to choose by (which devices, how large a task), not promises. Each constant says where it
comes from: fitted to timings of this code, or assumed from data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULER_TASK_S = 1.2e-3
"""What a task costs the scheduler of a cluster, which has one thread (docs/scaling.md)."""

SCHEDULER_SHARE = 0.05
"""Most of a run that its scheduling may take, where there is enough work for so large tasks."""

SCHEDULER_SHARE_AT_MOST = 0.5
"""The same where there is little work: it goes on beside the work, and must not be what decides."""

_WORK_BYTES_PER_S = 1.5e9
"""What a thread works through at its quickest; a slower one makes scheduling a smaller share."""

_TASKS_PER_WORKER = 8
"""So many tasks keep all threads of a cluster busy until nearly the end."""

_TASKS_PER_WORKER_AT_LEAST = 2
"""With fewer, some threads would have nothing to do for half of the time."""


MOST_TASKS = 4096
"""Tasks that work of a stage, as far as more would gain nothing: each takes kilobytes of memory."""


def thread_task_bytes(total_bytes: int, least: int) -> int:
    """Return the bytes that are worth a task of a thread of this process.

    Examples
    --------
    >>> thread_task_bytes(16 << 30, 8 << 20) >> 20
    8
    >>> thread_task_bytes(1600 << 30, 8 << 20) >> 20
    400
    """
    return max(least, total_bytes // MOST_TASKS)


def cluster_task_bytes(total_bytes: int, workers: int, least: int) -> int:
    """Return the bytes that are worth a task of a cluster.

    While the scheduler hands out a task each of the other threads works: with twice the threads, a
    task has to be twice as large for the scheduler to keep up. But all threads must have some, and
    in a short stage larger shares rather than wait for the scheduler.

    Parameters
    ----------
    total_bytes : int
        Of the stage.
    workers : int
        Threads of all processes.
    least : int
        Bytes that are worth a task of a thread.

    Examples
    --------
    >>> cluster_task_bytes(1600 << 30, 16, 8 << 20) >> 20
    549
    >>> cluster_task_bytes(16 << 30, 16, 8 << 20) >> 20
    128
    >>> cluster_task_bytes(16 << 40, 16, 8 << 20) >> 20
    4096
    >>> cluster_task_bytes(16 << 30, 256, 8 << 20) >> 20
    32
    """
    handed_out = _WORK_BYTES_PER_S * workers * SCHEDULER_TASK_S
    enough = min(
        max(int(handed_out / SCHEDULER_SHARE), total_bytes // MOST_TASKS),
        total_bytes // (_TASKS_PER_WORKER * workers),
    )
    little = min(
        int(handed_out / SCHEDULER_SHARE_AT_MOST),
        total_bytes // (_TASKS_PER_WORKER_AT_LEAST * workers),
    )
    return max(least, enough, little)


@dataclass(frozen=True)
class DeviceWork:
    """An extrapolation, as far as it decides whether devices pay.

    Attributes
    ----------
    elements, changes : int
        Weights of all blocks that changed, and their changes in all rows: of one pass.
    rows : int
    itemsize, base_itemsize : int
        Bytes of a weight of the checkpoints and of the base.
    basis : int
        Columns of the basis of the randomized route; 0 for the exact one.
    passes : int
        Statistics passes.
    outputs : int
    sweeps : int
        How often the CPU decodes a block for a Gram matrix: 0 if its changes are kept between
        sweeps, in all kinds of passes.
    """

    elements: int
    changes: int
    rows: int
    itemsize: int
    base_itemsize: int
    basis: int
    passes: int
    outputs: int
    sweeps: int = 0


# Nanoseconds on one core, fitted to single-threaded timings of the compiled kernels on an AMD EPYC
# virtual machine: the best of 7 calls each of `FrameCodec.decode_frames`, `sweep_products` (k = 1,
# 8, 16, 32), `sweep_outputs` (1, 4, 8 outputs) and `advance_rows` with `add_gram`, on blocks of 1
# Mi BF16 weights x 50 steps with 0.5 % changes and of 512 Ki F32 weights x 16 and 48 steps that
# all change. They are within 30 % of each timing, but for 4 outputs (padded to no whole vector).
# Decoding dense frames is `FrameCodec.decode` of a block of 512 Ki F32 weights that all change.
CPU_DECODE_NS = {2: 6.5, 4: 2.7}
"""Per change, from its frame, by bytes of a weight."""
CPU_PRODUCT_NS = (1.5, 0.2, 6.0, 0.35)
"""Per element, per element and column, per change, per change and column."""
CPU_OUTPUT_NS = (1.9, 2.4, 6.5, 0.3)
"""The same for outputs."""
CPU_GRAM_NS = (2.0, 35.0, 1.7, 0.07)
"""Per element; per change while they are few; per change and per pair of rows if they are many."""
# Where a block has more changes than are kept, they are decoded and made anew for each sweep. 512
# Ki F32 weights x 50 steps that all change, through the stages (`python -m benchmarks devices`, one
# thread, best of 3, decoding subtracted once): 26 ns per change for products of 8 columns, 17 for
# an output, 70 for a Gram matrix (9 sweeps).
CPU_AGAIN_PRODUCT_NS = (14.0, 1.5)
"""Per change, per change and column; the second decoding is in it."""
CPU_AGAIN_OUTPUT_NS = (15.0, 2.4)
"""The same for outputs."""
CPU_AGAIN_GRAM_NS = 7.5
"""Per change and sweep."""
CPU_STAGING_NS = 0.5
"""Per change, copied to where a device takes it from."""

# Assumed from data sheets, not yet measured on a device.
DEVICE_START_S = 4.0
"""Until the first block: importing torch (1 s), a CUDA context, kernels loaded, memory locked."""
DEVICE_LINK_BYTES_PER_S = 25e9
"""PCIe 4.0 x16, of 32 in theory; 5.0 has twice that."""
DEVICE_MEMORY_BYTES_PER_S = 1e12
"""A 40 GB A100 has 1.5e12, an H100 3.3e12; short operations reach some of it."""
DEVICE_FLOPS = 1e12
"""In float64: cards for games have 1e12 or less, an A100 19e12, an H100 67e12."""
DEVICE_DENSE_BYTES = 240
"""Read and written per element and row by the operations that make D and use it, one by one."""
DEVICE_PUT_BYTES = 200
"""Read and written per change by those that put it into its place; counted in the code."""


def projected_cpu_s(work: DeviceWork, cores: int) -> float:
    """Return how long an extrapolation takes on `cores` cores, by a model: seconds."""
    element, element_column, change, change_column = CPU_OUTPUT_NS
    if work.sweeps:
        change, change_column = CPU_AGAIN_OUTPUT_NS
    outputs = work.elements * (element + element_column * work.outputs)
    outputs += work.changes * (change + change_column * work.outputs)
    decoding = (work.passes + 1) * work.changes * CPU_DECODE_NS[work.itemsize]
    return 1e-9 * (decoding + work.passes * _cpu_pass_ns(work) + outputs) / cores


def _cpu_pass_ns(work: DeviceWork) -> float:
    if work.basis:
        element, element_column, change, change_column = CPU_PRODUCT_NS
        if work.sweeps:
            change, change_column = CPU_AGAIN_PRODUCT_NS
        return work.elements * (element + element_column * work.basis) + work.changes * (
            change + change_column * work.basis
        )
    element, few, many, pair = CPU_GRAM_NS
    if work.sweeps:
        many += work.sweeps * CPU_AGAIN_GRAM_NS
        few = many
    sparse = work.changes * few
    dense = work.changes * many + work.elements * work.rows**2 * pair
    return work.elements * element + min(sparse, dense)


def projected_device_s(work: DeviceWork, cores: int, devices: int) -> float:
    """Return how long an extrapolation takes with `devices`, by a model: seconds, start included.

    Frames are decoded by the cores as ever, while devices work on what was decoded before:
    whichever takes longer counts. That bounds what a device can gain where changes are many:
    decoding them is a fifth of what the CPU alone takes where all weights change.
    """
    passes = work.passes + 1
    per_change = CPU_DECODE_NS[work.itemsize] + CPU_STAGING_NS
    host_s = 1e-9 * passes * work.changes * per_change / cores
    moved = passes * (work.changes * (4 + work.itemsize) + work.elements * work.itemsize)
    moved += work.elements * work.base_itemsize * (1 + work.outputs)
    dense = work.elements * work.rows
    touched = dense * (DEVICE_DENSE_BYTES * passes + 24 * work.outputs)
    touched += passes * work.changes * DEVICE_PUT_BYTES
    operations = dense * 2 * (work.passes * (2 * work.basis or work.rows) + work.outputs)
    device_s = (
        moved / DEVICE_LINK_BYTES_PER_S
        + touched / DEVICE_MEMORY_BYTES_PER_S
        + operations / DEVICE_FLOPS
    ) / devices
    return DEVICE_START_S + max(host_s, device_s)
