from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import relex_stream as rs
from tests.make_checkpoints import Trajectory, make_trajectory

FORMATS = [("BF16", None), ("F16", None), ("F32", None), ("F32", "BF16")]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda pair: "-".join(map(str, pair)))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    dtype, base_dtype = request.param
    root = tmp_path_factory.mktemp("opened")
    run = make_trajectory(root, steps=tuple(range(1, 20)), dtype=dtype, base_dtype=base_dtype)
    rs.build_store(run.base, run.checkpoints, root / "store")
    return run, rs.open_store(root / "store")


def test_bits_are_those_of_the_checkpoints(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    run, store = opened
    assert store.steps == run.steps
    for name in run.bits[1]:
        for step in (1, 16, 17, 19):
            bits = store.checkpoint_bits(name, step)
            assert bits.dtype == run.bits[step][name].dtype
            np.testing.assert_array_equal(bits, run.bits[step][name])


def test_torch_tensors_have_the_same_bits(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    torch = pytest.importorskip("torch")
    run, store = opened
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for name, bits in run.bits[17].items():
        tensor = store.checkpoint_tensor(name, 17)
        assert tensor.dtype == kinds[run.dtype]
        assert tuple(tensor.shape) == bits.shape
        integer = torch.int16 if bits.dtype == np.uint16 else torch.int32
        raw = tensor.reshape(-1).view(integer).numpy().view(bits.dtype)
        np.testing.assert_array_equal(raw, bits.reshape(-1))


def test_deltas_are_rounded_once_from_float64(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    run, store = opened
    for name in run.bits[1]:
        lazy = store.to_dask(name)
        now = np.stack([run.values(step, name) for step in run.steps]).astype(np.float64)
        expected = (now - run.values(0, name).astype(np.float64)).astype(np.float32)
        assert lazy.shape == expected.shape
        assert lazy.dtype == np.float32
        np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), expected)
        np.testing.assert_array_equal(store.delta(name, 17), expected[16])
        np.testing.assert_array_equal(store.delta(name, 0), np.zeros_like(expected[0]))


def test_a_lazy_array_computes_nothing_but_what_is_asked(
    opened: tuple[Trajectory, rs.OpenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = opened
    name = max(run.bits[1], key=lambda name: run.bits[1][name].size)

    def refuse(*_: object) -> None:
        raise AssertionError("read before anything was computed")

    monkeypatch.setattr(rs.OpenStore, "fill_deltas", refuse)
    lazy = store.to_dask(name)[3:5]
    with pytest.raises(AssertionError, match="before anything"):
        lazy.compute(scheduler="synchronous")


def test_what_is_not_there_is_named(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    _, store = opened
    name = next(iter(store.tensors))
    with pytest.raises(rs.OptionError, match="no tensor 'nothing'"):
        store.delta("nothing", 1)
    with pytest.raises(rs.OptionError, match=r"step 20 is not in .*; it holds 19 steps from 1 to"):
        store.checkpoint_bits(name, 20)


def test_an_opened_store_can_be_pickled(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    run, store = opened
    name = next(iter(run.bits[1]))
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.checkpoint_bits(name, 5), run.bits[5][name])


def test_plain_zarr_gives_the_dense_differences(opened: tuple[Trajectory, rs.OpenStore]) -> None:
    import zarr

    run, store = opened
    group = zarr.open_group(store.path, mode="r")
    for name, bits in run.bits[1].items():
        rows = group["deltas"][name][:]
        # Whole groups of 16 steps are allocated; rows of steps that do not exist yet are zero.
        assert rows.shape == (32, bits.size)
        assert not rows[19:].any()
        flat = [run.bits[step][name].reshape(-1) for step in run.steps]
        for row in range(1, 19):
            before, after = (ordered_by_definition(flat[r]) for r in (row - 1, row))
            np.testing.assert_array_equal(rows[row], after - before)


def ordered_by_definition(bits: np.ndarray) -> np.ndarray:
    """Return patterns in numeric order, from the definition: negative ones count downwards."""
    width = 8 * bits.dtype.itemsize
    wide = bits.astype(np.int64)
    negative = wide >> (width - 1) == 1
    ordered = np.where(negative, -1 - (wide - (1 << (width - 1))), wide)
    return (ordered % (1 << width)).astype(bits.dtype)


def test_the_base_can_be_named_when_it_has_moved(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2))
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    run.base.rename(tmp_path / "elsewhere")
    name = next(iter(run.bits[1]))
    with pytest.raises(rs.SourceError, match="--base"):
        rs.open_store(tmp_path / "store").checkpoint_bits(name, 1)
    store = rs.open_store(tmp_path / "store", base=tmp_path / "elsewhere")
    np.testing.assert_array_equal(store.checkpoint_bits(name, 1), run.bits[1][name])
