"""Versions of slime's that hold changes only, and what is wrong with some."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relex_stream.errors import RelexStreamWarning, SourceError
from relex_stream.sources import Naming, find_checkpoints, open_checkpoint
from relex_stream.sources.checkpoint import INDEX_FILE
from relex_stream.sources.slime import holds_changes, open_changes
from tests.make_checkpoints import raw, write_model, write_safetensors
from tests.make_deltas import publish_slime

BEFORE = {"a": np.arange(9, dtype=np.uint16), "b": np.arange(4, dtype=np.uint16)}
AFTER = {name: bits + np.uint16(1) for name, bits in BEFORE.items()}
NAMING = Naming(frozenset(BEFORE))


def test_what_is_found_in_a_version(tmp_path: Path) -> None:
    own = publish_slime(tmp_path, 7, BEFORE, AFTER, encoding="overwrite")
    (own / "model-00099-of-00099.safetensors").write_bytes(b"of an earlier attempt")
    (own / "tokenizer.json").write_text("{}")
    checkpoint = open_changes(own, 107, NAMING)
    patch = checkpoint.patch
    assert patch is not None
    assert (patch.follows, patch.encoding, patch.digest_kind) == (106, "overwrite", "adler32")
    assert set(patch.changes) == {"a", "b"}
    assert (checkpoint.tensors, checkpoint.side_files) == ({}, ("tokenizer.json",))
    # All that must be there to read it, and none that can be had from a store.
    files = {file.relative_path: file.parts for file in checkpoint.weights_files}
    assert files == dict.fromkeys((INDEX_FILE, *sorted(f for f in files if f != INDEX_FILE)))
    assert len(files) == 3


def test_a_model_is_no_version(tmp_path: Path) -> None:
    tensors = {name: raw(bits, "BF16") for name, bits in BEFORE.items()}
    model = write_model(tmp_path / "model", tensors, shards=2)
    assert not holds_changes(model)
    assert not holds_changes(tmp_path / "none")
    own = publish_slime(tmp_path, 1, BEFORE, AFTER)
    assert holds_changes(own)
    with pytest.raises(SourceError, match="hold only what changed since another version"):
        open_checkpoint(own, 0)


def test_versions_are_complete_with_their_index(tmp_path: Path) -> None:
    for version in (1, 2):
        publish_slime(tmp_path, version, BEFORE, AFTER)
    (tmp_path / "weight_v000002" / INDEX_FILE).unlink()
    with pytest.warns(RelexStreamWarning, match=r"weight_v000002 \(no model.safetensors.index"):
        found = find_checkpoints(tmp_path)
    assert found.layout == "weight_vN"
    assert [step for step, _ in found.checkpoints] == [1]
    assert found.there == (1, 2)


def _metadata(**told: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["metadata"].update(told)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (_metadata(delta_encoding="gzip"), "encoded as 'gzip', and only xor and overwrite"),
        (_metadata(delta_encoding=["xor"]), r"encoded as \['xor'\]"),
        (_metadata(compression_format="lz4"), "packed by 'lz4', and only zstd"),
        (_metadata(version="7"), "this is version 7, in a directory named weight_v000003"),
        (_metadata(version=3), "its version is 3"),
        (_metadata(version="-1"), "its version is '-1'"),
        (_metadata(base_version="9" * 30), "its base_version is"),
        (_metadata(base_version="3"), "version 3 cannot follow version 3"),
        (lambda index: index.update(weight_map={"a": "../x"}), "bad index: .*path"),
        (lambda index: index.update(weight_map=3), "no object 'weight_map'"),
        (lambda index: index["weight_map"].update(c="gone.safetensors"), "gone.safetensors, named"),
        (lambda index: index["weight_map"].pop("a"), "tensor 'a' is not in model.safe"),
        (
            lambda index: index["weight_map"].update(c=index["weight_map"]["a"]),
            "tensor 'c' is said to be in",
        ),
    ],
)
def test_an_index_that_is_wrong(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], problem: str
) -> None:
    own = publish_slime(tmp_path, 3, BEFORE, AFTER, files=1)
    index = json.loads((own / INDEX_FILE).read_text())
    edit(index)
    (own / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=problem):
        open_changes(own, 3, NAMING)


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({"a": ("BF16", [2], bytes(4))}, {"a": "00"}, r"is BF16 \[2\] where packed bytes belong"),
        ({"a": ("U8", [2, 2], bytes(4))}, {"a": "00"}, "where packed bytes belong"),
        ({"a": ("U8", [4], bytes(4))}, {}, "the checksum of tensor 'a' is missing"),
        ({"a": ("U8", [4], bytes(4))}, {"a": "xy"}, "is missing or malformed"),
    ],
)
def test_a_file_that_is_wrong(
    tmp_path: Path, tensors: Any, metadata: dict[str, str], problem: str
) -> None:
    own = publish_slime(tmp_path, 3, {"a": BEFORE["a"]}, {"a": AFTER["a"]}, files=1)
    write_safetensors(own / "model-00000-of-00001.safetensors", tensors, metadata)
    with pytest.raises(SourceError, match=problem):
        open_changes(own, 3, NAMING)
