"""Blocks of models that are made from a store: one weighted sum of stored changes for each."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.block_sweep import TILE_COLUMNS, sweep_outputs
from relex_stream.blocks import BlockOf, Blocks, Workspace, work_on_strips
from relex_stream.errors import RelexStreamWarning
from relex_stream.graph import Executor, Stage, grouped
from relex_stream.grouping import run_blocks
from relex_stream.offload import Offload, kind_for
from relex_stream.pages import PAGE_BYTES
from relex_stream.sketch import add_weighted_rows
from relex_stream.specs import Progress
from relex_stream.store import Store
from relex_stream.store.records import StoredTensor
from relex_stream.subspaces import BlockTotals
from relex_stream.ulp import Bits, add_rounded, narrow
from relex_stream.writer import Filler, OutputDirectory

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Mix:
    """How the outputs of some blocks come about.

    Attributes
    ----------
    changes : ndarray of float64, shape (T, outputs)
        ``L^T w``: how much each stored change weighs.
    copies : tuple of (int, int)
        Outputs, by their numbers, that have the bits after so many rows instead.
    """

    changes: Float64
    copies: tuple[tuple[int, int], ...] = ()

    def part(self, first: int, stop: int) -> Mix:
        """Return the same of some outputs."""
        copies = tuple((number - first, rows) for number, rows in self.copies)
        kept = tuple(copy for copy in copies if 0 <= copy[0] < stop - first)
        return Mix(np.ascontiguousarray(self.changes[:, first:stop]), kept)


class Written(NamedTuple):
    """What writing some blocks did: values that overflowed, and bytes by file."""

    overflowed: int
    nbytes: Counter[str]


@dataclass(frozen=True)
class Source:
    """What blocks are read from.

    Attributes
    ----------
    store : Store
    base : BaseWeights
    rows : int
        Of the store, from the first.
    entry_capacity : int
        Changes of a block that are kept between sweeps.
    half_deltas : bool
        As in `subspaces.SubspaceOptions`.
    """

    store: Store
    base: BaseWeights
    rows: int
    entry_capacity: int
    half_deltas: bool = False


class BlockWrite(Stage[tuple[BlockOf, ...], Mix, Written]):
    """Writes blocks of all outputs.

    A group is a tensor, or a run of one. It is given its `Mix`; one that is given none is copied
    from the base.
    """

    fetches = True

    def __init__(
        self,
        source: Source,
        filler: Filler,
        assemblies: Sequence[Assembly],
        offload: Offload | None,
    ) -> None:
        super().__init__()
        self._source = source
        self._rows = source.rows
        self._filler = filler
        self._assemblies = assemblies
        self._offload = offload
        self.device_share = offload.share if offload is not None else 0.0

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._source.store, self._source.base, self._rows, tasks)

    def work(
        self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[Mix | None]
    ) -> list[Written]:
        """Write neighbouring blocks."""
        workspace = self.of_thread(Workspace)
        source = self._source
        reader = BlockReader(
            source.store,
            source.base,
            workspace,
            source.entry_capacity,
            half_deltas=source.half_deltas,
        )
        mixes: dict[int, Mix] = {}
        for task, mix in zip(tasks, values, strict=True):
            if mix is not None:
                mixes |= dict.fromkeys((at.column for at in task), mix)

        def write(at: Blocks) -> list[int]:
            return self._write(reader, at, _mix_of(at, mixes), workspace)

        def kind_of(at: BlockOf) -> Hashable:
            mix = mixes.get(at.column)
            return None if mix is not None and mix.copies else kind_for(self._offload, at)

        overflowed = [sum(counts) for counts in work_on_strips(tasks, kind_of, write)]
        # Neighbours are one write: which task's it was nobody asks.
        nbytes = [self._filler.take_written(), *(Counter[str]() for _ in tasks[1:])]
        return [Written(*each) for each in zip(overflowed, nbytes, strict=True)]

    def combine(self, partials: list[Written]) -> Written:
        """Add up."""
        total = Counter[str]()
        for each in partials:
            total.update(each.nbytes)
        return Written(sum(each.overflowed for each in partials), total)

    def finish(self, key: Hashable, value: Mix | None, total: Written, *, last: bool) -> Written:
        """Return what was written of a group."""
        return total

    def settle(self) -> None:
        """As in `Stage`."""
        self._filler.sync()

    def _write(
        self, reader: BlockReader, at: Blocks, mix: Mix | None, workspace: Workspace
    ) -> list[int]:
        base_bits = reader.base_bits(at)
        if mix is None or not reader.entries(at, self._rows):
            for assembly in self._assemblies:
                assembly.put(self._filler, at, base_bits)
            return [0] * len(at.blocks)
        weights = mix.changes
        outputs = weights.shape[1]
        # Every output has the base's files: the same offsets. Rows that begin a page apart.
        first = at.blocks[0]
        offset = self._assemblies[0].offset_of(first.tensor, first.start)
        stride = -(-at.elements * base_bits.itemsize // PAGE_BYTES) * PAGE_BYTES
        shape = (outputs, stride // base_bits.itemsize)
        rounded = workspace.array("rounded", shape, base_bits.dtype, offset)
        overflowed = None
        if len(mix.copies) == outputs:
            overflowed = 0
        elif self._offload is not None:
            overflowed = self._offload.outputs(reader, at, base_bits, self._rows, weights, rounded)
        if overflowed is None:
            overflowed = self._sweep(reader, at, base_bits, weights, rounded)
        if overflowed and len(at.blocks) > 1:
            # One by one, which tells whose they are.
            each = np.split(weights, len(at.blocks))
            return [
                count
                for block, own in zip(at.blocks, each, strict=True)
                for count in self._write(reader, block, Mix(own), workspace)
            ]
        for output, rows in mix.copies:
            bits = reader.bits_at(at, base_bits, rows)
            narrow(bits, at.format, at.base_format, rounded[output, : at.elements])
        for assembly, bits in zip(self._assemblies, rounded, strict=True):
            assembly.put(self._filler, at, bits[: at.elements])
        return [overflowed] * len(at.blocks)

    def _sweep(
        self, reader: BlockReader, at: Blocks, base_bits: Bits, weights: Float64, rounded: Bits
    ) -> int:
        """Write to `rounded` what blocks are to have; return how many values overflowed."""
        changes = reader.change_rows(at, base_bits, self._rows)
        outputs = weights.shape[1]
        columns = min(TILE_COLUMNS, at.elements) if changes.tiled else at.elements
        sums = reader.workspace.array("sums", (columns, outputs), np.float64)
        fmt = at.base_format
        if changes.tiled:
            block = changes.at_hand()
            return int(sweep_outputs(block, weights, base_bits, fmt.tag, sums, rounded))
        sums[:] = 0
        for batch in changes.batches():
            add_weighted_rows(batch, 0, weights, sums)
        return sum(
            add_rounded(base_bits, sums[:, output], fmt, rounded[output, : at.elements])
            for output in range(outputs)
        )


def _mix_of(at: Blocks, mixes: Mapping[int, Mix]) -> Mix | None:
    """Return the mix of all rows of D of a strip; None if there are no weights but zeros."""
    each = [mixes.get(block.column) for block in at.blocks]
    given = [mix for mix in each if mix is not None]
    if not given or len(each) == 1:
        return each[0] if given else None
    zeros = np.zeros_like(given[0].changes)
    return Mix(np.concatenate([zeros if mix is None else mix.changes for mix in each]))


def pieces(tensor: StoredTensor, group_by: str) -> list[list[BlockOf]]:
    """Cut a tensor into what is given a mix of its own: runs, or the whole."""
    blocks = [BlockOf(tensor, block) for block in range(tensor.blocks)]
    size = run_blocks(tensor.block_elements) if group_by == "run" else len(blocks)
    return [blocks[first : first + size] for first in range(0, len(blocks), max(1, size))]


def write_blocks(
    source: Source,
    output: OutputDirectory,
    assemblies: Sequence[Assembly],
    mixes: Mapping[int, Mix],
    *,
    group_by: str,
    name: str,
    executor: Executor,
    workers: int,
    progress: Progress,
    offload: Offload | None,
) -> None:
    """Write every block of some outputs.

    Parameters
    ----------
    source : Source
    output : OutputDirectory
        With the files that `assemblies` began.
    assemblies : sequence of Assembly
        One for each output.
    mixes : mapping of int to Mix
        By the column of a piece's first block; pieces without one are copied from the base.
    group_by : str
        As in `pieces`.
    name : str
        Of the stage.

    Notes
    -----
    Warns of values that overflow their dtype.
    """
    outputs = len(assemblies)
    totals = BlockTotals.of(source.store, source.rows)

    def worked_on(at: BlockOf) -> int:
        return totals.work(at) + at.elements * at.tensor.base_itemsize * outputs

    tensors: dict[int, StoredTensor] = {}
    items = []
    for tensor in assemblies[0].tensors:
        for blocks in pieces(tensor, group_by):
            tensors[blocks[0].column] = tensor
            items.append((blocks[0].column, blocks, worked_on))
    written: dict[int, Written] = executor.run(
        BlockWrite(source, output.filler, assemblies, offload),
        grouped(items, given=mixes.get),
        workers=workers,
        name=name,
        progress=progress,
    )
    for each in written.values():
        output.add_written(each.nbytes)
    overflowed = [column for column, each in written.items() if each.overflowed]
    if overflowed:
        count = sum(each.overflowed for each in written.values())
        first = min((tensors[column] for column in overflowed), key=lambda tensor: tensor.index)
        warnings.warn(
            f"{count} extrapolated values overflow their dtype (first in tensor {first.name}) and "
            "were written as infinities; a nearer --target-step or a smaller --damping avoids that",
            RelexStreamWarning,
            stacklevel=3,
        )
