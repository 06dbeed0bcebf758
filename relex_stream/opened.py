"""An opened store for Python callers: tensors at any step as bits, torch or dask arrays."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relex_stream.base_weights import BaseWeights, open_base
from relex_stream.block_reader import BlockReader
from relex_stream.blocks import BlockOf, Workspace
from relex_stream.errors import OptionError
from relex_stream.graph import lazy_array
from relex_stream.locations import Location
from relex_stream.sources import CheckpointReader
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import Bits, numbers, widen

if TYPE_CHECKING:
    import torch

    from relex_stream.graph.lazy import DaskArray

_SLAB_BYTES = 32 << 20
"""Bytes of one chunk of a lazy array, about."""

_TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


class OpenStore:
    """A store opened for reading; made by `relex_stream.open_store`.

    Shows the steps that were committed when it was opened. Not thread-safe; open one per thread
    (arrays from `to_dask` are safe to compute with any scheduler).

    Parameters
    ----------
    path : Path or Url
        The store.
    base : Path or Url, optional
        The base's directory, when it has moved.
    """

    def __init__(self, path: Location, base: Location | None = None) -> None:
        self._store = Store(path)
        self._base = base
        self._workspace = Workspace()

    def __repr__(self) -> str:
        return repr(self._store).replace("Store", "OpenStore", 1)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._store.path, "base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def path(self) -> Location:
        """Where the store is."""
        return self._store.path

    @property
    def steps(self) -> tuple[int, ...]:
        """Committed steps, ascending."""
        return self._store.steps

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensors by name, with ``shape``, ``dtype`` and ``kind``."""
        return dict(self._store.tensors)

    @cached_property
    def _reader(self) -> BlockReader:
        base: BaseWeights = open_base(self._store, self._base, CheckpointReader())
        return BlockReader(self._store, base, self._workspace)

    def stored_tensor(self, name: str) -> StoredTensor:
        """Return the tensor that holds the bits of `name`: itself, or the one it is tied to."""
        tensor = self._store.tensors.get(name)
        if tensor is None:
            raise OptionError(f"no tensor {name!r} in {self.path}; see store.tensors")
        if tensor.tied_to is not None:
            return self._store.tensors[tensor.tied_to]
        return tensor

    def _rows(self, step: int) -> int:
        return self._store.row_of(step) + 1 if step else 0

    def checkpoint_bits(self, name: str, step: int) -> Bits:
        """Return a tensor's exact bit patterns at a step.

        Parameters
        ----------
        name : str
        step : int
            A committed step, or 0 for the base (in the dtype of the checkpoints).

        Returns
        -------
        ndarray of uint16 or uint32, shape of the tensor
            uint8 of the tensor's bytes, flat, for tensors that are not BF16, F16 or F32.

        Raises
        ------
        OptionError
            If there is no such tensor or step.
        CorruptionError, SourceError
            If the store or the base is damaged or missing.
        """
        tensor, rows = self.stored_tensor(name), self._rows(step)
        out = np.empty(tensor.elements, f"u{tensor.itemsize}")
        for block in range(tensor.blocks):
            at = BlockOf(tensor, block)
            bits = self._reader.base_bits(at)
            if tensor.kind == "tracked":
                bits = self._reader.bits_at(at, bits, rows)
            out[at.start : at.start + at.elements] = bits
        return out if tensor.kind == "constant" else out.reshape(tensor.shape)

    def checkpoint_tensor(self, name: str, step: int) -> torch.Tensor:
        """Return a tensor at a step as a torch tensor, exact in every bit.

        Arguments and errors as in `checkpoint_bits`; imports torch.
        """
        import torch

        tensor = self.stored_tensor(name)
        dtype = getattr(torch, _TORCH_DTYPES[tensor.dtype.code])
        bits = self.checkpoint_bits(name, step)
        raw = torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))
        if not raw.numel():
            return torch.empty(tensor.shape, dtype=dtype)
        return raw.view(dtype).reshape(tensor.shape)

    def delta(self, name: str, step: int) -> NDArray[np.float32]:
        """Return a tensor's weight delta, ``theta_step - theta_0``.

        Returns
        -------
        ndarray of float32, shape of the tensor
            Differences taken in float64 and rounded once; where either value is not finite, that
            value counts as 0. All zero for tensors that are not tracked.

        Raises
        ------
        OptionError, CorruptionError, SourceError
            As in `checkpoint_bits`.
        """
        tensor, rows = self.stored_tensor(name), self._rows(step)
        out = np.zeros((1, tensor.elements), np.float32)
        if tensor.kind == "tracked":
            self.fill_deltas(tensor, max(0, rows - 1), rows, 0, out)
        return out.reshape(tensor.shape)

    def to_dask(self, name: str) -> DaskArray:
        """Return all weight deltas of a tensor as a lazy array.

        Returns
        -------
        dask.array.Array of float32, shape (steps, *tensor shape)
            Row t is ``delta(name, steps[t])``. Chunks are 16 steps by some 32 MB of the first axis.

        Raises
        ------
        OptionError
            If there is no such tensor.
        """
        tensor = self.stored_tensor(name)
        first_axis = tensor.shape[0] if tensor.shape else 1
        row_elements = math.prod(tensor.shape[1:])
        slab = max(1, _SLAB_BYTES // max(1, 4 * 16 * row_elements))
        lazy: DaskArray = lazy_array(
            _DeltaSlab(self.path, self._base, tensor.name),
            token=f"{self.path.resolve()}-{self._store.head.commits[-1:]}-{tensor.name}",
            shape=(len(self.steps), first_axis, *tensor.shape[1:]),
            chunk=(16, slab),
            dtype=np.float32,
        ).reshape((len(self.steps), *tensor.shape))
        return lazy

    def fill_deltas(
        self,
        tensor: StoredTensor,
        first_row: int,
        stop_row: int,
        start: int,
        out: NDArray[np.float32],
    ) -> None:
        """Fill `out` (rows, elements from `start`) with weight deltas of rows first to stop."""
        stop = start + out.shape[1]
        first_block = start // tensor.block_elements
        for block in range(first_block, -(-stop // tensor.block_elements)):
            at = BlockOf(tensor, block)
            base_bits = self._reader.base_bits(at).copy()
            wide = np.empty(at.elements, at.format.bits_dtype)
            widen(base_bits, at.base_format, at.format, wide)
            origin = numbers(wide, at.format)
            low, high = max(start, at.start), min(stop, at.start + at.elements)
            for row in range(first_row, stop_row):
                now = numbers(self._reader.bits_at(at, base_bits, row + 1), at.format)
                delta = (now - origin)[low - at.start : high - at.start]
                out[row - first_row, low - start : high - start] = delta


class _DeltaSlab:
    """Computes one chunk of a lazy array; opens the store where it runs."""

    def __init__(self, path: Location, base: Location | None, name: str) -> None:
        self._path = path
        self._base = base
        self._name = name

    def __call__(self, rows: tuple[int, int], slab: tuple[int, int]) -> NDArray[np.float32]:
        opened = OpenStore(self._path, self._base)
        tensor = opened.stored_tensor(self._name)
        rest = tensor.shape[1:]
        row_elements = math.prod(rest)
        out = np.zeros((rows[1] - rows[0], (slab[1] - slab[0]) * row_elements), np.float32)
        if tensor.kind == "tracked" and out.size:
            opened.fill_deltas(tensor, rows[0], rows[1], slab[0] * row_elements, out)
        return out.reshape((rows[1] - rows[0], slab[1] - slab[0], *rest))
