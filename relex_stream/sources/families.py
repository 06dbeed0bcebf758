"""How trainers name the directories of their checkpoints, and how they say that one is complete."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from ..listing import is_file, list_names, read_file
from ..locations import Location

TRACKER = "latest_checkpointed_iteration.txt"
"""What verl and Megatron write beside the steps, last of all: the number of the last one."""


@dataclass(frozen=True)
class Family:
    """One trainer's names of checkpoint directories.

    Attributes
    ----------
    pattern : str
        The name, with ``{step}``.
    marks : tuple of str
        Names of files one of which the trainer writes into a step's directory last; ``*`` stands
        for any text. None if there is no such file.
    marked_in : tuple of str
        Names of directories in which every complete step has a mark. Elsewhere it is asked for
        only where another step has it: others use these names too.
    tracker : str
        A file beside the steps that holds the number of the last complete one, "" if there is none.
    """

    pattern: str
    marks: tuple[str, ...] = ()
    marked_in: tuple[str, ...] = ()
    tracker: str = ""

    @property
    def shown(self) -> str:
        """The name with ``N`` for the step."""
        return self.pattern.replace("{step}", "N")

    def unfinished(self, root: Location, steps: Mapping[int, Location]) -> dict[int, str]:
        """Return the steps that the trainer has not finished, each with what shows it.

        Without a sign for a step that is still being written, it is taken for complete here; files
        that are missing or cut off show when it is opened.

        Parameters
        ----------
        root : Location
            The directory that holds the steps.
        steps : mapping of int to Path or Url
            All steps there, each with its directory.
        """
        found: dict[int, str] = {}
        marks = {step: self._mark_in(path) for step, path in steps.items()} if self.marks else {}
        set_marks = [mark for mark in marks.values() if mark]
        if set_marks or root.name in self.marked_in:
            missing = set_marks[0] if set_marks else self.marks[0]
            found |= {step: f"no {missing}" for step, mark in marks.items() if not mark}
        last = _tracked(root / self.tracker) if self.tracker else None
        if last is not None:
            reason = f"{self.tracker} says {last}"
            found |= {step: reason for step in steps if step > last}
        return found

    def _mark_in(self, directory: Location) -> str:
        """Return the mark that a step's directory has, "" if none."""
        names: list[str] = []
        for mark in self.marks:
            if "*" not in mark:
                if is_file(directory / mark):
                    return mark
                continue
            names = names or list_names(directory)
            if fnmatch.filter(names, mark):
                return mark
        return ""


FAMILIES = (
    Family("global_step_{step}", tracker=TRACKER),  # verl
    Family("global_step{step}_hf"),  # OpenRLHF
    # Hugging Face Trainer, TRL; grail
    Family("checkpoint-{step}", marks=("trainer_state.json", "READY-*")),
    # prime-rl; NeMo-RL, which renames tmp_step_N and so needs no mark
    Family("step_{step}", marks=("STABLE",), marked_in=("weights", "broadcasts")),
    Family("step-{step}"),  # torchtitan
    Family("iter_{step}", tracker=TRACKER),  # Megatron, slime
    # Weight syncs of slime and miles
    Family("weight_v{step}", marks=("model.safetensors.index.json", "model.safetensors")),
    Family("global_step{step}"),  # DeepSpeed
)
"""Directory names that are known without a pattern."""

RUN_DIRECTORIES = (".", "weights", "checkpoints", "checkpoint", "broadcasts")
"""Where the steps may lie inside the directory of a run, first match first."""


def _tracked(path: Location) -> int | None:
    """Return the number in a tracker file, None where there is none ("release", say)."""
    try:
        text = read_file(path)[:64].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None
