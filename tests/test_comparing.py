"""Every bit of a checkpoint is compared with the store, and each difference is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import pagecache
from relex_stream.comparing import BlockComparison, Comparison, compare_step
from relex_stream.errors import MemoryLimitError, OptionError, SourceError
from relex_stream.sources import open_checkpoint
from relex_stream.specs import Box, Piece, SourceCheckpoint, WeightsFile
from relex_stream.store import Store, arrays
from relex_stream.store.read import blob_key
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model
from tests.make_stores import build_store

SHAPES = {"big.weight": (37, 64), "bias": (1009,), "norm.weight": (24,), "scale": (), "no": (0, 4)}
IDS = raw(np.arange(700, dtype=np.uint64), "I64")
STEP = 3


def made(
    root: Path, dtype: str = "BF16", base_dtype: str = "BF16", **options: object
) -> Trajectory:
    run = make_trajectory(
        root,
        steps=range(1, 5),
        tensors=SHAPES,
        constants={"ids": IDS},
        dtype=dtype,
        base_dtype=base_dtype,
        change_share=0.1,
    )
    build_store(run.base, run.checkpoints, root / "run.store", block_bytes=512, **options)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return made(tmp_path_factory.mktemp("run"))


def compare(run: Trajectory, directory: Path, step: int = STEP, **options: object) -> Comparison:
    store = Store(run.base.parent / "run.store")
    return compare_step(store, open_checkpoint(directory, step), **options)  # type: ignore[arg-type]


def copy_of(run: Trajectory, place: Path, step: int = STEP) -> Path:
    return Path(shutil.copytree(run.directories[step], place / "copy", symlinks=True))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "dtypes", [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")], ids="/".join
)
@pytest.mark.parametrize("include_base", [False, True])
def test_every_step_is_as_its_source(tmp_path, dtypes, include_base):
    run = made(tmp_path, *dtypes, include_base=include_base)
    for step, directory in run.directories.items():
        if step:
            comparison = compare(run, directory, step)
            assert comparison.problems == ()
            sizes = [path.stat().st_size for path in directory.iterdir()]
            headers = sum(
                8 + int.from_bytes(path.read_bytes()[:8], "little")
                for path in directory.glob("*.safetensors")
            )
            assert comparison.compared_bytes == sum(sizes) - headers


@settings(max_examples=15, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 1))
def test_any_flipped_bit_of_a_tensor_is_found_where_it_is(tmp_path_factory, run, place, bit, shard):
    copy = copy_of(run, tmp_path_factory.mktemp("flipped"))
    path = sorted(copy.glob("*.safetensors"))[shard]
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    position = start + int(place * (len(data) - start))
    data[position] ^= 1 << bit
    path.write_bytes(data)
    source = open_checkpoint(copy, STEP)
    (name, at), *_ = [
        (name, at)
        for name, at in source.tensors.items()
        if at.path == str(path) and at.offset <= position < at.offset + at.spec.nbytes
    ]
    itemsize = 1 if name == "ids" else at.spec.dtype.itemsize
    element = (position - at.offset) // itemsize
    (problem,) = compare(run, copy).problems
    assert problem.startswith(f"step 3: tensor {name}, block {element // (512 // itemsize)}: 1 of ")
    assert problem.endswith(f"not as in {path}, the first is element {element}")


def test_each_block_that_differs_is_named(tmp_path, run):
    copy = copy_of(run, tmp_path)
    source = open_checkpoint(copy, STEP)
    at = source.tensors["big.weight"]
    for element in (0, 300, 301):
        flip(Path(at.path), at.offset + 2 * element)
    problems = compare(run, copy).problems
    assert len(problems) == 2
    assert "block 0: 1 of 256 elements" in problems[0]
    assert "block 1: 2 of 256 elements" in problems[1]
    assert problems[1].endswith("element 300")


def test_the_checkpoint_of_another_step_differs(run):
    assert compare(run, run.directories[STEP - 1]).problems


def test_side_files_are_compared_by_content(tmp_path, run):
    copy = copy_of(run, tmp_path)
    (copy / "config.json").write_text("{}")
    (copy / "generation_config.json").unlink()
    (copy / "new.txt").write_text("new")
    assert compare(run, copy).problems == (
        f"step 3: {copy}: file config.json differs from the one in the store",
        f"step 3: {copy} has file new.txt, which is not in the store",
        f"step 3: {copy} has no file generation_config.json, which is in the store",
    )


def test_a_header_with_other_bytes_is_a_difference(tmp_path, run):
    copy = copy_of(run, tmp_path)
    path = sorted(copy.glob("*.safetensors"))[0]
    data = path.read_bytes()
    assert data.count(b'"pt"') == 1
    path.write_bytes(data.replace(b'"pt"', b'"pT"'))
    (problem,) = compare(run, copy).problems
    assert problem == f"step 3: {copy}: file {path.name} differs from the one in the store"


@pytest.mark.parametrize("what", ["lacks tensor bias", "has tensor more", "expected BF16"])
def test_a_checkpoint_of_another_model_is_one_problem(tmp_path, run, what):
    tensors = {name: raw(bits, "BF16") for name, bits in run.bits[STEP].items()}
    tensors |= {"ids": IDS}
    if what == "lacks tensor bias":
        del tensors["bias"]
    elif what == "has tensor more":
        tensors["more"] = raw(np.zeros(3, np.uint16), "BF16")
    else:
        tensors["big.weight"] = raw(run.bits[STEP]["big.weight"].T.copy(), "BF16")
    (problem,) = compare(run, write_model(tmp_path / "other", tensors)).problems
    assert problem.startswith("step 3: ")
    assert what in problem


def test_weights_that_were_cast_are_compared_as_rounded(tmp_path):
    run = made(tmp_path, "F32", "BF16", cast="bf16")
    assert compare(run, run.directories[4], 4, cast=True).problems == ()
    # Who has not asked for it would take them for stored as they are.
    (problem,) = compare(run, run.directories[4], 4).problems
    assert problem.endswith("give --as bf16, as the store was begun")
    at = open_checkpoint(run.directories[4], 4).tensors["big.weight"]
    with Path(at.path).open("r+b") as file:
        file.seek(at.offset)
        file.write(np.array([1e9], np.float32).tobytes())
    (problem,) = compare(run, run.directories[4], 4, cast=True).problems
    assert "tensor big.weight, block 0: 1 of 256 elements" in problem


def split(run: Trajectory, place: Path, *, replica: bool) -> SourceCheckpoint:
    """Return a checkpoint whose large tensor lies in two pieces, and perhaps in a third again."""
    copy = copy_of(run, place)
    opened = open_checkpoint(copy, STEP)
    bits = run.bits[STEP]["big.weight"]
    rows = {"low": bits[:20], "high": bits[20:], "again": bits[10:30]}
    starts = {"low": 0, "high": 20, "again": 10}
    boxes = {name: Box((starts[name], 0), part.shape) for name, part in rows.items()}
    for name, part in rows.items():
        (copy / name).write_bytes(part.tobytes())
    pieces = {name: Piece(str(copy / name), 0, boxes[name]) for name in rows}
    place_of = opened.tensors["big.weight"]._replace(pieces=(pieces["low"], pieces["high"]))
    files = [
        WeightsFile(name, (copy / name).stat().st_size, (copy / name).stat().st_mtime_ns, None)
        for name in rows
    ]
    return SourceCheckpoint(
        opened.step,
        opened.directory,
        {**opened.tensors, "big.weight": place_of},
        (*opened.weights_files, *files),
        opened.side_files,
        (),
        {"big.weight": (pieces["again"],)} if replica else {},
    )


@pytest.mark.parametrize(("name", "row"), [("low", 3), ("high", 25), ("again", 25)])
def test_pieces_and_copies_of_them_are_compared(tmp_path, run, name, row):
    source = split(run, tmp_path, replica=True)
    store = Store(run.base.parent / "run.store")
    assert compare_step(store, source).problems == ()
    flip(Path(source.directory) / name, 2 * 64 * (row - {"low": 0, "high": 20, "again": 10}[name]))
    files = tuple(
        replace(file, modified_ns=(Path(source.directory) / file.relative_path).stat().st_mtime_ns)
        for file in source.weights_files
    )
    (problem,) = compare_step(store, replace(source, weights_files=files)).problems
    assert f"tensor big.weight, block {row * 64 // 256}: 1 of" in problem
    assert problem.endswith(f"the first is element {row * 64}")


@pytest.mark.parametrize("size", [(8, 16), (64, 64)], ids=["in a strip", "of several blocks"])
def test_tied_heads_are_compared_with_what_they_are_tied_to(tmp_path, size):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    shapes = {embedding: size, "a": (9,), "z": (9,)}
    run = make_trajectory(tmp_path, steps=(1, 2), tensors=shapes, change_share=0.3)
    for step in run.steps:
        tensors = {name: raw(bits, "BF16") for name, bits in run.bits[step].items()}
        tensors[head] = tensors[embedding]
        shutil.rmtree(run.directories[step])
        write_model(run.directories[step], tensors)
    build_store(run.base, run.checkpoints, tmp_path / "run.store", block_bytes=1024)
    assert compare(run, run.directories[2], 2).problems == ()
    at = open_checkpoint(run.directories[2], 2).tensors[head]
    flip(Path(at.path), at.offset + at.spec.nbytes - 2)
    (problem,) = compare(run, run.directories[2], 2).problems
    assert problem.startswith(f"step 2: tensor {head}, block {(size[0] * size[1] - 1) // 512}:")
    # And where the checkpoint holds the head alone.
    tensors = {name: raw(bits, "BF16") for name, bits in run.bits[2].items()}
    tensors[head] = tensors.pop(embedding)
    alone = compare(run, write_model(tmp_path / "alone", tensors), 2).problems
    assert not [problem for problem in alone if ": tensor" in problem or "has tensor" in problem]


def test_damage_in_the_store_is_a_problem_and_no_error(tmp_path):
    run = made(tmp_path)
    store = Store(tmp_path / "run.store")
    tensor = store.tensors["big.weight"]
    flip(store.path / arrays.chunk_key(arrays.DELTAS, tensor, 0, 1), -3)
    (problem,) = compare(run, run.directories[4], 4).problems
    assert "step 4, tensor big.weight, block 1" in problem
    config = store.commit(3).files
    blob = next(entry.blob for entry in config if entry.path == "config.json")
    header = next(part.blob for entry in config if entry.recipe for part in store.recipe(entry))
    assert header is not None
    assert blob is not None
    flip(store.path / blob_key(blob), 0)
    flip(store.path / blob_key(header), 30)
    problems = compare(run, run.directories[4], 4).problems
    assert any("file model-0000" in p and "does not match" in p for p in problems)
    assert any(
        "file config.json" in problem and "does not match" in problem for problem in problems
    )


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path, run):
    copy = copy_of(run, tmp_path)
    source = open_checkpoint(copy, STEP)
    path = Path(source.weights_paths[0])
    path.write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match="changed while it was being read"):
        compare_step(Store(run.base.parent / "run.store"), source)


def test_a_source_that_changes_once_it_was_read_is_an_error(tmp_path, run, monkeypatch):
    source = open_checkpoint(copy_of(run, tmp_path), STEP)
    finish = BlockComparison.finish

    def and_touch(*arguments: Any, **options: Any) -> Any:
        Path(source.weights_paths[0]).touch()
        return finish(*arguments, **options)

    monkeypatch.setattr(BlockComparison, "finish", and_touch)
    with pytest.raises(SourceError, match="changed while it was being read"):
        compare_step(Store(run.base.parent / "run.store"), source)


def test_a_side_file_that_is_gone_meanwhile_is_an_error(tmp_path, run):
    copy = copy_of(run, tmp_path)
    source = open_checkpoint(copy, STEP)
    (copy / "config.json").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        compare_step(Store(run.base.parent / "run.store"), source)


def test_a_step_that_is_not_stored_is_refused(run):
    with pytest.raises(OptionError, match="step 9 is not in"):
        compare(run, run.directories[STEP], 9)


def test_work_that_does_not_fit_is_refused(run):
    with pytest.raises(MemoryLimitError):
        compare(run, run.directories[STEP], memory_limit=1 << 20)


def test_what_is_compared_comes_from_the_disk(monkeypatch, run):
    forgotten: list[str] = []
    monkeypatch.setattr("relex_stream.comparing.forget", forgotten.append)
    compare(run, run.directories[STEP])
    store = Store(run.base.parent / "run.store")
    assert {str(path) for path in run.directories[STEP].iterdir()} <= set(forgotten)
    changed = store.frame_bytes[STEP - 1]
    chunks = [
        f"{store.path}/{arrays.chunk_key(arrays.DELTAS, tensor, 0, block)}"
        for tensor in store.manifest.tensors
        for block in range(tensor.blocks)
        if changed[tensor.first_block + block]
    ]
    assert chunks
    assert set(chunks) <= set(forgotten)


def test_files_with_state_inside_are_compared_by_their_tensors_alone(tmp_path, run):
    opened = open_checkpoint(run.directories[STEP], STEP)
    files = tuple(
        type(file)(file.relative_path, file.size, file.modified_ns, None)
        for file in opened.weights_files
    )
    source = SourceCheckpoint(
        opened.step, opened.directory, opened.tensors, files, opened.side_files, ()
    )
    problems = compare_step(Store(run.base.parent / "run.store"), source).problems
    # Such a file is not one that the store puts together; here it was.
    assert all("which is in the store" in problem for problem in problems)
    assert len(problems) == 2


def test_forgetting_is_advice(tmp_path):
    pagecache.forget(str(tmp_path / "missing"))
    (tmp_path / "there").write_bytes(b"x" * 10000)
    pagecache.forget(str(tmp_path / "there"))
    assert (tmp_path / "there").read_bytes() == b"x" * 10000
