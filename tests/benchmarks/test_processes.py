"""Whole processes measured: memory of the tree, failures, order of runs, the page cache."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.processes import (
    BenchmarkError,
    Program,
    _Samples,
    alternate,
    cached_bytes,
    directory_bytes,
    evict,
    measure,
)

MIB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_time_output_and_memory_of_one_process():
    code = "import time; x = bytearray(64 << 20); print('done'); time.sleep(0.2)"
    measurement = measure("one", python(code))
    assert measurement.name == "one"
    assert measurement.exit_status == 0
    assert measurement.stdout == "done\n"
    assert measurement.wall_s > 0.2
    assert 0 < measurement.user_s + measurement.system_s < measurement.wall_s + 0.1
    assert 64 * MIB < measurement.peak_rss_bytes < 150 * MIB


def test_memory_of_children_counts():
    hold = "import time; x = bytearray(60 << 20); time.sleep(0.5)"
    code = f"""
import subprocess, sys
x = bytearray(50 << 20)
children = [subprocess.Popen([sys.executable, "-c", {hold!r}]) for _ in range(2)]
for child in children:
    child.wait()
"""
    measurement = measure("parent", python(code))
    assert measurement.peak_rss_bytes > 170 * MIB


def test_a_process_beside_the_tree_does_not_count():
    import subprocess

    other = subprocess.Popen(python("import time; x = bytearray(200 << 20); time.sleep(30)"))
    try:
        measurement = measure("small", python("import time; time.sleep(0.3)"))
    finally:
        other.kill()
        other.wait()
    assert measurement.peak_rss_bytes < 100 * MIB


def test_samples_are_few_and_keep_the_peak():
    samples = _Samples()
    for number in range(10_000):
        samples.add(number * 0.005, 1000 + (500 if number == 7777 else 0))
    kept = samples.thinned()
    assert 100 <= len(kept) <= 400
    assert max(resident for _, resident in kept) == samples.peak == 1500
    assert list(kept) == sorted(kept)
    assert kept[-1][0] > 49


def test_a_failure_is_told_with_what_the_program_wrote():
    code = (
        "import sys; print('first words'); sys.stderr.write('x' * 9000 + 'last words'); sys.exit(3)"
    )
    with pytest.raises(BenchmarkError, match=r"bad: exit status 3.*\n(?s:.*)last words") as caught:
        measure("bad", python(code))
    assert len(str(caught.value)) < 5000


def test_a_program_that_is_not_there():
    with pytest.raises(BenchmarkError, match="nothing: cannot start no-such-program"):
        measure("nothing", ["no-such-program"])


def test_after_the_timeout_children_are_gone_too(tmp_path):
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    with pytest.raises(BenchmarkError, match="slow: not done after 1 s"):
        measure("slow", python(code), timeout_s=1.0)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.02)
    assert not _runs(child)


def _runs(process: int) -> bool:
    import psutil

    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_working_directory_and_environment(tmp_path):
    code = "import os; print(os.getcwd(), os.environ['WORD'])"
    measurement = measure("where", python(code), cwd=tmp_path, env=os.environ | {"WORD": "spoken"})
    assert measurement.stdout.split() == [str(tmp_path.resolve()), "spoken"]


def test_programs_take_turns(tmp_path):
    log = tmp_path / "log"

    def program(name: str) -> Program:
        code = f"open({str(log)!r}, 'a').write({name!r})"
        return Program(name, python(code), prepare=lambda: _append(log, name.lower()))

    measured = alternate([program("A"), program("B")], runs=2, warmup=1)
    assert log.read_text() == "aAbB" * 3
    assert {name: len(runs) for name, runs in measured.items()} == {"A": 2, "B": 2}
    assert all(one.name == name for name, runs in measured.items() for one in runs)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_two_programs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        alternate([Program("A", ["true"]), Program("A", ["true"])], runs=1)


needs_fadvise = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")


@needs_fadvise
def test_evicted_files_are_read_from_the_disk_again(tmp_path):
    (tmp_path / "below").mkdir()
    files = [tmp_path / "one", tmp_path / "below" / "two"]
    for file in files:
        file.write_bytes(os.urandom(2 * MIB))
    assert all(cached_bytes(file) == 2 * MIB for file in files)
    try:
        evict([tmp_path])
    except BenchmarkError:
        pytest.skip("the temporary directory lies in memory")
    assert all(cached_bytes(file) == 0 for file in files)


@needs_fadvise
def test_much_that_is_evicted_is_replaced_by_other_pages(tmp_path, monkeypatch):
    import psutil

    from benchmarks import processes

    (tmp_path / "one").write_bytes(bytes(4 * MIB))
    monkeypatch.setattr(processes, "_WORTH_FILLING_BYTES", 4 * MIB)
    monkeypatch.setattr(processes, "_LEFT_FREE_BYTES", psutil.virtual_memory().free - 64 * MIB)
    processes._zeros.cache_clear()
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *call: read.append(call[2]) or preadv(*call))
    try:
        evict([tmp_path])
    except BenchmarkError:
        pytest.skip("the temporary directory lies in memory")
    zeros = processes._zeros().file
    # Free memory moves while other programs run.
    assert len(read) == len(set(read)) > 0
    assert os.fstat(zeros.fileno()).st_blocks == 0
    zeros.close()
    processes._zeros.cache_clear()


@needs_fadvise
def test_a_file_that_stays_in_the_cache_is_told(tmp_path):
    import mmap

    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(2 * MIB))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) > 0
        with pytest.raises(BenchmarkError, match="2 of 2 MiB stayed in the page cache"):
            evict([file])


@needs_fadvise
def test_cold_runs_evict_what_the_program_reads(tmp_path, monkeypatch):
    evicted = []
    monkeypatch.setattr("benchmarks.processes.evict", lambda paths: evicted.append(list(paths)))
    program = Program("A", ["true"], reads=[tmp_path])
    alternate([program], runs=1, warmup=1, cold=True)
    assert evicted == [[tmp_path], [tmp_path]]


def test_bytes_of_a_directory(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "a" / "b" / "two").write_bytes(b"123")
    assert directory_bytes(tmp_path) == 8
    assert directory_bytes(tmp_path / "one") == 5
