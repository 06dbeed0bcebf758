import os
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from relex_stream.errors import SourceError
from relex_stream.sources.torch_file import (
    StoredView,
    are_sizes,
    read_torch_file,
    read_torch_region,
)
from relex_stream.sources.torch_zip import Span
from relex_stream.specs import DTYPES
from tests.torch_writers.by_hand import Call, Name, Pointer, dumps, tensor, write_archive

CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def content(path, known=()):
    return read_torch_file(path, dict(known))[0]


def refused(path):
    with pytest.raises(SourceError) as caught:
        content(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored(path, view):
    count = int(np.prod(view.shape, dtype=int)) * view.dtype.itemsize
    return path.read_bytes()[view.offset : view.offset + count]


def rebuilt(path, found, start=0, size=None):
    """The region from its literals and storages; each byte must come from one of them."""
    data = path.read_bytes()
    runs = [(offset, literal) for offset, literal in found.literals]
    runs += [
        (span.offset, data[span.offset : span.offset + span.nbytes]) for span in found.storages
    ]
    at = start
    for offset, piece in sorted(runs, key=lambda run: (run[0], len(run[1]))):
        assert offset == at
        at += len(piece)
    assert at == start + (len(data) if size is None else size)
    return b"".join(piece for _, piece in sorted(runs, key=lambda run: (run[0], len(run[1]))))


def test_every_dtype_lies_where_torch_finds_it(path):
    numbers = torch.arange(1, 25)
    saved = {
        str(dtype): numbers.to(torch.uint8).view(dtype)
        if dtype is torch.float8_e8m0fnu
        else numbers.to(dtype)
        for dtype in CODES
    }
    torch.save(saved, path)
    again = torch.load(path, weights_only=True)
    value = content(path).value
    assert list(value) == list(again) == list(map(str, CODES))
    for (dtype, code), (name, view) in zip(CODES.items(), value.items(), strict=True):
        assert view == StoredView(DTYPES[code], (24,), view.offset, row_major=True)
        assert again[name].dtype is dtype
        assert stored(path, view) == raw(again[name])


def test_shapes_views_and_wrappers(path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    saved = OrderedDict(
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 3),
        whole=whole,
        inner=whole[1],
        ones=torch.ones(1, 5, 1).expand(1, 5, 1),
        thin=whole[1:2, 0:1],
        parameter=torch.nn.Parameter(whole[0, 1]),
        again=whole,
        nested=[{"x": whole[1, 2:]}],
        number=3,
    )
    saved._metadata = {"version": 1}
    torch.save(saved, path)
    value = content(path).value
    again = torch.load(path, weights_only=True)
    for name in ("scalar", "empty", "whole", "inner", "ones", "thin", "parameter", "again"):
        assert value[name].row_major, name
        assert value[name].shape == tuple(again[name].shape)
        assert stored(path, value[name]) == raw(again[name].detach())
    assert value["again"] == value["whole"]
    assert stored(path, value["nested"][0]["x"]) == raw(whole[1, 2:])
    assert value["number"] == 3


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4).T, torch.zeros(3, 4)[:, 1:], torch.zeros(6)[::2], torch.zeros(1).expand(3)],
    ids=["transposed", "columns", "every other", "expanded"],
)
def test_what_does_not_lie_in_row_major_order_says_so(path, tensor):
    torch.save(tensor, path)
    assert content(path).value.row_major is False


def test_a_file_is_its_literals_and_storages(path):
    torch.save({str(n): torch.full((n,), n, dtype=torch.int16) for n in range(200)}, path)
    found, status = read_torch_file(path, {})
    assert rebuilt(path, found) == path.read_bytes()
    assert (status.st_size, status.st_mtime_ns) == (
        os.stat(path).st_size,
        os.stat(path).st_mtime_ns,
    )


def test_a_region_of_a_larger_file(path):
    other = path.with_name("other.pt")
    torch.save(torch.arange(1000.0), other)
    path.write_bytes(b"head" + other.read_bytes() + b"tail")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = read_torch_region(descriptor, "there", 4, other.stat().st_size, {})
        assert stored(path, found.value) == raw(torch.arange(1000.0))
        assert rebuilt(path, found, 4, other.stat().st_size) == other.read_bytes()
        with pytest.raises(SourceError, match=r"^there: truncated"):
            read_torch_region(descriptor, "there", 4, other.stat().st_size - 1, {})
    finally:
        os.close(descriptor)


def test_little_is_read(path, monkeypatch):
    torch.save({str(n): torch.zeros(100_000) for n in range(20)}, path)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args[1]) or pread(*args))
    content(path)
    assert len(reads) <= 20 + 3
    assert sum(reads) < 120_000 < path.stat().st_size


def test_archives_of_pythons_zipfile_and_without_a_byteorder(path):
    value = {"a": tensor("0", (2, 3), count=6), "b": tensor("1", (4,), "BoolStorage", count=4)}
    write_archive(path, value, {"0": bytes(range(24)), "1": b"abcd"})
    found = content(path)
    assert [stored(path, view) for view in found.value.values()] == [bytes(range(24)), b"abcd"]
    assert rebuilt(path, found) == path.read_bytes()
    with zipfile.ZipFile(path, "w") as file:  # torch before 2.1
        file.writestr("archive/data.pkl", dumps([1]))
    assert content(path).value == [1]


def test_zip64_sizes(path):
    """Records beyond 4 GiB: of holes, so that they take no disk."""
    size = (4 << 30) + 8
    names = [b"a/data.pkl", b"a/data/0", b"a/data/1"]
    pickle = dumps([tensor("1", (1,), count=1)])
    contents = [len(pickle), size, 4]
    offsets, at = [], 0
    with path.open("wb") as file:
        for name, nbytes in zip(names, contents, strict=True):
            offsets.append(at)
            file.seek(at)
            file.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", *[0] * 8, len(name), 0) + name)
            if name == names[0]:
                file.write(pickle)
            if name == names[2]:
                file.write(b"last")
            at += 30 + len(name) + nbytes
        file.seek(at)
        begin = at
        for name, nbytes, offset in zip(names, contents, offsets, strict=True):
            extra = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, offset)
            far = 0xFFFFFFFF
            entry = (b"PK\x01\x02", *[0] * 6, 0, far, far, len(name), len(extra), *[0] * 4, far)
            file.write(struct.pack("<4s6H3I5H2I", *entry) + name + extra)
        end = file.tell()
        sizes = (3, 3, end - begin, begin)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *sizes))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, far, far, 0))
    found = content(path)
    assert found.storages == (Span(offsets[1] + 38, size), Span(offsets[2] + 38, 4))
    with path.open("rb") as file:
        file.seek(found.value[0].offset)
        assert file.read(4) == b"last"


# What is refused.


def test_files_that_are_no_archives(path):
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert refused(path) == (
        "in the format of torch before 1.6; load it and save it anew with a later torch"
    )
    path.write_bytes(b"version https://git-lfs")
    assert "not a file of torch.save" in refused(path)
    path.write_bytes(b"")
    assert "not a file of torch.save" in refused(path)
    path.unlink()
    assert "No such file" in refused(path)
    os.mkfifo(path)
    assert "not a regular file" in refused(path)


def test_a_file_that_is_cut_off_anywhere(path):
    torch.save({"a": torch.zeros(2), "b": torch.ones(3)}, path)
    data = path.read_bytes()
    for end in range(4, len(data), 7):
        path.write_bytes(data[:end])
        assert "truncated, or still being written" in refused(path)


def test_a_file_that_gets_shorter_while_it_is_read(path, monkeypatch):
    torch.save({str(n): torch.zeros(100_000) for n in range(3)}, path)
    pread = os.pread

    def cut_then_read(*args):
        os.truncate(path, 2000)
        return pread(*args)

    monkeypatch.setattr(os, "pread", cut_then_read)
    assert "truncated" in refused(path)


def test_flipped_bytes_never_raise_anything_else(path):
    torch.save({"a": torch.zeros(2), "b": torch.ones(3)[1:]}, path)
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            for view in content(path).value.values():
                assert view is None or 0 <= view.offset <= len(data)
        except SourceError:
            pass


def test_other_byte_orders_and_no_pickle(path):
    write_archive(path, {}, {}, byteorder=b"big")
    assert "written with byte order b'big'" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data/0", b"abcd")
    assert "an archive without data.pkl" in refused(path)


def archive(path, *records, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in records:
            file.writestr(name, data)
    return path


def test_archives_that_torch_does_not_write(path):
    pickle = ("a/data.pkl", dumps({}))
    archive(path, pickle, ("a/data/0", bytes(1000)), compression=zipfile.ZIP_DEFLATED)
    assert "record 'data.pkl' is compressed or encrypted" in refused(path)
    archive(path, pickle, ("b/data/0", b"x"))
    assert "its directory has a record b'b/data/0'" in refused(path)
    archive(path, ("data.pkl", dumps({})))
    assert "its directory has a record b'data.pkl'" in refused(path)
    archive(path, pickle, ("a/code.py", bytes(70_000)))
    assert "record 'code.py' has 70000 bytes, more than 65536" in refused(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, pickle, ("a/data/0", b"x"), ("a/data/0", b"y"))
    assert "two of its records have one name" in refused(path)


def test_directories_that_lie(path):
    records = (("a/data.pkl", dumps({})), ("a/data/0", bytes(100)), ("a/data/1", bytes(100)))
    archive(path, *records)
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", directory + 4)
    third = data.index(b"PK\x01\x02", second + 4)
    name = data.index(b"a/data/1")
    lies = {
        "overlaps another": (second + 20, struct.pack("<2I", 101, 101)),
        "directory overlaps a record": (third + 20, struct.pack("<2I", 101, 101)),
        "is not where its directory says": (name, b"a/data/2"),
        "points outside of it": (third + 42, b"\xf0\xff\xff\x7f"),
        "is compressed or encrypted": (second + 8, b"\x01\x00"),
        "has a record": (second, b"PK\x01\x03"),
        "lacks sizes over 4 GiB": (second + 20, b"\xff" * 8),
    }
    for problem, (at, change) in lies.items():
        path.write_bytes(data[:at] + change + data[at + len(change) :])
        assert problem in refused(path), problem
    end = data.index(b"PK\x05\x06")
    for at, change, problem in (
        (end + 10, b"\x04\x00", "3 records where 4 are announced"),
        (end + 12, b"\xff\xff\xff\x7f", "is not before its end"),
        (end + 16, b"\x00\x00\x00\x00", "is not before its end"),
    ):
        path.write_bytes(data[:at] + change + data[at + len(change) :])
        assert problem in refused(path)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_gaps_where_bytes_could_hide(path, place):
    with path.open("wb") as stream:
        file = zipfile.ZipFile(stream, "w")
        for number, name in enumerate(("a/data.pkl", "a/data/0", "a/data/1", None)):
            if number == place:
                stream.seek(25, os.SEEK_CUR)
                file.start_dir = stream.tell()
            if name is not None:
                file.writestr(name, dumps({}))
        file.close()
    assert "follows a gap" in refused(path)


STORAGE = ("storage", Name("torch", "FloatStorage"), "0", "cpu", 6)
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")


def rebuilt_from(*arguments):
    return Call(TENSOR, arguments)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (Pointer(("module", 1, 2, 3, 4)), "points to ('module', 1, 2, 3, 4), which is no storage"),
        (Pointer(("storage", Name("torch", "Size"), "0", "cpu", 6)), "a storage of type"),
        (Pointer((*STORAGE[:2], "9", "cpu", 6)), "storage '9' is not in the file"),
        (Pointer((*STORAGE[:4], 7)), "storage 0 has 24 bytes where 7 elements belong"),
        (Pointer((*STORAGE[:4], -6)), "storage 0 has 24 bytes where -6 elements belong"),
        (rebuilt_from("no storage", 0, (1,), (1,)), "a tensor without a storage"),
        (rebuilt_from(), "a tensor without a storage"),
        (rebuilt_from(Pointer(STORAGE), *range(9)), "a tensor without a storage"),
        (rebuilt_from(Pointer(STORAGE), 1, (6,), (1,)), "reaches out of its storage"),
        (rebuilt_from(Pointer(STORAGE), 0, (2, 3), (4, 1)), "reaches out of its storage"),
        (rebuilt_from(Pointer(STORAGE), 0, (2**31 - 1,) * 3, (1, 1, 1)), "reaches out"),
        (rebuilt_from(Pointer(STORAGE), -1, (1,), (1,)), "a tensor of shape (1,)"),
        (rebuilt_from(Pointer(STORAGE), 0, (1,), (-1,)), "a tensor of shape (1,)"),
        (rebuilt_from(Pointer(STORAGE), 0, (1, 1), (1,)), "a tensor of shape (1, 1)"),
        (rebuilt_from(Pointer(STORAGE), 0, [6], [1]), "a tensor of shape [6]"),
        (rebuilt_from(Pointer(STORAGE), 0, (1,) * 65, (1,) * 65), "a tensor of shape (1, 1,"),
        (rebuilt_from(Pointer(STORAGE), 0, (True,), (1,)), "a tensor of shape (True,)"),
        (rebuilt_from(Pointer(STORAGE), 0, (6,), (1,), False, {}, {"conj": True}), "conjugated"),
        (Call(Name("torch._utils", "_rebuild_qtensor"), ()), "holds quantised tensors"),
        (Name("torch", "QInt8Storage"), "holds quantised tensors"),
        (Call(Name("torch._utils", "_rebuild_sparse_tensor"), ()), "holds sparse tensors"),
        (
            Call(Name("torch._utils", "_rebuild_meta_tensor_no_storage"), ()),
            "holds tensors without data",
        ),
        (Name("torch.jit", "load"), "holds a pickle of torch.jit.load, which is not loaded"),
    ],
)
def test_pickles_that_lie(path, value, problem):
    write_archive(path, {"a": value}, {"0": bytes(24)})
    message = refused(path)
    assert problem in message
    assert "; " in message  # and what to do about it


def test_a_tensor_of_bytes_needs_a_dtype(path):
    untyped = Pointer(("storage", Name("torch.storage", "UntypedStorage"), "0", "cpu", 24))
    for extra in ((), (Name("torch", "Size"),), (3,)):
        value = rebuilt_from(untyped, 0, (6,), (1,), False, {}, *extra)
        write_archive(path, value, {"0": bytes(24)})
        assert "a tensor without a dtype" in refused(path)


def test_sizes():
    assert are_sizes((1, 0, 2**63 - 1))
    assert are_sizes(())
    for value in ([1], (1.0,), (True,), (-1,), (2**63,), (1,) * 65, None):
        assert not are_sizes(value)
