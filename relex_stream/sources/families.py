"""How trainers name the directories of their checkpoints, and how they say that one is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..listing import is_file, read_file
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
    mark : str
        A file that the trainer writes into a step's directory last, "" if there is none.
    marked_in : tuple of str
        Names of directories in which every complete step has the mark. Elsewhere it is asked for
        only where another step has it: others use these names too.
    tracker : str
        A file beside the steps that holds the number of the last complete one, "" if there is none.
    """

    pattern: str
    mark: str = ""
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
        if self.mark:
            unmarked = [step for step, path in steps.items() if not is_file(path / self.mark)]
            if len(unmarked) < len(steps) or root.name in self.marked_in:
                found |= dict.fromkeys(unmarked, f"no {self.mark}")
        last = _tracked(root / self.tracker) if self.tracker else None
        if last is not None:
            reason = f"{self.tracker} says {last}"
            found |= {step: reason for step in steps if step > last}
        return found


FAMILIES = (
    Family("global_step_{step}", tracker=TRACKER),  # verl
    Family("global_step{step}_hf"),  # OpenRLHF
    Family("checkpoint-{step}", mark="trainer_state.json"),  # Hugging Face Trainer, TRL
    # prime-rl; NeMo-RL, which renames tmp_step_N and so needs no mark
    Family("step_{step}", mark="STABLE", marked_in=("weights", "broadcasts")),
    Family("step-{step}"),  # torchtitan
    Family("iter_{step}", tracker=TRACKER),  # Megatron, slime
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
