"""The `peers` benchmark at tiny size; small stand-ins for the programs that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import peers
from benchmarks.__main__ import cli
from benchmarks.peer_programs import mergekit_linear, read_write, relex_scripts, two_pass
from benchmarks.peers import AUTHORS, BOTH, BUILD, EXTRAPOLATE, LIMIT, MERGEKIT, OURS, TWO_PASS
from benchmarks.processes import BenchmarkError, measure
from benchmarks.report import Report
from benchmarks.trajectory import PRESETS, write_steps
from tests.make_checkpoints import write_model

STEPS = (1, 2, 3, 4)
TARGET = 8
PROGRAMS = Path(peers.__file__).parent / "peer_programs"


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    # It waits for whatever else this machine writes, and no time is asserted here.
    monkeypatch.setattr(os, "sync", lambda: None)


def make_run(out: Path, dtype: str, steps: tuple[int, ...] = STEPS) -> Path:
    write_steps(out, PRESETS["tiny"], [0, *steps], seed=1, dtype=dtype)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "bf16")


@pytest.fixture(scope="module")
def prediction(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prediction")
    rs.build_store(run / "base", run / "checkpoints", out / "store")
    rs.extrapolate(out / "store", out / "model", target_steps=[TARGET], svd="exact")
    return out / "model"


def loaded(model: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(model / "model.safetensors")


# --- programs


@pytest.mark.parametrize("block_bytes", [two_pass.BLOCK_BYTES, 4 * len(STEPS) * 1000])
def test_two_passes_predict_what_the_exact_route_does(run, prediction, tmp_path, block_bytes):
    two_pass.run(
        run / "base",
        run / "checkpoints",
        tmp_path / "out",
        target_step=TARGET,
        threads=2,
        block_bytes=block_bytes,
    )
    base, changed = loaded(run / "base"), 0
    for name, weight in loaded(tmp_path / "out").items():
        changed += int((weight != base[name]).sum())
    assert changed > 1000
    assert peers.same_share(tmp_path / "out", prediction) > 1 - 1e-4
    ours = {path.name for path in prediction.iterdir()} - {"README.md", "relex_stream.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == ours


def test_two_passes_in_fp32(tmp_path):
    run = make_run(tmp_path, "fp32")
    program = [sys.executable, PROGRAMS / "two_pass.py", run / "base", run / "checkpoints"]
    done = measure("two", [*program, tmp_path / "out", "--target-step", str(TARGET)])
    assert peers.call_s(done) > 0
    rs.build_store(run / "base", run / "checkpoints", tmp_path / "store")
    rs.extrapolate(tmp_path / "store", tmp_path / "ours", target_steps=[TARGET], svd="exact")
    ours, base = loaded(tmp_path / "ours"), loaded(run / "base")
    for name, weight in loaded(tmp_path / "out").items():
        assert weight.dtype == torch.float32
        # Both predict a move of about 8 steps; they agree about it far better than it is large.
        move = (ours[name].double() - base[name].double()).abs().max()
        assert (weight.double() - ours[name].double()).abs().max() < 1e-3 * move + 1e-9


def test_two_passes_copy_what_no_checkpoint_holds(tmp_path):
    rng = np.random.default_rng(0)

    def tensors(extra: bool) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        found = {"w": ("BF16", (7, 3), (rng.integers(0, 99, 21) + 0x3F00).astype("<u2").tobytes())}
        if extra:
            found |= {
                "lm_head.weight": ("BF16", (5,), bytes(range(10))),
                "ids": ("I64", (2,), bytes(range(16))),
                "none": ("BF16", (0, 4), b""),
            }
        return found

    base = write_model(tmp_path / "base", tensors(True))
    for step in STEPS:
        write_model(
            tmp_path / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface",
            tensors(False),
        )
    two_pass.run(base, tmp_path / "checkpoints", tmp_path / "out", target_step=TARGET, threads=1)
    before, after = loaded(base), loaded(tmp_path / "out")
    assert not torch.equal(before.pop("w"), after.pop("w"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before
    )


def test_two_passes_name_what_does_not_fit(run, tmp_path):
    with pytest.raises(SystemExit, match="fewer than two"):
        two_pass.find_checkpoints(run)
    tensors = {"w": ("BF16", (2,), bytes(4))}
    write_model(tmp_path / "base", tensors)
    for step, shape in ((1, (2,)), (2, (1, 2))):
        place = tmp_path / "checkpoints" / f"global_step_{step}"
        write_model(place, {"w": ("BF16", shape, bytes(4))})
    with pytest.raises(SystemExit, match="w has another shape at step 2"):
        two_pass.run(
            tmp_path / "base", tmp_path / "checkpoints", tmp_path / "out", target_step=4, threads=1
        )


@pytest.mark.parametrize("piece_bytes", [read_write.PIECE_BYTES, 4099])
def test_the_limit_reads_every_byte_and_copies(run, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(read_write, "PIECE_BYTES", piece_bytes)
    size = (run / "base" / "model.safetensors").stat().st_size
    figures = read_write.run([run / "checkpoints", run / "base"], [], threads=2)
    assert (figures["bytes_read"], figures["bytes_written"]) == ((len(STEPS) + 1) * size, 0)
    copies = [(run / "base", tmp_path / name) for name in ("a", "b")]
    figures = read_write.run([], copies, threads=2)
    assert (figures["bytes_read"], figures["bytes_written"]) == (size, 2 * size)
    for _, out in copies:
        copied = (out / "model.safetensors").read_bytes()
        assert copied == (run / "base" / "model.safetensors").read_bytes()


def test_the_limit_as_a_program(run, tmp_path):
    done = measure(
        "limit",
        [
            *(sys.executable, PROGRAMS / "read_write.py", "--read", run / "checkpoints"),
            *("--copy", run / "base", tmp_path / "out", "--threads", "2"),
        ],
    )
    assert peers.call_s(done) > 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_calls_of_relex_stream_time_themselves(run, tmp_path):
    module = [sys.executable, "-m", "benchmarks.peer_programs.relex_stream_call"]
    root = Path(peers.__file__).parents[1]
    inputs = [run / "base", run / "checkpoints"]
    build = [*module, "build", *inputs, tmp_path / "store", "--workers", "1"]
    assert peers.call_s(measure("build", build, cwd=root)) > 0
    targets = ["--target-step", "8", "--target-step", "9"]
    extrapolate = [*module, "extrapolate", tmp_path / "store", tmp_path / "out", *targets]
    assert peers.call_s(measure("extrapolate", extrapolate, cwd=root)) > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"step_8", "step_9"}


def test_a_program_without_a_time_is_named(run):
    with pytest.raises(BenchmarkError, match="mute: printed no time"):
        peers.call_s(measure("mute", [sys.executable, "-c", "print('no figures')"]))


# --- software that is not ours


def test_mergekit_gets_the_weights_of_a_line(run):
    checkpoints = two_pass.find_checkpoints(run / "checkpoints")
    config = json.loads(mergekit_linear.config_text(checkpoints, target_step=TARGET))
    assert config["merge_method"] == "linear"
    assert config["parameters"] == {"normalize": False}
    weights = np.array([model["parameters"]["weight"] for model in config["models"]])
    # Any line comes out as itself.
    assert np.allclose(weights @ [[1, step] for step in STEPS], [1, TARGET])
    assert all((Path(model["model"]) / "config.json").exists() for model in config["models"])


def test_a_base_without_tokenizer_gets_a_stand_in(run, tmp_path):
    linked = relex_scripts.link_base(run / "base", tmp_path / "linked")
    names = {path.name for path in (run / "base").iterdir()}
    assert {path.name for path in linked.iterdir()} == names | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert loaded(linked).keys() == loaded(run / "base").keys()
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer_config.json").write_text('{"own": 1}')
    again = relex_scripts.link_base(own, tmp_path / "linked")
    assert [path.name for path in again.iterdir()] == ["tokenizer_config.json"]
    assert json.loads((again / "tokenizer_config.json").read_text()) == {"own": 1}


def test_the_stand_in_tokenizer_loads(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    linked = relex_scripts.link_base(run / "base", tmp_path / "linked")
    tokenizer = transformers.AutoTokenizer.from_pretrained(linked)
    assert tokenizer("a")["input_ids"] == [0]


DELTAS = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("base_model", "checkpoint_dir", "output_dir"):
    parser.add_argument("--" + name, required=True)
options = parser.parse_args()
assert pathlib.Path(options.base_model, "tokenizer.json").exists()
out = pathlib.Path(options.output_dir)
out.mkdir(parents=True)
steps = sorted(int(p.name.rsplit("_")[-1]) for p in pathlib.Path(options.checkpoint_dir).iterdir())
(out / "metadata.json").write_text(json.dumps({"steps": steps}))
print("deltas saved")
"""

EXTRAPOLATION = """
import argparse, json, os, pathlib, shutil
parser = argparse.ArgumentParser()
for name in ("base_model", "delta_dir", "output_dir", "history_steps", "rank", "target_steps"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--mode", choices=["extrapolate"], required=True)
parser.add_argument("--fit_method", choices=["linear"], required=True)
parser.add_argument("--target_step_scaling_factor", type=float, required=True)
options = parser.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == "1"
steps = json.loads(pathlib.Path(options.delta_dir, "metadata.json").read_text())["steps"]
assert steps[-1] == int(options.history_steps) and options.rank == "1"
for step in options.target_steps.split(","):
    out = pathlib.Path(options.output_dir, "step" + step)
    out.mkdir(parents=True)
    shutil.copy(pathlib.Path(options.base_model, "model.safetensors"), out)
"""

MERGEKIT_PROGRAM = """#!{python}
import json, os, pathlib, sys
config, out = sys.argv[1:3]
assert os.environ["HF_HUB_OFFLINE"] == "1"
assert len(json.loads(pathlib.Path(config).read_text())["models"]) == {steps}
pathlib.Path(out).mkdir()
pathlib.Path(out, "model.safetensors").write_bytes(b"merged")
"""

# What the scripts import, as far as the program that runs them looks at it.
STUBS = {
    "accelerate": "",
    "safetensors/__init__": "",
    "safetensors/torch": "",
    "scipy/__init__": "",
    "scipy/optimize": "",
    "tqdm": "",
    "torch": "import contextlib\ndef device(name): return contextlib.nullcontext()\n",
    "transformers": """
class AutoConfig:
    from_pretrained = staticmethod(lambda path: path)
class AutoModelForCausalLM:
    from_config = staticmethod(lambda config: None)
class AutoTokenizer:
    from_pretrained = staticmethod(lambda path: None)
""",
}


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def stand_ins(tmp_path) -> list[str]:
    """Make stand-ins for the authors' scripts, their Python and mergekit; return the options."""
    write_program(tmp_path / "relex" / "scripts" / "precompute_deltas.py", DELTAS)
    write_program(tmp_path / "relex" / "scripts" / "svd_extrapolation.py", EXTRAPOLATION)
    for name, text in STUBS.items():
        write_program(tmp_path / "stubs" / f"{name}.py", text)
    python = write_program(
        tmp_path / "python",
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}/stubs" exec "{sys.executable}" "$@"\n',
    )
    mergekit = write_program(
        tmp_path / "mergekit-yaml",
        MERGEKIT_PROGRAM.format(python=sys.executable, steps=len(STEPS)),
    )
    return [
        *("--relex", str(tmp_path / "relex"), "--relex-python", str(python)),
        *("--mergekit", str(mergekit)),
    ]


# --- the command


def call(run: Path, *options: str) -> str:
    result = CliRunner().invoke(
        cli, ["peers", str(run), "--runs", "1", "--warmup", "0", *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_whole_processes_of_all_programs(run, stand_ins, tmp_path):
    file = tmp_path / "report.json"
    output = call(run, *stand_ins, "--part", "whole", "--json", str(file))
    report = Report.read(file)
    rows = {(row["part"], row["job"], row["program"]): row for row in report.rows}
    whole = {key[1:] for key in rows if key[0] == peers.WHOLE}
    assert whole == {
        *((job, name) for job in (BUILD, EXTRAPOLATE, BOTH) for name in (OURS, AUTHORS, LIMIT)),
        *((BOTH, name) for name in (TWO_PASS, MERGEKIT)),
    }
    assert (peers.IN_PROCESS, BOTH, TWO_PASS) in rows
    for row in report.rows:
        assert 0 < row["wall_min_s"] <= row["wall_s"] <= row["wall_max_s"]
        if row["part"] == peers.WHOLE:
            # A stand-in may have ended before it is looked at twice.
            assert row["peak_rss_bytes"] > (10 << 20 if row["program"] == OURS else 0)
            assert row["program"] != OURS or row["times_relex_stream"] == 1
    build = rows[peers.WHOLE, BUILD, OURS]
    assert 8 < build["bits_per_changed_weight"] < 200
    assert rows[peers.WHOLE, BOTH, OURS]["wall_s"] > build["wall_s"]
    assert rows[peers.WHOLE, BOTH, TWO_PASS]["agreement"]["same_weights_share"] > 0.999
    # The stand-in "predicts" the base.
    assert rows[peers.WHOLE, EXTRAPOLATE, AUTHORS]["agreement"]["same_weights_share"] < 1
    assert "left out" not in output
    assert str(tmp_path) not in file.read_text()
    assert {path.name for path in run.iterdir()} == {"base", "checkpoints"}

    pictures = pytest.importorskip("benchmarks.pictures", exc_type=Exception)
    assert pictures.draw_report(file).axes


def test_calls_in_process(run, stand_ins, tmp_path):
    file = tmp_path / "report.json"
    call(run, *stand_ins, "--part", "in-process", "--what", "build", "--json", str(file))
    rows = [(row["program"], row["variant"]) for row in Report.read(file).rows]
    assert rows == [(OURS, ""), (OURS, "1 worker"), (AUTHORS, ""), (LIMIT, "only read all")]


def test_extrapolations_in_process_differ_in_what_they_say(run, tmp_path):
    programs = peers.Programs(peers.Run.of(run, None), peers.Tools(), tmp_path, 2)
    entries = {entry.name: entry for entry in programs.in_process([EXTRAPOLATE])}
    assert list(entries) == [
        "extrapolate, relex-stream",
        "extrapolate, relex-stream, 1 worker",
        "extrapolate, relex-stream, 8 targets",
        "extrapolate, limit, only read the base, write one model",
        "extrapolate, limit, only read the base, write 8 models",
    ]
    words = [str(word) for word in entries["extrapolate, relex-stream, 8 targets"].argv]
    assert words.count("--target-step") == 8
    assert entries["extrapolate, relex-stream, 1 worker"].argv[-1] == "1"
    assert {entry.reads[0] for entry in entries.values()} == {run.resolve() / "base"}


def test_authors_scripts_run_without_start_up(run, stand_ins, tmp_path):
    tools = peers.Tools(Path(stand_ins[1]), Path(stand_ins[3]), None)
    programs = peers.Programs(peers.Run.of(run, TARGET), tools, tmp_path / "work", 2)
    programs.make_inputs()
    [entry] = [one for one in programs.in_process([EXTRAPOLATE]) if one.program == AUTHORS]
    program = entry.as_program()
    program.prepare()
    done = measure(program.name, program.argv, env=program.env)
    assert peers.row_of(peers.IN_PROCESS, entry, [done])["wall_s"] < done.wall_s
    assert (programs.authors / f"step{TARGET}" / "model.safetensors").exists()


def test_programs_that_are_not_named_are_left_out(run):
    output = call(run, "--part", "whole", "--what", "both", "--markdown")
    assert "authors' scripts: left out; name a checkout of github.com/weizhepei/RELEX" in output
    assert "mergekit, linear: left out; name its program with --mergekit" in output
    assert "easier job" not in output


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to evict files with")
def test_cold_runs_say_so_and_gaps_are_named(stand_ins, tmp_path):
    run = make_run(tmp_path / "run", "bf16", (1, 2, 4, 8))
    relex = stand_ins[:4]
    output = call(run, *relex, "--part", "whole", "--what", "build", "--cold")
    assert "page cache cold" in output
    assert "posix_fadvise" in output
    assert "the steps here have gaps" in output


def test_wrong_arguments_are_named(run, tmp_path):
    runner = CliRunner()
    result = runner.invoke(cli, ["peers", str(run), "--what", "build,all"])
    assert result.exit_code == 2
    assert "all: choose from build, extrapolate, both" in result.output
    with pytest.raises(BenchmarkError, match="holds no base/"):
        runner.invoke(cli, ["peers", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BenchmarkError, match="fewer than two directories"):
        runner.invoke(cli, ["peers", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "empty").mkdir()
    arguments = ["peers", str(run), "--relex", str(tmp_path / "empty"), "--what", "build"]
    with pytest.raises(BenchmarkError, match="no checkout of RELEX"):
        runner.invoke(cli, arguments, catch_exceptions=False)


def test_shares_of_equal_weights(run, tmp_path):
    first, second = (
        write_model(tmp_path / name, {"w": ("F32", (4,), data)})
        for name, data in (
            ("a", np.float32([0, 1, 2, np.nan]).tobytes()),
            ("b", np.float32([-0.0, 1, 3, np.nan]).tobytes()),
        )
    )
    assert peers.same_share(first, second) == 0.5
    with pytest.raises(BenchmarkError, match="hold other tensors"):
        peers.same_share(first, run / "base")


def test_programs_print_their_help():
    for name in ("two_pass.py", "read_write.py"):
        done = subprocess.run(
            [sys.executable, PROGRAMS / name, "--help"], capture_output=True, text=True, check=True
        )
        assert "usage:" in done.stdout
