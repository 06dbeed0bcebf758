"""Safetensors files that hold parts of tensors: as torch writes them, and as it never would."""

from __future__ import annotations

import json

import pytest

from relex_stream.errors import SourceError
from relex_stream.sources import Naming, find_checkpoints
from relex_stream.sources.split_safetensors import holds_split, open_split
from tests.make_checkpoints import write_safetensors
from tests.split_checkpoints import assert_holds, assert_rebuilds, put_together, whole_model

INFO = "DCP_SHARDING_INFO"


def shard(directory, rank, tensors, starts=None):
    """Write one rank's file; `tensors` and `starts` by name, the latter 0 unless given."""
    info = {
        name: {"saved_offsets": (starts or {}).get(name, [0] * len(shape))}
        for name, (_, shape, _) in tensors.items()
    }
    metadata = {INFO: json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
    name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    return write_safetensors(directory / name, tensors, metadata)


def open_it(directory, *wanted):
    return open_split(directory, 3, Naming(frozenset(wanted)))


@pytest.mark.parametrize(
    ("run", "layout"),
    [
        ("nemo_rl_split", "step_N/policy/weights/model, split safetensors"),
        ("meshes/grid_split", "step-N, split safetensors"),
    ],
)
def test_what_torch_writes_is_read_bit_for_bit(torch_checkpoints, run, layout):
    found = find_checkpoints(torch_checkpoints / run)
    assert (found.layout, found.format.name) == (layout, "split-safetensors")
    for step, path in found.checkpoints:
        wanted = whole_model(torch_checkpoints / f"whole_bf16/step_{step}")
        checkpoint = found.open(path, step, Naming(frozenset(wanted)))
        assert checkpoint.step == step
        assert any(place.pieces for place in checkpoint.tensors.values())
        assert_holds(checkpoint, wanted)
        assert_rebuilds(checkpoint, wanted)


def test_files_around_the_weights_are_kept(torch_checkpoints):
    step = torch_checkpoints / "nemo_rl_split/step_1"
    checkpoint = open_it(step / "policy/weights/model")
    assert checkpoint.directory == str(step)
    assert checkpoint.side_files == ("policy/weights/model/.hf_metadata/config.json",)
    assert all(
        file.relative_path.startswith("policy/weights/model/shard-")
        for file in checkpoint.weights_files
    )


def test_whole_files_made_of_the_parts_are_preferred(torch_checkpoints):
    found = find_checkpoints(torch_checkpoints / "consolidated")
    assert (found.layout, found.format.name) == ("step-N", "safetensors")
    wanted = whole_model(torch_checkpoints / "whole_bf16/step_1")
    wanted = {name: wanted[name] for name in wanted if name not in ("model.ids", "model.scale")}
    ((step, path),) = found.checkpoints
    assert_holds(found.open(path, step, Naming(frozenset(wanted))), wanted)
    parts = find_checkpoints(torch_checkpoints / "consolidated", source="split-safetensors")
    assert parts.layout == "step-N/sharded, split safetensors"
    ((step, path),) = parts.checkpoints
    assert_holds(parts.open(path, step, Naming(frozenset(wanted))), wanted)


def test_names_are_those_of_the_base(tmp_path):
    shard(tmp_path, 1, {"model.w": ("U8", (2,), b"ab"), "model.v": ("U8", (1,), b"c")})
    shard(tmp_path, 2, {"model.w": ("U8", (1,), b"d")}, {"model.w": [2]})
    checkpoint = open_it(tmp_path, "w", "v")
    assert {name: place.spec.shape for name, place in checkpoint.tensors.items()} == {
        "w": (3,),
        "v": (1,),
    }
    parts = [part.tensor for file in checkpoint.weights_files for part in file.parts]
    assert parts == [None, "w", "v", None, "w"]


def test_a_part_that_two_ranks_hold_is_a_copy(tmp_path):
    shard(tmp_path, 1, {"w": ("U8", (2,), b"ab")})
    again = shard(tmp_path, 2, {"w": ("U8", (2,), b"ab")})
    checkpoint = open_it(tmp_path, "w")
    assert not checkpoint.tensors["w"].pieces
    assert [piece.path for piece in checkpoint.copies["w"]] == [str(again)]
    assert_rebuilds(checkpoint, {"w": put_together(checkpoint.tensors["w"])})


def test_empty_parts_are_left_out(tmp_path):
    shard(tmp_path, 1, {"w": ("U8", (2,), b"ab"), "none": ("U8", (0, 3), b"")})
    shard(tmp_path, 2, {"w": ("U8", (0,), b"")}, {"w": [2]})
    checkpoint = open_it(tmp_path, "w", "none")
    assert checkpoint.tensors["none"].spec.shape == (0, 3)
    assert not checkpoint.tensors["w"].pieces
    assert checkpoint.copies == {}
    parts = [part.tensor for file in checkpoint.weights_files for part in file.parts]
    assert parts == [None, "w", None]


@pytest.mark.parametrize(
    ("first", "second", "start", "problem"),
    [
        (("U8", (2,), b"ab"), ("U8", (1,), b"c"), [3], "hold 3 of its 4 elements"),
        (("U8", (2,), b"ab"), ("U8", (2,), b"cd"), [1], "its parts overlap"),
        (("U8", (2,), b"ab"), ("I8", (1,), b"c"), [2], r"U8 \[2\] in one file and I8 \[1\]"),
        (("U8", (2,), b"ab"), ("U8", (1, 1), b"c"), [2, 0], r"\[2\] in one file and U8 \[1, 1\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, first, second, start, problem):
    shard(tmp_path, 1, {"w": first})
    shard(tmp_path, 2, {"w": second}, {"w": start})
    with pytest.raises(SourceError, match=rf"tensor 'w': .*{problem}.*; copy the files of all"):
        open_it(tmp_path, "w")


@pytest.mark.parametrize(
    "info",
    [
        None,
        "not JSON",
        "[]",
        "{}",
        '{"w": 1}',
        '{"w": {}}',
        '{"w": {"saved_offsets": 0}}',
        '{"w": {"saved_offsets": [-1]}}',
        '{"w": {"saved_offsets": [true]}}',
        '{"w": {"saved_offsets": [0, 0]}}',
        '{"w": {"saved_offsets": [0]}, "w": {"saved_offsets": [1]}}',
    ],
)
def test_headers_that_do_not_say_where_parts_begin_are_refused(tmp_path, info):
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    write_safetensors(path, {"w": ("U8", (1,), b"a")}, {} if info is None else {INFO: info})
    with pytest.raises(SourceError, match=r"shard-00001.*does not say where its parts.*; copy it"):
        open_it(tmp_path, "w")


def test_files_without_tensors_are_refused(tmp_path):
    assert not holds_split(tmp_path)
    assert not holds_split(tmp_path / "none")
    shard(tmp_path, 1, {})
    assert holds_split(tmp_path)
    with pytest.raises(SourceError, match="hold no tensors"):
        open_it(tmp_path)
