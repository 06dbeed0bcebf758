"""A build's checkpoints in batches: what is read of each block is put together and committed.

Statistics of a tensor are summed over its blocks in a fixed order. Only when all blocks of a batch
are on the disk is it committed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from relex_stream import planner
from relex_stream.base_weights import BaseWeights
from relex_stream.blocks import BlockOf, model_shape
from relex_stream.digests import check_digests
from relex_stream.errors import RelexStreamWarning
from relex_stream.graph import Executor, grouped
from relex_stream.ingest import Ingest, TensorResult
from relex_stream.matching import CheckpointPlaces
from relex_stream.patches import Patches
from relex_stream.source_blocks import SourceBlocks
from relex_stream.sources import CheckpointReader
from relex_stream.specs import Progress, SourceCheckpoint
from relex_stream.store import StoreWriter
from relex_stream.store.records import Commit, FileEntry, Manifest, StoredTensor
from relex_stream.summaries import Plan, StagePlan
from relex_stream.unpacking import unpack, unpacking_bytes


class Added(NamedTuple):
    """A step that was committed, and sums over its blocks: changed weights, bytes of frames."""

    step: int
    changed: int
    frame_bytes: int

    @classmethod
    def of(cls, commit: Commit) -> Added:
        """Sum over the blocks."""
        return cls(
            commit.step,
            int(commit.changed.sum(dtype=np.int64)),
            int(commit.frame_bytes.sum(dtype=np.int64)),
        )


@dataclass(frozen=True)
class Batches:
    """A build with its options settled.

    Attributes
    ----------
    writer : StoreWriter
    reader : CheckpointReader
        Expects the files of the base and of all checkpoints.
    executor : Executor
        Prepared.
    tensors : tuple of StoredTensor
        Of the store, or of the one that is to be.
    block_bytes, sketch_width : int
    commit_steps : int or None
        Steps per commit at most; None where the planner chooses.
    files, base_files
        Entries of files that were kept: of each step, and of the base.
    base_checkpoint : SourceCheckpoint
    base_hint : str
        Where the base is, as the manifest says it.
    seed : int
    include_base, allow_nonfinite : bool
    capacity : Capacity
    progress : Progress
    """

    writer: StoreWriter
    reader: CheckpointReader
    executor: Executor
    tensors: tuple[StoredTensor, ...]
    block_bytes: int
    sketch_width: int
    commit_steps: int | None
    files: Mapping[int, tuple[FileEntry, ...]]
    base_files: tuple[FileEntry, ...]
    base_checkpoint: SourceCheckpoint
    base_hint: str
    seed: int
    include_base: bool
    allow_nonfinite: bool
    capacity: planner.Capacity
    progress: Progress

    @property
    def _rows(self) -> int:
        return len(self.writer.store.steps) if self.writer.store else 0

    @cached_property
    def _shape(self) -> planner.ModelShape:
        return model_shape(self.tensors, self.sketch_width)

    def _batch_steps(self, places: Sequence[CheckpointPlaces], rows: int) -> int:
        steps = planner.commit_batch(
            self._shape,
            places[0].nbytes,
            rows,
            len(places),
            planner.statistics_bytes(self.capacity.memory_limit_bytes),
            self.capacity.processes,
        )
        return min(steps, self.commit_steps) if self.commit_steps else steps

    def plan(self, places: Sequence[CheckpointPlaces]) -> Plan:
        """Project the memory of the widest batch."""
        steps = self._batch_steps(places, self._rows) if places else 0
        later = self._batch_steps(places, 0) if places else 0
        widest = max(steps, later)
        stage = StagePlan(
            name="encode",
            tasks=self._shape.blocks,
            read_bytes=sum(place.nbytes for place in places) + self.base_checkpoint.nbytes,
            write_bytes=0,
            worker_bytes=max(
                planner.ingest_worker_bytes(self._shape, widest),
                unpacking_bytes(self._shape.largest_block_bytes),
            ),
        )
        shared = planner.ingest_shared_bytes(
            self._shape,
            widest,
            self._rows + len(places),
            max((tensor.blocks for tensor in self.tensors), default=0),
            max((place.table.file.size for place in places), default=0),
            sum(place.patch is not None for place in places),
        )
        shared += self.writer.transfer_bytes + self.reader.reading_bytes
        return planner.make_plan([stage], self.capacity, shared_bytes=shared)

    def run(self, places: Sequence[CheckpointPlaces], plan: Plan) -> list[Added]:
        """Ingest and commit batch by batch; return the steps added."""
        added: list[Added] = []
        while places:
            steps = self._batch_steps(places, self._rows)
            with self._unpack(places[:steps], plan.workers) as patches:
                # What it has no room for comes next.
                batch, places = places[: patches.steps], places[patches.steps :]
                added += map(Added.of, self._ingest_batch(batch, patches, plan.workers))
        return added

    def _unpack(self, batch: Sequence[CheckpointPlaces], workers: int) -> Patches:
        reader = self.reader.limited_to({path for place in batch for path in place.files})
        return unpack(
            self.writer.path, batch, self.tensors, reader, workers=workers, progress=self.progress
        )

    def _ingest_batch(
        self, batch: Sequence[CheckpointPlaces], patches: Patches, workers: int
    ) -> list[Commit]:
        store, rows = self.writer.store, self._rows
        self.writer.allocate(self.tensors, rows + len(batch), include_base=self.include_base)
        files = {path for place in batch for path in place.files}
        files.update(self.base_checkpoint.weights_paths)
        with self.reader.limited_to(files) as reader:
            check_digests(
                self.executor,
                batch,
                self.tensors,
                SourceBlocks(reader, batch, patches),
                store=store,
                base=BaseWeights(store, self.base_checkpoint, reader),
                workers=workers,
                progress=self.progress,
            )
            results = self._encode(batch, patches, reader, workers)
            reader.verify_unchanged(files)
        manifest = store.manifest if store else self._manifest(results)
        commits = self._commits(batch, results)
        self.writer.commit(manifest, commits)
        for commit in commits:
            if not commit.changed.any():
                before = self.writer.store.steps[commit.row - 1] if commit.row else 0  # type: ignore[union-attr]
                warnings.warn(
                    f"step {commit.step} has the same weights as step {before}, bit for bit; "
                    "did training stop there? Leave such steps out of a fit with --history-steps",
                    RelexStreamWarning,
                    stacklevel=2,
                )
        return commits

    def _encode(
        self,
        batch: Sequence[CheckpointPlaces],
        patches: Patches,
        reader: CheckpointReader,
        workers: int,
    ) -> dict[int, TensorResult]:
        """Write the frames of a batch; return what is to be told of them, by tensor."""
        store = self.writer.store
        ingest = Ingest(
            root=self.writer.path,
            fence=self.writer.fence,
            store=store,
            base=BaseWeights(store, self.base_checkpoint, reader),
            reader=reader,
            checkpoints=batch,
            patches=patches if patches.nbytes else None,
            seed=self.seed,
            sketch_width=self.sketch_width,
            allow_nonfinite=self.allow_nonfinite,
            include_base=self.include_base and store is None,
            tied_tensors=[tensor for tensor in self.tensors if tensor.kind == "tied"],
        )
        first = batch[0]
        # As they lie in the files: what the system reads ahead is then wanted next.
        by_place = sorted(
            (tensor for tensor in self.tensors if tensor.blocks),
            key=lambda tensor: first.table.first_place(tensor.index),
        )
        groups = grouped(
            (
                tensor.index,
                [BlockOf(tensor, block) for block in range(tensor.blocks)],
                lambda at: at.elements * at.tensor.itemsize * len(batch),
            )
            for tensor in by_place
        )
        steps = f"steps {batch[0].step} to {batch[-1].step}"
        results: dict[int, TensorResult] = self.executor.run(
            ingest,
            groups,
            workers=workers,
            name=f"encode {steps}" if len(batch) > 1 else f"encode step {batch[0].step}",
            progress=self.progress,
        )
        return results

    def _manifest(self, results: dict[int, TensorResult]) -> Manifest:
        blocks = self._shape.blocks
        base_crc, base_frame_bytes = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
        for tensor in self.tensors:
            if tensor.blocks:
                columns = slice(tensor.first_block, tensor.first_block + tensor.blocks)
                result = results[tensor.index]
                base_crc[columns] = result.base_crc
                base_frame_bytes[columns] = result.base_frame_bytes
        return Manifest(
            tensors=self.tensors,
            block_bytes=self.block_bytes,
            seed=self.seed,
            sketch_width=self.sketch_width,
            base_hint=self.base_hint,
            base_files=self.base_files,
            base_crc=base_crc,
            base_included=self.include_base,
            base_frame_bytes=base_frame_bytes,
        )

    def _commits(
        self,
        batch: Sequence[CheckpointPlaces],
        results: dict[int, TensorResult],
    ) -> list[Commit]:
        shape, rows, steps = self._shape, self._rows, len(batch)
        store = self.writer.store
        tables = {
            name: np.zeros((steps, shape.blocks), np.uint32)
            for name in ("frame_bytes", "frame_crc", "changed", "source_crc")
        }
        change_sq = np.zeros((steps, shape.tensors))
        growth = np.zeros((steps, shape.tensors))
        sketch = np.zeros((steps, shape.sketched, shape.sketch_width), np.float16)
        scale = np.zeros((steps, shape.sketched), np.float32)
        nonfinite = np.zeros(steps, np.bool_)
        # All steps of a tensor at once: tensors may be very many.
        for tensor in self.tensors:
            if not tensor.blocks:
                continue
            result = results[tensor.index]
            columns = slice(tensor.first_block, tensor.first_block + tensor.blocks)
            for name, table in tables.items():
                table[:, columns] = getattr(result, name)
            change_sq[:, tensor.index] = result.change_sq
            growth[:, tensor.index] = result.delta_sq_growth
            nonfinite |= result.nonfinite
            if result.packed_sketch is not None:
                sketch[:, tensor.sketch_row] = result.packed_sketch
                scale[:, tensor.sketch_row] = result.sketch_scale
        delta_sq = store.delta_sq[rows - 1] if store and rows else np.zeros(shape.tensors)
        commits = []
        for index, place in enumerate(batch):
            # A sum of growths may end a rounding below zero where all deltas went back to zero.
            delta_sq = np.maximum(delta_sq + growth[index], 0.0)
            commits.append(
                Commit(
                    step=place.step,
                    row=rows + index,
                    previous="",
                    source=place.name,
                    source_bytes=place.nbytes,
                    files=self.files[place.step],
                    nonfinite=bool(nonfinite[index]),
                    change_sq=change_sq[index],
                    delta_sq=delta_sq,
                    sketch=sketch[index],
                    sketch_scale=scale[index],
                    **{name: table[index] for name, table in tables.items()},
                )
            )
        return commits
