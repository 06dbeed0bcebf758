"""Checkpoints from the Hub, fetched one ahead of the one in use: at most two are on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from relex_stream.errors import OptionError, OutputError
from relex_stream.feeds import Arrival
from relex_stream.sources.checkpoint import INDEX_FILE
from relex_stream.sources.slime import read_weight_map
from relex_stream.specs import NoProgress, Progress
from relex_stream.urls import HubUrl
from relex_stream.wording import format_bytes

from .client import HubClient, HubFile, Stopped
from .download import CONNECTIONS, Download
from .steps import HubStep, find_weights, needed_files

ON_DISK = 2
"""Checkpoints: the one that is ingested, and the one that is fetched."""

SPARE_BYTES = 256 << 20
"""Left free on the disk: the store grows beside."""

_POLL_S = 0.1
_LOCK = "lock"


@dataclass
class _Fetching:
    """How far the fetch of a step is: begun once its size is known, and at its end an arrival."""

    download: Download | None = None
    nbytes: int | None = None
    arrival: Arrival | None = None


class HubFeed:
    """A `feeds.Feed` of a repository's steps.

    Parameters
    ----------
    client : HubClient
        Closed when the feed ends.
    url : HubUrl
        Of the run, for messages.
    steps : sequence of HubStep
        What to bring, in this order.
    directory : Path
        For the checkpoints on their way; made, and removed at the end if all were committed. What
        was left there by a run that ended early is used.

    Raises
    ------
    SourceError, HubError
        If a step has no weights that can be read, by its list of files. Nothing was fetched then.
    """

    def __init__(
        self, client: HubClient, url: HubUrl, steps: Sequence[HubStep], directory: Path
    ) -> None:
        self._client, self._url, self._steps = client, url, steps
        self._directory = directory
        self._places = find_weights(url, steps, self._listings())
        self._changed = threading.Condition()
        self._on_disk: set[int] = set()
        self._fetching = {step.step: _Fetching() for step in steps}
        self._failed: BaseException | None = None
        self._progress: Progress = NoProgress()
        self._thread = threading.Thread(target=self._fetch_all, name="hub-feed")

    def __enter__(self) -> Self:
        self._lock = _locked(self._directory)
        try:
            self._sweep()
            self._thread.start()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._client.close()
            self._changed.notify_all()
        self._thread.join()
        if any(self._directory.glob("step_*")):
            self._progress.note(
                f"{self._directory} keeps what was fetched; the same command goes on from there"
            )
        else:
            (self._directory / _LOCK).unlink()
            with contextlib.suppress(OSError):  # it is not empty: somebody else put something there
                self._directory.rmdir()
        self._lock.close()

    def arrivals(self, progress: Progress) -> Iterator[Arrival]:
        """Yield each step's checkpoint when it is on the disk, whole and checked.

        Raises
        ------
        HubError
            If the Hub does not give a file, or gives another than it says.
        OutputError
            If the disk has no room for a step, with none other on it.
        """
        self._progress = progress
        for step in self._steps:
            yield self._wait_for(step, progress)

    def committed(self, step: int) -> None:
        """Remove a step's files and let the next one come."""
        shutil.rmtree(_home(self._directory, step))
        with self._changed:
            self._on_disk.discard(step)
            self._changed.notify_all()

    def _wait_for(self, step: HubStep, progress: Progress) -> Arrival:
        fetching = self._fetching[step.step]
        shown_bytes: int | None = None
        with self._changed:
            while fetching.arrival is None:
                if self._failed is not None:
                    raise self._failed
                if fetching.download is not None and fetching.nbytes is not None:
                    if shown_bytes is None:
                        shown_bytes = 0
                        progress.start(f"fetch step {step.step}", fetching.nbytes)
                    done_bytes = fetching.download.done_bytes
                    progress.advance(max(0, done_bytes - shown_bytes))
                    shown_bytes = max(shown_bytes, done_bytes)
                self._changed.wait(_POLL_S)
        if shown_bytes is not None:
            progress.advance(max(0, (fetching.nbytes or 0) - shown_bytes))
            progress.finish()
        return fetching.arrival

    def _fetch_all(self) -> None:
        """Fetch one step after the other, in a thread of its own."""
        try:
            for step in self._steps:
                self._wait_for_turn(step)
                arrival = self._fetch(step)
                with self._changed:
                    self._fetching[step.step].arrival = arrival
                    self._changed.notify_all()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _fetch(self, step: HubStep) -> Arrival:
        place = self._places[step.step]
        home = _home(self._directory, step.step)
        download = Download(
            self._client, self._url.repository, step.commit, self._root(step), home / "journal"
        )
        shards = None
        if index := place.files.get(INDEX_FILE):
            download.fetch([index])
            shards = read_weight_map(download.path_of(index).parent).values()
        files, left_out = needed_files(place, shards)
        self._wait_for_room(step, download.missing_bytes(files))
        download.done_bytes = 0  # the index is counted with the others
        fetching = self._fetching[step.step]
        fetching.download, fetching.nbytes = download, sum(file.size for file in files)
        download.fetch(files)
        path = (self._root(step) / place.directory).relative_to(home).as_posix()
        return Arrival(step.step, self._directory, f"step_{{step}}/{path}", tuple(left_out))

    def _wait_for_turn(self, step: HubStep) -> None:
        with self._changed:
            while len(self._on_disk) >= ON_DISK and not self._client.closed:
                self._changed.wait()
            self._on_disk.add(step.step)
        if self._client.closed:
            raise Stopped

    def _wait_for_room(self, step: HubStep, nbytes: int) -> None:
        """Wait until the disk has room for a step; where only another step's end can make it."""
        with self._changed:
            while not self._client.closed:
                free_bytes = shutil.disk_usage(self._directory).free
                if free_bytes >= nbytes + SPARE_BYTES:
                    return
                if self._on_disk == {step.step}:
                    raise OutputError(
                        f"{self._directory}: {format_bytes(free_bytes)} are free, and step "
                        f"{step.step} of {self._url} takes {format_bytes(nbytes)} and "
                        f"{format_bytes(SPARE_BYTES)} to spare; make room, or name another disk "
                        "with --download-dir"
                    )
                self._changed.wait()
        raise Stopped

    def _listings(self) -> Callable[[HubStep], list[HubFile]]:
        commits = list({step.commit: None for step in self._steps})
        name = self._url.repository
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            files = list(pool.map(lambda commit: self._client.files(name, commit), commits))
        by_commit = dict(zip(commits, files, strict=True))
        return lambda step: by_commit[step.commit]

    def _root(self, step: HubStep) -> Path:
        """Return the directory that stands for the repository at a step's commit.

        The store notes it, from the step on, as the checkpoint's source.
        """
        home = _home(self._directory, step.step)
        return home / f"{self._url.repository}@{step.commit}"

    def _sweep(self) -> None:
        """Remove what an earlier run left and this one does not take up."""
        wanted = {_home(self._directory, step.step): step for step in self._steps[:ON_DISK]}
        for home in self._directory.glob("step_*"):
            if home not in wanted or not self._root(wanted[home]).is_dir():
                shutil.rmtree(home)


def _home(directory: Path, step: int) -> Path:
    return directory / f"step_{step}"


def _locked(directory: Path) -> IO[bytes]:
    """Make a directory ours, and refuse one that holds anything else."""
    lock = directory / _LOCK
    if directory.exists() and not lock.exists() and any(directory.iterdir()):
        raise OptionError(
            f"{directory} holds other files; name a new or empty directory with --download-dir"
        )
    directory.mkdir(parents=True, exist_ok=True)
    file = lock.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutputError(
            f"{directory}: another relex-stream fetches into it ({error.strerror}); wait for it, "
            "or name another directory with --download-dir"
        ) from None
    return file
