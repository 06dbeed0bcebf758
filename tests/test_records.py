"""Records and HEAD as bytes: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import google_crc32c
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.errors import CorruptionError, StoreError
from relex_stream.specs import Box
from relex_stream.store import records
from relex_stream.store.records import (
    MAX_BLOCK_BYTES,
    MAX_STEP,
    Commit,
    FileEntry,
    Head,
    Manifest,
    RecipePart,
    RecordName,
    check_version,
    decode_commit,
    decode_head,
    decode_manifest,
    encode_commit,
    encode_head,
    encode_manifest,
    pack_literals,
    place_tensors,
    unpack_literals,
)

NAME = RecordName("commits/some.safetensors", 7)

# --- parts of recipes ----------------------------------------------------------------------------

names = st.text(max_size=9)
axes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3)
boxes = axes.map(lambda axes: Box(tuple(low for low, _ in axes), tuple(n for _, n in axes)))
parts = st.one_of(
    names.map(lambda name: RecipePart(tensor=name)),
    st.tuples(names, boxes).map(lambda both: RecipePart(tensor=both[0], box=both[1])),
    names.map(lambda name: RecipePart(blob=name)),
    st.integers(0, 2**40).map(lambda nbytes: RecipePart(nbytes=nbytes)),
)


@given(parts)
def test_parts_of_recipes_come_back(part: RecipePart) -> None:
    assert RecipePart.decode(json.loads(json.dumps(part.encode()))) == part


@pytest.mark.parametrize(
    "part",
    [
        ["literal", -1],
        ["literal", "5"],
        ["literal", 1.0],
        ["literal"],
        ["blob", 5],
        ["blob", "a", "b"],
        ["tensor", None],
        ["tensor", "a", [0]],
        ["tensor", "a", [0, 0], [1]],
        ["tensor", "a", [0], [1, 1]],
        ["tensor", "a", [-1], [1]],
        ["tensor", "a", [0], [-1]],
        ["tensor", "a", [True], [1]],
        ["tensor", "a", [0], [1.0]],
        ["other", "a"],
        [],
        "tensor",
        None,
    ],
)
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="unknown kind of part"):
        RecipePart.decode(part)


# --- packed bytes --------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_packed_bytes_come_back(data: bytes) -> None:
    assert unpack_literals(pack_literals(data), len(data)) == data


@pytest.mark.parametrize("nbytes", [0, 1, 4095])
def test_no_more_is_unpacked_than_is_wanted(nbytes: int) -> None:
    packed = zlib.compress(bytes(1 << 22))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"does not hold {nbytes} bytes"):
        unpack_literals(packed, nbytes)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --- formats -------------------------------------------------------------------------------------


def test_an_entry_has_the_oldest_format_that_serves() -> None:
    blob, recipe = FileEntry("a", 1, blob="x"), FileEntry("a", 1, recipe="y")
    both = FileEntry("a", 1, blob="x", recipe="y")
    assert [entry.format for entry in (blob, recipe, both)] == [1, 1, 2]
    with pytest.raises(ValueError, match="file a has neither blob nor recipe"):
        FileEntry("a", 1)


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0])
def test_what_is_no_version_is_no_store(version: object) -> None:
    with pytest.raises(StoreError, match="HEAD names no store format"):
        check_version(version, "HEAD")


def test_newer_versions_are_refused() -> None:
    for version in (1, 2):
        check_version(version, "HEAD")
    with pytest.raises(StoreError, match=r"store format 3, .* up to 2; install a newer"):
        check_version(3, "HEAD")


# --- manifest and commits ------------------------------------------------------------------------


def manifest_of(**changes: Any) -> Manifest:
    shapes = {
        "a": ("tracked", "BF16", [9, 8]),
        "b": ("constant", "I64", [9]),
        "c": ("tied", "BF16", [9, 8]),
        "d": ("constant", "U8", [0]),
    }
    described = [
        {
            "name": name,
            "kind": kind,
            "base_dtype": dtype,
            "dtype": dtype,
            "shape": shape,
            "tied_to": "a" if kind == "tied" else None,
            "sketch_row": 0 if kind == "tracked" else -1,
        }
        for name, (kind, dtype, shape) in shapes.items()
    ]
    tensors, blocks = place_tensors(described, 64)
    manifest = Manifest(
        tensors=tensors,
        block_bytes=64,
        seed=5,
        sketch_width=4,
        base_hint="../base",
        base_files=(FileEntry("model.safetensors", 9, recipe="y"),),
        base_crc=np.arange(blocks, dtype=np.uint32),
        base_included=False,
        base_frame_bytes=np.zeros(blocks, np.uint32),
    )
    return replace(manifest, **changes)


def commit_of(manifest: Manifest, **changes: Any) -> Commit:
    blocks, tensors = manifest.blocks, len(manifest.tensors)
    commit = Commit(
        step=3,
        row=1,
        previous=NAME.path,
        source="step_3",
        source_bytes=10,
        files=(FileEntry("model.safetensors", 9, recipe="y"),),
        nonfinite=True,
        frame_bytes=np.arange(blocks, dtype=np.uint32),
        frame_crc=np.arange(blocks, dtype=np.uint32) + 1,
        changed=np.arange(blocks, dtype=np.uint32) + 2,
        source_crc=np.arange(blocks, dtype=np.uint32) + 3,
        change_sq=np.arange(tensors, dtype=np.float64),
        delta_sq=np.arange(tensors, dtype=np.float64) + 1,
        sketch=np.arange(4, dtype=np.float16).reshape(1, 4),
        sketch_scale=np.ones(1, np.float32),
    )
    return replace(commit, **changes)


def assert_equal(one: Any, other: Any) -> None:
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), name, strict=False)


def test_blocks_are_of_whole_elements_and_of_a_constant_of_bytes() -> None:
    manifest = manifest_of()
    found = [(t.block_elements, t.first_block, t.blocks, t.elements) for t in manifest.tensors]
    assert found == [(32, 0, 3, 72), (64, 3, 2, 72), (32, 5, 0, 72), (64, 5, 0, 0)]
    assert [manifest.tensors[0].block_range(block) for block in (0, 2)] == [(0, 32), (64, 72)]


def test_a_manifest_comes_back() -> None:
    manifest = manifest_of()
    assert_equal(decode_manifest(encode_manifest(manifest)), manifest)


def format_of(record: bytes) -> int:
    """Return the format that a record says it has, read as the specification has it."""
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    version: int = json.loads(header["__metadata__"]["relex_stream"])["format"]
    return version


def test_records_say_the_format_that_their_files_need() -> None:
    both = (FileEntry("a", 1, blob="x"), FileEntry("b", 1, blob="x", recipe="y"))
    for files, version in ((), 1), (both[:1], 1), (both, 2), (both[::-1], 2):
        manifest = manifest_of(base_files=files)
        assert format_of(encode_manifest(manifest)) == version
        assert format_of(encode_commit(commit_of(manifest, files=files))) == version


@pytest.mark.parametrize("block_bytes", [0, 4, 12, MAX_BLOCK_BYTES + 8, -8])
def test_blocks_of_other_sizes_are_refused(block_bytes: int) -> None:
    data = encode_manifest(manifest_of(block_bytes=block_bytes))
    with pytest.raises(CorruptionError, match=f"blocks of {block_bytes} bytes"):
        decode_manifest(data)


def test_other_groups_of_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "STEP_GROUP", 32)
    data = encode_manifest(manifest_of())
    monkeypatch.undo()
    with pytest.raises(CorruptionError, match="step group 32"):
        decode_manifest(data)


@pytest.mark.parametrize("text", ["[]", "5", "null", "{", ""])
def test_a_record_of_something_else_is_damage(text: str) -> None:
    data = safetensors.numpy.save({}, {"relex_stream": text})
    with pytest.raises(CorruptionError, match="the manifest is not a record"):
        decode_manifest(data)


@pytest.mark.parametrize("column", ["base_crc", "base_frame_bytes"])
def test_columns_of_a_manifest_fit_its_tensors(column: str) -> None:
    manifest = manifest_of(**{column: np.zeros(6, np.uint32)})
    with pytest.raises(CorruptionError, match="columns do not match the tensors"):
        decode_manifest(encode_manifest(manifest))


def test_a_commit_comes_back() -> None:
    manifest = manifest_of()
    commit = commit_of(manifest)
    assert_equal(decode_commit(encode_commit(commit), manifest, "step 3"), commit)


@pytest.mark.parametrize(
    "column",
    [
        "frame_bytes",
        "frame_crc",
        "changed",
        "source_crc",
        "change_sq",
        "delta_sq",
        "sketch",
        "sketch_scale",
    ],
)
def test_columns_of_a_commit_fit_the_tensors(column: str) -> None:
    manifest = manifest_of()
    short = getattr(commit_of(manifest), column)[..., :-1]
    commit = commit_of(manifest, **{column: np.ascontiguousarray(short)})
    with pytest.raises(CorruptionError, match=f"step 3 is damaged: column {column} does not"):
        decode_commit(encode_commit(commit), manifest, "step 3")


# --- HEAD ----------------------------------------------------------------------------------------


def test_head_comes_back() -> None:
    for fence in (None, "f"):
        head = Head(NAME, (1, MAX_STEP), (NAME, NAME), 2, fence)
        assert decode_head(encode_head(head)) == head


@pytest.mark.parametrize("steps", [(0,), (2, 2), (3, 2), (MAX_STEP + 1,), (-1, 1)])
def test_steps_of_head_ascend(steps: tuple[int, ...]) -> None:
    with pytest.raises(CorruptionError, match="steps out of order"):
        decode_head(encode_head(Head(NAME, steps, (NAME,) * len(steps))))


@pytest.mark.parametrize("path", ["elsewhere/x", "commits/../../x", "/commits/x", "x", "commits"])
def test_records_lie_in_their_directory(path: str) -> None:
    other = RecordName(path, 1)
    for head in (Head(other, (1,), (NAME,)), Head(NAME, (1,), (other,))):
        with pytest.raises(CorruptionError, match="names a record elsewhere"):
            decode_head(encode_head(head))


def signed(**changes: Any) -> bytes:
    """Return a HEAD with other members, and the checksum of these."""
    body = json.loads(encode_head(Head(NAME, (1,), (NAME,)))) | changes
    del body["crc32c"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(body | {"crc32c": google_crc32c.value(text)}).encode()


def test_head_is_refused_without_its_checksum() -> None:
    body = json.loads(signed())
    assert decode_head(json.dumps(body).encode()).steps == (1,)
    with pytest.raises(CorruptionError, match="does not match its checksum"):
        decode_head(json.dumps(body | {"crc32c": body["crc32c"] ^ 1}).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"fence": 5},
        {"manifest": [5, 1]},
        {"manifest": ["commits/x"]},
        {"manifest": None},
        {"commits": 5},
        {"commits": [5]},
        {"commits": [[1, "commits/x"]]},
        {"commits": [["x", "commits/x", 1]]},
        {"commits": [[1, "commits/x", None]]},
    ],
)
def test_members_of_head_that_cannot_be_are_damage(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError, match="HEAD of the store"):
        decode_head(signed(**changes))
