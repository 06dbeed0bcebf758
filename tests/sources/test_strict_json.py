import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.sources.strict_json import parse_object, shown

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
def test_reads_what_json_writes(value, escaped):
    data = json.dumps(value, ensure_ascii=escaped).encode()
    assert parse_object(data) == value


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1, "a": 1}', "names 'a' twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "names 'a' twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"x": [["\\udfff"]]}', "surrogate"),
        (b'{"x":' + b"[" * 10**6, "nested too deeply"),
        (b'{"x":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
    ],
)
def test_refuses(data, problem):
    with pytest.raises(ValueError, match=problem):
        parse_object(data)


def test_refuses_endless_integers():
    with pytest.raises(ValueError, match="digits"):
        parse_object(b'{"a": ' + b"9" * 10**5 + b"}")


def test_surrogate_pairs_are_text():
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@given(st.binary(max_size=60))
def test_raises_nothing_else(data):
    with contextlib.suppress(ValueError):
        parse_object(data)


def test_shown_is_short():
    assert len(shown(["x" * 1000] * 1000)) < 2000
    assert shown({"a": [True]}) == "{'a': [True]}"
