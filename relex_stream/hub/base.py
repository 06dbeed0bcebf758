"""A base on the Hub, in the Hub's own cache: it must stay, and other programs find it there too."""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from relex_stream.errors import HubError
from relex_stream.sources.checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from relex_stream.specs import NoProgress, Progress
from relex_stream.urls import HubUrl

from .client import HubClient, HubFile, Stopped
from .download import matches
from .steps import MAIN, HubStep, find_weights, needed_files

_POLL_S = 0.1


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
    name = url.repository
    commit = client.commit_of(name, revision)
    step = HubStep(0, revision, commit, url.directory)
    place = find_weights(url, [step], lambda _: client.files(name, commit))[0]
    with client.explaining(f"{name}@{revision}"):
        shards = None
        if index := place.files.get(INDEX_FILE):
            # By its branch and not its commit: the cache then knows the branch in offline mode too.
            _download(name, revision, [index], progress)
            shards = read_index(_in_cache(name, commit, index.path) or Path(index.path)).values()
        files, _ = needed_files(place, shards)
        missing = [file for file in files if _in_cache(name, commit, file.path) is None]
        if missing:
            _download(name, revision, missing, progress)
    paths = [_in_cache(name, commit, file.path) for file in files]
    for file, path in zip(files, paths, strict=True):
        if path is None:
            raise HubError(f"{url} changed while it was fetched; run the command again")
        if check and not matches(path, file):
            raise HubError(
                f"{path} has another checksum than the Hub says; remove it, with the file that it "
                "links to, and run the command again"
            )
    assert paths[0] is not None
    return paths[0].parent


def _in_cache(name: str, revision: str, path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, path, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _download(name: str, revision: str, files: Sequence[HubFile], progress: Progress) -> None:
    """Fetch files into the Hub's cache, in a thread: this one tells how far it is."""
    from huggingface_hub import snapshot_download

    transfer = _Transfer()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            snapshot_download,
            name,
            revision=revision,
            allow_patterns=[glob.escape(file.path) for file in files],
            tqdm_class=transfer.bar_type(),
        )
        progress.start(f"fetch base {name}", sum(file.size for file in files))
        try:
            shown_bytes = 0
            while not wait([future], _POLL_S).done:
                done_bytes = transfer.done_bytes
                progress.advance(done_bytes - shown_bytes)
                shown_bytes = done_bytes
            progress.advance(transfer.done_bytes - shown_bytes)
        finally:
            transfer.stopped = True
        future.result()
        progress.finish()


def _cached(url: HubUrl, revision: str) -> Path:
    for name in (INDEX_FILE, SINGLE_FILE):
        found = _in_cache(url.repository, revision, posixpath.join(url.directory, name))
        if found is not None:
            return found.parent
    raise HubError(
        f"{url}: not in the Hugging Face cache, and offline mode is on; unset HF_HUB_OFFLINE"
    )


class _Transfer:
    """A download of huggingface_hub, followed and ended through what it takes for progress bars.

    Attributes
    ----------
    done_bytes : int
    stopped : bool
        Once it is set, the download ends with `Stopped` when more bytes come.
    """

    def __init__(self) -> None:
        self.done_bytes = 0
        self.stopped = False

    def bar_type(self) -> type[Any]:
        """Return a class of bars that are not shown."""
        from huggingface_hub.utils import tqdm

        transfer = self

        class Bar(tqdm):
            """One of several that count the same bytes: as they come, as they are written."""

            def __init__(self, *args: Any, **keywords: Any) -> None:
                keywords["disable"] = True
                super().__init__(*args, **keywords)  # type: ignore[no-untyped-call]
                self._counts_bytes = keywords.get("unit") == "B"
                self._count = 0

            def update(self, n: float | None = 1) -> None:
                if transfer.stopped:
                    raise Stopped
                if self._counts_bytes:
                    self._count += int(n or 0)
                    transfer.done_bytes = max(transfer.done_bytes, self._count)

        return Bar
