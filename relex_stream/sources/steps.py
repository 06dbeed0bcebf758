"""Which steps of a run to use, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import OptionError

_STEPS_EXAMPLES = "such as 1:75 (75 included), 1:75:5, 10: or 1,5,10"


@dataclass(frozen=True)
class StepSelection:
    """Which steps to use: single steps, and ranges that take whatever exists.

    Attributes
    ----------
    explicit : tuple of int
        Steps listed one by one, ascending. Each of them must exist.
    ranges : tuple of (int, int or None, int)
        First step, last step (included; None: no end) and stride.

    Examples
    --------
    >>> selection = StepSelection(explicit=(3,), ranges=((10, 20, 5),))
    >>> [step for step in range(30) if selection.selects(step)]
    [3, 10, 15, 20]
    """

    explicit: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int | None, int], ...] = ()

    def selects(self, step: int) -> bool:
        """Return whether a step is one of those meant."""
        return step in self.explicit or any(
            first <= step and (last is None or step <= last) and (step - first) % stride == 0
            for first, last, stride in self.ranges
        )


def parse_steps(text: str) -> StepSelection:
    """Parse a selection of steps as a user writes it.

    Parameters
    ----------
    text : str
        Parts joined by commas: a step, ``first:last`` (last included) or ``first:last:stride``.
        ``first`` may be left out (then 1), and so may ``last`` (then no end).

    Returns
    -------
    StepSelection
        What `find_checkpoints` takes.

    Raises
    ------
    OptionError
        If a part is none of these, ends before it starts, or holds a 0: step 0 is the base.

    Examples
    --------
    >>> parse_steps("1:75:5,80")
    StepSelection(explicit=(80,), ranges=((1, 75, 5),))
    >>> parse_steps("10:1")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    relex_stream.errors.OptionError: steps '10:1': the range ends before it starts; ...
    """
    explicit: set[int] = set()
    ranges: list[tuple[int, int | None, int]] = []
    for part in text.split(","):
        match = re.fullmatch(
            r"([0-9]{1,18})|([0-9]{1,18})?:([0-9]{1,18})?(?::([0-9]{1,18}))?", part.strip()
        )
        if match is None:
            raise _bad_steps(part, "not a step, a range, or a range with a stride")
        single, first, last, stride = (
            None if number is None else int(number) for number in match.groups()
        )
        if 0 in (single, first, last):
            raise _bad_steps(part, "steps start at 1, step 0 is the base")
        if stride == 0:
            raise _bad_steps(part, "the stride is 0")
        if single is not None:
            explicit.add(single)
            continue
        if last is not None and last < (first or 1):
            raise _bad_steps(part, "the range ends before it starts")
        ranges.append((first or 1, last, stride or 1))
    return StepSelection(tuple(sorted(explicit)), tuple(ranges))


def _bad_steps(part: str, problem: str) -> OptionError:
    shown = part if len(part) <= 100 else part[:100] + "..."
    return OptionError(f"steps {shown!r}: {problem}; write steps {_STEPS_EXAMPLES}")
