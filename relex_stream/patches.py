"""Changes of checkpoints that hold nothing else, unpacked and at hand block by block.

They lie in a file without a name, on a disk: a step of a large model has hundreds of megabytes of
them, whose packed form can only be read from front to back.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from relex_stream.blocks import BlockOf, Workspace
from relex_stream.errors import StoreError
from relex_stream.locations import Location
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import Bits

ENTRIES = 1 << 16
"""Changes handled at a time."""

_POSITION_BYTES = 4


class Units(NamedTuple):
    """What is changed: runs of ``nbytes`` bytes, replaced, or by xor; positions count in them."""

    nbytes: int
    is_xor: bool


class _Step:
    """Where the changes of each block of a step are: columns as in the store's tables."""

    def __init__(self, blocks: int) -> None:
        self.counts = np.zeros(blocks, np.uint32)
        self.positions_at = np.zeros(blocks, np.int64)
        self.values_at = np.zeros(blocks, np.int64)
        self.units: dict[int, Units] = {}  # by tensor


class Patches:
    """The unpacked changes of some checkpoints, numbered from 0.

    Parameters
    ----------
    where : Path or Url
        A directory on whose disk they may lie; that of temporary files is taken for a URL, and
        where nothing can be written.
    """

    def __init__(self, where: Location) -> None:
        self._directory = where if isinstance(where, Path) and os.access(where, os.W_OK) else None
        self._file: IO[bytes] | None = None  # most checkpoints are whole
        self._steps: list[_Step] = []
        self._end = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Return the patches themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give their disk back."""
        if self._file is not None:
            self._file.close()

    def scratch(self) -> IO[bytes]:
        """Return another file without a name, on the same disk; close it."""
        return tempfile.TemporaryFile(dir=self._directory, buffering=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return self._end

    @property
    def steps(self) -> int:
        """Checkpoints begun."""
        return len(self._steps)

    def begin_step(self, blocks: int) -> None:
        """Go on to the next checkpoint, of which `blocks` may be changed: 0, or all of a store."""
        self._steps.append(_Step(blocks))

    def add(self, tensor: StoredTensor, units: Units, count: int) -> PatchPart:
        """Make room in the checkpoint begun last for `count` changes of a tensor."""
        nbytes = count * (_POSITION_BYTES + units.nbytes)
        with self._lock:
            if self._file is None:
                self._file = self.scratch()
            start = self._end
            self._end += nbytes
            self._steps[-1].units[tensor.index] = units
        return PatchPart(self, self._steps[-1], tensor, units, start, count)

    def changes(self, index: int, tensor: StoredTensor) -> bool:
        """Say whether a checkpoint changes anything of a tensor."""
        return tensor.index in self._steps[index].units

    def apply(self, index: int, at: BlockOf, out: Bits, workspace: Workspace) -> None:
        """Change a block as a checkpoint says.

        Parameters
        ----------
        index : int
            Number of the checkpoint.
        at : BlockOf
        out : ndarray of unsigned int, shape (elements of `at`,)
            The bits before; the bits at the checkpoint.
        workspace : Workspace
        """
        step = self._steps[index]
        left = int(step.counts[at.column])
        if not left:
            return
        units = step.units[at.tensor.index]
        here = out.view(f"u{units.nbytes}")
        positions_at = int(step.positions_at[at.column])
        values_at = int(step.values_at[at.column])
        while left:
            count = min(left, ENTRIES)
            positions = workspace.array("patch positions", count, np.uint32)
            values = workspace.array("patch values", count, here.dtype)
            self._read(positions_at, positions.view(np.uint8))
            self._read(values_at, values.view(np.uint8))
            if units.is_xor:
                here[positions] ^= values
            else:
                here[positions] = values
            positions_at += positions.nbytes
            values_at += values.nbytes
            left -= count

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes where `add` made room.

        Raises
        ------
        StoreError
            If the disk is full.
        """
        assert self._file is not None
        write_all(self._file, offset, data)

    def _read(self, offset: int, out: NDArray[np.uint8]) -> None:
        assert self._file is not None
        read_all(self._file, offset, out)


class PatchPart:
    """What one checkpoint changes of one tensor, being written in the order of its positions.

    Runs of blocks have their changes one behind the other.
    """

    def __init__(
        self,
        patches: Patches,
        step: _Step,
        tensor: StoredTensor,
        units: Units,
        start: int,
        count: int,
    ) -> None:
        self._patches = patches
        self._step = step
        self._tensor = tensor
        self._positions_at = start
        self._values_at = start + _POSITION_BYTES * count
        self._units = units
        self._left = count
        self._per_block = tensor.block_elements * tensor.itemsize // units.nbytes
        self._size = tensor.elements * tensor.itemsize // units.nbytes
        self._last = -1

    def write(self, positions: NDArray[np.int64], values: NDArray[np.uint8]) -> None:
        """Put the next changes.

        Parameters
        ----------
        positions : ndarray of int64, shape (n,)
            In the tensor, counted in units.
        values : ndarray of uint8, shape (n * units,)

        Raises
        ------
        ValueError
            With a clause: if they are outside the tensor, or not in ascending order.
        """
        if not positions.size:
            return
        if positions[0] <= self._last or not (positions[1:] > positions[:-1]).all():
            raise ValueError("its positions are not in ascending order")
        if positions[0] < 0 or positions[-1] >= self._size:
            raise ValueError(f"it changes position {positions[-1]} of {self._size}")
        assert positions.size <= self._left, "more than there is room for"
        self._last = int(positions[-1])
        self._left -= positions.size
        low, high = int(positions[0]) // self._per_block, self._last // self._per_block
        cuts = np.searchsorted(positions, np.arange(low, high + 2) * self._per_block)
        inside = (positions - positions // self._per_block * self._per_block).astype(np.uint32)
        for block, first, stop in zip(range(low, high + 1), cuts[:-1], cuts[1:], strict=True):
            if first == stop:
                continue
            column = self._tensor.first_block + block
            if not self._step.counts[column]:
                self._step.positions_at[column] = self._positions_at + _POSITION_BYTES * first
                self._step.values_at[column] = self._values_at + self._units.nbytes * first
            self._step.counts[column] += np.uint32(stop - first)
        self._patches.write(self._positions_at, inside.view(np.uint8))
        self._patches.write(self._values_at, values)
        self._positions_at += inside.nbytes
        self._values_at += values.nbytes


def write_all(file: IO[bytes], offset: int, data: NDArray[np.uint8]) -> None:
    """Write bytes at an offset of a temporary file; StoreError if the disk is full."""
    view, done = data.data, 0
    while done < len(view):
        try:
            done += os.pwrite(file.fileno(), view[done:], offset + done)
        except OSError as error:
            raise StoreError(
                f"changes cannot be unpacked to the disk: {error.strerror}; make room on that of "
                "the store"
            ) from error


def read_all(file: IO[bytes], offset: int, out: NDArray[np.uint8]) -> None:
    """Fill an array from an offset of a temporary file on."""
    done = 0
    while done < out.size:
        count = os.preadv(file.fileno(), [out[done:].data], offset + done)
        assert count, "reading where nothing was written"
        done += count
