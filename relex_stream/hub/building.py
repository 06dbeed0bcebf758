"""build-store over checkpoints of the Hub: plan, base, then one step after the other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from relex_stream.additions import split_found
from relex_stream.errors import OptionError
from relex_stream.feeds import build_from_feed
from relex_stream.locations import Location, Url, location
from relex_stream.paths import refuse_inside
from relex_stream.sources import open_checkpoint, parse_steps
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import StoreWriter
from relex_stream.summaries import BuildSummary
from relex_stream.urls import is_hub, parse_hub
from relex_stream.wording import format_count

from .base import fetch_base
from .client import HubClient
from .feed import HubFeed
from .steps import find_steps


def build_from_hub(
    base: str | os.PathLike[str] | Url,
    checkpoints: str | os.PathLike[str] | Url,
    store: Location,
    *,
    pattern: str | None,
    steps: str | None,
    download_dir: Path | None,
    source: str,
    replace_from: int | None,
    include_base: bool,
    progress: Progress | None,
    **options: Any,
) -> BuildSummary:
    """Build a store from checkpoints of the Hub; `relex_stream.api.build_store` has the arguments.

    Parameters
    ----------
    base : str or path
        A directory, or a URL of the Hub.
    checkpoints : str
        A URL of the Hub.
    options
        As `build` takes them.
    """
    if source not in ("auto", "safetensors"):
        raise OptionError(
            f"--source {source}: of the Hub's files only safetensors are read; fetch the others "
            "yourself and give their directory"
        )
    if replace_from is not None:
        raise OptionError(
            f"--replace-from {replace_from} is for directories; take the steps back with "
            f"relex-stream drop --after {replace_from - 1}, then build again"
        )
    url = parse_hub(checkpoints)
    if download_dir is None:
        if isinstance(store, Url):
            raise OptionError(
                f"--download-dir: say where on this machine checkpoints are on their way to {store}"
            )
        download_dir = store.parent / f"{store.name}.download"
    refuse_inside(download_dir, store, "--download-dir", "STORE")
    selection = parse_steps(steps) if steps is not None else None
    client = HubClient()
    found = find_steps(client, url, pattern, selection)
    with StoreWriter(
        store
    ) as writer:  # refuses what cannot be written to before anything is fetched
        stored = writer.store.steps if writer.store else None
    todo, skipped = split_found([(step.step, step) for step in found.steps], stored or ())
    feed = HubFeed(client, url, [step for _, step in todo], download_dir)
    directory = Path() if is_hub(base) else location(base)
    if todo:
        told = progress or NoProgress()
        told.note(
            f"{url}: {format_count(len(todo), 'checkpoint')} to fetch, through {download_dir}"
        )
        if is_hub(base):
            directory = fetch_base(parse_hub(base), progress, check=stored is None)
            if stored is None and not include_base:
                told.note(
                    f"the base stays in the Hugging Face cache, {directory}; with --include-base "
                    "the store would not need it"
                )
        open_checkpoint(directory, 0)  # so is a base that cannot be read
    return build_from_feed(
        feed,
        directory,
        store,
        layout=found.layout.replace("{step}", "N"),
        skipped=skipped,
        include_base=include_base,
        source="safetensors",
        progress=progress,
        **options,
    )
