"""Extrapolation with devices: pretend ones, on the CPU, running what a GPU runs."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch

import relex_stream as rs
from relex_stream import costs, dense, device_blocks, devices, offload
from relex_stream.costs import DeviceWork
from relex_stream.devices import Device
from relex_stream.errors import DeviceError, MemoryLimitError, OptionError, RelexStreamWarning
from relex_stream.offload import Offload, choose_offload
from relex_stream.planner import Places
from relex_stream.summaries import DevicePlan
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.oracle import ulp_distance
from tests.test_extrapolate import read_weights

PRETEND = tuple(Device(f"pretend {number}", "cpu", 1 << 30) for number in range(2))
# Two tensors that devices take, of which one is two blocks; and two that they do not.
TENSORS = {
    "model.embed.weight": (1300, 1000),
    "layers.0.weight": (400, 500),
    "layers.1.weight": (300, 200),
    "norm.weight": (40,),
}
WORK = DeviceWork(
    elements=10**9,
    changes=5 * 10**10,
    rows=50,
    itemsize=4,
    base_itemsize=4,
    basis=8,
    passes=1,
    outputs=1,
)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda *_: PRETEND)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What devices worked on, by method."""
    found: Counter[str] = Counter()
    for name in ("products", "gram", "outputs"):
        method = getattr(dense.DenseBlock, name)

        def spy(self, *arguments, name=name, method=method):  # type: ignore[no-untyped-def]
            found[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(dense.DenseBlock, name, spy)
    return found


@pytest.fixture(scope="module", params=["BF16", "F32"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    run: Trajectory = make_trajectory(
        root,
        steps=range(1, 7),
        tensors=TENSORS,
        dtype=request.param,
        change_share=0.05 if request.param == "BF16" else 1.0,
    )
    rs.build_store(run.base, run.checkpoints, root / "store")
    return root / "store"


def extrapolated(store: Path, out: Path, **options: object) -> dict[str, np.ndarray]:
    # torch and what other tests left take much of the default limit.
    rs.extrapolate(store, out, target_steps=[12], memory_limit=4 << 30, **options)  # type: ignore[arg-type]
    return read_weights(out)


# --- the answer --------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_devices_give_what_the_cpu_gives(
    store: Path, tmp_path: Path, used: Counter[str], svd: str
) -> None:
    there = extrapolated(store, tmp_path / "there", svd=svd, devices="cuda")
    blocks = 2 + 1 if "BF16" in str(store) else 3 + 1
    assert used == {"products" if svd == "randomized" else "gram": blocks, "outputs": blocks}
    used.clear()
    here = extrapolated(store, tmp_path / "here", svd=svd, devices="cpu")
    assert not used
    assert there.keys() == here.keys()
    differing = total = 0
    for name, bits in here.items():
        distance = ulp_distance(bits, there[name])
        # Products differ by 1e-6, Gram matrices by 1e-12, relatively; outputs are rounded alike.
        # A difference of 1e-6 in what is added moves a float32 by some of its steps.
        assert distance.max() <= (1 if bits.dtype == np.uint16 else 64)
        differing += int((distance > 0).sum())
        total += distance.size
    if svd == "exact" and "BF16" in str(store):
        assert not differing
    elif "BF16" in str(store):
        assert differing < 1e-4 * total


@pytest.mark.usefixtures("pretend")
def test_the_same_devices_give_the_same_bits(store: Path, tmp_path: Path) -> None:
    found = [
        extrapolated(store, tmp_path / f"{number}", devices="cuda", workers=workers)
        for number, workers in enumerate([1, 3])
    ]
    for name, bits in found[0].items():
        assert np.array_equal(bits, found[1][name]), name


@pytest.mark.usefixtures("pretend")
def test_without_memory_the_cpu_does_it_and_says_so(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(device_blocks, "DenseBlock", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RelexStreamWarning)
        warnings.simplefilter("ignore", rs.ForecastWarning)
        there = extrapolated(store, tmp_path / "there", devices="cuda")
    texts = [str(warning.message) for warning in caught]
    assert 1 <= len(set(texts)) == len(texts) <= 2  # one for each device that was come to
    assert all(re.match(r"pretend \d has no memory for half of a block", text) for text in texts)
    here = extrapolated(store, tmp_path / "here", devices="cpu")
    for name, bits in here.items():
        assert np.array_equal(bits, there[name]), name


@pytest.mark.usefixtures("pretend")
def test_the_plan_names_devices_and_what_is_taken_of_them(store: Path, tmp_path: Path) -> None:
    options = {"target_steps": [12], "dry_run": True, "workers": 4, "memory_limit": 4 << 30}
    summary = rs.extrapolate(store, tmp_path / "out", devices="cuda", **options)  # type: ignore[arg-type]
    plan = summary.plan.devices
    assert plan is not None
    assert plan.names == ("pretend 0", "pretend 1")
    assert plan.projected_bytes == plan.slots * plan.block_bytes <= plan.memory_limit_bytes
    assert plan.slots == 2  # four workers, two devices
    assert summary.plan.devices_reason == "pretend 0, pretend 1 asked for."
    cpu = rs.extrapolate(store, tmp_path / "out", devices="cpu", **options)  # type: ignore[arg-type]
    assert cpu.plan.devices is None
    # Page-locked buffers are of the host.
    staged = summary.plan.stages[0].worker_bytes - cpu.plan.stages[0].worker_bytes
    assert staged > 2 << 20


def test_auto_does_not_look_for_devices_where_work_is_little(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("looked for devices")

    monkeypatch.setattr(devices, "find_devices", refuse)
    summary = rs.extrapolate(store, tmp_path / "out", target_steps=[12], dry_run=True)
    assert summary.plan.devices is None
    assert summary.plan.devices_reason.startswith("The CPU, with ")


# --- the choice --------------------------------------------------------------------------------


def choose(
    asked: str, places: Places, work: DeviceWork = WORK, limit: int | None = 1 << 30
) -> tuple[Offload | None, str]:
    return choose_offload(asked, work, places, block_bytes=200 << 20, memory_limit_bytes=limit)


@pytest.mark.usefixtures("pretend")
def test_auto_takes_devices_where_they_are_projected_to_be_faster() -> None:
    found, reason = choose("auto", Places(2))
    assert found is not None
    assert found.plan == DevicePlan(
        names=("pretend 0", "pretend 1"),
        memory_limit_bytes=1 << 30,
        block_bytes=200 << 20,
        slots=1,
        projected_bytes=200 << 20,
    )
    assert re.match(r"CUDA, with \d+\.\d s projected on pretend 0, pretend 1: ", reason)
    none, reason = choose("auto", Places(1000))
    assert none is None
    assert reason.startswith("The CPU, with ")


@pytest.mark.usefixtures("pretend")
def test_a_block_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        choose_offload("cuda", WORK, Places(2), block_bytes=(2 << 30) + 1, memory_limit_bytes=None)
    assert str(caught.value) == (
        "a block takes 2049 MiB of a device's memory, 1024 MiB of pretend 0 may be taken; "
        "raise --device-memory-limit, or give --devices cpu"
    )
    # What was not asked for is only left out.
    found, reason = choose_offload(
        "auto", WORK, Places(2), block_bytes=2 << 30, memory_limit_bytes=None
    )
    assert found is None
    assert "a block takes 2048 MiB, more than" in reason


def test_a_cluster_has_the_devices_that_its_workers_say() -> None:
    without, some = Places(16, 0, 0), Places(16, 2, 8)
    assert choose("auto", without) == (
        None,
        "The CPU: no worker of the cluster has the resource GPU.",
    )
    assert choose("cpu", some) == (None, "The CPU was asked for.")
    with pytest.raises(DeviceError, match=r"no worker of the cluster has a GPU.*GPU=1"):
        choose("cuda", without)
    with pytest.raises(OptionError, match="each worker has the device it was given"):
        choose("cuda:1", some)
    found, reason = choose("cuda", some)
    assert found is not None
    assert (found.plan.names, reason) == (("2 GPU worker(s)",), "CUDA was asked for.")
    assert found.plan.slots == 4  # eight threads, two devices
    for slots in range(1, 65):
        share = Offload(replace(found.plan, slots=slots)).share
        left, running = 1.0, 0
        while left >= share:  # as dask counts
            left, running = left - share, running + 1
        assert running == slots
    cpu_s = costs.projected_cpu_s(WORK, 16)
    device_s = costs.projected_device_s(WORK, 8, 2)
    found, reason = choose("auto", some)
    assert (found is not None) == (device_s < cpu_s)
    assert f"{device_s:.1f} s projected on 2 GPU(s), {cpu_s:.1f} s on 16 core(s)" in reason


def test_what_travels_is_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DevicePlan(("a worker",), 1 << 30, 1 << 20, 3, 3 << 20)
    copy = pickle.loads(pickle.dumps(Offload(plan, PRETEND)))
    assert copy.plan == plan
    asked = []

    def find(*arguments: object) -> tuple[Device, ...]:
        asked.append(arguments)
        return PRETEND[:1]

    monkeypatch.setattr(devices, "find_devices", find)
    copy.open()
    copy.open()
    # The process's own device comes first among those it sees.
    assert asked == [(devices.DeviceRequest("cuda", (0,)), 1 << 30)]


# --- on a cluster ------------------------------------------------------------------------------


def _pretend() -> None:
    devices.find_devices = lambda *_: PRETEND[:1]


@pytest.fixture(scope="module")
def gpu_workers() -> Iterator[str]:
    """A cluster of which each worker says that it has a GPU."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            resources={"GPU": 1},
        ) as workers,
        distributed.Client(workers.scheduler_address, set_as_default=False) as client,
    ):
        client.run(_pretend)
        yield workers.scheduler_address


@pytest.mark.usefixtures("pretend")
def test_workers_with_a_device_do_what_one_process_does(
    store: Path, tmp_path: Path, gpu_workers: str
) -> None:
    here = extrapolated(store, tmp_path / "here", devices="cuda")
    summary = rs.extrapolate(
        store, tmp_path / "there", target_steps=[12], devices="cuda", scheduler=gpu_workers
    )
    assert summary.plan.devices is not None
    assert summary.plan.devices.names == ("2 GPU worker(s)",)
    there = read_weights(tmp_path / "there")
    for name, bits in here.items():
        assert np.array_equal(bits, there[name]), name


def _have_no_memory() -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    device_blocks.DenseBlock = full  # type: ignore[assignment,misc]


def _have_memory() -> None:
    device_blocks.DenseBlock = dense.DenseBlock  # type: ignore[misc]


@pytest.mark.usefixtures("pretend")
def test_what_workers_warn_of_is_given_once_by_the_command(
    store: Path, tmp_path: Path, gpu_workers: str
) -> None:
    with (
        distributed.Client(gpu_workers, set_as_default=False) as client,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", RelexStreamWarning)
        warnings.simplefilter("ignore", rs.ForecastWarning)
        client.run(_have_no_memory)
        try:
            there = extrapolated(store, tmp_path / "there", devices="cuda", scheduler=gpu_workers)
        finally:
            client.run(_have_memory)
    # Both stages come to it, with the same tensors; each worker may begin with another.
    texts = [str(warning.message) for warning in caught]
    assert len(set(texts)) == len(texts) >= 1
    assert all(text.startswith("pretend 0 has no memory for half of a block") for text in texts)
    here = extrapolated(store, tmp_path / "here", devices="cpu")
    for name, bits in here.items():
        assert np.array_equal(bits, there[name]), name


def test_offload_imports_no_torch() -> None:
    assert "torch" not in vars(offload)
