"""Files from recipes: literal bytes, tensors and boxes of them, wherever blocks end."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relex_stream.assemble import Assembly
from relex_stream.blocks import BlockOf, Strip
from relex_stream.errors import CorruptionError
from relex_stream.specs import Box
from relex_stream.store.records import FileEntry, RecipePart, StoredTensor, place_tensors

Recipes = Mapping[str, Sequence[RecipePart]]

BLOCK_BYTES = 16
SHAPES = {"a": (3, 4, 5), "b": (7,), "c": (2,), "d": (3,), "e": (), "none": (0, 2), "ids": (4, 3)}
SMALL = ("c", "d", "e")
BLOBS = {"short": b"<h>", "long": b"0123456789abcdefghij", "side": b"{}"}
PACKED = bytes(range(100, 160))


def described(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    dtype, base = ("I64", "I64") if name == "ids" else ("F32", "BF16")
    kind = "constant" if name == "ids" else "tracked"
    here = {"name": name, "kind": kind, "base_dtype": base, "dtype": dtype, "shape": shape}
    return here | {"tied_to": None, "sketch_row": -1}


class FakeStore:
    """What an assembly asks of a store."""

    def __init__(self, recipes: Recipes) -> None:
        tied = described("head", SHAPES["a"]) | {"kind": "tied", "tied_to": "a"}
        descriptions = [*(described(*item) for item in SHAPES.items()), tied]
        self.tensors = {t.name: t for t in place_tensors(descriptions, BLOCK_BYTES)[0]}
        self._recipes = recipes

    @property
    def manifest(self) -> Any:
        return type("Manifest", (), {"tensors": tuple(self.tensors.values())})

    def recipe(self, entry: FileEntry) -> list[RecipePart]:
        return list(self._recipes[entry.path])

    def blob(self, name: str) -> bytes:
        return BLOBS[name]

    def blob_size(self, name: str) -> int:
        return len(BLOBS[name])

    def literals(self, entry: FileEntry) -> bytes:
        return PACKED


class Files:
    """An output in memory, in which every byte may be written once."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.times: dict[str, NDArray[np.int64]] = {}
        self.writes = 0

    def preallocate(self, path: str, size: int) -> None:
        self.content[path], self.times[path] = bytes(size), np.zeros(size, int)

    def write_file(self, path: str, data: bytes) -> None:
        self.preallocate(path, len(data))
        self.write(path, 0, data)

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        data = bytes(data)
        before = self.content[path]
        self.content[path] = before[:offset] + data + before[offset + len(data) :]
        assert len(self.content[path]) == len(before)
        self.times[path][offset : offset + len(data)] += 1
        self.writes += 1


def whole(name: str, *, base: bool) -> NDArray[Any]:
    """Return a tensor whose elements all differ, also from those of others."""
    place = 1000 * list(SHAPES).index(name)
    itemsize = 8 if name == "ids" else 2 if base else 4
    numel = int(np.prod(SHAPES[name], dtype=int))
    return (np.arange(numel) + place).astype(f"u{itemsize}").reshape(SHAPES[name])


def expected(parts: Sequence[RecipePart], *, base: bool) -> bytes:
    """Return a file by its recipe, with numpy's own indexing."""
    data, packed = b"", 0
    for part in parts:
        if part.blob is not None:
            data += BLOBS[part.blob]
        elif part.nbytes is not None:
            data += PACKED[packed : packed + part.nbytes]
            packed += part.nbytes
        elif part.tensor is not None:
            tensor = whole("a" if part.tensor == "head" else part.tensor, base=base)
            if part.box is not None:
                box = zip(part.box.start, part.box.shape, strict=True)
                tensor = tensor[tuple(slice(start, start + n) for start, n in box)]
            data += tensor.tobytes()
    return data


def assembled(recipes: Recipes, *, base: bool = False, **options: Any) -> Assembly:
    entries = [
        FileEntry(path, len(expected(parts, base=base)), blob="packed", recipe=path)
        for path, parts in recipes.items()
    ]
    entries.append(FileEntry("config.json", 2, blob="side"))
    options = {"prefix": "", "in_base_dtype": base} | options
    return Assembly(FakeStore(recipes), entries, **options)  # type: ignore[arg-type]


def put_all(assembly: Assembly, files: Files, groups: Sequence[Sequence[str]]) -> None:
    """Put all blocks, those of each group of small tensors as one strip."""
    tensors = {tensor.name: tensor for tensor in assembly.tensors}
    for group in groups:
        held = [tensors[name] for name in group if name in tensors]
        if held:
            strip = Strip(tuple(BlockOf(tensor, 0) for tensor in held))
            assembly.put(files, strip, np.concatenate([bits_of(assembly, t) for t in held]))  # type: ignore[arg-type]
    for name in tensors.keys() - SMALL:
        for block in range(tensors[name].blocks):
            at = BlockOf(tensors[name], block)
            bits = bits_of(assembly, tensors[name])[at.start : at.start + at.elements]
            assembly.put(files, at, bits)  # type: ignore[arg-type]


def bits_of(assembly: Assembly, tensor: StoredTensor) -> NDArray[Any]:
    bits = whole(tensor.name, base=assembly.in_base_dtype).reshape(-1)
    return bits.view(np.uint8) if tensor.kind == "constant" else bits


def assert_written(assembly: Assembly, recipes: Recipes, groups: Sequence[Sequence[str]]) -> Files:
    files = Files()
    assembly.begin(files)  # type: ignore[arg-type]
    put_all(assembly, files, groups)
    base = assembly.in_base_dtype
    for path, parts in recipes.items():
        assert files.content[path] == expected(parts, base=base), path
        assert (files.times[path] == 1).all(), path
    assert files.content["config.json"] == b"{}"
    assert assembly.sizes == {path: len(data) for path, data in files.content.items()}
    assert assembly.nbytes == sum(assembly.sizes.values())
    return files


# --- any recipe ----------------------------------------------------------------------------------


@st.composite
def recipe_parts(draw: st.DrawFn) -> RecipePart:
    kind = draw(st.sampled_from(["tensor", "box", "blob", "literal"]))
    if kind == "blob":
        return RecipePart(blob=draw(st.sampled_from(["short", "long"])))
    if kind == "literal":
        return RecipePart(nbytes=draw(st.integers(0, 6)))
    name = draw(st.sampled_from([*SHAPES, "head"]))
    if kind == "tensor":
        return RecipePart(tensor=name)
    start, length = [], []
    for size in SHAPES.get(name, SHAPES["a"]):
        start.append(draw(st.integers(0, size)))
        length.append(draw(st.integers(0, size - start[-1])))
    return RecipePart(tensor=name, box=Box(tuple(start), tuple(length)))


@settings(max_examples=60)
@given(
    recipes=st.dictionaries(
        st.sampled_from(["1", "2", "3"]), st.lists(recipe_parts(), max_size=6), min_size=1
    ),
    order=st.permutations(SMALL),
    cut=st.integers(0, 3),
    base=st.booleans(),
)
def test_any_recipe_makes_its_file(
    recipes: Recipes, order: Sequence[str], cut: int, base: bool
) -> None:
    assembly = assembled(recipes, base=base)
    assert_written(assembly, recipes, [order[:cut], order[cut:]])
    data = [part for parts in recipes.values() for part in parts if part.tensor is not None]
    assert assembly.tensor_bytes == len(expected(data, base=base))


def test_neighbours_are_written_in_one_piece() -> None:
    c, d, e = (RecipePart(tensor=name) for name in SMALL)
    gap = RecipePart(blob="short")
    # As far into its file as the two before it are long.
    recipes = {"1": [c, d], "2": [RecipePart(blob="long"), e]}
    # config.json, the literal bytes, and a piece in each file.
    assert assert_written(assembled(recipes), recipes, [SMALL]).writes == 1 + 1 + 2
    for parts, order, writes in (
        ([c, d, e], "cde", 1),
        ([c, d, e], "edc", 3),
        ([c, gap, d, e], "cde", 2),
        ([c, d, e, c, d, e], "cde", 4),
        ([c, e, RecipePart(tensor="d", box=Box((0,), (2,)))], "cde", 3),
    ):
        here = {"1": parts}
        blobs = sum(part.blob is not None for part in parts)
        assert assert_written(assembled(here), here, [order]).writes == 1 + blobs + writes


def test_tensors_come_in_the_order_in_which_they_lie() -> None:
    names = ["d", "b", "ids", "a"]
    recipes = {"2": [RecipePart(tensor="c")], "1": [RecipePart(tensor=name) for name in names]}
    assert [tensor.name for tensor in assembled(recipes).tensors] == [*names, "c"]
    assembly = assembled(recipes)
    b = next(tensor for tensor in assembly.tensors if tensor.name == "b")
    assert assembly.offset_of(b, 2) == 3 * 4 + 2 * 4


# --- headers, prefixes, and what is left to others ------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_headers_of_their_own_and_a_place_of_their_own(again: bool) -> None:
    header = b"another header"
    wide = [RecipePart(blob="short"), RecipePart(tensor="b"), RecipePart(tensor="c")]
    recipes = {"1": wide, "2": [RecipePart(blob="long"), RecipePart(tensor="d")]}
    assembly = assembled(recipes, prefix="m/", headers={"1": header}, replaced=("config.json",))
    if again:
        assembly = pickle.loads(pickle.dumps(assembly))
    files = Files()
    assembly.begin(files)  # type: ignore[arg-type]
    put_all(assembly, files, [SMALL])
    assert files.content == {
        "m/1": header + expected(wide[1:], base=False),
        "m/2": expected(recipes["2"], base=False),
    }
    assert all((times == 1).all() for times in files.times.values())
    assert assembly.sizes == {"1": len(files.content["m/1"]), "2": len(files.content["m/2"])}


# --- are all tensors there -----------------------------------------------------------------------

HALVES = [
    RecipePart(tensor="a", box=Box((0, 0, 0), (3, 2, 5))),
    RecipePart(tensor="a", box=Box((0, 2, 0), (3, 2, 5))),
]
OTHERS = [RecipePart(tensor=name) for name in SHAPES if name not in ("a", "none")]


@pytest.mark.parametrize(
    ("parts", "complete"),
    [
        ([RecipePart(tensor="a"), *OTHERS], True),
        ([RecipePart(tensor="head"), *OTHERS], True),
        ([*HALVES, *OTHERS], True),
        ([HALVES[0], RecipePart(tensor="a"), *OTHERS], True),
        ([HALVES[0], *OTHERS], False),
        ([HALVES[0], HALVES[0], *OTHERS], False),
        (OTHERS, False),
        ([RecipePart(tensor="a"), *OTHERS[1:]], False),
        ([RecipePart(tensor="a"), *OTHERS[:-1]], False),
        ([], False),
    ],
)
def test_files_are_complete_with_every_element(parts: list[RecipePart], complete: bool) -> None:
    assert assembled({"1": parts[:2], "2": parts[2:]}).is_complete == complete


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (RecipePart(tensor="other"), "names tensor other, which is unknown"),
        (RecipePart(tensor="b", box=Box((5,), (3,))), "names a part that tensor b does not have"),
        (RecipePart(tensor="b", box=Box((0, 0), (1, 1))), "a part that tensor b does not have"),
        (RecipePart(tensor="head", box=Box((0, 0, 5), (1, 1, 1))), "that tensor head does not"),
        (RecipePart(nbytes=3), "has bytes of no blob"),
    ],
)
def test_parts_that_cannot_be_are_damage(part: RecipePart, what: str) -> None:
    store: Any = FakeStore({"1": [part]})
    with pytest.raises(CorruptionError, match=f"the recipe of 1 .*{what}"):
        Assembly(store, [FileEntry("1", 12, recipe="1")], prefix="", in_base_dtype=False)


@pytest.mark.parametrize("size", [27, 29])
def test_a_recipe_of_another_size_than_its_file_is_damage(size: int) -> None:
    store: Any = FakeStore({"1": [RecipePart(tensor="b")]})
    with pytest.raises(CorruptionError, match=f"the recipe of 1 makes 28 bytes, not {size}"):
        Assembly(store, [FileEntry("1", size, recipe="1")], prefix="", in_base_dtype=False)
