"""Every command on a store, a base and checkpoints of a local S3 server, by real requests."""

from __future__ import annotations

import json
import pickle
import threading
from collections import Counter

import click.testing
import numpy as np
import pytest
import zarr

import relex_stream as rs
from relex_stream import objects as objects_module
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import fetch_blocks
from relex_stream.blocks import BlockOf
from relex_stream.cli.main import cli
from relex_stream.errors import (
    CorruptionError,
    OptionError,
    RemoteError,
    SourceError,
    StoreError,
)
from relex_stream.locations import Url
from relex_stream.matching import match_checkpoint
from relex_stream.objects import NotAsExpectedError, Objects, objects_at
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader, Naming, find_checkpoints, open_checkpoint
from relex_stream.store import Store, StoreWriter, arrays, storage
from relex_stream.store.object_storage import ObjectStorage
from tests.crash.replay import read_tree, unsynced
from tests.crash.runs import build, tiny_trajectory
from tests.make_checkpoints import Trajectory
from tests.make_deltas import changed_run, grail_run, slime_run

STEPS = range(1, 19)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("run"), STEPS)


@pytest.fixture(scope="module")
def local(run):
    """A store of this machine, of all steps."""
    with unsynced():
        build(run.base, run.checkpoints, run.base.parent / "store", commit_steps=None)
    return run.base.parent / "store"


@pytest.fixture
def store(local, run, bucket, upload) -> Url:
    """The same store, copied to S3, beside its base."""
    upload(run.base, bucket / "run" / "base")
    return upload(local, bucket / "run" / "store")


def _objects(url: Url) -> dict[str, bytes]:
    there = objects_at(url)
    return {key: there.get(key) for key in there.listing()}


def run_cli(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, arguments, prog_name="relex-stream")


def _files(directory) -> dict[str, bytes]:
    return {key: data for key, data in read_tree(directory).items() if data is not None}


# --- stores --------------------------------------------------------------------------------------


def test_a_build_of_several_runs_has_the_bytes_of_a_local_one(run, local, bucket, upload):
    base = upload(run.base, bucket / "run" / "base")
    url = bucket / "run" / "store"
    for last in (3, 17, 18):
        build(base, run.checkpoints, url, steps=f"1:{last}", commit_steps=6)
    assert _objects(url) == _files(local)


def test_what_is_copied_there_or_back_is_the_same_store(run, local, store, tmp_path):
    assert rs.verify(str(store)).problems == ()
    build(store.parent / "base", run.checkpoints, store)  # nothing to add
    assert _objects(store) == _files(local)
    copy = tmp_path / "run" / "store"
    for key, data in _objects(store).items():
        (copy / key).parent.mkdir(parents=True, exist_ok=True)
        (copy / key).write_bytes(data)
    assert rs.verify(copy, base=run.base).problems == ()


def test_what_is_damaged_there_is_rebuilt_and_earlier_writers_are_kept_out(run, local, store):
    objects = objects_at(store)
    chunks = [key for key in objects.listing() if "/c." in key]
    (blob,) = [key for key in objects.listing() if key.startswith("blobs/")][:1]
    objects.put(chunks[0], objects.get(chunks[0])[:-5])
    objects.remove_if(chunks[1], objects.get_version(chunks[1])[1])
    objects.put(chunks[2], objects.get(chunks[2]) + b"frames of a writer that is not done")
    objects.put(blob, b"x" * len(objects.get(blob)))
    objects.remove_if("zarr.json", objects.get_version("zarr.json")[1])
    left = str(run.checkpoints)
    found = rs.verify(str(store), against=left)
    assert found.problems
    assert found.repaired == ()
    before = Store(store).head.fence
    done = rs.verify(str(store), against=left, base=run.base, repair=True)
    assert done.problems == ()
    assert done.repaired == tuple(sorted([chunks[0], chunks[1], blob, "zarr.json"]))
    # A writer that was given up for dead has read the HEAD before; it cannot replace this one.
    assert Store(store).head.fence not in (None, before)
    there, expected = _objects(store), _files(local)
    extra = there[chunks[2]][len(expected[chunks[2]]) :]
    assert extra == b"frames of a writer that is not done"  # not damage, so not touched
    differ = {key for key in there | expected if there.get(key) != expected.get(key)}
    assert differ == {"HEAD", chunks[2]}


def test_every_command_reads_it(run, local, store, tmp_path):
    url = str(store)
    assert rs.info(url).steps == rs.info(local).steps
    assert rs.info(url).store_bytes == rs.info(local).store_bytes
    assert rs.verify(url, base=f"{store.parent}/base").problems == ()
    outputs = {}
    for name, place in (("s3", url), ("local", local)):
        out = tmp_path / name
        rs.export(place, out / "export", step=18)
        rs.extrapolate(place, out / "extrapolate", target_steps=[30])
        rs.combine(place, out / "combine", recipes=["ema:decay=0.5"])
        rs.sweep(place, out / "sweep", grid=[{"target_step": 20}, {"target_step": 25}])
        outputs[name] = {k: v for k, v in _files(out).items() if k.endswith(".safetensors")}
        outputs[name]["analysis"] = repr(rs.analyze(place).model)
    assert outputs["s3"] == outputs["local"]
    assert (
        outputs["s3"]["export/model.safetensors"]
        == (run.checkpoints / "global_step_18" / "huggingface" / "model.safetensors").read_bytes()
    )


def test_drop_and_append(run, local, store):
    assert rs.drop(str(store), after=5).steps_left == tuple(STEPS[:5])
    assert rs.verify(str(store)).problems == ()
    build(store.parent / "base", run.checkpoints, store)
    there, here = _objects(store), _files(local)
    head = json.loads(there.pop("HEAD"))
    assert len(head.pop("fence")) == 32
    assert head["format"] == 2  # the first that has a fence
    before = json.loads(here.pop("HEAD"))
    assert {**head, "format": 1, "crc32c": 0} == {**before, "crc32c": 0}
    assert there == here


def test_zarr_opens_it(local, store):
    there, here = zarr.open(str(store), mode="r"), zarr.open(str(local), mode="r")
    names = list(here["deltas"].keys())
    assert sorted(there["deltas"].keys()) == sorted(names)
    for name in names:
        assert np.array_equal(there[f"deltas/{name}"][:], here[f"deltas/{name}"][:])


def test_an_opened_store_travels(local, store):
    opened, here = rs.open_store(str(store)), rs.open_store(local)
    name = next(name for name, tensor in opened.tensors.items() if tensor.kind == "tracked")
    again = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(again.checkpoint_bits(name, 18), here.checkpoint_bits(name, 18))
    inside = pickle.loads(pickle.dumps(Store(store)))
    assert np.array_equal(inside.frame_crc, Store(local).frame_crc)
    sketches, scales = inside.read_sketches(0, 0, 3)
    assert sketches.shape[:2] == (3, 0)
    assert scales.shape == (3, 0)
    assert np.array_equal(opened.to_dask(name).compute(), here.to_dask(name).compute())


def test_damage_is_named(store):
    objects = objects_at(store)
    chunk = next(key for key in objects.listing() if "/c.0." in key)
    data = objects.get(chunk)
    objects.put(chunk, data[:-1])
    assert any("cut short" in problem for problem in rs.verify(str(store)).problems)
    objects.remove_if(chunk, objects.info(chunk).version)
    assert any("is committed but missing" in problem for problem in rs.verify(str(store)).problems)
    objects.put(chunk, data)
    blob = next(key for key in objects.listing() if key.startswith("blobs/"))
    objects.remove_if(blob, objects.info(blob).version)
    assert any("is missing" in problem for problem in rs.verify(str(store)).problems)
    record = next(key for key in objects.listing() if key.startswith("commits/0"))
    objects.remove_if(record, objects.info(record).version)
    with pytest.raises(CorruptionError, match="is missing"):
        rs.info(str(store))


def test_of_two_writers_one_is_told_of_the_other(run, store):
    with StoreWriter(store), pytest.raises(StoreError, match=r"process \d+ on .*last heard of"):
        StoreWriter(store).__enter__()
    rs.drop(str(store), after=17)


def test_two_writers_without_a_lock_never_both_win(run, bucket, monkeypatch):
    """Both append another step to the same store, at once, by real requests."""
    monkeypatch.setattr("relex_stream.store.object_storage.LOCK_ENDS_S", -1.0)
    url = bucket / "store"
    build(run.base, run.checkpoints, url, steps="1:2")
    said: list[str] = []

    def append(step: int) -> None:
        try:
            build(run.base, run.checkpoints, url, steps=f"{step}")
            said.append("done")
        except (StoreError, RemoteError) as error:
            said.append(str(error))

    threads = [threading.Thread(target=append, args=(step,)) for step in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = rs.info(str(url)).steps
    assert [step.step for step in steps][:2] == [1, 2]
    assert len(steps) == 2 + said.count("done")
    assert rs.verify(str(url)).problems == ()


def test_a_lost_race_for_head_leaves_the_winner(run, store, monkeypatch):
    other = objects_at(store)
    put = ObjectStorage.replace_head

    def late(self, data, version):
        other.put("HEAD", other.get("HEAD") + b" \n")  # means the same, and is another version
        return put(self, data, version)

    rs.drop(str(store), after=16)
    monkeypatch.setattr(ObjectStorage, "replace_head", late)
    with pytest.raises(StoreError, match=r"has committed to s3://.*; run it again"):
        build(store.parent / "base", run.checkpoints, store)
    monkeypatch.undo()
    assert len(Store(store).steps) == 16
    build(store.parent / "base", run.checkpoints, store)
    assert rs.verify(str(store)).problems == ()


def test_blocks_are_asked_for_in_advance(store, monkeypatch):
    ranges = []
    get_range = Objects.get_range

    def counted(self, *arguments):
        ranges.append(arguments)
        return get_range(self, *arguments)

    monkeypatch.setattr(Objects, "get_range", counted)
    storage.storage_at.cache_clear()
    inside = Store(store)
    tensor = inside.tensors["a.weight"]
    assert inside.advise(tensor, 0, 18)
    expected = [
        (arrays.chunk_key(arrays.DELTAS, tensor, group, 0), 0, size)
        for group in range(2)
        if (size := inside.committed_bytes(tensor, 0, group))
    ]
    assert inside.read_frames(tensor, 0, 0, 18)
    assert sorted(ranges) == expected


def test_frames_are_asked_for_where_the_base_is_in_memory(store, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ObjectStorage, "advise", lambda self, key, offset, nbytes: asked.append(key) or True
    )
    storage.storage_at.cache_clear()
    inside = Store(store)
    monkeypatch.setattr(BaseWeights, "advise", lambda self, at: False)
    base = BaseWeights(inside, None, CheckpointReader())
    fetch_blocks(inside, base, 18, [(BlockOf(inside.tensors["a.weight"], 0),)])
    assert asked


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_are_found_and_read(run, bucket, upload):
    url = upload(run.checkpoints, bucket / "checkpoints")
    found = find_checkpoints(url)
    here = find_checkpoints(run.checkpoints)
    assert found.layout == here.layout
    assert [step for step, _ in found.checkpoints] == [step for step, _ in here.checkpoints]
    there = open_checkpoint(found.checkpoints[0][1], 1)
    same = open_checkpoint(here.checkpoints[0][1], 1)
    assert there.side_files == same.side_files
    assert {name: place.offset for name, place in there.tensors.items()} == {
        name: place.offset for name, place in same.tensors.items()
    }
    assert [file.parts for file in there.weights_files] == [
        file.parts for file in same.weights_files
    ]
    with CheckpointReader() as reader, CheckpointReader() as local_reader:
        reader.expect(there)
        assert reader.reading_bytes > 0
        for name, place in there.tensors.items():
            buffer, expected = (np.empty(place.spec.nbytes, np.uint8) for _ in range(2))
            if place.spec.nbytes:
                assert reader.advise(place.path, place.offset, place.spec.nbytes)
            reader.read(place.path, place.offset, buffer)
            local_reader.read(same.tensors[name].path, place.offset, expected)
            assert np.array_equal(buffer, expected), name
        reader.verify_unchanged()
        again = pickle.loads(pickle.dumps(reader))
        again.read(place.path, place.offset, buffer)


def test_a_store_is_built_from_checkpoints_there(run, local, bucket, upload, tmp_path):
    base = upload(run.base, bucket / "run" / "base")
    checkpoints = upload(run.checkpoints, bucket / "run" / "checkpoints")
    build(base, checkpoints, bucket / "run" / "store", steps="1:12", commit_steps=None)
    build(base, checkpoints, bucket / "run" / "store", commit_steps=4)
    assert _objects(bucket / "run" / "store") == _files(local)
    summary = rs.build_store(str(base), str(checkpoints), tmp_path / "store", steps="1:2")
    assert summary.steps_added == (1, 2)
    assert summary.layout == "global_step_N/huggingface"
    assert rs.verify(tmp_path / "store", base=str(base)).problems == ()


def test_objects_are_read_one_checkpoint_at_a_time(run, local, bucket, upload):
    """What the kernel is given of them lies in memory."""
    url = upload(run.checkpoints, bucket / "checkpoints")
    tensors = Store(local).manifest.tensors
    tensor = next(tensor for tensor in tensors if tensor.kind == "tracked")
    most = {}
    for directory in (url, run.checkpoints):
        opened = [
            open_checkpoint(path, step) for step, path in find_checkpoints(directory).checkpoints
        ]
        places = [match_checkpoint(checkpoint, tensors, "") for checkpoint in opened]
        blocks = SourceBlocks(CheckpointReader(), places)
        most[directory] = blocks.steps_at_a_time(BlockOf(tensor, 0))
    assert most[url] == 1 < most[run.checkpoints]


def test_other_formats_are_not_read_there(bucket):
    objects = objects_at(bucket / "checkpoints")
    objects.put("step_1/.metadata", b"")
    objects.put("step_1/__0_0.distcp", b"")
    found = find_checkpoints(bucket / "checkpoints")
    with pytest.raises(SourceError, match="only whole safetensors are read; copy"):
        found.open(found.checkpoints[0][1], 1, Naming())


@pytest.mark.parametrize(
    ("source", "publish", "wanted"),
    [
        ("auto", slime_run, "hold only what changed since another version; give a whole model"),
        ("auto", grail_run, "only whole safetensors are read; copy"),
        ("changed-safetensors", changed_run, "only whole safetensors are read; copy"),
    ],
)
def test_feeds_of_changes_are_not_read_there(
    source, publish, wanted, run, tmp_path, bucket, upload
):
    url = upload(publish(run, tmp_path / "feed"), bucket / "checkpoints")
    found = find_checkpoints(url, source=source)
    step, directory = found.checkpoints[0]
    with pytest.raises(SourceError, match=wanted):
        found.open(directory, step, Naming())


def test_a_checkpoint_that_changes_is_refused(run, bucket, upload):
    url = upload(run.checkpoints / "global_step_1" / "huggingface", bucket / "step")
    checkpoint = open_checkpoint(url, 1)
    name = checkpoint.weights_paths[0].rpartition("/")[2]
    objects = objects_at(url)
    data = bytearray(objects.get(name))
    data[-1] ^= 1
    buffer = np.empty(2, np.uint8)
    with CheckpointReader() as reader:
        reader.expect(checkpoint)
        reader.read(checkpoint.weights_paths[0], 8, buffer)
        objects.put(name, bytes(data))  # of the same size
        with pytest.raises(SourceError, match="changed while it was being read"):
            reader.verify_unchanged()
    with CheckpointReader() as reader:
        reader.expect(checkpoint)
        with pytest.raises(SourceError, match="changed while it was being read"):
            reader.read(checkpoint.weights_paths[0], 8, buffer)
    with CheckpointReader() as reader, pytest.raises(SourceError, match="truncated while reading"):
        reader.read(checkpoint.weights_paths[0], len(data) - 1, buffer)
    with CheckpointReader() as reader, pytest.raises(SourceError, match="cannot be read"):
        reader.read(f"{url}/gone.safetensors", 0, buffer)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model.safetensors", b"", "truncated: 0 bytes"),
        ("model.safetensors", b"version https://git-lfs", "a Git LFS pointer"),
        ("model.safetensors", (1 << 40).to_bytes(8, "little"), "announces a header"),
        ("model.safetensors", (100).to_bytes(8, "little") + b"{}", "truncated: 10 bytes"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "bad safetensors header"),
        ("model.safetensors.index.json", b"{", "bad index"),
        ("pytorch_model.bin", b"", "PyTorch weights"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(bucket, name, data, said):
    objects_at(bucket / "step").put(name, data)
    with pytest.raises(SourceError, match=said):
        open_checkpoint(bucket / "step", 1)


def test_a_directory_that_is_not_there_is_named(bucket):
    with pytest.raises(SourceError, match="no such directory"):
        open_checkpoint(bucket / "nothing", 1)
    with pytest.raises(SourceError, match="no such directory"):
        find_checkpoints(bucket / "nothing")


# --- objects -------------------------------------------------------------------------------------


def test_puts_with_conditions(bucket):
    objects = objects_at(bucket / "some")
    first = objects.put_if("a", b"1", None)
    assert objects.get_version("a") == (b"1", first)
    with pytest.raises(NotAsExpectedError):
        objects.put_if("a", b"2", None)
    second = objects.put_if("a", b"2", first)
    for version in (first, '"0"'):
        with pytest.raises(NotAsExpectedError):
            objects.put_if("a", b"3", version)
    with pytest.raises(NotAsExpectedError):
        objects.put_if("b", b"3", second)
    assert objects.get("a") == b"2"
    assert objects.info("a").version == second
    assert objects.listing()["a"].version == second
    with pytest.raises(NotAsExpectedError):
        objects.remove_if("a", first)
    objects.remove_if("a", second)
    with pytest.raises(FileNotFoundError):
        objects.get_version("a")


def test_ranges(bucket):
    objects = objects_at(bucket / "some")
    objects.put("a", b"0123456789")
    assert objects.get_range("a", 2, 3) == b"234"
    assert objects.get_range("a", 8, 5) == b"89"
    assert objects.get_range("a", 10, 5) == b""
    assert objects.get_range("a", 100, 5) == b""
    for key in ("b", "a/b"):
        with pytest.raises(FileNotFoundError):
            objects.get_range(key, 0, 1)


def test_names_and_sizes(bucket):
    objects = objects_at(bucket / "some")
    assert objects.names() == {}
    assert objects.listing() == {}
    objects_at(bucket).put("some-more/x", b"1")
    objects.put("a", b"12")
    objects.put("b/c/d", b"123")
    assert objects.names() == {"a": 2, "b": None}
    assert {key: info.size for key, info in objects.listing().items()} == {"a": 2, "b/c/d": 3}
    assert objects.info("a").modified_s > 1.6e9


def test_what_the_service_refuses_is_said_in_one_line(bucket, monkeypatch):
    objects = objects_at(Url.parse("s3://no-such-bucket-here/store"))
    for call in (objects.names, lambda: objects.get("HEAD"), lambda: objects.put("HEAD", b"")):
        with pytest.raises(RemoteError, match=r"s3://no-such-bucket-here.*no such bucket") as told:
            call()
        assert "\n" not in str(told.value)

    def refuse(*_, **__):
        raise PermissionError("Forbidden")

    objects = Objects(bucket / "store")
    monkeypatch.setattr(objects._fs, "cat_file", refuse, raising=False)
    with pytest.raises(RemoteError, match="AWS_PROFILE"):
        objects.get_range("HEAD", 0, 10)


def test_an_answer_that_breaks_off_is_asked_for_again(bucket, monkeypatch):
    objects = Objects(bucket / "store")
    objects.put("HEAD", b"data")
    call = objects._fs._call_s3
    broken = []

    class Body:
        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def read(self):
            raise RuntimeError("connection lost")

    async def breaks(*arguments, **keywords):
        answer = await call(*arguments, **keywords)
        if len(broken) < failures:
            broken.append(1)
            answer["Body"].close()
            return {**answer, "Body": Body()}
        return answer

    monkeypatch.setattr(objects._fs, "_call_s3", breaks)
    monkeypatch.setattr(objects_module, "_AGAIN_AFTER_S", (0.01, 0.01, 0))
    failures = 2
    assert objects.get("HEAD") == b"data"
    broken.clear()
    failures = 3
    with pytest.raises(RemoteError, match="connection lost; run it again"):
        objects.get("HEAD")


# --- the command line ----------------------------------------------------------------------------


def test_commands_take_urls(run, store, tmp_path):
    done = run_cli("info", str(store))
    assert done.exit_code == 0, done.output
    assert "18" in done.output
    done = run_cli("export", str(store), str(tmp_path / "out"), "--step", "3")
    assert done.exit_code == 0, done.output
    done = run_cli("export", str(store), f"{store}/out", "--step", "3")
    assert done.exit_code == 2
    assert "must be a directory of this machine" in done.output.replace("\n", " ")
    done = run_cli("info", f"{store.parent}/none")
    assert done.exit_code == 2
    assert "nothing is there" in done.output
    done = run_cli("info", "nope://bucket/store")
    assert done.exit_code == 2
    assert "no protocol 'nope'" in done.output


def test_outputs_at_urls_are_refused(store):
    for make in (
        lambda out: rs.export(str(store), out, step=1),
        lambda out: rs.extrapolate(str(store), out, target_steps=[20]),
        lambda out: rs.report(str(store), out),
    ):
        with pytest.raises(OptionError, match=r"must be a directory of this machine"):
            make("s3://bucket/out")


def test_nothing_is_left_open_where_nothing_is_written(store):
    counts = Counter(_objects(store))
    rs.verify(str(store))
    assert Counter(_objects(store)) == counts
    assert objects_module.objects_at(store) is objects_module.objects_at(store)
