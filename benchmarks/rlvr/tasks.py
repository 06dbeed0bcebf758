"""The verifiable tasks of the small runs: what is asked, what is right, what is held out.

As in the demonstration's task, whose functions complete, decode and count here too, every prompt
and every answer of a task has the same length, and a problem's split is decided by a hash of its
key: what must never be on both sides of a split. For addition and multiplication that is the pair
of operands, for sorting the digits in any order, for brackets the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from relex_stream.demo import task as addition
from relex_stream.demo.task import Split, Verifiable, check_split, splits_of_keys

SORTED_DIGITS = 6
"""Digits of a string to be sorted."""

FACTOR_DIGITS = 3
"""Digits of the left factor; the right one has one digit."""

PRODUCT_DIGITS = FACTOR_DIGITS + 1

OPENING, CLOSING = "([{<", ")]}>"
PREFIX_BRACKETS, OPEN_BRACKETS = 12, 4
"""Brackets of a prompt, and how many of them are left open."""

Seed = int | tuple[int, ...]

_CANDIDATES = 4096


@dataclass(frozen=True, slots=True)
class Sorting:
    """Sort a string of digits.

    Examples
    --------
    >>> problem = Sorting("503395")
    >>> problem.prompt, problem.answer
    ('503395=', '033559')
    """

    digits: str

    @property
    def prompt(self) -> str:
        return f"{self.digits}="

    @property
    def answer(self) -> str:
        return "".join(sorted(self.digits))

    def solved_by(self, completion: str) -> bool:
        """Verify that the right digits are there in the right order, and nothing else."""
        return completion == self.answer


@dataclass(frozen=True, slots=True)
class Product:
    """Multiply a number by a digit, the answer's digits written backwards.

    Examples
    --------
    >>> problem = Product(345, 6)
    >>> problem.prompt, problem.answer
    ('345*6=', '0702')
    """

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left:0{FACTOR_DIGITS}}*{self.right}="

    @property
    def answer(self) -> str:
        return f"{self.left * self.right:0{PRODUCT_DIGITS}}"[::-1]

    def solved_by(self, completion: str) -> bool:
        """Verify by integer arithmetic."""
        well_formed = len(completion) == PRODUCT_DIGITS and set(completion) <= set("0123456789")
        return well_formed and int(completion[::-1]) == self.left * self.right


@dataclass(frozen=True, slots=True)
class Brackets:
    """Close the brackets that are left open, the last one first.

    Examples
    --------
    >>> problem = Brackets("([]{<>(<")
    >>> problem.prompt, problem.answer
    ('([]{<>(<=', '>)})')
    """

    prefix: str

    @property
    def prompt(self) -> str:
        return f"{self.prefix}="

    @property
    def answer(self) -> str:
        closing: list[str] = []
        for bracket in self.prefix:
            if bracket in OPENING:
                closing.append(CLOSING[OPENING.index(bracket)])
            else:
                closing.pop()
        return "".join(reversed(closing))

    def solved_by(self, completion: str) -> bool:
        """Verify that the whole is balanced: every closing bracket fits the last open one."""
        still_open: list[str] = []
        for bracket in self.prefix + completion:
            if bracket in OPENING:
                still_open.append(bracket)
            elif not still_open or bracket != CLOSING[OPENING.index(still_open.pop())]:
                return False
        return not still_open and len(completion) == OPEN_BRACKETS


class Draw(Protocol):
    """Draws problems of one split; the same seed gives the same problems on every machine."""

    def __call__(self, split: Split, count: int, *, seed: Seed = 0) -> list[Verifiable]: ...


@dataclass(frozen=True)
class Task:
    """A task: its characters, its lengths and its problems.

    Attributes
    ----------
    symbols : str
        The characters of prompts and answers; with the special tokens, the vocabulary.
    prompt_tokens : int
        Beginning of sequence included.
    completion_tokens : int
        End of sequence included.
    draw : Draw
        Draws problems of a split.
    """

    symbols: str
    prompt_tokens: int
    completion_tokens: int
    draw: Draw


def draw_additions(split: Split, count: int, *, seed: Seed = 0) -> list[Verifiable]:
    """Draw the demonstration's additions."""
    return list(addition.draw_problems(split, count, seed=seed))


def draw_sortings(split: Split, count: int, *, seed: Seed = 0) -> list[Verifiable]:
    """Draw strings of independent, uniform digits; their order does not matter for the split."""

    def candidates(random: np.random.Generator) -> tuple[list[Verifiable], NDArray[np.uint64]]:
        rows = random.integers(10, size=(_CANDIDATES, SORTED_DIGITS))
        keys = np.sort(rows, axis=1) @ 10 ** np.arange(SORTED_DIGITS)
        return [Sorting("".join(map(str, row))) for row in rows.tolist()], keys.astype(np.uint64)

    return _draw(split, count, seed, candidates)


def draw_products(split: Split, count: int, *, seed: Seed = 0) -> list[Verifiable]:
    """Draw independent, uniform factors."""

    def candidates(random: np.random.Generator) -> tuple[list[Verifiable], NDArray[np.uint64]]:
        keys = random.integers(10 ** (FACTOR_DIGITS + 1), size=_CANDIDATES)
        return [Product(*divmod(key, 10)) for key in keys.tolist()], keys.astype(np.uint64)

    return _draw(split, count, seed, candidates)


def draw_brackets(split: Split, count: int, *, seed: Seed = 0) -> list[Verifiable]:
    """Draw prefixes bracket by bracket: each opens or closes with equal odds where both can be."""

    def candidates(random: np.random.Generator) -> tuple[list[Verifiable], NDArray[np.uint64]]:
        prefixes = [_prefix(random) for _ in range(256)]
        return [Brackets(prefix) for prefix in prefixes], np.array(
            [_bracket_key(prefix) for prefix in prefixes], dtype=np.uint64
        )

    return _draw(split, count, seed, candidates)


TASKS = {
    "addition": Task(
        addition.SYMBOLS, addition.PROMPT_TOKENS, addition.COMPLETION_TOKENS, draw_additions
    ),
    "sorting": Task("0123456789=", SORTED_DIGITS + 2, SORTED_DIGITS + 1, draw_sortings),
    "product": Task("0123456789*=", FACTOR_DIGITS + 4, PRODUCT_DIGITS + 1, draw_products),
    "brackets": Task(
        OPENING + CLOSING + "=", PREFIX_BRACKETS + 2, OPEN_BRACKETS + 1, draw_brackets
    ),
}
"""Every task, by name."""


Candidates = Callable[[np.random.Generator], tuple[list[Verifiable], NDArray[np.uint64]]]
"""Draws problems of any split, with the keys that decide it."""


def _draw(split: Split, count: int, seed: Seed, candidates: Candidates) -> list[Verifiable]:
    check_split(split)
    random = np.random.Generator(np.random.PCG64(seed))
    drawn: list[Verifiable] = []
    while len(drawn) < count:
        problems, keys = candidates(random)
        for problem, its_split in zip(problems, splits_of_keys(keys), strict=True):
            if its_split == split:
                drawn.append(problem)
    return drawn[:count]


def _prefix(random: np.random.Generator) -> str:
    """Return a prefix of a balanced string that leaves `OPEN_BRACKETS` open."""
    prefix = ""
    still_open: list[int] = []
    for left in range(PREFIX_BRACKETS, 0, -1):
        must_open = len(still_open) + left <= OPEN_BRACKETS or not still_open
        must_close = len(still_open) - left >= OPEN_BRACKETS
        if must_open or (not must_close and random.random() < 0.5):
            still_open.append(int(random.integers(len(OPENING))))
            prefix += OPENING[still_open[-1]]
        else:
            prefix += CLOSING[still_open.pop()]
    return prefix


def _bracket_key(prefix: str) -> int:
    symbols = OPENING + CLOSING
    return sum(
        symbols.index(bracket) * len(symbols) ** place for place, bracket in enumerate(prefix)
    )
