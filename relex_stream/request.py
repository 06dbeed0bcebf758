"""What is asked of an extrapolation, checked against the store before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relex_stream.errors import FitError, OptionError
from relex_stream.fit import FITS, hat_vector
from relex_stream.store import Store
from relex_stream.store.read import describe_steps
from relex_stream.subspaces import SVD_ROUTES, SubspaceOptions


@dataclass(frozen=True)
class Request:
    """What was asked for, checked."""

    targets: tuple[int, ...]
    history: tuple[int, ...]
    rank: int
    svd: str
    power_iterations: int
    fit: str

    @property
    def options(self) -> SubspaceOptions:
        """The part that the statistics need."""
        return SubspaceOptions(len(self.history), self.rank, self.svd, self.power_iterations)

    @property
    def settings(self) -> dict[str, Any]:
        """The part that goes into records, by name."""
        return {
            "history": list(self.history),
            "rank": self.rank,
            "svd": self.svd,
            "power_iterations": self.power_iterations,
            "fit": self.fit,
        }


def check_request(
    store: Store,
    *,
    target_steps: Sequence[int],
    history_steps: int | None,
    rank: int,
    svd: str,
    power_iterations: int,
    fit: str,
) -> Request:
    """Check the options against the store.

    Raises
    ------
    OptionError, FitError
        Naming the option and what it may be.
    """
    targets = tuple(target_steps)
    if not targets:
        raise OptionError("name at least one --target-step")
    if len(set(targets)) != len(targets):
        raise OptionError("a --target-step is given twice")
    if min(targets) < 1:
        raise OptionError(f"--target-step must be at least 1, not {min(targets)}")
    if svd not in SVD_ROUTES:
        raise OptionError(f"--svd must be one of {', '.join(SVD_ROUTES)}, not {svd!r}")
    if fit not in FITS:
        raise OptionError(f"--fit must be one of {', '.join(FITS)}, not {fit!r}")
    if power_iterations < 1:
        raise OptionError(f"--power-iterations must be at least 1, not {power_iterations}")
    limit = history_steps if history_steps is not None else max(store.steps, default=0)
    history = tuple(step for step in store.steps if step <= limit)
    if not history:
        raise FitError(
            f"no checkpoint of {store.path} is at step {limit} or before; "
            f"it holds {describe_steps(store.steps)}"
        )
    if not 1 <= rank <= len(history):
        raise OptionError(
            f"--rank must be from 1 to the number of checkpoints in the history "
            f"({len(history)}), not {rank}"
        )
    hat_vector(history, targets[0], fit)  # refuses a history too short for the fit
    return Request(targets, history, rank, svd, power_iterations, fit)
