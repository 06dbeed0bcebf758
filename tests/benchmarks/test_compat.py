"""The comparison with the authors' scripts, with stand-ins that copy the base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import compat
from benchmarks.__main__ import cli
from benchmarks.compat import CASES, equal_weights
from benchmarks.peer_programs import relex_scripts
from benchmarks.report import Report
from tests.make_checkpoints import make_trajectory

COPY = """
import shutil, sys
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if "rank" in given:
    assert given["mode"] == "extrapolate" and given["target_step_scaling_factor"] in "12"
    shutil.copytree(given["base_model"], given["output_dir"] + "/step" + given["target_steps"])
"""


def save(directory: Path, **tensors: torch.Tensor) -> Path:
    directory.mkdir(parents=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def test_weights_are_compared_as_bits(tmp_path: Path) -> None:
    ones = torch.ones(3, dtype=torch.bfloat16)
    one = save(tmp_path / "a", w=torch.tensor([0.0, 1.0, float("nan")]).bfloat16(), v=ones)
    other = save(tmp_path / "b", w=torch.tensor([-0.0, 1.0, float("nan")]).bfloat16(), v=ones)
    assert equal_weights(one, other) == (5, 6)
    with pytest.raises(ValueError, match="other tensors"):
        equal_weights(one, save(tmp_path / "c", w=ones))
    # The scripts write a head that is tied, too.
    tied = save(tmp_path / "d", **{"w": ones, "lm_head.weight": ones.clone()})
    assert equal_weights(tied, save(tmp_path / "e", w=ones)) == (3, 3)


def prepare(place: Path, **_: object) -> None:
    """Lay out a small trajectory as the shipped one."""
    made = make_trajectory(place, change_share=0.2)
    rs.build_store(made.base, made.checkpoints, place / "store")


def test_every_case_is_asked_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (relex_scripts.DELTAS_SCRIPT, relex_scripts.EXTRAPOLATION_SCRIPT):
        script = tmp_path / "relex" / "scripts" / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(COPY)
    monkeypatch.setattr(compat, "CASES", [CASES[0], CASES[-1]])
    monkeypatch.setattr(compat, "prepare", prepare)
    arguments = ["compat", "--relex", str(tmp_path / "relex"), "--relex-python", sys.executable]
    file = tmp_path / "report.json"
    result = CliRunner().invoke(
        cli, [*arguments, "--work", str(tmp_path), "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    rows = Report.read(file).rows
    assert [row["case"] for row in rows] == ["rank 1, line", "steps doubled"]
    for row in rows:
        # Theirs is the base here: as many differ as are predicted to move.
        assert row["with_compat_differing"] > 1000
        assert row["predicted_to_move"] == 0
    near, far = (row["with_compat_differing"] for row in rows)
    assert far >= near
    assert rows[1]["without_differing"] == rows[0]["without_differing"]
