"""A callback for Hugging Face's Trainer, and so for TRL: each checkpoint is put into a store.

The work is done by ``relex-stream watch`` in a process of its own, at low priority. Training waits
for nothing but, at its end, for the last checkpoint; and what goes wrong there is a warning here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from relex_stream.errors import MissingDependencyError, RelexStreamWarning, StoreError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "the callback is for Hugging Face's Trainer; install transformers to use it"
    ) from error

FINISH_S = 1800.0
"""Seconds that training waits at its end for what is still to be stored."""

_NICENESS = 10
_TOLD_BYTES = 2000


class RelexStreamCallback(TrainerCallback):
    """Appends each checkpoint to a store once it is saved.

    Works on the first process of a run alone; others do nothing.

    Parameters
    ----------
    base : path
        The model that training starts from, as a directory.
    store : path
        The store; made if it is not there.
    options : sequence of str
        More options of ``relex-stream watch``, such as
        ``["--delete-ingested", "--include-base"]``. By default the work is done by one thread.
    finish_s : float
        Seconds that the end of training waits for the last checkpoints; then they are left to a
        later ``relex-stream watch``.

    Warns
    -----
    RelexStreamWarning
        If a checkpoint could not be stored; training goes on.

    Examples
    --------
    >>> callback = RelexStreamCallback("models/base", "run.store")
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        store: str | os.PathLike[str],
        *,
        options: Sequence[str] = (),
        finish_s: float = FINISH_S,
    ) -> None:
        # A trainer may change its working directory.
        self._base = os.path.abspath(base)
        self._store = os.path.abspath(store)
        self._options = list(options)
        self._finish_s = finish_s
        self._worker: _Worker | None = None
        self._saved: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have what was saved stored, without waiting."""
        if not state.is_world_process_zero:
            return
        if self._worker is None:
            command = [sys.executable, "-m", "relex_stream", "watch", self._base]
            command += [os.path.abspath(args.output_dir), self._store]
            # The trainer calls this when all of it is written. Options that come later count.
            command += ["--once", "--settle", "0", "--workers", "1", *self._options]
            self._worker = _Worker(command)
        self._saved.append(state.global_step)
        self._worker.look_again()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for what is still to be stored."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.finish(self._finish_s)
            self._warn_of_missing()

    def _warn_of_missing(self) -> None:
        """Warn of steps that were saved and are not stored: deleted too soon, by a limit of saves.

        Nobody else would say so: a checkpoint that is gone is one that was never there.
        """
        from relex_stream.store.read import read_head

        try:
            stored = read_head(Path(self._store)).steps
        except StoreError:
            stored = ()
        missing = [str(step) for step in self._saved if step not in stored]
        if missing:
            warnings.warn(
                f"of the steps that were saved, {self._store} lacks {', '.join(missing)}",
                RelexStreamWarning,
                stacklevel=2,
            )


class _Worker:
    """Runs a command whenever it is asked to, in a process, one at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._changed = threading.Condition()
        self._asked = self._ended = False
        self._problems: list[str] = []
        # It waits for processes and nothing else.
        self._thread = threading.Thread(target=self._run, name="relex-stream", daemon=True)
        self._thread.start()

    def look_again(self) -> None:
        """Have the command run, again if it runs now; warn of what went wrong before."""
        with self._changed:
            self._asked = True
            self._changed.notify()
        self._warn()

    def finish(self, timeout_s: float) -> None:
        """Wait for what was asked for; warn of what went wrong."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._tell(f"not all checkpoints were stored within {timeout_s:g} s of the end")
        self._warn()

    def _warn(self) -> None:
        # From the trainer's thread, whose user it is for.
        with self._changed:
            problems, self._problems = self._problems, []
        for problem in problems:
            warnings.warn(
                f"{problem}; to store what is missing, run: {' '.join(self._command)}",
                RelexStreamWarning,
                stacklevel=4,
            )

    def _tell(self, problem: str) -> None:
        with self._changed:
            self._problems.append(problem)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._ended)
                if not self._asked:
                    return
                self._asked = False
            try:
                self._run_once()
            except Exception as error:  # noqa: BLE001 - training must go on
                self._tell(f"checkpoints are not being stored: {error}")

    def _run_once(self) -> None:
        with tempfile.TemporaryFile() as told:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                # No GPU is wanted, and none of the trainer's signals are meant for it.
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            status = process.wait()
            if status:
                self._tell(f"relex-stream ended with exit status {status}: {_end_of(told)}")


def _end_of(told: IO[bytes]) -> str:
    size = told.seek(0, os.SEEK_END)
    told.seek(max(0, size - _TOLD_BYTES))
    return " ".join(told.read().decode(errors="replace").split())
