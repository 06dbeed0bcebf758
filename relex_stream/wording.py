"""How results look: sizes, durations, lists of steps, aligned tables, JSON."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: float) -> str:
    """Return a number of bytes with three digits or more and a binary unit.

    Examples
    --------
    >>> format_bytes(512), format_bytes(1_320_702_444), format_bytes(1023.99 * 1024)
    ('512 B', '1.23 GiB', '1.00 MiB')
    """
    size, unit = float(count), 0
    # 1023.996 would print as "1024.00": the next unit begins where rounding would reach it.
    while size >= 1023.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{size:.0f} B"
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{decimals}f} {_UNITS[unit]}"


def byte_unit(most: float) -> tuple[str, int]:
    """Return the unit in which `most` bytes are written, and its bytes: for an axis.

    Examples
    --------
    >>> byte_unit(5000), byte_unit(3)
    (('KiB', 1024), ('B', 1))
    """
    number = 0
    while most >= 1024 and number < len(_UNITS) - 1:
        most, number = most / 1024, number + 1
    return _UNITS[number], 1024**number


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units.

    Examples
    --------
    >>> format_duration(0.043), format_duration(12.34), format_duration(125), format_duration(11220)
    ('0.04 s', '12.3 s', '2 min 05 s', '3 h 07 min')
    """
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def format_share(share: float | None) -> str:
    """Return a share as a percentage, or a dash where there is none.

    Examples
    --------
    >>> format_share(0.0048), format_share(0.875), format_share(None)
    ('0.48 %', '87.5 %', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    decimals = 2 if abs(share) < 0.0995 else 1
    return f"{100 * share:.{decimals}f} %"


def format_figure(figure: float | None, decimals: int = 3) -> str:
    """Return a figure with fixed decimals, or a dash where there is none."""
    if figure is None or not math.isfinite(figure):
        return "-"
    return f"{figure:.{decimals}f}"


def format_ratio(ratio: float) -> str:
    """Return how many times smaller something became.

    Examples
    --------
    >>> format_ratio(231.4), format_ratio(2.87)
    ('231x', '2.9x')
    """
    if not math.isfinite(ratio):
        return "-"
    return f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x"


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> format_count(1, "step"), format_count(1250000, "weight")
    ('1 step', '1,250,000 weights')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_steps(steps: Sequence[int], *, full: bool = False) -> str:
    """Return a list of steps, the middle left out where it is long.

    Examples
    --------
    >>> format_steps(range(10, 510, 10))
    '10, 20, 30, ..., 500 (50 steps)'
    >>> format_steps([5]), format_steps([])
    ('5', 'none')
    """
    if not steps:
        return "none"
    if full or len(steps) <= 6:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]} ({len(steps)} steps)"


def printable(text: str) -> str:
    r"""Return `text` with everything that a terminal might obey written as an escape.

    File and tensor names come from other people's checkpoints.

    Examples
    --------
    >>> printable("model\x1b[2J.bin")
    'model\\x1b[2J.bin'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    r"""Return the lines of a plain table.

    Parameters
    ----------
    header : sequence of str
        Column titles.
    rows : iterable of sequence of str
        Cells, as many per row as titles.
    align : str
        A letter per column: ``l`` or ``r``.

    Examples
    --------
    >>> print("\n".join(table(["step", "size"], [["9", "1 B"], ["10", "20 B"]], "rr")))
    step  size
    ----  ----
       9   1 B
      10  20 B
    """
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ).rstrip()
        for row in cells
    ]


def pairs(rows: Mapping[str, str]) -> list[str]:
    """Return the lines of a list of named values, the values aligned."""
    width = max(map(len, rows))
    return [f"{name.ljust(width)}  {printable(value)}" for name, value in rows.items()]


def listing(names: Sequence[str], *, full: bool, most: int = 20) -> list[str]:
    """Return indented names, and how many were left out if there are more than `most`."""
    shown = names if full else names[:most]
    lines = [f"  {printable(name)}" for name in shown]
    if len(shown) < len(names):
        lines.append(f"  ... and {len(names) - len(shown):,} more (--verbose lists all)")
    return lines


def to_json(summary: Any = None, **extra: Any) -> str:
    """Return a dataclass and further members as one JSON document.

    Numbers that JSON cannot express (NaN, infinities) become null.

    Parameters
    ----------
    summary : dataclass instance, optional
        Its fields are members of the document.
    **extra
        Further members.
    """
    return json.dumps(_plain(_document(summary, extra)), indent=2, allow_nan=False)


def to_json_line(summary: Any, **extra: Any) -> str:
    """Return the same on one line, for output that has many documents."""
    return json.dumps(_plain(_document(summary, extra)), allow_nan=False)


def _document(summary: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    return (asdict(summary) if summary is not None else {}) | dict(extra)


def _plain(value: Any) -> Any:
    """Return `value` made of what the json module takes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    # By abstract type, so that numpy's scalars are taken without importing numpy.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return os.fspath(value)
