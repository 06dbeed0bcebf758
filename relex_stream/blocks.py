"""Blocks of tensors, strips of small ones, and the buffers that a worker keeps for them.

A block is what every stage works on. Small tensors are worked on several at a time, as a `Strip`: a
call costs more than the work on one. Buffers are kept from block to block: a fresh page of memory
costs more than the work on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from relex_stream import planner
from relex_stream.codec import Changes, FrameCodec
from relex_stream.pages import PAGE_BYTES, page_lead
from relex_stream.store.records import StoredTensor
from relex_stream.ulp import FORMATS, FloatFormat

_RUN_CHANGES = 1 << 16
"""Changes decoded at a time where a block has fewer elements: many steps of a small tensor."""


class Workspace:
    """Named buffers that grow to the largest size asked for and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(
        self, name: str, shape: int | tuple[int, ...], dtype: Any, file_offset: int | None = None
    ) -> NDArray[Any]:
        """Return an uninitialised array in the buffer called `name`.

        If it is to be read from or written to a file at `file_offset`, say so: see `pages`.
        """
        size = (shape if isinstance(shape, int) else math.prod(shape)) * np.dtype(dtype).itemsize
        room = size if file_offset is None else size + PAGE_BYTES
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < room:
            # Whole 64-bit words, so that blocks can be compared as such.
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(-(-room // 8) * 8, np.uint8)
        start = 0 if file_offset is None else page_lead(buffer.ctypes.data, file_offset)
        array: NDArray[Any] = buffer[start : start + size].view(dtype).reshape(shape)
        return array


@dataclass(frozen=True, slots=True)
class BlockOf:
    """A block: a tensor and the number of the block in it.

    There is one for every block of a model while a stage runs, so it is kept small.

    Attributes
    ----------
    tensor : StoredTensor
    block : int
    start : int
        First element.
    elements : int
        Number of elements.
    """

    tensor: StoredTensor
    block: int
    start: int = field(init=False, compare=False, repr=False)
    elements: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        start, stop = self.tensor.block_range(self.block)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "elements", stop - start)

    def __reduce__(self) -> tuple[type[BlockOf], tuple[StoredTensor, int]]:
        return BlockOf, (self.tensor, self.block)

    @property
    def column(self) -> int:
        """Column in the per-block tables of records."""
        return self.tensor.first_block + self.block

    @property
    def format(self) -> FloatFormat:
        """Float format of the checkpoints' weights (tracked tensors only)."""
        return FORMATS[self.tensor.dtype.code]

    @property
    def base_format(self) -> FloatFormat:
        """Float format of the base's weights (tracked tensors only)."""
        return FORMATS[self.tensor.base_dtype.code]

    @property
    def blocks(self) -> tuple[BlockOf, ...]:
        """The block: it is the narrowest of strips."""
        return (self,)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """As in `Strip`."""
        return np.array([0, self.elements], np.int64)


@dataclass(frozen=True)
class Strip:
    """Whole small tensors side by side, worked on as one block: same formats, in one buffer.

    Where rows of D are counted for a strip, those of its second block follow those of the first.
    """

    blocks: tuple[BlockOf, ...]

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Block i has the elements ``bounds[i] : bounds[i + 1]``."""
        return np.cumsum([0, *(at.elements for at in self.blocks)], dtype=np.int64)

    @cached_property
    def elements(self) -> int:
        """Number of elements."""
        return int(self.bounds[-1])

    @property
    def format(self) -> FloatFormat:
        """Float format of the checkpoints' weights."""
        return self.blocks[0].format

    @property
    def base_format(self) -> FloatFormat:
        """Float format of the base's weights."""
        return self.blocks[0].base_format


Blocks: TypeAlias = BlockOf | Strip
"""One block, or several worked on as one."""

BlockResult = TypeVar("BlockResult")


def work_on_strips(
    tasks: Sequence[tuple[BlockOf, ...]],
    kind_of: Callable[[BlockOf], Hashable],
    work: Callable[[Blocks], Iterable[BlockResult]],
) -> list[list[BlockResult]]:
    """Work on the blocks of some tasks, as few strips as there can be; return results by task.

    Parameters
    ----------
    tasks : sequence of tuples of BlockOf
    kind_of : callable
        Blocks of equal kind may share a strip; None for one that must be alone.
    work : callable
        Returns a result for each block of a strip.
    """
    strips = _strips((at for task in tasks for at in task), kind_of)
    results = chain.from_iterable(map(work, strips))
    return [list(islice(results, len(task))) for task in tasks]


def float_formats(at: BlockOf) -> Hashable:
    """Return a kind for `work_on_strips`: tracked tensors of the same formats."""
    tensor = at.tensor
    return (tensor.base_dtype.code, tensor.dtype.code) if tensor.kind == "tracked" else None


def float_pairs(tensors: Iterable[StoredTensor]) -> frozenset[tuple[str, str]]:
    """Return the dtype codes of tracked tensors: of the base, and of the checkpoints."""
    return frozenset(
        (tensor.base_dtype.code, tensor.dtype.code)
        for tensor in tensors
        if tensor.kind == "tracked"
    )


def _strips(blocks: Iterable[BlockOf], kind_of: Callable[[BlockOf], Hashable]) -> Iterator[Blocks]:
    """Join neighbours that are whole tensors, up to the elements of a large tensor's block."""
    run: list[BlockOf] = []
    size, kind = 0, None
    for at in blocks:
        kind_here = kind_of(at) if at.tensor.blocks == 1 else None
        fits = size + at.elements <= at.tensor.block_elements
        if run and (kind_here is None or kind_here != kind or not fits):
            yield Strip(tuple(run)) if len(run) > 1 else run[0]
            run, size = [], 0
        run.append(at)
        size, kind = size + at.elements, kind_here
    if run:
        yield Strip(tuple(run)) if len(run) > 1 else run[0]


def base_bits_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    """Return the unsigned integer dtype of a tensor's stored elements in the base."""
    return np.dtype(f"u{tensor.base_itemsize}")


def model_shape(tensors: Sequence[StoredTensor], sketch_width: int) -> planner.ModelShape:
    """Return what the planner needs to know of a store's tensors."""
    kept = [tensor for tensor in tensors if tensor.blocks]
    # Small tensors may share a strip as large as a block.
    elements = sum(tensor.elements for tensor in kept)
    largest = max((min(elements, t.block_elements) for t in kept), default=1)
    widest = max(
        (min(elements, t.block_elements) * max(t.itemsize, t.base_itemsize) for t in kept),
        default=8,
    )
    return planner.ModelShape(
        tensors=len(tensors),
        sketched=sum(tensor.sketch_row >= 0 for tensor in tensors),
        blocks=sum(tensor.blocks for tensor in tensors),
        largest_block=largest,
        largest_block_bytes=widest,
        sketch_width=sketch_width,
    )


def run_capacity(elements: int) -> int:
    """Return how many changes of a block of `elements` are decoded at a time."""
    return max(elements, _RUN_CHANGES)


def frame_tools(workspace: Workspace, elements: int, itemsize: int) -> tuple[FrameCodec, Changes]:
    """Return this workspace's codec and changes for blocks of up to `elements`."""
    kept: dict[int, tuple[FrameCodec, Changes]] = workspace.__dict__.setdefault("_frame_tools", {})
    tools = kept.get(itemsize)
    if tools is None or tools[0].elements < elements:
        changes = Changes(run_capacity(elements), itemsize)
        tools = kept[itemsize] = (FrameCodec(elements, itemsize), changes)
    return tools
