"""Places as users name them: paths, URLs, and how one is found from another."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relex_stream.errors import OptionError
from relex_stream.locations import Url, joined, lies_in, local_directory, location, relative_to
from relex_stream.paths import refuse_inside

NAMES = st.text("abc.-_", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
URLS = st.builds(
    lambda protocol, parts: Url(protocol, "/".join(parts)),
    st.sampled_from(["s3", "gs"]),
    st.lists(NAMES, min_size=1, max_size=4),
)
PATHS = st.builds(
    lambda parts: Path("/", *parts), st.lists(NAMES.filter(lambda n: n[0] != "."), max_size=4)
)


@given(st.one_of(URLS, PATHS), st.one_of(URLS, PATHS))
def test_what_is_told_relative_to_a_place_is_found_from_there(target, start):
    assert joined(start, relative_to(target, start)) == target


@given(URLS)
def test_a_url_is_what_it_says(url):
    assert location(str(url)) == url == pickle.loads(pickle.dumps(url))
    assert url / "x" / "y" == url / "x/y"
    assert (url / "x").parent == url
    assert (url / "x").name == "x"
    assert url / "." == url
    assert lies_in(url / "x", url)
    assert not lies_in(url, url / "x")
    assert not lies_in(Url(url.protocol, url.path + "x"), url)


@pytest.mark.parametrize("text", ["s3://", "s3:///x", "s3://a//b", "s3://a/../b", "s3://a::x://b"])
def test_what_is_no_url_is_refused(text):
    with pytest.raises(OptionError, match="not a URL of the form"):
        location(text)


def test_a_url_that_went_through_path_is_refused():
    with pytest.raises(OptionError, match="give it as a str"):
        location(Path("s3://bucket/run.store"))
    assert location(Path("a:/b")) == Path("a:/b")


def test_outputs_are_of_this_machine():
    assert local_directory("out", "OUT") == Path("out")
    with pytest.raises(
        OptionError, match=r"OUT must be a directory of this machine, not s3://b/out"
    ):
        local_directory("s3://b/out", "OUT")
    refuse_inside(Path("out"), Url.parse("s3://b/store"), "OUT", "STORE")
