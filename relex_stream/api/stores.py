"""Stores: build, look into, check, take from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from relex_stream.api.arguments import AnyPath, base_directory, base_path, optional_path
from relex_stream.build import build
from relex_stream.errors import OptionError
from relex_stream.exporting import export_several, export_step
from relex_stream.locations import local_directory, location
from relex_stream.opened import OpenStore
from relex_stream.sources import Phase
from relex_stream.specs import Progress
from relex_stream.store import Store, StoreWriter
from relex_stream.store_info import info_of
from relex_stream.summaries import (
    BuildSummary,
    DropSummary,
    ExportsSummary,
    ExportSummary,
    StoreInfo,
    VerifySummary,
)
from relex_stream.urls import is_hub
from relex_stream.verifying import Against
from relex_stream.verifying import verify as verify_stored


def build_store(
    base: AnyPath,
    checkpoints: AnyPath,
    store: AnyPath,
    *,
    pattern: str | None = None,
    steps: str | None = None,
    source: str = "auto",
    strip_prefix: str | None = None,
    map_names: Sequence[tuple[str, str]] = (),
    memory_limit: int | None = None,
    workers: int | None = None,
    include_base: bool = False,
    allow_nonfinite: bool = False,
    seed: int = 0,
    cast: str | None = None,
    replace_from: int | None = None,
    step_offset: int = 0,
    then: Sequence[tuple[AnyPath, int]] = (),
    scheduler: str | os.PathLike[str] | None = None,
    local_cluster: int | None = None,
    download_dir: AnyPath | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build a lossless delta store from checkpoints, or append new ones to it.

    Parameters
    ----------
    base : path
        Hugging Face model directory the run began from, or ``"hf://org/name[@revision]"``.
    checkpoints : path
        Directory of ``global_step_N/``, ``checkpoint-N/``, ``step_N/`` and the like, or that of the
        run with it. docs/trainers.md has a table. Or
        ``"hf://org/name"``, whose branches, tags or directories are called so: they are fetched
        one by one, and deleted when they are in the store (docs/hub.md).
    store : path
        The store, made if it is not there. It, base and checkpoints may be URLs of object storage
        (``"s3://bucket/run.store"``); see docs/remote.md. Steps in it already are skipped.
    pattern : str, optional
        Other names of checkpoint directories, with ``{step}`` for the number.
    steps : str, optional
        ``"1:75"`` (75 included), ``"1:75:5"``, ``"1,5,10"`` or one number; default all.
    source : str
        The format of the checkpoints: ``"safetensors"``, ``"split-safetensors"``, ``"fsdp"``,
        ``"dcp"`` or ``"grail"``; ``"auto"`` for the first of these that all steps have.
        ``"changed-safetensors"`` for model directories without the tensors that did not change.
    strip_prefix : str, optional
        What names of tensors in checkpoints begin with and those of the base do not; found out if
        not given.
    map_names : sequence of (str, str)
        Regular expressions and what replaces their matches in names of tensors in checkpoints, in
        order, behind the prefix that is given.
    memory_limit : int, optional
        Bytes this process may hold; default 768 MiB or what is free.
    workers : int, optional
        Threads; default one per core, fewer if they do not fit in the memory limit.
    include_base : bool
        Keep the base's weights in the store too.
    allow_nonfinite : bool
        Store values that are not finite where the base's are, instead of refusing them. Such
        values count as 0 in every statistic.
    seed : int
        Seed of the sketches (new stores only).
    cast : str, optional
        ``"bf16"``: round weights that the base has in BF16 and the checkpoints in F32 to BF16, to
        nearest even, on the way in. The store then keeps those, and not the bits of the files.
    replace_from : int, optional
        Take back the stored steps from this one on, and store those of `checkpoints` instead: those
        of a run that was taken up again before it.
    step_offset : int
        What is added to the numbers of the steps in `checkpoints`.
    then : sequence of (path, int)
        Further directories of checkpoints that continue the run, in order, each with what is added
        to the numbers of its steps. `steps` and `replace_from` count in the sums.
    scheduler : str or path, optional
        Do the work on a dask.distributed cluster: the address of its scheduler
        (``"tcp://host:8786"``) or the path of its scheduler file. Every machine of it sees base,
        checkpoints and store under the same paths. `memory_limit` is then of each of its processes.
        See docs/clusters.md.
    local_cluster : int, optional
        Do the work in so many processes of this machine, started for it.
    download_dir : path, optional
        Where checkpoints of the Hub are until they are in the store, two of them at most; default
        the store's path with ``.download`` at its end.

    Returns
    -------
    BuildSummary

    Raises
    ------
    SourceError, TrajectoryError
        If base or checkpoints cannot be used or do not belong together.
    HubError
        If the Hub cannot be reached or does not give what was asked; run it again to go on.
    StoreError
        If the store is locked, damaged or not a store.
    MemoryLimitError, OptionError
        If the arguments cannot be met. Whatever was committed before an error stays committed.
    ClusterError, MissingDependencyError
        If the cluster cannot be reached or does not do the work.
    """
    options: dict[str, Any] = {
        "pattern": pattern,
        "steps": steps,
        "source": source,
        "strip_prefix": strip_prefix,
        "map_names": map_names,
        "memory_limit": memory_limit,
        "workers": workers,
        "include_base": include_base,
        "allow_nonfinite": allow_nonfinite,
        "seed": seed,
        "cast": cast,
        "replace_from": replace_from,
        "scheduler": None if scheduler is None else os.fspath(scheduler),
        "local_cluster": local_cluster,
        "progress": progress,
    }
    if is_hub(checkpoints):
        from relex_stream.hub import build_from_hub

        if step_offset or then:
            raise OptionError(
                "--step-offset and --then are for directories; leave them out with a Hub URL"
            )
        through = optional_path(download_dir)
        return build_from_hub(base, checkpoints, location(store), download_dir=through, **options)
    if download_dir is not None:
        raise OptionError("--download-dir is for checkpoints of the Hub; leave it out")
    directory = base_directory(base, progress, check=True)
    phases = [(location(path), offset) for path, offset in then]
    return build(
        directory,
        location(checkpoints),
        location(store),
        step_offset=step_offset,
        then=phases,
        **options,
    )


def open_store(path: AnyPath, *, base: AnyPath | None = None) -> OpenStore:
    """Open a store for reading.

    Parameters
    ----------
    path : path
    base : path, optional
        The base's directory, when it is neither in the store nor where it was.

    Raises
    ------
    StoreError
        If there is no store of a known format.
    """
    return OpenStore(location(path), base_path(base))


def export(
    store: AnyPath,
    out: AnyPath,
    *,
    step: int,
    file_format: str | None = None,
    cast: str | None = None,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a stored checkpoint: every ingested file, byte for byte, or a model that loads.

    Parameters
    ----------
    store, out : path
    step : int
        A committed step, or 0 for the base.
    file_format : str, optional
        ``"ingested"``: the files that were ingested. ``"hf"``: safetensors with the names, shards
        and side files of the base, and the weights of the step in the dtypes that the store has
        them in. Default: those ingested if they can be put together again, else ``"hf"``.
    cast : str, optional
        With ``"hf"``: ``"bf16"`` rounds weights that the base has in BF16 to BF16, to nearest even.
    base : path, optional
        The base's directory, when it has moved.
    memory_limit, workers
        As in `build_store`.

    Returns
    -------
    ExportSummary
        With the SHA-256 of each file. The CRC-32C taken at ingest is checked block by block.

    Raises
    ------
    CorruptionError, SourceError, OptionError, OutputError
        As in `extrapolate`; nothing is written then.
    """
    return export_step(
        location(store),
        local_directory(out, "OUT"),
        step=step,
        file_format=file_format,
        cast=cast,
        base=base_path(base, progress),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def export_steps(
    store: AnyPath,
    out: AnyPath,
    *,
    steps: str,
    file_format: str | None = None,
    cast: str | None = None,
    base: AnyPath | None = None,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExportsSummary:
    """Write several stored checkpoints, each in ``OUT/step_N``.

    Parameters
    ----------
    store, out : path
    steps : str
        As in `build_store`; a range takes the committed steps in it.
    file_format, cast, base, memory_limit, workers
        As in `export`.

    Returns
    -------
    ExportsSummary

    Raises
    ------
    CorruptionError, SourceError, OptionError, OutputError
        As in `export`; steps that were written before an error stay.
    """
    return export_several(
        location(store),
        local_directory(out, "OUT"),
        steps=steps,
        file_format=file_format,
        cast=cast,
        base=base_path(base, progress),
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def info(store: AnyPath) -> StoreInfo:
    """Say what a store holds.

    Raises
    ------
    StoreError
        If there is no store of a known format, or its records are damaged.
    """
    return info_of(location(store))


def verify(
    store: AnyPath,
    *,
    base: AnyPath | None = None,
    against: AnyPath | None = None,
    pattern: str | None = None,
    source: str = "auto",
    strip_prefix: str | None = None,
    map_names: Sequence[tuple[str, str]] = (),
    cast: str | None = None,
    step_offset: int = 0,
    then: Sequence[tuple[AnyPath, int]] = (),
    repair: bool = False,
    dry_run: bool = False,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifySummary:
    """Check every checksum of a store; compare it with its checkpoints; rebuild what is damaged.

    Parameters
    ----------
    store : path
    base : path, optional
        Also check that this directory holds the base the store was built over.
    against : path, optional
        A directory of checkpoints that are still there. Every step of the store that it has is
        compared with it, bit for bit; other steps in it do not matter.
    pattern, source, strip_prefix, map_names, cast, step_offset, then
        How `against` is read: as in `build_store`.
    repair : bool
        Rebuild damaged frames, files and zarr metadata from `against` and the base, as far as they
        are still there. Each file of the store is replaced whole, and only by what was committed:
        every byte is checked against the checksums that were recorded then. Takes the store's lock.
    dry_run : bool
        With `repair`: find out what would be rebuilt, and write nothing.
    memory_limit, workers
        As in `build_store`; the limit is for comparing.

    Returns
    -------
    VerifySummary
        ``problems`` names each damaged record, blob or frame (tensor, step, block), and how steps
        differ from their checkpoints; after a repair, those that are left.

    Raises
    ------
    StoreError
        If there is no store, HEAD or the manifest is damaged, or, with `repair`, another process
        writes to it.
    SourceError
        If `against` has no checkpoints, or a `base` that was given is not there or is another.
    """
    checkpoints = None
    if against is not None:
        if cast not in (None, "bf16"):
            raise OptionError(f"--as must be bf16, not {cast}")
        phases = [(against, step_offset), *then]
        checkpoints = Against(
            tuple(Phase(location(path), offset) for path, offset in phases),
            pattern,
            source,
            strip_prefix,
            tuple(map_names),
            cast=cast is not None,
        )
    return verify_stored(
        location(store),
        base=base_path(base, progress),
        against=checkpoints,
        repair=repair,
        dry_run=dry_run,
        memory_limit=memory_limit,
        workers=workers,
        progress=progress,
    )


def drop(store: AnyPath, *, after: int) -> DropSummary:
    """Take back the steps after `after`.

    Raises
    ------
    StoreError
        If there is no store, or another process writes to it.
    """
    Store(location(store))  # refuses what is not a store before anything is made there
    with StoreWriter(location(store)) as writer:
        assert writer.store is not None
        before = writer.store.stored_bytes()
        dropped = writer.drop_after(after)
        return DropSummary(
            store=str(store),
            steps_dropped=dropped,
            steps_left=writer.store.steps,
            bytes_freed=before - writer.store.stored_bytes(),
        )
