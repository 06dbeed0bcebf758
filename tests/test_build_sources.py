"""Building from checkpoints that are not named as the base is, from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import relex_stream as rs
from relex_stream.cli.main import cli
from relex_stream.errors import OptionError, RelexStreamWarning, SourceError, TrajectoryError
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model


@pytest.fixture
def renamed(tmp_path: Path) -> Trajectory:
    """A run whose checkpoints call their tensors something else, under a prefix."""
    run = make_trajectory(
        tmp_path, steps=(1, 2), tensors={"model.w": (50, 70), "model.v": (300,)}, change_share=0.5
    )
    for step in run.steps:
        tensors = {
            name.replace("model.", "app.net."): raw(bits, run.dtype)
            for name, bits in run.bits[step].items()
        }
        write_model(run.directories[step], tensors, shards=2)
    return run


def assert_exports(run: Trajectory, store: Path, out: Path) -> None:
    """Check that a step comes back with the checkpoint's own names."""
    rs.export(store, out, step=2)
    written = {path.name: path.read_bytes() for path in run.directories[2].iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written


@pytest.mark.parametrize(
    "options",
    [
        ["--strip-prefix", "app.", "--map", r"^net\.=model."],
        ["--map", "net=model"],  # and what is left before it is found out
        ["--map", r"(?<=\.)net=other", "--map", "other=model"],
        ["--source", "safetensors", "--map", "^app.net=model"],
    ],
)
def test_names_are_mapped(renamed: Trajectory, tmp_path: Path, options: list[str]) -> None:
    store = tmp_path / "run.store"
    arguments = ["build-store", str(renamed.base), str(renamed.checkpoints), str(store)]
    result = CliRunner().invoke(cli, [*arguments, *options, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps_added"] == [1, 2]
    assert_exports(renamed, store, tmp_path / "out")


def test_the_same_in_python(renamed: Trajectory, tmp_path: Path) -> None:
    rs.build_store(
        renamed.base,
        renamed.checkpoints,
        tmp_path / "run.store",
        source="safetensors",
        strip_prefix="app.",
        map_names=[("net", "model")],
    )
    assert_exports(renamed, tmp_path / "run.store", tmp_path / "out")
    told = r"lacks tensor model\.v \(and 1 more\) .* has app\.net\.v .*--strip-prefix or --map"
    with pytest.raises(TrajectoryError, match=told):
        rs.build_store(renamed.base, renamed.checkpoints, tmp_path / "other.store")
    with pytest.raises(OptionError, match="--source zip"):
        rs.build_store(renamed.base, renamed.checkpoints, tmp_path / "x.store", source="zip")


@pytest.mark.parametrize("layout", ["directory", "fsdp"])
def test_one_of_several_models_is_chosen_by_its_prefix(tmp_path: Path, layout: str) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2), tensors={"w": (50, 70), "v": (300,)})
    shutil.rmtree(run.checkpoints)
    for step in run.steps:
        tensors = {
            f"{model}.{name}": raw(bits, run.dtype)
            for name, bits in run.bits[step].items()
            for model in ("policy", "ref")
        }
        if layout == "directory":
            write_model(run.directories[step], tensors, shards=2)
        else:
            actor = run.checkpoints / f"global_step_{step}/actor"
            actor.mkdir(parents=True)
            state = {
                f"{model}.{name}": torch.from_numpy(bits).view(torch.bfloat16)
                for name, bits in run.bits[step].items()
                for model in ("policy", "ref")
            }
            torch.save(state, actor / "model_world_size_1_rank_0.pt")
    store = tmp_path / "run.store"
    with pytest.raises(
        SourceError, match=r"'policy\.' and 'ref\.'; choose one with --strip-prefix"
    ):
        rs.build_store(run.base, run.checkpoints, store)
    with pytest.raises(SourceError, match=r"no tensor begins with 'critic\.'"):
        rs.build_store(run.base, run.checkpoints, store, strip_prefix="critic.")
    rs.build_store(run.base, run.checkpoints, store, strip_prefix="policy.")
    rs.export(store, tmp_path / "out", step=2, file_format="hf")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == run.bits[2].keys()
    for name, tensor in written.items():
        assert tensor.view(torch.uint16).numpy().tobytes() == run.bits[2][name].tobytes()
    # Half of what the files held is not in the store.
    with pytest.raises(OptionError, match="--format hf"):
        rs.export(store, tmp_path / "ingested", step=2, file_format="ingested")


@pytest.mark.parametrize("value", ["x", "=x", ""])
def test_a_map_without_a_pattern_or_replacement_is_refused(tmp_path: Path, value: str) -> None:
    result = CliRunner().invoke(cli, ["build-store", "a", "b", "c", "--map", value])
    assert result.exit_code == 2
    assert "is not PATTERN=REPLACEMENT" in result.output


def test_the_layout_of_a_run_is_told_and_unfinished_steps_are_left_out(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2), layout="weights/step_{step}")
    (run.directories[1] / "STABLE").touch()
    with pytest.warns(RelexStreamWarning, match=r"not complete: step_2 \(no STABLE\)"):
        summary = rs.build_store(run.base, run.checkpoints, tmp_path / "run.store")
    assert (summary.layout, summary.steps_added) == ("weights/step_N", (1,))
    (run.directories[2] / "STABLE").touch()
    summary = rs.build_store(run.base, run.checkpoints, tmp_path / "run.store")
    assert summary.steps_added == (2,)
