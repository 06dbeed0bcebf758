"""The zarr v3 codec of delta arrays: a thin shim over `relex_stream.codec`.

zarr finds it by entry point, so ``zarr.open(store)["deltas/NAME"][5]`` works wherever this package
is installed. It reads any chunk that holds whole frames. Our own paths never come through here;
they know how many bytes of a chunk are committed, which zarr does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from relex_stream.codec import Changes, FrameCodec, read_header, split_frames
from relex_stream.errors import CorruptionError
from relex_stream.specs import STEP_GROUP
from relex_stream.store.arrays import CODEC_NAME
from relex_stream.ulp import Bits

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec


def _check_chunk(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or shape[0] > STEP_GROUP or dtype.kind != "u" or dtype.itemsize > 4:
        raise ValueError(
            f"codec {CODEC_NAME} takes chunks of (up to {STEP_GROUP} steps, elements) of uint8, "
            f"uint16 or uint32, not {shape} of {dtype}"
        )


def decode_chunk(data: bytes, rows: int, elements: int, dtype: np.dtype[Any]) -> Bits:
    """Return a chunk as dense modular differences, shape (rows, elements).

    Raises
    ------
    CorruptionError
        If the chunk is not whole frames of such blocks.
    ValueError
        If no chunk may have such a shape or dtype.
    """
    _check_chunk((rows, elements), dtype)
    dense = np.zeros((rows, elements), dtype)
    frames = FrameCodec(elements, dtype.itemsize)
    changes = Changes(elements, dtype.itemsize)
    one = dtype.type(1)
    for frame in split_frames(memoryview(data), elements, dtype.itemsize):
        # A tensor's last block may be shorter than zarr's chunk; its dense frames say how long.
        header = read_header(frame, elements, dtype.itemsize)
        row = frames.decode(frame, header.count if header.dense else elements, changes)
        if row >= rows:
            raise CorruptionError(f"frame of row {row} in a chunk of {rows} rows")
        codes = changes.zigzags[: changes.count]
        differences = (codes >> one) ^ (dtype.type(0) - (codes & one))
        dense[row, changes.positions[: changes.count]] = differences
    return dense


def encode_chunk(dense: Bits) -> bytes:
    """Return the frames of dense modular differences (rows, elements); zero rows have none.

    Raises
    ------
    ValueError
        If no chunk may have such a shape or dtype.
    """
    _check_chunk(dense.shape, dense.dtype)
    rows, elements = dense.shape
    dtype = dense.dtype
    frames = FrameCodec(elements, dtype.itemsize)
    changes = Changes(elements, dtype.itemsize)
    top = dtype.type(8 * dtype.itemsize - 1)
    chunk = []
    for row in range(rows):
        positions = np.flatnonzero(dense[row])
        if not positions.size:
            continue
        differences = dense[row, positions]
        sign = dtype.type(0) - (differences >> top)
        changes.count = positions.size
        changes.positions[: changes.count] = positions
        changes.zigzags[: changes.count] = (differences << dtype.type(1)) ^ sign
        chunk.append(frames.encode(row, changes, elements))
    return b"".join(chunk)


@dataclass(frozen=True)
class DeltaCodec(ArrayBytesCodec):
    """Frames of ULP deltas as a zarr array-to-bytes codec. It takes no configuration."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Make the codec from its metadata."""
        parse_named_configuration(data, CODEC_NAME, require_configuration=False)
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        """Return the codec's metadata."""
        return {"name": CODEC_NAME, "configuration": {}}

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        rows, elements = chunk_spec.shape
        dtype = np.dtype(chunk_spec.dtype.to_native_dtype())
        dense = decode_chunk(chunk_bytes.to_bytes(), rows, elements, dtype)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(dense)  # type: ignore[arg-type]

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        dense = np.ascontiguousarray(chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(encode_chunk(dense))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Refuse: the size depends on the content."""
        raise NotImplementedError
