"""Input that cannot be used: one line that says what, where and what to do; nothing half-written.

Everything goes through the command line, as a user would meet it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import relex_stream as rs
from relex_stream.cli.main import cli
from tests.make_checkpoints import (
    Trajectory,
    make_trajectory,
    raw,
    write_model,
    write_safetensors,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (31, 24),
    "model.layers.0.mlp.weight": (48, 24),
    "model.layers.0.norm.weight": (24,),
}
MLP = "model.layers.0.mlp.weight"
BUFFER = {"position_ids": ("I64", (3,), np.arange(3, dtype=np.int64).tobytes())}
LAST = 9
BAD = 7
"""The step that is made bad."""


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a directory: when it was written last, and its bytes."""
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(*arguments: object, **parts: str) -> str:
    """Run a command that must fail as users may expect it to; return its error line.

    Parameters
    ----------
    **parts : str
        ``what``, ``where`` and ``remedy``: regular expressions the line must match.
    """
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert len(lines[0]) < 500
    for part, pattern in parts.items():
        assert re.search(pattern, lines[0]), f"{part}: no {pattern!r} in {lines[0]!r}"
    return lines[0]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of steps 1 to 9 and a store of steps 1 to 5."""
    root = tmp_path_factory.mktemp("pristine")
    run = make_trajectory(
        root,
        steps=range(1, LAST + 1),
        tensors=SHAPES,
        constants=BUFFER,
        change_share=0.05,
        layout="step_{step}",
    )
    rs.build_store(run.base, run.checkpoints, root / "store", steps="1:5")
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


# --- checkpoints ---------------------------------------------------------------------------------


def tensors_of(root: Path, step: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a step's tensors back, to write them anew."""
    directory = root / "checkpoints" / f"step_{step}"
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            content = data[start + low : start + high]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), content)
    return tensors


def rewrite(root: Path, **changed: object) -> None:
    """Write step 7 anew with some tensors changed, or left out (None)."""
    tensors = {**tensors_of(root, BAD), **changed}
    directory = root / "checkpoints" / f"step_{BAD}"
    shutil.rmtree(directory)
    write_model(directory, {k: v for k, v in tensors.items() if v is not None})  # type: ignore[misc]


def bad_directory(root: Path) -> Path:
    return root / "checkpoints" / f"step_{BAD}"


def shard(root: Path) -> Path:
    return bad_directory(root) / "model-00001-of-00002.safetensors"


def truncate(root: Path) -> None:
    data = shard(root).read_bytes()
    shard(root).write_bytes(data[:-100])


def truncate_to_nothing(root: Path) -> None:
    shard(root).write_bytes(b"")


def cut_in_header(root: Path) -> None:
    shard(root).write_bytes(shard(root).read_bytes()[:40])


def absurd_header(root: Path) -> None:
    data = shard(root).read_bytes()
    shard(root).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])


def long_header(root: Path) -> None:
    # Beyond the file, but not beyond what a header may be.
    data = shard(root).read_bytes()
    shard(root).write_bytes((90 << 20).to_bytes(8, "little") + data[8:])


def change_index(root: Path, name: str) -> None:
    path = bad_directory(root) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][MLP] = name
    path.write_text(json.dumps(index))


def index_names_missing_file(root: Path) -> None:
    change_index(root, "model-00003-of-00002.safetensors")


def index_leads_outside(root: Path) -> None:
    shutil.copy(shard(root), root / "checkpoints" / "outside.safetensors")
    change_index(root, "../outside.safetensors")


def index_is_absolute(root: Path) -> None:
    change_index(root, str(shard(root)))


def index_is_not_json(root: Path) -> None:
    path = bad_directory(root) / "model.safetensors.index.json"
    path.write_text(path.read_text()[:50])


def missing_tensor(root: Path) -> None:
    rewrite(root, **{MLP: None})


def extra_tensor(root: Path) -> None:
    rewrite(root, **{"adapter.weight": ("BF16", (2,), b"\0\0\0\0")})


def wrong_shape(root: Path) -> None:
    _, (rows, columns), data = tensors_of(root, BAD)[MLP]
    rewrite(root, **{MLP: ("BF16", (columns, rows), data)})


def wrong_dtype(root: Path) -> None:
    _, shape, data = tensors_of(root, BAD)[MLP]
    rewrite(root, **{MLP: ("F16", shape, data)})


def another_model(root: Path) -> None:
    shutil.rmtree(bad_directory(root))
    write_model(
        bad_directory(root),
        {"transformer.wte.weight": raw(np.full((9, 4), 0x3F80, np.uint16), "BF16")},
    )


def not_a_number(root: Path) -> None:
    _, shape, data = tensors_of(root, BAD)[MLP]
    bits = np.frombuffer(data, np.uint16).copy()
    bits[100] = 0x7FC0
    rewrite(root, **{MLP: ("BF16", shape, bits.tobytes())})


def changed_buffer(root: Path) -> None:
    rewrite(root, position_ids=("I64", (3,), np.arange(1, 4, dtype=np.int64).tobytes()))


def empty_directory(root: Path) -> None:
    shutil.rmtree(bad_directory(root))
    bad_directory(root).mkdir()


def other_weights(root: Path) -> None:
    empty_directory(root)
    (bad_directory(root) / "pytorch_model.bin").write_bytes(b"PK")


STEP = rf"step_?\s?{BAD}\b"

BAD_CHECKPOINTS: dict[Callable[[Path], None], dict[str, str]] = {
    truncate: {
        "what": "ends|bytes|truncated|short",
        "where": "step_7/model-00001",
        "remedy": "copy",
    },
    truncate_to_nothing: {"what": "bytes|empty", "where": "step_7/model-00001", "remedy": "copy"},
    cut_in_header: {"what": "header|bytes", "where": "step_7/model-00001", "remedy": "copy|save"},
    absurd_header: {"what": "header", "where": "step_7/model-00001", "remedy": "copy|save"},
    long_header: {"what": "truncated", "where": "step_7/model-00001", "remedy": "copy|save"},
    index_names_missing_file: {
        "what": r"model-00003-of-00002\.safetensors.* missing",
        "where": "step_7",
        "remedy": "copy",
    },
    index_leads_outside: {
        "what": r"\.\./outside\.safetensors",
        "where": r"step_7/model\.safetensors\.index\.json",
        "remedy": "copy|save",
    },
    index_is_absolute: {
        "what": "absolute",
        "where": r"step_7/model\.safetensors\.index\.json",
        "remedy": "copy|save",
    },
    index_is_not_json: {
        "what": "bad index",
        "where": r"step_7/model\.safetensors\.index\.json",
        "remedy": "copy|save",
    },
    missing_tensor: {"what": f"lacks tensor {MLP}", "where": STEP, "remedy": "--steps"},
    extra_tensor: {"what": r"has tensor adapter\.weight", "where": STEP, "remedy": "--steps"},
    wrong_shape: {
        "what": rf"{MLP}.*\[24, 48\].*\[48, 24\]",
        "where": "step 7.*step_7/model.safetensors",
        "remedy": "--steps",
    },
    wrong_dtype: {
        "what": rf"{MLP}.*F16.*BF16",
        "where": "step 7.*step_7/model.safetensors",
        "remedy": "--steps",
    },
    another_model: {"what": "another model", "where": STEP, "remedy": "--steps"},
    not_a_number: {
        "what": rf"{MLP}.*not finite.*0x7fc0.*element 100",
        "where": "step 7.*step_7/model.safetensors",
        "remedy": "--steps.*--allow-nonfinite",
    },
    changed_buffer: {
        "what": r"position_ids \(I64\).*differs",
        "where": "step 7.*step_7/model.safetensors",
        "remedy": "--steps",
    },
    empty_directory: {"what": "nothing", "where": "step_7", "remedy": "save the checkpoint"},
    other_weights: {
        "what": r"pytorch_model\.bin",
        "where": "step_7",
        "remedy": "convert to safetensors",
    },
}


@pytest.mark.parametrize("spoil", BAD_CHECKPOINTS, ids=lambda function: function.__name__)
def test_a_bad_checkpoint_is_refused_and_nothing_committed(
    root: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(root)
    parts = BAD_CHECKPOINTS[spoil]
    sources = snapshot(root / "checkpoints")
    # A new store: no step of it is committed.
    refused("build-store", root / "base", root / "checkpoints", root / "new", **parts)
    assert not (root / "new" / "HEAD").exists()
    with pytest.raises(rs.StoreError):
        rs.open_store(root / "new")
    # A store that exists keeps the steps it has, and nothing else.
    committed = {
        name: content
        for name, content in snapshot(root / "store").items()
        if name.startswith(("HEAD", "commits/"))
    }
    refused("build-store", root / "base", root / "checkpoints", root / "store", **parts)
    after = snapshot(root / "store")
    assert {name: after[name] for name in committed} == committed
    assert rs.open_store(root / "store").steps == (1, 2, 3, 4, 5)
    assert rs.verify(root / "store").problems == ()
    assert snapshot(root / "checkpoints") == sources
    # And takes the others once the bad one is left out, or the message is heeded.
    done = rs.build_store(root / "base", root / "checkpoints", root / "store", steps="6,8:9")
    assert done.steps_added == (6, 8, 9)
    rs.export(root / "store", root / "out", step=9)
    for path in (root / "checkpoints" / "step_9").iterdir():
        assert (root / "out" / path.name).read_bytes() == path.read_bytes()


def test_checkpoints_of_another_model_from_the_first_on(root: Path) -> None:
    shapes = {name: (*shape[:-1], shape[-1] + 1) for name, shape in SHAPES.items()}
    other = make_trajectory(root / "other", tensors=shapes, layout="step_{step}")
    refused(
        "build-store",
        root / "base",
        other.checkpoints,
        root / "new",
        what="another model",
        where="step 1",
    )
    assert not (root / "new" / "HEAD").exists()
    refused(
        "build-store",
        other.base,
        root / "checkpoints",
        root / "store",
        what="is not the base",
        where="other/base",
        remedy="give the original",
    )


@pytest.mark.parametrize("which", ["base", "checkpoints"])
@pytest.mark.parametrize("how", ["missing", "empty", "file"])
def test_a_directory_that_is_missing_empty_or_a_file(root: Path, which: str, how: str) -> None:
    shutil.rmtree(root / which)
    if how == "empty":
        (root / which).mkdir()
    elif how == "file":
        (root / which).write_text("not a directory")
    what = {"missing": "no such directory", "empty": "nothing", "file": "a file where"}[how]
    refused(
        "build-store",
        root / "base",
        root / "checkpoints",
        root / "new",
        what=what,
        where=str(root / which),
        remedy="check the path",
    )
    assert not (root / "new").exists()


def test_checkpoints_that_are_one_model(root: Path) -> None:
    refused(
        "build-store",
        root / "base",
        root / "checkpoints" / "step_3",
        root / "new",
        what="one model",
        where="checkpoints/step_3",
        remedy="give the directory that holds the checkpoints",
    )
    assert not (root / "new").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--steps", "5:1"), "ends before it starts"),
        (("--steps", "3,99"), "99"),
        (("--steps", "x"), "not a step"),
        (("--pattern", "step"), r"\{step\}"),
        (("--pattern", "epoch-{step}"), "no directory matches"),
        (("--memory-limit", "20MiB"), "needs .* MiB.*raise --memory-limit"),
        (("--memory-limit", "much"), "not a size"),
        (("--workers", "0"), "--workers"),
    ],
)
def test_options_that_cannot_be_met(root: Path, options: tuple[str, ...], what: str) -> None:
    refused("build-store", root / "base", root / "checkpoints", root / "new", *options, what=what)
    assert not (root / "new" / "HEAD").exists()


# --- the store -----------------------------------------------------------------------------------


def reading_commands(store: Path, out: Path) -> list[tuple[object, ...]]:
    return [
        ("extrapolate", store, out, "--target-step", 20),
        ("export", store, out, "--step", 3),
        ("info", store),
        ("verify", store),
        ("drop", store, "--after", 3),
    ]


@pytest.mark.parametrize("how", ["missing", "empty", "a model", "a file"])
def test_a_store_that_is_none(root: Path, how: str) -> None:
    store = root / "none"
    if how == "empty":
        store.mkdir()
    elif how == "a model":
        shutil.copytree(root / "base", store)
    elif how == "a file":
        store.write_text("not a store")
    before = snapshot(root)
    for command in reading_commands(store, root / "out"):
        refused(*command, what="no store|not a relex-stream store", where=str(store))
    assert snapshot(root) == before
    assert not (root / "out").exists()
    if how in ("a model", "a file"):
        refused(
            "build-store",
            root / "base",
            root / "checkpoints",
            store,
            what="not a store's|is a file",
            where=str(store),
            remedy="name a(nother)? directory",
        )
        assert snapshot(root) == before


def test_a_store_of_a_newer_format(root: Path) -> None:
    head = root / "store" / "HEAD"
    text = head.read_text()
    newer = re.sub(r'("format"\s*:\s*)\d+', r"\g<1>99", text)
    assert newer != text
    head.write_text(newer)
    # The lock file says who tried to write last.
    (root / "store" / "LOCK").unlink()
    before = snapshot(root / "store")
    commands = [
        *reading_commands(root / "store", root / "out"),
        ("build-store", root / "base", root / "checkpoints", root / "store"),
    ]
    for command in commands:
        refused(
            *command,
            what="format 99",
            where=re.escape(str(root / "store")),
            remedy="install a newer relex-stream",
        )
    (root / "store" / "LOCK").unlink()
    assert snapshot(root / "store") == before
    assert not (root / "out").exists()


@pytest.mark.parametrize("where", ["HEAD", "commits", "blobs"])
def test_a_damaged_store(root: Path, where: str) -> None:
    path = root / "store" / where
    for file in path.iterdir() if path.is_dir() else [path]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    refused(
        "export",
        root / "store",
        root / "out",
        "--step",
        5,
        what="checksum|does not match|damaged|missing",
        where=re.escape(str(root / "store")),
    )
    assert not (root / "out").exists()


def test_a_step_that_the_store_does_not_hold(root: Path) -> None:
    refused(
        "export",
        root / "store",
        root / "out",
        "--step",
        6,
        what="step 6 is not in",
        where="store",
        remedy="5 steps from 1 to 5",
    )
    assert not (root / "out").exists()


# --- the output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (("--history-steps", 1), "linear needs at least 2 checkpoints", "raise --history-steps"),
        (("--rank", 6), r"--rank must be from 1 to .*\(5\), not 6", ""),
        (("--rank", 0), "--rank", ""),
        (("--power-iterations", 0), "--power-iterations", ""),
        (("--svd", "approximate"), "--svd", "randomized.*exact"),
        (("--fit", "cubic"), "--fit", "linear"),
        (("--fit", "polynomial:5"), "--fit polynomial:5 needs at least 6 checkpoints", "add"),
        (("--fit", "sinusoid", "--history-steps", 4), "--fit sinusoid needs at least 5", "raise"),
        (("--window", 6), "--window is 6 checkpoints, the history has 5", ""),
        (("--window", 1), "--window must be at least 2", ""),
        (("--refit-every", 0), "--refit-every", ""),
        (("--damping", "nan"), "--damping must be a number", ""),
        (("--damping", "1", "--damping", "1.0"), "a --damping is given twice", ""),
        (("--rank", 1, "--rank", 1), "a --rank is given twice", ""),
        (("--anchor", "last"), "--anchor", "base.*latest"),
        (("--group-by", "block"), "--group-by", "tensor"),
        (("--include", "*.nothing"), r"--include \*.nothing is no tensor's name", "the first is"),
        (("--exclude", "*"), "leave no tensor to predict", ""),
        (("--excluded-from", "middle"), "--excluded-from", "base.*latest"),
        (("--compat", "mergekit"), "--compat", "relex"),
        (("--step-scale", 2), "--step-scale is for --compat relex", ""),
        (("--compat", "relex", "--step-scale", 0), "--step-scale must be", "above 0"),
        (("--compat", "relex", "--anchor", "latest"), "no --anchor latest", ""),
        (("--compat", "relex", "--group-by", "layer"), "no --group-by layer", ""),
        (("--compat", "relex", "--fit", "linear-origin"), "no --fit linear-origin", ""),
        (("--compat", "relex", "--devices", "cuda"), "CPU only", "leave --devices out"),
        (("--target-step", 20), "given twice", ""),
        (("--target-step", 0), "--target-step", ""),
        (("--memory-limit", "20MiB"), "needs .* MiB", "raise --memory-limit"),
    ],
)
def test_an_extrapolation_that_cannot_be_met(
    root: Path, options: tuple[object, ...], what: str, remedy: str
) -> None:
    command = ("extrapolate", root / "store", root / "out", "--target-step", 20)
    refused(*command, *options, what=what, remedy=remedy)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        ((), "Missing option '--step'", ""),
        (("--step", 6), "--step 6 is not in the history, which has 5 steps from 1 to 5", ""),
        (("--step", 4, "--history-steps", 3), "which has step 1, 2, 3", ""),
        (("--step", 4, "--step", 4), "a --step is given twice", ""),
        (("--step", 4, "--fitted", "--fit", "x"), "--fit must be one of", "linear"),
        (("--step", 4, "--rank", 9), "--rank must be from 1 to", ""),
    ],
)
def test_a_reconstruction_that_cannot_be_met(
    root: Path, options: tuple[object, ...], what: str, remedy: str
) -> None:
    refused("reconstruct", root / "store", root / "out", *options, what=what, remedy=remedy)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        ((), "name at least one --recipe, or --weights", ""),
        (("--recipe", "soup:last=2"), "there is no recipe 'soup'", "lawa:last=K"),
        (("--recipe", "lawa"), "lacks last", "write lawa:last=K"),
        (("--recipe", "lawa:last"), "'last' is not key=value", "write lawa:last=K"),
        (("--recipe", "lawa:last=2,last=3"), "'last=3' is not key=value, or is there twice", ""),
        (("--recipe", "lawa:last=6"), "last must be a number from 1 to 5, not '6'", ""),
        (("--recipe", "lawa:last=1.5"), "last must be a whole number", ""),
        (("--recipe", "lawa:last=2,from=1"), "knows no 'from'", "write lawa:last=K"),
        (("--recipe", "ema:decay=2"), "decay must be a number from 0 to 1, not '2'", ""),
        (("--recipe", "ema:decay=inf"), "decay must be a number", ""),
        (("--recipe", "expo:alpha=much"), "alpha must be a number, not 'much'", ""),
        (("--recipe", "expo:alpha=1,step=9"), "step must be a step that the store holds", ""),
        (("--recipe", "expo:alpha=1,step=0"), "step must be a step that the store holds", ""),
        (("--recipe", "two-point:target=9,from=3,to=3"), "'to' must be a later step", ""),
        (("--recipe", "two-point:target=9,norms=x"), "norms must be copy or extrapolate", ""),
        (("--recipe", "expo:alpha=1", "--recipe", "expo:alpha=1"), "two outputs are the same", ""),
        (("--weights", "4"), "is not STEP=WEIGHT", "like 100=0.5"),
        (("--weights", "4=0.5,4=0.5"), "step 4 is there twice", ""),
        (("--weights", "9=1"), "the store holds no step 9", ""),
        (("--weights", "0=0.4,4=0.5"), "the base .step 0. has 0.5, not 0.4", ""),
    ],
)
def test_a_combination_that_cannot_be_met(
    root: Path, options: tuple[object, ...], what: str, remedy: str
) -> None:
    refused("combine", root / "store", root / "out", *options, what=what, remedy=remedy)
    assert not (root / "out").exists()


def test_one_checkpoint_makes_no_line(root: Path) -> None:
    rs.build_store(root / "base", root / "checkpoints", root / "single", steps="4")
    refused(
        "extrapolate",
        root / "single",
        root / "out",
        "--target-step",
        20,
        what="--fit linear needs at least 2 checkpoints, the history has 1",
        remedy="add checkpoints with build-store",
    )
    assert not (root / "out").exists()


@pytest.mark.parametrize("what", ["directory", "model", "file", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_output_is_left_as_it_is(root: Path, what: str, overwrite: bool) -> None:
    out = root / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(root / "checkpoints" / "step_2")
    else:
        shutil.copytree(root / "base", out)
        (out / "notes.txt").write_text("mine")
        if what == "directory":
            (out / "model.safetensors").unlink()
    before = snapshot(root)
    for command in reading_commands(root / "store", out)[:2]:
        replace = overwrite and command[0] == "extrapolate"
        refused(
            *command,
            *(("--overwrite",) if replace else ()),
            what="exists|did not write|not a directory",
            where=str(out),
            remedy="left as it is" if replace else "name another directory",
        )
    assert snapshot(root) == before
    assert out.is_symlink() == (what == "link")


def test_an_output_inside_the_store_or_around_it(root: Path) -> None:
    before = snapshot(root)
    for out in (root / "store" / "out", root / "store", root):
        for command in reading_commands(root / "store", out)[:2]:
            refused(*command, what="lies inside", where=str(out), remedy="name a")
    assert snapshot(root) == before


def test_an_output_that_is_the_base_or_inside_it(root: Path) -> None:
    before = snapshot(root)
    for out in (root / "base", root / "base" / "out"):
        for command in (
            *reading_commands(root / "store", out)[:2],
            ("export", root / "store", out, "--step", 0),
        ):
            refused(*command, what="lies inside the base", where=str(out))
    assert snapshot(root) == before


def test_a_base_that_relex_stream_wrote_is_not_overwritten(root: Path) -> None:
    # A run that goes on from an extrapolated model: its base has the marker of an output.
    (root / "base" / "relex_stream.json").write_text("{}")
    rs.build_store(root / "base", root / "checkpoints", root / "new")
    before = snapshot(root)
    refused(
        "extrapolate",
        root / "new",
        root / "base",
        "--target-step",
        20,
        "--overwrite",
        what="base",
        where=str(root / "base"),
    )
    assert snapshot(root) == before


# --- the base ------------------------------------------------------------------------------------


def test_a_base_that_changed_is_named(root: Path) -> None:
    path = root / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for command in reading_commands(root / "store", root / "out")[:2]:
        refused(
            *command,
            what="the base has changed: tensor",
            where=re.escape(str(path)),
            remedy="--base",
        )
        assert not (root / "out").exists()
    refused(
        "build-store",
        root / "base",
        root / "checkpoints",
        root / "store",
        what="the base has changed: tensor",
        where=re.escape(str(path)),
    )
    assert rs.open_store(root / "store").steps == (1, 2, 3, 4, 5)
    # No leftovers beside the output either.
    assert {entry.name for entry in root.iterdir()} == {"base", "checkpoints", "store"}


def test_a_base_that_is_gone_or_another_model(root: Path) -> None:
    (root / "base").rename(root / "moved")
    other: Trajectory = make_trajectory(
        root / "other", steps=(1,), tensors={"w": (4, 4)}, layout="step_{step}"
    )
    for command in reading_commands(root / "store", root / "out")[:2]:
        refused(*command, what="no base at", where=str(root / "base"), remedy="--base")
        refused(
            *command,
            "--base",
            root / "nowhere",
            what="no base at",
            where=str(root / "nowhere"),
            remedy="--base",
        )
        refused(
            *command,
            "--base",
            other.base,
            what="is not the base of .*it has no tensor",
            where=str(other.base),
            remedy="--base",
        )
        assert not (root / "out").exists()
    shutil.copytree(root / "moved", root / "base")
    config = write_safetensors(
        root / "base" / "model.safetensors",
        {name: raw(np.zeros((2, *shape), np.uint16), "BF16") for name, shape in SHAPES.items()},
    )
    refused(
        "extrapolate",
        root / "store",
        root / "out",
        "--target-step",
        20,
        what="is not the base",
        where=str(config.parent),
        remedy="--base",
    )
    assert not (root / "out").exists()


def test_errors_come_as_json_too(root: Path) -> None:
    arguments = ["info", str(root / "none"), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "StoreError"
    assert str(root / "none") in error["message"]
    assert result.stderr == f"error: {error['message']}\n"
