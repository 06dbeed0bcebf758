import os

import fsspec
import pytest

from relex_stream.errors import SourceError
from relex_stream.locations import location
from relex_stream.sources import directories, open_checkpoint, side_files
from relex_stream.sources.side_files import MAX_SIDE_FILE_BYTES, names_below, sort_listed
from tests.make_checkpoints import SIDE_FILES, write_model

KEPT = [
    "1_Pooling/config.json",
    "assets/deep/er/figure.png",
    "code/modeling.py",
    "template's/ü.jinja",
]
"""Of directories that hold nothing else, but for what is left lying."""

LEFT_OUT = {
    "checkpoint-10": ["config.json", "model.safetensors"],
    "global_step5": ["notes.txt", "mp_rank_00_model_states.pt"],
    "hidden": ["a/b/c/optimizer_state/x.json", "a/config.json"],
    "optimizer_0": ["x.json"],
    "original": ["consolidated.00.pth", "params.json"],
    ".git": ["config"],
    "__pycache__": ["modeling.pyc"],
    "no\\name": ["config.json"],
    "odd": ["a\\b.json"],
}


@pytest.fixture
def model(tmp_path):
    """A model directory with subdirectories of all kinds."""
    directory = write_model(tmp_path / "model", {"a": ("F32", (1,), b"aaaa")})
    lying = ["code/__pycache__/modeling.pyc", "code/.lock", "assets/deep/figure.png.tmp"]
    others = [f"{name}/{path}" for name, paths in LEFT_OUT.items() for path in paths]
    for path in [*KEPT, *lying, *others]:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(path)
    (directory / "empty/er").mkdir(parents=True)
    (directory / "code/gone.json").symlink_to(tmp_path / "nothing")
    return directory


def listed(directory):
    """Every regular file below, with its size."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def test_subdirectories_are_kept_as_a_whole_or_not_at_all(model):
    checkpoint = open_checkpoint(model, 1)
    assert sorted(checkpoint.side_files) == sorted([*SIDE_FILES, *KEPT])
    assert sorted(checkpoint.skipped_files) == sorted(f"{name}/" for name in LEFT_OUT)


def test_a_listing_says_what_a_directory_does(model):
    names = sorted(os.listdir(model))
    assert sorted(sort_listed(listed(model))) == sorted(names_below(model, names))


def test_it_is_the_same_on_object_storage(model):
    fs = fsspec.filesystem("memory")
    for path in listed(model):
        fs.pipe_file(f"/models/it/{path}", (model / path).read_bytes())
    try:
        there = open_checkpoint(location("memory://models/it"), 1)
    finally:
        fs.rm("/models", recursive=True)
    here = open_checkpoint(model, 1)
    assert sorted(there.side_files) == sorted(here.side_files)
    assert sorted(there.skipped_files) == sorted(here.skipped_files)


def test_a_large_file_is_of_something_else(model):
    with (model / "code/weights.npy").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES + 1)
    assert "code/" in names_below(model, ["code"])
    with (model / "code/weights.npy").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES)
    assert "code/weights.npy" in names_below(model, ["code"])


def test_links_to_directories_are_not_entered(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.json").write_text("{}")
    (model / "linked").symlink_to(tmp_path / "elsewhere")
    (model / "code/linked").symlink_to(tmp_path / "elsewhere")
    found = names_below(model, ["code", "linked"])
    assert [name for name in found if "linked" in name or "secret" in name] == []


def test_very_many_files_are_not_a_models(model, monkeypatch):
    for number in range(8):
        (model / f"code/{number}.py").write_text("")
    assert len(names_below(model, ["code"])) == 9
    for module in (directories, side_files):
        monkeypatch.setattr(module, "MOST_ENTRIES", 8)
    assert names_below(model, ["code"]) == ["code/"]
    assert [name for name in sort_listed(listed(model)) if name.startswith("code/")] == ["code/"]
    with pytest.raises(SourceError, match="more than 8 files and directories; move"):
        directories.list_files(model / "code")
