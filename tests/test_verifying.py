"""Verify with checkpoints: steps compared, damage rebuilt byte for byte, nothing made worse."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import relex_stream
from relex_stream.errors import OptionError, SourceError, StoreBusyError
from relex_stream.store import StoreWriter, files
from tests.make_checkpoints import Trajectory, make_trajectory, raw, write_model
from tests.make_stores import build_store

STEPS = tuple(range(1, 19))  # two groups of rows
SHAPES = {"embed.weight": (40, 30), "mlp.weight": (300,), "norm.weight": (16,), "scale": ()}
CONSTANTS = {"position_ids": ("I64", (10,), bytes(range(80)))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(
        tmp_path_factory.mktemp("run"),
        steps=STEPS,
        tensors=SHAPES,
        constants=CONSTANTS,
        change_share=0.05,
    )


@pytest.fixture(scope="module")
def whole(run: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the base in it, of small blocks."""
    store = tmp_path_factory.mktemp("whole") / "store"
    build_store(run.base, run.checkpoints, store, include_base=True, block_bytes=1024)
    return store


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return make_trajectory(
        tmp_path_factory.mktemp("short"),
        steps=(1, 2),
        tensors={"embed.weight": (40, 20), "scale": ()},
        constants=CONSTANTS,
        change_share=0.05,
        checkpoint_shards=1,
    )


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "remove": Path.unlink}


def rebuildable(store: Path) -> list[str]:
    """What repair can make again: all but records, HEAD and the lock."""
    return sorted(key for key in contents(store) if not key.startswith(("commits/", "HEAD")))


# --- repair -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGE)
def test_every_file_but_records_is_rebuilt_byte_for_byte(short_run, tmp_path, how):
    """Each file alone, and the store is what it was."""
    run, store = short_run, tmp_path / "store"
    build_store(run.base, run.checkpoints, store, include_base=True, block_bytes=1024)
    expected = contents(store)
    kinds = set()
    for key in rebuildable(store):
        DAMAGE[how](store / key)
        found = relex_stream.verify(store, workers=1)
        assert found.problems, key
        done = relex_stream.verify(
            store, against=run.checkpoints, base=run.base, repair=True, workers=1
        )
        assert done.repaired == (key,)
        assert done.problems == ()
        assert contents(store) == expected, key
        kinds.add(key.split("/")[0] + ("/zarr" if key.endswith("zarr.json") else ""))
    assert kinds == {"zarr.json/zarr", "deltas", "deltas/zarr", "base", "base/zarr", "blobs"}


def test_all_that_can_be_rebuilt_is_rebuilt_at_once(run, whole, store):
    expected = contents(whole)
    shutil.rmtree(store / "deltas")
    shutil.rmtree(store / "base")
    shutil.rmtree(store / "blobs")
    (store / "zarr.json").unlink()
    done = relex_stream.verify(store, against=run.checkpoints, base=run.base, repair=True)
    assert done.problems == ()
    assert set(done.repaired) == set(rebuildable(whole))
    assert done.compared == STEPS
    assert contents(store) == expected


def test_one_later_checkpoint_is_enough_for_one_frame(run, whole, store, tmp_path):
    """The frame of step 5 follows from the base, its frames up to 4, and step 9 taken back."""
    left = tmp_path / "left"
    left.mkdir()
    shutil.copytree(run.checkpoints / "global_step_9", left / "global_step_9")
    chunk = store / "deltas" / "mlp.weight" / "c.0.0"
    damage_frame(store, "mlp.weight", 0, row=4)
    assert contents(store) != contents(whole)
    done = relex_stream.verify(store, against=left, repair=True)
    assert done.repaired == ("deltas/mlp.weight/c.0.0",)
    assert done.problems == ()
    assert done.compared == (9,)
    assert len(done.not_compared) == len(STEPS) - 1
    assert chunk.read_bytes() == (whole / "deltas/mlp.weight/c.0.0").read_bytes()


def test_two_damaged_frames_need_a_checkpoint_between_them(run, whole, store, tmp_path):
    left = tmp_path / "left"
    left.mkdir()
    shutil.copytree(run.checkpoints / "global_step_9", left / "global_step_9")
    damage_frame(store, "mlp.weight", 0, row=4)
    damage_frame(store, "mlp.weight", 0, row=11)
    before = contents(store)
    done = relex_stream.verify(store, against=left, repair=True)
    assert done.repaired == ()
    problem = next(one for one in done.problems if "cannot be rebuilt" in one)
    assert problem == (
        "chunk deltas/mlp.weight/c.0.0 cannot be rebuilt: step 12, tensor mlp.weight, block 0: "
        "a checkpoint of one of the steps 12 to 18 is needed (--against)"
    )
    assert contents(store) == before
    shutil.copytree(run.checkpoints / "global_step_15", left / "global_step_15")
    assert relex_stream.verify(store, against=left, repair=True).problems == ()
    assert contents(store) == contents(whole)


def test_a_checkpoint_that_is_another_by_now_is_not_used(run, whole, store, tmp_path):
    left = Path(shutil.copytree(run.checkpoints, tmp_path / "left"))
    for step in STEPS[4:]:
        changed = {name: raw(bits ^ 1, "BF16") for name, bits in run.bits[step].items()}
        shutil.rmtree(left / f"global_step_{step}")
        write_model(left / f"global_step_{step}" / "huggingface", changed | CONSTANTS)
    damage_frame(store, "mlp.weight", 0, row=10)
    before = contents(store)
    done = relex_stream.verify(store, against=left, repair=True)
    assert done.repaired == ()
    assert any(
        "cannot be rebuilt" in one and "is not what was stored" in one for one in done.problems
    )
    assert contents(store) == before


def test_what_cannot_be_rebuilt_does_not_keep_other_files_from_it(run, whole, store, tmp_path):
    left = tmp_path / "left"
    left.mkdir()
    shutil.copytree(run.checkpoints / "global_step_3", left / "global_step_3")
    damage_frame(store, "mlp.weight", 0, row=2)
    damage_frame(store, "embed.weight", 0, row=9)
    flip(store / "deltas" / "zarr.json")
    done = relex_stream.verify(store, against=left, repair=True)
    assert done.repaired == ("deltas/mlp.weight/c.0.0", "deltas/zarr.json")
    assert done.problems
    assert all("embed.weight" in problem for problem in done.problems)


def test_without_checkpoints_the_base_and_the_tree_are_rebuilt(run, whole, store):
    shutil.rmtree(store / "base")
    (store / "deltas" / "scale" / "zarr.json").write_bytes(b"{}")
    done = relex_stream.verify(store, base=run.base, repair=True)
    assert done.problems == ()
    assert contents(store) == contents(whole)


def test_the_base_is_led_back_to_from_a_checkpoint(run, whole, store, tmp_path):
    shutil.rmtree(store / "base" / "embed.weight")
    shutil.rmtree(store / "base" / "position_ids")
    moved = tmp_path / "moved"  # where the store looks for the base there is none
    shutil.copytree(store, moved / "deep" / "store")
    done = relex_stream.verify(moved / "deep" / "store", against=run.checkpoints, repair=True)
    assert done.problems == ()
    assert contents(moved / "deep" / "store") == contents(whole)


def test_a_dry_run_says_what_would_be_rebuilt_and_writes_nothing(run, store):
    flip(store / "deltas" / "mlp.weight" / "c.0.0")
    flip(store / "zarr.json")
    before = contents(store)
    told = relex_stream.verify(store, against=run.checkpoints, repair=True, dry_run=True)
    assert told.repaired == ("deltas/mlp.weight/c.0.0", "zarr.json")
    assert told.problems
    assert contents(store) == before
    with pytest.raises(OptionError, match="give --repair too"):
        relex_stream.verify(store, dry_run=True)


def test_an_intact_store_is_left_as_it_is(run, whole, store):
    done = relex_stream.verify(store, against=run.checkpoints, repair=True)
    assert (done.problems, done.repaired) == ((), ())
    assert contents(store) == contents(whole)


def test_a_store_without_the_base_is_rebuilt_too(run, tmp_path):
    store = tmp_path / "store"
    build_store(run.base, run.checkpoints, store, block_bytes=1024)
    before = contents(store)
    shutil.rmtree(store / "deltas")
    done = relex_stream.verify(store, against=run.checkpoints, repair=True)
    assert done.problems == ()
    assert contents(store) == before


@pytest.mark.parametrize("pair", [("BF16", "F32"), ("F16", "F32"), ("F32", "F32"), ("F16", "F16")])
def test_other_dtypes_are_rebuilt(tmp_path, pair):
    base_dtype, dtype = pair
    run = make_trajectory(
        tmp_path, steps=(1, 2, 3), tensors={"w": (50, 9)}, base_dtype=base_dtype, dtype=dtype
    )
    store = tmp_path / "store"
    build_store(run.base, run.checkpoints, store, include_base=True, block_bytes=512)
    before = contents(store)
    shutil.rmtree(store / "deltas" / "w")
    shutil.rmtree(store / "base" / "w")
    done = relex_stream.verify(store, against=run.checkpoints, base=run.base, repair=True)
    assert done.problems == ()
    assert contents(store) == before


def test_a_cast_run_is_rebuilt_with_the_same_cast(tmp_path):
    run = make_trajectory(
        tmp_path,
        steps=(1, 2, 3),
        tensors={"w": (50, 9)},
        base_dtype="BF16",
        dtype="F32",
        change_share=0.3,
    )
    store = tmp_path / "store"
    build_store(run.base, run.checkpoints, store, cast="bf16")
    before = contents(store)
    shutil.rmtree(store / "deltas" / "w")
    kept = relex_stream.verify(store, against=run.checkpoints, repair=True)
    assert kept.problems
    assert any("F32" in note for note in kept.notes)
    done = relex_stream.verify(store, against=run.checkpoints, repair=True, cast="bf16")
    assert done.problems == ()
    assert done.compared == (1, 2, 3)
    assert contents(store) == before


def test_a_damaged_record_is_named_and_steps_can_be_taken_in_anew(run, store):
    (record,) = (store / "commits").glob("000000000012-*")
    flip(record)
    done = relex_stream.verify(store, against=run.checkpoints, repair=True)
    assert any("step 12" in problem for problem in done.problems)
    build_store(run.base, run.checkpoints, store, replace_from=12)
    again = relex_stream.verify(store, against=run.checkpoints)
    assert again.problems == ()
    assert again.compared == STEPS


def test_a_store_that_somebody_writes_to_is_not_repaired(run, store):
    flip(store / "zarr.json")
    with StoreWriter(store), pytest.raises(StoreBusyError):
        relex_stream.verify(store, repair=True)
    assert relex_stream.verify(store, repair=True).repaired == ("zarr.json",)


def test_leftovers_of_a_killed_run_are_swept_once_recipes_are_there_again(run, whole, store):
    left = store / "commits" / "000000000099-00000000.safetensors"
    left.write_bytes(b"left over")
    (store / "LOCK").write_text("process 1 on elsewhere\n")
    shutil.rmtree(store / "blobs")
    done = relex_stream.verify(store, against=run.checkpoints, base=run.base, repair=True)
    assert done.problems == ()
    assert not left.exists()
    assert (store / "LOCK").read_bytes() == b""
    assert contents(store) == contents(whole)


def test_a_repair_that_is_interrupted_leaves_each_file_old_or_new(run, whole, store, monkeypatch):
    """At every call that changes the disk; the next repair completes."""
    shutil.rmtree(store / "deltas" / "mlp.weight")
    flip(store / "zarr.json")
    expected, damaged = contents(whole), contents(store)
    for stop in itertools.count():
        calls = itertools.count()
        with monkeypatch.context() as patched:
            for name in ("write_file", "rename", "make_directory", "sync_file"):
                patched.setattr(files, name, _ends(getattr(files, name), calls, stop))
            try:
                relex_stream.verify(store, against=run.checkpoints, repair=True, workers=1)
            except _EndedError:
                pass
            else:
                break
        for key, data in contents(store).items():
            if not key.endswith(".partial"):
                assert data in (expected.get(key), damaged.get(key)), key
    assert stop > 10
    assert relex_stream.verify(store, against=run.checkpoints, repair=True).problems == ()
    assert contents(store) == expected


class _EndedError(BaseException):
    pass


def _ends(call: Callable[..., object], calls: Iterator[int], stop: int) -> Callable[..., object]:
    def ended(*arguments: object) -> object:
        if next(calls) >= stop:
            raise _EndedError
        return call(*arguments)

    return ended


def test_random_damage_with_random_checkpoints_never_makes_anything_worse(run, whole, tmp_path):
    """What is left is damaged as it was, or as it was committed; nothing else."""
    chance = random.Random(5)
    expected = contents(whole)
    keys = rebuildable(whole)
    rebuilt = 0
    for number in range(25):
        store = Path(shutil.copytree(whole, tmp_path / f"store-{number}"))
        left = tmp_path / f"left-{number}"
        left.mkdir()
        for step in chance.sample(STEPS, chance.randrange(4)):
            shutil.copytree(run.checkpoints / f"global_step_{step}", left / f"global_step_{step}")
        for key in chance.sample(keys, 4):
            chance.choice(list(DAMAGE.values()))(store / key)
        damaged = contents(store)
        against = left if any(left.iterdir()) else None
        done = relex_stream.verify(store, against=against, repair=True, workers=1)
        after = contents(store)
        for key in expected.keys() | after.keys():
            assert after.get(key) in (expected[key], damaged.get(key)), key
        assert bool(done.problems) == (after != expected)
        rebuilt += len(done.repaired)
    assert rebuilt > 20


def damage_frame(store: Path, tensor: str, block: int, row: int) -> None:
    """Flip a bit in the body of one frame."""
    opened = relex_stream.store.Store(store)
    column = opened.tensors[tensor].first_block + block
    group = row // 16
    sizes = opened.frame_bytes[16 * group : row, column]
    assert opened.frame_bytes[row, column] > 0
    path = store / "deltas" / tensor / f"c.{group}.{block}"
    data = bytearray(path.read_bytes())
    data[int(sizes.sum()) + 25] ^= 4
    path.write_bytes(data)


def test_messages_say_what_is_needed(run, store, tmp_path):
    """Of a lost chunk one line, not one for each of its frames."""
    (store / "deltas" / "scale" / "c.0.0").write_bytes(b"")
    (store / "deltas" / "mlp.weight" / "c.0.0").unlink()
    (store / "base" / "embed.weight" / "c.0.1").unlink()
    moved = Path(shutil.copytree(store, tmp_path / "deep" / "moved"))
    problems = relex_stream.verify(moved, repair=True, workers=1).problems
    told = [problem for problem in problems if "cannot be rebuilt" in problem]
    assert told[0] == (
        "the base's tensor embed.weight, block 1, cannot be rebuilt: give the base it was built "
        "over (--base)"
    )
    assert told[1] == (
        "chunk deltas/mlp.weight/c.0.0 cannot be rebuilt: step 1, tensor mlp.weight, block 0 "
        "(and 15 more of it): the checkpoint of step 1 is needed (--against)"
    )


# --- against ------------------------------------------------------------------------------------


def test_steps_are_compared_and_those_without_a_checkpoint_told(run, store, tmp_path):
    left = tmp_path / "left"
    left.mkdir()
    for step in (2, 17):
        shutil.copytree(run.checkpoints / f"global_step_{step}", left / f"global_step_{step}")
    found = relex_stream.verify(store, against=left)
    assert found.problems == ()
    assert found.compared == (2, 17)
    assert found.not_compared == tuple(step for step in STEPS if step not in (2, 17))
    assert found.compared_bytes > 2 * sum(bits.nbytes for bits in run.bits[2].values())


def test_one_weight_that_differs_is_named(run, store, tmp_path):
    left = tmp_path / "left"
    bits = {name: array.copy() for name, array in run.bits[4].items()}
    bits["mlp.weight"][123] ^= 1
    write_model(
        left / "global_step_4" / "huggingface",
        {name: raw(array, "BF16") for name, array in bits.items()} | CONSTANTS,
    )
    problems = relex_stream.verify(store, against=left).problems
    assert any(
        "step 4: tensor mlp.weight, block 0: 1 of 300 elements" in one and "element 123" in one
        for one in problems
    )


def test_a_checkpoint_that_is_no_longer_whole_is_a_note_and_no_problem(run, store, tmp_path):
    left = Path(shutil.copytree(run.checkpoints, tmp_path / "left"))
    cut(next((left / "global_step_7").rglob("*.safetensors")))
    found = relex_stream.verify(store, against=left)
    assert found.problems == ()
    assert found.not_compared == (7,)
    (note,) = found.notes
    assert note.startswith("the checkpoint of step 7 is left out: ")


def test_bad_input_is_refused(run, store, tmp_path):
    with pytest.raises(SourceError):
        relex_stream.verify(store, against=tmp_path / "nothing")
    with pytest.raises(SourceError, match="no base at"):
        relex_stream.verify(store, base=tmp_path / "nothing", repair=True)
    with pytest.raises(OptionError, match="--as must be bf16"):
        relex_stream.verify(store, against=run.checkpoints, cast="fp8")


def test_more_rows_in_the_tree_than_are_committed_are_no_damage(whole, store):
    """An append that is at work, or was killed, has grown the arrays."""
    path = store / "deltas" / "mlp.weight" / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b"[32, 300]", b"[48, 300]"))
    assert b"[48, 300]" in path.read_bytes()
    assert relex_stream.verify(store).problems == ()
    path.write_bytes(path.read_bytes().replace(b"[48, 300]", b"[16, 300]"))
    assert len(relex_stream.verify(store).problems) == 1


def test_the_arithmetic_of_the_test_itself(run):
    """Frames are not all empty: every step changes something in the tensor that is damaged."""
    for before, after in itertools.pairwise((0, *STEPS)):
        assert np.any(run.bits[before]["mlp.weight"] != run.bits[after]["mlp.weight"])
