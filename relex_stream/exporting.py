"""A stored step (or the base, step 0) as the files it was ingested from, byte for byte."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from relex_stream import machine, planner
from relex_stream.assemble import Assembly
from relex_stream.base_weights import BaseWeights, base_directory, open_base, transfer_bytes
from relex_stream.block_reader import BlockReader, fetch_blocks
from relex_stream.blocks import (
    BlockOf,
    Blocks,
    Workspace,
    float_formats,
    float_pairs,
    model_shape,
    work_on_strips,
)
from relex_stream.checksum import extend_each
from relex_stream.errors import CorruptionError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.locations import Location
from relex_stream.paths import refuse_inside
from relex_stream.sources import CheckpointReader
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.summaries import ExportedFile, ExportSummary, StagePlan
from relex_stream.warmup import warm_up_decoding
from relex_stream.writer import Filler, OutputDirectory


class BlockExport(Stage[tuple[BlockOf, ...], None, "Counter[str]"]):
    """Writes blocks of one step."""

    fetches = True

    def __init__(
        self,
        store: Store,
        base: BaseWeights,
        rows: int,
        assembly: Assembly,
        filler: Filler,
    ) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._rows = rows
        self._assembly = assembly
        self._filler = filler
        self._expected_crc = store.commit(rows - 1).source_crc if rows else store.manifest.base_crc

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        fetch_blocks(self._store, self._base, self._rows, tasks)

    def work(
        self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]
    ) -> list[Counter[str]]:
        """Write neighbouring blocks; return how many bytes, by file."""
        work_on_strips(tasks, float_formats, self._write)
        # Neighbours are one write: which task's it was nobody asks.
        return [self._filler.take_written(), *(Counter[str]() for _ in tasks[1:])]

    def combine(self, partials: list[Counter[str]]) -> Counter[str]:
        """Add up."""
        total = Counter[str]()
        for partial in partials:
            total.update(partial)
        return total

    def finish(
        self, key: Hashable, value: None, total: Counter[str], *, last: bool
    ) -> Counter[str]:
        """Return what was written of a tensor."""
        return total

    def _write(self, at: Blocks) -> list[None]:
        reader = BlockReader(self._store, self._base, self.of_thread(Workspace))
        bits = reader.base_bits(at)
        if self._rows and at.blocks[0].tensor.kind == "tracked":
            bits = reader.bits_at(at, bits, self._rows)
        crcs = np.empty(len(at.blocks), np.uint32)
        extend_each(bits.view(np.uint8), at.bounds * bits.itemsize, crcs)
        for block, crc in zip(at.blocks, crcs.tolist(), strict=True):
            if crc != int(self._expected_crc[block.column]):
                raise CorruptionError(
                    f"{self._store.path}: step {self._store.steps[self._rows - 1]}, tensor "
                    f"{block.tensor.name}, block {block.block} does not come back as it was "
                    "ingested"
                )
        self._assembly.put(self._filler, at, bits)
        return [None] * len(at.blocks)


def export_step(
    store_path: Location,
    out: Path,
    *,
    step: int,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> ExportSummary:
    """Export a step; `relex_stream.api.export` says what the arguments are."""
    started = time.monotonic()
    progress = progress or NoProgress()
    executor = Threads(workers, memory_limit)
    store = Store(store_path)
    rows = store.row_of(step) + 1 if step else 0
    refuse_inside(out, store_path, "OUT", "STORE")
    directory = base_directory(store, base)
    if directory is not None:
        refuse_inside(out, directory, "OUT", "the base")
    entries = store.commit(rows - 1).files if rows else store.manifest.base_files
    assembly = Assembly(store, entries, prefix="", in_base_dtype=not rows)
    output = OutputDirectory(out)
    output.check(assembly.nbytes)
    pairs = float_pairs(store.manifest.tensors)
    capacity = executor.prepare(warm_up_decoding, pairs, progress)
    shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
    stage = StagePlan(
        name="export",
        tasks=shape.blocks,
        read_bytes=int(store.frame_bytes[:rows].sum(dtype=np.int64)) + assembly.tensor_bytes,
        write_bytes=assembly.nbytes,
        worker_bytes=planner.copy_worker_bytes(shape),
    )
    plan = planner.make_plan(
        [stage],
        capacity,
        shared_bytes=planner.export_shared_bytes(shape, rows) + transfer_bytes(store, base),
    )
    if idle := planner.idle_workers(plan, capacity):
        progress.note(idle)
    with CheckpointReader() as reader, output:
        weights = open_base(store, base, reader)
        assembly.begin(output)
        written: dict[Hashable, Counter[str]] = executor.run(
            BlockExport(store, weights, rows, assembly, output.filler),
            grouped(
                (
                    tensor.index,
                    [BlockOf(tensor, block) for block in range(tensor.blocks)],
                    lambda at: at.elements * at.tensor.itemsize,
                )
                for tensor in assembly.tensors
            ),
            workers=plan.workers,
            name=f"export step {step}",
            progress=progress,
        )
        for each in written.values():
            output.add_written(each)
        progress.start("SHA-256", assembly.nbytes)
        digests = output.hash_files(progress.advance)
        progress.finish()
        output.finish()
    sizes = {entry.path: entry.size for entry in entries}
    files = tuple(ExportedFile(name, sizes[name], digest) for name, digest in digests.items())
    return ExportSummary(
        store=str(store_path),
        step=step,
        path=str(out),
        files=files,
        bytes_written=assembly.nbytes,
        peak_memory_bytes=machine.peak_bytes(),
        elapsed_s=time.monotonic() - started,
    )
