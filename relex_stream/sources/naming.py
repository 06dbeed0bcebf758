"""From a checkpoint's own names of tensors to the base's.

Trainers wrap models: keys begin with ``module.`` or ``model.``, or carry the name of a wrapper in
the middle. The base says which names are wanted, so what stands before them can be found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError, SourceError
from .directories import summarise
from .strict_json import shown

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What torch.compile, FSDP 1 and activation checkpointing put into names, wherever they wrap."""

_ANCHORS = 8


@dataclass(frozen=True)
class Naming:
    """How tensors of checkpoints are called in the base.

    Attributes
    ----------
    wanted : frozenset of str
        Names in the base. Empty for the base itself: every name is kept as it is.
    strip_prefix : str, optional
        What names begin with; found out where it is not given.
    replacements : tuple of (str, str)
        Regular expressions and what replaces each match of theirs, in order, after the prefix is
        gone.

    Examples
    --------
    >>> naming = Naming(frozenset({"model.embed", "model.norm"}))
    >>> naming.of(["model.model.embed", "model.model.norm", "optim.step"])
    {'model.model.embed': 'model.embed', 'model.model.norm': 'model.norm'}
    """

    wanted: frozenset[str] = frozenset()
    strip_prefix: str | None = None
    replacements: tuple[tuple[str, str], ...] = ()

    def of(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the names in the base of those keys that are the model's.

        Those without the prefix of the model's keys are left out: in checkpoints of everything they
        are the state of something else.

        Parameters
        ----------
        keys : iterable of str

        Returns
        -------
        dict of str to str
            In the order of the keys. With a prefix, or none: also names that the base does not
            have, for the caller to complain of.

        Raises
        ------
        SourceError
            If two keys come to one name, or several prefixes fit.
        OptionError
            If a replacement cannot be made.
        """
        keys = list(keys)
        if not self.wanted:
            return {key: key for key in keys}
        plain = {key: key if key in self.wanted else _WRAPPERS.sub("", key) for key in keys}
        if self.strip_prefix is None:
            plain = {key: self._replaced(name) for key, name in plain.items()}
            prefix = self._find_prefix(plain.values())
            names = _stripped(plain, prefix)
        else:
            names = _stripped(plain, self.strip_prefix)
            names = {key: self._replaced(name) for key, name in names.items()}
        taken: dict[str, str] = {}
        for key, name in names.items():
            if taken.setdefault(name, key) != key:
                raise SourceError(
                    f"tensors {shown(taken[name])} and {shown(key)} would both be {shown(name)}; "
                    "say with --strip-prefix or --map what they are called in the base"
                )
        return names

    def of_model(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the names in the base of all keys of weights that are saved by themselves.

        There all is the model's, and what the base does not have is to be complained of, under its
        own name: only a prefix that was given says that the rest is of something else, like the
        reference model, and is left out.

        Parameters
        ----------
        keys : iterable of str

        Returns
        -------
        dict of str to str
            In the order of the keys.

        Raises
        ------
        SourceError, OptionError
            As `of`; also if no key begins with the prefix that was given.

        Examples
        --------
        >>> keys = ["policy.norm", "ref.norm"]
        >>> Naming(frozenset({"norm", "head"}), strip_prefix="policy.").of_model(keys)
        {'policy.norm': 'norm'}
        >>> Naming(frozenset({"norm", "head"})).of_model(["module.norm", "odd"])
        {'module.norm': 'norm', 'odd': 'odd'}
        """
        keys = list(keys)
        names = self.of(keys)
        if self.strip_prefix is None:
            return {key: names.get(key, key) for key in keys}
        if keys and not names:
            raise SourceError(
                f"no tensor begins with {shown(self.strip_prefix)}: there are "
                f"{summarise(keys, limit=3)}; correct --strip-prefix, or leave it out"
            )
        # A head beside the wrapped model is called as in the base.
        as_they_are = self.wanted.difference(names.values())
        return {key: names.get(key, key) for key in keys if key in names or key in as_they_are}

    def _replaced(self, name: str) -> str:
        for pattern, replacement in self.replacements:
            try:
                name = re.sub(pattern, replacement, name)
            except (re.error, IndexError) as error:
                raise OptionError(
                    f"--map {pattern}={replacement}: {error}; write a regular expression and what "
                    r"replaces it, such as '^transformer\.=model.'"
                ) from None
        return name

    def _find_prefix(self, names: Iterable[str]) -> str:
        """Return what stands before the base's names, ``""`` where nothing does or nothing fits."""
        present = set(names)
        if len(present & self.wanted) > len(self.wanted) // 2:
            return ""
        # The longest names are those least likely to end another name.
        anchors = sorted(self.wanted, key=lambda name: (-len(name), name))[:_ANCHORS]
        votes = Counter(
            name[: -len(anchor)]
            for anchor in anchors
            for name in present
            if name.endswith(anchor) and name[: -len(anchor)][-1:] in ("", ".")
        )
        if not votes:
            return ""
        best = max(votes.values())
        prefixes = sorted(prefix for prefix, count in votes.items() if count == best)
        if len(prefixes) > 1:
            raise SourceError(
                f"tensors of the base are there under several prefixes, {shown(prefixes[0])} and "
                f"{shown(prefixes[1])}; choose one with --strip-prefix"
            )
        return prefixes[0]


def _stripped(names: dict[str, str], prefix: str) -> dict[str, str]:
    return {
        key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)
    }
