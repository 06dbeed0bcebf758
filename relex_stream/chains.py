"""Checkpoints that hold only what changed must follow the one that they change.

Nothing in the weights shows it if they do not: each would change other bits than it was made from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from relex_stream.errors import OptionError, TrajectoryError
from relex_stream.specs import SourceCheckpoint


def in_order(
    checkpoints: Iterable[SourceCheckpoint],
    last: int,
    there: Collection[int],
    *,
    cast: bool,
    is_local: bool = True,
) -> Iterator[SourceCheckpoint]:
    """Yield checkpoints that may come one after the other, behind step `last`.

    Parameters
    ----------
    checkpoints : iterable of SourceCheckpoint
    last, there
        As in `check_follows`.
    cast : bool
        Whether weights are rounded on the way in.
    is_local : bool
        Whether the work is done in this process.

    Raises
    ------
    TrajectoryError, OptionError
        At the first that may not.
    """
    for checkpoint in checkpoints:
        _refuse_patch(checkpoint, cast=cast, is_local=is_local)
        check_follows(checkpoint, last, there)
        last = checkpoint.step
        yield checkpoint


def _refuse_patch(checkpoint: SourceCheckpoint, *, cast: bool, is_local: bool) -> None:
    """Refuse a checkpoint that holds only what changed where that cannot be worked with."""
    if checkpoint.patch is None:
        return
    if cast:
        raise OptionError(
            f"--as bf16: {checkpoint.directory} holds only what changed, and what it changes is "
            "not rounded; leave --as out"
        )
    if not is_local:
        raise OptionError(
            f"{checkpoint.directory} holds only what changed, which is unpacked for this process "
            "alone; leave out --scheduler and --local-cluster"
        )


def check_follows(checkpoint: SourceCheckpoint, last: int, there: Collection[int]) -> None:
    """Check that a checkpoint may come next in a trajectory.

    Parameters
    ----------
    checkpoint : SourceCheckpoint
        Any; one that is whole may always.
    last : int
        The step that it would follow; 0 for the base.
    there : collection of int
        Steps that lie in its directory.

    Raises
    ------
    TrajectoryError
        If it changes another one.

    Examples
    --------
    >>> from relex_stream.specs import Patch
    >>> changed = SourceCheckpoint(4, "run/step_4", {}, (), (), (), patch=Patch(follows=3))
    >>> check_follows(changed, 3, [3, 4])
    >>> check_follows(changed, 2, [3, 4])
    Traceback (most recent call last):
    ...
    relex_stream.errors.TrajectoryError: step 4: run/step_4 holds only what changed since step 3, \
and the step before it would be 2; give every step, from one that follows the store's last, and \
choose later with --history-steps
    """
    patch = checkpoint.patch
    if patch is None:
        return
    follows = patch.follows
    if follows is None:
        # It does not say so: the one before it in the same directory.
        follows = max((step for step in there if last < step < checkpoint.step), default=last)
    if follows == last:
        return
    raise TrajectoryError(
        f"step {checkpoint.step}: {checkpoint.directory} holds only what changed since "
        f"{_named(follows)}, and the step before it would be {last or 'the base'}; give every "
        "step, from one that follows the store's last, and choose later with --history-steps"
    )


def _named(step: int) -> str:
    return f"step {step}" if step else "the base"
