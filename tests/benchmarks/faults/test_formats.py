"""`faults formats`: other formats under the same damage, and the harness that counts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.faults.damage import KINDS, OUTCOMES, count_outcomes, damaged
from benchmarks.faults.formats import FORMATS, Format, Kept, kept
from tests.make_checkpoints import Trajectory, make_trajectory

SHAPES = {"w": (40, 30), "norm.b": (5,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(tmp_path_factory.mktemp("run"), steps=(1, 2), tensors=SHAPES)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_back_what_it_was_given(run, tmp_path, name):
    FORMATS[name].write(run, tmp_path / "kept")
    found = FORMATS[name].read(tmp_path / "kept")
    assert found.keys() == kept(run).keys()
    for key, bits in kept(run).items():
        np.testing.assert_array_equal(found[key].reshape(-1), bits.reshape(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_changes_one_file_and_is_undone(tmp_path, kind):
    contents = {name: name.encode() * 9 for name in ("a", "b", "c")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").touch()
    rng = np.random.default_rng(0)
    for _ in range(9):
        with damaged(tmp_path, kind, rng):
            found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            changed = [name for name in contents if found.get(name) != contents[name]]
            assert len(changed) == 1
            assert found["empty"] == b""
            if kind == "removed":
                assert changed[0] not in found
            elif kind == "cut short":
                assert contents[changed[0]].startswith(found[changed[0]])
            else:
                pairs = zip(contents[changed[0]], found[changed[0]], strict=True)
                assert sum((one ^ other).bit_count() for one, other in pairs) == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents | {
            "empty": b""
        }


def _write_one(run: Trajectory, directory: Path) -> None:
    directory.mkdir()
    (directory / "bits").write_bytes(run.bits[1]["w"].tobytes())


def _read_one(directory: Path) -> Kept:
    path = directory / "bits"
    if not path.exists():
        return {}
    content = path.read_bytes()
    if len(content) % 2:
        os._exit(3)
    if len(content) != 2 * 40 * 30:
        time.sleep(60)
    return {(1, "w"): np.frombuffer(content, np.uint16)}


def test_every_outcome_is_told_from_the_others(run, tmp_path):
    form = Format("one file", _write_one, _read_one)
    form.write(run, tmp_path / "kept")
    expected = {(1, "w"): run.bits[1]["w"]}
    counted = {
        kind: count_outcomes(
            form, tmp_path / "kept", expected, kind=kind, times=4, seed=1, limit_s=0.5
        )
        for kind in KINDS
    }
    assert counted["a bit flipped"] == {"wrong weights": 4}
    assert counted["removed"] == {"missing": 4}
    assert counted["cut short"].keys() == {"died", "no end"}
    assert counted["cut short"].total() == 4


def test_a_relex_stream_store_gives_no_wrong_weight_and_a_plain_file_does(run, tmp_path):
    words = ["faults", "formats", "--times", "6", "--steps", "2", "--directory", str(tmp_path)]
    words += ["--format", "relex-stream", "--format", "safetensors"]
    result = CliRunner().invoke(
        cli, [*words, "--json", str(tmp_path / "report.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["format"], row["damage"]) for row in rows] == [
        (name, kind) for name in ("relex-stream", "safetensors") for kind in KINDS
    ]
    for row in rows:
        assert sum(row[outcome] for outcome in OUTCOMES) == row["times"] == 6
    assert not any(row["wrong weights"] or row["missing"] for row in rows[:3])
    assert rows[3]["wrong weights"] == 6
