"""A store that follows a run: steps are appended as they arrive, verified, and their space freed.

One step after the other, oldest first. What must outlive the process is in the store, in the
checkpoints' directories, and in the ledger beside the store; so a watch that was killed at any
moment goes on from there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from relex_stream.arrivals import Arrival, Arrivals, Moment
from relex_stream.base_weights import check_base_layout
from relex_stream.build import build
from relex_stream.comparing import compare_step
from relex_stream.errors import (
    OptionError,
    SourceError,
    StoreBusyError,
    TrajectoryError,
)
from relex_stream.freeing import KeptError, Remover, files_to_free, steps_to_free
from relex_stream.hooks import run_hook
from relex_stream.matching import match_checkpoint
from relex_stream.sources import Naming, open_checkpoint, parse_steps
from relex_stream.specs import Progress
from relex_stream.store import Store, StoreWriter
from relex_stream.store.read import HEAD_NAME
from relex_stream.store.records import RecordName
from relex_stream.summaries import WatchEvent, WatchSummary
from relex_stream.watch_ledger import Ledger, Verified
from relex_stream.watch_options import BUILD_DEFAULTS, BuildOptions, WatchOptions
from relex_stream.watch_telling import Done, Teller

MOST_AT_ONCE = 16
"""Steps that one append takes: together they read the base once, but none is verified, and so no
space is freed, before all of them are stored."""


class Clock(Protocol):
    """What time it is, and waiting; tests bring their own."""

    def now(self) -> Moment:
        """Return this moment."""

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait, or until `stop` is set."""


class SystemClock:
    """The `Clock` of this machine."""

    def now(self) -> Moment:
        """As in `Clock`."""
        return Moment(time.monotonic(), time.time())

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """As in `Clock`."""
        stop.wait(seconds)


class Watch:
    """One watch of a run; `run` does all of it.

    Parameters
    ----------
    base, checkpoints, store : Path
    options : WatchOptions
    build_options : BuildOptions
    tell : callable
        Is given each `WatchEvent`, from the calling thread.
    stop : threading.Event
        Once it is set nothing new is begun. If `KeyboardInterrupt` is raised then, what is under
        way is given up.
    progress : Progress, optional
    clock : Clock
    """

    def __init__(
        self,
        base: Path,
        checkpoints: Path,
        store: Path,
        *,
        options: WatchOptions,
        build_options: BuildOptions,
        tell: Callable[[WatchEvent], None],
        stop: threading.Event,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._base = base
        self._checkpoints = checkpoints
        self._store_path = store
        self._options = options
        self._build_options = build_options
        self._stop = stop
        self._rounds = build_options.get("cast") is not None
        self._progress = progress
        self._clock = clock or SystemClock()
        self._teller = Teller(tell, lambda: self._clock.now().since_1970_s)
        self._selection = parse_steps(options.steps) if options.steps is not None else None
        self._done = Done()
        self._to_verify: set[int] = set()
        self._kept: set[int] = set()
        self._given_up: dict[int, Arrival] = {}
        self._alone_up_to = 0
        self._settling = False
        self._active_s = 0.0
        self._steps_seen: set[int] = set()
        self._commits: tuple[RecordName, ...] = ()

    def run(self) -> WatchSummary:
        """Watch until there is a reason to end; return what was done.

        Raises
        ------
        RelexStreamError
            What would be so for every step: see `relex_stream.api.watch`.
        """
        self._refuse_unsafe_deletion()
        started_s = self._active_s = self._clock.now().elapsed_s
        self._open_base()
        if self._options.dry_run:
            self._say_what_would_be_done()
            ended = "dry-run"
        else:
            with Ledger(self._store_path, self._checkpoints) as ledger:
                ended = self._follow(ledger)
        return self._done.summary(
            store=str(self._store_path),
            ended=ended,
            given_up=tuple(sorted(self._given_up)),
            elapsed_s=self._clock.now().elapsed_s - started_s,
        )

    def _follow(self, ledger: Ledger) -> str:
        try:
            self._take_up(ledger)
            while True:
                worked = self._turn(ledger)
                ended = self._reason_to_end(worked=worked)
                if ended is not None:
                    return ended
                if not worked:
                    self._clock.wait(self._options.poll_s, self._stop)
        except KeyboardInterrupt:
            if not self._stop.is_set():
                raise
            return "stopped"

    # --- what is there to begin with ------------------------------------------------------------

    def _refuse_unsafe_deletion(self) -> None:
        if not self._options.delete_ingested or self._options.base_kept_elsewhere:
            return
        store = self._opened_store()
        included = (
            store.manifest.base_included
            if store is not None
            else self._build_options.get("include_base", False)
        )
        if not included:
            raise OptionError(
                "--delete-ingested: without the base's weights no step can be had from the store, "
                "and they are not in it; keep BASE in a place of its own and say "
                "--base-kept-elsewhere, or begin a store with --include-base"
            )

    def _open_base(self) -> None:
        base = open_checkpoint(self._base, 0)
        store = self._opened_store()
        if store is not None:
            check_base_layout(store, base)
        self._remover = Remover(self._checkpoints, base.weights_paths)
        build = self._build_options
        self._arrivals = Arrivals(
            self._checkpoints,
            pattern=build.get("pattern"),
            selection=self._selection,
            source=build.get("source", "auto"),
            naming=Naming(
                frozenset(base.tensors),
                build.get("strip_prefix"),
                tuple(build.get("map_names", ())),
            ),
            settle_s=self._options.settle_s,
        )
        if self._options.delete_ingested and self._rounds:
            self._teller.warn(
                "--as with --delete-ingested: F32 weights are rounded before they are stored, and "
                "what is deleted cannot be had back as it was"
            )

    def _opened_store(self) -> Store | None:
        there = (self._store_path / HEAD_NAME).exists()
        return Store(self._store_path) if there else None

    def _take_up(self, ledger: Ledger) -> None:
        """Find what an earlier watch or build left to verify or to delete."""
        store = self._opened_store()
        records = _records(store)
        for step, verified in ledger.steps.items():
            was_rounded = verified.rounded and not self._rounds and not verified.deleting
            if records.get(step) != verified.record or was_rounded:
                ledger.strike(step)
        known = ledger.steps
        self._to_verify = {
            step for step in self._arrivals.steps() if step in records and step not in known
        }

    # --- one turn -------------------------------------------------------------------------------

    def _turn(self, ledger: Ledger) -> bool:
        """Do what there is to do, up to one append or one verification; say whether there was."""
        if self._stop.is_set():
            return False
        store = self._opened_store()
        if store is not None and store.head.commits != self._commits:
            self._commits = store.head.commits
            self._arrivals.pardon()
        present = self._arrivals.steps()
        if present.keys() - self._steps_seen:
            self._steps_seen |= present.keys()
            self._active_s = self._clock.now().elapsed_s
        ready = self._ready(present, store.steps if store is not None else ())
        worked = False
        if ready:
            most = 1 if ready[0] <= self._alone_up_to else MOST_AT_ONCE
            worked = self._append(ready[:most], ledger)
        elif self._to_verify and store is not None:
            worked = self._verify_oldest(store, ledger)
        self._free(ledger)
        if worked:
            self._active_s = self._clock.now().elapsed_s
        return worked

    def _ready(self, present: dict[int, Path], stored: Sequence[int]) -> list[int]:
        """Return the steps to append next, all whole: none that may still come is passed over."""
        last = stored[-1] if stored else 0
        known = set(stored)
        now = self._clock.now()
        ready: list[int] = []
        held_up = self._settling = False
        for step, directory in present.items():
            if step in known:
                continue
            if step < last and step in self._given_up:
                continue
            if step < last:
                self._teller.say(
                    step,
                    "left-out",
                    f"{directory} came when the store held a later step; to take it in, drop the "
                    "steps after it and build again",
                )
                continue
            if held_up:
                self._arrivals.glance(step, directory, now)
                continue
            arrival = self._arrivals.look(step, directory, now)
            if arrival.is_whole:
                self._given_up.pop(step, None)
                ready.append(step)
                continue
            self._settling = arrival.is_settling
            held_up = not self._may_be_passed_over(step, arrival)
        return ready

    def _may_be_passed_over(self, step: int, arrival: Arrival) -> bool:
        """Say of a step that is not whole what it lacks; return whether it was given up."""
        if arrival.is_settling:
            self._given_up.pop(step, None)
            self._active_s = max(self._active_s, self._clock.now().elapsed_s - arrival.idle_s)
            return False
        give_up_s = self._options.give_up_s
        if give_up_s is not None and arrival.idle_s >= give_up_s:
            if step not in self._given_up:
                self._given_up[step] = arrival
                self._teller.say(step, "given-up", arrival.lacks)
            return True
        self._teller.say(step, "waiting", arrival.lacks)
        return False

    def _append(self, steps: Sequence[int], ledger: Ledger) -> bool:
        """Append steps and verify them; say whether to go on at once."""
        before = self._opened_store()
        again = self._last_again(before)
        settings: dict[str, Any] = {**BUILD_DEFAULTS, **self._build_options}
        began_s = self._clock.now().elapsed_s
        go_on = False
        try:
            with self._teller.warnings_said_once():
                build(
                    self._base,
                    self._checkpoints,
                    self._store_path,
                    steps=",".join(map(str, (*again, *steps))),
                    progress=self._progress,
                    **settings,
                )
        except StoreBusyError as error:
            self._teller.say(steps[0], "waiting", str(error))
        except (SourceError, TrajectoryError) as error:
            if len(steps) > 1:
                # One of them is to blame: taken one by one, the others are not.
                self._alone_up_to, go_on = steps[-1], True
            else:
                if isinstance(error, TrajectoryError):
                    # Reading it again would find the same.
                    self._arrivals.refuse(steps[0], str(error))
                self._teller.say(steps[0], "waiting", str(error))
        after = self._opened_store()
        known = set(before.steps) if before is not None else set()
        added = [step for step in after.steps if step not in known] if after is not None else []
        each_s = (self._clock.now().elapsed_s - began_s) / max(1, len(added))
        for step in added:
            assert after is not None
            self._stored(after, step, ledger, each_s)
            self._free(ledger)
        return go_on or bool(added)

    def _last_again(self, store: Store | None) -> tuple[int, ...]:
        """Return the last stored step if it is there: a build sees whether the run forked."""
        if store is None or not store.steps:
            return ()
        try:
            self._arrivals.open(store.steps[-1])
        except SourceError:
            return ()
        return store.steps[-1:]

    def _stored(self, store: Store, step: int, ledger: Ledger, append_s: float) -> None:
        """Verify a step that was appended just now, and tell of it."""
        self._to_verify.add(step)
        event = self._teller.event(step, "stored", **_sizes(store, step))
        self._done.add(event)
        if self._stop.is_set():
            # The next watch verifies it.
            self._teller.tell(replace(event, elapsed_s=append_s, message="not verified yet"))
        else:
            self._teller.tell(self._verified(store, event, ledger, append_s))
        if self._options.on_commit:
            source = self._checkpoints / store.commit(store.row_of(step)).source
            run_hook(
                self._options.on_commit,
                {
                    "RELEX_STREAM_STORE": str(self._store_path),
                    "RELEX_STREAM_STEP": str(step),
                    "RELEX_STREAM_SOURCE": str(source),
                    "RELEX_STREAM_VERIFIED": str(int(step in self._done.verified)),
                },
                what=f"step {step}: --on-commit",
            )

    # --- verifying ------------------------------------------------------------------------------

    def _verify_oldest(self, store: Store, ledger: Ledger) -> bool:
        step = min(self._to_verify)
        event = self._verified(store, self._teller.event(step, "verified"), ledger, 0.0)
        if event.verified or event.problems:
            self._teller.tell(event)
        return step not in self._to_verify

    def _verified(
        self, store: Store, event: WatchEvent, ledger: Ledger, before_s: float
    ) -> WatchEvent:
        """Compare a step with its source; return the event with what was found."""
        step, began_s = event.step, self._clock.now().elapsed_s
        try:
            source = self._arrivals.open(step)
        except SourceError as error:
            # Gone, or its weights are: what the trainer deletes by itself nobody can compare.
            self._to_verify.discard(step)
            return replace(event, elapsed_s=before_s, message=f"not verified: {error}")
        try:
            comparison = compare_step(
                store,
                source,
                base=None if store.manifest.base_included else self._base,
                cast=self._rounds,
                memory_limit=self._build_options.get("memory_limit"),
                workers=self._build_options.get("workers"),
                progress=self._progress,
            )
        except SourceError as error:
            self._teller.say(step, "waiting", f"not verified: {error}")
            return replace(event, elapsed_s=before_s, message=f"not verified: {error}")
        self._to_verify.discard(step)
        if comparison.problems:
            self._done.differing.append(step)
        else:
            self._done.verified.append(step)
            files = files_to_free(source, self._checkpoints)
            record = _records(store)[step]
            ledger.note(step, Verified(record, files, rounded=self._rounds))
            if self._options.delete_ingested and len(files) < len(source.weights_files):
                self._teller.warn(
                    "weights files that also hold what is not stored, like the state of an "
                    f"optimizer, stay: {os.path.basename(source.weights_paths[0])} and the like"
                )
        return replace(
            event,
            elapsed_s=before_s + self._clock.now().elapsed_s - began_s,
            verified=not comparison.problems,
            problems=comparison.problems,
        )

    # --- deleting -------------------------------------------------------------------------------

    def _free(self, ledger: Ledger) -> None:
        """Delete the weights of verified steps that need not stay."""
        if not self._options.delete_ingested or not self._due(self._opened_store(), ledger):
            return
        try:
            # Nobody takes a step out of the store while its source goes.
            with StoreWriter(self._store_path) as writer:
                for step in self._due(writer.store, ledger):
                    self._free_step(step, ledger.steps[step], ledger)
        except StoreBusyError:
            return  # the next turn

    def _due(self, store: Store | None, ledger: Ledger) -> list[int]:
        """Return the steps whose weights may go, as far as they are in the store."""
        records = _records(store)
        noted = ledger.steps
        verified = [step for step in noted if records.get(step) == noted[step].record]
        due = steps_to_free(
            verified,
            list(records),
            keep_every=self._options.keep_every,
            keep_last=self._options.keep_last,
        )
        # What is half gone is of no use to anybody.
        return [
            step
            for step in verified
            if noted[step].files
            and step not in self._kept
            and (step in due or noted[step].deleting)
        ]

    def _free_step(self, step: int, verified: Verified, ledger: Ledger) -> None:
        try:
            nbytes = sum(self._remover.check(file) for file in verified.files)
            ledger.note(step, replace(verified, deleting=True))
            self._teller.tell(
                self._teller.event(
                    step,
                    "deleting",
                    files=tuple(file.path for file in verified.files),
                    bytes_deleted=nbytes,
                )
            )
            freed = sum(self._remover.remove(file) for file in verified.files)
        except KeptError as error:
            self._kept.add(step)
            self._teller.warn(f"step {step} stays where it is: {error}")
            return
        ledger.strike(step)
        self._done.deleted.append(step)
        self._done.bytes_deleted += freed

    # --- ending ---------------------------------------------------------------------------------

    def _reason_to_end(self, *, worked: bool) -> str | None:
        options = self._options
        if self._stop.is_set():
            return "stopped"
        if worked:
            return None
        store = self._opened_store()
        last = max((*(store.steps[-1:] if store is not None else ()), *self._given_up), default=0)
        if options.until is not None and last >= options.until:
            return "until"
        if options.once and not self._settling:
            return "once"
        idle_s = self._clock.now().elapsed_s - self._active_s
        if options.idle_exit_s is not None and idle_s >= options.idle_exit_s:
            return "idle"
        return None

    # --- a dry run ------------------------------------------------------------------------------

    def _say_what_would_be_done(self) -> None:
        store = self._opened_store()
        stored = store.steps if store is not None else ()
        present = self._arrivals.steps()
        ready = self._ready(present, stored)
        if self._settling:
            step = next(step for step in present if step > max((*stored, *ready, 0)))
            self._teller.say(step, "waiting", f"{present[step]} changed a moment ago")
        for step in ready:
            self._teller.tell(self._teller.event(step, "would-store"))
        if not self._options.delete_ingested:
            return
        there = []
        files = {}
        for step in present:
            if step in stored or step in ready:
                try:
                    source = self._arrivals.open(step)
                    if store is not None:
                        match_checkpoint(
                            source, store.manifest.tensors, source.directory, cast=self._rounds
                        )
                except SourceError:  # deleted before
                    continue
                except TrajectoryError as error:
                    self._teller.warn(f"step {step} would stay where it is: {error}")
                    continue
                files[step] = files_to_free(source, self._checkpoints)
                there.append(step)
        for step in steps_to_free(
            there,
            sorted({*stored, *ready}),
            keep_every=self._options.keep_every,
            keep_last=self._options.keep_last,
        ):
            try:
                nbytes = sum(self._remover.check(file) for file in files[step])
            except KeptError as error:
                self._teller.warn(f"step {step} would stay where it is: {error}")
                continue
            names = tuple(file.path for file in files[step])
            self._teller.tell(
                self._teller.event(step, "would-delete", files=names, bytes_deleted=nbytes)
            )


def _records(store: Store | None) -> dict[int, str]:
    """Return the name of each step's record, which has its checksum in it; ascending."""
    if store is None:
        return {}
    return {step: name.path for step, name in zip(store.steps, store.head.commits, strict=True)}


def _sizes(store: Store, step: int) -> dict[str, Any]:
    row = store.row_of(step)
    commit = store.commit(row)
    record_bytes = store.record_bytes(row)
    stored = int(commit.frame_bytes.sum(dtype=np.int64)) + record_bytes
    return {
        "bytes_in": commit.source_bytes,
        "bytes_stored": stored,
        "ratio": commit.source_bytes / stored,
    }
