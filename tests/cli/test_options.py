from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.cli.options import parse_bytes
from relex_stream.wording import format_bytes

UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 2**10,
    "KiB": 2**10,
    "M": 2**20,
    "MiB": 2**20,
    "G": 2**30,
    "GiB": 2**30,
    "T": 2**40,
    "TiB": 2**40,
}


@given(
    count=st.integers(1, 10**6),
    unit=st.sampled_from(sorted(UNITS)),
    space=st.sampled_from(["", " "]),
    case=st.sampled_from([str, str.lower, str.upper]),
)
def test_whole_sizes_are_exact(count: int, unit: str, space: str, case: type[str]) -> None:
    assert parse_bytes(f"{count}{space}{case(unit)}") == count * UNITS[unit]


@given(thousandths=st.integers(1, 10**6), unit=st.sampled_from(["KiB", "GB", "TiB"]))
def test_fractions_are_rounded_down(thousandths: int, unit: str) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}"
    assert parse_bytes(text) == int(Fraction(thousandths, 1000) * UNITS[unit])


@given(size=st.integers(1, 2**49))
def test_what_is_printed_can_be_typed(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.006 * size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "1,5GB", "5 PB", "5 cows", "0", "0.0001B", "1GBs", "\u0661GB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size|less than one byte"):
        parse_bytes(text)
