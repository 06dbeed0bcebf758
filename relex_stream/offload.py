"""Blocks that devices work on instead of the CPU: whether any do, and which, wherever tasks run.

A stage asks for each block, and takes the CPU's kernels where it gets nothing. torch is imported
only where there is a device to use.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relex_stream import costs, devices, planner
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf, Blocks, float_formats
from relex_stream.devices import Device, DevicePool, DeviceRequest
from relex_stream.errors import DeviceError, MemoryLimitError, OptionError
from relex_stream.summaries import DevicePlan
from relex_stream.ulp import Bits

if TYPE_CHECKING:
    from relex_stream.device_blocks import DeviceBlocks

Float64 = NDArray[np.float64]

_FIRST = DeviceRequest("cuda", (0,))
"""What a worker of a cluster has: its own device comes first among those it sees."""


class Offload:
    """Works on blocks on the devices of the process; may be pickled, and used by several threads.

    Each method returns None for a block that the CPU is to work on.

    Parameters
    ----------
    plan : DevicePlan
    found : sequence of Device, optional
        The devices; a copy that was pickled takes the first that its process sees.
    """

    def __init__(self, plan: DevicePlan, found: Sequence[Device] | None = None) -> None:
        self.plan = plan
        self._found = found
        self._lock = threading.Lock()
        self._opened: DeviceBlocks | None = None

    def __reduce__(self) -> Any:
        return Offload, (self.plan,)

    @property
    def _blocks(self) -> DeviceBlocks:
        with self._lock:
            if self._opened is None:
                from relex_stream.device_blocks import DeviceBlocks

                found = self._found or devices.find_devices(_FIRST, self.plan.memory_limit_bytes)
                self._opened = DeviceBlocks(DevicePool(found, [self.plan.slots] * len(found)))
            return self._opened

    @property
    def share(self) -> float:
        """The share of a device that a task takes.

        A hair less than ``1 / slots``: dask takes shares away one by one, and of nine times 1/9 the
        last would not fit.
        """
        return (1 - 1e-9) / self.plan.slots

    @staticmethod
    def takes(at: BlockOf) -> bool:
        """Say whether devices work on a block; it must then be alone, not part of a strip."""
        return at.elements >= planner.DEVICE_MIN_ELEMENTS

    def open(self) -> None:
        """Get ready what the devices need of this process."""
        self._blocks  # noqa: B018 - it is made when first asked for

    def products(
        self, reader: BlockReader, at: Blocks, base_bits: Bits, rows: int, coefficients: Float64
    ) -> Float64 | None:
        """As `device_blocks.DeviceBlocks.products`."""
        blocks = self._blocks
        if not blocks.takes(at):
            return None
        return blocks.products(reader, at.blocks[0], base_bits, rows, coefficients)

    def gram(self, reader: BlockReader, at: Blocks, base_bits: Bits, rows: int) -> Float64 | None:
        """As `device_blocks.DeviceBlocks.gram`."""
        blocks = self._blocks
        if not blocks.takes(at):
            return None
        return blocks.gram(reader, at.blocks[0], base_bits, rows)

    def outputs(
        self,
        reader: BlockReader,
        at: Blocks,
        base_bits: Bits,
        rows: int,
        weights: Float64,
        out: Bits,
    ) -> int | None:
        """As `device_blocks.DeviceBlocks.outputs`."""
        blocks = self._blocks
        if not blocks.takes(at):
            return None
        return blocks.outputs(reader, at.blocks[0], base_bits, rows, weights, out)


def kind_for(offload: Offload | None, at: BlockOf) -> Hashable:
    """Return a kind for `blocks.work_on_strips`: as `blocks.float_formats`, but for devices."""
    return None if offload is not None and offload.takes(at) else float_formats(at)


def choose_offload(
    asked: str,
    work: costs.DeviceWork,
    places: planner.Places,
    *,
    block_bytes: int,
    memory_limit_bytes: int | None,
) -> tuple[Offload | None, str]:
    """Return what devices do, None for nothing, and why.

    Parameters
    ----------
    asked : str
        As in `devices.parse_devices`.
    work : DeviceWork
    places : Places
    block_bytes : int
        What the largest block takes of a device.
    memory_limit_bytes : int, optional
        Of each device; by default a share of what is free.

    Raises
    ------
    OptionError, DeviceError
        If there are no such devices.
    MemoryLimitError
        If a block does not fit in what may be taken of a device that was asked for.
    """
    request = devices.parse_devices(asked)
    if places.gpu_workers is not None:
        return _on_cluster(request, work, places, block_bytes, memory_limit_bytes)
    choice = devices.choose_devices(
        request,
        work,
        cores=places.cores,
        block_bytes=block_bytes,
        memory_limit_bytes=memory_limit_bytes,
    )
    if not choice.devices:
        return None, choice.reason
    limit = min(device.memory_limit_bytes for device in choice.devices)
    plan = _planned([device.name for device in choice.devices], limit, block_bytes, places.cores)
    return Offload(plan, choice.devices), choice.reason


def _planned(names: Sequence[str], limit: int, block_bytes: int, cores: int) -> DevicePlan:
    if block_bytes > limit:
        raise MemoryLimitError(
            f"a block takes {-(-block_bytes >> 20)} MiB of a device's memory, {limit >> 20} MiB of "
            f"{names[0]} may be taken; raise --device-memory-limit, or give --devices cpu"
        )
    slots = planner.device_slots(limit, block_bytes, cores, len(names))
    return DevicePlan(
        names=tuple(names),
        memory_limit_bytes=limit,
        block_bytes=block_bytes,
        slots=slots,
        projected_bytes=slots * block_bytes,
    )


def _on_cluster(
    request: DeviceRequest,
    work: costs.DeviceWork,
    places: planner.Places,
    block_bytes: int,
    memory_limit_bytes: int | None,
) -> tuple[Offload | None, str]:
    if request.kind == "cpu":
        return None, "The CPU was asked for."
    if request.numbers:
        raise OptionError(
            "on a cluster each worker has the device it was given; give --devices cuda"
        )
    if not places.gpu_workers:
        if request.kind == "cuda":
            raise DeviceError(
                "no worker of the cluster has a GPU, by the resource of that name; start those "
                "that do with: dask worker --resources GPU=1"
            )
        return None, "The CPU: no worker of the cluster has the resource GPU."
    cpu_s = costs.projected_cpu_s(work, places.cores)
    device_s = costs.projected_device_s(work, places.gpu_cores, places.gpu_workers)
    figures = (
        f"{device_s:.1f} s projected on {places.gpu_workers} GPU(s), "
        f"{cpu_s:.1f} s on {places.cores} core(s)"
    )
    if request.kind == "auto" and cpu_s <= device_s:
        return None, f"The CPU: {figures}."
    # How much is free there is only known there.
    limit = memory_limit_bytes or 4 * block_bytes
    each = -(-places.gpu_cores // places.gpu_workers)
    plan = _planned([f"{places.gpu_workers} GPU worker(s)"], limit, block_bytes, each)
    return Offload(plan), f"CUDA: {figures}." if request.kind == "auto" else "CUDA was asked for."
