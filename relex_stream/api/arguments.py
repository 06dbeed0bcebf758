"""What arguments of several functions are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from relex_stream.locations import Location, Url, local_directory, location
from relex_stream.specs import Progress
from relex_stream.urls import is_hub, parse_hub

AnyPath = str | os.PathLike[str] | Url
"""A path of this machine, or as text a URL: ``"s3://bucket/run.store"``."""


class RunArguments(TypedDict, total=False):
    """How models are made, which changes none of them but by rounding: keyword arguments.

    Attributes
    ----------
    base : path
        The base's directory, when it has moved, or a URL of the Hugging Face Hub.
    memory_limit, workers
        As in `build_store`.
    overwrite : bool
        Replace an output, if nothing was added to it since relex-stream wrote it.
    dry_run : bool
        Only plan.
    scheduler, local_cluster
        As in `build_store`; the machines see store, base and output. The output has the bits it
        would have without.
    devices : str
        What works on blocks: ``"cpu"``, ``"cuda"`` (all GPUs), ``"cuda:0,cuda:2"``, or ``"auto"``,
        the default: what is projected to be faster; `ModelsSummary.plan` says why. On a cluster,
        workers with the resource ``GPU`` use their own. Statistics made on a GPU differ by
        rounding.
    device_memory_limit : int
        Bytes to take of each GPU; default 0.8 of what is free.
    progress : Progress
        Any object with the methods of `specs.Progress`.
    """

    base: AnyPath | None
    memory_limit: int | None
    workers: int | None
    overwrite: bool
    dry_run: bool
    scheduler: str | os.PathLike[str] | None
    local_cluster: int | None
    devices: str
    device_memory_limit: int | None
    progress: Progress | None


def base_directory(base: AnyPath, progress: Progress | None, *, check: bool) -> Location:
    """Return a base's directory; one on the Hub is fetched into the Hub's cache.

    `check` is whether its checksums are compared with those of the Hub then.
    """
    if isinstance(base, Url) or not is_hub(base):
        return location(base)
    from relex_stream.hub import fetch_base

    return fetch_base(parse_hub(base), progress, check=check)


def base_path(base: AnyPath | None, progress: Progress | None = None) -> Location | None:
    """Return the directory of a store's base, if it is named. The store knows its checksums."""
    return None if base is None else base_directory(base, progress, check=False)


def optional_path(path: AnyPath | None) -> Path | None:
    """Return a path of this machine, if there is one."""
    return None if path is None else local_directory(path, "the output")


def several(value: Any) -> Sequence[Any]:
    """Return several values as they are, one as a sequence of it."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
