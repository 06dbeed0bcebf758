"""Where blocks of checkpoints are read from, against the files themselves."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.blocks import BlockOf, Strip, Workspace
from relex_stream.matching import CheckpointPlaces
from relex_stream.pieces import PieceTable, Span
from relex_stream.scan import FETCHED
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.store.records import place_tensors

ELEMENTS = 12

UNUSED = np.zeros(0, np.uint16)
"""Bits of the step before, of which nothing is wanted where all tensors are whole."""


def tensors_of(count, block_bytes=64):
    """Return BF16 tensors of 12 elements."""
    described = {"kind": "tracked", "base_dtype": "BF16", "dtype": "BF16", "shape": [ELEMENTS]}
    described |= {"tied_to": None, "sketch_row": -1}
    return place_tensors([described | {"name": f"t{i}"} for i in range(count)], block_bytes)[0]


def checkpoint(files, pieces, casts, copies=None, table=None):
    return CheckpointPlaces(
        step=1,
        name="",
        directory="",
        files=tuple(map(str, files)),
        table=PieceTable.of(pieces) if table is None else table,
        is_cast=np.array(casts),
        copies=None if copies is None else PieceTable.of(copies),
        nbytes=0,
        skipped_files=(),
    )


WHOLE = Span(0, 1, ELEMENTS, ELEMENTS)
HALVES = Span(0, 1, 5, 5), Span(5, 1, 7, 7)
ROWS = Span(0, 3, 2, 4), Span(2, 3, 2, 4)


@pytest.fixture
def three(tmp_path):
    """Two tensors at three checkpoints: in a file, in the same as F32, in two files."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0x3F00, 0x3F80, (3, 2, ELEMENTS)).astype(np.uint16)
    wide = bits[1].astype(np.uint32) << np.uint32(16)
    (tmp_path / "a").write_bytes(b"abc" + bits[0].tobytes())
    (tmp_path / "b").write_bytes(b"b" + wide[1].tobytes() + b"xy" + wide[0].tobytes())
    first = [bits[2, 0, :5], bits[2, 1].reshape(3, 4)[:, :2]]
    second = [bits[2, 1].reshape(3, 4)[:, 2:], bits[2, 0, 5:]]
    (tmp_path / "c").write_bytes(b"".join(part.tobytes() for part in first))
    (tmp_path / "d").write_bytes(b"d" + b"".join(part.tobytes() for part in second))
    whole = checkpoint(
        [tmp_path / "a"], [[(0, 3, WHOLE)], [(0, 3 + 2 * ELEMENTS, WHOLE)]], [False, False]
    )
    cast = checkpoint(
        [tmp_path / "b"], [[(0, 3 + 4 * ELEMENTS, WHOLE)], [(0, 1, WHOLE)]], [True, True]
    )
    split = checkpoint(
        [tmp_path / "c", tmp_path / "d"],
        [[(0, 0, HALVES[0]), (1, 13, HALVES[1])], [(0, 10, ROWS[0]), (1, 1, ROWS[1])]],
        [False, False],
    )
    return bits, [whole, cast, split]


def followed(reads, pair):
    """Return the bytes that the runs of a pair are made of."""
    data = b""
    for run in range(reads.bounds[pair], reads.bounds[pair + 1]):
        at, size = int(reads.offset[run]), int(reads.nbytes[run])
        if reads.file[run] == FETCHED:
            data += reads.fetched[at : at + size].tobytes()
        else:
            data += os.pread(reads.descriptors[reads.file[run]], size, at)
    return data


@pytest.mark.parametrize(("low", "high"), [(0, 3), (0, 2), (1, 3), (0, 1), (2, 3)])
@pytest.mark.parametrize("max_open", [1, 2, 4, 64])
def test_runs_that_are_lent_are_the_blocks(three, low, high, max_open):
    bits, checkpoints = three
    tensors = tensors_of(2)
    strip = Strip((BlockOf(tensors[1], 0), BlockOf(tensors[0], 0)))
    second = tensors_of(2, block_bytes=16)  # blocks of 8 elements: the other of two
    files = [1, 1, 2]
    with CheckpointReader(max_open) as reader:
        source = SourceBlocks(reader, checkpoints)
        for at in (strip, BlockOf(second[0], 1), BlockOf(second[1], 1)):
            with source.lent(at, low, high, Workspace(), UNUSED) as reads:
                assert reads.is_cast.tolist() == [False, True, False][low:high]
                if at is strip:
                    assert (reads.descriptors.size > 0) == (sum(files[low:high]) <= max_open)
                for number, block in enumerate(at.blocks):
                    for index in range(low, high):
                        here = bits[index, block.tensor.index, block.start :][: block.elements]
                        if index == 1:
                            here = here.astype(np.uint32) << np.uint32(16)
                        pair = number * (high - low) + index - low
                        assert followed(reads, pair) == here.tobytes()
                assert reads.bounds.size == len(at.blocks) * (high - low) + 1


def test_one_that_lies_in_rows_is_beside_a_whole_one(tmp_path):
    bits = np.arange(2 * ELEMENTS, dtype=np.uint16).reshape(2, ELEMENTS)
    rows = bits[1].reshape(3, 4)
    parts = [bits[0], rows[:, 2:], rows[:, :2]]
    (tmp_path / "a").write_bytes(b"".join(part.tobytes() for part in parts))
    pieces = [[(0, 0, WHOLE)], [(0, 36, ROWS[0]), (0, 24, ROWS[1])]]
    with CheckpointReader() as reader:
        source = SourceBlocks(reader, [checkpoint([tmp_path / "a"], pieces, [False, False])])
        strip = Strip(tuple(BlockOf(tensor, 0) for tensor in tensors_of(2)))
        with source.lent(strip, 0, 1, Workspace(), UNUSED) as reads:
            assert [followed(reads, pair) for pair in (0, 1)] == [row.tobytes() for row in bits]


def test_blocks_are_read_whole(three):
    bits, checkpoints = three
    with CheckpointReader() as reader:
        source = SourceBlocks(reader, checkpoints)
        for tensor in tensors_of(2, block_bytes=16):
            for block in range(2):
                at = BlockOf(tensor, block)
                for index in range(3):
                    out = np.zeros(at.elements, np.uint16)
                    source.read(at, index, out, Workspace(), tensor)
                    expected = bits[index, tensor.index, at.start :][: at.elements]
                    assert out.tolist() == expected.tolist()


def test_another_tensor_of_its_shape_is_read_as_it_is_kept(three, tmp_path):
    """A head in BF16 may be beside an embedding in F32, which is cast."""
    bits, _ = three
    beside = checkpoint(
        [tmp_path / "a", tmp_path / "b"],
        [[(1, 3 + 4 * ELEMENTS, WHOLE)], [(0, 3, WHOLE)]],
        [True, False],
    )
    embedding, head = tensors_of(2)
    out = np.zeros(ELEMENTS, np.uint16)
    with CheckpointReader() as reader:
        source = SourceBlocks(reader, [beside])
        source.read(BlockOf(embedding, 0), 0, out, Workspace(), head)
        assert out.tolist() == bits[0, 0].tolist()
        source.read(BlockOf(head, 0), 0, out, Workspace(), embedding)
        assert out.tolist() == bits[1, 0].tolist()


class Asked:
    """Stands for a reader: notes what is asked for, of files that are on the disk alone."""

    max_open = 64

    def __init__(self, in_memory=()):
        self.in_memory = in_memory
        self.asked = []

    def advise(self, path, offset, nbytes):
        self.asked.append((os.path.basename(path), offset, nbytes))
        return os.path.basename(path) not in self.in_memory


@pytest.mark.parametrize(
    ("index", "asked"),
    [
        (0, [("a", 3 + 16, 8)]),
        (1, [("b", 3 + 4 * ELEMENTS + 32, 16)]),
        (2, [("d", 13 + 6, 8)]),
    ],
)
def test_the_bytes_of_a_block_are_asked_for(three, index, asked):
    reader = Asked()
    at = BlockOf(tensors_of(2, block_bytes=16)[0], 1)
    assert SourceBlocks(reader, three[1]).advise(at, index)
    assert reader.asked == asked


@pytest.mark.parametrize(
    ("in_memory", "worth"), [("", True), ("c", True), ("d", True), ("cd", False)]
)
def test_one_piece_that_is_not_in_memory_is_worth_asking_for(three, in_memory, worth):
    reader = Asked(in_memory)
    assert SourceBlocks(reader, three[1]).advise(BlockOf(tensors_of(2)[0], 0), 2) == worth
    assert len(reader.asked) == 2


def test_messages_name_a_file_that_holds_the_tensor(three):
    beside = checkpoint(["a", "b"], [[(1, 0, WHOLE)], [(0, 0, WHOLE)]], [False, False])
    source = SourceBlocks(Asked(), [three[1][0], beside])
    first, second = (BlockOf(tensor, 0) for tensor in tensors_of(2))
    assert [source.path_of(at.tensor, 1) for at in (first, second)] == ["b", "a"]


# --- copies --------------------------------------------------------------------------------------


def test_copies_of_a_block_come_with_their_places(three, tmp_path):
    bits, (whole, *_) = three
    again = checkpoint(
        [tmp_path / "a", tmp_path / "c"],
        [[(0, 3, WHOLE)], []],
        [False, False],
        copies=[[], [(1, 10, ROWS[0])]],
    )
    first, second = tensors_of(2, block_bytes=16)
    with CheckpointReader() as reader:
        source = SourceBlocks(reader, [whole, again])
        assert [source.has_copies(tensor) for tensor in (first, second)] == [False, True]
        found = [
            (start, copy.tolist())
            for start, copy in source.copies(BlockOf(second, 1), 1, Workspace())
        ]
        assert found == [(0, bits[2, 1, 8:10].tolist())]
        assert list(source.copies(BlockOf(second, 1), 0, Workspace())) == []


# --- how much at a time --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_open", "files", "steps"), [(64, 1, 64), (64, 5, 12), (500, 1, 64), (7, 3, 2), (2, 3, 1)]
)
def test_as_many_steps_as_files_may_be_open(max_open, files, steps):
    pieces = [(number, 0, Span(2 * number, 1, 2, 2)) for number in range(files)]
    paths = [f"{number}" for number in range(files)]
    one = checkpoint(paths, [[(0, 0, WHOLE)]], [False])
    source = SourceBlocks(CheckpointReader(max_open), [one, checkpoint(paths, [pieces], [False])])
    assert source.steps_at_a_time(BlockOf(tensors_of(1)[0], 0)) == steps


def test_one_step_at_a_time_of_object_storage():
    far = checkpoint(["memory://run/model.safetensors"], [[(0, 0, WHOLE)]], [False])
    assert (
        SourceBlocks(CheckpointReader(), [far, far]).steps_at_a_time(BlockOf(tensors_of(1)[0], 0))
        == 1
    )


# --- which tensors are read together -------------------------------------------------------------


@st.composite
def layouts(draw):
    """Files of each of five tensors, and whether it is cast, at some checkpoints."""
    files = st.sets(st.integers(0, 2), max_size=2).map(sorted)
    column = st.tuples(
        st.lists(files, min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5)
    )
    return draw(st.lists(column, min_size=1, max_size=4))


@given(layouts(), st.booleans())
def test_tensors_are_alike_that_lie_in_the_same_files_of_every_checkpoint(columns, is_shared):
    tables = {}
    checkpoints = []
    for files, casts in columns:
        pieces = [[(file, 0, WHOLE) for file in of_tensor] for of_tensor in files]
        table = tables.setdefault(str(files), PieceTable.of(pieces)) if is_shared else None
        checkpoints.append(checkpoint("abc", pieces, casts, table=table))
    source = SourceBlocks(Asked(), checkpoints)
    kinds = [source.kind_of(tensor) for tensor in tensors_of(5)]
    lying = [tuple((str(files[i]), casts[i]) for files, casts in columns) for i in range(5)]
    for i in range(5):
        for j in range(5):
            assert (kinds[i] == kinds[j]) == (lying[i] == lying[j])


def test_the_same_table_with_other_casts_is_another_checkpoint():
    pieces = [[(0, 0, WHOLE)], [(0, 24, WHOLE)]]
    first = checkpoint("a", pieces, [False, False])
    second = checkpoint("a", pieces, [False, True], table=first.table)
    third = checkpoint("ab", [[(0, 0, WHOLE)], [(1, 24, WHOLE)]], [False, False])
    third = replace(third, is_cast=first.is_cast)
    tensors = tensors_of(2)
    for other in (second, third):
        source = SourceBlocks(Asked(), [first, other])
        assert source.kind_of(tensors[0]) != source.kind_of(tensors[1])
