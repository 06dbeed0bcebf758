from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from relex_stream import writer
from relex_stream.errors import OutputError
from relex_stream.writer import MARKER, OutputDirectory


def tree(directory):
    """Return the files below a directory and their bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def names(directory):
    return sorted(path.name for path in directory.iterdir())


MARKED = json.dumps({"files": ["model.safetensors", MARKER]}).encode()


def write_output(path, content=b"weights", **options):
    with OutputDirectory(path, **options) as output:
        output.preallocate("model.safetensors", len(content))
        output.write("model.safetensors", 0, content)
        output.write_file(MARKER, MARKED)
        output.finish()


# --- whole or absent ---------------------------------------------------------------------------


def test_a_finished_output_has_every_file_and_leaves_nothing_beside_it(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with OutputDirectory(out) as output:
        output.preallocate("a/b/model-1.safetensors", 6)
        output.preallocate("empty", 0)
        output.write("a/b/model-1.safetensors", 3, b"def")
        output.write("a/b/model-1.safetensors", 0, memoryview(bytearray(b"abc")))
        output.write("empty", 0, b"")
        output.write_file("config.json", b"{}")
        assert not out.exists()
        output.finish()
    assert tree(out) == {"a/b/model-1.safetensors": b"abcdef", "empty": b"", "config.json": b"{}"}
    assert names(out.parent) == ["out"]


def test_numbers_are_written_as_their_bytes(tmp_path):
    numbers = np.arange(6, dtype=np.uint16)
    with OutputDirectory(tmp_path / "out") as output:
        output.preallocate("x", 16)
        output.write("x", 4, numbers.data)
        output.write("x", 0, b"HEAD")
        output.finish()
    assert (tmp_path / "out" / "x").read_bytes() == b"HEAD" + numbers.tobytes()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_error_inside_leaves_nothing(tmp_path, error):
    def broken_run():
        with OutputDirectory(tmp_path / "out") as output:
            output.preallocate("model.safetensors", 4)
            output.write("model.safetensors", 0, b"abcd")
            raise error

    with pytest.raises(type(error)):
        broken_run()
    assert names(tmp_path) == []


def test_without_finish_there_is_nothing(tmp_path):
    with OutputDirectory(tmp_path / "out") as output:
        output.write_file("config.json", b"{}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("written", [[], [(0, b"abc")], [(0, b"ab"), (2, b"cd"), (4, b"ef")]])
def test_an_output_with_missing_bytes_is_not_given_its_name(tmp_path, written):
    with OutputDirectory(tmp_path / "out") as output:
        output.write_file("config.json", b"{}")
        output.preallocate("model", 8)
        for offset, data in written:
            output.write("model", offset, data)
        with pytest.raises(AssertionError, match=r"model: \d of 8 bytes were written"):
            output.finish()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("offset", "data"), [(-1, b"a"), (4, b"a"), (3, b"ab"), (0, b"abcde")])
def test_nothing_is_written_outside_a_file(tmp_path, offset, data):
    with OutputDirectory(tmp_path / "out") as output:
        output.preallocate("model", 4)
        with pytest.raises(AssertionError, match="write outside model"):
            output.write("model", offset, data)


def test_a_filler_syncs_once_all_that_its_thread_wrote(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(writer, "_sync", synced.append)
    with OutputDirectory(tmp_path / "out") as output:
        for name in "abc":
            output.preallocate(name, 2)
        filler = pickle.loads(pickle.dumps(output.filler))
        for name in "ab":
            filler.write(name, 0, b"x")
            assert filler.take_written() == {name: 1}
        with ThreadPoolExecutor(1) as other:
            other.submit(filler.write, "c", 0, b"x").result()
            filler.sync()
            assert synced == [filler.directory / "a", filler.directory / "b"]
            assert other.submit(filler.take_written).result() == {"c": 1}
            other.submit(filler.sync).result()
        assert synced[2:] == [filler.directory / "c"]
        filler.sync()
        assert len(synced) == 3


def test_files_and_directories_are_synced_before_the_name_is_given(tmp_path, monkeypatch):
    out = tmp_path / "out"
    events = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recorded_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    with OutputDirectory(out) as output:
        output.write_file("sub/one", b"1")
        output.preallocate("two", 1)
        output.write("two", 0, b"2")
        output.finish()
    at = events.index("rename")
    partial = str(output.filler.directory)
    expected = {f"{partial}{rest}" for rest in ("", "/sub", "/sub/one", "/two")}
    assert set(events[:at]) == expected
    assert events[at + 1 :] == [str(tmp_path)]


# --- what is there already ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "empty", "file", "link", "broken link"])
def test_what_exists_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "ours":
        write_output(out)
    elif kind == "empty":
        out.mkdir()
    elif kind == "file":
        out.write_bytes(b"mine")
    else:
        target = tmp_path / "target"
        if kind == "link":
            target.mkdir()
        out.symlink_to(target)
    before = names(tmp_path)
    output = OutputDirectory(out)
    with pytest.raises(OutputError, match=r"out exists; name another directory.* --overwrite"):
        output.check(1)
    with pytest.raises(OutputError, match="out exists"):
        output.__enter__()
    assert names(tmp_path) == before


def test_overwrite_replaces_what_this_package_wrote(tmp_path):
    out = tmp_path / "out"
    write_output(out, b"old")
    OutputDirectory(out, overwrite=True).check(1)
    write_output(out, b"newer", overwrite=True)
    assert tree(out) == {"model.safetensors": b"newer", MARKER: MARKED}
    assert names(tmp_path) == ["out"]


def test_overwrite_keeps_what_was_added_to_an_output_since(tmp_path):
    out = tmp_path / "out"
    write_output(out, b"old")
    (out / "scores.json").write_bytes(b"days of evaluation")
    with pytest.raises(OutputError, match=r"holds scores\.json, which relex-stream did not"):
        write_output(out, overwrite=True)
    assert tree(out)["scores.json"] == b"days of evaluation"
    assert tree(out)["model.safetensors"] == b"old"


@pytest.mark.parametrize("marker", [b"", b"{}", b"[]", b'{"files": 3}', b'{"files": [4]}'])
def test_a_marker_that_lists_nothing_allows_nothing(tmp_path, marker):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_bytes(marker)
    with pytest.raises(OutputError, match="left as it is"):
        write_output(out, overwrite=True)
    assert tree(out) == {MARKER: marker}


def test_a_directory_with_a_foreign_file_is_kept(tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"old")
    (out / "sub" / "thesis.tex").write_bytes(b"years")
    (out / MARKER).write_bytes(MARKED)
    output = OutputDirectory(out, overwrite=True)
    for refusing in (lambda: output.check(1), output.__enter__):
        with pytest.raises(OutputError, match=r"holds sub/thesis\.tex, which relex-stream did not"):
            refusing()
    assert tree(out) == {"model.safetensors": b"old", "sub/thesis.tex": b"years", MARKER: MARKED}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "link inside"])
def test_overwrite_does_not_replace_files_and_links(tmp_path, kind):
    out, target = tmp_path / "out", tmp_path / "target"
    write_output(target)
    if kind == "file":
        out.write_bytes(b"mine")
    elif kind == "link":
        out.symlink_to(target)
    else:
        out.mkdir()
        (out / MARKER).write_bytes(MARKED)
        (out / "model.safetensors").symlink_to(target / "model.safetensors")
    output = OutputDirectory(out, overwrite=True)
    with pytest.raises(OutputError, match="left as it is"):
        output.check(1)
    assert set(tree(target)) == {"model.safetensors", MARKER}


def test_what_comes_to_the_path_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with OutputDirectory(out) as output:
        output.write_file("config.json", b"{}")
        out.mkdir()
        (out / MARKER).write_bytes(b"another run")
        with pytest.raises(OutputError, match="out exists"):
            output.finish()
    assert tree(out) == {MARKER: b"another run"}
    assert names(tmp_path) == ["out"]


def test_a_file_that_comes_into_the_directory_to_replace_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with OutputDirectory(out, overwrite=True) as output:
        output.write_file("config.json", b"{}")
        (out / "notes").write_bytes(b"mine")
        with pytest.raises(OutputError, match="holds notes"):
            output.finish()
    assert tree(out) == {"notes": b"mine"}


# --- runs that were killed, and runs at the same time ------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from relex_stream.writer import OutputDirectory
output = OutputDirectory(Path(sys.argv[1])).__enter__()
output.preallocate("model-of-another-layout", 100)
output.write_file("deep/config.json", b"{}")
os._exit(9)
"""


def test_what_a_killed_run_left_is_cleared(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == 9
    assert names(tmp_path) == [".out.relex-partial"]
    write_output(out)
    assert set(tree(out)) == {"model.safetensors", MARKER}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_killed_between_its_renames_loses_nothing(tmp_path, fails):
    out = tmp_path / "out"
    write_output(out, b"old")
    out.rename(tmp_path / ".out.relex-old")
    (tmp_path / ".out.relex-partial").mkdir()
    if fails:
        # Without --overwrite the old output is back, and in the way as it was before.
        with pytest.raises(OutputError, match="out exists"):
            write_output(out, b"new")
        assert (out / "model.safetensors").read_bytes() == b"old"
    else:
        write_output(out, b"new", overwrite=True)
        assert (out / "model.safetensors").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_a_run_killed_after_its_renames_leaves_the_new_output(tmp_path):
    out = tmp_path / "out"
    write_output(out, b"old")
    shutil.copytree(out, tmp_path / ".out.relex-old")
    write_output(out, b"new", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_brings_the_old_output_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_output(out, b"old")
    rename = os.rename

    def failing(source, target):
        if Path(source).parent.name == ".out.relex-partial":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match=r"finishing .*out failed: Input/output error"):
        write_output(out, b"new", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "out"
    with OutputDirectory(out) as output:
        output.preallocate("model", 4)
        with pytest.raises(OutputError, match=r"another process is writing .*out; wait for it"):
            OutputDirectory(out).__enter__()
        output.write("model", 0, b"abcd")
        output.finish()
    assert tree(out) == {"model": b"abcd"}


def test_the_lock_ends_with_the_run(tmp_path):
    out = tmp_path / "out"
    for error in (RuntimeError, OSError):
        with pytest.raises(error), OutputDirectory(out):
            raise error
    out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        OutputDirectory(out).__enter__()
    out.rmdir()
    write_output(out)


def test_two_outputs_side_by_side_do_not_meet(tmp_path):
    with OutputDirectory(tmp_path / "a") as first, OutputDirectory(tmp_path / "b") as second:
        first.write_file("x", b"a")
        second.write_file("x", b"b")
        second.finish()
        first.finish()
    assert tree(tmp_path) == {"a/x": b"a", "b/x": b"b"}


# --- places and room ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escape", "a/../../escape", "/etc/escape", "", ".", "a//b"])
def test_paths_out_of_the_directory_are_refused(tmp_path, name):
    with OutputDirectory(tmp_path / "out") as output:
        for making in (lambda: output.preallocate(name, 1), lambda: output.write_file(name, b"")):
            with pytest.raises(OutputError, match="is no path inside the output"):
                making()
    assert names(tmp_path) == []


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(writer.shutil, "disk_usage", disk_usage)
    output = OutputDirectory(tmp_path / "not" / "yet" / "out")
    output.check(1000)
    with pytest.raises(OutputError, match=r"needs 1001 bytes, .* has 1000 free"):
        output.check(1001)
    assert asked == [tmp_path, tmp_path]
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out"])
def test_a_place_below_a_file_is_refused(tmp_path, place):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match="file is not a directory; name another place"):
        OutputDirectory(tmp_path / place).check(1)
    with pytest.raises(OutputError, match=r"preparing .*out failed"):
        OutputDirectory(tmp_path / place).__enter__()
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["pwrite", "truncate", "write_bytes"])
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        with OutputDirectory(tmp_path / "out") as output:
            if call == "truncate":
                # Larger than any file may be.
                output.preallocate("model", 1 << 62)
            elif call == "write_bytes":
                monkeypatch.setattr(writer.Path, "write_bytes", full)
                output.write_file("config.json", b"{}")
            else:
                monkeypatch.setattr(os, "pwrite", full)
                output.preallocate("model", 4)
                output.write("model", 0, b"abcd")

    with pytest.raises(OutputError, match=r"(model|config\.json) of .*out failed: [A-Z]"):
        fill()
    assert names(tmp_path) == []


def test_partial_writes_of_the_system_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: pwrite(d, bytes(data[:3]), at))
    write_output(tmp_path / "out", b"0123456789")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"0123456789"


# --- threads and hashes ------------------------------------------------------------------------


def test_threads_may_write_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    content = rng.bytes(200_003)
    cuts = [0, *np.sort(rng.choice(np.arange(1, len(content)), 400, replace=False)), len(content)]
    parts = [(int(a), int(b)) for a, b in pairwise(cuts)]
    rng.shuffle(parts)
    with OutputDirectory(tmp_path / "out") as output:
        output.preallocate("model", len(content))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda ab: output.write("model", ab[0], content[ab[0] : ab[1]]), parts))
        output.finish()
    assert (tmp_path / "out" / "model").read_bytes() == content


def test_hashes_are_those_of_the_files(tmp_path):
    content = np.random.default_rng(1).bytes((2 << 20) + 5)
    reported = []
    with OutputDirectory(tmp_path / "out") as output:
        output.write_file("b/config.json", b"{}")
        output.preallocate("a", len(content))
        output.write("a", 0, content)
        digests = output.hash_files(reported.append)
        output.finish()
    assert digests == {
        "a": hashlib.sha256(content).hexdigest(),
        "b/config.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert sum(reported) == len(content) + 2


def test_a_relative_path_and_a_moved_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with OutputDirectory(writer.Path("out")) as output:
        monkeypatch.chdir(tmp_path / "elsewhere")
        output.write_file("x", b"1")
        output.finish()
    assert tree(tmp_path) == {"out/x": b"1"}


def test_a_file_system_that_keeps_names_of_open_files_is_no_error(tmp_path, monkeypatch):
    # As NFS does: a file that is removed while it is open stays under another name until then.
    unlink, close, kept = os.unlink, os.close, {}

    def hide(path, **options):
        if str(path).endswith("LOCK"):
            hidden = f"{os.path.dirname(path)}/.nfs0001"
            os.rename(path, hidden)
            kept[os.stat(hidden).st_ino] = hidden
            return
        unlink(path, **options)

    def forget(descriptor):
        inode = os.fstat(descriptor).st_ino
        close(descriptor)
        if inode in kept:
            unlink(kept.pop(inode))

    monkeypatch.setattr(os, "unlink", hide)
    monkeypatch.setattr(os, "close", forget)
    write_output(tmp_path / "out", b"old")
    write_output(tmp_path / "out", b"new", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_runs_have_directories_of_their_own(tmp_path):
    # A task of a run that was given up may still be writing.
    directories = set()
    for _ in range(2):
        with OutputDirectory(tmp_path / "out") as output:
            directories.add(output.filler.directory)
            assert output.filler.directory.is_dir()
    assert len(directories) == 2


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, opened = fcntl.flock, []

    def removed_before(descriptor, kind):
        if not opened:
            opened.append(descriptor)
            shutil.rmtree(tmp_path / ".out.relex-partial")
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with OutputDirectory(tmp_path / "out") as output:
        assert (tmp_path / ".out.relex-partial" / "LOCK").exists()
        output.write_file("x", b"1")
        output.finish()
    assert tree(tmp_path) == {"out/x": b"1"}


# --- single files ------------------------------------------------------------------------------


def test_a_single_file_appears_whole_and_replaces_only_if_asked(tmp_path):
    path = tmp_path / "page.html"
    writer.write_file(path, b"one", overwrite=False)
    with pytest.raises(OutputError, match="exists; name another file"):
        writer.write_file(path, b"two", overwrite=False)
    assert tree(tmp_path) == {"page.html": b"one"}
    writer.write_file(path, b"two", overwrite=True)
    assert tree(tmp_path) == {"page.html": b"two"}


def test_what_is_no_plain_file_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is not a plain file"),
        ("pipe", "is not a plain file"),
        (".", "is a directory; name a file"),
        ("missing/file", "there is no directory"),
    ):
        with pytest.raises(OutputError, match=message):
            writer.write_file(tmp_path / name, b"new", overwrite=True)
    assert names(tmp_path) == ["file", "link", "pipe"]
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_single_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch, call):
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=r"writing .*page.html failed: No space left"):
        writer.write_file(path, b"new", overwrite=True)
    assert tree(tmp_path) == {"page.html": b"old"}
