"""JSON from files we do not trust: one object, no duplicate names, no surprises in the errors."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

_short = reprlib.Repr()
_short.maxstring = 200
_short.maxother = 100


def shown(value: object) -> str:
    """Return the repr of a value from a file, short enough for an error message.

    Examples
    --------
    >>> shown("model.norm.weight"), len(shown("x" * 10**6))
    ("'model.norm.weight'", 200)
    """
    return _short.repr(value)


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object, more strictly than `json.loads`.

    Parameters
    ----------
    data : bytes
        UTF-8 text; nothing but whitespace may surround the object.

    Returns
    -------
    dict
        The object. All names and strings in it can be encoded as UTF-8.

    Raises
    ------
    ValueError
        If it is not UTF-8, not JSON (NaN and Infinity included), nested too deeply, repeats a name
        within one object, holds half a surrogate pair, or is not an object. The message is a
        clause such as ``"it names 'x' twice"``.

    Examples
    --------
    >>> parse_object(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_object(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: it names 'a' twice
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}, character {error.pos})") from None
    except RecursionError:
        # The scanner counts its own depth, so this is its clean refusal and not a full stack.
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if r"\u" in text:  # only an escape can put half a surrogate pair into decoded UTF-8
        _refuse_surrogates(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it names {shown(name)} twice")
            seen.add(name)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it is not JSON (it holds {text})")


def _refuse_surrogates(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, str) and any("\ud800" <= char <= "\udfff" for char in item):
            raise ValueError("it holds half a surrogate pair")
