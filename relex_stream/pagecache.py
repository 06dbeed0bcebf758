"""Telling the system early what will be wanted of it, so that the disk works while we do.

A worker that reads a block waits for the disk, then works while the disk has nothing to do; and an
output that is synced at its end waits for all of it at once. Asked in advance, reads and writes go
on meanwhile, and the disk has many requests at a time to choose from. All of it is advice: nothing
here changes what is read or written, and a system without these calls only takes longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache
from typing import Any

_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


def ask_for(descriptor: int, offset: int, nbytes: int) -> bool:
    """Have bytes read from the disk into the page cache, without waiting for them.

    Returns
    -------
    bool
        False if the first byte is in memory already (then nothing was asked for), or where the
        system knows no such call.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return False
    if _in_memory(descriptor, offset):
        return False
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
    return True


def forget(path: str) -> None:
    """Have a file's bytes come from the disk when they are next read.

    What was not written yet is, first: the system keeps it in memory until then. A file that cannot
    be opened is left to whoever reads it to name.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Some network file systems refuse to sync what is open for reading.
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _in_memory(descriptor: int, offset: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or the file system cannot tell
        return False
    return True


def start_writing(descriptor: int, offset: int, nbytes: int) -> None:
    """Have written bytes put on the disk from now on, without waiting for them.

    That they are there is for ``fsync`` to say, which then has less to do.
    """
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, nbytes, _START_WRITING)


@cache
def _sync_file_range() -> Any:
    """Return the C library's ``sync_file_range``, None where there is none (Linux has it)."""
    if sys.platform != "linux":
        return None
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
