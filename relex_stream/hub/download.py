"""The files of one checkpoint, from the Hub to the disk: in segments, each fetched once.

A journal beside the files says which segments are there, so that a killed download goes on. Whether
they are what the Hub has is not the journal's word: every file is hashed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from relex_stream.errors import HubError
from relex_stream.paths import check_relative_path

from .client import HubClient, HubFile

SEGMENT_BYTES = 64 << 20
"""Bytes of a request: what a kill may lose of each connection. With smaller ones a fast link would
reach the Hub's limit of requests."""

CONNECTIONS = 8
"""Requests at once."""


class Download:
    """Files of one commit, in a directory as in the repository.

    Parameters
    ----------
    client : HubClient
    repository, commit : str
    directory : Path
        Made if it is not there. What an earlier download of this commit left there is used, unless
        its journal is gone.
    journal : Path
        A file outside `directory`.
    """

    def __init__(
        self, client: HubClient, repository: str, commit: str, directory: Path, journal: Path
    ) -> None:
        self._client, self._repository, self._commit = client, repository, commit
        self._directory = directory
        self._journal = Journal(journal)
        self._lock = threading.Lock()
        self.done_bytes = 0
        """Bytes on the disk so far, those of earlier downloads included."""

    def missing_bytes(self, files: Iterable[HubFile]) -> int:
        """Return how many bytes of some files are yet to be fetched."""
        return sum(
            stop - start
            for file in files
            for start, stop in _segments(file)
            if not self._has(file, start)
        )

    def fetch(self, files: Collection[HubFile]) -> None:
        """Fetch files, but for the segments that are there, and check them all.

        Raises
        ------
        HubError
            If the Hub does not give them, or other bytes than it says.
        Stopped
            If the client is closed.
        OSError
            If they cannot be written.
        """
        self._fetch_missing(files)
        wrong = [file for file, right in zip(files, self._check(files), strict=True) if not right]
        if wrong:
            # What an earlier download left may have been lost, with a machine's power say.
            for file in wrong:
                self._journal.forget(file.path)
            self.done_bytes -= sum(file.size for file in wrong)
            self._fetch_missing(wrong)
            for file, right in zip(wrong, self._check(wrong), strict=True):
                if not right:
                    self._journal.forget(file.path)
                    raise HubError(
                        f"{self._repository}@{self._commit}: {file.path} arrives with another "
                        "checksum than the Hub says; run the command again, and check HF_ENDPOINT "
                        "if it is set"
                    )

    def path_of(self, file: HubFile) -> Path:
        """Return where a file lies.

        Raises
        ------
        HubError
            If its path leads out of the directory.
        """
        try:
            return self._directory / check_relative_path(file.path)
        except ValueError as error:
            raise HubError(f"{self._repository}@{self._commit}: {error}; rename it") from None

    def _has(self, file: HubFile, start: int) -> bool:
        return (file.path, start) in self._journal and self._is_whole(file)

    def _is_whole(self, file: HubFile) -> bool:
        path = self.path_of(file)
        return path.is_file() and path.stat().st_size == file.size

    def _fetch_missing(self, files: Iterable[HubFile]) -> None:
        missing: list[tuple[HubFile, int, int]] = []
        for file in files:
            path = self.path_of(file)
            if not self._is_whole(file):
                self._journal.forget(file.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
                os.truncate(path, file.size)
            for start, stop in _segments(file):
                if self._has(file, start):
                    self.done_bytes += stop - start
                else:
                    missing.append((file, start, stop))
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub") as pool:
            futures = [pool.submit(self._fetch_segment, *segment) for segment in missing]
            done, pending = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception() is not None]
            if failed:
                for future in pending:
                    future.cancel()
                self._client.close()  # ends those that run
        if failed:
            failed[0].result()

    def _fetch_segment(self, file: HubFile, start: int, stop: int) -> None:
        descriptor = os.open(self.path_of(file), os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._client.fetch(
                self._repository,
                self._commit,
                file,
                start,
                stop,
                lambda offset, data: self._write(descriptor, offset, data),
            )
        finally:
            os.close(descriptor)
        self._journal.add(file.path, start)

    def _write(self, descriptor: int, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        with self._lock:
            self.done_bytes += len(data)

    def _check(self, files: Iterable[HubFile]) -> list[bool]:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            return list(pool.map(lambda file: matches(self.path_of(file), file), files))


def matches(path: Path, file: HubFile) -> bool:
    """Return whether a file on the disk has the size and the checksum that the Hub says."""
    with path.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size != file.size:
            return False
        if file.sha256 is not None:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        return hashlib.file_digest(opened, lambda: blob).hexdigest() == file.blob_sha1


def _segments(file: HubFile) -> Iterator[tuple[int, int]]:
    for start in range(0, file.size, SEGMENT_BYTES):
        yield start, min(start + SEGMENT_BYTES, file.size)


class Journal:
    """Which segments of files are on the disk: a line for each, in a file that only grows.

    Parameters
    ----------
    path : Path
        Read if it is there. A last line that was cut off counts for nothing.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Journal(Path(folder, "journal")).add("model.safetensors", 0)
    ...     ("model.safetensors", 0) in Journal(Path(folder, "journal"))
    True
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._segments: set[tuple[str, int]] = set()
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for line in lines:
            try:
                name, start = json.loads(line)
                self._segments.add((str(name), int(start)))
            except (ValueError, TypeError):
                continue  # torn by a kill: that segment is fetched again

    def __contains__(self, segment: tuple[str, int]) -> bool:
        return segment in self._segments

    def add(self, name: str, start: int) -> None:
        """Note that a segment was written."""
        # A line's end in front too: the line before may have been torn.
        line = b"\n" + json.dumps([name, start]).encode() + b"\n"
        with self._lock:
            self._segments.add((name, start))
            with self._path.open("ab") as file:
                file.write(line)

    def forget(self, name: str) -> None:
        """Note that nothing is known of a file any more."""
        with self._lock:
            left = {segment for segment in self._segments if segment[0] != name}
            if left == self._segments:
                return
            self._segments = left
            replacement = self._path.with_name(self._path.name + ".new")
            replacement.write_text("".join(f"{json.dumps(segment)}\n" for segment in left))
            replacement.replace(self._path)
