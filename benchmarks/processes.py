"""Run whole processes and measure them: time, and the resident memory of everything they start.

The sampler shares the machine with what it measures, so it does little: a read of one small file
per process every few milliseconds, and a look for new children every 50. It costs 1 to 2 % of a
core, most of that for waking up.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

SAMPLE_S = 0.005
"""Seconds between two looks at the memory of a process."""

_RESCAN_S = 0.05
_SAMPLES_KEPT = 400
_STDERR_TAIL = 4000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_WORTH_FILLING_BYTES = 1 << 30
_LEFT_FREE_BYTES = 1 << 30
_ZEROS_BYTES = 1 << 42
_LINUX = sys.platform == "linux"


class BenchmarkError(RuntimeError):
    """A measured program failed, or a measurement cannot be made here."""


@dataclass(frozen=True)
class Measurement:
    """What one whole process took.

    Attributes
    ----------
    wall_s, user_s, system_s : float
        From just before the start to the end; processor time with that of its own children.
    peak_rss_bytes : int
        Most resident bytes of the process and all its descendants together, as sampled, and at
        least what the kernel says the first process held at its peak. Pages that several processes
        share count once for each.
    samples : tuple of (float, int)
        Seconds since the start and resident bytes of the tree. Thinned to at most 400, each the
        largest of its stretch of time.
    """

    name: str
    argv: tuple[str, ...]
    exit_status: int
    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    samples: tuple[tuple[float, int], ...]
    stdout: str
    stderr_tail: str


@dataclass(frozen=True)
class Program:
    """What `alternate` runs: the command, and what has to be made ready before each run.

    Attributes
    ----------
    prepare : callable
        Called before each run, outside the time; removes the last run's output, for instance.
    reads : tuple of Path
        Files and directories to take out of the page cache before each cold run.
    sample_s : float
        As in `measure`.
    """

    name: str
    argv: Sequence[str | Path]
    prepare: Callable[[], None] = lambda: None
    reads: Sequence[Path] = ()
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    timeout_s: float = 3600.0
    sample_s: float = SAMPLE_S


def measure(
    name: str,
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 3600.0,
    sample_s: float = SAMPLE_S,
) -> Measurement:
    """Run a program to its end and measure it.

    Parameters
    ----------
    name : str
        For tables and errors.
    argv : sequence of str or Path
        Program and arguments; no shell.
    cwd, env : optional
        Working directory and whole environment, if not this process's own.
    timeout_s : float
        After this the program and what it started are killed.
    sample_s : float
        Time between two looks at the memory.

    Returns
    -------
    Measurement

    Raises
    ------
    BenchmarkError
        If the program cannot be started, takes too long or ends with a status other than 0.
    """
    words = tuple(str(word) for word in argv)
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        try:
            # A session of its own, so that a timeout reaches its children too.
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise BenchmarkError(f"{name}: cannot start {words[0]}: {error.strerror}") from error
        end = _End(process)
        tree = _Tree(process.pid)
        samples = _Samples()
        try:
            while not end.reached:
                elapsed_s = time.perf_counter() - started
                samples.add(elapsed_s, tree.resident_bytes(elapsed_s))
                if elapsed_s > timeout_s:
                    break
                # Not a wait for the end: in Python that costs twice as much as a plain sleep.
                time.sleep(sample_s)
        finally:
            timed_out = not end.reached
            if timed_out:  # or interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            end.join()
            tree.close()
        stderr_tail = _tail(stderr.fileno())
        stdout.seek(0)
        text = stdout.read().decode(errors="replace")
    if timed_out:
        raise BenchmarkError(f"{name}: not done after {timeout_s:.0f} s; it wrote:\n{stderr_tail}")
    if process.returncode != 0:
        raise BenchmarkError(
            f"{name}: exit status {process.returncode} of {' '.join(words)}\n{stderr_tail}"
        )
    return Measurement(
        name=name,
        argv=words,
        exit_status=process.returncode,
        wall_s=end.at - started,
        user_s=end.user_s,
        system_s=end.system_s,
        peak_rss_bytes=max(samples.peak, tree.root_peak_bytes),
        samples=samples.thinned(),
        stdout=text,
        stderr_tail=stderr_tail,
    )


def alternate(
    programs: Sequence[Program], *, runs: int, warmup: int = 1, cold: bool = False
) -> dict[str, list[Measurement]]:
    """Run programs in turn (A B C A B C ...), so that a drift of the machine meets all alike.

    Parameters
    ----------
    programs : sequence of Program
        With different names.
    runs : int
        Measured runs of each.
    warmup : int
        Rounds before them whose figures are thrown away.
    cold : bool
        Take each program's `reads` out of the page cache before each of its runs.

    Returns
    -------
    dict
        By program's name, its measurements in order.

    Raises
    ------
    BenchmarkError
        As `measure` and `evict` do.
    """
    measured: dict[str, list[Measurement]] = {program.name: [] for program in programs}
    if len(measured) != len(programs):
        raise ValueError("two programs have the same name")
    for number in range(warmup + runs):
        for program in programs:
            program.prepare()
            if cold:
                evict(program.reads)
            measurement = measure(
                program.name,
                program.argv,
                cwd=program.cwd,
                env=program.env,
                timeout_s=program.timeout_s,
                sample_s=program.sample_s,
            )
            if number >= warmup:
                measured[program.name].append(measurement)
    return measured


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here; kill it if it does not within 10 s."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def evict(paths: Iterable[Path]) -> None:
    """Take files, and all files below directories, out of the page cache.

    File by file, by ``fsync`` and ``posix_fadvise(DONTNEED)``: no special rights are needed. The
    memory that becomes free is filled with pages of a file of zeros, if it is much. A machine that
    has been up for a while has no free memory either; and where a virtual machine's host takes
    free memory back, the first touch of each page is so slow that programs which read the same
    bytes in the same order differ by a factor of two, by how much was taken before they began.

    Raises
    ------
    BenchmarkError
        Where there is no ``posix_fadvise`` (macOS), or if more than a twentieth of the bytes stays:
        some process has the files mapped, or they lie on a file system in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        raise BenchmarkError("files cannot be taken out of the page cache here: no posix_fadvise")
    files = _files(paths)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Only clean pages can be dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    total = sum(file.stat().st_size for file in files)
    left = sum(cached_bytes(file) for file in files)
    # Files smaller than what the kernel reads at once may keep a page.
    if left > max(total / 20, len(files) * _PAGE_BYTES):
        raise BenchmarkError(
            f"{left / 2**20:.0f} of {total / 2**20:.0f} MiB stayed in the page cache: a run would "
            "not be cold; are the files in use, or on a file system in memory?"
        )

    if total >= _WORTH_FILLING_BYTES:
        free = int(psutil.virtual_memory().free) - _LEFT_FREE_BYTES
        _zeros().bring_into_cache(free)


class _Zeros:
    """A file of zeros that takes no room on the disk; its pages stay as long as it is open."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # open until this process ends
        self.file.truncate(_ZEROS_BYTES)
        self._offset = 0

    def bring_into_cache(self, size: int) -> None:
        room = bytearray(1 << 20)
        for _ in range(0, size, len(room)):
            # On from where the last call ended: what that brought is, mostly, still there.
            os.preadv(self.file.fileno(), [room], self._offset)
            self._offset = (self._offset + len(room)) % _ZEROS_BYTES


@functools.cache
def _zeros() -> _Zeros:
    return _Zeros()


def cached_bytes(file: Path) -> int:
    """Return how much of a file is in the page cache; 0 where the kernel does not say (Linux says).

    It says so only to those who may write the file.
    """
    size = file.stat().st_size
    if not _LINUX or size == 0 or not os.access(file, os.W_OK):
        return 0
    pages = np.zeros(-(-size // _PAGE_BYTES), np.uint8)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        status = mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(pages.ctypes.data),
        )
        # The map cannot be closed while an array looks at it.
        del view
    return 0 if status else int(np.count_nonzero(pages & 1)) * _PAGE_BYTES


def directory_bytes(path: Path) -> int:
    """Return the length of a file, or of all files below a directory together."""
    return sum(file.stat().st_size for file in _files([path]))


def _files(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        if path.is_dir():
            found += [file for file in path.rglob("*") if file.is_file()]
        else:
            found.append(path)
    return found


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    first = max(0, size - _STDERR_TAIL)
    return os.pread(descriptor, size - first, first).decode(errors="replace")


class _End:
    """Waits for a process in a thread of its own: the time of its end is not rounded to samples."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.reached = False
        self.at = self.user_s = self.system_s = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        # Not Popen.wait: this also says what this child, and no other, used.
        _, status, usage = os.wait4(self._process.pid, 0)
        self.at = time.perf_counter()
        self.user_s, self.system_s = usage.ru_utime, usage.ru_stime
        # Popen must not wait again: the number may be another process's by then.
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.reached = True

    def join(self) -> None:
        """Wait until the process has ended."""
        self._thread.join()


@dataclass
class _Samples:
    """Largest values over stretches of equal length; stretches double when there are too many."""

    peak: int = 0
    _stretch_s: float = 0.005
    _largest: dict[int, tuple[float, int]] = field(default_factory=dict)

    def add(self, elapsed_s: float, resident: int) -> None:
        self.peak = max(self.peak, resident)
        self._put(elapsed_s, resident)
        while len(self._largest) > _SAMPLES_KEPT:
            self._stretch_s *= 2
            kept = self.thinned()
            self._largest.clear()
            for sample in kept:
                self._put(*sample)

    def _put(self, elapsed_s: float, resident: int) -> None:
        stretch = int(elapsed_s / self._stretch_s)
        if stretch not in self._largest or resident > self._largest[stretch][1]:
            self._largest[stretch] = (elapsed_s, resident)

    def thinned(self) -> tuple[tuple[float, int], ...]:
        return tuple(self._largest.values())


class _Tree:
    """The resident memory of a process and its descendants."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.root_peak_bytes = 0
        self._statm: dict[int, int] = {}
        # Processes known to be in the tree or outside; a new one is inside if its parent is.
        self._inside = {root}
        self._seen = _process_numbers() - {root} if _LINUX else set()
        self._next_scan_s = 0.0
        self._open(root)

    def resident_bytes(self, elapsed_s: float) -> int:
        if not _LINUX:
            return self._resident_by_psutil()
        if elapsed_s >= self._next_scan_s:
            self._scan()
            self._next_scan_s = elapsed_s + _RESCAN_S
        total = 0
        for process, descriptor in list(self._statm.items()):
            try:
                total += int(os.pread(descriptor, 128, 0).split()[1])
            except OSError:  # it has ended
                os.close(self._statm.pop(process))
        return total * _PAGE_BYTES

    def close(self) -> None:
        for descriptor in self._statm.values():
            os.close(descriptor)
        self._statm.clear()

    def _scan(self) -> None:
        """Find new processes of the tree, reading nothing about those that were there before."""
        running = _process_numbers()
        new = sorted(running - self._seen - self._inside)
        for process in new:
            self._seen.add(process)
            if _parent(process) in self._inside:
                self._inside.add(process)
                self._open(process)
        self._seen &= running
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{self._root}/status").read_text(encoding="utf-8")
            self.root_peak_bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024

    def _open(self, process: int) -> None:
        if _LINUX:
            with contextlib.suppress(OSError):
                self._statm[process] = os.open(f"/proc/{process}/statm", os.O_RDONLY)

    def _resident_by_psutil(self) -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._root)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total


def _process_numbers() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _parent(process: int) -> int | None:
    """Return the number of a process's parent, None if the process has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The program's name comes second, in brackets, and may hold anything.
    return int(text.rpartition(")")[2].split()[1])
