"""Packed changes taken apart: every bit of them, and nothing of what lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numcodecs import zstd

from relex_stream import patches as patches_module
from relex_stream import unpacking
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.errors import SourceError, StoreError
from relex_stream.matching import match_checkpoint
from relex_stream.sources import CheckpointReader, Naming
from relex_stream.sources.grail import open_window
from relex_stream.sources.slime import open_changes
from relex_stream.store.records import StoredTensor, place_tensors
from relex_stream.unpacking import unpack
from tests.make_checkpoints import Bits
from tests.make_deltas import (
    overwrite_of,
    publish_grail,
    publish_slime,
    sparse_file,
    xor_of,
)

ENCODINGS = ("xor", "overwrite", "v2", "v3", "v3.1")


def tensors_of(bits: dict[str, Bits], block_bytes: int) -> tuple[StoredTensor, ...]:
    described = [
        {
            "name": name,
            "kind": "tracked",
            "base_dtype": "BF16" if each.itemsize == 2 else "F32",
            "dtype": "BF16" if each.itemsize == 2 else "F32",
            "shape": list(each.shape),
            "tied_to": None,
            "sketch_row": -1,
        }
        for name, each in sorted(bits.items())
    ]
    return place_tensors(described, block_bytes)[0]


def publish(
    where: Path, encoding: str, before: dict[str, Bits], after: dict[str, Bits], **options: Any
) -> Any:
    """Publish step 1; return it opened."""
    naming = Naming(frozenset(before))
    if encoding in ("xor", "overwrite"):
        own = publish_slime(where, 1, before, after, encoding=encoding, **options)
        return open_changes(own, 1, naming)
    own = publish_grail(where, 1, 0, before, after, codec=encoding, **options)
    return open_window(own, 1, naming)


def applied(
    where: Path,
    checkpoint: Any,
    before: dict[str, Bits],
    block_bytes: int = 64,
) -> dict[str, Bits]:
    """Return what a checkpoint makes of the weights before."""
    tensors = tensors_of(before, block_bytes)
    places = match_checkpoint(checkpoint, tensors, "")
    workspace = Workspace()
    made = {name: bits.copy().reshape(-1) for name, bits in before.items()}
    with CheckpointReader() as reader, unpack(where, [places], tensors, reader) as patches:
        for tensor in tensors:
            for at in (BlockOf(tensor, block) for block in range(tensor.blocks)):
                if patches.changes(0, tensor):
                    here = made[tensor.name][at.start : at.start + at.elements]
                    patches.apply(0, at, here, workspace)
    return {name: bits.reshape(before[name].shape) for name, bits in made.items()}


def weights(dtype: Any) -> st.SearchStrategy[tuple[Bits, Bits]]:
    """Draw two tensors of a shape that are alike in most weights, by their value as a float."""
    shapes = st_numpy.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=40)

    @st.composite
    def pair(draw: Any) -> tuple[Bits, Bits]:
        shape = draw(shapes)
        rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
        share = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
        before = rng.integers(1, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        other = rng.integers(1, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        return before, np.where(rng.random(shape) < share, other, before)

    return pair()


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(
        st.sampled_from([np.uint16, np.uint32]).flatmap(weights), min_size=1, max_size=3
    ),
    entries=st.integers(1, 50),
    block_bytes=st.sampled_from([8, 64, 1 << 20]),
)
def test_any_changes_come_to_the_weights_after(
    encoding: str,
    pairs: list[tuple[Bits, Bits]],
    entries: int,
    block_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    before = {f"t{number}": pair[0] for number, pair in enumerate(pairs)}
    after = {f"t{number}": pair[1] for number, pair in enumerate(pairs)}
    where = tmp_path_factory.mktemp("feed")
    checkpoint = publish(where, encoding, before, after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacking, "ENTRIES", entries)
        patch.setattr(patches_module, "ENTRIES", entries)
        made = applied(where, checkpoint, before, block_bytes)
    for name, bits in after.items():
        assert made[name].tobytes() == bits.tobytes(), name


BEFORE = {"w": np.arange(1, 601, dtype=np.uint16).reshape(20, 30)}
AFTER = {"w": np.where(BEFORE["w"] % 7 == 0, BEFORE["w"] + np.uint16(9), BEFORE["w"])}


def counted(count: int, positions: list[int], values: bytes) -> bytes:
    return np.array([count, *positions], "<u4").tobytes() + values


@pytest.mark.parametrize(
    ("encoding", "packed", "problem"),
    [
        ("xor", zstd.compress(bytes(1198), 1), "it ends 2 bytes too early"),
        ("xor", zstd.compress(bytes(1201), 1), "it holds more than it should"),
        ("xor", zstd.compress(bytes(1 << 26), 1), "it holds more than it should"),
        ("xor", bytes(1200), "it is no zstd frame"),
        ("xor", zstd.compress(xor_of(BEFORE["w"], AFTER["w"]), 1)[:-2], "too early|cut off"),
        ("xor", zstd.compress(xor_of(BEFORE["w"], AFTER["w"]), 1) + b"x", "something follows"),
        ("overwrite", zstd.compress(counted(2, [7, 7], b"ab"), 1), "not in ascending order"),
        ("overwrite", zstd.compress(counted(2, [7, 6], b"ab"), 1), "not in ascending order"),
        ("overwrite", zstd.compress(counted(1, [1200], b"a"), 1), "position 1200 of 1200"),
        ("overwrite", zstd.compress(counted(1201, [], b""), 1), "1201 bytes are said to change"),
        ("overwrite", zstd.compress(counted(0xFFFFFFFF, [], b""), 1), "4294967295 bytes are said"),
        ("overwrite", zstd.compress(counted(2, [1, 2], b"a"), 1), "ends 1 bytes too early"),
        ("overwrite", zstd.compress(counted(1, [1, 2], b"ab"), 1), "it holds more"),
        ("overwrite", zstd.compress(b"abc", 1), "too early"),
    ],
)
def test_lies_about_a_tensor(tmp_path: Path, encoding: str, packed: bytes, problem: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.make_deltas.zstd.compress", lambda *_: packed)
        checkpoint = publish(tmp_path / "lies", encoding, BEFORE, AFTER)
    with pytest.raises(SourceError, match=rf"step 1: .*changes of tensor w: .*({problem})"):
        applied(tmp_path, checkpoint, BEFORE)


def _entry(**told: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header["tensors"][0] |= told

    return edit


def _twice(header: dict[str, Any]) -> None:
    (entry,) = header["tensors"]
    shift = entry["indices_size"] + entry["values_size"]
    again = entry | {
        "indices_offset": shift,
        "values_offset": shift + entry["indices_size"],
    }
    header["tensors"].append(again)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (_entry(name="other"), "it changes 'other', which delta_metadata.json does not name"),
        (_entry(name=3), "it changes 3,"),
        (_entry(shape=[600]), r"tensor w has shape \[600\] there"),
        (_entry(value_dtype="float16"), "values of 'float16', not of BF16"),
        (_entry(value_dtype=["x"]), "values of"),
        (_entry(num_nonzero=601), "601 weights of tensor w are said to change"),
        (_entry(num_nonzero=-1), "-1 weights"),
        (_entry(num_nonzero=True), "True weights"),
        (_entry(num_nonzero=86), "rows_size 85 where 86 belongs"),
        (_entry(rows_size=84), "rows_size 84 where"),
        (_entry(values_offset=0), "values_offset 0 where"),
        (_entry(indices_offset=1), "indices_offset 1 where 0"),
        (_entry(row_dtype="int8"), "of an unknown type"),
        (_entry(col_dtype=7), "of an unknown type"),
        (lambda header: header.update(version=3), "version 3, not 31"),
        (lambda header: header.update(tensors={}), "no list 'tensors'"),
        (lambda header: header.update(tensors=["w"]), "it changes None"),
        (lambda header: header.update(tensors=[]), "it holds more than it should"),
        (_twice, "a tensor is there twice"),
    ],
)
def test_lies_in_the_header(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], problem: str
) -> None:
    packed = zstd.compress(sparse_file(BEFORE, AFTER, "v3.1", edit), 1)
    checkpoint = publish(tmp_path, "v3.1", BEFORE, AFTER, packed=packed)
    with pytest.raises(SourceError, match=rf"step 1: .*its changes: .*{problem}"):
        applied(tmp_path, checkpoint, BEFORE)


@pytest.mark.parametrize("codec", ["v2", "v3"])
@pytest.mark.parametrize(
    ("steps_of", "problem"),
    [
        (lambda rows: np.where(np.arange(rows.size) == 9, -1, np.diff(rows, prepend=0)), "ascend"),
        (lambda rows: np.diff(rows, prepend=0) + 0 * rows - (rows == rows[0]) * 50, "ascend"),
        (lambda rows: np.diff(rows, prepend=0) + (rows == rows[-1]) * 700, "it changes"),
        (lambda rows: np.full(rows.size, (1 << 31) - 1), "it changes"),
    ],
)
def test_positions_that_are_not_there(
    tmp_path: Path, codec: str, steps_of: Callable[..., Any], problem: str
) -> None:
    packed = zstd.compress(sparse_file(BEFORE, AFTER, codec, steps_of=steps_of), 1)
    checkpoint = publish(tmp_path, codec, BEFORE, AFTER, packed=packed)
    with pytest.raises(SourceError, match=f"tensor w: .*{problem}"):
        applied(tmp_path, checkpoint, BEFORE)


@pytest.mark.parametrize(("column", "of"), [(30, 0), (-1, 0), (1 << 30, 0), (-1, 5), (30, 5)])
def test_columns_that_are_not_there(tmp_path: Path, column: int, of: int) -> None:
    """Of an entry with which a row begins: its column counts from 0, and is in that row."""
    raw = bytearray(sparse_file(BEFORE, AFTER, "v3"))
    header = int.from_bytes(raw[:4], "little")
    count = json.loads(raw[4 : 4 + header])["tensors"][0]["num_nonzero"]
    rows = np.frombuffer(raw, "<i4", count, 4 + header)
    entry = int(np.flatnonzero(np.append(1, rows[1:]))[of])
    at = 4 + header + 4 * (count + entry)
    raw[at : at + 4] = np.int32(column).tobytes()
    checkpoint = publish(tmp_path, "v3", BEFORE, AFTER, packed=zstd.compress(bytes(raw), 1))
    with pytest.raises(SourceError, match="tensor w: it changes column"):
        applied(tmp_path, checkpoint, BEFORE)


def test_rows_so_far_out_that_positions_would_come_round(tmp_path: Path) -> None:
    wide = {"w": np.ones((2, 1 << 18), np.uint16)}
    after = {"w": wide["w"] + np.uint16(1)}
    packed = zstd.compress(
        sparse_file(wide, after, "v3", steps_of=lambda rows: np.full(rows.size, (1 << 31) - 1)), 1
    )
    checkpoint = publish(tmp_path, "v3", wide, after, packed=packed)
    with pytest.raises(SourceError, match="it changes row"):
        applied(tmp_path, checkpoint, wide, 1 << 20)


def test_positions_ascend_from_one_run_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "ENTRIES", 2)
    packed = zstd.compress(counted(3, [7, 8, 8], b"abc"), 1)
    with monkeypatch.context() as patch:
        patch.setattr("tests.make_deltas.zstd.compress", lambda *_: packed)
        checkpoint = publish(tmp_path / "lies", "overwrite", BEFORE, AFTER)
    with pytest.raises(SourceError, match="not in ascending order"):
        applied(tmp_path, checkpoint, BEFORE)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "too early"),
        (b"\xff\xff\xff\xff{}", "said to have 4294967295 bytes"),
        (b"\x40\x00\x00\x00{}", "too early"),
        (b"\x02\x00\x00\x00[]", "not a JSON object"),
        (sparse_file(BEFORE, AFTER)[:-1], "ends 1 bytes too early"),
        (sparse_file(BEFORE, AFTER) + bytes(1 << 26), "holds more"),
    ],
)
def test_files_that_are_cut_off_or_never_end(tmp_path: Path, raw: bytes, problem: str) -> None:
    packed = zstd.compress(raw, 1)
    checkpoint = publish(tmp_path, "v3.1", BEFORE, AFTER, packed=packed)
    with pytest.raises(SourceError, match=f"its changes: .*{problem}"):
        applied(tmp_path, checkpoint, BEFORE)


def test_a_file_that_is_not_the_one_listed(tmp_path: Path) -> None:
    checkpoint = publish(tmp_path, "v3.1", BEFORE, AFTER)
    path = tmp_path / "checkpoint-1/DELTA/delta_sparse.bin.zst"
    other = zstd.compress(sparse_file(BEFORE, {"w": AFTER["w"] + np.uint16(1)}), 3)
    assert sha256(other).digest() != checkpoint.patch.together.digest
    path.write_bytes(other)
    checkpoint = open_window(tmp_path / "checkpoint-1", 1, Naming(frozenset(BEFORE)))
    with pytest.raises(SourceError, match=r"its SHA-256 is not that of metadata\.json"):
        applied(tmp_path, checkpoint, BEFORE)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = publish(tmp_path, "xor", BEFORE, AFTER)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("relex_stream.patches.os.pwrite", full)
    with pytest.raises(StoreError, match="No space left on device; make room on that of the store"):
        applied(tmp_path, checkpoint, BEFORE)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    checkpoint = publish(tmp_path / "feed", "overwrite", BEFORE, AFTER)
    (tmp_path / "here").mkdir()
    assert applied(tmp_path / "here", checkpoint, BEFORE)["w"].tobytes() == AFTER["w"].tobytes()
    assert list((tmp_path / "here").iterdir()) == []
    assert overwrite_of(BEFORE["w"], AFTER["w"])
