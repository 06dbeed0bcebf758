"""The store as such: appending in any split, taking back, refusing, and naming what is damaged."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_stream import api
from relex_stream.errors import (
    CorruptionError,
    RelexStreamWarning,
    SourceError,
    StoreError,
)
from relex_stream.store import SketchReader, Store, StoreWriter, arrays, files
from relex_stream.store.read import blob_key
from relex_stream.store.records import decode_head, encode_head
from tests.crash.replay import read_tree, unsynced
from tests.crash.runs import build, check_dense, check_exports, check_whole, quick, tiny_trajectory
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model

STEPS = range(1, 19)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("run"), STEPS)


@pytest.fixture(scope="module")
def whole(run) -> Path:
    """A store of all steps, built at once. Nobody writes to it."""
    store = run.base.parent / "whole"
    with unsynced():
        build(run.base, run.checkpoints, store, commit_steps=None)
    return store


@pytest.fixture
def store(whole, request) -> Path:
    """A copy to spoil, beside the original, so that it finds its base."""
    copy = whole.with_name(f"copy-{abs(hash(request.node.nodeid))}")
    shutil.copytree(whole, copy)
    return copy


def _truth(run: Trajectory, steps: range = STEPS) -> dict[int, Trajectory]:
    return dict.fromkeys(steps, run)


# --- appending -----------------------------------------------------------------------------------


def test_store_is_whole(run, whole):
    check_whole(whole, _truth(run))


@pytest.mark.parametrize(
    "appended",
    [[1] * 18, [16, 2], [15, 1, 2], [17, 1], [3, 14, 1], [9, 9]],
    ids=lambda sizes: "+".join(map(str, sizes)) if len(set(sizes)) > 1 else None,
)
def test_any_split_gives_the_same_bytes(run, whole, appended):
    """Chunks, records with their sketches, blobs, HEAD: every file of the store."""
    store = whole.with_name(f"split-{'-'.join(map(str, appended))}")
    with unsynced():
        first = 1
        for size in appended:
            steps = f"{first}:{first + size - 1}"
            build(run.base, run.checkpoints, store, steps=steps, commit_steps=None)
            first += size
    assert read_tree(store) == read_tree(whole)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_split_into_runs_and_commits_gives_the_same_bytes(run, whole, data):
    store = whole.with_name("drawn")
    shutil.rmtree(store, ignore_errors=True)
    first = 1
    with quick(), unsynced():
        while first <= STEPS[-1]:
            stop = data.draw(st.integers(first, STEPS[-1]), label="last step of this run")
            commit_steps = data.draw(st.integers(1, 18), label="steps per commit")
            span = f"{first}:{stop}"
            build(run.base, run.checkpoints, store, steps=span, commit_steps=commit_steps)
            first = stop + 1
    assert read_tree(store) == read_tree(whole)


def test_workers_do_not_change_a_byte(run, whole):
    store = whole.with_name("workers")
    with unsynced():
        build(run.base, run.checkpoints, store, workers=3)
    assert read_tree(store) == read_tree(whole)


def test_sketches_are_those_of_the_records(whole):
    inside = Store(whole)
    tensors = [tensor for tensor in inside.tensors.values() if tensor.sketch_row >= 0]
    assert tensors
    reader = SketchReader(inside, len(STEPS))
    for tensor in tensors:
        sketch, scale = reader.read(tensor)
        for row in range(len(STEPS)):
            commit = inside.commit(row)
            assert np.array_equal(sketch[row], commit.sketch[tensor.sketch_row])
            assert scale[row] == commit.sketch_scale[tensor.sketch_row]


def test_append_skips_what_is_stored(run, store):
    before = read_tree(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = api.build_store(run.base, run.checkpoints, store)
    assert summary.steps_added == ()
    assert summary.steps_skipped == tuple(STEPS)
    assert read_tree(store) == before


def test_late_steps_are_left_out_with_a_warning(run):
    store = run.base.parent / "late"
    with unsynced():
        build(run.base, run.checkpoints, store, steps="2,5")
        with pytest.warns(RelexStreamWarning, match=r"goes to step 5: .*1.*4.*drop --after 0"):
            assert build(run.base, run.checkpoints, store, steps="1:6") == (6,)
    assert check_exports(store, _truth(run)) == (2, 5, 6)


def test_readers_keep_what_they_opened(run):
    store = run.base.parent / "growing"
    with unsynced():
        build(run.base, run.checkpoints, store, steps="1:5")
        opened = api.open_store(store)
        early = opened.checkpoint_bits("a.weight", 5)
        late = api.open_store(store)
        build(run.base, run.checkpoints, store)
    assert opened.steps == late.steps == (1, 2, 3, 4, 5)
    for step in opened.steps:
        bits = late.checkpoint_bits("a.weight", step)
        assert np.array_equal(bits, run.bits[step]["a.weight"])
    assert np.array_equal(opened.checkpoint_bits("a.weight", 5), early)


def test_reading_changes_nothing(run, store, tmp_path):
    before = read_tree(store)
    check_exports(store, _truth(run))
    api.verify(store)
    api.info(store)
    api.export(store, tmp_path / "out", step=3)
    api.extrapolate(store, tmp_path / "next", target_steps=[30])
    assert read_tree(store) == before


def test_store_can_be_pickled(whole):
    again = pickle.loads(pickle.dumps(Store(whole)))
    assert again.steps == tuple(STEPS)
    assert len(pickle.dumps(Store(whole))) < 1000


def test_a_pickled_store_has_the_tables_and_reads_no_sketches_for_them(whole, monkeypatch):
    store = Store(whole)
    again = pickle.loads(pickle.dumps(store))
    read = []
    preadv = os.preadv

    def count(descriptor, buffers, offset):
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", count)
    for name in ("frame_bytes", "frame_crc", "changed", "delta_sq"):
        assert np.array_equal(getattr(again, name), getattr(store, name))
    records = [(whole / name.path).read_bytes() for name in store.head.commits]
    headers = sum(8 + int.from_bytes(record[:8], "little") for record in records)
    columns = len(STEPS) * (12 * store.manifest.blocks + 8 * len(store.tensors))
    assert sum(read) == headers + columns


def test_a_store_is_pickled_only_if_its_records_are_whole(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    record = copy / Store(copy).head.commits[3].path
    data = bytearray(record.read_bytes())
    data[-1] ^= 1
    record.write_bytes(data)
    with pytest.raises(CorruptionError, match="does not match its checksum"):
        pickle.dumps(Store(copy))


# --- taking back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [17, 16, 15, 5, 1, 0])
def test_drop_and_build_again(run, whole, store, after):
    summary = api.drop(store, after=after)
    assert summary.steps_left == tuple(STEPS[:after])
    assert summary.steps_dropped == tuple(STEPS[after:])
    assert summary.bytes_freed > 0
    check_whole(store, _truth(run, STEPS[:after])) if after else None
    with unsynced():
        build(run.base, run.checkpoints, store)
    assert read_tree(store) == read_tree(whole)


def test_drop_of_nothing(store):
    before = read_tree(store)
    assert api.drop(store, after=18).steps_dropped == ()
    assert read_tree(store) == before


def test_drop_refuses_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="no store at"):
        api.drop(tmp_path / "nothing", after=1)
    with pytest.raises(StoreError, match="not a relex-stream store"):
        api.drop(tmp_path, after=1)
    assert list(tmp_path.iterdir()) == []


# --- what is no store, or of another format ------------------------------------------------------


def test_open_refuses_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="nothing is there"):
        Store(tmp_path / "missing")
    with pytest.raises(StoreError, match="has no HEAD"):
        Store(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(StoreError, match="not a relex-stream store"):
        Store(file)


def test_newer_format_is_refused_everywhere(run, store, tmp_path):
    head = json.loads((store / "HEAD").read_bytes())
    head["format"] = 3
    head["something new"] = {}
    (store / "HEAD").write_text(json.dumps(head))
    before = read_tree(store)
    for use in (
        lambda: api.open_store(store),
        lambda: api.verify(store),
        lambda: api.drop(store, after=3),
        lambda: api.export(store, tmp_path / "out", step=3),
        lambda: build(run.base, run.checkpoints, store),
    ):
        with pytest.raises(StoreError, match=r"has store format 3.*install a newer"):
            use()
    after = read_tree(store)
    # The lock may tell who tried; nothing else may change.
    del before["LOCK"], after["LOCK"]
    assert after == before


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_any_flipped_byte_of_head_is_found(store, flip):
    head = store / "HEAD"
    data = head.read_bytes()
    for at in range(len(data)):
        spoiled = bytearray(data)
        spoiled[at] ^= flip
        head.write_bytes(spoiled)
        with pytest.raises(StoreError):
            Store(store)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_head_cut_short_is_found(store, keep):
    head = store / "HEAD"
    head.write_bytes(head.read_bytes()[:keep])
    with pytest.raises(CorruptionError, match="HEAD"):
        Store(store)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_flipped_byte_of_a_record_is_named(store, tmp_path):
    inside = Store(store)
    name = inside.head.commits[6].path
    rng = random.Random(0)
    size = (store / name).stat().st_size
    for at in [0, 9, size - 1, *rng.sample(range(size), 20)]:
        _flip(store / name, at)
        problems = api.verify(store, workers=1).problems
        assert any("step 7" in problem and name in problem for problem in problems)
        with pytest.raises(CorruptionError, match=name):
            api.export(store, tmp_path / "out", step=7)
        _flip(store / name, at)
    assert api.verify(store).problems == ()


def test_flipped_byte_of_the_manifest_is_named(store):
    name = Store(store).head.manifest.path
    _flip(store / name, 500)
    with pytest.raises(CorruptionError, match=name):
        api.verify(store)


@pytest.mark.parametrize("step", [0, 2])
def test_weights_replaced_after_their_header_was_read_are_refused(tmp_path, monkeypatch, step):
    run = make_trajectory(tmp_path, steps=range(1, 4))
    path = min(run.directories[step].glob("*.safetensors"))

    def replace(*_, **__):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        status = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    # What a build does between the last header and the first weights.
    monkeypatch.setattr("relex_stream.graph.Threads.check_sees", replace)
    with pytest.raises(SourceError, match=f"{path}: changed while it was being read"):
        build(run.base, run.checkpoints, tmp_path / "store")
    assert not (tmp_path / "store" / "HEAD").exists()


def test_a_blob_is_written_again_once_it_was_swept(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        name = writer.put_blob(b"config")
        writer.sweep()
        assert not os.listdir(tmp_path / "store" / "blobs")
        assert writer.put_blob(b"config") == name
        assert (tmp_path / "store" / blob_key(name)).read_bytes() == b"config"


def test_flipped_byte_of_a_blob_is_named(store, run, tmp_path):
    inside = Store(store)
    entry = next(entry for entry in inside.commit(3).files if entry.blob is not None)
    _flip(inside.path / blob_key(entry.blob), 3)
    problems = api.verify(store).problems
    assert len(problems) == 1
    assert entry.path in problems[0]
    assert entry.blob in problems[0]
    with pytest.raises(CorruptionError, match=entry.blob):
        api.export(store, tmp_path / "out", step=4)
    assert not (tmp_path / "out").exists()


def test_flipped_byte_of_a_recipe_is_named(store, tmp_path):
    inside = Store(store)
    entry = next(entry for entry in inside.commit(3).files if entry.recipe is not None)
    _flip(inside.path / blob_key(entry.recipe), 3)
    assert any(entry.path in problem for problem in api.verify(store).problems)
    with pytest.raises(CorruptionError, match=entry.recipe):
        api.export(store, tmp_path / "out", step=4)


def test_flipped_byte_of_a_chunk_is_named(store, tmp_path):
    """Every byte of a chunk: verify names tensor, step and block; export of that step refuses."""
    inside = Store(store)
    tensor = inside.tensors["a.weight"]
    path = store / arrays.chunk_key(arrays.DELTAS, tensor, 0, 1)
    sizes = inside.frame_bytes[:16, tensor.first_block + 1]
    ends = np.cumsum(sizes)
    for at in range(0, path.stat().st_size, 3):
        step = STEPS[int(np.searchsorted(ends, at, side="right"))]
        _flip(path, at)
        (problem,) = api.verify(store, workers=1).problems
        assert "tensor a.weight, block 1" in problem
        assert re.search(rf"step {step}\b", problem)
        if at % 30 == 0:
            with pytest.raises(
                CorruptionError, match=rf"a\.weight.*step {step}\b|step {step}\b.*a\.weight"
            ):
                api.export(store, tmp_path / "out", step=step)
            with pytest.raises(
                CorruptionError, match=rf"a\.weight.*step {step}\b|step {step}\b.*a\.weight"
            ):
                api.open_store(store).checkpoint_bits("a.weight", 16)
            assert not (tmp_path / "out").exists()
        _flip(path, at)
    assert api.verify(store).problems == ()


def test_steps_before_a_damaged_frame_still_come_back(store, run):
    inside = Store(store)
    path = store / arrays.chunk_key(arrays.DELTAS, inside.tensors["b"], 0, 0)
    sizes = inside.frame_bytes[:16, inside.tensors["b"].first_block]
    last = int(np.flatnonzero(sizes)[-1])
    _flip(path, int(sizes[:last].sum()) + int(sizes[last]) // 2)
    opened = api.open_store(store)
    for step in STEPS[:last]:
        assert np.array_equal(opened.checkpoint_bits("b", step), run.bits[step]["b"])
    with pytest.raises(CorruptionError, match=rf"step {STEPS[last]}\b"):
        opened.checkpoint_bits("b", STEPS[last])


@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
def test_lost_chunks_are_named(store, run, tmp_path, damage):
    inside = Store(store)
    tensor = inside.tensors["a.weight"]
    key = arrays.chunk_key(arrays.DELTAS, tensor, 0, 2)
    path = store / key
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size - 1)
    (problem,) = api.verify(store).problems
    assert "tensor a.weight, block 2" in problem
    assert key in problem
    with pytest.raises(CorruptionError, match=r"c\.0\.2"):
        api.export(store, tmp_path / "out", step=16)
    # An append would have to read them too: it must not build on what is not there.
    build_more = tiny_trajectory(run.base.parent / "longer", range(1, 20))
    with pytest.raises(CorruptionError, match=r"c\.0\.2"):
        build(run.base, build_more.checkpoints, store)
    assert Store(store).steps == tuple(STEPS)


def test_swapped_chunks_are_refused(store, tmp_path):
    """Whole frames in the wrong place: their own checksums hold, those of the commits do not."""
    tensor = Store(store).tensors["a.weight"]
    one, other = (store / arrays.chunk_key(arrays.DELTAS, tensor, 0, block) for block in (0, 1))
    spare = store / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    with pytest.raises(CorruptionError, match=r"a\.weight"):
        api.export(store, tmp_path / "out", step=16)
    with pytest.raises(CorruptionError, match=r"a\.weight"):
        api.extrapolate(store, tmp_path / "out", target_steps=[30])
    problems = api.verify(store).problems
    for block in (0, 1):
        assert any(f"tensor a.weight, block {block}:" in problem for problem in problems)


def test_frames_alike_in_all_but_content_cannot_change_places(tmp_path):
    """Same row, same length, same number of changes: the commit's checksum tells them apart."""
    run = make_trajectory(tmp_path, steps=(1, 2), tensors={"a": (16,), "b": (16,)})
    for step, distance in ((1, 1), (2, 2)):
        moved = {name: run.bits[0][name].copy() for name in ("a", "b")}
        moved["a"][3] += distance
        moved["b"][9] += distance
        tensors = {name: raw(bits, "BF16") for name, bits in moved.items()}
        shutil.rmtree(run.directories[step])
        write_model(run.directories[step], tensors)
    store = tmp_path / "store"
    api.build_store(run.base, run.checkpoints, store)
    one, other = (store / "deltas" / name / "c.0.0" for name in ("a", "b"))
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    assert len(first) == len(second)
    one.write_bytes(second)
    other.write_bytes(first)
    problems = api.verify(store).problems
    for name in ("a", "b"):
        assert any(f"step 1, tensor {name}, block 0:" in problem for problem in problems)
        with pytest.raises(CorruptionError, match=f"step 1, tensor {name}, block 0"):
            api.open_store(store).checkpoint_bits(name, 1)
    with pytest.raises(CorruptionError, match="step 1, tensor"):
        api.extrapolate(store, tmp_path / "out", target_steps=[30])
    assert not (tmp_path / "out").exists()


def test_records_are_a_chain(store):
    head = decode_head((store / "HEAD").read_bytes())
    inside = Store(store)
    before = head.manifest.path
    for row, name in enumerate(head.commits):
        commit = inside.commit(row)
        assert (commit.step, commit.row, commit.previous) == (STEPS[row], row, before)
        before = name.path
    commits = list(head.commits)
    commits[4], commits[5] = commits[5], commits[4]
    swapped = type(head)(head.manifest, head.steps, tuple(commits))
    (store / "HEAD").write_bytes(encode_head(swapped))
    with pytest.raises(CorruptionError, match="does not follow"):
        Store(store).commit(4)
    # A record left out, which each of the others could not tell by itself.
    gap = type(head)(
        head.manifest, head.steps[:4] + head.steps[5:], head.commits[:4] + head.commits[5:]
    )
    (store / "HEAD").write_bytes(encode_head(gap))
    with pytest.raises(CorruptionError, match="does not follow"):
        Store(store).commit(4)


# --- one writer ----------------------------------------------------------------------------------


def test_second_writer_is_refused_in_this_process(run, store):
    with StoreWriter(store):
        before = read_tree(store)
        with pytest.raises(StoreError, match=f"another process.*process {os.getpid()}"):
            api.drop(store, after=3)
        with pytest.raises(StoreError, match="another process is writing"):
            build(run.base, run.checkpoints, store)
        assert read_tree(store) == before
    assert api.drop(store, after=17).steps_dropped == (18,)


def test_second_writer_is_refused_across_processes(store):
    code = """
import sys
from pathlib import Path
from relex_stream.store import StoreWriter
with StoreWriter(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"another process.*process {holder.pid}"):
            api.drop(store, after=3)
        assert Store(store).steps == tuple(STEPS)
        holder.communicate()
    assert api.drop(store, after=17).steps_dropped == (18,)


def test_lock_tells_a_clean_end_from_another(store):
    with StoreWriter(store):
        assert (store / "LOCK").read_text().startswith(f"process {os.getpid()} on ")
    assert (store / "LOCK").read_bytes() == b""

    class PretendedKillError(Exception):
        pass

    with pytest.raises(PretendedKillError), StoreWriter(store):
        raise PretendedKillError
    assert (store / "LOCK").read_text().startswith(f"process {os.getpid()} on ")


# --- what an unfinished run leaves, and what others put there ------------------------------------


@pytest.mark.parametrize("lock", ["unfinished", "missing"])
def test_leftovers_are_swept(store, whole, lock):
    tensor = Store(store).tensors["a.weight"]
    chunk = store / arrays.chunk_key(arrays.DELTAS, tensor, 1, 0)
    with chunk.open("ab") as file:
        file.write(b"half a frame")
    (store / arrays.chunk_key(arrays.DELTAS, tensor, 7, 0)).write_bytes(b"of an unfinished step")
    (store / "commits" / "000000000019-00000000.safetensors").write_bytes(b"torn")
    (store / "blobs" / ("0" * 64)).write_bytes(b"torn")
    (store / "HEAD.partial").write_bytes(b"torn")
    (store / "deltas" / "b" / "zarr.json.partial").write_bytes(b"torn")
    (store / "deltas" / "b" / "zarr.json").write_bytes(b"torn")
    if lock == "missing":
        (store / "LOCK").unlink()
    else:
        (store / "LOCK").write_bytes(b"process 1 on elsewhere\n")
    with StoreWriter(store):
        pass
    assert read_tree(store) == read_tree(whole)


def test_foreign_files_inside_are_never_swept(store):
    foreign = {
        "commits/notes.txt": b"mine",
        "blobs/readme": b"mine",
        "deltas/mine.txt": b"mine",
        "deltas/b/mine.txt": b"mine",
        "deltas/b/mine.partial": b"mine",
        "deltas/other/mine.txt": b"mine",
    }
    for name, data in foreign.items():
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(data)
    (store / "LOCK").write_bytes(b"process 1 on elsewhere\n")
    api.drop(store, after=3)
    for name, data in foreign.items():
        assert (store / name).read_bytes() == data


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        # Names a store has too, but nothing that says it is one.
        ["base/model.safetensors"],
        ["commits/mine", "blobs/mine"],
        ["zarr.json"],
        ["HEAD", "config", "objects/pack", "refs/heads"],
        ["LOCK", "CURRENT"],
    ],
)
def test_directories_of_others_are_refused_and_untouched(run, tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    before = read_tree(tmp_path)
    with pytest.raises(StoreError, match="not a store's"):
        build(run.base, run.checkpoints, tmp_path)
    assert read_tree(tmp_path) == before


def test_file_as_store_is_refused(run, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StoreError, match="is a file"):
        build(run.base, run.checkpoints, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_store_is_made_with_its_parents(run, tmp_path):
    store = tmp_path / "not" / "there" / "yet"
    assert build(run.base, run.checkpoints, store, steps="1:2") == (1, 2)
    (tmp_path / "empty").mkdir()
    assert build(run.base, run.checkpoints, tmp_path / "empty", steps="1") == (1,)


def test_a_first_build_that_failed_leaves_room_for_another(run, tmp_path):
    """The first finds a checkpoint it refuses; the second leaves that one out."""
    other = tiny_trajectory(tmp_path / "run", range(1, 4))
    weights = other.directories[3] / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8] + b"\x01" * 8)  # the constant tensor, which may not change
    with pytest.raises(Exception, match="ids"):
        build(other.base, other.checkpoints, tmp_path / "store")
    assert build(other.base, other.checkpoints, tmp_path / "store", steps="1:2") == (1, 2)
    check_whole(tmp_path / "store", _truth(other, range(1, 3)))


# --- moving --------------------------------------------------------------------------------------


def test_copied_store_works_with_its_base_named(run, whole, tmp_path):
    copy = tmp_path / "far" / "away" / "copy"
    copy.parent.mkdir(parents=True)
    shutil.copytree(whole, copy)
    with pytest.raises(SourceError, match="--base"):
        api.open_store(copy).checkpoint_bits("a.weight", 3)
    assert check_exports(copy, _truth(run), run.base) == tuple(STEPS)
    api.export(copy, tmp_path / "out", step=18, base=run.base)
    for path in run.directories[18].iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert api.verify(copy).problems == ()
    check_dense(copy, _truth(run))


def test_store_moved_with_its_base_needs_no_name(run, whole, tmp_path):
    shutil.copytree(run.base, tmp_path / run.base.name)
    shutil.copytree(whole, tmp_path / "moved")
    assert check_exports(tmp_path / "moved", _truth(run)) == tuple(STEPS)


def test_copied_store_goes_on(run, whole, tmp_path):
    """Also without its lock file, as copied by someone who leaves it out."""
    longer = tiny_trajectory(tmp_path / "longer", range(1, 21))
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("LOCK"))
    assert build(run.base, longer.checkpoints, copy) == (19, 20)
    truth = _truth(run) | {19: longer, 20: longer}
    assert check_exports(copy, truth, run.base) == tuple(range(1, 21))


def test_included_base_moves_along(run, tmp_path):
    store = tmp_path / "with-base"
    with unsynced():
        build(run.base, run.checkpoints, store, include_base=True)
    moved = tmp_path / "elsewhere" / "store"
    moved.parent.mkdir()
    store.rename(moved)
    check_whole(moved, _truth(run))
    assert Store(moved).manifest.base_included


# --- the one module that changes the disk --------------------------------------------------------


def test_replaced_file_is_whole(tmp_path):
    path = tmp_path / "file"
    files.replace_file(path, b"one")
    files.replace_file(path, b"two")
    assert read_tree(tmp_path) == {"file": b"two"}


def test_tail_keeps_what_is_committed(tmp_path):
    path = tmp_path / "chunk"
    files.write_tail(path, 0, b"abc")
    files.write_tail(path, 3, b"de")
    files.write_tail(path, 3, b"f")
    assert path.read_bytes() == b"abcf"
    # One who helps may come after another, who has written it already, and more.
    files.write_tail(path, 0, b"ab", check=lambda: None)
    assert path.read_bytes() == b"abcf"
    with pytest.raises(StoreError, match="holds 4 bytes, 9 are committed"):
        files.write_tail(path, 9, b"x")


def test_fallback_syncs_every_file_and_directory(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(files, "_sync_file_system", lambda root: False)
    monkeypatch.setattr(files, "sync_file", synced.append)
    paths = [tmp_path / "a" / "b" / "file", tmp_path / "a" / "other"]
    files.sync_many(tmp_path, iter(paths))
    assert set(synced) == {*paths, tmp_path / "a" / "b", tmp_path / "a", tmp_path}
    assert synced.index(tmp_path) > synced.index(tmp_path / "a")
