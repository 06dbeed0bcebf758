"""The zip archives that ``torch.save`` writes: which bytes are storages, and what is around them.

Only what torch writes is read: records one after another, stored and not compressed, the directory
of all of them at the end. An archive may be a file or a region of one.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import SourceError
from .pickles import MAX_PICKLE_BYTES
from .strict_json import shown

_MOST_DIRECTORY_BYTES = 128 << 20
_MOST_OTHER_BYTES = 64 << 10
"""Of a record that is neither the pickle nor a storage: version numbers and the like."""

_READ_BYTES = 4096
_GUESSED_EXTRA = 128
_LONGEST_DESCRIPTOR = 24

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_IN_EXTRA = 0xFFFFFFFF

PICKLE = "data.pkl"
_STORAGES = "data/"

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of ``torch.save`` before torch 1.6 begin."""

_AGAIN = "copy it again or save it anew"


class Span(NamedTuple):
    """A run of bytes of a file."""

    offset: int
    nbytes: int


@dataclass
class TorchZip:
    """An archive of ``torch.save``, taken apart; offsets are those in the file it lies in.

    Attributes
    ----------
    storages : dict of str to Span
        Where each storage lies, by its key in the pickle, in the order of the bytes.
    records : dict of str to bytes
        The other records, by name, `PICKLE` among them.
    literals : list of (int, bytes)
        Offset and bytes of all that is no storage, in that order too.
    """

    storages: dict[str, Span] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)
    literals: list[tuple[int, bytes]] = field(default_factory=list)


def read_torch_zip(descriptor: int, where: str, offset: int, size: int) -> TorchZip:
    """Read an archive, all but its storages.

    Parameters
    ----------
    descriptor : int
        Of an open file.
    where : str
        What to call the archive in errors.
    offset, size : int
        Where it lies in the file, in bytes.

    Returns
    -------
    TorchZip
        Storages and literals cover it without gap or overlap.

    Raises
    ------
    SourceError
        If it is truncated, or anything but what torch writes.
    OSError
        If it cannot be read.

    Notes
    -----
    Reads some 4 KiB at each end and before each storage, and nothing twice.
    """
    region = _Region(descriptor, where, offset, size)
    entries, directory_at = _read_directory(region)
    result = TorchZip()
    start = at = 0  # of the literal that is being put together; of what is not yet accounted for
    for run in _runs(entries):
        region.read(start, min(_guessed_data(run[-1]), size))  # all of the run, in one go
        for entry in run:
            data_at = _find_data(region, entry)
            end = data_at + entry.nbytes
            if not at <= entry.header_at <= at + _LONGEST_DESCRIPTOR:
                raise region.bad(f"record {shown(entry.name)} overlaps another or follows a gap")
            if entry.is_storage:
                key = entry.name.removeprefix(_STORAGES)
                result.literals.append((offset + start, region.read(start, data_at)))
                result.storages[key] = Span(offset + data_at, entry.nbytes)
                start = end
            else:
                result.records[entry.name] = region.read(data_at, end)
            at = end
    if not at <= directory_at <= at + _LONGEST_DESCRIPTOR:
        raise region.bad("its directory overlaps a record or follows a gap")
    result.literals.append((offset + start, region.read(start, size)))
    return result


class _Entry(NamedTuple):
    """A record as the directory has it; sorts by where it lies."""

    header_at: int
    nbytes: int
    name: str

    @property
    def is_storage(self) -> bool:
        return self.name.startswith(_STORAGES)


class _Region:
    """A part of a file, read a few thousand bytes at a time."""

    def __init__(self, descriptor: int, where: str, offset: int, size: int) -> None:
        self.descriptor = descriptor
        self.where = where
        self.offset = offset
        self.size = size
        self._start = 0
        self._chunk = b""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, counted from the region's first."""
        if not 0 <= start <= stop <= self.size:
            raise self.bad("its directory points outside of it")
        if start < self._start or stop > self._start + len(self._chunk):
            wanted = min(max(stop, start + _READ_BYTES), self.size) - start
            self._chunk, self._start = self._read_at(start, wanted), start
        return self._chunk[start - self._start : stop - self._start]

    def _read_at(self, start: int, wanted: int) -> bytes:
        chunks: list[bytes] = []
        while wanted:
            chunk = os.pread(self.descriptor, wanted, self.offset + start)
            if not chunk:
                raise self.truncated()
            chunks.append(chunk)
            start += len(chunk)
            wanted -= len(chunk)
        return b"".join(chunks)

    def bad(self, problem: str) -> SourceError:
        return SourceError(f"{self.where}: not as torch.save writes it: {problem}; {_AGAIN}")

    def truncated(self) -> SourceError:
        return SourceError(
            f"{self.where}: truncated, or still being written: its {self.size} bytes do not end "
            f"with the directory of a zip archive; {_AGAIN}"
        )

    def unrecognised(self) -> SourceError:
        """Return why there is no directory at the end."""
        head = self.read(0, min(self.size, len(_LEGACY)))
        if head == _LEGACY:
            return SourceError(
                f"{self.where}: in the format of torch before 1.6; load it and save it anew with a "
                "later torch"
            )
        if head.startswith(b"PK\x03\x04"):
            return self.truncated()
        return SourceError(
            f"{self.where}: not a file of torch.save: it does not begin as a zip archive does; "
            "check where it comes from"
        )


def _read_directory(region: _Region) -> tuple[list[_Entry], int]:
    """Return all records in the order of their bytes, and where the directory begins."""
    size = region.size
    # The end first; most directories come with it.
    tail = region.read(max(0, size - _READ_BYTES), size)
    if len(tail) < _END.size or not tail[-_END.size :].startswith(b"PK\x05\x06"):
        raise region.unrecognised()
    _, _, _, _, count, nbytes, begin, _ = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\x06\x07"):
        _, _, end, _ = _LOCATOR.unpack(locator)
        record = region.read(end, min(end + _END64.size, size))
        if len(record) < _END64.size or not record.startswith(b"PK\x06\x06"):
            raise region.bad("its directory has no end")
        *_, count, nbytes, begin = _END64.unpack(record)
    if begin + nbytes != end or nbytes > _MOST_DIRECTORY_BYTES:
        raise region.bad(f"its directory of {nbytes} bytes is not before its end")
    entries = _parse_directory(region, region.read(begin, end))
    if len(entries) != count:
        raise region.bad(f"its directory has {len(entries)} records where {count} are announced")
    if len({entry.name for entry in entries}) < len(entries):
        raise region.bad("two of its records have one name")
    return sorted(entries), begin


def _parse_directory(region: _Region, directory: bytes) -> list[_Entry]:
    entries: list[_Entry] = []
    prefix = None
    at = 0
    while at < len(directory):
        if at + _ENTRY.size > len(directory):
            raise region.bad("its directory is cut off")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, packed, nbytes, name_length, extra_length, comment_length = (
            fields[3],
            fields[4],
            *fields[8:13],
        )
        header_at = fields[-1]
        at += _ENTRY.size
        raw_name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        nbytes, packed, header_at = _long_sizes(region, extra, nbytes, packed, header_at)
        archive, _, name = raw_name.decode("utf-8", "replace").partition("/")
        if fields[0] != b"PK\x01\x02" or not name or prefix not in (None, archive):
            raise region.bad(f"its directory has a record {shown(raw_name)}")
        prefix = archive
        if method or flags & 1 or packed != nbytes:
            raise SourceError(
                f"{region.where}: record {shown(name)} is compressed or encrypted; unpack it and "
                "save it anew with torch.save"
            )
        entry = _Entry(header_at, nbytes, name)
        most = MAX_PICKLE_BYTES if name == PICKLE else _MOST_OTHER_BYTES
        if nbytes > most and not entry.is_storage:
            raise region.bad(f"record {shown(name)} has {nbytes} bytes, more than {most}")
        entries.append(entry)
    return entries


def _long_sizes(region: _Region, extra: bytes, *sizes: int) -> list[int]:
    """Return sizes with those that do not fit into 32 bits taken from the extra field."""
    if _IN_EXTRA not in sizes:
        return list(sizes)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        values = extra[at + 4 : at + 4 + length]
        if kind == 1:
            long = iter(struct.unpack(f"<{len(values) // 8}Q", values[: len(values) // 8 * 8]))
            result = [next(long, size) if size == _IN_EXTRA else size for size in sizes]
            if _IN_EXTRA not in result:
                return result
        at += 4 + length
    raise region.bad("its directory lacks sizes over 4 GiB")


def _runs(entries: list[_Entry]) -> list[list[_Entry]]:
    """Cut records into runs that end with a storage each, but perhaps the last."""
    runs: list[list[_Entry]] = [[]]
    for entry in entries:
        runs[-1].append(entry)
        if entry.is_storage:
            runs.append([])
    return [run for run in runs if run]


def _guessed_data(entry: _Entry) -> int:
    """Return a place where, or shortly before or after which, the record's bytes begin."""
    return entry.header_at + _LOCAL.size + len(entry.name) + _GUESSED_EXTRA


def _find_data(region: _Region, entry: _Entry) -> int:
    """Return where a record's bytes begin, from the header in front of it."""
    fixed = entry.header_at + _LOCAL.size
    header = _LOCAL.unpack(region.read(entry.header_at, fixed))
    signature, method = header[0], header[3]
    name_length: int = header[9]
    extra_length: int = header[10]
    raw_name = region.read(fixed, fixed + name_length)
    name = raw_name.decode("utf-8", "replace").partition("/")[2]
    if signature != b"PK\x03\x04" or method or name != entry.name:
        raise region.bad(f"record {shown(entry.name)} is not where its directory says")
    return fixed + name_length + extra_length
