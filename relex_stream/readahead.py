"""Asking the system for bytes of a file some time before they are read.

A worker that reads a block waits for the disk, then works while the disk has nothing to do. Asked
for in advance, bytes arrive meanwhile, and the disk has many requests at a time to choose from.
"""

from __future__ import annotations

import os


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


def _in_memory(descriptor: int, offset: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or the file system cannot tell
        return False
    return True
