"""Runs whose tensors lie in pieces: into a store and out of it again, against whole models."""

from __future__ import annotations

import hashlib
import io
import shutil
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import relex_stream as rs
from relex_stream import source_blocks
from relex_stream.errors import RelexStreamWarning
from relex_stream.store import Store
from relex_stream.summaries import WatchSummary
from tests.make_stores import build_store
from tests.torch_writers.runs import STEPS

ROOT = Path(__file__).parents[1]

WEIGHTS = {"fsdp": "fp32", "hsdp": "bf16", "dcp": "fp32", "dcp_with_state": "fp32", "split": "bf16"}
"""Layouts, and the dtype of their weights."""

PLACES = {
    "fsdp": "global_step_{}/actor",
    "hsdp": "global_step_{}/actor",
    "dcp": "step-{}",
    "dcp_with_state": "step-{}",
    "split": "step_{}",
}

COME_BACK = [layout for layout in WEIGHTS if layout != "dcp_with_state"]


@pytest.fixture(scope="session")
def runs(torch_runs):
    return torch_runs


def build(runs, layout, store, **options):
    """Small blocks, so that pieces are cut anywhere; and in two runs: the second appends."""
    options = {"block_bytes": 512, "sketch_min_elements": 1, **options}
    build_store(runs / "base", runs / layout, store, steps="1:2", **options)
    return build_store(runs / "base", runs / layout, store, **options)


@pytest.fixture(scope="session")
def stores(runs, tmp_path_factory):
    """A store of each layout, and of the whole models."""
    root = tmp_path_factory.mktemp("stores")
    for layout in (*WEIGHTS, "whole_fp32", "whole_bf16"):
        build(runs, layout, root / layout)
    return root


def digests(directory):
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def frames(store):
    return digests(store / "deltas")


def assert_same_tensors(path, whole):
    found, expected = load_file(path / "model.safetensors"), load_file(whole / "model.safetensors")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("layout", WEIGHTS)
def test_a_split_run_makes_the_store_of_the_whole_one(stores, layout):
    assert frames(stores / layout) == frames(stores / f"whole_{WEIGHTS[layout]}")
    assert rs.verify(stores / layout).problems == ()


@pytest.mark.parametrize("layout", WEIGHTS)
def test_every_step_is_exported_as_a_whole_model(runs, stores, tmp_path, layout):
    for step in STEPS:
        rs.export(stores / layout, tmp_path / f"{step}", step=step, file_format="hf")
        whole = runs / f"whole_{WEIGHTS[layout]}/step_{step}"
        assert_same_tensors(tmp_path / f"{step}", whole)
        expected = set(digests(runs / "base"))
        assert set(digests(tmp_path / f"{step}")) == expected


@pytest.mark.parametrize("layout", COME_BACK)
def test_the_ingested_files_come_back(runs, stores, tmp_path, layout):
    for step in STEPS:
        summary = rs.export(stores / layout, tmp_path / f"{step}", step=step)
        assert summary.file_format == "ingested"
        source = digests(runs / layout / PLACES[layout].format(step))
        kept = {
            name: sha
            for name, sha in source.items()
            if not name.startswith(("optim_world", "extra_state_world"))
        }
        assert digests(tmp_path / f"{step}") == kept
        assert {file.path: file.sha256 for file in summary.files} == kept
        for file in summary.files:
            assert (tmp_path / f"{step}" / file.path).stat().st_size == file.bytes


def test_torch_loads_what_comes_back(stores, runs, tmp_path):
    rs.export(stores / "fsdp", tmp_path / "out", step=2)
    (path,) = (tmp_path / "out").glob("model_world_size_3_rank_1.pt")
    original = runs / "fsdp/global_step_2/actor" / path.name
    # The tests' own files: pickles of DTensors.
    found, expected = (torch.load(file, weights_only=False) for file in (path, original))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        here = found[name].to_local() if hasattr(found[name], "to_local") else found[name]
        assert torch.equal(here, local), name


def test_files_with_training_state_do_not_come_back(stores, tmp_path):
    store = stores / "dcp_with_state"
    with pytest.raises(rs.OptionError, match=r"step 2 .* training state.*--format hf"):
        rs.export(store, tmp_path / "out", step=2, file_format="ingested")
    assert rs.export(store, tmp_path / "out", step=2).file_format == "hf"


def test_files_do_not_come_back_without_those_of_other_ranks(runs, tmp_path):
    build_store(runs / "base", runs / "dcp_with_progress", tmp_path / "store", steps="5")
    kept = {file.path for file in Store(tmp_path / "store").commit(0).files}
    assert 0 < len([name for name in kept if name.endswith(".distcp")]) < 3
    with pytest.raises(rs.OptionError, match=r"step 5 .* training state.*--format hf"):
        rs.export(tmp_path / "store", tmp_path / "out", step=5, file_format="ingested")
    assert rs.export(tmp_path / "store", tmp_path / "out", step=5).file_format == "hf"
    assert_same_tensors(tmp_path / "out", runs / "whole_fp32/step_5")


@pytest.mark.parametrize("tied_first", [False, True])
def test_empty_tensors_and_tied_heads_are_no_reason_not_to_come_back(tmp_path, tied_first):
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.none"]
    for step in (0, 1):
        embedding = torch.full((4, 3), 1.5 + step, dtype=torch.bfloat16)
        tensors = dict(zip(names, (embedding, embedding, torch.empty(0, 3)), strict=True))
        if step:
            ordered = sorted(tensors, reverse=not tied_first)
            (tmp_path / "run/global_step_1/actor").mkdir(parents=True)
            path = tmp_path / "run/global_step_1/actor/model_world_size_1_rank_0.pt"
            torch.save({name: tensors[name] for name in ordered}, path)
        else:
            (tmp_path / "base").mkdir()
            del tensors["lm_head.weight"]
            save_file(tensors, tmp_path / "base/model.safetensors")
    build_store(tmp_path / "base", tmp_path / "run", tmp_path / "store")
    summary = rs.export(tmp_path / "store", tmp_path / "out", step=1)
    assert summary.file_format == "ingested"
    assert digests(tmp_path / "out") == digests(path.parent)


def test_phases_may_have_layouts_of_their_own(runs, tmp_path):
    phases = {"then": [(runs / "dcp", 5)], "steps": "1,7"}
    build_store(runs / "base", runs / "fsdp", tmp_path / "store", **phases)
    for step, source in ((1, "fsdp/global_step_1/actor"), (7, "dcp/step-2")):
        summary = rs.export(tmp_path / "store", tmp_path / f"{step}", step=step)
        assert summary.file_format == "ingested"
        assert digests(tmp_path / f"{step}").items() <= digests(runs / source).items()


def test_format_2_is_said_where_it_is_needed(stores):
    formats = {layout: rs.info(stores / layout).format_version for layout in WEIGHTS}
    needed = dict.fromkeys(WEIGHTS, 2) | {"dcp_with_state": 1}
    assert formats == needed
    assert rs.info(stores / "whole_bf16").format_version == 1


def test_steps_come_back_together(stores, runs, tmp_path):
    summary = rs.export_steps(stores / "hsdp", tmp_path / "all", steps="2:", file_format="hf")
    assert [export.step for export in summary.exports] == [2, 5]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["step_2", "step_5"]
    for step in (2, 5):
        assert_same_tensors(tmp_path / f"all/step_{step}", runs / f"whole_bf16/step_{step}")
    assert summary.bytes_written == sum(export.bytes_written for export in summary.exports)


@pytest.mark.parametrize("steps", ["3:4", "1,3"])
def test_steps_that_are_not_there_write_nothing(stores, tmp_path, steps):
    with pytest.raises(rs.OptionError, match="it holds"):
        rs.export_steps(stores / "hsdp", tmp_path / "all", steps=steps)
    assert not (tmp_path / "all").exists()


def test_a_place_that_is_taken_stops_before_the_first_step(stores, tmp_path):
    (tmp_path / "all/step_5").mkdir(parents=True)
    with pytest.raises(rs.OutputError, match="step_5 exists"):
        rs.export_steps(stores / "hsdp", tmp_path / "all", steps="1:")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["step_5"]


def test_extrapolations_are_those_of_the_whole_run(stores, runs, tmp_path):
    for name in ("hsdp", "whole_bf16"):
        rs.extrapolate(stores / name, tmp_path / name, target_steps=[9])
    assert (
        digests(tmp_path / "hsdp")["model.safetensors"]
        == (digests(tmp_path / "whole_bf16")["model.safetensors"])
    )


# --- casts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fsdp", "dcp", "dcp_with_state", "whole_fp32"])
def test_f32_is_cast_on_the_way_in(runs, tmp_path, layout):
    build(runs, layout, tmp_path / "store", cast="bf16")
    build(runs, "whole_bf16", tmp_path / "whole")
    assert frames(tmp_path / "store") == frames(tmp_path / "whole")
    for row, step in enumerate(STEPS):
        # Of files that do not come back nothing is kept that says where weights lay in them.
        kept = {file.path for file in Store(tmp_path / "store").commit(row).files}
        assert not [name for name in kept if name.endswith((".metadata", ".index.json"))]
        summary = rs.export(tmp_path / "store", tmp_path / f"{step}", step=step)
        assert summary.file_format == "hf"
        masters = load_file(runs / f"whole_fp32/step_{step}/model.safetensors")
        found = load_file(tmp_path / f"{step}/model.safetensors")
        for name, tensor in masters.items():
            expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert torch.equal(found[name], expected), name


def test_some_steps_may_be_cast_and_others_not(runs, stores, tmp_path):
    for step, dtype in zip(STEPS, ("bf16", "fp32", "bf16"), strict=True):
        shutil.copytree(runs / f"whole_{dtype}/step_{step}", tmp_path / f"run/step_{step}")
    options = {"block_bytes": 512, "sketch_min_elements": 1, "cast": "bf16"}
    build_store(runs / "base", tmp_path / "run", tmp_path / "store", **options)
    assert frames(tmp_path / "store") == frames(stores / "whole_bf16")


def test_f32_is_cast_on_the_way_out(runs, stores, tmp_path):
    for step in STEPS:
        rs.export(stores / "fsdp", tmp_path / f"{step}", step=step, file_format="hf", cast="bf16")
        assert_same_tensors(tmp_path / f"{step}", runs / f"whole_bf16/step_{step}")
    with pytest.raises(rs.OptionError, match="--as goes with --format hf"):
        rs.export(stores / "fsdp", tmp_path / "out", step=1, cast="bf16")


def test_a_cast_store_is_not_continued_without_the_cast(runs, tmp_path):
    build_store(runs / "base", runs / "fsdp", tmp_path / "store", steps="1", cast="bf16")
    with pytest.raises(rs.TrajectoryError, match=r"F32 .*expected BF16 .*give --as bf16"):
        build_store(runs / "base", runs / "fsdp", tmp_path / "store")
    assert rs.info(tmp_path / "store").steps[-1].step == 1


def test_a_cast_needs_a_base_to_cast_to(runs, tmp_path):
    base = runs / "whole_fp32/step_1"
    with pytest.raises(rs.TrajectoryError, match=r"nothing in it; give the base in BF16"):
        build_store(base, runs / "fsdp", tmp_path / "store", cast="bf16")
    build_store(base, runs / "fsdp", tmp_path / "store", steps="2")
    with pytest.raises(rs.OptionError, match=r"nothing in it; export it without --as"):
        rs.export(tmp_path / "store", tmp_path / "out", step=2, file_format="hf", cast="bf16")


def test_casting_what_is_bf16_already_changes_nothing(runs, stores, tmp_path):
    build(runs, "hsdp", tmp_path / "store", cast="bf16")
    assert digests(tmp_path / "store") == digests(stores / "hsdp")


def test_an_unknown_cast_is_refused(runs, tmp_path):
    with pytest.raises(rs.OptionError, match="--as must be bf16"):
        build_store(runs / "base", runs / "fsdp", tmp_path / "store", cast="fp8")


# --- bytes between the tensors -------------------------------------------------------------------


def test_bytes_between_tensors_are_packed(runs, stores):
    store = Store(stores / "dcp")
    for row, step in enumerate(STEPS):
        entries = [entry for entry in store.commit(row).files if entry.recipe and entry.blob]
        assert len(entries) == 3
        for entry in entries:
            between = store.literals(entry)
            assert between.count(b"PK\x05\x06") > 3  # an archive for each chunk
            assert len(store.blob(entry.blob)) < len(between) / 5
            file = (runs / f"dcp/step-{step}" / entry.path).read_bytes()
            assert file.startswith(between[:200])


def repacked(stores, tmp_path, pack):
    """A store whose bytes between the tensors of one file are packed by `pack`, and the file."""
    shutil.copytree(stores / "fsdp", tmp_path / "store")
    store = Store(tmp_path / "store")
    entry = next(entry for entry in store.commit(0).files if entry.recipe and entry.blob)
    data = pack(store.literals(entry))
    name = hashlib.sha256(data).hexdigest()
    (tmp_path / "store/blobs" / name).write_bytes(data)
    return store, replace(entry, blob=name)


def test_another_version_of_zlib_is_as_good(runs, stores, tmp_path, monkeypatch):
    """Checkpoints are found to be those stored, whatever packed the bytes between their tensors."""
    monkeypatch.setattr(
        "relex_stream.store.write.pack_literals", lambda data: zlib.compress(data, 1)
    )
    build(runs, "fsdp", tmp_path / "store")
    assert digests(tmp_path / "store/blobs") != digests(stores / "fsdp/blobs")
    monkeypatch.undo()
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    summary = rs.watch(
        *(runs / "base", tmp_path / "run", tmp_path / "store"),
        settle_s=0,
        once=True,
        delete_ingested=True,
        base_kept_elsewhere=True,
    )
    assert summary.steps_deleted == STEPS[:-1]


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: data,
        lambda data: zlib.compress(data[:-1]),
        lambda data: zlib.compress(data + b"x"),
        lambda data: zlib.compress(data)[:-1],
        lambda data: zlib.compress(data) + b"x",
        lambda data: zlib.compress(bytes(1 << 28)),
    ],
    ids=["not packed", "short", "long", "torn", "followed", "bomb"],
)
def test_other_bytes_than_a_recipe_wants_are_named(stores, tmp_path, pack):
    store, entry = repacked(stores, tmp_path, pack)
    tracemalloc.start()
    with pytest.raises(rs.CorruptionError, match=rf"blob {entry.blob} of {entry.path} is damaged"):
        store.literals(entry)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


# --- few files, and replicas ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fsdp", "split"])
def test_more_files_than_may_be_open(runs, stores, tmp_path, monkeypatch, layout):
    reader = source_blocks.CheckpointReader
    monkeypatch.setattr("relex_stream.build.CheckpointReader", lambda: reader(max_open=2))
    monkeypatch.setattr("relex_stream.sources.reader._default_max_open", lambda: 2)
    build(runs, layout, tmp_path / "store", workers=2)
    assert frames(tmp_path / "store") == frames(stores / layout)


def test_replicas_that_differ_are_refused(runs, tmp_path):
    shutil.copytree(runs / "hsdp", tmp_path / "run")
    name = "model_world_size_4_rank_{}.pt"
    actor = tmp_path / "run/global_step_2/actor"
    # Ranks 0 and 2 hold the same; the weights of another step are as long.
    other = tmp_path / "run/global_step_5/actor" / name.format(2)
    shutil.copy(other, actor / name.format(2))
    with pytest.raises(rs.TrajectoryError, match=r"step 2: .*several times, and they differ"):
        build_store(runs / "base", tmp_path / "run", tmp_path / "store", block_bytes=512)


def test_replicas_are_not_looked_at_where_nothing_of_them_is_kept(runs, tmp_path):
    """With a cast, files do not come back: the first of several is taken, as mergers do."""
    shutil.copytree(runs / "hsdp_fp32", tmp_path / "run")
    ranks = tmp_path / "run/global_step_1/actor"
    third = bytearray((ranks / "model_world_size_4_rank_2.pt").read_bytes())
    with safe_open(runs / "whole_fp32/step_1/model.safetensors", "pt") as file:
        row = file.get_tensor("model.embed_tokens.weight")[0].numpy().tobytes()
    at = third.index(row)
    third[at : at + len(row)] = bytes(len(row))
    (ranks / "model_world_size_4_rank_2.pt").write_bytes(third)
    with pytest.raises(rs.TrajectoryError, match=r"embed_tokens\.weight several times"):
        build_store(runs / "base", tmp_path / "run", tmp_path / "store")
    build_store(runs / "base", tmp_path / "run", tmp_path / "store", cast="bf16")
    build_store(runs / "base", runs / "whole_bf16", tmp_path / "whole", steps="1")
    assert frames(tmp_path / "store") == frames(tmp_path / "whole")


def test_a_rank_of_another_step_is_no_part_of_it(runs, tmp_path):
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    (tmp_path / "run/global_step_2/actor/model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(rs.SourceError, match="rank"):
        build_store(runs / "base", tmp_path / "run", tmp_path / "store")
    assert not (tmp_path / "store" / "HEAD").exists()


# --- headers of models of another dtype ----------------------------------------------------------


def test_headers_say_the_dtype_of_the_weights(stores, tmp_path, runs):
    rs.export(stores / "fsdp", tmp_path / "out", step=5, file_format="hf")
    path = tmp_path / "out/model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.float32
    header = path.read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0


def test_constants_come_through_pieces(stores, tmp_path):
    opened = rs.open_store(stores / "split")
    np.testing.assert_array_equal(
        opened.checkpoint_bits("model.ids", 5).view(np.int64), np.arange(5)
    )


def weights_of(path):
    names = ("model_world_size_*", "*.distcp", "*.safetensors")
    return sorted(file for name in names for file in path.rglob(name))


@pytest.mark.parametrize("layout", COME_BACK)
def test_a_watch_verifies_pieces_and_deletes_the_files_that_come_back(runs, tmp_path, layout):
    shutil.copytree(runs / layout, tmp_path / "run")
    before = digests(tmp_path / "run")
    summary = rs.watch(
        *(runs / "base", tmp_path / "run", tmp_path / "store"),
        settle_s=0,
        once=True,
        include_base=True,
        delete_ingested=True,
    )
    assert summary.steps_added == summary.steps_verified == STEPS
    assert summary.steps_deleted == STEPS[:-1]
    last = tmp_path / "run" / PLACES[layout].format(STEPS[-1])
    assert weights_of(tmp_path / "run") == weights_of(last) != []
    gone = {name: sha for name, sha in before.items() if not (tmp_path / "run" / name).exists()}
    for step in STEPS[:-1]:
        rs.export(tmp_path / "store", tmp_path / f"{step}", step=step)
        place = PLACES[layout].format(step)
        back = {f"{place}/{name}": sha for name, sha in digests(tmp_path / f"{step}").items()}
        assert {
            name: sha for name, sha in gone.items() if name.startswith(f"{place}/")
        }.items() <= (back.items())


def test_a_watch_leaves_files_that_hold_the_state_of_an_optimizer(runs, tmp_path):
    shutil.copytree(runs / "dcp_with_state", tmp_path / "run")
    before = digests(tmp_path / "run")

    def watched() -> WatchSummary:
        return rs.watch(
            *(runs / "base", tmp_path / "run", tmp_path / "store"),
            settle_s=0,
            once=True,
            include_base=True,
            delete_ingested=True,
        )

    with pytest.warns(RelexStreamWarning, match="the state of an optimizer, stay") as told:
        summary = watched()
    assert len(told) == 1  # not of each step
    assert (summary.steps_verified, summary.steps_deleted) == (STEPS, ())
    # It is noted that they are verified.
    assert watched().steps_verified == ()
    assert digests(tmp_path / "run") == before
    # Who wants nothing deleted is not told what stays.
    places = (runs / "base", tmp_path / "run", tmp_path / "other")
    assert rs.watch(*places, settle_s=0, once=True, steps="1").steps_verified == (1,)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "dcp", "split"])
def test_a_watch_finds_a_bit_that_differs_in_any_piece(runs, tmp_path, layout):
    shutil.copytree(runs / layout, tmp_path / "run")
    rs.build_store(runs / "base", tmp_path / "run", tmp_path / "store", steps="1")
    for number, path in enumerate(weights_of(tmp_path / "run" / PLACES[layout].format(1))):
        data = path.read_bytes()
        flipped = bytearray(data)
        place = weight_in(path, layout)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        (tmp_path / "store.watch").unlink(missing_ok=True)
        summary = rs.watch(
            *(runs / "base", tmp_path / "run", tmp_path / "store"),
            steps="1",
            settle_s=0,
            once=True,
        )
        assert summary.steps_differing == (1,), number
        path.write_bytes(data)


def weight_in(path, layout):
    """Return the place of a byte of a tensor in a file: its largest run of bytes that are not 0."""
    data = path.read_bytes()
    if layout == "split":
        return len(data) - 3
    start = data.index(b"PK\3\4")
    with (
        zipfile.ZipFile(path)
        if layout != "dcp"
        else zipfile.ZipFile(io.BytesIO(data[start:])) as archive
    ):
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(entries, key=lambda entry: entry.file_size)
        return start + data[start:].index(archive.read(largest)) + 1


# --- what a cast would save ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fsdp", "whole_fp32"])
def test_the_cost_of_f32_is_told(runs, tmp_path, layout):
    summary = build(runs, layout, tmp_path / "store", commit_steps=1)
    assert summary.cast_savings is None  # one step was added: nothing to compare it with
    summary = build_store(
        runs / "base", runs / layout, tmp_path / "again", block_bytes=512, sketch_min_elements=1
    )
    assert summary.cast_savings is not None
    store = Store(tmp_path / "again")
    f32 = [t for t in store.manifest.tensors if t.dtype.code == "F32"]
    columns = [t.first_block + block for t in f32 for block in range(t.blocks)]
    assert summary.cast_savings.f32_step_bytes == store.frame_bytes[-1, columns].sum()
    build_store(runs / "base", runs / layout, tmp_path / "cast", cast="bf16", block_bytes=256)
    cast = int(Store(tmp_path / "cast").frame_bytes[-1].sum())
    assert summary.cast_savings.bf16_step_bytes == pytest.approx(cast, rel=0.25)
    assert summary.cast_savings.bf16_step_bytes < summary.cast_savings.f32_step_bytes / 2


def test_the_cost_is_exact_where_all_blocks_are_looked_at(runs, tmp_path):
    options = {"block_bytes": 8192, "sketch_min_elements": 1}
    summary = build_store(runs / "base", runs / "fsdp", tmp_path / "store", **options)
    options |= {"block_bytes": 4096, "cast": "bf16"}
    build_store(runs / "base", runs / "fsdp", tmp_path / "cast", **options)
    cast = int(Store(tmp_path / "cast").frame_bytes[-1].sum())
    assert summary.cast_savings.bf16_step_bytes == cast


@pytest.mark.parametrize("options", [{"cast": "bf16"}, {"steps": "1"}])
def test_no_cost_is_told_where_there_is_nothing_to_tell(runs, tmp_path, options):
    summary = build_store(runs / "base", runs / "fsdp", tmp_path / "store", **options)
    assert summary.cast_savings is None
