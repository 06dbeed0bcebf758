"""Checkpoints in pieces, put together from their descriptions: what readers must come to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relex_stream.sources import open_checkpoint
from relex_stream.specs import Box, DType, SourceCheckpoint, TensorPlace

Elements = NDArray[np.void]
"""A tensor's elements as runs of bytes, in its shape: any dtype, and no torch."""


def as_elements(data: bytes, dtype: DType, shape: tuple[int, ...]) -> Elements:
    return np.frombuffer(data, np.dtype((np.void, dtype.itemsize))).reshape(shape)


def range_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + count) for start, count in zip(*box, strict=True))


def put_together(place: TensorPlace) -> Elements:
    """Read a tensor from where it is said to lie; every element must be in one piece."""
    spec = place.spec
    if not place.pieces:
        return as_elements(read(place.path, place.offset, spec.nbytes), spec.dtype, spec.shape)
    whole = np.zeros(spec.shape, np.dtype((np.void, spec.dtype.itemsize)))
    times = np.zeros(spec.shape, int)
    for piece in place.pieces:
        nbytes = int(np.prod(piece.box.shape, dtype=int)) * spec.dtype.itemsize
        data = read(piece.path, piece.offset, nbytes)
        whole[range_of(piece.box)] = as_elements(data, spec.dtype, piece.box.shape)
        times[range_of(piece.box)] += 1
    assert (times == 1).all()
    return whole


def read(path: str, offset: int, nbytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def whole_model(directory: Path) -> dict[str, Elements]:
    """Read a plain model directory."""
    checkpoint = open_checkpoint(directory, 1)
    return {name: put_together(place) for name, place in checkpoint.tensors.items()}


def assert_holds(checkpoint: SourceCheckpoint, wanted: Mapping[str, Elements]) -> None:
    """Check that a checkpoint's tensors are those wanted, bit for bit."""
    assert set(checkpoint.tensors) == set(wanted)
    for name, elements in wanted.items():
        place = checkpoint.tensors[name]
        assert place.spec.name == name
        assert place.spec.shape == elements.shape
        assert place.spec.dtype.itemsize == elements.dtype.itemsize
        assert put_together(place).tobytes() == elements.tobytes(), name


def assert_rebuilds(checkpoint: SourceCheckpoint, wanted: Mapping[str, Elements]) -> None:
    """Check that the parts of each weights file, filled from whole tensors, are its bytes."""
    for file in checkpoint.weights_files:
        assert file.parts is not None, file.relative_path
        rebuilt = b"".join(
            part.literal
            if part.literal is not None
            else (
                wanted[part.tensor] if part.box is None else wanted[part.tensor][range_of(part.box)]
            ).tobytes()
            for part in file.parts
        )
        path = Path(checkpoint.directory) / file.relative_path
        assert rebuilt == path.read_bytes(), file.relative_path
        assert file.size == len(rebuilt)
        for part in file.parts:
            # A box that is all of the tensor, or none of it, would be told in two ways.
            assert part.box is None or 0 < np.prod(part.box.shape) < wanted[part.tensor].size
