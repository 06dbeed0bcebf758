"""Checkpoints of grail's: which of DELTA and FULL counts, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relex_stream.errors import RelexStreamWarning, SourceError
from relex_stream.sources import Naming, find_checkpoints
from relex_stream.sources.grail import holds_window, open_window
from tests.make_deltas import publish_grail, publish_grail_full

BEFORE = {"a": np.arange(9, dtype=np.uint16), "b": np.arange(4, dtype=np.uint16)}
AFTER = {"a": BEFORE["a"] + np.uint16(1), "b": BEFORE["b"]}
NAMING = Naming(frozenset(BEFORE))


def test_what_is_found_in_a_window(tmp_path: Path) -> None:
    own = publish_grail(tmp_path, 90, 60, BEFORE, AFTER)
    assert holds_window(own)
    assert not holds_window(tmp_path)
    checkpoint = open_window(own, 1090, NAMING)
    assert checkpoint.patch is not None
    assert checkpoint.patch.follows == 1060
    assert checkpoint.patch.names == {"a": "a"}
    assert (checkpoint.tensors, checkpoint.side_files) == ({}, ())
    assert [file.relative_path for file in checkpoint.weights_files] == ["delta_sparse.bin.zst"]


def test_a_model_counts_once_it_is_complete(tmp_path: Path) -> None:
    own = publish_grail(tmp_path, 90, 60, BEFORE, AFTER)
    publish_grail_full(tmp_path, 90, AFTER, "BF16")
    assert open_window(own, 90, NAMING).patch is None
    (own / "FULL/config.json").rename(own / "config.json")  # is still being copied
    assert open_window(own, 90, NAMING).patch is not None
    (own / "config.json").rename(own / "FULL/config.json")
    (own / "FULL/metadata.json").unlink()
    assert open_window(own, 90, NAMING).patch is not None


def test_windows_are_complete_with_their_mark(tmp_path: Path) -> None:
    for window in (30, 60):
        publish_grail(tmp_path, window, window - 30, BEFORE, AFTER)
    (tmp_path / "checkpoint-60/READY-90").unlink()
    with pytest.warns(RelexStreamWarning, match=r"checkpoint-60 \(no READY-\*\)"):
        found = find_checkpoints(tmp_path)
    assert found.layout == "checkpoint-N, grail windows"
    assert [step for step, _ in found.checkpoints] == [30]


def edit(path: Path, **told: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


@pytest.mark.parametrize(
    ("name", "told", "problem"),
    [
        ("delta_metadata.json", {"format": "sparse_codec_v9"}, "'sparse_codec_v9' is not one of"),
        ("delta_metadata.json", {"format": ["x"]}, "is not one of"),
        ("delta_metadata.json", {"threshold": 1e-6}, "GRAIL_DELTA_THRESHOLD=0"),
        ("delta_metadata.json", {"shapes": ["a"]}, "no object 'shapes'"),
        ("metadata.json", {"prev_window": 90}, "window 90 cannot follow window 90"),
        ("metadata.json", {"prev_window": None}, "cannot follow window None"),
        ("metadata.json", {"window": "90"}, "window '90' cannot"),
        ("metadata.json", {"file_manifest": {}}, "checksum delta_sparse.bin.zst is missing"),
        ("metadata.json", {"file_manifest": 3}, "checksum delta_sparse.bin.zst is missing"),
        ("metadata.json", {"weights_hash": "xy"}, "checksum weights_hash is missing or malformed"),
    ],
)
def test_metadata_that_is_wrong(
    tmp_path: Path, name: str, told: dict[str, Any], problem: str
) -> None:
    own = publish_grail(tmp_path, 90, 60, BEFORE, AFTER)
    edit(own / "DELTA" / name, **told)
    with pytest.raises(SourceError, match=problem):
        open_window(own, 90, NAMING)


def test_metadata_that_is_missing_or_no_json(tmp_path: Path) -> None:
    own = publish_grail(tmp_path, 90, 60, BEFORE, AFTER)
    (own / "DELTA/delta_metadata.json").write_text("{")
    with pytest.raises(SourceError, match="it is not JSON"):
        open_window(own, 90, NAMING)
    (own / "DELTA/delta_metadata.json").unlink()
    with pytest.raises(SourceError, match=r"has no delta_metadata\.json; copy"):
        open_window(own, 90, NAMING)
