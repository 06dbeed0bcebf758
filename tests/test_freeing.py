"""What is deleted, and above all what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.freeing import KeptError, Remover, files_to_free, steps_to_free
from relex_stream.sources import open_checkpoint
from relex_stream.specs import SourceCheckpoint
from relex_stream.watch_ledger import VerifiedFile
from tests.make_checkpoints import write_model

TENSORS = {"a": ("U8", (4,), b"abcd"), "b": ("U8", (2,), b"ef")}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "run" / "step_1").mkdir(parents=True)
    return tmp_path / "run"


def verified(root: Path, path: str) -> VerifiedFile:
    status = (root / path).stat()
    return VerifiedFile(path, status.st_size, status.st_mtime_ns)


def written(path: Path, data: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def assert_kept(root: Path, file: VerifiedFile, why: str, **options: object) -> None:
    remover = Remover(root, options.get("protected", ()))  # type: ignore[arg-type]
    for act in (remover.check, remover.remove):
        with pytest.raises(KeptError, match=why):
            act(file)
    assert os.path.lexists(root / file.path)


def test_a_verified_file_is_removed_and_nothing_beside_it(root):
    path = written(root / "step_1" / "model.safetensors")
    other = written(root / "step_1" / "optimizer.pt")
    file, remover = verified(root, "step_1/model.safetensors"), Remover(root, ())
    assert remover.check(file) == 7
    assert path.exists()
    assert remover.remove(file) == 7
    assert not path.exists()
    assert other.exists()
    assert remover.check(file) == remover.remove(file) == 0  # gone before


def test_one_whose_directory_is_gone_is_gone(root):
    assert Remover(root, ()).remove(VerifiedFile("step_2/actor/x", 1, 1)) == 0


def test_a_file_that_changed_stays(root):
    path = written(root / "step_1" / "x")
    file = verified(root, "step_1/x")
    path.write_bytes(b"longer weights")
    os.utime(path, ns=(file.modified_ns, file.modified_ns))
    assert_kept(root, file, "has changed since it was verified")
    path.write_bytes(b"weights")
    os.utime(path, ns=(file.modified_ns + 1, file.modified_ns + 1))
    assert_kept(root, file, "has changed since it was verified")
    path.unlink()
    path.mkdir()
    assert_kept(root, file, "has changed since it was verified")


def test_a_link_goes_and_its_target_stays(root):
    target = written(root / "blobs" / "x")
    link = root / "step_1" / "x"
    link.symlink_to("../blobs/x")
    file = verified(root, "step_1/x")
    assert Remover(root, ()).remove(file) == 0
    assert not os.path.lexists(link)
    assert target.read_bytes() == b"weights"


def test_a_link_out_of_the_checkpoints_stays(root):
    target = written(root.parent / "elsewhere" / "x")
    (root / "step_1" / "x").symlink_to(target)
    assert_kept(root, verified(root, "step_1/x"), "a link to a file outside")
    assert target.exists()


def test_nothing_is_reached_through_a_directory_that_leads_out(root):
    target = written(root.parent / "elsewhere" / "x")
    (root / "step_2").symlink_to(target.parent)
    assert_kept(root, verified(root, "step_2/x"), "lies outside the checkpoints")
    assert target.exists()


def test_a_linked_directory_inside_is_followed(root):
    target = written(root / "real" / "x")
    (root / "step_2").symlink_to("real")
    assert Remover(root, ()).remove(verified(root, "step_2/x")) == 7
    assert not target.exists()


def test_a_directory_that_becomes_a_link_on_the_way_is_not_followed(root, monkeypatch):
    target = written(root.parent / "elsewhere" / "x")
    written(root / "step_1" / "x")
    file = verified(root, "step_1/x")
    real_path = os.path.realpath

    def swap(path: str) -> str:
        found = real_path(path)
        if found == str(root / "step_1"):
            (root / "step_1").rename(root / "moved")
            (root / "step_1").symlink_to(target.parent)
        return found

    remover = Remover(root, ())
    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(KeptError, match="cannot be removed"):
        remover.remove(file)
    assert target.exists()
    assert (root / "moved" / "x").exists()


def test_a_sibling_with_the_same_beginning_is_outside(root):
    target = written(root.parent / "run-2" / "x")
    (root / "step_2").symlink_to(target.parent)
    assert_kept(root, verified(root, "step_2/x"), "lies outside the checkpoints")


def test_the_base_stays_under_any_name(root):
    base = written(root.parent / "base" / "model.safetensors")
    os.link(base, root / "step_1" / "hard")
    written(root / "base-here")
    (root / "step_1" / "soft").symlink_to("../base-here")
    protected = (base, root / "base-here")
    for name in ("hard", "soft"):
        assert_kept(root, verified(root, f"step_1/{name}"), "of the base", protected=protected)


def test_what_has_another_name_frees_nothing(root):
    path = written(root / "step_1" / "x")
    os.link(path, root / "other-name")
    assert Remover(root, ()).remove(verified(root, "step_1/x")) == 0
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_a_directory_that_cannot_be_written_keeps_its_files(root):
    written(root / "step_1" / "x")
    file = verified(root, "step_1/x")
    (root / "step_1").chmod(0o500)
    with pytest.raises(KeptError, match="cannot be removed: Permission denied"):
        Remover(root, ()).remove(file)


def test_an_unlink_that_fails_keeps_the_file(root, monkeypatch):
    written(root / "step_1" / "x")

    def refuse(path: str, *, dir_fd: int) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(KeptError, match="step_1/x cannot be removed: Permission denied"):
        Remover(root, ()).remove(verified(root, "step_1/x"))


# --- which files, which steps --------------------------------------------------------------------


def test_files_with_state_inside_are_not_freed(root):
    opened = open_checkpoint(write_model(root / "step_3" / "hf", TENSORS, shards=2), 3)
    first, second = opened.weights_files
    with_state = type(second)(second.relative_path, second.size, second.modified_ns, None)
    source = SourceCheckpoint(3, opened.directory, opened.tensors, (first, with_state), (), ())
    assert files_to_free(source, root) == (
        VerifiedFile(f"step_3/hf/{first.relative_path}", first.size, first.modified_ns),
    )


@given(
    stored=st.sets(st.integers(1, 60)),
    verified=st.sets(st.integers(1, 60)),
    every=st.none() | st.integers(1, 9),
    last=st.integers(0, 5),
)
def test_steps_are_kept_as_asked(stored, verified, every, last):
    freed = steps_to_free(verified, sorted(stored), keep_every=every, keep_last=last)
    assert freed == sorted(freed)
    for step in verified:
        is_last = step in stored and sum(other > step for other in stored) < last
        is_multiple = every is not None and step % every == 0
        assert (step in freed) == (not is_last and not is_multiple)
    assert set(freed) <= verified
