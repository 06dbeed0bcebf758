"""Which checkpoints have arrived whole, and what the others still lack.

A checkpoint is whole when its trainer's mark of completion is there, nothing in its directory has
changed for a while, and it can be opened: every shard is there, as long as its header says.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from relex_stream.errors import RelexStreamWarning, SourceError
from relex_stream.sources import Naming, StepSelection, find_checkpoints, list_steps
from relex_stream.specs import SourceCheckpoint

CLOCKS_AGREE_S = 300.0
"""How far the clock of a file server may be from ours, when ages of files are looked at."""

_AS_THEY_ARE = Naming()

_Files = dict[str, tuple[int, int]]


class Moment(NamedTuple):
    """A point in time: seconds that only grow, and seconds since 1970 as files have them."""

    elapsed_s: float
    since_1970_s: float


@dataclass(frozen=True)
class Arrival:
    """How far a checkpoint is.

    Attributes
    ----------
    is_whole : bool
    lacks : str
        What is wrong with it, where it seems that nobody goes on writing it; else empty.
    idle_s : float
        How long nothing in it has changed.
    """

    is_whole: bool
    lacks: str
    idle_s: float

    @property
    def is_settling(self) -> bool:
        """Whether it may be whole soon: it changed a moment ago."""
        return not self.is_whole and not self.lacks


@dataclass
class _Seen:
    files: _Files
    since_s: float
    settled: bool
    refused: str = ""


class Arrivals:
    """Looks at the directory of a run's checkpoints, again and again.

    Parameters
    ----------
    checkpoints : Path
    pattern : str, optional
    selection : StepSelection, optional
    source : str
        As in `find_checkpoints`.
    naming : Naming
        What their tensors are called in the base.
    settle_s : float
        Seconds for which nothing in a checkpoint must have changed.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        pattern: str | None = None,
        selection: StepSelection | None = None,
        source: str = "auto",
        naming: Naming = _AS_THEY_ARE,
        settle_s: float,
    ) -> None:
        self._checkpoints = checkpoints
        self._pattern = pattern
        self._selection = selection
        self._source = source
        self._naming = naming
        self._settle_s = settle_s
        self._unfinished: dict[int, str] = {}
        self._seen: dict[int, _Seen] = {}

    def steps(self) -> dict[int, Path]:
        """Return the steps that have a directory, whole or not, ascending.

        Raises
        ------
        OptionError, SourceError
            Where waiting would not help: see `list_steps`.
        """
        found = list_steps(self._checkpoints, self._pattern, self._selection, self._source)
        for gone in self._seen.keys() - found.directories.keys():
            del self._seen[gone]
        self._unfinished = found.unfinished
        return cast(dict[int, Path], found.directories)  # below a Path

    def look(self, step: int, directory: Path, now: Moment) -> Arrival:
        """Say how far a checkpoint is."""
        seen = self._look_at_files(step, directory, now)
        idle_s = now.elapsed_s - seen.since_s
        if not seen.settled:
            return Arrival(is_whole=False, lacks="", idle_s=idle_s)
        if seen.refused:
            return Arrival(is_whole=False, lacks=seen.refused, idle_s=idle_s)
        if step in self._unfinished:
            reason = f"{directory} is not complete: {self._unfinished[step]}"
            return Arrival(is_whole=False, lacks=reason, idle_s=idle_s)
        try:
            self.open(step)
        except SourceError as error:
            return Arrival(is_whole=False, lacks=str(error), idle_s=idle_s)
        return Arrival(is_whole=True, lacks="", idle_s=idle_s)

    def glance(self, step: int, directory: Path, now: Moment) -> None:
        """Note only whether a checkpoint changes: one that is not to be taken yet."""
        self._look_at_files(step, directory, now)

    def open(self, step: int) -> SourceCheckpoint:
        """Open a checkpoint as it is now.

        Raises
        ------
        SourceError
            If it is not whole, or gone.
        """
        alone = StepSelection(explicit=(step,))
        with warnings.catch_warnings():
            # The build says them, once.
            warnings.simplefilter("ignore", RelexStreamWarning)
            found = find_checkpoints(self._checkpoints, self._pattern, alone, self._source)
            ((_, directory),) = found.checkpoints
            return found.open(directory, step, self._naming)

    def refuse(self, step: int, reason: str) -> None:
        """Take a checkpoint for broken until something in it changes."""
        if step in self._seen:
            self._seen[step].refused = reason

    def pardon(self) -> None:
        """Take none for broken any more: what they did not fit has changed."""
        for seen in self._seen.values():
            seen.refused = ""

    def _look_at_files(self, step: int, directory: Path, now: Moment) -> _Seen:
        files, changed_s = _files_below(directory)
        seen = self._seen.get(step)
        if seen is None or seen.files != files:
            seen = self._seen[step] = _Seen(files, now.elapsed_s, settled=False)
        seen.settled = (
            now.elapsed_s - seen.since_s >= self._settle_s
            # What is old need not be watched.
            or now.since_1970_s - changed_s >= self._settle_s + CLOCKS_AGREE_S
        )
        return seen


def _files_below(directory: Path) -> tuple[_Files, float]:
    """Return size and time of all files of a directory, and when any of them changed last.

    That is the inode's time, in seconds: copies have old times of change, but nobody can set that.
    """
    files: _Files = {}
    changed_s = 0.0
    for place, _, names in os.walk(directory):
        for path in (place, *(os.path.join(place, name) for name in names)):
            try:
                status = os.stat(path)
            except OSError:  # gone since, or a broken link
                continue
            files[path] = (status.st_size, status.st_mtime_ns)
            changed_s = max(changed_s, status.st_ctime)
    return files, changed_s
