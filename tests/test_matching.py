"""Which checkpoints belong to a base, and where their tensors are; from headers made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relex_stream.errors import SourceError, TrajectoryError
from relex_stream.matching import describe_tensors, kept_files, match_checkpoint
from relex_stream.pieces import Span
from relex_stream.specs import (
    DTYPES,
    Box,
    FilePart,
    Piece,
    SourceCheckpoint,
    TensorPlace,
    TensorSpec,
    WeightsFile,
)
from relex_stream.store.records import StoredTensor, place_tensors

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""

EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "model.bias"
MODEL: Tensors = {EMBEDDING: ("BF16", (4, 3)), BIAS: ("BF16", (5,))}


def checkpoint(
    tensors: Tensors,
    step: int = 7,
    pieces: Mapping[str, Sequence[Piece]] | None = None,
    **options: Any,
) -> SourceCheckpoint:
    """Return a checkpoint whose tensors lie in "w" one behind the other, or in pieces."""
    places, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        spec = TensorSpec(name, DTYPES[dtype], shape)
        own = tuple((pieces or {}).get(name, ()))
        places[name] = TensorPlace(spec, "there/w", offset, own)
        offset += spec.nbytes
    files = tuple(WeightsFile(name, 100, 1, ()) for name in ("w", "v"))
    made = SourceCheckpoint(step, "there", places, files, (), ())
    return replace(made, **options)


def described(base: Tensors, first: Tensors, *, least: int = 99, cast: bool = False) -> Any:
    found = describe_tensors(checkpoint(base, 0), checkpoint(first), least, cast=cast)
    return {entry["name"]: entry for entry in found}


def stored(tensors: Tensors, tied: bool = False) -> tuple[StoredTensor, ...]:
    head = {HEAD: tensors[EMBEDDING]} if tied else {}
    entries = described({**tensors, **head}, tensors)
    return place_tensors(list(entries.values()), 64)[0]


# --- base and first checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "first", "cast", "kept"),
    [
        ("BF16", "BF16", False, "BF16"),
        ("BF16", "F32", False, "F32"),
        ("F16", "F32", False, "F32"),
        ("BF16", "F32", True, "BF16"),
        ("BF16", "BF16", True, "BF16"),
        ("F16", "F32", True, "F32"),
        ("F32", "F32", True, "F32"),
        ("I64", "I64", True, "I64"),
    ],
)
def test_a_tensor_is_kept_in_the_dtype_of_checkpoints_or_of_the_cast(
    base: str, first: str, cast: bool, kept: str
) -> None:
    entry = described({**MODEL, "x": (base, (2,))}, {**MODEL, "x": (first, (2,))}, cast=cast)["x"]
    assert (entry["base_dtype"], entry["dtype"]) == (base, kept)
    assert entry["kind"] == ("constant" if base == "I64" else "tracked")


@pytest.mark.parametrize(
    ("base", "first", "cast"),
    [
        ("F32", "BF16", False),
        ("F32", "BF16", True),
        ("BF16", "F16", False),
        ("BF16", "F16", True),
        ("I16", "F32", False),
        ("I32", "F32", True),
        ("I64", "I32", False),
    ],
)
def test_a_dtype_that_the_base_does_not_widen_to_is_refused(
    base: str, first: str, cast: bool
) -> None:
    both = ({**MODEL, "x": (base, (2,))}, {**MODEL, "x": (first, (2,))})
    with pytest.raises(TrajectoryError, match=rf"x is {first} .* give the base cast to {first}"):
        described(*both, cast=cast)


def test_another_shape_is_refused() -> None:
    with pytest.raises(
        TrajectoryError, match=r"step 7: .*bias has shape \[6\] .*\[5\] in the base"
    ):
        described(MODEL, {**MODEL, BIAS: ("BF16", (6,))})


def test_a_cast_wants_something_to_cast_to() -> None:
    with pytest.raises(TrajectoryError, match="there has nothing in it; give the base in BF16"):
        described({"x": ("F32", (2,))}, {"x": ("F32", (2,))}, cast=True)


def test_tensors_of_one_side_are_named_and_counted() -> None:
    more: Tensors = {**MODEL, "x": ("BF16", (1,)), "y": ("BF16", (1,)), "z": ("BF16", (1,))}
    for few, others in ((1, ""), (2, r" \(and 1 more\)"), (3, r" \(and 2 more\)")):
        some = {name: more[name] for name in (*MODEL, *"xyz"[:few])}
        with pytest.raises(TrajectoryError, match=rf"lacks tensor x{others} of .*--steps"):
            described(some, MODEL)
        with pytest.raises(TrajectoryError, match=rf"has tensor x{others}, which .*--steps"):
            described(MODEL, some)


def test_names_that_differ_in_case_alone_are_refused() -> None:
    model: Tensors = {"w.Bias": ("BF16", (1,)), "w.bias": ("BF16", (1,))}
    with pytest.raises(TrajectoryError, match=r"w\.Bias and w\.bias would share .*rename one"):
        described(model, model)


def test_sketches_are_numbered_and_of_large_tracked_tensors() -> None:
    model: Tensors = {
        "a": ("BF16", (4,)),
        "b": ("I64", (9,)),
        "c": ("F32", (3,)),
        "d": ("F16", (2, 3)),
        "e": ("BF16", (0, 5)),
    }
    rows = {name: entry["sketch_row"] for name, entry in described(model, model, least=4).items()}
    assert rows == {"a": 0, "b": -1, "c": -1, "d": 1, "e": -1}
    rows = {name: entry["sketch_row"] for name, entry in described(model, model, least=0).items()}
    assert rows == {"a": 0, "b": -1, "c": 1, "d": 2, "e": -1}


@pytest.mark.parametrize("in_base", [True, False])
def test_a_head_of_one_side_is_tied_to_the_embedding(in_base: bool) -> None:
    with_head: Tensors = {**MODEL, HEAD: MODEL[EMBEDDING]}
    both = (with_head, MODEL) if in_base else (MODEL, with_head)
    entry = described(*both, least=1)[HEAD]
    assert (entry["kind"], entry["tied_to"], entry["sketch_row"]) == ("tied", EMBEDDING, -1)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        (HEAD, ("BF16", (3, 4))),
        (HEAD, ("F32", (4, 3))),
        ("model.other.weight", ("BF16", (4, 3))),
    ],
)
def test_what_is_not_as_the_embedding_is_not_tied(name: str, like: Any) -> None:
    with pytest.raises(TrajectoryError, match=f"lacks tensor {name} of"):
        described({**MODEL, name: like}, MODEL)


def test_a_head_is_not_tied_to_what_is_not_there_or_not_tracked() -> None:
    both: Tensors = {**MODEL, HEAD: MODEL[EMBEDDING]}
    with pytest.raises(TrajectoryError, match=rf"lacks tensor {HEAD} \(and 1 more\)"):
        described(both, {BIAS: MODEL[BIAS]})
    integers: Tensors = {EMBEDDING: ("I64", (4, 3))}
    with pytest.raises(TrajectoryError, match=f"lacks tensor {HEAD} of"):
        described({**integers, HEAD: integers[EMBEDDING]}, integers)


# --- a later checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "cast", "remedy"),
    [
        (("F32", (5,)), False, "give --as bf16, as the store was begun"),
        (("F32", (6,)), True, "another model. Leave it out with --steps"),
        (("BF16", (6,)), True, "another model. Leave it out with --steps"),
        (("F16", (5,)), True, "another model. Leave it out with --steps"),
    ],
)
def test_other_dtypes_and_shapes_are_refused(found: Any, cast: bool, remedy: str) -> None:
    other = checkpoint({**MODEL, BIAS: found})
    dtype, shape = found
    what = rf"step 7: tensor {BIAS} in there/w is {dtype} \[{shape[0]}\], expected BF16 \[5\]"
    with pytest.raises(TrajectoryError, match=f"{what}.*{remedy}"):
        match_checkpoint(other, stored(MODEL), "", cast=cast)


def test_tensors_that_are_missing_or_more_are_refused() -> None:
    tensors = stored(MODEL, tied=True)
    match_checkpoint(checkpoint(MODEL), tensors, "")  # without the tied one
    with pytest.raises(TrajectoryError, match=f"lacks tensor {BIAS} of"):
        match_checkpoint(checkpoint({EMBEDDING: MODEL[EMBEDDING]}), tensors, "")
    with pytest.raises(TrajectoryError, match="has tensor x, which"):
        match_checkpoint(checkpoint({**MODEL, "x": ("BF16", (1,))}), tensors, "")


def test_files_are_numbered_by_their_paths() -> None:
    places = match_checkpoint(checkpoint(MODEL), stored(MODEL), "name")
    assert places.files == ("there/v", "there/w")
    assert places.table.file.tolist() == [1, 1]
    assert places.table.offset.tolist() == [24, 0]  # tensors are numbered by their names


def test_tables_are_shared_where_they_are_the_same() -> None:
    tensors = stored(MODEL, tied=True)
    piece = Piece("there/v", 8, Box((0,), (5,)))
    replicas = checkpoint(MODEL, copies={BIAS: (piece,)})
    first = match_checkpoint(replicas, tensors, "")
    second = match_checkpoint(replicas, tensors, "", first)
    assert second.table is first.table
    assert second.is_cast is first.is_cast
    assert second.copies is first.copies is not None
    # The head is there now, behind the others.
    third = match_checkpoint(checkpoint({**MODEL, HEAD: MODEL[EMBEDDING]}), tensors, "", second)
    assert [third.table.holds(tensor.index) for tensor in tensors] == [True, True, True]
    assert len(third.table.spans) == 3
    assert third.copies is None
    other = checkpoint(MODEL, copies={BIAS: (piece._replace(offset=9),)})
    fourth = match_checkpoint(other, tensors, "", second)
    assert fourth.copies is not None
    assert fourth.copies.offset.tolist() == [9]


def test_casts_are_those_of_the_checkpoint_itself() -> None:
    tensors = stored(MODEL)
    wide = checkpoint({name: ("F32", shape) for name, (_, shape) in MODEL.items()})
    first = match_checkpoint(wide, tensors, "", cast=True)
    assert first.is_cast.tolist() == [True, True]
    half = checkpoint({**MODEL, BIAS: ("F32", (5,))})
    second = match_checkpoint(half, tensors, "", first, cast=True)
    assert dict(zip((t.name for t in tensors), second.is_cast.tolist(), strict=True)) == {
        EMBEDDING: False,
        BIAS: True,
    }


def test_replicas_are_left_alone_with_a_cast() -> None:
    piece = Piece("there/v", 8, Box((0,), (5,)))
    wide = checkpoint({**MODEL, BIAS: ("F32", (5,))}, copies={BIAS: (piece,)})
    assert match_checkpoint(wide, stored(MODEL), "", cast=True).copies is None


@pytest.mark.parametrize(("dtype", "itemsize"), [("F32", 4), ("BF16", 2)])
def test_pieces_lie_as_wide_as_they_are_there(dtype: str, itemsize: int) -> None:
    model: Tensors = {"w": ("BF16", (3, 4, 5)), "ids": ("I64", (2, 3))}
    pieces = {
        "w": [
            Piece("there/v", 10, Box((1, 1, 1), (2, 2, 2))),
            Piece("there/w", 0, Box((0, 0, 0), (1, 4, 5))),
        ],
        "ids": [Piece("there/w", 500, Box((0, 1), (2, 2)))],
    }
    found = checkpoint({**model, "w": (dtype, (3, 4, 5))}, pieces=pieces)
    tensors = stored(model)
    table = match_checkpoint(found, tensors, "", cast=True).table
    index = {tensor.name: tensor.index for tensor in tensors}
    assert list(table.pieces(index["w"])) == [
        (0, 10, Span(26, 2, 2, 5)),
        (0, 10 + 4 * itemsize, Span(46, 2, 2, 5)),
        (1, 0, Span(0, 1, 20, 20)),
    ]
    # Elements of a constant are bytes.
    assert list(table.pieces(index["ids"])) == [(1, 500, Span(8, 2, 16, 24))]


def test_an_empty_tensor_has_a_place_of_no_elements() -> None:
    model: Tensors = {"none": ("BF16", (0, 3)), "w": ("BF16", (2,))}
    table = match_checkpoint(checkpoint(model), stored(model), "").table
    assert table.runs(0, 0, 0, 2).elements.size == 0
    assert table.are_whole.tolist() == [True, True]


def test_bytes_are_those_of_weights_and_of_files_beside_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"12345")
    files = (WeightsFile("w", 100, 1, ()),)
    there = checkpoint(
        MODEL, directory=str(tmp_path), weights_files=files, side_files=("config.json",)
    )
    there = replace(
        there,
        tensors={
            name: place._replace(path=str(tmp_path / "w")) for name, place in there.tensors.items()
        },
    )
    assert match_checkpoint(there, stored(MODEL), "").nbytes == 105
    (tmp_path / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json: cannot be read: .*still there"):
        match_checkpoint(there, stored(MODEL), "")


def test_files_that_come_back_are_kept() -> None:
    whole = WeightsFile("w", 9, 1, (FilePart(tensor="x"),))
    with_state = WeightsFile("v", 9, 1, None)
    names = ("config.json", "model.safetensors.index.json", ".metadata", "deep/.metadata")
    there = checkpoint(MODEL, weights_files=(whole, with_state), side_files=names)
    assert kept_files(there, is_cast=False) == ((whole,), names)
    assert kept_files(there, is_cast=True) == ((), ("config.json",))
