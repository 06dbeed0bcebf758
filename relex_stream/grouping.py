"""Which weights share a subspace, and which tensors are predicted at all: by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from relex_stream.errors import OptionError

GROUPINGS = ("tensor", "run", "layer", "module", "model")
"""What has a subspace of its own: each tensor (RELEX), each run of `RUN_ELEMENTS` of a tensor, the
tensors of a layer, those of the same kind in all layers, or the model."""

RUN_ELEMENTS = 1 << 20

EXCLUDED_FROM = ("base", "latest")
"""Where tensors that are not predicted are copied from."""

_FIRST_NUMBER = re.compile(r"^(.*?\.\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def group_name(tensor: str, grouping: str) -> str:
    """Return the name of the group that a tensor belongs to (for runs: the tensor's).

    Examples
    --------
    >>> name = "model.layers.12.self_attn.q_proj.weight"
    >>> [group_name(name, grouping) for grouping in ("tensor", "layer", "module", "model")][1:]
    ['model.layers.12', 'model.layers.*.self_attn.q_proj', 'model']
    >>> group_name("model.embed_tokens.weight", "layer")  # outside all layers: on its own
    'model.embed_tokens.weight'
    """
    if grouping == "model":
        return "model"
    if grouping == "layer":
        match = _FIRST_NUMBER.match(tensor)
        return match[1] if match else tensor
    if grouping == "module":
        stem, _, last = tensor.rpartition(".")
        return _NUMBER.sub("*", stem if last in ("weight", "bias") and stem else tensor)
    return tensor


def run_blocks(block_elements: int) -> int:
    """Return how many blocks of a tensor make a run; at least one.

    Examples
    --------
    >>> run_blocks(1 << 20), run_blocks(1 << 19), run_blocks(1 << 21)
    (1, 2, 1)
    """
    return max(1, RUN_ELEMENTS // block_elements)


@dataclass(frozen=True)
class Selection:
    """Tensors that are predicted; the others are copied.

    Attributes
    ----------
    include, exclude : tuple of str
        Patterns of names, as in the shell: ``*`` is any text, ``?`` any character, ``[ab]`` one of
        some. Predicted is what matches any of `include` (or there are none) and none of `exclude`.
    excluded_from : str
        One of `EXCLUDED_FROM`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    excluded_from: str = "base"

    def takes(self, name: str) -> bool:
        """Say whether a tensor is predicted."""
        if self.include and not any(fnmatchcase(name, each) for each in self.include):
            return False
        return not any(fnmatchcase(name, each) for each in self.exclude)

    def check(self, names: Iterable[str], tied: Sequence[tuple[str, str]] = ()) -> None:
        """Refuse patterns that no tensor has, and a selection of none.

        Parameters
        ----------
        names : iterable of str
            Of the tensors that have weights of their own.
        tied : sequence of (str, str)
            Tensors that have another's, and those.

        Raises
        ------
        OptionError
        """
        known = list(names)
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if any(fnmatchcase(name, pattern) for name in known):
                    continue
                for name, other in tied:
                    if fnmatchcase(name, pattern):
                        raise OptionError(
                            f"{option} {pattern}: {name} has the weights of {other}; name that"
                        )
                raise OptionError(
                    f"{option} {pattern} is no tensor's name; the first is {known[0]!r} and the "
                    f"last {known[-1]!r}"
                    if known
                    else f"{option} {pattern}: the store has no tensors"
                )
        if self.excluded_from not in EXCLUDED_FROM:
            raise OptionError(
                f"--excluded-from must be {' or '.join(EXCLUDED_FROM)}, not {self.excluded_from!r}"
            )
        if known and not any(map(self.takes, known)):
            raise OptionError("--include and --exclude leave no tensor to predict")
