"""Small tensors worked on together give, bit for bit, what each gives by itself."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import relex_stream as rs
from relex_stream import blocks, build, ingest, models, planner, scan
from relex_stream.base_weights import open_base
from relex_stream.block_reader import BlockReader
from relex_stream.block_sweep import sweep_outputs
from relex_stream.blocks import BlockOf, Strip, Workspace, float_formats, work_on_strips
from relex_stream.models import RunOptions, make_models
from relex_stream.request import check_extrapolation
from relex_stream.sketch import add_gram, add_weighted_rows
from relex_stream.sources import CheckpointReader
from relex_stream.specs import DTYPES
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from tests.crash.replay import read_tree, unsynced
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model
from tests.make_stores import build_store

BLOCK_BYTES = 1600
SHAPES = {
    "a.weight": (11, 13),
    "b.weight": (40, 31),  # more than one block of 16-bit weights
    "c.norm.weight": (16,),
    "d.bias": (7,),
    "e.weight": (20, 17),
    "f.weight": (300,),
    "g.weight": (5, 60),
    "h.weight": (30,),
    "i.weight": (1,),
    "j.weight": (9, 9),
}
STEPS = tuple(range(1, 21))  # rows of two chunks
KINDS = [("BF16", None), ("F16", None), ("F32", "BF16")]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def run(request, tmp_path_factory) -> Trajectory:
    dtype, base_dtype = request.param
    return make_trajectory(
        tmp_path_factory.mktemp("strips"),
        steps=STEPS,
        dtype=dtype,
        base_dtype=base_dtype,
        tensors=SHAPES,
        constants={"table": ("I32", (3,), bytes(range(12)))},
        change_share=0.2,
        base_shards=2,
        checkpoint_shards=1,
    )


def build_strips(run: Trajectory, store: Path, **options) -> Path:
    settings = {"workers": 1, "include_base": True, "block_bytes": BLOCK_BYTES}
    settings["sketch_min_elements"] = 250
    with unsynced():
        build_store(run.base, run.checkpoints, store, **settings | options)
    return store


@pytest.fixture
def strips(monkeypatch) -> list[blocks.Blocks]:
    """What was worked on, strips and single blocks."""
    seen: list[blocks.Blocks] = []
    cut = blocks._strips

    def spy(*arguments):
        for at in cut(*arguments):
            seen.append(at)
            yield at

    monkeypatch.setattr(blocks, "_strips", spy)
    return seen


@pytest.fixture
def one_by_one(monkeypatch):
    """A function after which nothing is joined any more."""

    def separate():
        monkeypatch.setattr(blocks, "_strips", lambda each, kind_of: each)

    return separate


def widths(strips):
    return [len(at.blocks) for at in strips]


# --- how they are cut --------------------------------------------------------------------------


def small_tensors(sizes, block_elements=100):
    tensors = []
    for index, size in enumerate(sizes):
        tensors.append(
            StoredTensor(
                name=f"t{index}",
                kind="tracked",
                base_dtype=DTYPES["BF16"],
                dtype=DTYPES["BF16"],
                shape=(size,),
                tied_to=None,
                index=index,
                first_block=0,
                blocks=-(-size // block_elements),
                block_elements=block_elements,
                sketch_row=-1,
            )
        )
    return tensors


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 250), st.sampled_from("xy-")), max_size=12), st.data())
def test_every_block_is_worked_on_in_order_and_its_result_goes_to_its_task(drawn, data):
    tensors = small_tensors([size for size, _ in drawn])
    kinds = [None if kind == "-" else kind for _, kind in drawn]
    tasks = []
    for tensor in tensors:
        members = iter([BlockOf(tensor, block) for block in range(tensor.blocks)])
        while task := tuple(islice(members, data.draw(st.integers(1, 3)))):
            tasks.append(task)
    seen = []

    def work(at):
        seen.append(at)
        return [(block.tensor.index, block.block) for block in at.blocks]

    results = work_on_strips(tasks, lambda at: kinds[at.tensor.index], work)
    assert results == [[(at.tensor.index, at.block) for at in task] for task in tasks]
    for at in seen:
        assert isinstance(at, Strip) == (len(at.blocks) > 1)
        if isinstance(at, Strip):
            assert at.elements <= 100
            assert {block.tensor.blocks for block in at.blocks} == {1}
            (kind,) = {kinds[block.tensor.index] for block in at.blocks}
            assert kind is not None
    # No two that could have been one.
    for left, right in pairwise(seen):
        ends = [*left.blocks, *right.blocks]
        same = len({kinds[block.tensor.index] for block in ends}) == 1
        joinable = same and all(
            block.tensor.blocks == 1 and kinds[block.tensor.index] is not None for block in ends
        )
        assert not joinable or left.elements + right.blocks[0].elements > 100


def test_formats_tell_what_may_be_joined():
    tracked, other = small_tensors([5, 5])
    assert float_formats(BlockOf(tracked, 0)) == ("BF16", "BF16")
    constant = StoredTensor(**{**other.__dict__, "kind": "constant"})
    assert float_formats(BlockOf(constant, 0)) is None


# --- reading -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(run) -> Path:
    return build_strips(run, run.base.parent / "store")


def reader_of(store: Path, capacity: int) -> BlockReader:
    opened = Store(store)
    return BlockReader(opened, open_base(opened, None, CheckpointReader()), Workspace(), capacity)


def strip_of(reader: BlockReader) -> Strip:
    tensors = reader.store.manifest.tensors
    every = [BlockOf(tensor, block) for tensor in tensors for block in range(tensor.blocks)]
    widest = max(blocks._strips(every, float_formats), key=lambda at: len(at.blocks))
    assert isinstance(widest, Strip)
    return widest


@pytest.fixture(params=[None, (1, 1 << 20), (1 << 16, 300)], ids=str)
def at_hand(request, monkeypatch):
    """Changes and bytes of frames at hand at a time; None for those the program has."""
    if request.param is not None:
        monkeypatch.setattr(blocks, "_RUN_CHANGES", request.param[0])
        monkeypatch.setattr(planner, "FRAMES_AT_HAND_BYTES", request.param[1])


@dataclass
class Sides:
    """A strip, and its blocks read each by itself."""

    joined: BlockReader
    single: BlockReader
    strip: Strip
    base: np.ndarray
    parts: list[np.ndarray]

    def parted(self):
        """Yield each block with its number, its range in the strip and its base."""
        for number, at in enumerate(self.strip.blocks):
            low, high = self.strip.bounds[number : number + 2]
            yield number, at, slice(low, high), self.parts[number]


@pytest.fixture(params=[1 << 20, 0], ids=["at hand", "swept"])
def sides(request, store) -> Sides:
    joined, single = reader_of(store, request.param), reader_of(store, request.param)
    strip = strip_of(joined)
    assert len(strip.blocks) >= 3
    base = joined.base_bits(strip).copy()
    parts = [single.base_bits(at).copy() for at in strip.blocks]
    assert np.array_equal(base, np.concatenate(parts))
    return Sides(joined, single, strip, base, parts)


ROWS = (20, 17, 3, 1)


@pytest.mark.usefixtures("at_hand")
def test_bits_of_a_strip_are_those_of_its_blocks(sides):
    for rows in (*ROWS, 0):
        expected = [
            sides.single.bits_at(at, part, rows).copy() for _, at, _, part in sides.parted()
        ]
        found = sides.joined.bits_at(sides.strip, sides.base, rows)
        assert np.array_equal(found, np.concatenate(expected))


@pytest.mark.usefixtures("at_hand")
def test_changes_of_a_strip_are_those_of_its_blocks(sides):
    rng = np.random.default_rng(0)
    strip = sides.strip
    for rows in ROWS:
        changes = sides.joined.change_rows(strip, sides.base, rows)
        assert changes.entries == sum(sides.single.entries(at, rows) for at in strip.blocks)
        weights = rng.standard_normal((len(strip.blocks), rows, 3))
        weighted, tiled = np.zeros((strip.elements, 3)), np.zeros((strip.elements, 3))
        for batch in changes.batches():
            add_weighted_rows(batch, 0, weights.reshape(-1, 3), weighted)
        following = 0
        for tile in changes.tiles(100):
            assert tile.first == following
            following += tile.columns
            # Never over the end of a block, and rows are the block's.
            assert strip.bounds[tile.block] <= tile.first
            assert following <= strip.bounds[tile.block + 1]
            for batch in tile.batches():
                part = tiled[tile.first : following]
                add_weighted_rows(batch, tile.first, weights[tile.block], part)
        assert following == strip.elements
        np.testing.assert_array_equal(tiled, weighted)
        for number, at, here, part in sides.parted():
            alone = np.zeros((at.elements, 3))
            for batch in sides.single.change_rows(at, part, rows).batches():
                add_weighted_rows(batch, 0, weights[number], alone)
            np.testing.assert_array_equal(weighted[here], alone)


@pytest.mark.parametrize("sides", [1 << 20], indirect=True)
def test_gram_matrices_and_outputs_of_a_strip_are_those_of_its_blocks(sides):
    def grams_of(changes, blocks):
        grams = np.zeros((blocks, rows, rows))
        for tile in changes.tiles(100):
            for batch in tile.batches():
                add_gram(batch, tile.first, tile.columns, grams[tile.block])
        return grams

    def outputs_of(changes, base, weights):
        out, room = np.zeros((3, base.size), base.dtype), np.zeros((77, 3))
        sweep_outputs(changes.at_hand(), weights, base, strip.base_format.tag, room, out)
        return out

    rng = np.random.default_rng(0)
    strip = sides.strip
    for rows in ROWS:
        weights = rng.standard_normal((len(strip.blocks), rows, 3))
        changes = sides.joined.change_rows(strip, sides.base, rows)
        grams = grams_of(changes, len(strip.blocks))
        out = outputs_of(changes, sides.base, weights.reshape(-1, 3))
        for number, at, here, part in sides.parted():
            alone = sides.single.change_rows(at, part, rows)
            np.testing.assert_array_equal(grams[number], grams_of(alone, 1)[0])
            assert np.array_equal(out[:, here], outputs_of(alone, part, weights[number]))


def test_a_verification_counts_the_same_and_names_all_that_is_damaged(
    run, store, strips, one_by_one
):
    def verify(base=None):
        summary = rs.verify(store, base=base, workers=1)
        return summary.frames, summary.bytes_read, summary.problems

    together = verify(run.base)
    assert together[2] == ()
    changed = Store(store).changed
    strip = max(strips, key=lambda at: len(at.blocks))
    blocks_there = [block for block in strip.blocks if changed[:, block.column].any()]
    assert len(blocks_there) > 1
    whole, named = {}, []
    for block in blocks_there[::2]:
        row = int(np.flatnonzero(changed[:, block.column])[0])
        path = store / "deltas" / block.tensor.name / f"c.{row // 16}.0"
        whole[path] = path.read_bytes()
        path.write_bytes(bytes([whole[path][0] ^ 1]) + whole[path][1:])
        named.append(f"step {STEPS[row]}, tensor {block.tensor.name}, block 0:")
    try:
        damaged = verify(run.base)
        one_by_one()
        assert verify(run.base) == damaged
    finally:
        for path, content in whole.items():
            path.write_bytes(content)
    assert damaged[0] == together[0] - len(named)
    assert all(name in problem for name, problem in zip(named, damaged[2], strict=True))


def test_a_verification_does_not_pass_over_damage_that_is_gone_a_moment_later(store, monkeypatch):
    faithful = Store.read_run

    def unfaithful(self, *arguments):
        faithful(self, *arguments)
        arguments[-1][-1] ^= 1

    monkeypatch.setattr(Store, "read_run", unfaithful)
    problems = rs.verify(store, workers=1).problems
    assert problems
    assert all("damaged when it was first read" in problem for problem in problems)


def test_damage_in_a_strip_is_named(store):
    reader = reader_of(store, 1 << 20)
    strip = strip_of(reader)
    base = reader.base_bits(strip)
    name = strip.blocks[-1].tensor.name
    path = store / "deltas" / name / "c.1.0"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(rs.CorruptionError, match=rf"step 20, tensor {re.escape(name)}, block"):
            reader.bits_at(strip, base, 20)
        reader.bits_at(strip, base, 19)
        path.unlink()
        with pytest.raises(rs.CorruptionError, match=rf"tensor {re.escape(name)}, .* missing"):
            reader.bits_at(strip, base, 20)
    finally:
        path.write_bytes(whole)


def test_a_base_that_changed_is_named(run, store, tmp_path):
    content = {name: raw(bits, run.base_dtype) for name, bits in run.bits[0].items()}
    content["table"] = ("I32", (3,), bytes(range(12)))
    changed = run.bits[0]["h.weight"].copy()
    changed.reshape(-1)[3] ^= 1
    content["h.weight"] = raw(changed, run.base_dtype)
    write_model(tmp_path / "base", content, 1)
    with pytest.raises(rs.SourceError, match=r"tensor h\.weight in .* is not what the store was"):
        rs.extrapolate(store, tmp_path / "out", target_steps=[30], base=tmp_path / "base")


# --- whole commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[20], [3, 14, 3]], ids=str)
def test_a_store_is_the_same(run, tmp_path, strips, one_by_one, split):
    def build_in_parts(store):
        first = 1
        for size in split:
            build_strips(run, store, steps=f"{first}:{first + size - 1}")
            first += size
        return read_tree(store)

    together = build_in_parts(tmp_path / "together")
    assert max(widths(strips)) >= 2
    one_by_one()
    apart = build_in_parts(tmp_path / "apart")
    assert together == apart


@pytest.mark.parametrize("frames_bytes", [0, 500])
def test_frames_that_fill_the_buffer_are_written_and_work_goes_on(
    run, store, monkeypatch, frames_bytes
):
    monkeypatch.setattr(scan, "FRAMES_BYTES", frames_bytes)
    monkeypatch.setattr(ingest, "scan_steps", scan.scan_steps.py_func)
    other = store.with_name(f"frames of {frames_bytes}")
    assert read_tree(build_strips(run, other)) == read_tree(store)


def test_few_descriptors_are_enough(run, store, monkeypatch):
    monkeypatch.setattr(build, "CheckpointReader", lambda: CheckpointReader(3))
    assert read_tree(build_strips(run, store.with_name("few"))) == read_tree(store)


@pytest.mark.parametrize(("shards", "joined"), [(2, True), (3, False)])
def test_what_is_joined_lies_in_one_file_at_every_step(
    tmp_path, strips, one_by_one, shards, joined
):
    # From step 3 on: into two files, each holds what the other held; into three, all are mixed.
    run = make_trajectory(tmp_path, tensors=SHAPES, change_share=0.2, checkpoint_shards=2)
    for step in (3, 4, 5):
        content = {name: raw(bits, "BF16") for name, bits in run.bits[step].items()}
        for path in run.directories[step].iterdir():
            path.unlink()
        write_model(run.directories[step], dict(reversed(content.items())), shards)
    options = {"sketch_min_elements": 1 << 20}
    together = read_tree(build_strips(run, tmp_path / "together", **options))
    assert (max(widths(strips)) >= 2) == joined
    for strip in strips:
        for step in run.steps:
            reader = rs.open_store(tmp_path / "together")
            for block in strip.blocks:
                found = reader.checkpoint_bits(block.tensor.name, step)
                assert np.array_equal(found, run.bits[step][block.tensor.name])
    one_by_one()
    assert read_tree(build_strips(run, tmp_path / "apart", **options)) == together


@pytest.mark.parametrize("outputs", [[30], [25, 400]], ids=str)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_an_extrapolation_is_the_same(store, tmp_path, strips, one_by_one, svd, outputs):
    def extrapolate(out):
        rs.extrapolate(store, out, target_steps=outputs, rank=2, svd=svd, workers=2)
        return read_tree(out)

    together = extrapolate(tmp_path / "together")
    assert max(widths(strips)) >= 2
    one_by_one()
    assert extrapolate(tmp_path / "apart") == together


def test_a_strip_whose_changes_are_too_many_is_not_swept_for_each_of_its_blocks(
    store, tmp_path, monkeypatch
):
    opened = Store(store)
    kept = [t for t in opened.manifest.tensors if t.kind == "tracked" and t.blocks == 1]
    counts = opened.changed.sum(axis=0)
    most = max(int(counts[tensor.first_block]) for tensor in kept)
    runs, calls = BlockReader.runs, []

    def count(self, at, stop):
        calls.append(at)
        return runs(self, at, stop)

    def extrapolate(out, capacity):
        calls.clear()

        def ask(opened):
            return [check_extrapolation(opened, target_steps=[30], rank=2, svd="exact")]

        make_models(store, out, ask, RunOptions(workers=1, entry_capacity=capacity))
        return read_tree(out), [len(at.blocks) for at in calls]

    monkeypatch.setattr(BlockReader, "runs", count)
    # What the history makes of its own end is read besides.
    monkeypatch.setattr(models, "with_dampings", lambda _, jobs, **__: jobs)
    whole, widths = extrapolate(tmp_path / "whole", 1 << 20)
    assert max(widths) > 1
    # Every small tensor fits by itself, its strip does not: it is decoded once for statistics, and
    # once for the output.
    cut, widths = extrapolate(tmp_path / "cut", most)
    assert cut == whole
    changed = int((opened.changed.sum(axis=0) > 0).sum())
    tracked = sum(t.blocks for t in opened.manifest.tensors if t.kind == "tracked")
    assert sum(widths) <= changed + tracked


def test_an_export_is_the_same(run, store, tmp_path, strips):
    for step in (0, 7, 20):
        rs.export(store, tmp_path / f"step {step}", step=step)
        for path in run.directories[step].iterdir():
            assert (tmp_path / f"step {step}" / path.name).read_bytes() == path.read_bytes()
    assert max(widths(strips)) >= 2


def test_the_tensor_that_overflows_is_named(tmp_path):
    largest = np.uint16(0x7BFF)  # of F16
    bits = {
        name: np.full(20, 0x3C00 + index, np.uint16) for index, name in enumerate(("a", "b", "c"))
    }
    write_model(tmp_path / "base", {name: raw(b, "F16") for name, b in bits.items()}, 1)
    for step in range(1, 4):
        bits = {name: b + np.uint16(1) for name, b in bits.items()}
        bits["b"][4] = largest - np.uint16(3 - step)
        directory = tmp_path / "checkpoints" / f"step_{step}"
        write_model(directory, {name: raw(b, "F16") for name, b in bits.items()}, 1)
    rs.build_store(tmp_path / "base", tmp_path / "checkpoints", tmp_path / "store")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rs.extrapolate(tmp_path / "store", tmp_path / "out", target_steps=[1000])
    (message,) = [str(w.message) for w in caught if "overflow" in str(w.message)]
    assert message.startswith("1 extrapolated values overflow")
    assert "first in tensor b" in message


def test_what_is_not_finite_is_named(tmp_path):
    run = make_trajectory(tmp_path, tensors=SHAPES, change_share=0.2)
    content = {name: raw(bits, "BF16") for name, bits in run.bits[4].items()}
    changed = run.bits[4]["h.weight"].copy()
    changed[9] = 0x7F80
    content["h.weight"] = raw(changed, "BF16")
    write_model(run.directories[4], content, 2)
    with pytest.raises(rs.TrajectoryError, match=r"step 4: tensor h\.weight .* at element 9,"):
        build_strips(run, tmp_path / "store")


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path, monkeypatch):
    run = make_trajectory(tmp_path, tensors=SHAPES, change_share=0.2, checkpoint_shards=1)
    (path,) = run.directories[3].glob("*.safetensors")
    scan_steps = ingest.scan_steps

    def cut_first(*arguments):
        os.truncate(path, path.stat().st_size - 700)
        return scan_steps(*arguments)

    monkeypatch.setattr(ingest, "scan_steps", cut_first)
    with pytest.raises(rs.SourceError, match=f"{path.name}: truncated while reading"):
        build_strips(run, tmp_path / "store")
    assert not (tmp_path / "store" / "HEAD").exists()


def test_a_read_that_fails_once_is_taken_up_again(run, store, monkeypatch):
    scan_steps, calls = ingest.scan_steps, []

    def fail_first(reads, done, *rest):
        calls.append(done)
        if len(calls) % 2:
            # Behind the end of the file: the kernel gives up there, in mid-strip.
            broken = reads.offset.copy()
            broken[2 - len(STEPS)] = 1 << 40
            return scan_steps(reads._replace(offset=broken), done, *rest)
        return scan_steps(reads, done, *rest)

    monkeypatch.setattr(ingest, "scan_steps", fail_first)
    assert read_tree(build_strips(run, store.with_name("again"))) == read_tree(store)
    assert any(done > len(STEPS) for done in calls)
