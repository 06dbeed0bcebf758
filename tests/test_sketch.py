from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import sketch
from relex_stream.sketch import (
    ChangeRows,
    add_gram,
    add_products,
    add_to_sketch,
    add_weighted_rows,
    cumulate,
    cumulate_transposed,
    next_basis,
    pack_sketch,
    products_of_changes,
    scatter_columns,
    sketch_basis,
    sketch_gram,
    sketch_key,
    subspace_of_gram,
    subspace_of_products,
    unpack_sketch,
)


def sparse_matrix(rng, rows, elements, share):
    dense = rng.standard_normal((rows, elements))
    dense[rng.random(dense.shape) >= share] = 0
    return dense


def rows_of(dense, rows=None):
    """Compress some rows of a dense D, as a sweep of a block does."""
    rows = range(len(dense)) if rows is None else rows
    positions = [np.flatnonzero(dense[row]) for row in rows]
    return ChangeRows.of(
        list(rows),
        [p.size for p in positions],
        np.concatenate([*positions, []]).astype(np.uint32),
        np.concatenate([*(dense[r, p] for r, p in zip(rows, positions, strict=True)), []]),
    )


def lower_ones(rows):
    return np.tril(np.ones((rows, rows)))


def cut(elements, size):
    return [(first, min(elements, first + size)) for first in range(0, elements, size)]


matrices = st.tuples(
    st.integers(1, 12),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 2**32 - 1),
)


# --- products with D ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, columns=st.integers(1, 5), dtype=st.sampled_from(["f4", "f8"]))
def test_products_with_d_against_dense(matrix, columns, dtype):
    rows, elements, share, seed = matrix
    rng = np.random.default_rng(seed)
    dense = sparse_matrix(rng, rows, elements, share)
    changes = rows_of(dense)
    tolerance = 1e-12 if dtype == "f8" else 1e-4
    coefficients = rng.standard_normal((rows, columns))
    start = rng.standard_normal((elements, columns)).astype(dtype)
    out = start.copy()
    add_weighted_rows(changes, 0, coefficients, out)
    np.testing.assert_allclose(out, start + dense.T @ coefficients, rtol=0, atol=tolerance)

    projected = rng.standard_normal((elements, columns)).astype(dtype)
    start = rng.standard_normal((rows, columns))
    out = start.copy()
    add_products(changes, 0, projected, out)
    # Products and sums are float64 whatever the projection is.
    np.testing.assert_allclose(out, start + dense @ projected.astype("f8"), rtol=0, atol=1e-11)


def test_products_take_rows_a_group_at_a_time():
    rng = np.random.default_rng(0)
    dense = sparse_matrix(rng, 40, 300, 0.1)
    coefficients, projected = rng.standard_normal((40, 3)), rng.standard_normal((300, 3))
    weighted, products = np.zeros((300, 3)), np.zeros((40, 3))
    for first in (0, 16, 32):
        group = rows_of(dense, range(first, min(40, first + 16)))
        add_weighted_rows(group, 0, coefficients, weighted)
        add_products(group, 0, projected, products)
    np.testing.assert_allclose(weighted, dense.T @ coefficients, atol=1e-12)
    np.testing.assert_allclose(products, dense @ projected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, first=st.integers(0, 60), width=st.integers(1, 60))
def test_products_of_a_tile_use_its_columns_only(matrix, first, width):
    rows, elements, share, seed = matrix
    rng = np.random.default_rng(seed)
    dense = sparse_matrix(rng, rows, elements, share)
    tile = rows_of(dense).split(first)[0].split(first + width)[1]
    columns = dense[:, first : first + width]
    coefficients = rng.standard_normal((rows, 2))
    out = np.zeros((width, 2))
    add_weighted_rows(tile, first, coefficients, out)
    expected = np.zeros_like(out)
    expected[: columns.shape[1]] = columns.T @ coefficients
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)

    projected = rng.standard_normal((width, 2))
    out = np.zeros((rows, 2))
    add_products(tile, first, projected, out)
    np.testing.assert_allclose(out, columns @ projected[: columns.shape[1]], rtol=0, atol=1e-12)

    gram = np.zeros((rows, rows))
    add_gram(tile, first, width, gram)
    np.testing.assert_allclose(np.tril(gram), np.tril(columns @ columns.T), rtol=0, atol=1e-11)

    window = np.zeros((rows, width))
    scatter_columns(tile, first, window)
    assert np.array_equal(window[:, : columns.shape[1]], columns)
    assert not window[:, columns.shape[1] :].any()


# --- rows cut by columns -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, cuts=st.lists(st.integers(0, 61), max_size=4))
def test_rows_cut_at_columns_have_every_entry_once(matrix, cuts):
    rows, elements, share, seed = matrix
    dense = sparse_matrix(np.random.default_rng(seed), rows, elements, share)
    whole = rest = rows_of(dense)
    assert whole.entries == np.count_nonzero(dense)
    edges = [0, *sorted(cuts), elements + 2]
    left_of_all, _ = whole.split(0)
    assert left_of_all.entries == whole.entries
    for first, stop in pairwise(edges):
        rest, here = rest.split(stop)
        assert here.rows is whole.rows
        assert here.entries == np.count_nonzero(dense[:, first:stop])
        for row, start, end in zip(here.rows, here.starts, here.ends, strict=True):
            expected = first + np.flatnonzero(dense[row, first:stop])
            assert here.positions[start:end].tolist() == expected.tolist()
            assert here.values[start:end].tolist() == dense[row, expected].tolist()
    assert rest.entries == 0


def test_rows_lie_where_their_counts_say():
    changes = ChangeRows.of([2, 5, 9], [2, 0, 3], np.arange(7, dtype=np.uint32), np.arange(7.0))
    assert changes.rows.tolist() == [2, 5, 9]
    assert changes.starts.tolist() == [0, 2, 2]
    assert changes.ends.tolist() == [2, 2, 5]  # room behind the last is no entry
    assert changes.entries == 5


def test_no_rows_at_all():
    nothing = ChangeRows.of([], [], np.zeros(4, np.uint32), np.zeros(4))
    assert nothing.entries == 0
    for part in (nothing, *nothing.split(2)):
        gram, dense = np.zeros((3, 3)), np.zeros((3, 4))
        weighted, products = np.zeros((4, 2)), np.zeros((3, 2))
        add_gram(part, 0, 4, gram)
        add_weighted_rows(part, 0, np.ones((3, 2)), weighted)
        add_products(part, 0, np.ones((4, 2)), products)
        scatter_columns(part, 0, dense)
        for result in (gram, weighted, products, dense):
            assert not result.any()


# --- the Gram matrix ---------------------------------------------------------------------------


def gram_by_tiles(changes, elements, columns, gram):
    """Sum the Gram matrix as a sweep does, some columns at a time."""
    rest = changes
    for first, stop in cut(elements, columns):
        rest, here = rest.split(stop)
        add_gram(here, first, stop - first, gram)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices, columns=st.sampled_from([1, 7, 16, 1000]))
def test_gram_against_dense(matrix, columns):
    rows, elements, share, seed = matrix
    rng = np.random.default_rng(seed)
    dense = sparse_matrix(rng, rows, elements, share)
    start = rng.standard_normal((rows, rows))
    gram = start.copy()
    gram_by_tiles(rows_of(dense), elements, columns, gram)
    np.testing.assert_allclose(np.tril(gram - start), np.tril(dense @ dense.T), rtol=0, atol=1e-11)


def test_gram_of_a_block_with_sparse_dense_and_empty_tiles(monkeypatch):
    rng = np.random.default_rng(1)
    elements = 6 * 64 + 5
    dense = sparse_matrix(rng, 10, elements, 0.03)
    dense[:, 64:128] = rng.standard_normal((10, 64))
    dense[:, 192:256] = 0
    dense[:, 256:320] = rng.standard_normal((10, 64))
    dense[4] = 0
    dense[0, -1] = 1
    pairs, products = [], []
    kernel, scatter = sketch._pairs_kernel, sketch.scatter_columns
    monkeypatch.setattr(sketch, "_pairs_kernel", lambda *a: (pairs.append(1), kernel(*a)))
    monkeypatch.setattr(sketch, "scatter_columns", lambda *a: (products.append(1), scatter(*a)))
    gram = np.zeros((10, 10))
    gram_by_tiles(rows_of(dense), elements, 64, gram)
    assert (len(pairs), len(products)) == (4, 2)
    np.testing.assert_allclose(np.tril(gram), np.tril(dense @ dense.T), rtol=0, atol=1e-11)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_gram_of_very_many_columns(share):
    rng = np.random.default_rng(2)
    dense = sparse_matrix(rng, 5, 70_001, share)
    gram = np.zeros((5, 5))
    add_gram(rows_of(dense), 0, 70_001, gram)
    np.testing.assert_allclose(np.tril(gram), np.tril(dense @ dense.T), rtol=1e-11, atol=1e-9)


def test_gram_adds_up_over_blocks_of_rows_that_skip_some():
    rng = np.random.default_rng(3)
    dense = sparse_matrix(rng, 9, 500, 0.2)
    dense[[0, 4, 8]] = 0
    gram = np.zeros((9, 9))
    for first, stop in cut(500, 130):
        add_gram(rows_of(dense[:, first:stop], [1, 2, 3, 5, 6, 7]), 0, stop - first, gram)
    np.testing.assert_allclose(np.tril(gram), np.tril(dense @ dense.T), rtol=0, atol=1e-11)


def test_gram_of_nothing():
    gram = np.zeros((3, 3))
    add_gram(rows_of(np.zeros((3, 50))), 0, 50, gram)
    add_gram(rows_of(np.zeros((3, 50)), []), 0, 50, gram)
    assert not gram.any()


# --- the sketch --------------------------------------------------------------------------------


def omega(key, elements, width=sketch.SKETCH_WIDTH):
    """Write the test matrix down, by splitmix64 in Python's integers."""
    matrix = np.zeros((elements, width))
    key, low64 = int(key), (1 << 64) - 1
    for element in range(elements):
        x = (key + element * 0x9E3779B97F4A7C15) & low64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & low64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & low64
        x ^= x >> 31
        matrix[element, x % width] = 1 if x >> 63 else -1
    return matrix


def sketched(dense, key, size):
    """Sketch D block by block, each block from its own offset."""
    rows = np.zeros((len(dense), sketch.SKETCH_WIDTH))
    for first, stop in cut(dense.shape[1], size):
        for t, row in enumerate(dense[:, first:stop]):
            positions = np.flatnonzero(row).astype(np.uint32)
            values = np.append(row[positions], np.nan)  # what lies behind `count` is not read
            where = np.append(positions, np.uint32(0)).astype(np.uint32)
            add_to_sketch(where, values, positions.size, first, key, rows[t])
    return rows


@pytest.mark.parametrize("block", [1, 37, 900])
def test_sketch_is_the_product_with_omega_for_any_cut(block):
    dense = sparse_matrix(np.random.default_rng(5), 4, 900, 0.2)
    key = sketch_key(0, "model.embed_tokens.weight")
    np.testing.assert_allclose(
        sketched(dense, key, block), dense @ omega(key, 900), rtol=0, atol=1e-12
    )


def test_sketch_of_an_element_far_into_a_tensor():
    key, far = np.uint64(2**64 - 1), 7 << 33
    row = np.zeros(16)
    add_to_sketch(np.array([2**32 - 1], np.uint32), np.array([3.0]), 1, far, key, row)
    low64 = (1 << 64) - 1
    expected = omega((int(key) + (far + 2**32 - 1) * 0x9E3779B97F4A7C15) & low64, 1, 16)[0] * 3
    assert np.array_equal(row, expected)


def test_omega_is_spread_evenly():
    matrix = omega(sketch_key(1, "w"), 20_000)
    assert (np.abs(matrix).sum(axis=1) == 1).all()
    # 78 per column, with a standard deviation of 8.8; signs 0, with one of 141.
    assert np.abs(np.abs(matrix).sum(axis=0) - 78).max() < 45
    assert abs(matrix.sum()) < 700


def test_sketch_keys_are_frozen():
    # A store keeps sketches; another key would make them noise.
    digest = hashlib.sha256(b"7\0lm_head.weight").digest()
    assert isinstance(sketch_key(7, "a"), np.uint64)  # a kernel takes a Python int for an int64
    assert sketch_key(7, "lm_head.weight") == int.from_bytes(digest[:8], "little")
    assert sketch_key(0, "a") == 8348787342930090591
    assert len({sketch_key(seed, name) for seed in range(3) for name in ("a", "b", "0")}) == 9


@settings(max_examples=80, deadline=None)
@given(
    magnitude=st.integers(-30, 30),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_sketch_rows_lose_at_most_half_a_float16_step(magnitude, spread, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, 256)) * 10.0 ** (magnitude - spread * rng.random((3, 256)))
    rows[0] *= 1e-3  # each row has a scale of its own
    packed, scales = pack_sketch(rows)
    assert packed.dtype == np.float16
    assert scales.dtype == np.float32
    back = unpack_sketch(packed, scales)
    assert back.dtype == np.float64
    # Relative to each entry, until float16's subnormals begin.
    steps = 2.0**-25 * scales.astype(np.float64)[:, None]
    bound = np.maximum(2.0**-11 * np.abs(rows), steps) * (1 + 1e-6)
    assert (np.abs(back - rows) <= bound).all()


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(256),
        np.full(256, 1e-60),
        np.full(256, 1e300),
        np.full(256, np.nan),
        np.full(256, np.inf),
    ],
)
def test_rows_out_of_range_are_packed_as_nothing(row):
    packed, scales = pack_sketch(np.array([row, np.ones(256)]))
    assert scales.tolist() == [0, 1]
    assert not packed[0].any()
    assert (packed[1] == 1).all()


# --- T x T algebra -----------------------------------------------------------------------------


def test_cumulate_is_the_product_with_the_triangle_of_ones():
    rows = np.random.default_rng(6).standard_normal((7, 3))
    np.testing.assert_allclose(cumulate(rows), lower_ones(7) @ rows, atol=1e-14)
    np.testing.assert_allclose(cumulate_transposed(rows), lower_ones(7).T @ rows, atol=1e-14)
    np.testing.assert_allclose(products_of_changes(rows), lower_ones(7) @ rows, atol=1e-14)
    assert cumulate_transposed(rows).flags.c_contiguous


def with_spectrum(rng, rows, elements, singular_values):
    """Return D, so that M = L D has the singular values given, and M's left vectors."""
    rank = len(singular_values)
    left = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((elements, rank)))[0]
    deltas = (left * singular_values) @ right.T
    return np.diff(deltas, axis=0, prepend=0), left


def projector(vectors):
    return vectors @ vectors.T


def exact_subspace(changes, rank):
    gram = np.zeros((len(changes), len(changes)))
    add_gram(rows_of(changes), 0, changes.shape[1], gram)
    gram[np.triu_indices_from(gram, 1)] = np.nan  # not read
    return subspace_of_gram(gram, rank)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_exact_route_against_a_dense_svd(rank):
    rng = np.random.default_rng(7)
    changes, _ = with_spectrum(rng, 20, 400, 3.0 * 0.6 ** np.arange(20))
    deltas = np.cumsum(changes, axis=0)
    left, values, _ = np.linalg.svd(deltas, full_matrices=False)
    found = exact_subspace(changes, rank)
    assert found.vectors.shape == (20, rank)
    assert np.abs(projector(found.vectors) - projector(left[:, :rank])).max() < 1e-10
    np.testing.assert_allclose(found.singular_values, values[:rank], rtol=1e-10)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(rank), atol=1e-12)


def randomized_subspace(changes, rank, passes, block=100):
    """Run the randomized route as the pipeline does: float16 sketch, float32 projections."""
    rows, elements = changes.shape
    stored = unpack_sketch(*pack_sketch(sketched(changes, sketch_key(0, "w"), block)))
    basis = sketch_basis(sketch_gram(stored), rank)
    assert basis.shape == (rows, min(rows, rank + sketch.OVERSAMPLING))
    for number in range(passes):
        if number:
            basis = next_basis(products)  # noqa: F821
        coefficients = cumulate_transposed(basis)
        products = np.zeros_like(basis)
        for first, stop in cut(elements, block):
            part = rows_of(changes[:, first:stop])
            projected = np.zeros((stop - first, basis.shape[1]), np.float32)
            add_weighted_rows(part, 0, coefficients, projected)
            add_products(part, 0, projected, products)
        products = products_of_changes(products)
    return subspace_of_products(basis, products, rank)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("passes", "bound"), [(1, 1e-3), (2, 2e-6)])
def test_randomized_route_against_a_dense_svd(rank, passes, bound):
    # Neighbouring singular values differ by a fifth, as hard as the first ones of real runs.
    rng = np.random.default_rng(8)
    changes, _ = with_spectrum(rng, 40, 3000, 0.8 ** np.arange(40))
    left, values, _ = np.linalg.svd(np.cumsum(changes, axis=0), full_matrices=False)
    found = randomized_subspace(changes, rank, passes)
    assert np.abs(projector(found.vectors) - projector(left[:, :rank])).max() < bound
    np.testing.assert_allclose(found.singular_values, values[:rank], rtol=bound)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(rank), atol=1e-12)


def test_randomized_route_is_exact_when_the_basis_is_complete():
    changes, _ = with_spectrum(np.random.default_rng(9), 8, 200, 0.5 ** np.arange(8))
    left = np.linalg.svd(np.cumsum(changes, axis=0), full_matrices=False)[0]
    found = randomized_subspace(changes, 1, 1)
    assert np.abs(projector(found.vectors) - projector(left[:, :1])).max() < 1e-6


@pytest.mark.parametrize("route", [exact_subspace, lambda d, r: randomized_subspace(d, r, 2)])
class TestBothRoutes:
    def test_a_rank_above_the_true_one_gives_the_true_one(self, route):
        # Float32 projections leave noise in the randomized route: 2 true directions stand out.
        changes, left = with_spectrum(np.random.default_rng(10), 12, 300, np.array([2.0, 1.0]))
        found = route(changes, 5)
        assert found.vectors.shape[1] == found.singular_values.size
        assert 2 <= found.singular_values.size <= 5
        assert np.abs(projector(found.vectors[:, :2]) - projector(left)).max() < 1e-6
        np.testing.assert_allclose(found.singular_values[:2], [2, 1], rtol=1e-6)
        assert (found.singular_values[2:] < 1e-3).all()

    def test_a_rank_above_the_number_of_steps(self, route):
        changes, _ = with_spectrum(np.random.default_rng(11), 3, 300, np.array([3.0, 2.0, 1.0]))
        found = route(changes, 10)
        assert found.vectors.shape == (3, 3)
        np.testing.assert_allclose(found.singular_values, [3, 2, 1], rtol=1e-6)

    def test_no_change_at_all(self, route):
        found = route(np.zeros((6, 300)), 2)
        assert found.vectors.shape == (6, 0)
        assert found.singular_values.shape == (0,)

    def test_one_step(self, route):
        changes = np.zeros((1, 300))
        changes[0, [5, 17]] = 3, -4
        found = route(changes, 1)
        assert np.abs(found.vectors).tolist() == [[pytest.approx(1)]]
        assert found.singular_values.tolist() == [pytest.approx(5)]

    def test_steps_that_repeat_weights(self, route):
        changes, _ = with_spectrum(np.random.default_rng(12), 6, 300, 0.3 ** np.arange(6))
        changes[[1, 2, 5]] = 0
        left = np.linalg.svd(np.cumsum(changes, axis=0), full_matrices=False)[0]
        found = route(changes, 1)
        assert np.abs(projector(found.vectors) - projector(left[:, :1])).max() < 1e-6
        np.testing.assert_allclose(found.vectors[1], found.vectors[0], atol=1e-6)


def test_the_exact_route_leaves_out_directions_that_are_noise():
    changes, _ = with_spectrum(np.random.default_rng(13), 12, 300, np.array([1.0]))
    assert exact_subspace(changes, 5).vectors.shape == (12, 1)


def test_the_leading_part_of_a_gram_matrix_is_that_of_a_window():
    changes, _ = with_spectrum(np.random.default_rng(14), 10, 200, 0.5 ** np.arange(10))
    gram = np.zeros((10, 10))
    add_gram(rows_of(changes), 0, 200, gram)
    window = subspace_of_gram(gram[:6, :6], 1)
    left = np.linalg.svd(np.cumsum(changes[:6], axis=0), full_matrices=False)[0]
    assert np.abs(projector(window.vectors) - projector(left[:, :1])).max() < 1e-10
