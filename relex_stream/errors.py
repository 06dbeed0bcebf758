"""Everything this package raises on purpose: one root, one leaf per kind of remedy.

Each leaf is also the built-in exception a caller would expect, so ``except OSError`` or
``except ValueError`` keeps working. Messages say what was found, where, and what to do next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class RelexStreamError(Exception):
    """Root of all errors of this package; the command line shows them as one line."""


class SourceError(RelexStreamError, OSError):
    """A base or checkpoint directory cannot be used as it is (missing, truncated, malformed)."""


class HubError(SourceError):
    """The Hugging Face Hub cannot be reached, or does not give what was asked of it."""


class TrajectoryError(RelexStreamError, ValueError):
    """Checkpoints do not belong together (names, shapes, dtypes, values, order of steps)."""


class StoreError(RelexStreamError, OSError):
    """A store is missing, damaged, locked, or of a format this version does not read."""


class StoreBusyError(StoreError):
    """Another process works on a store; it will be free again."""


class CorruptionError(StoreError):
    """Bytes of a store do not match the checksum committed for them."""


class RemoteError(RelexStreamError, OSError):
    """Object storage cannot be reached, or refuses what is asked of it."""


class OutputError(RelexStreamError, OSError):
    """An output directory cannot be written or must not be replaced."""


class FitError(RelexStreamError, ValueError):
    """The stored history does not determine what was asked for."""


class MemoryLimitError(RelexStreamError, MemoryError):
    """The work does not fit in the allowed memory, by the planner's projection."""


class OptionError(RelexStreamError, ValueError):
    """An argument has a value that is not allowed."""


class ClusterError(RelexStreamError, RuntimeError):
    """A dask cluster cannot be reached, or cannot do the work."""


class MissingDependencyError(RelexStreamError, ImportError):
    """A package that only this part needs is not installed."""


class DeviceError(RelexStreamError, RuntimeError):
    """A device that was asked for is not there, or torch cannot use it."""


class RelexStreamWarning(UserWarning):
    """Something the user should know that does not stop the work."""


class ForecastWarning(RelexStreamWarning):
    """The history speaks against a forecast as far ahead, or is too short to say."""


_told: ContextVar[Callable[[str], None] | None] = ContextVar("told", default=None)


def warn_from_task(text: str) -> None:
    """Give a `RelexStreamWarning`, from work that may be done in another process than its user's.

    There the warning goes to whom `telling` names, who brings it here.
    """
    tell = _told.get()
    if tell is not None:
        tell(text)
    else:
        warnings.warn(text, RelexStreamWarning, stacklevel=3)


@contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Return a context in which this thread's warnings of tasks go to a function."""
    before = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(before)
