"""Records of a store on object storage, kept at hand on this machine once they were read.

They never change, are read column by column, and all of them are read again with each commit.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from relex_stream.store.storage import Storage

_REQUESTS = 8


class Spool:
    """Reads keys whose bytes never change, each of them once; for any number of threads.

    Parameters
    ----------
    storage : Storage
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._descriptor, path = tempfile.mkstemp(prefix="relex-records-")
        os.unlink(path)
        # Stores are not closed; this one's file ends with it.
        weakref.finalize(self, os.close, self._descriptor)
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes:
        """Return all bytes of a key; OSError if there are none."""
        start, size = self._place(key)
        return os.pread(self._descriptor, size, start)

    def read_into(self, key: str, pieces: Sequence[tuple[int, NDArray[np.uint8]]]) -> bool:
        """Fill arrays from offsets on; say whether all were, or the key ends before."""
        start, size = self._place(key)
        for offset, out in pieces:
            if offset + out.size > size:
                return False
            os.preadv(self._descriptor, [out.data], start + offset)
        return True

    def size(self, key: str) -> int:
        """Return the bytes of a key; OSError if there is none."""
        return self._place(key)[1]

    def fetch(self, keys: Iterable[str]) -> None:
        """Read keys, several at a time. What is missing is named when it is asked for."""
        missing = [key for key in keys if key not in self._places]
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="relex-records") as pool:
            for future in [pool.submit(self._place, key) for key in missing]:
                future.exception()

    def _place(self, key: str) -> tuple[int, int]:
        place = self._places.get(key)
        if place is not None:
            return place
        data = self._storage.read(key)
        with self._lock:
            start = self._end
            self._end += len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], start + done)
        place = self._places[key] = (start, len(data))
        return place
