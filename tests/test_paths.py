import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.paths import check_relative_path


@pytest.mark.parametrize(
    "text", ["a", "a/b.json", "..a", "a..", "...", ".hidden", "ü/日本", "x" * 255, "ab:c", "a b\n"]
)
def test_accepts(text):
    assert check_relative_path(text) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("//host/share", "absolute"),
        ("..", r"part is '\.\.'"),
        ("a/../b", r"part is '\.\.'"),
        (".", r"part is '\.'"),
        ("a/./b", r"part is '\.'"),
        ("a//b", "part is empty"),
        ("a/", "part is empty"),
        ("a\\b", "backslash"),
        ("a\0b", "NUL"),
        ("C:", "drive"),
        ("c:/x", "drive"),
        ("C:x", "drive"),
        ("x" * 256, "256 bytes"),
        ("a/" + "ü" * 128, "256 bytes"),
        ("\ud800", "Unicode"),
    ],
)
def test_refuses(text, problem):
    with pytest.raises(ValueError, match=problem):
        check_relative_path(text)


def test_message_is_short():
    with pytest.raises(ValueError, match="unsafe") as caught:
        check_relative_path("x" * 10**6)
    assert len(str(caught.value)) < 500


@given(st.text(alphabet="ab./\\:\0", max_size=12))
def test_accepted_paths_stay_inside(text):
    try:
        check_relative_path(text)
    except ValueError:
        return
    root = "/some/root"
    joined = os.path.normpath(os.path.join(root, text))
    assert joined == f"{root}/{text}"
