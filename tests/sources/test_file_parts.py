import itertools

from hypothesis import given
from hypothesis import strategies as st

from relex_stream.sources import file_parts
from relex_stream.sources.file_parts import lay_out
from relex_stream.specs import FilePart


@given(st.data())
def test_parts_are_the_file(data):
    """Whatever lies where: tensors that overlap or are empty, literals, and gaps between them."""
    file = data.draw(st.binary(max_size=60))
    runs, tensors, literals = {}, [], []
    borders = sorted(data.draw(st.lists(st.integers(0, len(file)), max_size=12)))
    for begin, end in itertools.pairwise(borders):
        kind = data.draw(st.sampled_from(["tensor", "literal", "gap", "again"]))
        name = f"t{len(runs)}"
        if kind == "literal":
            literals.append((begin, file[begin:end]))
        elif kind != "gap":
            runs[name] = file[begin:end]
            tensors.append((begin, end - begin, FilePart(tensor=name)))
            if kind == "again":
                tensors.append((begin, (end - begin) // 2, FilePart(tensor="a copy of a half")))
    parts = lay_out(len(file), literals, tensors, lambda at, count: file[at : at + count])
    assert b"".join(runs[part.tensor] if part.tensor else part.literal for part in parts) == file
    assert {part.tensor for part in parts} - {None} == {name for name, run in runs.items() if run}
    kinds = [part.tensor is None for part in parts]
    assert not any(one and other for one, other in itertools.pairwise(kinds))


def test_too_much_padding(monkeypatch):
    monkeypatch.setattr(file_parts, "MAX_PADDING_BYTES", 5)
    read = bytes(20).__getitem__

    def slices(at, count):
        return read(slice(at, at + count))

    tensor = FilePart(tensor="a")
    assert lay_out(12, [(4, b"1234")], [(8, 3, tensor)], slices) is not None  # 4 before, 1 after
    assert lay_out(13, [(4, b"1234")], [(8, 3, tensor)], slices) is None
