"""Checkpoints into a store: find them, match them to the base, keep their files, ingest them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from relex_stream import machine, planner
from relex_stream.additions import steps_to_add
from relex_stream.base_weights import check_base_layout
from relex_stream.batches import Added, Batches
from relex_stream.blocks import float_pairs
from relex_stream.cast_savings import cast_savings
from relex_stream.chains import in_order
from relex_stream.errors import (
    OptionError,
    RelexStreamWarning,
    SourceError,
    StoreError,
)
from relex_stream.graph import open_executor
from relex_stream.listing import read_file
from relex_stream.locations import Location, lies_in, location, relative_to
from relex_stream.matching import CheckpointPlaces, describe_tensors, kept_files, match_checkpoint
from relex_stream.sketch import SKETCH_MIN_ELEMENTS, SKETCH_WIDTH
from relex_stream.sources import (
    CheckpointReader,
    Naming,
    Phase,
    find_run,
    open_checkpoint,
    parse_steps,
)
from relex_stream.specs import BLOCK_BYTES, NoProgress, Progress, SourceCheckpoint
from relex_stream.store import Store, StoreWriter
from relex_stream.store.records import (
    MAX_BLOCK_BYTES,
    FileEntry,
    StoredTensor,
    place_tensors,
)
from relex_stream.summaries import BuildSummary, CastSavings, Plan
from relex_stream.warmup import warm_up_encoding


def build(
    base: Location,
    checkpoints: Location,
    store: Location,
    *,
    pattern: str | None,
    steps: str | None,
    source: str = "auto",
    strip_prefix: str | None = None,
    map_names: Sequence[tuple[str, str]] = (),
    memory_limit: int | None,
    workers: int | None,
    include_base: bool,
    allow_nonfinite: bool,
    seed: int,
    cast: str | None = None,
    replace_from: int | None = None,
    step_offset: int = 0,
    then: Sequence[tuple[Location, int]] = (),
    scheduler: str | None = None,
    local_cluster: int | None = None,
    progress: Progress | None,
    block_bytes: int = BLOCK_BYTES,
    sketch_min_elements: int = SKETCH_MIN_ELEMENTS,
    commit_steps: int | None = None,
) -> BuildSummary:
    """Build a store or append to it; `relex_stream.api.build_store` says what the arguments are.

    Parameters
    ----------
    block_bytes : int
        Bytes of a block at one step, a multiple of 8 (new stores only).
    sketch_min_elements : int
        Tensors with fewer weights keep no sketch (new stores only).
    commit_steps : int, optional
        Steps per commit at most; the planner chooses if not given.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    _check_options(block_bytes, seed, workers, cast)
    if scheduler is not None or local_cluster is not None:
        # Workers have working directories of their own.
        base, checkpoints, store = base.absolute(), checkpoints.absolute(), store.absolute()
        then = [(path.absolute(), offset) for path, offset in then]
    _refuse_overlap(base, [checkpoints, *(path for path, _ in then)], store)
    selection = parse_steps(steps) if steps is not None else None
    base_checkpoint = open_checkpoint(base, 0)
    naming = Naming(frozenset(base_checkpoint.tensors), strip_prefix, tuple(map_names))
    phases = [Phase(checkpoints, step_offset), *(Phase(*phase) for phase in then)]
    found = find_run(phases, pattern, selection, source, replace_from, _stored_steps(store))
    with (
        StoreWriter(store) as writer,
        CheckpointReader() as reader,
        open_executor(
            scheduler=scheduler,
            local_cluster=local_cluster,
            workers=workers,
            memory_limit=memory_limit,
            progress=progress,
        ) as executor,
    ):
        # Before any stored step is taken back.
        _check_continued(writer.store, base_checkpoint, cast)
        todo, skipped = steps_to_add(
            writer,
            found,
            partial(found.open, naming=naming),
            reader,
            base_checkpoint,
            cast=bool(cast),
            replace_from=replace_from,
            progress=progress,
        )
        committed = writer.store
        opened = in_order(
            (found.open(path, step, naming) for step, path in todo),
            committed.steps[-1] if committed and committed.steps else 0,
            found.there,
            cast=bool(cast),
            is_local=executor.is_local,
        )
        seed, include_base = _settled_options(committed, seed, include_base=include_base)
        if committed is not None:
            tensors, block_bytes = committed.manifest.tensors, committed.manifest.block_bytes
            sketch_width = committed.manifest.sketch_width
        elif todo:
            first = next(opened)
            opened = chain([first], opened)
            tensors, _ = place_tensors(
                describe_tensors(base_checkpoint, first, sketch_min_elements, cast=bool(cast)),
                block_bytes,
            )
            sketch_width = SKETCH_WIDTH
        else:
            raise SourceError(f"{checkpoints} holds no checkpoints to store")
        reader.expect(base_checkpoint)
        bytes_before = committed.stored_bytes() if committed else 0
        places: list[CheckpointPlaces] = []
        files = {}
        for checkpoint in opened:
            name = _name_in(checkpoints, location(checkpoint.directory))
            before = places[-1] if places else None
            matched = match_checkpoint(checkpoint, tensors, name, before, cast=bool(cast))
            places.append(matched)
            # Now, and not when its batch is committed: it would have to be opened again.
            files[checkpoint.step] = _keep_files(
                writer, checkpoint, is_cast=bool(matched.is_cast.any())
            )
            reader.expect(checkpoint)
        capacity = executor.prepare(
            warm_up_encoding if places else _warm_up_nothing, float_pairs(tensors), progress
        )
        last = [location(place.directory) for place in places[-1:]]
        executor.check_sees([base, *last, store])
        batches = Batches(
            writer=writer,
            reader=reader,
            executor=executor,
            tensors=tensors,
            block_bytes=block_bytes,
            sketch_width=sketch_width,
            commit_steps=commit_steps,
            files=files,
            base_files=() if committed else _keep_files(writer, base_checkpoint),
            base_checkpoint=base_checkpoint,
            base_hint=_relative_hint(base, store),
            seed=seed,
            include_base=include_base,
            allow_nonfinite=allow_nonfinite,
            capacity=capacity,
            progress=progress,
        )
        plan = batches.plan(places)
        if places and (idle := planner.idle_workers(plan, capacity)):
            progress.note(idle)
        added = batches.run(places, plan)
        finished = writer.store
        assert finished is not None
        return _summary(
            finished,
            savings=cast_savings(finished, places, reader),
            layout=found.layout,
            added=added,
            skipped=skipped,
            places=places,
            plan=plan,
            bytes_before=bytes_before,
            peak_bytes=executor.peak_bytes(),
            elapsed_s=time.monotonic() - started,
        )


def _stored_steps(path: Location) -> tuple[int, ...]:
    """Return the steps of a store that may be there; whether it is one is for its writer to say."""
    try:
        return Store(path).steps
    except StoreError:
        return ()


def _check_options(block_bytes: int, seed: int, workers: int | None, cast: str | None) -> None:
    if cast not in (None, "bf16"):
        raise OptionError(f"--as must be bf16, not {cast}")
    if not 8 <= block_bytes <= MAX_BLOCK_BYTES or block_bytes % 8:
        raise OptionError(
            f"a block must be a multiple of 8 bytes up to {MAX_BLOCK_BYTES}, not {block_bytes}"
        )
    if not 0 <= seed < 1 << 63:
        raise OptionError(f"--seed must be from 0 to 2^63 - 1, not {seed}")
    if workers is not None:
        machine.wanted_workers(workers)


def _refuse_overlap(base: Location, checkpoints: Sequence[Location], store: Location) -> None:
    inside = store.resolve()
    for what, path in (("BASE", base), *(("CHECKPOINTS", path) for path in checkpoints)):
        source = path.resolve()
        if inside == source:
            raise OptionError(
                f"STORE and {what} are the same directory, {path}; name another STORE"
            )
    if lies_in(inside, base.resolve()):
        raise OptionError(f"STORE {store} lies inside BASE {base}; name a place outside it")


def _settled_options(store: Store | None, seed: int, *, include_base: bool) -> tuple[int, bool]:
    """Return seed and include_base as the store has them; an append cannot change them."""
    if store is None:
        return seed, include_base
    if include_base and not store.manifest.base_included:
        warnings.warn(
            "--include-base is left out: the store was begun without the base's weights; "
            "build a new one to have them",
            RelexStreamWarning,
            stacklevel=2,
        )
    if seed not in (0, store.manifest.seed):
        warnings.warn(
            f"--seed {seed} is left out: the store was begun with {store.manifest.seed}",
            RelexStreamWarning,
            stacklevel=2,
        )
    return store.manifest.seed, store.manifest.base_included


def _check_continued(store: Store | None, base: SourceCheckpoint, cast: str | None) -> None:
    """Refuse to go on over another base, or to round what comes to a store of the bits as are."""
    if store is None:
        return
    check_base_layout(store, base)
    if cast and (kept := next((t for t in store.manifest.tensors if _is_widened(t)), None)):
        raise OptionError(
            f"--as {cast}: {store.path} was begun without it and holds {kept.dtype.code} weights; "
            "leave it out, or name another STORE"
        )


def _is_widened(tensor: StoredTensor) -> bool:
    return (tensor.base_dtype.code, tensor.dtype.code) == ("BF16", "F32")


def _name_in(checkpoints: Location, path: Location) -> str:
    return Path(relative_to(path, checkpoints)).as_posix()


def _keep_files(
    writer: StoreWriter, checkpoint: SourceCheckpoint, *, is_cast: bool = False
) -> tuple[FileEntry, ...]:
    """Keep recipes of weights files that can be put together again, and the side files."""
    weights_files, side_files = kept_files(checkpoint, is_cast=is_cast)
    entries = [writer.put_weights_file(file) for file in weights_files]
    for name in side_files:
        data = read_file(location(checkpoint.directory) / name)
        entries.append(writer.put_side_file(name, data))
    return tuple(entries)


def _relative_hint(base: Location, store: Location) -> str:
    return relative_to(base.resolve(), store.resolve())


def _summary(
    store: Store,
    *,
    savings: CastSavings | None,
    layout: str,
    added: Sequence[Added],
    skipped: tuple[int, ...],
    places: Sequence[CheckpointPlaces],
    plan: Plan,
    bytes_before: int,
    peak_bytes: int,
    elapsed_s: float,
) -> BuildSummary:
    changed = sum(step.changed for step in added)
    frame_bytes = sum(step.frame_bytes for step in added)
    bytes_in = sum(place.nbytes for place in places)
    base_bytes = int(store.manifest.base_frame_bytes.sum(dtype=np.int64))
    store_bytes = store.stored_bytes()
    bytes_stored = store_bytes - (bytes_before or base_bytes)
    return BuildSummary(
        store=str(store.path),
        layout=layout,
        steps_added=tuple(step.step for step in added),
        steps_skipped=skipped,
        steps_total=len(store.steps),
        bytes_in=bytes_in,
        bytes_stored=bytes_stored,
        base_bytes_stored=base_bytes,
        store_bytes=store_bytes,
        ratio=bytes_in / bytes_stored if bytes_stored else 0.0,
        changed_weights=changed,
        bits_per_changed_weight=8 * frame_bytes / changed if changed else 0.0,
        skipped_files=tuple(sorted({name for place in places for name in place.skipped_files})),
        cast_savings=savings,
        peak_memory_bytes=peak_bytes,
        elapsed_s=elapsed_s,
        plan=plan,
    )


def _warm_up_nothing(_: object, __: Progress) -> None:
    pass
