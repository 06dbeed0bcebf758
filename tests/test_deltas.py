"""Stores built from feeds of changes are those built from whole checkpoints, bit for bit."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import xxhash

import relex_stream as rs
from relex_stream import unpacking
from relex_stream.comparing import compare_step
from relex_stream.errors import OptionError, RelexStreamWarning, SourceError, TrajectoryError
from relex_stream.sources import Naming, find_checkpoints, open_checkpoint
from relex_stream.store import Store
from relex_stream.watch_options import WatchOptions
from relex_stream.watching import Watch
from tests.make_checkpoints import Bits, Trajectory, make_trajectory, raw, write_model
from tests.make_deltas import (
    changed_run,
    grail_run,
    publish_grail,
    publish_slime,
    slime_run,
)
from tests.make_stores import build_store
from tests.test_watching import FakeClock

SHAPES = {
    "model.embed_tokens.weight": (96, 40),
    "model.layers.0.mlp.weight": (70, 3, 11),
    "model.layers.0.mlp.bias": (1009,),
    "model.layers.0.norm.weight": (24,),
    "scale": (1,),
    "unused": (0, 4),
}
IDS = raw(np.arange(70, dtype=np.uint64), "I64")

FEEDS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "xor": (slime_run, {}),
    "overwrite": (slime_run, {"encoding": "overwrite", "files": 1}),
    "v2": (grail_run, {"codec": "v2"}),
    "v3": (grail_run, {"codec": "v3"}),
    "v3.1": (grail_run, {}),
    "with models": (grail_run, {"full": (2, 3)}),
    "tensors": (changed_run, {}),
}


def made(root: Path, **options: Any) -> Trajectory:
    settings: dict[str, Any] = {"steps": (1, 2, 3, 4), "tensors": SHAPES, "change_share": 0.05}
    return make_trajectory(root, **settings | options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return made(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def feed(run: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slime_run(run, tmp_path_factory.mktemp("feed"))


@pytest.fixture(scope="module")
def whole(run: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "run.store"
    build_store(run.base, run.checkpoints, store, block_bytes=512, sketch_min_elements=64)
    return store


def build(run: Trajectory, feed: Path, store: Path, **options: Any) -> Any:
    if "step-1" in {path.name for path in feed.iterdir()}:
        options.setdefault("source", "changed-safetensors")
    return build_store(run.base, feed, store, block_bytes=512, sketch_min_elements=64, **options)


def chunks(store: Path) -> dict[str, bytes]:
    """Return the contents of all chunks of a store."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.name.startswith("c.")
    }


def assert_same(store: Path, other: Path) -> None:
    assert chunks(store) == chunks(other) != {}
    ours, theirs = Store(store), Store(other)
    assert ours.steps == theirs.steps
    for row in range(len(ours.steps)):
        mine, its = ours.commit(row), theirs.commit(row)
        for name in ("source_crc", "changed", "frame_crc", "change_sq", "delta_sq", "sketch"):
            assert (getattr(mine, name) == getattr(its, name)).all(), name


def weights(directory: Path) -> dict[str, bytes]:
    tensors = open_checkpoint(directory, 0).tensors
    return {
        name: Path(place.path).read_bytes()[place.offset : place.offset + place.spec.nbytes]
        for name, place in tensors.items()
    }


def bits_of(run: Trajectory, step: int) -> dict[str, bytes]:
    return {name: bits.tobytes() for name, bits in run.bits[step].items()}


# --- the same store ------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1 << 16, 3])
@pytest.mark.parametrize("kind", FEEDS)
def test_a_feed_comes_to_the_same_store(
    kind: str,
    entries: int,
    run: Trajectory,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Runs of changes that end anywhere in a block or a row.
    monkeypatch.setattr("relex_stream.unpacking.ENTRIES", entries)
    monkeypatch.setattr("relex_stream.patches.ENTRIES", entries)
    write, options = FEEDS[kind]
    summary = build(run, write(run, tmp_path / "feed", **options), tmp_path / "run.store")
    assert summary.steps_added == run.steps
    assert_same(tmp_path / "run.store", whole)


@pytest.mark.parametrize("kind", ["xor", "overwrite", "v3.1", "tensors"])
def test_32_bit_weights_with_a_buffer(kind: str, tmp_path: Path) -> None:
    run = made(tmp_path, dtype="F32", constants={"ids": IDS})
    write, options = FEEDS[kind]
    build(run, write(run, tmp_path / "feed", **options), tmp_path / "feed.store")
    build(run, run.checkpoints, tmp_path / "whole.store")
    assert_same(tmp_path / "feed.store", tmp_path / "whole.store")


def test_weights_that_are_wider_than_those_of_the_base(tmp_path: Path) -> None:
    run = made(tmp_path, dtype="F32", base_dtype="BF16")
    feed = grail_run(
        Trajectory(
            run.base,
            run.checkpoints,
            run.directories,
            "F32",
            "F32",
            {0: run.bits[1], **{step: run.bits[step] for step in run.steps}},
        ),
        tmp_path / "feed",
        full=(1,),
    )
    # What a cast would save is told of whole checkpoints.
    assert build(run, feed, tmp_path / "feed.store").cast_savings is None
    build(run, run.checkpoints, tmp_path / "whole.store")
    assert_same(tmp_path / "feed.store", tmp_path / "whole.store")


@pytest.mark.parametrize("kind", ["xor", "with models", "tensors"])
def test_steps_come_later_and_one_by_one(
    kind: str, run: Trajectory, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relex_stream.unpacking.MOST_BYTES", 0)  # a commit for each
    write, options = FEEDS[kind]
    feed, store = write(run, tmp_path / "feed", **options), tmp_path / "run.store"
    build(run, feed, store, steps="1:2")
    # Again from the start: the last stored step is looked at, and is the same.
    assert build(run, feed, store).steps_added == (3, 4)
    assert_same(store, whole)


def test_steps_come_later_where_a_buffer_lies_beside_them(tmp_path: Path) -> None:
    run = made(tmp_path, constants={"ids": IDS})
    feed, store = slime_run(run, tmp_path / "feed"), tmp_path / "run.store"
    # So few blocks that all are looked at.
    build_store(run.base, feed, store, steps="1:2")
    assert build_store(run.base, feed, store).steps_added == (3, 4)


def test_no_more_is_unpacked_than_may_be_at_hand(
    run: Trajectory, feed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_hand = []
    unpack = unpacking.unpack

    def noted(*arguments: Any, **options: Any) -> Any:
        patches = unpack(*arguments, **options)
        at_hand.append(patches.steps)
        return patches

    monkeypatch.setattr("relex_stream.batches.unpack", noted)
    build(run, feed, tmp_path / "all.store")
    monkeypatch.setattr("relex_stream.unpacking.MOST_BYTES", 1)
    build(run, feed, tmp_path / "each.store")
    assert at_hand == [4, 1, 1, 1, 1]
    assert_same(tmp_path / "each.store", whole)


def test_names_are_those_of_the_base(run: Trajectory, whole: Path, tmp_path: Path) -> None:
    for step in run.steps:
        before, after = (
            {f"actor.net.{name}": bits for name, bits in run.bits[each].items()}
            for each in (step - 1, step)
        )
        publish_slime(tmp_path / "feed", step, before, after)
    options = {"strip_prefix": "actor.", "map_names": [("^net.", "")]}
    build(run, tmp_path / "feed", tmp_path / "run.store", **options)
    assert_same(tmp_path / "run.store", whole)


def test_a_whole_version_begins_anew(run: Trajectory, whole: Path, tmp_path: Path) -> None:
    for step in (1, 2, 4):
        publish_slime(tmp_path / "feed", step, run.bits[step - 1], run.bits[step])
    shutil.copytree(run.directories[3], tmp_path / "feed/weight_v000003")
    build(run, tmp_path / "feed", tmp_path / "run.store")
    assert_same(tmp_path / "run.store", whole)


def test_a_version_without_changes(run: Trajectory, tmp_path: Path) -> None:
    publish_slime(tmp_path / "feed", 1, run.bits[0], run.bits[0])
    publish_grail(tmp_path / "windows", 1, 0, run.bits[0], run.bits[0])
    for name in ("feed", "windows"):
        with pytest.warns(RelexStreamWarning, match="step 1 has the same weights as step 0"):
            build(run, tmp_path / name, tmp_path / f"{name}.store")
        assert not Store(tmp_path / f"{name}.store").commit(0).changed.any()


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xor", "v3.1", "tensors"])
def test_a_chain_has_no_gaps(kind: str, run: Trajectory, tmp_path: Path) -> None:
    write, options = FEEDS[kind]
    feed, store = write(run, tmp_path / "feed", **options), tmp_path / "run.store"
    with pytest.raises(TrajectoryError, match=r"since step 1, .* would be the base; give every"):
        build(run, feed, store, steps="2:")
    with pytest.raises(TrajectoryError, match=r"step 4: .* since step 3, .* would be 2;"):
        build(run, feed, store, steps="1,2,4")
    assert not store.joinpath("HEAD.json").exists()
    build(run, feed, store, steps="1:2")
    with pytest.raises(TrajectoryError, match=r"since step 3, .* would be 2;"):
        build(run, feed, store, steps="4")
    assert Store(store).steps == (1, 2)


def test_after_a_model_a_chain_may_begin(run: Trajectory, tmp_path: Path) -> None:
    feed = grail_run(run, tmp_path / "feed", full=(3,))
    build(run, feed, tmp_path / "run.store", steps="3:")
    rs.export(tmp_path / "run.store", tmp_path / "out", step=4)
    assert weights(tmp_path / "out") == bits_of(run, 4)


def test_phases_count_on(run: Trajectory, whole: Path, tmp_path: Path) -> None:
    for version, step in ((1, 1), (2, 2)):
        publish_slime(tmp_path / "a", version, run.bits[step - 1], run.bits[step])
    for version, step in ((1, 3), (2, 4)):
        publish_slime(tmp_path / "b", version, run.bits[step - 1], run.bits[step])
    build(run, tmp_path / "a", tmp_path / "run.store", then=[(tmp_path / "b", 2)])
    assert_same(tmp_path / "run.store", whole)


def test_a_run_that_forked(run: Trajectory, feed: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", seed=1, steps=(1, 2, 3, 4, 5))
    bits: dict[int, dict[str, Bits]] = {step: run.bits[step] for step in (0, 1, 2)}
    bits |= {step: other.bits[step] for step in (3, 4, 5)}
    for step in range(1, 6):
        publish_slime(tmp_path / "forked", step, bits[step - 1], bits[step])
    store = tmp_path / "run.store"
    build(run, feed, store)
    with pytest.raises(TrajectoryError, match=r"step 3 in .* is not the one that is stored"):
        build(run, tmp_path / "forked", store)
    shutil.rmtree(tmp_path / "forked/weight_v000003")
    with pytest.raises(TrajectoryError, match="would be 2"):
        build(run, tmp_path / "forked", store, replace_from=3)
    assert Store(store).steps == (1, 2, 3, 4)
    publish_slime(tmp_path / "forked", 3, bits[2], bits[3])
    build(run, tmp_path / "forked", store, replace_from=3)
    rs.export(store, tmp_path / "out", step=5)
    assert weights(tmp_path / "out") == {name: b.tobytes() for name, b in bits[5].items()}


# --- what changes come to ------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_changes_of_another_base_are_found_out(
    encoding: str, run: Trajectory, tmp_path: Path
) -> None:
    feed = slime_run(run, tmp_path / "feed", encoding=encoding)
    base = {name: raw(bits, "BF16") for name, bits in run.bits[0].items()}
    # A single weight that no step changes.
    changed = run.bits[0]["model.layers.0.mlp.bias"].copy()
    still = [
        i
        for i in range(changed.size)
        if len({run.bits[step]["model.layers.0.mlp.bias"][i] for step in range(5)}) == 1
    ]
    changed[still[-1]] ^= 1
    base["model.layers.0.mlp.bias"] = raw(changed, "BF16")
    write_model(tmp_path / "other", base)
    with pytest.raises(TrajectoryError, match=r"step 1: .*mlp.bias does not come to its checksum"):
        build_store(tmp_path / "other", feed, tmp_path / "run.store", block_bytes=512)
    assert not (tmp_path / "run.store/HEAD.json").exists()


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("xxh3-128", xxhash.xxh3_128_hexdigest),
        ("blake3", lambda data: blake3.blake3(data).hexdigest()),
    ],
)
def test_checksums_of_packages(
    kind: str,
    digest: Callable[[bytes], str],
    run: Trajectory,
    whole: Path,
    tmp_path: Path,
) -> None:
    feed = slime_run(run, tmp_path / "feed", digest_kind=kind, digest=digest)
    build(run, feed, tmp_path / "run.store")
    assert_same(tmp_path / "run.store", whole)
    wrong = slime_run(
        run, tmp_path / "wrong", digest_kind=kind, digest=lambda data: digest(data + b"\0")
    )
    with pytest.raises(TrajectoryError, match=rf"checksum \({kind}\)"):
        build(run, wrong, tmp_path / "wrong.store")


def test_checksums_that_cannot_be_made(
    run: Trajectory, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"digest_kind": "xxh3-128", "digest": lambda _: "00" * 16}
    feed = slime_run(run, tmp_path / "feed", **options)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    remedy = r"is not checked: .*pip install 'relex-stream\[deltas\]'"
    with pytest.warns(RelexStreamWarning, match=remedy):
        build(run, feed, tmp_path / "run.store")
    assert_same(tmp_path / "run.store", whole)
    odd = slime_run(run, tmp_path / "odd", digest_kind="md4")
    with pytest.warns(RelexStreamWarning, match="checksums of kind md4 are not known"):
        build(run, odd, tmp_path / "odd.store")


def test_the_checksum_of_a_whole_model(run: Trajectory, whole: Path, tmp_path: Path) -> None:
    for name, wrong in (("feed", None), ("wrong", 3)):
        for step in run.steps:
            told = run.bits[step - 1 if step == wrong else step]
            data = b"".join(told[each].tobytes() for each in sorted(told))
            publish_grail(
                tmp_path / name,
                step,
                step - 1,
                run.bits[step - 1],
                run.bits[step],
                weights_hash=xxhash.xxh3_128_hexdigest(data),
            )
    build(run, tmp_path / "feed", tmp_path / "run.store", steps="1:2")
    build(run, tmp_path / "feed", tmp_path / "run.store")
    assert_same(tmp_path / "run.store", whole)
    with pytest.raises(TrajectoryError, match=r"step 3: .*the model does not come to its checksum"):
        build(run, tmp_path / "wrong", tmp_path / "wrong.store")


# --- what is refused -----------------------------------------------------------------------------


def test_weights_are_not_cast_and_clusters_not_used(
    run: Trajectory, feed: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"--as bf16: .*leave --as out"):
        build(run, feed, tmp_path / "run.store", cast="bf16")
    with pytest.raises(SourceError, match="hold only what changed since another version"):
        build_store(feed / "weight_v000001", run.checkpoints, tmp_path / "run.store")


def test_a_cluster_is_refused(
    run: Trajectory, feed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relex_stream.graph.threads.Threads.is_local", False)
    with pytest.raises(OptionError, match="leave out --scheduler and --local-cluster"):
        build(run, feed, tmp_path / "run.store")


def test_changed_tensors_alone_are_not_taken_for_a_model(run: Trajectory, tmp_path: Path) -> None:
    feed = changed_run(run, tmp_path / "feed")
    with pytest.raises(TrajectoryError, match="lacks tensor"):
        build_store(run.base, feed, tmp_path / "run.store")


@pytest.mark.parametrize("kind", ["xor", "v3.1", "tensors"])
def test_what_the_base_does_not_have(kind: str, run: Trajectory, tmp_path: Path) -> None:
    write, options = FEEDS[kind]
    more = {
        step: {**bits, "other": bits["scale"] + np.uint16(step)} for step, bits in run.bits.items()
    }
    both = Trajectory(run.base, run.checkpoints, run.directories, "BF16", "BF16", more)
    feed = write(both, tmp_path / "feed", **options)
    for steps in ("1:", "1"):
        with pytest.raises(TrajectoryError, match="has tensor other, which the base does not have"):
            build(run, feed, tmp_path / "run.store", steps=steps)


def test_a_buffer_that_changes(tmp_path: Path) -> None:
    run = made(tmp_path, constants={"ids": IDS})
    ids = {step: np.arange(70, dtype=np.uint64) + np.uint64(step) for step in run.bits}
    for step in (1, 2):
        before, after = ({**run.bits[each], "ids": ids[each]} for each in (step - 1, step))
        publish_slime(tmp_path / "feed", step, before, after)
    with pytest.raises(TrajectoryError, match="changes tensor ids, which is I64"):
        build(run, tmp_path / "feed", tmp_path / "run.store")


def test_a_head_that_is_kept_as_one_with_the_embedding(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (30, 8), "model.w": (40,)}
    run = make_trajectory(tmp_path, steps=(1, 2), tensors=shapes, change_share=0.5)
    base = {name: raw(bits, "BF16") for name, bits in run.bits[0].items()}
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    shutil.rmtree(run.base)
    write_model(run.base, base)
    store = tmp_path / "run.store"
    build(run, run.checkpoints, store, steps="1")
    publish_slime(tmp_path / "feed", 2, run.bits[1], run.bits[2])
    build(run, tmp_path / "feed", store)
    assert Store(store).tensors["lm_head.weight"].kind == "tied"
    rs.export(store, tmp_path / "out", step=2)
    embedding = run.bits[2]["model.embed_tokens.weight"].tobytes()
    assert weights(tmp_path / "out")["lm_head.weight"] == embedding
    both = [{**run.bits[2], "lm_head.weight": bits} for bits in run.bits[2].values()]
    publish_slime(
        tmp_path / "feed",
        3,
        {**both[0]},
        {**both[0], "lm_head.weight": both[0]["lm_head.weight"] + 1},
    )
    with pytest.raises(TrajectoryError, match=r"lm_head.weight, which is kept as one with"):
        build(run, tmp_path / "feed", store)


def test_values_that_are_not_finite(run: Trajectory, tmp_path: Path) -> None:
    after = {name: bits.copy() for name, bits in run.bits[2].items()}
    after["model.layers.0.mlp.bias"][777] = 0x7F80
    feed, store = tmp_path / "feed", tmp_path / "run.store"
    publish_slime(feed, 1, run.bits[0], run.bits[1])
    publish_slime(feed, 2, run.bits[1], after)
    publish_slime(feed, 3, after, run.bits[3])
    with pytest.raises(
        TrajectoryError, match=r"step 2: tensor .*mlp.bias .*bits 0x7f80\) at element 777.*v000002"
    ):
        build(run, feed, store)
    build(run, feed, store, allow_nonfinite=True)
    rs.export(store, tmp_path / "out", step=2)
    assert weights(tmp_path / "out") == {name: bits.tobytes() for name, bits in after.items()}


# --- what becomes of them ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xor", "v3.1", "with models", "tensors"])
def test_steps_are_exported_as_models(kind: str, run: Trajectory, tmp_path: Path) -> None:
    write, options = FEEDS[kind]
    store = tmp_path / "run.store"
    build(run, write(run, tmp_path / "feed", **options), store)
    for step in run.steps:
        summary = rs.export(store, tmp_path / f"out-{step}", step=step)
        is_whole = step in options.get("full", ())
        assert summary.file_format == ("ingested" if is_whole else "hf")
        assert weights(tmp_path / f"out-{step}") == bits_of(run, step)
    with pytest.raises(OptionError, match="export it with --format hf"):
        rs.export(store, tmp_path / "x", step=1, file_format="ingested")


def opened(run: Trajectory, feed: Path, step: int) -> Any:
    source = "changed-safetensors" if (feed / "step-1").exists() else "auto"
    found = find_checkpoints(feed, source=source)
    return found.open(dict(found.checkpoints)[step], step, Naming(frozenset(run.bits[0])))


@pytest.mark.parametrize("kind", FEEDS)
def test_a_step_is_compared_with_the_changes(
    kind: str, run: Trajectory, whole: Path, tmp_path: Path
) -> None:
    write, options = FEEDS[kind]
    feed, store = write(run, tmp_path / "feed", **options), tmp_path / "run.store"
    build(run, feed, store)
    for step in (1, 4):
        comparison = compare_step(Store(store), opened(run, feed, step))
        assert comparison.problems == ()
        assert comparison.compared_bytes >= sum(map(len, bits_of(run, step).values()))


@pytest.mark.parametrize("kind", ["xor", "v3", "tensors"])
def test_a_step_that_differs_is_named(kind: str, run: Trajectory, tmp_path: Path) -> None:
    write, options = FEEDS[kind]
    build(run, write(run, tmp_path / "feed", **options), tmp_path / "run.store")
    other = {step: dict(bits) for step, bits in run.bits.items()}
    other[3]["model.layers.0.mlp.bias"] = run.bits[3]["model.layers.0.mlp.bias"].copy()
    other[3]["model.layers.0.mlp.bias"][300] ^= 1
    lies = Trajectory(run.base, run.checkpoints, run.directories, "BF16", "BF16", other)
    feed = write(lies, tmp_path / "lies", **options)
    (problem,) = compare_step(Store(tmp_path / "run.store"), opened(run, feed, 3)).problems
    assert "step 3: tensor model.layers.0.mlp.bias, block 1: 1 of 256" in problem
    assert "element 300" in problem


def test_watch_deletes_what_is_in_the_store(run: Trajectory, feed: Path, tmp_path: Path) -> None:
    there, store = tmp_path / "feed", tmp_path / "run.store"
    events = []

    def watch() -> Any:
        return Watch(
            run.base,
            there,
            store,
            options=WatchOptions(
                base_kept_elsewhere=True, delete_ingested=True, keep_last=0, once=True
            ),
            build_options={"workers": 1},
            tell=events.append,
            stop=threading.Event(),
            clock=FakeClock(),
        ).run()

    for steps in ((1, 2), (4,), (3,)):
        for step in steps:
            shutil.copytree(feed / f"weight_v{step:06d}", there / f"weight_v{step:06d}")
        if steps == (4,):
            (there / "weight_v000004/model.safetensors.index.json").rename(tmp_path / "index")
        watch()
        if steps == (3,):
            (tmp_path / "index").rename(there / "weight_v000004/model.safetensors.index.json")
            watch()
    assert Store(store).steps == (1, 2, 3, 4)
    assert [event.step for event in events if event.kind == "deleting"] == [1, 2, 3, 4]
    assert not list(there.rglob("*.safetensors*"))
    for step in run.steps:
        rs.export(store, tmp_path / f"out-{step}", step=step, base=run.base)
        assert weights(tmp_path / f"out-{step}") == bits_of(run, step)
    # What is gone is passed over; what comes goes on.
    publish_slime(there, 5, run.bits[4], run.bits[1])
    assert build(run, there, store).steps_added == (5,)


def test_watch_reads_what_the_build_is_told_to(run: Trajectory, tmp_path: Path) -> None:
    feed, store = changed_run(run, tmp_path / "feed"), tmp_path / "run.store"
    summary = rs.watch(
        run.base, feed, store, source="changed-safetensors", settle_s=0, once=True, workers=1
    )
    assert summary.steps_added == summary.steps_verified == run.steps
