"""What a watch of a store has verified and is deleting: a small file beside the store.

It outlives the process: a deletion that was cut short is finished from it, and what was verified is
not read again. And it is locked: one watch per store. It is ``NAME.watch`` beside the store
``NAME``; without it a watch verifies again what it finds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from relex_stream.errors import StoreBusyError, StoreError
from relex_stream.paths import check_relative_path


class VerifiedFile(NamedTuple):
    """A weights file as it was verified: its path below CHECKPOINTS, size and time of change."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Verified:
    """A step whose source was compared with the store.

    Attributes
    ----------
    record : str
        Name of the step's record in the store: another, if the step was dropped and built again.
    files : tuple of VerifiedFile
        The weights files that can be had from the store.
    rounded : bool
        Whether F32 weights were compared as rounded (``--as``), so that the files cannot be had as
        they were: who has not asked for that must not lose them.
    deleting : bool
        Whether their deletion has begun.
    """

    record: str
    files: tuple[VerifiedFile, ...]
    rounded: bool = False
    deleting: bool = False


class Ledger:
    """The file, while it is locked; a context manager.

    Parameters
    ----------
    store : Path
    checkpoints : Path
        Notes of another run's checkpoints are left aside.

    Attributes
    ----------
    path : Path

    Raises
    ------
    StoreBusyError
        On entering: if another watch of the store is at work.
    StoreError
        If the file cannot be made or locked.
    """

    def __init__(self, store: Path, checkpoints: Path) -> None:
        inside = store.resolve()
        self.path = inside.with_name(inside.name + ".watch")
        self._checkpoints = str(checkpoints.resolve())
        self._steps: dict[int, Verified] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._descriptor = self._stack.enter_context(_locked(self.path))
        self._steps = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)  # type: ignore[arg-type]

    @property
    def steps(self) -> dict[int, Verified]:
        """What is noted, by step."""
        return dict(self._steps)

    def note(self, step: int, verified: Verified) -> None:
        """Note a step, on the disk when this returns."""
        self._steps[step] = verified
        self._write()

    def strike(self, step: int) -> None:
        """Forget a step."""
        if self._steps.pop(step, None) is not None:
            self._write()

    def _write(self) -> None:
        steps = {str(step): asdict(verified) for step, verified in sorted(self._steps.items())}
        data = json.dumps({"checkpoints": self._checkpoints, "steps": steps}).encode() + b"\n"
        # Replacing the file would lose the lock. One that is cut short is no JSON, and then
        # nothing is noted, so that nothing is deleted.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)

    def _read(self) -> dict[int, Verified]:
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        try:
            document = json.loads(data)
            if document["checkpoints"] != self._checkpoints:
                return {}
            return {int(step): _verified(entry) for step, entry in document["steps"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}


def _verified(entry: Any) -> Verified:
    files = tuple(
        VerifiedFile(check_relative_path(path), int(size), int(modified_ns))
        for path, size, modified_ns in entry["files"]
    )
    return Verified(
        str(entry["record"]),
        files,
        # What an older version noted may have been.
        rounded=entry.get("rounded") is not False,
        deleting=entry["deleting"] is True,
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be opened: {error.strerror}; a watch keeps its notes there"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise StoreBusyError(
            f"another watch of this store is at work (it holds {path}); end it first"
        ) from error
    finally:
        os.close(descriptor)
