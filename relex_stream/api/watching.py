"""Follow a run while it is trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from relex_stream.api.arguments import AnyPath, base_directory
from relex_stream.errors import OptionError
from relex_stream.locations import Location, Url, location
from relex_stream.specs import Progress
from relex_stream.summaries import WatchEvent, WatchSummary
from relex_stream.watch_options import WatchOptions
from relex_stream.watching import Watch


def watch(
    base: AnyPath,
    checkpoints: AnyPath,
    store: AnyPath,
    *,
    pattern: str | None = None,
    steps: str | None = None,
    source: str = "auto",
    strip_prefix: str | None = None,
    map_names: Sequence[tuple[str, str]] = (),
    settle_s: float = 30.0,
    poll_s: float = 10.0,
    give_up_s: float | None = None,
    delete_ingested: bool = False,
    base_kept_elsewhere: bool = False,
    keep_every: int | None = None,
    keep_last: int = 1,
    until: int | None = None,
    once: bool = False,
    idle_exit_s: float | None = None,
    on_commit: Sequence[str] = (),
    dry_run: bool = False,
    memory_limit: int | None = None,
    workers: int | None = None,
    include_base: bool = False,
    allow_nonfinite: bool = False,
    seed: int = 0,
    cast: str | None = None,
    on_event: Callable[[WatchEvent], None] | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> WatchSummary:
    """Append checkpoints to a store as they arrive, verify them, and free their space.

    A checkpoint is taken when its trainer's mark of completion is there, it can be opened, and
    nothing in its directory changed for `settle_s`. Steps are appended in ascending order; one that
    is not whole holds up those after it. Each is then read once more and compared with the store.

    Parameters
    ----------
    base, checkpoints, store : path
        As in `build_store`; `checkpoints` need not exist yet.
    pattern, steps
        As in `build_store`; steps need not exist yet.
    source, strip_prefix, map_names
        As in `build_store`.
    settle_s : float
    poll_s : float
        Seconds between two looks, where there is nothing to do.
    give_up_s : float, optional
        Seconds after its last change when a checkpoint that is not whole, or cannot be taken, is
        passed over. Without it, it is waited for.
    delete_ingested : bool
        Delete the weights files of steps that were verified, nothing else.
    base_kept_elsewhere : bool
        Say that `base` stays where it is. Nothing is deleted without this, unless the store has the
        base's weights.
    keep_every : int, optional
        Leave the files of steps that are a multiple of this.
    keep_last : int
        Leave those of so many last steps of the store.
    until : int, optional
        End once this step, or a later one, is stored and verified.
    once : bool
        End when nothing is left to do and nothing is changing.
    idle_exit_s : float, optional
        End when nothing has happened for so many seconds.
    on_commit : sequence of str
        Program and arguments, run after each step, for at most ten minutes. Its environment has
        ``RELEX_STREAM_STORE``, ``RELEX_STREAM_STEP``, ``RELEX_STREAM_SOURCE`` and
        ``RELEX_STREAM_VERIFIED`` (1 or 0).
    dry_run : bool
        Look once, tell what would be stored and deleted, and change nothing.
    memory_limit, workers, include_base, allow_nonfinite, seed, cast
        As in `build_store`. With `cast`, weights are compared as they were rounded.
    on_event : callable, optional
        Is given each `WatchEvent` as it happens.
    stop : threading.Event, optional
        Once it is set nothing new is begun, and the watch ends. A `KeyboardInterrupt` raised then
        gives up what is under way, which harms nothing.
    progress : Progress, optional

    Returns
    -------
    WatchSummary
        ``ended`` is ``"stopped"``, ``"until"``, ``"once"``, ``"idle"`` or ``"dry-run"``.

    Raises
    ------
    OptionError
        If the arguments do not go together, or several kinds of checkpoints are there.
    SourceError
        If the base cannot be used. What is wrong with a checkpoint is an event, not an error.
    StoreError
        If the store is damaged or not a store; `StoreBusyError`, if another watch is at work.
    MemoryLimitError
        If the work does not fit in the memory limit.

    Warns
    -----
    RelexStreamWarning
        As in `build_store`; if the command fails; if files that were to be deleted stay.
    """
    options = WatchOptions(
        steps=steps,
        settle_s=settle_s,
        poll_s=poll_s,
        give_up_s=give_up_s,
        delete_ingested=delete_ingested,
        base_kept_elsewhere=base_kept_elsewhere,
        keep_every=keep_every,
        keep_last=keep_last,
        until=until,
        once=once,
        idle_exit_s=idle_exit_s,
        on_commit=tuple(on_commit),
        dry_run=dry_run,
    )
    return Watch(
        _here(base_directory(base, progress, check=True)),
        _here(location(checkpoints)),
        _here(location(store)),
        options=options,
        build_options={
            "pattern": pattern,
            "source": source,
            "strip_prefix": strip_prefix,
            "map_names": map_names,
            "cast": cast,
            "include_base": include_base,
            "allow_nonfinite": allow_nonfinite,
            "seed": seed,
            "memory_limit": memory_limit,
            "workers": workers,
        },
        tell=on_event or _say_nothing,
        stop=stop or threading.Event(),
        progress=progress,
    ).run()


def _say_nothing(_: WatchEvent) -> None:
    pass


def _here(place: Location) -> Path:
    if isinstance(place, Url):
        raise OptionError(
            f"{place}: watch works on directories of this machine; append to stores on object "
            "storage with build-store"
        )
    return place
