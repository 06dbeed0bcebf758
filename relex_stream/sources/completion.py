"""Marks by which trainers say that a checkpoint is whole: what they write last.

Where no mark is known a checkpoint may still be incomplete: the files themselves say more when they
are opened, and that nothing changes any more is for those who wait to see.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_VERL_STEP = re.compile(r"global_step_([0-9]+)")
_VERL_LATEST = "latest_checkpointed_iteration.txt"

_PRIME_RL_DIRECTORIES = {"weights", "broadcasts"}
_PRIME_RL_MARK = "STABLE"

_TRAINER_STEP = re.compile(r"checkpoint-[0-9]+")
_TRAINER_MARK = "trainer_state.json"
_TRAINER_STATE = ("optimizer", "scheduler.pt", "rng_state", "pytorch_model_fsdp", "scaler.pt")

_DCP_MARK = ".metadata"
_DCP_DEPTH = 3  # policy/weights/model

_LONGEST_NUMBER = 100


def missing_mark(directory: Path) -> str | None:
    """Return what a step's directory lacks that its trainer writes last, as a noun.

    Parameters
    ----------
    directory : Path
        That of a step, as `list_steps` finds it.

    Returns
    -------
    str or None
        None where nothing is known to be missing.

    Notes
    -----
    - verl writes the number of a step into ``latest_checkpointed_iteration.txt`` beside the steps'
      directories once all of that step is written. (Not there at all: nobody knows.)
    - prime-rl touches ``STABLE`` in directories of ``weights/`` and ``broadcasts/``.
    - Hugging Face's Trainer, TRL too, writes ``trainer_state.json`` after weights, optimizer and
      random states. Where another checkpoint has it, or any of those states is there, it is due.
    - torch renames ``.metadata`` of a distributed checkpoint into its place last.
    """
    marks = (_verl_mark, _prime_rl_mark, _trainer_mark, _dcp_mark)
    return next((found for mark in marks if (found := mark(directory)) is not None), None)


def _verl_mark(directory: Path) -> str | None:
    match = _VERL_STEP.fullmatch(directory.name)
    if match is None:
        return None
    try:
        with (directory.parent / _VERL_LATEST).open("rb") as file:
            text = file.read(_LONGEST_NUMBER).decode("ascii", "replace").strip()
    except OSError:
        return None
    # It is cut to nothing before it is written anew.
    if text.isdecimal() and int(text) >= int(match[1]):
        return None
    return f"its number in {_VERL_LATEST}"


def _prime_rl_mark(directory: Path) -> str | None:
    if directory.parent.name not in _PRIME_RL_DIRECTORIES or (directory / _PRIME_RL_MARK).exists():
        return None
    return f"the mark {_PRIME_RL_MARK}"


def _trainer_mark(directory: Path) -> str | None:
    if _TRAINER_STEP.fullmatch(directory.name) is None or (directory / _TRAINER_MARK).exists():
        return None
    due = any(name.startswith(_TRAINER_STATE) for name in _names(directory)) or any(
        _TRAINER_STEP.fullmatch(name) and (directory.parent / name / _TRAINER_MARK).exists()
        for name in _names(directory.parent)
    )
    return _TRAINER_MARK if due else None


def _dcp_mark(directory: Path) -> str | None:
    for place in _directories(directory, _DCP_DEPTH):
        names = _names(place)
        if _DCP_MARK not in names and any(name.endswith(".distcp") for name in names):
            return (place / _DCP_MARK).relative_to(directory).as_posix()
    return None


def _directories(directory: Path, depth: int) -> Iterator[Path]:
    """Yield a directory and those inside it."""
    yield directory
    if depth:
        for name in _names(directory):
            inner = directory / name
            if inner.is_dir() and not inner.is_symlink():
                yield from _directories(inner, depth - 1)


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:  # gone since, which whoever opens it will say
        return []
