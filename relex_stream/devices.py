"""Devices: which to use, and the pool that tasks borrow them from.

This module does not import torch unless a CUDA device is asked for or may be worth it: torch takes
a second, and the CPU's kernels do without.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from relex_stream import costs, planner
from relex_stream.errors import DeviceError, OptionError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

FREE_SHARE = 0.8
"""Of the memory free on a device, what we take if told nothing: others may want some."""


@dataclass(frozen=True)
class DeviceRequest:
    """What was asked for.

    Attributes
    ----------
    kind : str
        ``auto``, ``cpu`` or ``cuda``.
    numbers : tuple of int
        CUDA devices named one by one; none if all are meant.
    """

    kind: str
    numbers: tuple[int, ...] = ()


def parse_devices(text: str) -> DeviceRequest:
    """Read ``auto``, ``cpu``, ``cuda`` or a list such as ``cuda:0,cuda:2``.

    Raises
    ------
    OptionError
        If it is none of these, or a list that names a device twice or mixes in anything else: with
        the CPU beside a device, rounding would depend on which of them was free.

    Examples
    --------
    >>> parse_devices("cuda:2,cuda:0")
    DeviceRequest(kind='cuda', numbers=(0, 2))
    """
    names = [name.strip() for name in text.split(",")]
    if names in (["auto"], ["cpu"], ["cuda"]):
        return DeviceRequest(names[0])
    found = [re.fullmatch(r"cuda:([0-9]{1,4})", name, re.ASCII) for name in names]
    allowed = "auto, cpu, cuda, or a list such as cuda:0,cuda:2"
    if "cpu" in names and any(name.startswith("cuda") for name in names):
        raise OptionError(
            f"--devices {text} mixes cpu and cuda, so that results would depend on which was free; "
            f"give {allowed}"
        )
    numbers = sorted(int(match[1]) for match in found if match)
    if len(numbers) < len(names):
        raise OptionError(f"--devices takes {allowed}, not {text!r}")
    if len(set(numbers)) < len(numbers):
        raise OptionError(f"--devices {text} names one twice; give each once")
    return DeviceRequest("cuda", tuple(numbers))


@dataclass(frozen=True)
class Device:
    """A device to borrow.

    Attributes
    ----------
    name : str
        For people.
    torch_device : str
        As torch calls it: ``cuda:0``.
    memory_limit_bytes : int
        What we may take of its memory.
    """

    name: str
    torch_device: str
    memory_limit_bytes: int


def find_devices(
    request: DeviceRequest, memory_limit_bytes: int | None = None
) -> tuple[Device, ...]:
    """Return the CUDA devices that a request names, by ascending number; none for ``cpu``.

    Parameters
    ----------
    request : DeviceRequest
        With ``auto``, all there are, perhaps none.
    memory_limit_bytes : int, optional
        What we may take of each; `FREE_SHARE` of what is free if not given.

    Raises
    ------
    DeviceError
        If a device was asked for that torch does not see; says what it sees.

    Notes
    -----
    Imports torch, and makes a CUDA context on each device found.
    """
    if request.kind == "cpu" or (request.kind == "auto" and not _driver_present()):
        return ()
    # cuBLAS promises the same bits every time for a single stream, or with a workspace that it
    # does not choose anew; it looks when it is first used, so this comes before.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = request.numbers or tuple(range(count))
    missing = [number for number in numbers if number >= count]
    if request.kind == "cuda" and (missing or not numbers):
        raise DeviceError(_unseen(torch, missing, count))
    return tuple(_device(torch, number, memory_limit_bytes) for number in numbers)


def wants_gpu_processes(request: DeviceRequest) -> bool:
    """Say whether processes that are started for the work should have a GPU each.

    With ``auto`` if there are GPUs, and dask-cuda, which shares them out.
    """
    if request.kind != "auto":
        return request.kind == "cuda"
    return importlib.util.find_spec("dask_cuda") is not None and _driver_present()


def _driver_present() -> bool:
    """Say whether there is an NVIDIA driver, without torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _unseen(torch: Any, missing: Sequence[int], count: int) -> str:
    wanted = ", ".join(f"cuda:{number}" for number in missing) or "a CUDA device"
    if count:
        seen = ", ".join(f"cuda:{number}" for number in range(count))
        return (
            f"{wanted} asked for, torch sees {seen}; name one of these or set CUDA_VISIBLE_DEVICES"
        )
    if torch.version.cuda is None:
        return (
            f"{wanted} asked for, but torch {torch.__version__} is built without CUDA; "
            "install one that has it (https://pytorch.org/get-started) or use the cpu"
        )
    return (
        f"{wanted} asked for, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees none; "
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the cpu"
    )


def _device(torch: Any, number: int, memory_limit_bytes: int | None) -> Device:
    try:
        if memory_limit_bytes is None:
            free, _ = torch.cuda.mem_get_info(number)
            memory_limit_bytes = int(FREE_SHARE * free)
        name = torch.cuda.get_device_name(number)
    except RuntimeError as error:
        # In exclusive mode another process may have it; torch's text has many lines.
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"cuda:{number} cannot be used: {reason}; name another or use the cpu"
        ) from error
    return Device(f"{name} (cuda:{number})", f"cuda:{number}", memory_limit_bytes)


@dataclass(frozen=True)
class DeviceChoice:
    """Where an extrapolation is to run, and why.

    Attributes
    ----------
    devices : tuple of Device
        None for the CPU.
    reason : str
        One sentence.
    """

    devices: tuple[Device, ...]
    reason: str


def choose_devices(
    request: DeviceRequest,
    work: costs.DeviceWork,
    *,
    cores: int,
    block_bytes: int,
    memory_limit_bytes: int | None = None,
) -> DeviceChoice:
    """Find the devices asked for; with ``auto``, take them if they are projected to be faster.

    Parameters
    ----------
    request : DeviceRequest
    work : DeviceWork
    cores : int
        Workers on the CPU.
    block_bytes : int
        What the largest block takes of a device: `planner.device_block_bytes`.
    memory_limit_bytes : int, optional
        Of each device.

    Raises
    ------
    DeviceError
        As `find_devices`. With ``auto``, a device that cannot be used is not there.
    """
    if request.kind == "cpu":
        return DeviceChoice((), "The CPU was asked for.")
    if request.kind == "cuda":
        devices = find_devices(request, memory_limit_bytes)
        return DeviceChoice(devices, f"{_names(devices)} asked for.")
    try:
        return _projected_faster(request, work, cores, block_bytes, memory_limit_bytes)
    except DeviceError as error:
        return DeviceChoice((), f"The CPU: {error}.")


def _projected_faster(
    request: DeviceRequest,
    work: costs.DeviceWork,
    cores: int,
    block_bytes: int,
    memory_limit_bytes: int | None,
) -> DeviceChoice:
    cpu_s = costs.projected_cpu_s(work, cores)
    on_cpu = f"{cpu_s:.1f} s projected on {cores} core(s)"
    if cpu_s <= costs.DEVICE_START_S:
        # Not even looked for: that alone takes a good part of what it could gain.
        start = f"a device would take {costs.DEVICE_START_S:.1f} s to start"
        return DeviceChoice((), f"The CPU, with {on_cpu}: {start}.")
    found = find_devices(request, memory_limit_bytes)
    fitting = tuple(device for device in found if device.memory_limit_bytes >= block_bytes)
    if not fitting:
        lack = "no CUDA device was found"
        if found:
            lack = f"a block takes {block_bytes >> 20} MiB, more than {_names(found)} may give"
        return DeviceChoice((), f"The CPU, with {on_cpu}: {lack}.")
    device_s = costs.projected_device_s(work, cores, len(fitting))
    on_devices = f"{device_s:.1f} s projected on {_names(fitting)}"
    if device_s < cpu_s:
        return DeviceChoice(fitting, f"CUDA, with {on_devices}: {on_cpu}.")
    return DeviceChoice((), f"The CPU, with {on_cpu}: {on_devices}.")


def _names(devices: Sequence[Device]) -> str:
    return ", ".join(device.name for device in devices)


def slots_of(devices: Sequence[Device], block_bytes: int, workers: int) -> list[int]:
    """Return how many tasks each device is lent to at a time: `planner.device_slots`."""
    return [
        planner.device_slots(device.memory_limit_bytes, block_bytes, workers, len(devices))
        for device in devices
    ]


@dataclass(frozen=True)
class Loan:
    """A device while a task has it.

    Attributes
    ----------
    device : Device
    number : int
        Its place in the pool.
    slot : int
        Which of the tasks on the device this is: no other has this number at the same time.
    """

    device: Device
    number: int
    slot: int


class DevicePool:
    """Devices that the tasks of several threads borrow, some tasks on each.

    Parameters
    ----------
    devices : sequence of Device
        At least one.
    slots : sequence of int
        How many tasks each takes at a time.
    """

    def __init__(self, devices: Sequence[Device], slots: Sequence[int]) -> None:
        assert devices
        assert len(slots) == len(devices)
        assert min(slots) >= 1
        self.devices = tuple(devices)
        self._free = [list(range(slot)) for slot in slots]
        self._lent = [0 for _ in devices]
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._streams: dict[tuple[int, int], torch.cuda.Stream] = {}
        self._threads: dict[tuple[int, int], ThreadPoolExecutor] = {}

    @contextmanager
    def borrow(self) -> Iterator[Loan]:
        """Lend the device with the fewest tasks, the first of several; wait until there is one.

        Who waits longest is served first. On a CUDA device the thread's current device and stream
        are set meanwhile: a stream for each slot, so that copies of one task run beside the work
        of another.
        """
        loan = self._take()
        try:
            with self._current(loan):
                yield loan
        finally:
            self._give_back(loan)

    def on_its_thread(self, loan: Loan, function: Callable[[], Result]) -> Result:
        """Call a function on the slot's own thread, with its device and stream, and wait.

        cuBLAS keeps a workspace of 32 MiB for each pair of a thread and a stream: there are as many
        as slots in this way, and not as many as workers and slots can be paired.
        """
        key = loan.number, loan.slot
        if key not in self._threads:  # a slot is one thread's at a time, so nobody else makes it
            self._threads[key] = ThreadPoolExecutor(1, thread_name_prefix="device")

        def call() -> Result:
            with self._current(loan):
                return function()

        return self._threads[key].submit(call).result()

    def _take(self) -> Loan:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and any(self._free))
                return self._lend()
            finally:
                # Also where waiting was interrupted. The next in line may be served already.
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _lend(self) -> Loan:
        open_to = [number for number, slots in enumerate(self._free) if slots]
        number = min(open_to, key=lambda each: (self._lent[each], each))
        slot = min(self._free[number])
        self._free[number].remove(slot)
        self._lent[number] += 1
        return Loan(self.devices[number], number, slot)

    def _give_back(self, loan: Loan) -> None:
        with self._changed:
            self._free[loan.number].append(loan.slot)
            self._lent[loan.number] -= 1
            self._changed.notify_all()

    @contextmanager
    def _current(self, loan: Loan) -> Iterator[None]:
        if not loan.device.torch_device.startswith("cuda"):
            yield
            return
        import torch

        # A slot is one thread's at a time, so nobody else makes its stream.
        key = loan.number, loan.slot
        with torch.cuda.device(loan.device.torch_device):
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream()
            with torch.cuda.stream(self._streams[key]):
                yield
