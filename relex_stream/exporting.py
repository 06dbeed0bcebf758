"""Stored steps (or the base, step 0) as files: those ingested, byte for byte, or a loadable model.

A model of a step has the base's names, shards and side files, whatever its checkpoint was.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
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
from relex_stream.errors import CorruptionError, OptionError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.hf_files import headers_for_steps, side_files_for_steps
from relex_stream.locations import Location
from relex_stream.paths import refuse_inside
from relex_stream.sources import CheckpointReader, parse_steps
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.store.read import describe_steps
from relex_stream.summaries import ExportedFile, ExportsSummary, ExportSummary, Plan, StagePlan
from relex_stream.ulp import Bits, narrow
from relex_stream.warmup import warm_up_decoding
from relex_stream.writer import Filler, OutputDirectory

INGESTED, HF = FILE_FORMATS = ("ingested", "hf")
"""The files that a step was ingested from; or a model that loads like the base."""


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
        self._in_base_dtype = assembly.in_base_dtype
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
                step = self._store.steps[self._rows - 1] if self._rows else 0
                raise CorruptionError(
                    f"{self._store.path}: step {step}, tensor {block.tensor.name}, block "
                    f"{block.block} does not come back as it was ingested"
                )
        if self._rows and self._in_base_dtype and at.blocks[0].tensor.kind == "tracked":
            bits = self._narrowed(at, bits)
        self._assembly.put(self._filler, at, bits)
        return [None] * len(at.blocks)

    def _narrowed(self, at: Blocks, bits: Bits) -> Bits:
        """Return the patterns of a step rounded to the base's dtype."""
        out = self.of_thread(Workspace).array("narrow", at.elements, at.base_format.bits_dtype)
        narrow(bits, at.format, at.base_format, out)
        return out


@dataclass(frozen=True)
class _Export:
    """One step to be written."""

    step: int
    rows: int
    out: Path
    file_format: str
    assembly: Assembly
    side_files: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        return self.assembly.nbytes + sum(map(len, self.side_files.values()))


def export_step(
    store_path: Location,
    out: Path,
    *,
    step: int,
    file_format: str | None,
    cast: str | None,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> ExportSummary:
    """Export a step; `relex_stream.api.export` says what the arguments are."""
    started = time.monotonic()
    store = Store(store_path)
    _refuse_places(store, out, base)
    export = _planned(store, step, out, file_format, cast)
    output = OutputDirectory(out)
    output.check(export.nbytes)
    exporter = _Exporter(store, base, memory_limit, workers, progress or NoProgress())
    return exporter.write(export, output, started)


def export_several(
    store_path: Location,
    out: Path,
    *,
    steps: str,
    file_format: str | None,
    cast: str | None,
    base: Location | None,
    memory_limit: int | None,
    workers: int | None,
    progress: Progress | None,
) -> ExportsSummary:
    """Export several steps; `relex_stream.api.export_steps` says what the arguments are."""
    started = time.monotonic()
    store = Store(store_path)
    _refuse_places(store, out, base)
    selection = parse_steps(steps)
    for step in selection.explicit:
        store.row_of(step)
    chosen = [step for step in store.steps if selection.selects(step)]
    if not chosen:
        raise OptionError(
            f"--steps {steps}: none of them is in {store_path}; it holds "
            f"{describe_steps(store.steps)}"
        )
    exports = [_planned(store, step, out / f"step_{step}", file_format, cast) for step in chosen]
    # All are looked at before the first is written.
    outputs = [OutputDirectory(export.out) for export in exports]
    total = sum(export.nbytes for export in exports)
    for output in outputs:
        output.check(total)
    exporter = _Exporter(store, base, memory_limit, workers, progress or NoProgress())
    summaries = []
    for export, output in zip(exports, outputs, strict=True):
        summaries.append(exporter.write(export, output, time.monotonic()))
    return ExportsSummary(
        store=str(store_path),
        path=str(out),
        exports=tuple(summaries),
        bytes_written=total,
        peak_memory_bytes=machine.peak_bytes(),
        elapsed_s=time.monotonic() - started,
    )


def _refuse_places(store: Store, out: Path, base: Location | None) -> None:
    refuse_inside(out, store.path, "OUT", "STORE")
    directory = base_directory(store, base)
    if directory is not None:
        refuse_inside(out, directory, "OUT", "the base")


def _planned(
    store: Store, step: int, out: Path, file_format: str | None, cast: str | None
) -> _Export:
    """Decide which files a step is written as.

    Raises
    ------
    OptionError
        If the step is not stored, or cannot be written so.
    """
    if file_format not in (None, *FILE_FORMATS):
        raise OptionError(f"--format must be one of {', '.join(FILE_FORMATS)}, not {file_format}")
    if cast not in (None, "bf16"):
        raise OptionError(f"--as must be bf16, not {cast}")
    rows = store.row_of(step) + 1 if step else 0
    entries = store.commit(rows - 1).files if rows else store.manifest.base_files
    ingested = Assembly(store, entries, prefix="", in_base_dtype=not rows)
    if not ingested.is_complete:
        if file_format == INGESTED:
            raise OptionError(
                f"the files that step {step} was ingested from cannot be put together again: they "
                "also held training state or another model, or were cast with --as; export it "
                "with --format hf"
            )
        file_format = HF
    if cast is not None and file_format != HF:
        raise OptionError("--as goes with --format hf: what was ingested comes back as it was")
    if file_format != HF:
        return _Export(step, rows, out, INGESTED, ingested, {})
    in_base_dtype = not rows or cast is not None
    if cast is not None:
        _refuse_cast(store)
    headers = {} if in_base_dtype else headers_for_steps(store)
    side_files = {} if in_base_dtype else side_files_for_steps(store)
    assembly = Assembly(
        store,
        store.manifest.base_files,
        prefix="",
        in_base_dtype=in_base_dtype,
        replaced=tuple(side_files),
        headers=headers,
    )
    return _Export(step, rows, out, HF, assembly, side_files)


def _refuse_cast(store: Store) -> None:
    for tensor in store.manifest.tensors:
        if tensor.dtype != tensor.base_dtype and tensor.base_dtype.code != "BF16":
            raise OptionError(
                f"--as bf16: tensor {tensor.name} is {tensor.base_dtype.code} in the base, whose "
                "dtypes a cast takes; export it without --as"
            )
    if all(tensor.base_dtype.code != "BF16" for tensor in store.manifest.tensors):
        raise OptionError(
            f"--as bf16 casts to BF16 what the base has in BF16, and that of {store.path} has "
            "nothing in it; export it without --as"
        )


class _Exporter:
    """Writes steps of one store, one after the other."""

    def __init__(
        self,
        store: Store,
        base: Location | None,
        memory_limit: int | None,
        workers: int | None,
        progress: Progress,
    ) -> None:
        self._store = store
        self._base = base
        self._progress = progress
        self._executor = Threads(workers, memory_limit)
        pairs = float_pairs(store.manifest.tensors)
        self._capacity = self._executor.prepare(warm_up_decoding, pairs, progress)

    def _plan(self, export: _Export) -> Plan:
        store = self._store
        shape = model_shape(store.manifest.tensors, store.manifest.sketch_width)
        decoded = int(store.frame_bytes[: export.rows].sum(dtype=np.int64))
        stage = StagePlan(
            name="export",
            tasks=shape.blocks,
            read_bytes=decoded + export.assembly.tensor_bytes,
            write_bytes=export.nbytes,
            worker_bytes=planner.copy_worker_bytes(shape),
        )
        shared = planner.export_shared_bytes(shape, export.rows)
        shared += transfer_bytes(self._store, self._base)
        return planner.make_plan([stage], self._capacity, shared_bytes=shared)

    def write(self, export: _Export, output: OutputDirectory, started: float) -> ExportSummary:
        """Write a step; return what was written, with its digests."""
        store, assembly, progress = self._store, export.assembly, self._progress
        plan = self._plan(export)
        if idle := planner.idle_workers(plan, self._capacity):
            progress.note(idle)
        with CheckpointReader() as reader, output:
            weights = open_base(store, self._base, reader)
            assembly.begin(output)
            for name, data in export.side_files.items():
                output.write_file(name, data)
            written: dict[Hashable, Counter[str]] = self._executor.run(
                BlockExport(store, weights, export.rows, assembly, output.filler),
                grouped(
                    (
                        tensor.index,
                        [BlockOf(tensor, block) for block in range(tensor.blocks)],
                        lambda at: at.elements * at.tensor.itemsize,
                    )
                    for tensor in assembly.tensors
                ),
                workers=plan.workers,
                name=f"export step {export.step}",
                progress=progress,
            )
            for each in written.values():
                output.add_written(each)
            progress.start("SHA-256", export.nbytes)
            digests = output.hash_files(progress.advance)
            progress.finish()
            output.finish()
        sizes = assembly.sizes | {name: len(data) for name, data in export.side_files.items()}
        return ExportSummary(
            store=str(store.path),
            step=export.step,
            path=str(export.out),
            file_format=export.file_format,
            files=tuple(ExportedFile(name, sizes[name], sha) for name, sha in digests.items()),
            bytes_written=export.nbytes,
            peak_memory_bytes=machine.peak_bytes(),
            elapsed_s=time.monotonic() - started,
        )
