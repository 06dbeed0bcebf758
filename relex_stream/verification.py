"""Every checksum of a store, read back: records, frames, base weights, blobs, recipes, the tree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from relex_stream import machine
from relex_stream.base_weights import BaseWeights, open_base
from relex_stream.block_reader import FrameReader, decode_committed, fetch_blocks
from relex_stream.blocks import (
    BlockOf,
    Blocks,
    Workspace,
    float_formats,
    frame_tools,
    work_on_strips,
)
from relex_stream.errors import CorruptionError, SourceError
from relex_stream.graph import Stage, Threads, grouped
from relex_stream.locations import Location
from relex_stream.sources import CheckpointReader
from relex_stream.specs import STEP_GROUP, NoProgress, Progress
from relex_stream.store import Store
from relex_stream.store.records import FileEntry
from relex_stream.store.tree import tree_documents
from relex_stream.summaries import VerifySummary

BASE_ROW = -1
"""Stands for the base where rows of frames are listed."""


@dataclass
class Damage:
    """What of a store is not as it was committed, to be repaired.

    Attributes
    ----------
    frames : dict of BlockOf to list of int
        Rows whose frame is damaged, ascending; `BASE_ROW` for included weights of the base.
    blobs : set of str
        Names of blobs that are missing or damaged.
    documents : dict of str to bytes
        ``zarr.json`` files that are missing or damaged, and what belongs there.
    """

    frames: dict[BlockOf, list[int]] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)
    documents: dict[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.frames or self.blobs or self.documents)


@dataclass
class _Found:
    frames: int = 0
    frame_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[tuple[BlockOf, int]] = field(default_factory=list)

    @staticmethod
    def combine(parts: list[_Found]) -> _Found:
        return _Found(
            sum(part.frames for part in parts),
            sum(part.frame_bytes for part in parts),
            [problem for part in parts for problem in part.problems],
            [frame for part in parts for frame in part.damaged],
        )


class BlockCheck(Stage[tuple[BlockOf, ...], None, _Found]):
    """Decodes every committed frame of blocks.

    With `base`, also compares the base's weights there with their recorded checksums.
    """

    fetches = True

    def __init__(self, store: Store, base: BaseWeights | None) -> None:
        super().__init__()
        self._store = store
        self._base = base
        self._rows = len(store.steps)

    def work(self, tasks: Sequence[tuple[BlockOf, ...]], values: Sequence[None]) -> list[_Found]:
        """Check the blocks of each task; small tensors together, until something is wrong."""
        return [
            _Found.combine(parts) for parts in work_on_strips(tasks, float_formats, self._check)
        ]

    def combine(self, partials: list[_Found]) -> _Found:
        """Put together what was found."""
        return _Found.combine(partials)

    def finish(self, key: Hashable, value: None, total: _Found, *, last: bool) -> _Found:
        """Return what was found in a tensor."""
        return total

    def fetch(self, tasks: Sequence[tuple[BlockOf, ...]]) -> None:
        """As in `Stage`."""
        if self._base is not None:
            fetch_blocks(self._store, self._base, self._rows, tasks)
            return
        for at in (at for task in tasks for at in task):
            # Where one is in memory the others are too, most often, and there may be very many.
            asked = self._store.advise(at.tensor, at.block, self._rows)
            if not asked and self._store.storage.is_local:
                return

    def _check(self, at: Blocks) -> list[_Found]:
        found = [_Found() for _ in at.blocks]
        for block, here in zip(at.blocks, found, strict=True):
            self._check_included_base(block, here)
        self._check_base(at, found)
        self._check_frames(at, found)
        return found

    def _check_base(self, at: Blocks, found: Sequence[_Found]) -> None:
        if self._base is None:
            return
        try:
            self._base.read(at, self.of_thread(Workspace))
        except (SourceError, CorruptionError) as error:
            if len(at.blocks) == 1:
                found[0].problems.append(str(error))
                return
            for block, here in zip(at.blocks, found, strict=True):
                self._check_base(block, [here])

    def _check_frames(self, at: Blocks, found: Sequence[_Found]) -> None:
        if at.blocks[0].tensor.kind != "tracked":
            return
        columns = [block.column for block in at.blocks]
        try:
            for _ in FrameReader(self._store, self.of_thread(Workspace)).decoded(at, self._rows):
                pass
        except CorruptionError as error:
            before = sum(len(here.problems) for here in found)
            for block, here in zip(at.blocks, found, strict=True):
                for start in range(0, self._rows, STEP_GROUP):
                    self._check_chunk(block, start, here)
            if sum(len(here.problems) for here in found) == before:
                # Gone when it was looked at again: what was read first was damaged all the same.
                found[0].problems.append(str(error))
            return
        sizes = self._store.frame_bytes[:, columns]
        frames = np.count_nonzero(sizes, axis=0).tolist()
        nbytes = sizes.sum(axis=0, dtype=np.int64).tolist()
        for here, count, size in zip(found, frames, nbytes, strict=True):
            here.frames += count
            here.frame_bytes += size

    def _check_included_base(self, at: BlockOf, found: _Found) -> None:
        if not self._store.manifest.base_included:
            return
        try:
            frame = self._store.read_base_frame(at.tensor, at.block)
            if frame is not None:
                codec, changes = frame_tools(
                    self.of_thread(Workspace), at.tensor.block_elements, at.tensor.base_itemsize
                )
                codec.decode(frame, at.elements, changes)
                found.frames += 1
                found.frame_bytes += len(frame)
        except CorruptionError as error:
            found.problems.append(f"base, tensor {at.tensor.name}, block {at.block}: {error}")
            found.damaged.append((at, BASE_ROW))

    def _check_chunk(self, at: BlockOf, start: int, found: _Found) -> None:
        stop = min(start + STEP_GROUP, self._rows)
        try:
            self._check_rows(at, start, stop, found)
        except CorruptionError:
            # Something in the chunk is damaged: look at each row by itself to name them all.
            problems = []
            for row in range(start, stop):
                try:
                    self._check_rows(at, row, row + 1, found)
                except CorruptionError as error:
                    problems.append(str(error))
                    found.damaged.append((at, row))
            found.problems.extend(dict.fromkeys(problems))

    def _check_rows(self, at: BlockOf, start: int, stop: int, found: _Found) -> None:
        frames = self._store.read_frames(at.tensor, at.block, start, stop)
        for row, frame in frames:
            decode_committed(self._store, at, row, frame, self.of_thread(Workspace))
        found.frames += len(frames)
        found.frame_bytes += sum(len(frame) for _, frame in frames)


def check_store(
    store: Store,
    *,
    base: Location | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[VerifySummary, Damage]:
    """Check a store; say what was found, and what of it might be repaired.

    Parameters
    ----------
    store : Store
    base : Path or Url, optional
        Also check that this directory holds the base the store was built over.
    workers : int, optional
        Threads; one per core if not given.
    progress : Progress, optional
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    problems: list[str] = []
    damage = Damage()
    read = 0
    entries: dict[str, FileEntry] = {}
    _collect(entries, store.manifest.base_files)
    whole = True
    for row, step in enumerate(store.steps):
        try:
            _collect(entries, store.commit(row).files)
            read += store.record_bytes(row)
        except CorruptionError as error:
            whole = False
            problems.append(f"step {step}: {error}")
    _check_documents(store, problems, damage)
    blobs, blob_bytes = _check_blobs(store, list(entries.values()), problems, damage)
    found = _Found()
    if whole:
        found = _check_frames(store, base, workers, progress)
    else:
        problems.append("frames were not checked: their lengths are in the damaged records")
    for at, row in found.damaged:
        damage.frames.setdefault(at, []).append(row)
    summary = VerifySummary(
        store=str(store.path),
        steps=len(store.steps),
        frames=found.frames,
        records=len(store.steps) + 1,
        blobs=blobs,
        bytes_read=read + blob_bytes + found.frame_bytes,
        problems=tuple(problems + found.problems),
        elapsed_s=time.monotonic() - started,
    )
    return summary, damage


def _check_frames(
    store: Store, base: Location | None, workers: int | None, progress: Progress
) -> _Found:
    threads = machine.wanted_workers(workers)
    with CheckpointReader() as reader:
        weights = open_base(store, base, reader) if base is not None else None
        results: dict[Hashable, _Found] = Threads(threads).run(
            BlockCheck(store, weights),
            grouped(
                (
                    tensor.index,
                    [BlockOf(tensor, block) for block in range(tensor.blocks)],
                    _frame_bytes_of(store),
                )
                for tensor in store.manifest.tensors
            ),
            workers=threads,
            name="verify frames",
            progress=progress,
        )
    return _Found.combine(list(results.values()))


def _frame_bytes_of(store: Store) -> Callable[[BlockOf], int]:
    totals = store.frame_bytes.sum(axis=0)
    return lambda at: int(totals[at.column])


def _collect(entries: dict[str, FileEntry], files: tuple[FileEntry, ...]) -> None:
    for entry in files:
        name = entry.blob or entry.recipe
        if name is not None:
            entries[name] = entry


def _check_documents(store: Store, problems: list[str], damage: Damage) -> None:
    """Check what other zarr readers read; a run that is at work, or was killed, may have grown it.

    Rows that are not committed are zeros to them, so there may be more of them.
    """
    documents = tree_documents(store)
    there = store.storage.read_each(list(documents))
    for (key, document), found in zip(documents.items(), there, strict=True):
        if found != document and not (found is not None and _means(found, document)):
            what = "is missing" if found is None else "is damaged"
            problems.append(f"{store.path}: {key} {what}; plain zarr readers need it")
            damage.documents[key] = document


def _means(found: bytes, document: bytes) -> bool:
    """Say whether metadata mean the same, in whatever white space, or have more rows."""
    wanted = json.loads(document)
    try:
        there = json.loads(found)
        if "shape" in wanted:
            rows, least = there["shape"][0], wanted["shape"][0]
            if rows != least and not (type(rows) is int and rows > least and not rows % STEP_GROUP):
                return False
            there["shape"][0] = least
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
    # As text: 1.0 and True equal 1.
    return json.dumps(there, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _check_blobs(
    store: Store, entries: list[FileEntry], problems: list[str], damage: Damage
) -> tuple[int, int]:
    checked: set[str] = set()
    size = 0
    for entry in entries:
        try:
            names = sorted(store.blobs_of([entry]))
        except CorruptionError as error:
            problems.append(f"file {entry.path}: {error}")
            damage.blobs.update(name for name in (entry.recipe, entry.blob) if name is not None)
            continue
        for name in names:
            if name in checked:
                continue
            checked.add(name)
            try:
                size += len(store.blob(name))
            except CorruptionError as error:
                problems.append(f"file {entry.path}: {error}")
                damage.blobs.add(name)
    return len(checked), size
