import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from relex_stream.errors import SourceError
from relex_stream.sources.safetensors_file import MAX_HEADER_BYTES, read_weights_file
from relex_stream.specs import DTYPES
from tests.make_checkpoints import raw, round_to, write_safetensors

NUMPY_DTYPES = ["F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
NUMPY_NAMES = {"F": "float", "I": "int", "U": "uint"}


def numpy_dtype(code):
    return np.dtype(bool if code == "BOOL" else f"{NUMPY_NAMES[code[0]]}{code[1:]}")


names = st.text(min_size=1, max_size=20).filter(lambda name: "\0" not in name)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def raw_tensors(draw, codes=tuple(DTYPES)):
    result = {}
    for name in draw(st.lists(names.filter("__metadata__".__ne__), unique=True, max_size=6)):
        code, shape = draw(st.sampled_from(codes)), draw(shapes)
        size = int(np.prod(shape, dtype=int)) * DTYPES[code].itemsize
        result[name] = (code, shape, draw(st.binary(min_size=size, max_size=size)))
    return result


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def rebuild(path, weights_file, places):
    """Concatenate the parts, taking tensors from where they are said to lie."""
    content = path.read_bytes()
    pieces = []
    for part in weights_file.parts:
        if part.literal is not None:
            pieces.append(part.literal)
        else:
            place = places[part.tensor]
            pieces.append(content[place.offset : place.offset + place.spec.nbytes])
    return b"".join(pieces)


def check(path, tensors):
    weights_file, places = read_weights_file(path, "m.safetensors")
    content = path.read_bytes()
    assert set(places) == set(tensors)
    for name, (code, shape, data) in tensors.items():
        place = places[name]
        assert (place.spec.name, place.spec.dtype.code, place.spec.shape) == (name, code, shape)
        assert place.path == str(path)
        assert content[place.offset : place.offset + place.spec.nbytes] == data
    assert weights_file.relative_path == "m.safetensors"
    assert weights_file.size == len(content)
    assert rebuild(path, weights_file, places) == content
    assert [part.tensor for part in weights_file.parts[1:]] == list(places)
    offsets = [place.offset for place in places.values()]
    assert offsets == sorted(offsets)


@given(raw_tensors(NUMPY_DTYPES), st.none() | st.dictionaries(st.text(), st.text(), max_size=2))
@settings(deadline=None)
def test_official_writer(tmp_path_factory, tensors, metadata):
    # safetensors 0.8 writes `{},"__metadata__":{}}` for no tensors with metadata, and refuses it.
    assume(tensors or metadata is None)
    path = tmp_path_factory.mktemp("official") / "m.safetensors"
    arrays = {
        name: np.frombuffer(data, numpy_dtype(code)).reshape(shape)
        for name, (code, shape, data) in tensors.items()
    }
    save_file(arrays, path, metadata)
    check(path, tensors)


@given(raw_tensors(), st.randoms(use_true_random=False), st.none() | st.integers(0, 9))
@settings(deadline=None)
def test_any_order_and_alignment(tmp_path_factory, tensors, random, padding):
    order = list(tensors)
    random.shuffle(order)
    path = tmp_path_factory.mktemp("raw") / "m.safetensors"
    check(write_safetensors(path, tensors, order=order, padding=padding), tensors)


def test_layout_is_literal(tmp_path):
    tensors = {
        "b": ("U8", (1,), b"\x07"),
        "e2": ("F32", (0, 3), b""),
        "w": raw(round_to(np.array([1.0, -2.0]), "BF16"), "BF16"),
        "e1": ("BF16", (0,), b""),
    }
    path = write_safetensors(tmp_path / "x", tensors, {"format": "pt"}, padding=1)
    weights_file, places = read_weights_file(path, "x")
    header = path.read_bytes()[:-5]
    assert [part.literal or part.tensor for part in weights_file.parts] == [
        header,
        "b",
        "e2",
        "w",
        "e1",
    ]
    assert [place.offset - len(header) for place in places.values()] == [0, 1, 1, 5]
    assert path.read_bytes()[places["w"].offset :] == b"\x80\x3f\x00\xc0"


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_HEADERS = {
    "no brace": (b' {"a": 1}', "begin with"),
    "array": (b"[]", "begin with"),
    "empty": (b"", "begin with"),
    "not json": (b"{]", "not JSON"),
    "deep": (b'{"a":' + b"[" * 10**5, "nested"),
    "twice": (
        b"{%b,%b}" % ((b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}',) * 2),
        "names 'a' twice",
    ),
    "twice inside": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "names 'dtype' twice",
    ),
    "no name": ({"": F32}, "name '' is empty"),
    "NUL": ({"a\0": F32}, "NUL"),
    "not an object": ({"a": [1]}, "exactly dtype"),
    "key missing": ({"a": {"dtype": "F32", "shape": [1]}}, "exactly dtype"),
    "key too many": ({"a": F32 | {"strides": [1]}}, "exactly dtype"),
    "packed dtype": (
        {"a": F32 | {"dtype": "F4"}},
        "tensor 'a' has dtype 'F4', which is not supported; dequantise the model first$",
    ),
    "unknown dtype": ({"a": F32 | {"dtype": "f32"}}, "tensor 'a' has dtype 'f32'"),
    "dtype no string": ({"a": F32 | {"dtype": ["F32"]}}, "has dtype"),
    "shape no list": ({"a": F32 | {"shape": 1}}, "has shape 1"),
    "shape bool": ({"a": F32 | {"shape": [True]}}, r"has shape \[True\]"),
    "shape float": ({"a": F32 | {"shape": [1.0]}}, "has shape"),
    "shape negative": ({"a": F32 | {"shape": [-1]}}, "has shape"),
    "shape string": ({"a": F32 | {"shape": ["1"]}}, "has shape"),
    "shape huge": ({"a": F32 | {"shape": [2**63]}}, "has shape"),
    "shape overflows": ({"a": F32 | {"shape": [2**62, 4]}}, "has 4 bytes where"),
    "shape long": ({"a": F32 | {"shape": [1] * 65}}, "has shape"),
    "offsets no list": ({"a": F32 | {"data_offsets": 4}}, "has data_offsets"),
    "offsets short": ({"a": F32 | {"data_offsets": [4]}}, "has data_offsets"),
    "offsets float": ({"a": F32 | {"data_offsets": [0, 4.0]}}, "has data_offsets"),
    "offsets bool": ({"a": F32 | {"data_offsets": [False, 4]}}, "has data_offsets"),
    "offsets negative": ({"a": F32 | {"data_offsets": [-4, 0]}}, "has data_offsets"),
    "offsets reversed": ({"a": F32 | {"data_offsets": [4, 0]}}, "has data_offsets"),
    "size": ({"a": F32 | {"shape": [2]}}, "has 4 bytes where F32 of shape .2. takes 8"),
    "gap": ({"a": F32 | {"data_offsets": [1, 5]}}, "gap lies before tensor 'a'"),
    "overlap": (
        {"a": F32, "b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}},
        "overlap tensor 'b'",
    ),
    "tied": ({"a": F32, "b": F32}, "overlap tensor 'b'"),
    "metadata": ({"__metadata__": {"a": 1}, "a": F32}, "__metadata__ is not"),
    "metadata list": ({"__metadata__": [], "a": F32}, "__metadata__ is not"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path, case):
    header, problem = BAD_HEADERS[case]
    path = write_raw(tmp_path / "m.safetensors", header, bytes(4))
    with pytest.raises(SourceError, match=problem) as caught:
        read_weights_file(path, "m.safetensors")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_truncated_and_too_long(tmp_path):
    path = write_safetensors(tmp_path / "m", {"a": ("F32", (3,), bytes(12))})
    content = path.read_bytes()
    read_weights_file(path, "m")  # a header that was right for another file is no excuse
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(SourceError, match=rf"truncated: {size} bytes where .*copy it again"):
            read_weights_file(path, "m")
    path.write_bytes(content + b"xy")
    with pytest.raises(SourceError, match="2 bytes follow the last tensor"):
        read_weights_file(path, "m")


def test_header_limit_comes_before_reading(tmp_path):
    path = tmp_path / "m"
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceError, match="announces a header"):
        read_weights_file(path, "m")
    with path.open("r+b") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(SourceError, match=f"allows {MAX_HEADER_BYTES}"):
        read_weights_file(path, "m")


def test_not_a_readable_file(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        read_weights_file(tmp_path / "none", "none")
    with pytest.raises(SourceError, match="not a regular file"):
        read_weights_file(tmp_path, "directory")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="not a regular file"):
        read_weights_file(tmp_path / "pipe", "pipe")


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "m"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read_weights_file(path, "m")


def test_the_library_has_the_last_word(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise SafetensorError("a rule to come")

    path = write_safetensors(tmp_path / "m", {"a": ("U8", (1,), b"x")})
    monkeypatch.setattr("relex_stream.sources.safetensors_file.safe_open", refuse)
    with pytest.raises(SourceError, match="refused by the safetensors library: a rule to come"):
        read_weights_file(path, "m")


def accepted(path: Path) -> bool:
    try:
        weights_file, places = read_weights_file(path, "m")
    except SourceError:
        return False
    assert rebuild(path, weights_file, places) == path.read_bytes()
    return True


@given(raw_tensors(), st.data())
@settings(deadline=None, max_examples=200)
def test_mutated_bytes_raise_nothing_else(tmp_path_factory, tensors, data):
    path = write_safetensors(tmp_path_factory.mktemp("mutated") / "m", tensors)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        replacement = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"[", b"}", b"-"]))
        content[position : position + data.draw(st.integers(0, 3))] = replacement
        if not content:
            break
    path.write_bytes(content)
    if accepted(path):
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(read_weights_file(path, "m")[1])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8", "F4", 2**62, 2**64, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        json_values
        | st.fixed_dictionaries(
            {"dtype": json_values, "shape": json_values, "data_offsets": json_values}
        )
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F16"]),
                "shape": st.lists(st.integers(-1, 4), max_size=2),
                "data_offsets": st.lists(st.integers(-1, 4), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=4),
)
@settings(deadline=None)
def test_mutated_headers_raise_nothing_else(tmp_path_factory, header, data):
    path = write_raw(tmp_path_factory.mktemp("header") / "m", header, data)
    accepted(path)
