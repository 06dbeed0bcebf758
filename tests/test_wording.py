from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream import wording


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10234, "9.99 KiB"),
        (10239, "10.0 KiB"),
        (1 << 20, "1.00 MiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (768 << 20, "768 MiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert wording.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (90_000, "1 d 01 h"),
        (float("inf"), "unknown time"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert wording.format_duration(seconds) == text


def test_missing_figures_are_dashes() -> None:
    nan = float("nan")
    assert wording.format_figure(None) == wording.format_figure(nan) == "-"
    assert wording.format_share(nan) == wording.format_ratio(nan) == "-"


def test_format_steps() -> None:
    assert wording.format_steps((1, 5, 7)) == "1, 5, 7"
    assert wording.format_steps(range(1, 9), full=True) == "1, 2, 3, 4, 5, 6, 7, 8"


def test_listing_says_what_it_leaves_out() -> None:
    names = [f"{index}" for index in range(25)]
    assert wording.listing(names, full=False)[-1] == "  ... and 5 more (--verbose lists all)"
    assert len(wording.listing(names, full=True)) == 25


@given(text=st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    safe = wording.printable(text)
    assert safe.isprintable()
    if text.isprintable():
        assert safe == text


@given(
    rows=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=5),
)
def test_table_has_a_line_per_row(rows: list[tuple[str, str]]) -> None:
    lines = wording.table(("name", "size"), rows, "lr")
    assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) == len(lines[1])


def test_json_takes_numpy_scalars_and_paths() -> None:
    @dataclass(frozen=True)
    class Row:
        steps: tuple[np.int64, ...]
        share: np.float32
        ok: bool
        path: Path
        sizes: dict[str, tuple[int, int]]

    row = Row((np.int64(3),), np.float32("inf"), True, Path("a"), {"BF16": (1, 2)})
    assert json.loads(wording.to_json(row, warnings=[])) == {
        "steps": [3],
        "share": None,
        "ok": True,
        "path": "a",
        "sizes": {"BF16": [1, 2]},
        "warnings": [],
    }
