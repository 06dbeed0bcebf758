"""What comes out of a store is what went in: every file, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import relex_stream as rs
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf
from tests.make_checkpoints import (
    RawTensor,
    Trajectory,
    make_trajectory,
    raw,
    write_model,
    write_safetensors,
)
from tests.make_stores import build_store

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (61, 24),
    "model.layers.0.mlp.weight": (96, 131),
    "model.layers.0.mlp.bias": (1009,),
    "model.layers.0.norm.weight": (24,),
    "scale": (),
    "unused": (0, 4),
}


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_exports(store: Path, sources: Mapping[int, Path], out: Path, **options: Any) -> None:
    """Check that each step's export is its source, file by file, and says so itself."""
    for step, source in sources.items():
        summary = rs.export(store, out / f"{step}", step=step, **options)
        expected = digests(source)
        assert digests(out / f"{step}") == expected
        assert {file.path: file.sha256 for file in summary.files} == expected
        sizes = {name: (source / name).stat().st_size for name in expected}
        assert {file.path: file.bytes for file in summary.files} == sizes
        assert summary.bytes_written == sum(sizes.values())


def write_steps(root: Path, steps: Mapping[int, Mapping[str, RawTensor]]) -> dict[int, Path]:
    """Write tensors by step (0: the base); return each step's directory."""
    directories = {step: root / (f"run/step_{step}" if step else "base") for step in steps}
    for step, tensors in steps.items():
        write_model(directories[step], tensors)
    return directories


@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [("BF16", None), ("F16", None), ("F32", None), ("F32", "BF16"), ("F32", "F16")],
)
@pytest.mark.parametrize("shards", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_every_step_comes_back(
    tmp_path: Path, dtype: str, base_dtype: str | None, shards: tuple[int, int]
) -> None:
    run = make_trajectory(
        tmp_path,
        steps=(1, 2, 5),
        dtype=dtype,
        base_dtype=base_dtype,
        tensors=SHAPES,
        constants={"position_ids": ("I64", (1, 7), np.arange(7, dtype=np.int64).tobytes())},
        base_shards=shards[0],
        checkpoint_shards=shards[1],
    )
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    assert_exports(tmp_path / "store", run.directories, tmp_path / "out")


@pytest.mark.parametrize("base_dtype", ["F32", "BF16"])
def test_a_store_with_its_base_needs_nothing_else(tmp_path: Path, base_dtype: str) -> None:
    run = make_trajectory(
        tmp_path / "run", dtype="F32", base_dtype=base_dtype, tensors=SHAPES, base_shards=2
    )
    rs.build_store(run.base, run.checkpoints, tmp_path / "store", include_base=True)
    kept = tmp_path / "kept"
    for step, directory in run.directories.items():
        shutil.copytree(directory, kept / f"{step}")
    shutil.rmtree(tmp_path / "run")
    moved = (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert_exports(moved, {step: kept / f"{step}" for step in run.directories}, tmp_path / "out")


def test_a_base_that_moved_is_given_by_name(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, tensors=SHAPES)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    moved = run.base.rename(tmp_path / "moved")
    with pytest.raises(rs.SourceError, match="--base"):
        rs.export(tmp_path / "store", tmp_path / "out", step=3)
    assert not (tmp_path / "out").exists()
    sources = {**run.directories, 0: moved}
    assert_exports(tmp_path / "store", sources, tmp_path / "out", base=moved)


def test_a_store_and_its_base_can_move_together(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path / "here", tensors=SHAPES)
    rs.build_store(run.base, run.checkpoints, tmp_path / "here/store")
    (tmp_path / "here").rename(tmp_path / "there")
    assert_exports(
        tmp_path / "there/store",
        {
            step: tmp_path / "there" / path.relative_to(tmp_path / "here")
            for step, path in run.directories.items()
        },
        tmp_path / "out",
    )


@pytest.mark.parametrize("block_bytes", [8, 64, 4096])
@pytest.mark.parametrize("workers", [1, 3])
def test_any_block_size_and_any_number_of_workers(
    tmp_path: Path, block_bytes: int, workers: int
) -> None:
    shapes = {"a.weight": (31, 13), "b": (5,), "scale": (), "none": (0,)}
    run = make_trajectory(tmp_path, tensors=shapes, change_share=0.1)
    options = {"workers": workers, "include_base": True, "block_bytes": block_bytes}
    build_store(run.base, run.checkpoints, tmp_path / "store", **options)
    assert_exports(tmp_path / "store", run.directories, tmp_path / "out", workers=workers)


def mixed_tensors(step: int) -> dict[str, RawTensor]:
    """Every kind of tensor in one model; an odd number of bytes first leaves the rest unaligned."""
    rng = np.random.default_rng(7)
    half = rng.integers(0x3C00, 0x3D00, 301).astype(np.uint16) + np.uint16(step)
    single = rng.integers(0x3F000000, 0x3F800000, (17, 5)).astype(np.uint32) + np.uint32(step)
    return {
        "flags": ("BOOL", (3,), bytes([1, 0, 1])),
        "a.bf16": raw(half, "BF16"),
        "mask": ("U8", (5,), bytes(range(5))),
        "b.f16": raw(half[:77], "F16"),
        "c.f32": raw(single, "F32"),
        "position_ids": ("I64", (4,), np.arange(4, dtype=np.int64).tobytes()),
        "scale": raw(np.array(0x3F80 + step, np.uint16), "BF16"),
        "empty": ("F32", (2, 0, 3), b""),
        "double": ("F64", (2,), np.array([1.5, np.nan]).tobytes()),
        "eighth": ("F8_E4M3", (9,), bytes(range(100, 109))),
        "frozen": raw(np.array([0x8000, 0x7FC1, 0x7F80], np.uint16), "BF16"),
    }


def test_a_model_of_many_dtypes_comes_back(tmp_path: Path) -> None:
    sources = write_steps(tmp_path, {step: mixed_tensors(step) for step in range(4)})
    rs.build_store(sources[0], tmp_path / "run", tmp_path / "store")
    assert_exports(tmp_path / "store", sources, tmp_path / "out")


def test_headers_of_any_look_come_back(tmp_path: Path) -> None:
    looks: dict[int, dict[str, Any]] = {
        0: {},
        1: {"padding": 0},
        2: {"padding": 5, "metadata": {"format": "pt", "note": "n\u00f6te \u2713"}},
        3: {"order": sorted(mixed_tensors(0), reverse=True), "padding": 3},
        4: {"metadata": {}},
    }
    sources = {}
    for step, look in looks.items():
        sources[step] = tmp_path / (f"run/step_{step}" if step else "base")
        write_safetensors(sources[step] / "model.safetensors", mixed_tensors(step), **look)
    rs.build_store(sources[0], tmp_path / "run", tmp_path / "store")
    assert_exports(tmp_path / "store", sources, tmp_path / "out")


@pytest.mark.parametrize("head_in_base", [True, False])
def test_tied_heads_are_where_each_side_had_them(tmp_path: Path, head_in_base: bool) -> None:
    steps = {}
    for step in range(4):
        embedding = raw(np.arange(0x3C00 + step, 0x3C00 + step + 60).astype(np.uint16), "BF16")
        steps[step] = {"model.embed_tokens.weight": embedding}
        if head_in_base == (step == 0):
            steps[step]["lm_head.weight"] = embedding
    sources = write_steps(tmp_path, steps)
    rs.build_store(sources[0], tmp_path / "run", tmp_path / "store")
    assert_exports(tmp_path / "store", sources, tmp_path / "out")


def test_side_files_belong_to_their_step(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2), tensors=SHAPES)
    (run.base / "chat_template.jinja").write_text("{{ messages }}\n")
    (run.base / "empty.txt").write_bytes(b"")
    first, second = run.directories[1], run.directories[2]
    (first / "tokenizer.json").write_bytes(bytes(range(256)) * 300)
    (second / "trainer_state.json").write_text(json.dumps({"step": 2}))
    (second / "config.json").write_text('{"changed": true}')
    # Not part of a checkpoint: state, and what other programs leave.
    (second / "optimizer.pt").write_bytes(b"state")
    (second / "model.safetensors.lock").write_bytes(b"")
    summary = rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    assert summary.skipped_files == ("model.safetensors.lock", "optimizer.pt")
    for name in summary.skipped_files:
        (second / name).unlink()
    assert_exports(tmp_path / "store", run.directories, tmp_path / "out")


def test_more_steps_than_a_group_appended_bit_by_bit(tmp_path: Path) -> None:
    run = make_trajectory(
        tmp_path, steps=range(1, 36), tensors={"w": (40, 9), "b": (7,)}, change_share=0.02
    )
    store = tmp_path / "store"
    for steps in ("1:3", "4", "5:20", "21:35"):
        rs.build_store(run.base, run.checkpoints, store, steps=steps)
    assert_exports(store, run.directories, tmp_path / "out")
    rs.drop(store, after=18)
    rs.build_store(run.base, run.checkpoints, store)
    chosen = {step: run.directories[step] for step in (0, 1, 16, 17, 18, 19, 35)}
    assert_exports(store, chosen, tmp_path / "again")


def test_an_existing_directory_is_never_replaced(tmp_path: Path) -> None:
    run: Trajectory = make_trajectory(tmp_path, steps=(1, 2), tensors=SHAPES)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    out = tmp_path / "out"
    rs.export(tmp_path / "store", out, step=1)
    for step in (1, 2):
        with pytest.raises(rs.OutputError, match="exists; name another directory"):
            rs.export(tmp_path / "store", out, step=step)
    assert digests(out) == digests(run.directories[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "checkpoints",
        "out",
        "store",
    ]


def test_damage_in_the_store_is_named_and_nothing_is_exported(tmp_path: Path) -> None:
    run = make_trajectory(
        tmp_path, steps=(1, 2), tensors={"w": (50, 40)}, change_share=0.2, checkpoint_shards=1
    )
    store = tmp_path / "store"
    rs.build_store(run.base, run.checkpoints, store)
    (chunk,) = (
        path
        for path in (store / "deltas").rglob("*")
        if path.is_file() and path.name != "zarr.json"
    )
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(rs.CorruptionError, match=r"step 2, tensor w, block 0"):
        rs.export(store, tmp_path / "out", step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoints", "store"]
    # Frames of earlier steps are whole.
    rs.export(store, tmp_path / "out", step=1)
    assert digests(tmp_path / "out") == digests(run.directories[1])


@pytest.mark.parametrize(("step", "read"), [(0, "base_bits"), (2, "bits_at")])
def test_bits_that_are_not_those_ingested_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, read: str
) -> None:
    """The last line of defence: the CRC-32C of the source, whatever went wrong before it."""
    run = make_trajectory(tmp_path, steps=(1, 2), tensors=SHAPES)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    faithful = getattr(BlockReader, read)

    def unfaithful(self: BlockReader, at: BlockOf, *arguments: object) -> object:
        bits = faithful(self, at, *arguments)
        bits[-1] ^= 1
        return bits

    monkeypatch.setattr(BlockReader, read, unfaithful)
    what = rf"step {step}, tensor .*, block .* as it was ingested"
    with pytest.raises(rs.CorruptionError, match=what):
        rs.export(tmp_path / "store", tmp_path / "out", step=step)
    assert not (tmp_path / "out").exists()


# --- refused before anything is written ----------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """A run of F32 weights over a BF16 base, and its store beside them."""
    root = tmp_path_factory.mktemp("small")
    shapes = {"a.weight": (40, 30), "b": (7,)}
    run = make_trajectory(root, steps=(1, 2), dtype="F32", base_dtype="BF16", tensors=shapes)
    rs.build_store(run.base, run.checkpoints, root / "store")
    return run


def store_of(run: Trajectory) -> Path:
    return run.base.parent / "store"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("store/out", "OUT .* lies inside STORE"),
        ("base/out", "OUT .* lies inside the base"),
        ("store", "OUT .* lies inside STORE"),
        (".", "STORE .* lies inside OUT"),
    ],
)
def test_nothing_is_written_into_the_store_or_the_base(
    small: Trajectory, place: str, message: str, several: bool
) -> None:
    out = small.base.parent / place
    export = partial(rs.export_steps, steps="1:2") if several else partial(rs.export, step=1)
    with pytest.raises(rs.OptionError, match=message):
        export(store_of(small), out)
    assert not (out / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "gguf"}, "--format must be one of ingested, hf, not gguf"),
        ({"cast": "fp8", "file_format": "hf"}, "--as must be bf16, not fp8"),
        ({"cast": "bf16"}, "--as goes with --format hf"),
    ],
)
def test_formats_that_there_are_not(
    small: Trajectory, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(rs.OptionError, match=message):
        rs.export(store_of(small), tmp_path / "out", step=1, **options)


@pytest.mark.parametrize("steps", ["1,7", "7"])
def test_steps_named_one_by_one_must_be_there(
    small: Trajectory, tmp_path: Path, steps: str
) -> None:
    with pytest.raises(rs.OptionError, match="step 7"):
        rs.export_steps(store_of(small), tmp_path / "out", steps=steps)
    with pytest.raises(rs.OptionError, match=r"--steps 5:9: none of them .* it holds step 1, 2"):
        rs.export_steps(store_of(small), tmp_path / "out", steps="5:9")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_before_the_first_byte(
    small: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = rs.export(store_of(small), tmp_path / "one", step=1).bytes_written
    store, usage = store_of(small), SimpleNamespace(free=wanted - 1)
    monkeypatch.setattr("relex_stream.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(rs.OutputError, match=f"needs {wanted} bytes, .* has {wanted - 1} free"):
        rs.export(store, tmp_path / "out", step=1)
    usage.free = 2 * wanted - 1
    rs.export(store, tmp_path / "two", step=1)
    with pytest.raises(rs.OutputError, match=f"needs {2 * wanted} bytes"):
        rs.export_steps(store, tmp_path / "out", steps="1:2")
    assert not (tmp_path / "out").exists()
    usage.free += 1
    assert rs.export_steps(store, tmp_path / "out", steps="1:2").bytes_written == 2 * wanted


def test_a_cast_needs_a_base_of_bf16(tmp_path: Path) -> None:
    for dtype, base_dtype, told in (
        ("F32", "F16", "tensor a is F16 in the base"),
        ("F16", "F16", "has nothing in it; export it without --as"),
    ):
        root = tmp_path / dtype
        run = make_trajectory(
            root,
            steps=(1, 2),
            dtype=dtype,
            base_dtype=base_dtype,
            tensors={"a": (30, 9)},
            change_share=0.5,
        )
        rs.build_store(run.base, run.checkpoints, root / "store")
        options = {"step": 1, "file_format": "hf", "cast": "bf16"}
        with pytest.raises(rs.OptionError, match=told):
            rs.export(root / "store", root / "out", **options)  # type: ignore[arg-type]
        assert not (root / "out").exists()
