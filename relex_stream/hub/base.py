"""A base on the Hub, in the Hub's own cache: it must stay, and other programs find it there too."""

from __future__ import annotations

import glob
import posixpath
from pathlib import Path
from typing import Any

from relex_stream.errors import HubError
from relex_stream.sources.checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from relex_stream.specs import NoProgress, Progress
from relex_stream.urls import HubUrl

from .client import HubClient
from .download import matches
from .steps import MAIN, HubStep, find_weights, needed_files


def fetch_base(url: HubUrl, progress: Progress | None = None, *, check: bool = True) -> Path:
    """Return the directory of a base of the Hub, fetched unless the Hub's cache has it.

    In offline mode the cache is all that is looked at.

    Parameters
    ----------
    url : HubUrl
        Without a revision, the branch ``main``.
    progress : Progress, optional
    check : bool
        Whether the files are compared with the checksums of the Hub. A store that is there knows
        its base's.

    Raises
    ------
    SourceError
        If it has no safetensors weights.
    HubError
        If the Hub does not give it, or gives other bytes than it says.
    MissingDependencyError
        If huggingface_hub is not installed.
    """
    client = HubClient()
    progress = progress or NoProgress()
    revision = url.revision or MAIN
    if client.offline:
        return _cached(url, revision)
    import huggingface_hub

    name = url.repository
    commit = client.commit_of(name, revision)
    step = HubStep(0, revision, commit, url.directory)
    place = find_weights(url, [step], lambda _: client.files(name, commit))[0]
    bars: dict[str, Any] = {"tqdm_class": _no_bars()} if isinstance(progress, NoProgress) else {}
    with client.explaining(str(url)):
        shards = None
        if index := place.files.get(INDEX_FILE):
            path = huggingface_hub.hf_hub_download(name, index.path, revision=commit, **bars)
            shards = read_index(Path(path)).values()
        files, _ = needed_files(place, shards)
        progress.note(f"{url}: fetching what is not in the Hugging Face cache yet; it stays there")
        # By its name: the cache then knows it in offline mode too.
        snapshot = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[glob.escape(file.path) for file in files],
            **bars,
        )
    if Path(snapshot).name != commit:
        raise HubError(f"{url} changed while it was fetched; run the command again")
    if check:
        for file in files:
            if not matches(Path(snapshot, file.path), file):
                raise HubError(
                    f"{Path(snapshot, file.path)} has another checksum than the Hub says; remove "
                    "it, with the file that it links to, and run the command again"
                )
    return Path(snapshot, place.directory)


def _cached(url: HubUrl, revision: str) -> Path:
    import huggingface_hub

    for name in (INDEX_FILE, SINGLE_FILE):
        found = huggingface_hub.try_to_load_from_cache(
            url.repository, posixpath.join(url.directory, name), revision=revision
        )
        if isinstance(found, str):
            return Path(found).parent
    raise HubError(
        f"{url}: not in the Hugging Face cache, and offline mode is on; unset HF_HUB_OFFLINE"
    )


def _no_bars() -> type[Any]:
    from huggingface_hub.utils import tqdm

    class NoBars(tqdm):
        """The bars of huggingface_hub, none of which is shown."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **(keywords | {"disable": True}))

    return NoBars
