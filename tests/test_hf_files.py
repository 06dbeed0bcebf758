"""Models of steps whose weights are wider than the base's: its files, with other dtypes in them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import relex_stream as rs
from relex_stream.errors import CorruptionError
from relex_stream.hf_files import headers_for_steps
from relex_stream.sources import open_checkpoint
from relex_stream.specs import Box
from relex_stream.store import Store
from relex_stream.store.records import FileEntry, RecipePart
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_safetensors
from tests.make_stores import build_store

SHAPES = {"a.weight": (6, 4), "b.weight": (5,), "scale": (), "none": (0, 3)}
IDS = raw(np.arange(3, dtype=np.uint64), "I64")
INDEX = "model.safetensors.index.json"
NOTE = {"format": "pt", "note": "n\u00f6te \u2713"}


def made(root: Path, dtype: str = "F32", metadata: dict[str, int] | None = None) -> Trajectory:
    """Make a run over a BF16 base of two shards, the second of a constant alone."""
    run = make_trajectory(
        root,
        steps=(1, 2),
        tensors=SHAPES,
        constants={"ids": IDS},
        dtype=dtype,
        base_dtype="BF16",
        change_share=0.5,
    )
    (run.base / "model.safetensors").unlink()
    weights = {name: raw(bits, "BF16") for name, bits in run.bits[0].items()}
    shards = {"one.safetensors": weights, "two.safetensors": {"ids": IDS}}
    for name, tensors in shards.items():
        write_safetensors(run.base / name, tensors, NOTE, padding=3)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index: dict[str, Any] = {"weight_map": weight_map}
    if metadata is not None:
        index["metadata"] = metadata
    (run.base / INDEX).write_text(json.dumps(index))
    (run.base / "merges.txt").write_text("no JSON")
    build_store(run.base, run.checkpoints, root / "store", block_bytes=32)
    return run


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header


def test_a_model_of_wider_weights_has_the_files_of_the_base(tmp_path: Path) -> None:
    run = made(tmp_path, metadata={"total_size": 7, "total_parameters": 30})
    out = tmp_path / "out"
    summary = rs.export(tmp_path / "store", out, step=2, file_format="hf")
    assert {file.path: file.bytes for file in summary.files} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    assert {path.name for path in out.iterdir()} == {path.name for path in run.base.iterdir()}
    assert summary.bytes_written == sum(path.stat().st_size for path in out.iterdir())
    opened = open_checkpoint(out, 2)
    for name, bits in run.bits[2].items():
        place = opened.tensors[name]
        assert (place.spec.dtype.code, place.spec.shape) == ("F32", SHAPES[name])
        data = Path(place.path).read_bytes()[place.offset : place.offset + place.spec.nbytes]
        assert data == bits.tobytes()
    after = header_of(out / "one.safetensors")
    assert list(after) == list(header_of(run.base / "one.safetensors"))
    assert after["__metadata__"] == NOTE
    assert int.from_bytes((out / "one.safetensors").read_bytes()[:8], "little") % 8 == 0
    assert "n\u00f6te \u2713".encode() in (out / "one.safetensors").read_bytes()
    # What has no other dtype stays as it is, however it was written.
    for name in ("two.safetensors", "merges.txt", "config.json"):
        assert (out / name).read_bytes() == (run.base / name).read_bytes()
    index = json.loads((out / INDEX).read_text())
    nbytes = 4 * (24 + 5 + 1) + 3 * 8
    assert index["metadata"] == {"total_size": nbytes, "total_parameters": 30}
    assert index["weight_map"] == json.loads((run.base / INDEX).read_text())["weight_map"]


def test_the_model_of_step_0_is_the_base(tmp_path: Path) -> None:
    run = made(tmp_path, metadata={"total_size": 7})
    rs.export(tmp_path / "store", tmp_path / "out", step=0, file_format="hf")
    for path in run.base.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("metadata", [None, {}])
def test_an_index_that_tells_no_size_tells_none_later(
    tmp_path: Path, metadata: dict[str, int] | None
) -> None:
    run = made(tmp_path, metadata=metadata)
    rs.export(tmp_path / "store", tmp_path / "out", step=1, file_format="hf")
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads(
        (run.base / INDEX).read_text()
    )


def test_files_around_weights_of_the_same_dtype_are_those_of_the_base(tmp_path: Path) -> None:
    run = made(tmp_path, dtype="BF16", metadata={"total_size": 7})
    rs.export(tmp_path / "store", tmp_path / "out", step=1, file_format="hf")
    assert (tmp_path / "out" / INDEX).read_bytes() == (run.base / INDEX).read_bytes()
    assert headers_for_steps(Store(tmp_path / "store")) == {}


@pytest.mark.parametrize(
    "parts",
    [
        [RecipePart(tensor="a")],
        [RecipePart(nbytes=8), RecipePart(tensor="a")],
        [RecipePart(blob="header"), RecipePart(blob="more")],
        [RecipePart(blob="header"), RecipePart(tensor="a", box=Box((0,), (1,)))],
    ],
)
def test_a_base_file_that_is_no_header_and_tensors_is_damage(parts: list[RecipePart]) -> None:
    entry = FileEntry("one.safetensors", 9, recipe="recipe")
    store: Any = SimpleNamespace(
        path="run.store",
        manifest=SimpleNamespace(base_files=(entry,)),
        recipe=lambda entry: parts,
        tensors={"a": SimpleNamespace(dtype="BF16", base_dtype="BF16")},
    )
    with pytest.raises(CorruptionError, match=r"one\.safetensors of the base is no header"):
        headers_for_steps(store)
