"""Running a command of the user's after something happened; it must not disturb what goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import warnings
from collections.abc import Mapping, Sequence

from relex_stream.errors import RelexStreamWarning

TIMEOUT_S = 600.0
"""Seconds that a command may take."""


def run_hook(
    command: Sequence[str],
    variables: Mapping[str, str],
    timeout_s: float = TIMEOUT_S,
    *,
    what: str,
) -> None:
    """Run a command and wait for it; what goes wrong is a warning.

    Parameters
    ----------
    command : sequence of str
        Program and arguments; no shell takes them apart.
    variables : mapping
        Added to its environment.
    timeout_s : float
        When it has run so long, it is killed with all that it started.
    what : str
        What it was run for and by which option: warnings begin with that.

    Warns
    -----
    RelexStreamWarning
        If it cannot be started, fails, or takes too long.
    """
    problem = _run(command, {**os.environ, **variables}, timeout_s)
    if problem is not None:
        warnings.warn(f"{what}: {command[0]} {problem}", RelexStreamWarning, stacklevel=2)


def _run(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> str | None:
    try:
        # Its own session: Ctrl-C in a terminal is meant for us.
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # the standard output has our results
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot be started: {error.strerror}"
    try:
        status = process.wait(timeout_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"was killed: it took longer than {timeout_s:g} s"
        raise
    return f"failed with exit status {status}" if status else None
