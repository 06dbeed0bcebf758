"""Which devices are used, and the pool that tasks borrow them from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relex_stream import costs, devices, planner
from relex_stream.devices import (
    Device,
    DevicePool,
    DeviceRequest,
    choose_devices,
    find_devices,
    parse_devices,
    slots_of,
)
from relex_stream.errors import DeviceError, OptionError, RelexStreamError
from tests.test_costs import DENSE, SPARSE

GIB = 1 << 30
PATIENCE_S = 30

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def pretend(count: int, limit=GIB) -> list[Device]:
    return [Device(f"pretend {number}", "cpu", limit) for number in range(count)]


def pool_of(*slots: int) -> DevicePool:
    return DevicePool(pretend(len(slots)), slots)


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", DeviceRequest("auto")),
        ("cpu", DeviceRequest("cpu")),
        ("cuda", DeviceRequest("cuda")),
        ("cuda:0", DeviceRequest("cuda", (0,))),
        (" cuda:10, cuda:2 ", DeviceRequest("cuda", (2, 10))),
    ],
)
def test_devices_are_read(text, expected):
    assert parse_devices(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "auto, cpu, cuda, or a list such as cuda:0,cuda:2, not ''"),
        ("gpu", "not 'gpu'"),
        ("CUDA", "not 'CUDA'"),
        ("cuda:", "not 'cuda:'"),
        ("cuda:-1", "not 'cuda:-1'"),
        ("cuda:٣", "not 'cuda:٣'"),
        ("cuda:0,", "not 'cuda:0,'"),
        ("auto,cuda:0", "not 'auto,cuda:0'"),
        ("cuda,cuda:0", "not 'cuda,cuda:0'"),
        ("cuda:0,mps", "not 'cuda:0,mps'"),
        ("cuda:99999", "not 'cuda:99999'"),
        ("cpu,cuda:0", "results would depend on which was free"),
        ("cuda,cpu", "results would depend on which was free"),
        ("cuda:1,cuda:0,cuda:1", "names one twice"),
        ("cuda:1,cuda:01", "names one twice"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, reason):
    with pytest.raises(OptionError) as caught:
        parse_devices(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what there is -------------------------------------------------------------------------------


class FakeTorch:
    """As much of torch as is asked about devices."""

    __version__ = "9.9"

    def __init__(self, count, cuda="13.0", free=10 * GIB):
        self.version = type("version", (), {"cuda": cuda})
        self.cuda = self
        self.count = count
        self.free = free

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def mem_get_info(self, number):
        if self.free is None:
            raise RuntimeError("CUDA error: devices are busy or unavailable\nmore\nlines")
        return self.free + number, 80 * GIB

    def get_device_name(self, number):
        return "Some GPU"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    # Set first, so that it is known what to go back to.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def fake_torch(monkeypatch):
    def install(*arguments, **options):
        monkeypatch.setitem(sys.modules, "torch", FakeTorch(*arguments, **options))
        monkeypatch.setattr(devices, "_driver_present", lambda: True)

    return install


def test_devices_are_found_by_ascending_number(fake_torch):
    fake_torch(3)
    found = find_devices(parse_devices("cuda:2,cuda:0"))
    assert [device.torch_device for device in found] == ["cuda:0", "cuda:2"]
    assert found[0].name == "Some GPU (cuda:0)"
    # Four fifths of what is free there.
    assert [device.memory_limit_bytes for device in found] == [8 * GIB, int(0.8 * (10 * GIB + 2))]
    everything = find_devices(parse_devices("cuda"), memory_limit_bytes=123)
    assert [device.torch_device for device in everything] == ["cuda:0", "cuda:1", "cuda:2"]
    assert {device.memory_limit_bytes for device in everything} == {123}
    assert find_devices(parse_devices("auto"), 123) == everything
    assert find_devices(parse_devices("cpu")) == ()


def test_results_of_cublas_are_to_repeat_themselves(fake_torch, monkeypatch):
    fake_torch(1)
    find_devices(parse_devices("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    find_devices(parse_devices("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("there", "text", "message"),
    [
        ((2,), "cuda:0,cuda:3", r"cuda:3 asked for, torch sees cuda:0, cuda:1; name one of these"),
        ((0,), "cuda", r"a CUDA device asked for, but torch 9\.9 \(CUDA 13\.0\) sees none; look"),
        ((0,), "cuda:1", r"cuda:1 asked for, but torch 9\.9 \(CUDA 13\.0\) sees none; look"),
        ((0, None), "cuda", r"torch 9\.9 is built without CUDA; install .* or use the cpu"),
        ((1, "13.0", None), "cuda", r"cuda:0 cannot be used: CUDA error: .* unavailable; name"),
    ],
)
def test_devices_that_are_not_there_are_an_error_of_one_line(fake_torch, there, text, message):
    fake_torch(*there)
    with pytest.raises(DeviceError, match=message) as caught:
        find_devices(parse_devices(text))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RelexStreamError)
    assert isinstance(caught.value, RuntimeError)


@needs_no_cuda
def test_without_cuda_its_error_says_what_torch_is():
    with pytest.raises(DeviceError, match=torch.__version__.replace("+", r"\+")):
        find_devices(parse_devices("cuda"))


@pytest.mark.parametrize(
    ("asked", "dask_cuda", "driver", "wanted"),
    [
        ("cpu", True, True, False),
        ("cuda", False, False, True),
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
    ],
)
def test_processes_get_a_gpu_each_where_there_are_some(
    monkeypatch, asked, dask_cuda, driver, wanted
):
    monkeypatch.setattr(devices, "_driver_present", lambda: driver)
    monkeypatch.setattr(
        devices.importlib.util, "find_spec", lambda _: object() if dask_cuda else None
    )
    assert devices.wants_gpu_processes(parse_devices(asked)) == wanted


def test_the_cpu_is_chosen_without_importing_torch():
    code = (
        "import sys\n"
        "from relex_stream import costs, devices\n"
        "little = costs.DeviceWork(10**6, 10**5, 10, 2, 2, 8, 1, 1)\n"
        "much = costs.DeviceWork(10**10, 10**12, 100, 4, 4, 8, 1, 1)\n"
        "for text, work in (('cpu', much), ('auto', little)):\n"
        "    choice = devices.choose_devices(\n"
        "        devices.parse_devices(text), work, cores=2, block_bytes=1)\n"
        "    assert choice.devices == ()\n"
        "devices._driver_present = lambda: False\n"
        "assert devices.choose_devices(\n"
        "    devices.parse_devices('auto'), much, cores=2, block_bytes=1).devices == ()\n"
        "assert 'torch' not in sys.modules and 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


# --- what is chosen ------------------------------------------------------------------------------


def choice_of(text, work, cores=16, block_bytes=GIB, limit=None):
    return choose_devices(
        parse_devices(text), work, cores=cores, block_bytes=block_bytes, memory_limit_bytes=limit
    )


def test_auto_takes_devices_where_changes_are_dense(fake_torch):
    fake_torch(2)
    choice = choice_of("auto", DENSE)
    assert [device.torch_device for device in choice.devices] == ["cuda:0", "cuda:1"]
    cpu_s = costs.projected_cpu_s(DENSE, 16)
    device_s = costs.projected_device_s(DENSE, 16, 2)
    assert choice.reason == (
        f"CUDA, with {device_s:.1f} s projected on Some GPU (cuda:0), Some GPU (cuda:1): "
        f"{cpu_s:.1f} s projected on 16 core(s)."
    )


def test_auto_takes_the_cpu_where_changes_are_sparse(fake_torch):
    fake_torch(1)
    work = replace(SPARSE, elements=100 * SPARSE.elements, changes=100 * SPARSE.changes)
    choice = choice_of("auto", work)
    assert choice.devices == ()
    for seconds in (costs.projected_cpu_s(work, 16), costs.projected_device_s(work, 16, 1)):
        assert f"{seconds:.1f} s projected on " in choice.reason


@pytest.mark.parametrize(
    ("there", "work", "reason"),
    [
        ((0,), DENSE, "no CUDA device was found"),
        (
            (1, "13.0", GIB),
            DENSE,
            r"a block takes 1024 MiB, more than Some GPU \(cuda:0\) may give",
        ),
        ((1, "13.0", None), DENSE, "cuda:0 cannot be used"),
        ((1,), replace(DENSE, elements=10**6, changes=10**6), r"would take 4\.0 s to start"),
    ],
)
def test_auto_says_why_it_takes_the_cpu(fake_torch, there, work, reason):
    fake_torch(*there)
    choice = choice_of("auto", work)
    assert choice.devices == ()
    assert re.search(reason, choice.reason)
    assert "\n" not in choice.reason
    assert choice.reason.endswith(".")


def test_what_was_asked_for_is_not_weighed(fake_torch):
    fake_torch(1)
    little = replace(SPARSE, elements=1, changes=1)
    assert len(choice_of("cuda", little, block_bytes=1 << 60).devices) == 1
    assert choice_of("cpu", DENSE).devices == ()
    assert choice_of("cuda", little, limit=77).devices[0].memory_limit_bytes == 77


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(0, 1 << 40),
    block=st.integers(1, 1 << 36),
    workers=st.integers(1, 200),
    count=st.integers(1, 16),
)
def test_slots_are_as_many_as_fit(limit, block, workers, count):
    slots = planner.device_slots(limit, block, workers, count)
    assert slots >= 1
    assert slots == 1 or slots * block <= limit
    assert (slots - 1) * count < workers
    assert slots_of(pretend(count, limit), block, workers) == [slots] * count
    # No more would do.
    assert (slots + 1) * block > limit or slots * count >= workers


# --- the pool ------------------------------------------------------------------------------------


def test_the_device_with_the_fewest_tasks_is_lent_the_first_of_several():
    pool = pool_of(2, 3, 1)
    with ExitStack() as stack:
        loans = [stack.enter_context(pool.borrow()) for _ in range(6)]
    assert [loan.number for loan in loans] == [0, 1, 2, 0, 1, 1]
    assert [loan.slot for loan in loans] == [0, 0, 0, 1, 1, 2]
    assert [loan.device.name for loan in loans[:2]] == ["pretend 0", "pretend 1"]


def test_what_comes_back_is_lent_again():
    pool = pool_of(1, 1)
    with pool.borrow() as first:
        with pool.borrow() as second:
            assert (first.number, second.number) == (0, 1)
        with pool.borrow() as third:
            assert third.number == 1
    with pool.borrow() as fourth:
        assert (fourth.number, fourth.slot) == (0, 0)


def test_an_exception_brings_the_device_back():
    pool = pool_of(1)
    for error in (ValueError, KeyboardInterrupt, torch.cuda.OutOfMemoryError):
        with pytest.raises(error), pool.borrow():
            raise error
    with pool.borrow() as loan:
        assert loan.slot == 0


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def test_who_waits_longest_is_served_first():
    pool = pool_of(1)
    served = []

    def borrow(number):
        with pool.borrow():
            served.append(number)

    threads = []
    with pool.borrow():
        for number in range(20):
            threads.append(threading.Thread(target=borrow, args=(number,)))
            threads[-1].start()
            wait_until(lambda: len(pool._waiting) == len(threads))
    for thread in threads:
        thread.join(PATIENCE_S)
    assert served == list(range(20))


def test_who_gives_up_waiting_holds_up_nobody(monkeypatch):
    pool = pool_of(1)
    served = threading.Event()

    def borrow():
        with pool.borrow():
            served.set()

    with pool.borrow():
        thread = threading.Thread(target=borrow)
        thread.start()
        wait_until(lambda: len(pool._waiting) == 1)
        # Behind it in the line, as an interrupt while waiting.
        with monkeypatch.context() as patch:
            patch.setattr(pool._changed, "wait_for", mock.Mock(side_effect=TimeoutError))
            with pytest.raises(TimeoutError), pool.borrow():
                pass
        assert len(pool._waiting) == 1
        assert not served.is_set()
    assert served.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    with pool.borrow():
        assert not pool._waiting


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(slots=st.lists(st.integers(1, 3), min_size=1, max_size=3), threads=st.integers(1, 12))
def test_no_slot_is_two_threads_at_a_time(slots, threads):
    pool = pool_of(*slots)
    lock = threading.Lock()
    held: set[tuple[int, int]] = set()
    most = 0

    def work(_):
        nonlocal most
        for _ in range(20):
            with pool.borrow() as loan:
                key = loan.number, loan.slot
                with lock:
                    assert key not in held
                    assert loan.slot < slots[loan.number]
                    held.add(key)
                    most = max(most, len(held))
                time.sleep(0)
                with lock:
                    held.remove(key)

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(work, range(threads)))
    assert not held
    assert most <= min(threads, sum(slots))
    with ExitStack() as stack:
        again = [stack.enter_context(pool.borrow()) for _ in range(sum(slots))]
    assert len({(loan.number, loan.slot) for loan in again}) == sum(slots)


@needs_cuda
@pytest.mark.gpu
def test_a_slot_has_a_stream_of_its_own():
    found = find_devices(parse_devices("cuda:0"))
    pool = DevicePool(found, [2])
    before = torch.cuda.current_stream()
    with pool.borrow() as first:
        one = torch.cuda.current_stream()
        assert torch.cuda.current_device() == 0
        with pool.borrow():
            other = torch.cuda.current_stream()
        assert torch.cuda.current_stream() == one
    assert first.slot == 0
    assert len({stream.cuda_stream for stream in (before, one, other)}) == 3
    assert torch.cuda.current_stream() == before
    with pool.borrow():
        assert torch.cuda.current_stream() == one
