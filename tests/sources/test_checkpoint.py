import json
import os
import subprocess
import sys

import pytest

from relex_stream.errors import RelexStreamWarning, SourceError
from relex_stream.sources import open_checkpoint
from relex_stream.sources.checkpoint import INDEX_FILE, SINGLE_FILE, holds_weights
from relex_stream.sources.side_files import MAX_SIDE_FILE_BYTES
from tests.make_checkpoints import SIDE_FILES, make_trajectory, raw, write_model, write_safetensors

TENSORS = {
    "a": ("F32", (2,), b"aaaabbbb"),
    "b": ("BF16", (), b"xy"),
    "c": ("U8", (0,), b""),
    "d": ("U8", (3,), b"123"),
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def read_tensor(place):
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        return file.read(place.spec.nbytes)


def refuse(directory, match):
    with pytest.raises(SourceError, match=match) as caught:
        open_checkpoint(directory, 1)
    assert str(directory) in str(caught.value)


def edit_index(directory, change):
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path):
    return write_model(tmp_path / "sharded", TENSORS, shards=2)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_opens(tmp_path, shards):
    directory = write_model(tmp_path / "model", TENSORS, shards=shards)
    checkpoint = open_checkpoint(directory, 7)
    assert checkpoint.step == 7
    assert checkpoint.directory == str(directory)
    assert {name: read_tensor(place) for name, place in checkpoint.tensors.items()} == {
        name: data for name, (_, _, data) in TENSORS.items()
    }
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert [file.relative_path for file in checkpoint.weights_files] == files
    assert checkpoint.nbytes == sum((directory / name).stat().st_size for name in files)
    index = [INDEX_FILE] if shards > 1 else []
    assert list(checkpoint.side_files) == sorted([*SIDE_FILES, *index])
    assert checkpoint.skipped_files == ()


def test_trajectory_holds_what_it_says(tmp_path):
    run = make_trajectory(tmp_path, steps=(1, 4), constants={"ids": ("I64", (2,), bytes(16))})
    assert run.steps == (1, 4)
    for step, directory in run.directories.items():
        checkpoint = open_checkpoint(directory, step)
        assert set(checkpoint.tensors) == {*run.bits[step], "ids"}
        for name, bits in run.bits[step].items():
            code, shape, data = raw(bits, run.dtype)
            place = checkpoint.tensors[name]
            assert (place.spec.dtype.code, place.spec.shape) == (code, shape)
            assert read_tensor(place) == data


def test_relative_directory(tmp_path, monkeypatch):
    write_model(tmp_path / "model", TENSORS)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(type(tmp_path)("model"), 0).directory == str(tmp_path / "model")


def test_links_are_followed(tmp_path):
    blobs = write_model(tmp_path / "blobs", TENSORS, shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    checkpoint = open_checkpoint(snapshot, 0)
    assert checkpoint.side_files == tuple(sorted([*SIDE_FILES, INDEX_FILE]))
    assert read_tensor(checkpoint.tensors["a"]) == b"aaaabbbb"
    (blobs / SHARDS[1]).unlink()
    refuse(snapshot, rf"{SHARDS[1]} \(a link to a file that is gone\).* is missing")


def test_side_files_are_sorted_out(tmp_path):
    directory = write_model(tmp_path / "model", TENSORS)
    kept = [
        *(".gitattributes", "README.md", "chat_template.jinja", "merges.txt", "tokenizer.json"),
        *("tokenizer.model", "trainer_state.json", "vocab.json"),
    ]
    skipped = [
        *(".lock", ".metadata", "__0_0.distcp", "config.json.tmp", "consolidated.safetensors"),
        *("model.safetensors.incomplete", "optimizer.json", "optimizer.pt", "pytorch_model.bin"),
        *("rng_state_0.pth", "scheduler.pt", "state.ckpt", "tmp123", "training_args.bin"),
        *("x.lock", "notes.txt~"),
    ]
    for name in kept + skipped:
        (directory / name).write_bytes(b"{}")
    with (directory / "huge.txt").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES + 1)
    with (directory / "large.txt").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES)
    (directory / "broken.json").symlink_to(tmp_path / "nothing")
    (directory / "folder.json").mkdir()
    os.mkfifo(directory / "pipe.json")
    checkpoint = open_checkpoint(directory, 1)
    assert checkpoint.side_files == tuple(sorted([*SIDE_FILES, *kept, "large.txt"]))
    assert checkpoint.skipped_files == tuple(sorted([*skipped, "huge.txt", "broken.json"]))


def test_side_file_that_could_not_be_exported(tmp_path):
    directory = write_model(tmp_path / "model", TENSORS)
    (directory / "a\\b").write_bytes(b"")
    refuse(directory, "backslash; rename")


def test_missing_directory(tmp_path):
    refuse(tmp_path / "none", "no such directory")
    (tmp_path / "file").write_bytes(b"")
    refuse(tmp_path / "file", "a file where a directory belongs")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", f"looked for {SINGLE_FILE} and {INDEX_FILE}, found nothing")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], r"PyTorch weights \(pytorch_model.bin\); convert to safetensors"),
        (
            [f"model_world_size_8_rank_{rank}.pt" for rank in range(8)],
            r"FSDP shards \(model_world_size_8_rank_0.pt, .* and 3 more\); merge to safetensors",
        ),
        (["__0_0.distcp", ".metadata"], r"distributed checkpoint \(__0_0.distcp\); merge"),
        (["adapter_model.safetensors"], "an adapter without its model .*; merge it into its base"),
        (SHARDS, "shards without their index"),
        (["other.safetensors"], "name the model's file model.safetensors"),
        (["model.gguf"], "GGUF"),
        (["model.pt"], "PyTorch files"),
        (["model.pth"], "PyTorch files"),
        (["config.json", "notes.txt"], "found config.json, notes.txt; check the path"),
    ],
)
def test_other_formats_are_named(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert not holds_weights(tmp_path)
    refuse(tmp_path, message)


def test_missing_shard(sharded):
    (sharded / SHARDS[0]).unlink()
    refuse(sharded, f"shard {SHARDS[0]}, named by {INDEX_FILE}, is missing")
    (sharded / SHARDS[1]).unlink()
    refuse(sharded, f"shard {SHARDS[0]} and 1 more")


def test_single_file_beside_an_index(sharded):
    write_safetensors(sharded / SINGLE_FILE, TENSORS)
    with pytest.warns(RelexStreamWarning, match="the shards are read") as caught:
        checkpoint = open_checkpoint(sharded, 1)
    assert caught[0].filename == __file__
    assert [file.relative_path for file in checkpoint.weights_files] == SHARDS
    assert checkpoint.skipped_files == (SINGLE_FILE,)
    (sharded / SHARDS[0]).unlink()
    checkpoint = open_checkpoint(sharded, 1)
    assert [file.relative_path for file in checkpoint.weights_files] == [SINGLE_FILE]
    assert checkpoint.skipped_files == (SHARDS[1],)
    assert INDEX_FILE in checkpoint.side_files


def test_index_of_the_single_file(tmp_path):
    directory = write_model(tmp_path / "model", TENSORS)
    weight_map = dict.fromkeys(TENSORS, SINGLE_FILE)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(directory, 1).tensors) == set(TENSORS)


def test_tensor_in_two_shards(sharded):
    write_safetensors(sharded / SHARDS[1], TENSORS)
    refuse(sharded, f"tensor 'a' is also in .*{SHARDS[0]}")


def test_tensor_not_in_its_shard(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(new=SHARDS[0]))
    refuse(sharded, f"tensor 'new' is said to be in {SHARDS[0]}, which does not hold it")


def test_tensor_in_another_shard(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(a=SHARDS[1]))
    refuse(sharded, f"tensor 'a' is said to be in {SHARDS[1]}, but {SHARDS[0]} holds it")


def test_tensor_not_in_the_index(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("c"))
    refuse(sharded, f"{SHARDS[0]}: tensor 'c' is not in {INDEX_FILE}")


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../x.safetensors", "sub/x.safetensors", "a\\b", "", ".", "C:x", "a\0"]
)
def test_shard_names_stay_in_the_directory(sharded, shard):
    edit_index(sharded, lambda weight_map: weight_map.update(a=shard))
    refuse(sharded, "bad index: (unsafe path|shard .* is not in the same directory)")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no object 'weight_map'"),
        (b'{"weight_map": []}', "no object 'weight_map'"),
        (b'{"weight_map": {}}', "no object 'weight_map'"),
        (b'{"weight_map": {"a": 1}}', "tensor 'a' has 1 where a file belongs"),
        (b'{"weight_map": {"": "x"}}', "tensor name '' is empty"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "names 'a' twice"),
        (b'{"weight_map":' + b"[" * 10**5, "nested"),
        (b'{"weight_map": {"a": "\xff"}}', "not UTF-8"),
    ],
)
def test_bad_index(sharded, content, problem):
    (sharded / INDEX_FILE).write_bytes(content)
    refuse(sharded, problem)


def test_index_that_cannot_be_read(sharded):
    (sharded / INDEX_FILE).unlink()
    (sharded / INDEX_FILE).mkdir()
    refuse(sharded, "not a regular file")
    (sharded / INDEX_FILE).rmdir()
    (sharded / INDEX_FILE).symlink_to(sharded / "nothing")
    refuse(sharded, "cannot be read")


def test_bad_weights(tmp_path):
    directory = write_model(tmp_path / "model", {})
    refuse(directory, "hold no tensors")
    (directory / SINGLE_FILE).write_bytes(b"abc")
    refuse(directory, "truncated")


def test_imports_stay_light():
    code = "import sys, relex_stream.sources; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert not {"torch", "zarr", "dask", "numba"} & set(output.split())
