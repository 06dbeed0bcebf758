"""One compiled loop over a block's steps finds what numpy finds step by step."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import scan
from relex_stream.codec import Changes, FrameCodec
from relex_stream.scan import (
    DONE,
    FETCHED,
    FRAMES_BYTES,
    FULL,
    UNREADABLE,
    Reads,
    ScanBlocks,
    ScanBuffers,
    ScanTables,
    scan_buffers,
    scan_steps,
    scan_tables,
)
from relex_stream.sketch import sketch_key
from relex_stream.ulp import FORMATS
from tests import oracle

KEY = sketch_key(0, "model.layers.0.mlp.weight")
WIDTH = 64
CODES = ["BF16", "F16", "F32"]


# --- the oracle --------------------------------------------------------------------------------


def place_in_order(bits):
    """Return patterns as integers in numeric order: negative ones count downwards from -1."""
    width = 8 * bits.dtype.itemsize
    wide = bits.astype(np.int64)
    return np.where(wide >> (width - 1) == 1, -1 - (wide - (1 << (width - 1))), wide)


def zigzags_of(before, after):
    width = 8 * before.dtype.itemsize
    difference = (place_in_order(after) - place_in_order(before)) % (1 << width)
    signed = np.where(difference >> (width - 1) == 1, difference - (1 << width), difference)
    return np.where(signed < 0, -2 * signed - 1, 2 * signed)


def finite(bits, code):
    mantissa, bias = {"BF16": (7, 127), "F16": (10, 15), "F32": (23, 127)}[code]
    return bits.astype(np.int64) >> mantissa & (2 * bias + 1) != 2 * bias + 1


def sketch_of(change, first_element):
    """Multiply a row of D by the test matrix (splitmix64, as the store format has it)."""
    with np.errstate(over="ignore"):
        elements = np.uint64(first_element) + np.arange(change.size, dtype=np.uint64)
        x = KEY + elements * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    signed = np.where(x >> np.uint64(63) == 1, change, -change)
    return np.bincount((x % np.uint64(WIDTH)).astype(int), signed, WIDTH)


# --- blocks in files ---------------------------------------------------------------------------


@dataclass
class Block:
    """A block's bits at the base (first) and at every step, and where it lies in files.

    ``runs`` has for each step the runs it is made of: descriptor, offset, bytes.
    """

    code: str
    bits: list[Any]
    runs: list[list[tuple[int, int, int]]]
    first_element: int = 0
    is_cast: bool = False
    fetched: bytes = b""

    def reads(self, first, stop):
        runs = self.runs[first:stop]
        sizes = [len(of_step) for of_step in runs]
        flat = np.array([run for of_step in runs for run in of_step], np.int64).reshape(-1, 3)
        return Reads(
            descriptors=np.unique(flat[:, 0]).astype(np.int32),
            bounds=np.cumsum([0, *sizes]),
            file=np.where(
                flat[:, 0] == FETCHED,
                FETCHED,
                np.unique(flat[:, 0], return_inverse=True)[1],
            ).astype(np.int32),
            offset=flat[:, 1].copy(),
            nbytes=flat[:, 2].copy(),
            is_cast=np.full(len(runs), self.is_cast),
            fetched=np.frombuffer(self.fetched, np.uint8).copy(),
        )

    @property
    def base(self):
        return self.bits[0]

    @property
    def steps(self):
        return len(self.bits) - 1


class Files(ExitStack):
    """Keeps the files of blocks while a test runs."""

    def block(self, code, bits, first_element=0):
        runs = [[self.run(now.tobytes(), 5 * step + 1)] for step, now in enumerate(bits[1:])]
        return Block(code, bits, runs, first_element)

    def run(self, data, offset):
        """Put data into a file of its own, with something before and behind it."""
        descriptor = os.memfd_create("run")
        self.callback(os.close, descriptor)
        os.pwrite(descriptor, b"\xc3" * offset + data + b"\xc3" * 9, 0)
        return descriptor, offset, len(data)


@pytest.fixture
def files():
    with Files() as stack:
        yield stack


def random_bits(rng, size, code):
    itemsize = FORMATS[code].itemsize
    return np.frombuffer(rng.bytes(size * itemsize), f"u{itemsize}").copy()


def weights(rng, size, code):
    """Return finite numbers of usual sizes."""
    values = (rng.standard_normal(size) * 0.02).astype(np.float32)
    if code == "F16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return wide if code == "F32" else (wide >> np.uint32(16)).astype(np.uint16)


def moved(rng, bits, share):
    """Return bits of which some went a few representable numbers up or down."""
    by = rng.geometric(0.3, bits.size) * (rng.random(bits.size) < share)
    return bits + by.astype(bits.dtype) * rng.choice([1, -1], bits.size).astype(bits.dtype)


def trajectory(rng, size, code, shares):
    bits = [weights(rng, size, code)]
    for share in shares:
        bits.append(moved(rng, bits[-1], share))
    return bits


def tools(block):
    codec = FrameCodec(block.base.size, block.base.itemsize)
    return codec, scan_buffers(codec, Changes(block.base.size, block.base.itemsize))


def run(block: Block, state, buffers: ScanBuffers, tables: ScanTables, first=0, stop=None, row=0):
    """Scan the steps from `first` on; the state is that before them."""
    blocks = ScanBlocks(
        np.array([0, block.base.size]),
        block.base,
        state,
        FORMATS[block.code].tag,
        np.array([block.first_element]),
        np.array([KEY]),
    )
    return scan_steps(
        block.reads(first, stop),
        0,
        first,
        (row + first) % 16,
        blocks,
        buffers,
        ScanTables(*(table[None] for table in tables)),
    )


def tables_of(steps, width):
    """Return tables of one block, without the axis of blocks."""
    return ScanTables(*(table[0] for table in scan_tables(1, steps, width)))


def check_step(block: Block, tables: ScanTables, step, frame, row):
    """Compare a step's line of the tables, and its frame, with the oracle."""
    origin, before, after = block.bits[0], block.bits[step], block.bits[step + 1]
    at = np.flatnonzero(before != after)
    assert tables.changed[step] == at.size
    assert tables.source_crc[step] == google_crc32c.value(after.tobytes())
    then, now, start = (oracle.values(bits, block.code) for bits in (before, after, origin))
    change = now - then
    assert tables.change_sq[step] == pytest.approx((change**2).sum(), rel=1e-12)
    growth = ((now - start) ** 2 - (then - start) ** 2).sum()
    scale = ((now - start) ** 2 + (then - start) ** 2).sum()
    assert tables.delta_sq_growth[step] == pytest.approx(growth, rel=1e-9, abs=1e-12 * scale)
    bad = (before != after) & ~finite(after, block.code) & finite(origin, block.code)
    assert tables.nonfinite_at[step] == (int(np.argmax(bad)) if bad.any() else -1)
    if tables.sketch.shape[1]:
        expected = sketch_of(change, block.first_element)
        tolerance = 1e-12 * np.abs(change).sum()
        np.testing.assert_allclose(tables.sketch[step], expected, rtol=0, atol=tolerance)
    assert tables.frame_bytes[step] == len(frame)
    if not at.size:
        assert tables.frame_crc[step] == 0
        return
    changes = Changes(after.size, after.itemsize)
    assert FrameCodec(after.size, after.itemsize).decode(frame, after.size, changes) == row
    assert changes.positions[: changes.count].tolist() == at.tolist()
    assert changes.zigzags[: changes.count].tolist() == zigzags_of(before, after)[at].tolist()
    assert tables.frame_crc[step] == int.from_bytes(frame[20:24], "little")


def frames_in(buffers, tables, first, stop):
    """Cut the frames of some steps out of the buffer."""
    ends = np.cumsum(tables.frame_bytes[first:stop], dtype=np.int64)
    parts = np.split(buffers.frames[: ends[-1]], ends[:-1]) if ends.size else []
    return [part.tobytes() for part in parts]


def check_scan(block: Block, width=WIDTH, row=0):
    """Scan all steps at once and compare everything."""
    _, buffers = tools(block)
    tables = tables_of(block.steps, width)
    state = block.base.copy()
    assert run(block, state, buffers, tables, row=row) == (block.steps, DONE)
    assert np.array_equal(state, block.bits[-1])
    for step, frame in enumerate(frames_in(buffers, tables, 0, block.steps)):
        check_step(block, tables, step, frame, (row + step) % 16)
    return tables


def same(a: ScanTables, b: ScanTables):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


# --- everything fits ---------------------------------------------------------------------------

SHARES = (0.01, 0.0, 1.0, 0.001, 0.3, 0.0)


@pytest.mark.parametrize("width", [WIDTH, 0])
@pytest.mark.parametrize("code", CODES)
def test_a_block_through_several_files(files, code, width):
    rng = np.random.default_rng(0)
    bits = trajectory(rng, 20_000, code, SHARES)
    tables = check_scan(files.block(code, bits, first_element=7 << 33), width)
    assert tables.sketch.shape == (len(SHARES), width)
    assert (tables.nonfinite_at == -1).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_block_of_several_pieces(files, monkeypatch, code, more, pieces):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    rng = np.random.default_rng(1)
    size = pieces * 1024 // FORMATS[code].itemsize + more
    bits = trajectory(rng, size, code, SHARES)
    # Pieces without a change between others, and changes at their edges.
    bits.append(bits[-1].copy())
    edges = np.arange(0, size, 1024 // FORMATS[code].itemsize)
    bits[-1][edges[::2]] += bits[-1].dtype.type(1)
    bits[-1][edges[1:] - 1] += bits[-1].dtype.type(1)
    bits[-1][-1] += bits[-1].dtype.type(3)
    check_scan(files.block(code, bits))


@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_a_block_larger_than_a_piece_as_it_is(files, code):
    rng = np.random.default_rng(2)
    size = (2 * scan.PIECE_BYTES + 4096) // FORMATS[code].itemsize + 3
    check_scan(files.block(code, trajectory(rng, size, code, (0.001, 0.02, 0.0))))


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from(CODES),
    size=st.integers(1, 700),
    piece=st.sampled_from([8, 64, 200, 1024, 8192]),
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), max_size=4),
    any_bits=st.booleans(),
    row=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_block_in_pieces_of_any_size(code, size, piece, shares, any_bits, row, seed):
    rng = np.random.default_rng(seed)
    bits = trajectory(rng, size, code, shares)
    if any_bits:  # infinities and NaNs among them
        bits = [random_bits(rng, size, code)]
        for share in shares:
            now = random_bits(rng, size, code)
            bits.append(np.where(rng.random(size) < share, now, bits[-1]))
        if code == "F32":  # their squares need not stay finite
            bits = [b & np.uint32(0xBFFFFFFF) for b in bits]
    with pytest.MonkeyPatch.context() as patch, Files() as files:
        patch.setattr(scan, "PIECE_BYTES", piece)
        check_scan(files.block(code, bits), row=row)


@pytest.mark.parametrize("code", CODES)
def test_the_first_element_that_became_not_finite_is_named_whichever_piece_it_is_in(
    files, monkeypatch, code
):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    fmt = FORMATS[code]
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    rng = np.random.default_rng(3)
    piece = 1024 // fmt.itemsize
    base = weights(rng, 4 * piece, code)
    base[5] = infinity
    first = base.copy()
    first[[5, piece + 7, 3 * piece]] = infinity + 1  # not finite in the base: nothing new
    second = first.copy()
    second[[5, 9]] = 0  # back to a number, and the others stay as they are
    third = second.copy()
    third[[5, 2 * piece, 3 * piece]] = infinity
    tables = check_scan(files.block(code, [base, first, second, third]))
    assert tables.nonfinite_at.tolist() == [piece + 7, -1, 2 * piece]


def test_one_file_may_hold_every_step(files):
    rng = np.random.default_rng(4)
    bits = trajectory(rng, 500, "BF16", (0.1, 0.5, 0.1))
    with tempfile.TemporaryFile(buffering=0) as file:
        offsets = [3000, 11, 1501]
        for offset, now in zip(offsets, bits[1:], strict=True):
            os.pwrite(file.fileno(), now.tobytes(), offset)
        runs = [[(file.fileno(), offset, bits[0].nbytes)] for offset in offsets]
        check_scan(Block("BF16", bits, runs))


def test_rows_of_a_chunk_begin_anew_after_sixteen(files):
    rng = np.random.default_rng(5)
    block = files.block("BF16", trajectory(rng, 200, "BF16", [0.1] * 20))
    _, buffers = tools(block)
    tables = tables_of(20, WIDTH)
    run(block, block.base.copy(), buffers, tables, row=13)
    rows = [frame[0] for frame in frames_in(buffers, tables, 0, 20)]
    assert rows == [13, 14, 15, *range(16), 0]


def test_calls_take_up_where_the_one_before_ended(files):
    rng = np.random.default_rng(6)
    block = files.block("F16", trajectory(rng, 3000, "F16", (0.02, 0.0, 0.5, 0.02, 0.9)))
    whole = check_scan(block)
    _, buffers = tools(block)
    for cuts in ((0, 1, 2, 3, 4, 5), (0, 2, 2, 5), (0, 4, 5)):
        tables = tables_of(5, WIDTH)
        state = block.base.copy()
        for first, stop in pairwise(cuts):
            untouched = [table[stop:].copy() for table in tables]
            assert run(block, state, buffers, tables, first, stop) == (stop - first, DONE)
            assert np.array_equal(state, block.bits[stop])
            for frame, step in zip(
                frames_in(buffers, tables, first, stop), range(first, stop), strict=True
            ):
                check_step(block, tables, step, frame, step)
            for table, expected in zip(tables, untouched, strict=True):
                assert np.array_equal(table[stop:], expected)
        assert same(tables, whole)


def test_no_step_at_all(files):
    block = files.block("BF16", [np.zeros(10, np.uint16)])
    _, buffers = tools(block)
    assert run(block, block.base.copy(), buffers, tables_of(0, WIDTH)) == (0, DONE)


def test_buffers_of_larger_blocks_serve_smaller_ones(files):
    rng = np.random.default_rng(7)
    codec, changes = FrameCodec(5000, 2), Changes(9000, 2)
    buffers = scan_buffers(codec, changes)
    for size in (5000, 1, 64, 4999):
        block = files.block("BF16", trajectory(rng, size, "BF16", (1.0, 0.3, 0.02)))
        tables = tables_of(3, WIDTH)
        state = block.base.copy()
        assert run(block, state, buffers, tables) == (3, DONE)
        for step, frame in enumerate(frames_in(buffers, tables, 0, 3)):
            check_step(block, tables, step, frame, step)


def test_threads_scan_beside_each_other(files):
    rng = np.random.default_rng(8)
    blocks = [
        files.block("BF16", trajectory(rng, 50_000, "BF16", (0.1, 1.0, 0.01, 0.4)))
        for _ in range(3)
    ]
    wrong = []

    def work(block):
        _, buffers = tools(block)
        for _ in range(5):
            tables = tables_of(4, WIDTH)
            state = block.base.copy()
            run(block, state, buffers, tables)
            if not (np.array_equal(state, block.bits[-1]) and same(tables, expected[id(block)])):
                wrong.append(block)

    expected = {id(block): check_scan(block) for block in blocks}
    threads = [threading.Thread(target=work, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- the buffer of frames is full --------------------------------------------------------------


@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_steps_go_on_after_the_frames_are_taken_away(files, code):
    rng = np.random.default_rng(9)
    fmt = FORMATS[code]
    size = FRAMES_BYTES // 2 // fmt.itemsize
    # Random bits of numbers below 2 hardly compress: a frame takes nearly half of the room.
    below_two = fmt.bits_dtype.type((1 << (8 * fmt.itemsize - 2)) - 1)
    bits = [random_bits(rng, size, code) & below_two for _ in range(6)]
    bits.insert(3, bits[2])
    block = files.block(code, bits)
    _, buffers = tools(block)
    tables = tables_of(block.steps, WIDTH)
    state = block.base.copy()
    calls = []
    step = 0
    while step < block.steps:
        taken, reason = run(block, state, buffers, tables, step)
        calls.append((taken, reason))
        assert taken > 0
        for number, frame in enumerate(frames_in(buffers, tables, step, step + taken)):
            check_step(block, tables, step + number, frame, step + number)
        step += taken
        assert np.array_equal(state, block.bits[step])
    assert len(calls) > 1
    assert [reason for _, reason in calls] == [FULL] * (len(calls) - 1) + [DONE]


# --- blocks in runs ------------------------------------------------------------------------------


def cut(rng, data, pieces):
    marks = [0, *sorted(rng.integers(0, len(data) + 1, pieces - 1).tolist()), len(data)]
    return [data[low:high] for low, high in pairwise(marks)]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("pieces", [2, 7, 60])
def test_runs_of_several_files_are_one_block(files, monkeypatch, code, pieces):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    rng = np.random.default_rng(20)
    block = files.block(code, trajectory(rng, 3000, code, (0.1, 0.5, 0.0, 0.02)))
    whole = check_scan(block)
    # Cuts fall anywhere, in mid-element too, and some runs are empty.
    split = [
        [files.run(part, int(rng.integers(9))) for part in cut(rng, now.tobytes(), pieces)]
        for now in block.bits[1:]
    ]
    assert same(check_scan(Block(code, block.bits, split)), whole)


def test_bytes_at_hand_stand_beside_files(files, monkeypatch):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    rng = np.random.default_rng(21)
    block = files.block("BF16", trajectory(rng, 3000, "BF16", (0.1, 0.5)))
    whole = check_scan(block)
    first, second = (now.tobytes() for now in block.bits[1:])
    fetched = b"\xc3" * 7 + second[1500:] + first[100:4000]
    split = [
        [files.run(first[:100], 3), (FETCHED, 7 + 4500, 3900), files.run(first[4000:], 0)],
        [files.run(second[:1500], 1), (FETCHED, 7, 4500)],
    ]
    assert same(check_scan(Block("BF16", block.bits, split, fetched=fetched)), whole)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_run_that_cannot_be_read_leaves_the_step_before(files, missing):
    rng = np.random.default_rng(22)
    block = files.block("F32", trajectory(rng, 900, "F32", (0.2, 0.4)))
    parts = [files.run(part, 2) for part in cut(rng, block.bits[2].tobytes(), 3)]
    parts[missing] = (1 << 20, 0, parts[missing][2])
    block.runs[1] = parts
    _, buffers = tools(block)
    state = block.base.copy()
    assert run(block, state, buffers, tables_of(2, WIDTH)) == (1, UNREADABLE)
    assert np.array_equal(state, block.bits[1])


# --- casts ---------------------------------------------------------------------------------------


def test_f32_is_rounded_on_the_way_in(files, monkeypatch):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    rng = np.random.default_rng(23)
    base = weights(rng, 3000, "BF16")
    masters = [base.astype(np.uint32) << np.uint32(16)]
    for share in (0.3, 0.9, 0.0):
        masters.append(moved(rng, masters[-1], share) + rng.integers(0, 2, 3000, np.uint32) * 9999)
    rounded = [
        (torch.from_numpy(wide.view(np.float32)).bfloat16().view(torch.int16).numpy())
        .view(np.uint16)
        .copy()
        for wide in masters
    ]
    wide = [[files.run(part, 5) for part in cut(rng, now.tobytes(), 5)] for now in masters[1:]]
    check_scan(Block("BF16", rounded, wide, is_cast=True))


# --- a file that cannot be read ----------------------------------------------------------------


def line(tables, step):
    return [table[step].copy() for table in tables]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("lost", [1, 1000, 1024, 1025, 3000, 4096, 10**6])
def test_a_file_that_ends_too_early_leaves_the_step_before(files, monkeypatch, code, lost):
    monkeypatch.setattr(scan, "PIECE_BYTES", 1024)
    fmt = FORMATS[code]
    rng = np.random.default_rng(10)
    bits = trajectory(rng, 4096 // fmt.itemsize, code, (0.1, 0.6, 0.8, 0.2))
    infinity = (2 * fmt.bias + 1) << fmt.mantissa
    bits[3][0] = infinity  # found before the end is
    block = files.block(code, bits)
    whole = check_scan(block)
    _, buffers = tools(block)
    tables = tables_of(block.steps, WIDTH)
    nothing = line(tables, 2)
    state = block.base.copy()
    descriptor, offset, _ = block.runs[2][0]
    end = offset + 4096
    os.ftruncate(descriptor, max(0, end - lost))
    for _ in range(2):  # again and again, if it stays so
        first = 0 if not tables.changed[0] else 2
        assert run(block, state, buffers, tables, first) == (2 - first, UNREADABLE)
        assert np.array_equal(state, block.bits[2])
        for step in (2, 3):
            for found, expected in zip(line(tables, step), nothing, strict=True):
                assert np.array_equal(found, expected)
        if first == 0:
            for step, frame in enumerate(frames_in(buffers, tables, 0, 2)):
                check_step(block, tables, step, frame, step)
    # Copied again: the rest goes on as if nothing had been.
    os.pwrite(descriptor, b"\xc3" * offset + bits[3].tobytes(), 0)
    assert run(block, state, buffers, tables, 2) == (2, DONE)
    assert np.array_equal(state, block.bits[4])
    assert same(tables, whole)


@pytest.mark.parametrize("broken", [0, 2])
def test_a_descriptor_that_cannot_be_read_is_told_from_the_rest(files, broken):
    rng = np.random.default_rng(11)
    block = files.block("BF16", trajectory(rng, 500, "BF16", (0.1, 0.6, 0.8)))
    block.runs[broken] = [(1 << 20, 0, 1000)]
    _, buffers = tools(block)
    tables = tables_of(3, WIDTH)
    state = block.base.copy()
    assert run(block, state, buffers, tables) == (broken, UNREADABLE)
    assert np.array_equal(state, block.bits[broken])
    assert not tables.changed[broken:].any()
    assert not tables.sketch[broken:].any()
