"""A block across its steps, in runs and in tiles of any size, is what its checkpoints hold."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import relex_stream as rs
from relex_stream import blocks, planner
from relex_stream.base_weights import open_base
from relex_stream.block_reader import DEFAULT_ENTRY_CAPACITY, BlockReader
from relex_stream.block_sweep import sweep_outputs, sweep_products
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.sketch import add_gram, add_products, add_weighted_rows, scatter_columns
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.ulp import add_rounded
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store

STEPS = tuple(range(1, 21))  # rows of two chunks
SHAPES = {"a.weight": (40, 31), "b.norm.weight": (16,), "c.bias": (7,)}
BLOCK_BYTES = 2000
LIMITS = [None, (1, 1 << 20), (1 << 16, 300), (400, 1 << 20)]
"""Changes and bytes of frames at hand at a time; None for those the program has."""


@pytest.fixture(scope="module", params=[("BF16", None), ("F16", None), ("F32", "BF16")], ids=str)
def run(request, tmp_path_factory) -> Trajectory:
    dtype, base_dtype = request.param
    root = tmp_path_factory.mktemp("blocks")
    trajectory = make_trajectory(
        root,
        steps=STEPS,
        dtype=dtype,
        base_dtype=base_dtype,
        tensors=SHAPES,
        change_share=0.2,
    )
    options = {"include_base": True, "block_bytes": BLOCK_BYTES}
    build_store(trajectory.base, trajectory.checkpoints, root / "store", **options)
    return trajectory


@pytest.fixture(params=LIMITS, ids=str)
def limits(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(blocks, "_RUN_CHANGES", request.param[0])
        monkeypatch.setattr(planner, "FRAMES_AT_HAND_BYTES", request.param[1])


def reader_of(run: Trajectory, capacity=DEFAULT_ENTRY_CAPACITY) -> BlockReader:
    store = Store(run.base.parent / "store")
    return BlockReader(store, open_base(store, None, CheckpointReader()), Workspace(), capacity)


def blocks_of(reader: BlockReader):
    for tensor in reader.store.manifest.tensors:
        for number in range(tensor.blocks):
            yield BlockOf(tensor, number)


def bits_of(run: Trajectory, at: BlockOf):
    """Return the block's bits at every step as the checkpoints have them, the base's widened."""
    here = slice(at.start, at.start + at.elements)
    bits = [run.bits[step][at.tensor.name].reshape(-1)[here] for step in (0, *STEPS)]
    if run.dtype != run.base_dtype:
        bits[0] = bits[0].astype(np.uint32) << np.uint32(16)
    return bits


def changes_of(run: Trajectory, at: BlockOf):
    """Return D of the block, dense."""
    values = np.stack([oracle.values(bits, run.dtype) for bits in bits_of(run, at)])
    return np.diff(values, axis=0)


@pytest.mark.usefixtures("limits")
def test_runs_hold_every_row_that_changed_and_its_changes(run):
    reader = reader_of(run)
    for at in blocks_of(reader):
        bits = bits_of(run, at)
        for stop in (0, 1, 15, 16, 17, 20):
            rows, found = [], []
            for some, changes in reader.decoded(at, stop):
                assert changes.count == sum(some.counts)
                assert len(some.rows) == 1 or changes.count <= blocks.run_capacity(at.elements)
                rows += some.rows
                ends = np.cumsum(some.counts)
                found += np.split(changes.positions[: changes.count].copy(), ends[:-1])
            expected = [np.flatnonzero(bits[row] != bits[row + 1]) for row in range(stop)]
            assert rows == [row for row in range(stop) if expected[row].size]
            for row, positions in zip(rows, found, strict=True):
                assert np.array_equal(positions, expected[row])


@pytest.mark.usefixtures("limits")
def test_bits_are_those_of_every_step(run):
    reader = reader_of(run)
    for at in blocks_of(reader):
        base_bits = reader.base_bits(at)
        for rows, expected in enumerate(bits_of(run, at)):
            assert np.array_equal(reader.bits_at(at, base_bits, rows), expected)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(
    ("capacity", "columns"),
    [(1 << 20, 1), (1 << 20, 100), (1 << 20, 5000), (0, 37), (0, 1000), (0, 5000)],
)
def test_tiles_add_up_to_the_block(run, capacity, columns):
    reader = reader_of(run, capacity)
    rng = np.random.default_rng(0)
    for at in blocks_of(reader):
        dense = changes_of(run, at)
        for rows in (20, 17, 1):
            here = dense[:rows]
            scale = 1e-12 * max(1, np.abs(here).sum())
            weights = rng.standard_normal((rows, 3))
            projected = rng.standard_normal((at.elements, 3))
            changes = reader.change_rows(at, reader.base_bits(at), rows)
            bits = bits_of(run, at)[: rows + 1]
            assert changes.entries == sum(np.count_nonzero(a != b) for a, b in pairwise(bits))
            assert changes.fits == (changes.entries <= capacity)
            weighted = np.zeros((at.elements, 3))
            products = np.zeros((rows, 3))
            gram = np.zeros((rows, rows))
            scattered = np.zeros((rows, at.elements))
            following = 0
            for tile in changes.tiles(columns):
                assert tile.first == following
                assert 0 < tile.columns <= columns
                following += tile.columns
                part = slice(tile.first, following)
                # Every sum is a sweep of its own, and takes nothing from the others.
                for batch in tile.batches():
                    add_weighted_rows(batch, tile.first, weights, weighted[part])
                for batch in tile.batches():
                    add_products(batch, tile.first, projected[part], products)
                for batch in tile.batches():
                    scatter_columns(batch, tile.first, scattered[:, part])
                if changes.fits:
                    (batch,) = tile.batches()
                    add_gram(batch, tile.first, tile.columns, gram)
            assert following == at.elements
            assert np.array_equal(scattered, here)
            np.testing.assert_allclose(weighted, here.T @ weights, rtol=0, atol=scale)
            np.testing.assert_allclose(products, here @ projected, rtol=0, atol=scale)
            if changes.fits:
                np.testing.assert_allclose(
                    np.tril(gram), np.tril(here @ here.T), rtol=0, atol=scale
                )


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("columns", [1, 100, 5000])
def test_kernels_that_sweep_tiles_agree_with_sums_over_the_block(run, columns):
    reader = reader_of(run)
    rng = np.random.default_rng(0)
    for at in blocks_of(reader):
        for rows, width in ((20, 8), (17, 3), (1, 1)):
            weights = rng.standard_normal((rows, width))
            base_bits = reader.base_bits(at).copy()
            changes = reader.change_rows(at, base_bits, rows)
            projected = np.zeros((at.elements, width), np.float32)
            sums = np.zeros((at.elements, width))
            products, swept = np.zeros((rows, width)), np.zeros((rows, width))
            for batch in changes.batches():
                add_weighted_rows(batch, 0, weights, projected)
                add_weighted_rows(batch, 0, weights, sums)
            for batch in changes.batches():
                add_products(batch, 0, projected, products)
            room = np.full((columns, width), np.nan, np.float32)
            sweep_products(changes.at_hand(), weights, room, swept)
            scale = 1e-12 * max(1, np.abs(products).max())
            np.testing.assert_allclose(swept, products, rtol=1e-12, atol=scale)

            fmt = at.base_format
            # Rows of the output may be longer than the block; what lies behind it is not touched.
            out = np.full((width, at.elements + 3), 77, base_bits.dtype)
            overflowed = sweep_outputs(
                changes.at_hand(),
                weights,
                base_bits,
                fmt.tag,
                np.full((columns, width), np.nan),
                out,
            )
            expected, count = np.empty(at.elements, base_bits.dtype), 0
            for output in range(width):
                count += add_rounded(base_bits, sums[:, output], fmt, expected)
                assert np.array_equal(out[output, : at.elements], expected)
            assert overflowed == count
            assert (out[:, at.elements :] == 77).all()


def test_a_block_that_never_changed_has_tiles_without_entries(run):
    reader = reader_of(run, 0)
    at = next(at for at in blocks_of(reader) if "norm" in at.tensor.name)
    changes = reader.change_rows(at, reader.base_bits(at), 20)
    assert changes.fits
    assert [tile.columns for tile in changes.tiles(10)] == [10, 6]
    for tile in changes.tiles(10):
        assert sum(batch.entries for batch in tile.batches()) == 0


def test_runs_of_bytes_are_the_frames_one_behind_the_other(run):
    reader = reader_of(run)
    store = reader.store
    for at in blocks_of(reader):
        for first in (0, 3, 15, 16, 18):
            for stop in range(first + 1, 21):
                sizes = store.frame_bytes[first:stop, at.column].tolist()
                out = np.empty(sum(sizes), np.uint8)
                store.read_run(at.tensor, at.block, first, sizes, out)
                frames = store.read_frames(at.tensor, at.block, first, stop)
                assert out.tobytes() == b"".join(bytes(frame) for _, frame in frames)


@pytest.mark.usefixtures("limits")
def test_damage_is_named_by_step_tensor_and_block(run):
    reader = reader_of(run)
    at = next(at for at in blocks_of(reader) if at.tensor.name == "a.weight" and at.block == 1)
    paths = [
        path
        for path in reader.store.path.rglob("c.1.1")
        if path.is_file() and "a.weight" in str(path)
    ]
    assert len(paths) == 1
    whole = paths[0].read_bytes()
    try:
        for place, step in ((-1, 20), (-1 - int(reader.store.frame_bytes[19, at.column]), 19)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            paths[0].write_bytes(damaged)
            with pytest.raises(
                rs.CorruptionError, match=rf"step {step}, tensor a\.weight, block 1: .*checksum"
            ):
                list(reader.decoded(at, 20))
            # Steps before it are whole.
            for rows in (16, step - 1):
                bits = reader.bits_at(at, reader.base_bits(at), rows)
                assert np.array_equal(bits, bits_of(run, at)[rows])
        paths[0].write_bytes(whole[:-1])
        with pytest.raises(rs.CorruptionError, match=r"tensor a\.weight, block 1: .* cut short"):
            list(reader.decoded(at, 20))
    finally:
        paths[0].write_bytes(whole)


def test_damage_that_is_gone_a_moment_later_is_still_damage(run, monkeypatch):
    reader = reader_of(run)
    at = next(blocks_of(reader))
    faithful = Store.read_run

    def unfaithful(self, *arguments):
        faithful(self, *arguments)
        arguments[-1][-1] ^= 1

    monkeypatch.setattr(Store, "read_run", unfaithful)
    with pytest.raises(rs.CorruptionError, match="damaged when it was first read"):
        list(reader.decoded(at, 20))
