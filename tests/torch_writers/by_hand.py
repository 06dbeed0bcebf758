"""Pickles and archives put together by hand: those of other versions of torch, and hostile ones."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Name:
    """A class or function, by module and name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What comes of calling one: by REDUCE, or for `new` objects by NEWOBJ; then its state."""

    called: Name
    args: tuple = ()
    state: object = None
    new: bool = False


@dataclass(frozen=True)
class Pointer:
    """A persistent id."""

    identity: tuple


@dataclass
class _Writer:
    out: bytearray = field(default_factory=bytearray)
    memo: dict[int, int] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)

    def put(self, value: object) -> None:
        if id(value) in self.memo:
            self.out += b"j" + struct.pack("<I", self.memo[id(value)])
        elif isinstance(value, dict | list | tuple):
            self.put_container(value)
        elif isinstance(value, Pointer):
            self.put(value.identity)
            self.out += b"Q"
        elif isinstance(value, Call):
            self.put(value.called)
            self.put(value.args)
            self.out += b"\x81" if value.new else b"R"
            if value.state is not None:
                self.put(value.state)
                self.out += b"b"
        else:
            self.out += _atom(value)
        if isinstance(value, dict | list | Call) and id(value) not in self.memo:
            # So that what is one object stays one.
            self.out += b"r" + struct.pack("<I", len(self.memo))
            self.memo[id(value)] = len(self.memo)
            self.kept.append(value)

    def put_container(self, value: dict | list | tuple) -> None:
        begin, end = {dict: (b"}(", b"u"), list: (b"](", b"e"), tuple: (b"(", b"t")}[type(value)]
        self.out += begin
        for item in value:
            self.put(item)
            if isinstance(value, dict):
                self.put(value[item])
        self.out += end


def _atom(value: object) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    assert isinstance(value, Name), f"no pickle of {value!r}"
    return f"c{value.module}\n{value.name}\n".encode()


def dumps(value: object) -> bytes:
    """Return a pickle of protocol 2."""
    writer = _Writer()
    writer.put(value)
    return b"\x80\x02" + bytes(writer.out) + b"."


def write_archive(
    path: Path, value: object, storages: Mapping[str, bytes], *, byteorder: bytes = b"little"
) -> Path:
    """Write a file such as ``torch.save`` would, with Python's zip writer and without padding."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", value if isinstance(value, bytes) else dumps(value))
        file.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", b"3\n")
    return path


def tensor(key: str, shape: tuple[int, ...], kind: str = "FloatStorage", *, count: int) -> Call:
    """A whole storage seen as a contiguous tensor."""
    strides = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    storage = Pointer(("storage", Name("torch", kind), key, "cpu", count))
    hooks = Call(Name("collections", "OrderedDict"))
    arguments = (storage, 0, shape, strides, False, hooks)
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), arguments)
