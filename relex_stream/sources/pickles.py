"""Pickles from files we do not trust, taken apart without running any of them.

A pickle is a program that builds objects by calling classes and functions by name. Here none is
called: a name must be in the caller's table, and calling it notes what was called with what. What
comes out are plain values of Python and `Made` objects for the caller to look into.

torch's own reader (``weights_only=True``) is not used: importing torch takes a second and 250 MB,
each of its versions has its own list of classes, and it has had holes (CVE-2025-32434).
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from ..errors import SourceError
from .strict_json import shown

MAX_PICKLE_BYTES = 64 << 20
"""Longest pickle that is read: that of 70,000 sharded tensors has about 40 MB."""

_BATCH = 1 << 16
_MAX_BATCHES = 160
"""A pickle of 70,000 sharded tensors takes 9 million operations, 137 batches. None takes more than
some 80 bytes of memory besides those of the pickle, so this bounds memory as well as time."""

_MAX_STACK = 1 << 20
_MAX_INTEGER_BYTES = 9  # with longer ones, too many different keys of a dict could have one hash

_Arguments = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Known:
    """A class, function or constant that a pickle may name, equal to nothing but itself.

    Attributes
    ----------
    name : str
        For messages.
    make : callable, optional
        Takes the arguments of a call and returns what stands for its result; raises ValueError,
        with a clause, if they are not as they should be. By default the result is a `Made`.
    refusal : str, optional
        A name that is known, but not read: why, and what to do.
    """

    name: str
    make: Callable[[_Arguments], object] | None = None
    refusal: str | None = None


class Made:
    """What a pickle makes by calling something.

    Attributes
    ----------
    by : Known
        What was called.
    args : tuple
        With what.
    state : object
        What the object was then filled with, mostly a dict of its attributes; None if nothing.
    """

    __slots__ = ("args", "by", "state")

    def __init__(self, by: Known, args: _Arguments) -> None:
        self.by = by
        self.args = args
        self.state: object = None

    def __repr__(self) -> str:
        """Return its name only: what it holds may hold itself."""
        return f"<{self.by.name}>"

    def get(self, attribute: str) -> object:
        """Return an attribute, None if there is no such one."""
        return self.state.get(attribute) if type(self.state) is dict else None


def _make_dict(args: _Arguments) -> dict[object, object]:
    if args:
        raise ValueError("it holds an OrderedDict in an old form")
    return {}


ORDERED_DICT = Known("OrderedDict", make=_make_dict)
"""A plain dict stands for it; attributes that it may have are left out."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Return a context in which Python does not look for cycles among objects.

    Building many that are all kept, it would find nothing, and take as long as the building.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@collector_paused()
def load_pickle(
    data: bytes,
    where: str,
    known: Mapping[str, Known],
    persistent: Callable[[object], object] | None = None,
) -> object:
    """Take a pickle apart.

    Parameters
    ----------
    data : bytes
        All of it, of protocol 2 to 5.
    where : str
        What to call it in errors.
    known : mapping of str to Known
        What it may name: ``module.name``.
    persistent : callable, optional
        Takes a persistent id and returns what stands for it; raises ValueError, with a clause, if
        it is none. Without it there may be none.

    Returns
    -------
    object
        None, bool, int of at most 72 bits, float, str, bytes, tuple, list, dict, `Known`, `Made`,
        and what the callables return. Lists, dicts and `Made` may hold themselves; and tuples,
        few in memory, may hold each other so often that nothing should walk through all of them.
        Keys of dicts are strings, integers, None or `Made`.

    Raises
    ------
    SourceError
        If it is longer than 64 MiB, takes too much memory or time, is damaged, or names or does
        anything else.

    Examples
    --------
    >>> import pickle
    >>> from collections import OrderedDict
    >>> known = {"collections.OrderedDict": ORDERED_DICT}
    >>> load_pickle(pickle.dumps(OrderedDict(a=(1, 2.5))), "x.pt", known)
    {'a': (1, 2.5)}
    >>> load_pickle(pickle.dumps(print), "x.pt", known)
    Traceback (most recent call last):
    ...
    relex_stream.errors.SourceError: x.pt: holds a pickle of builtins.print, which is not loaded; \
use files that the trainer itself wrote
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise SourceError(
            f"{where}: its pickle has {len(data)} bytes, more than {MAX_PICKLE_BYTES}; save the "
            "tensors apart from other objects"
        )
    try:
        return _Machine(data, known, persistent).run()
    except _RefusedNameError as error:
        raise SourceError(f"{where}: {error}") from None
    except ValueError as error:
        raise SourceError(
            f"{where}: bad pickle: {error}; copy the file again or save it anew"
        ) from None
    except IndexError:  # off the end of the bytes, of the stack or of the memo
        raise SourceError(
            f"{where}: bad pickle: it is cut off or damaged; copy the file again or save it anew"
        ) from None


class _RefusedNameError(Exception):
    """The pickle names something that is not in the table, or is refused there."""


class _Machine:
    """The machine that a pickle is a program for: a stack, marks in it, a memo, no way out.

    Each operation is given where its operand begins, and returns where the next one begins.
    Reaching too far, in the bytes, the stack or the memo, raises IndexError.
    """

    def __init__(
        self,
        data: bytes,
        known: Mapping[str, Known],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.data = data
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: list[object] = []
        self.known = known
        self.persistent = persistent

    def run(self) -> object:
        """Carry out operations up to the one that ends it."""
        data, stack, memo, operations = self.data, self.stack, self.memo, _OPERATIONS
        at = 0
        for _ in range(_MAX_BATCHES):
            for _ in range(_BATCH):
                code = data[at]
                at += 1
                # Most operations are one of these three, and a call takes longer than they do.
                if code == _LONG_BINPUT:
                    index = int.from_bytes(data[at : at + 4], "little")
                    at += 4
                    if index == len(memo):
                        memo.append(stack[-1])
                    else:
                        self.remember_again(index)
                elif code == _BINGET:
                    stack.append(memo[data[at]])
                    at += 1
                elif code == _BININT1:
                    stack.append(data[at])
                    at += 1
                elif code == _STOP:
                    return self.end(at)
                else:
                    at = operations[code](self, at)
            if len(stack) + len(self.marks) > _MAX_STACK:
                break
        raise ValueError("it builds more than a checkpoint needs")

    def end(self, at: int) -> object:
        result = self.stack.pop()
        if self.stack or self.marks or at != len(self.data):
            raise ValueError(f"it ends at byte {at}, but not all of it does")
        return result

    def operand(self, at: int, size: int) -> tuple[bytes, int]:
        """Return bytes after a number of `size` bytes that counts them, and where they end."""
        start = at + size
        end = start + int.from_bytes(self.data[at:start], "little")
        if end > len(self.data):
            raise IndexError
        return self.data[start:end], end

    def marked(self) -> list[object]:
        """Return what lies above the last mark, and take both away."""
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def remember_again(self, index: int) -> None:
        if index > len(self.memo):  # picklers count up, and a far index would make it large
            raise ValueError("its memo has gaps")
        self.memo[index : index + 1] = [self.stack[-1]]

    # Operations, in the words of the module pickletools.

    def proto(self, at: int) -> int:
        version = self.data[at]
        if not 2 <= version <= 5:
            raise ValueError(f"it has protocol {version} where 2 to 5 are read")
        return at + 1

    def frame(self, at: int) -> int:
        return at + 8  # how much follows: of use to those who read from a stream

    def mark(self, at: int) -> int:
        self.marks.append(len(self.stack))
        return at

    def none(self, at: int) -> int:
        self.stack.append(None)
        return at

    def newtrue(self, at: int) -> int:
        self.stack.append(True)
        return at

    def newfalse(self, at: int) -> int:
        self.stack.append(False)
        return at

    def binint2(self, at: int) -> int:
        self.stack.append(int.from_bytes(self.data[at : at + 2], "little"))
        return at + 2

    def binint(self, at: int) -> int:
        self.stack.append(int.from_bytes(self.data[at : at + 4], "little", signed=True))
        return at + 4

    def long1(self, at: int) -> int:
        digits, end = self.operand(at, 1)
        if len(digits) > _MAX_INTEGER_BYTES:
            raise ValueError(f"it holds an integer of {len(digits)} bytes")
        self.stack.append(int.from_bytes(digits, "little", signed=True))
        return end

    def binfloat(self, at: int) -> int:
        digits = self.data[at : at + 8]
        if len(digits) < 8:
            raise IndexError
        self.stack.append(struct.unpack(">d", digits)[0])
        return at + 8

    def text(self, at: int, size: int) -> int:
        encoded, end = self.operand(at, size)
        try:
            self.stack.append(str(encoded, "utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise ValueError("it holds text that is not UTF-8") from None
        return end

    def short_binunicode(self, at: int) -> int:
        return self.text(at, 1)

    def binunicode(self, at: int) -> int:
        return self.text(at, 4)

    def binunicode8(self, at: int) -> int:
        return self.text(at, 8)

    def short_binbytes(self, at: int) -> int:
        content, end = self.operand(at, 1)
        self.stack.append(content)
        return end

    def binbytes(self, at: int) -> int:
        content, end = self.operand(at, 4)
        self.stack.append(content)
        return end

    def empty_tuple(self, at: int) -> int:
        self.stack.append(())
        return at

    def tuple1(self, at: int) -> int:
        self.stack[-1] = (self.stack[-1],)
        return at

    def tuple2(self, at: int) -> int:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)
        return at

    def tuple3(self, at: int) -> int:
        last, middle = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)
        return at

    def tuple_(self, at: int) -> int:
        items = self.marked()
        self.stack.append(tuple(items))
        return at

    def empty_list(self, at: int) -> int:
        self.stack.append([])
        return at

    def append(self, at: int) -> int:
        return self.extend([self.stack.pop()], at)

    def appends(self, at: int) -> int:
        return self.extend(self.marked(), at)

    def extend(self, items: list[object], at: int) -> int:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("it appends to what is no list")
        target.extend(items)
        return at

    def empty_dict(self, at: int) -> int:
        self.stack.append({})
        return at

    def setitem(self, at: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        return self.set_items([key, value], at)

    def setitems(self, at: int) -> int:
        return self.set_items(self.marked(), at)

    def set_items(self, items: list[object], at: int) -> int:
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is no dict")
        # The hash of a tuple can take for ever: tuples may hold each other many times over.
        for kind in set(map(type, keys)) - _KEYS:
            raise ValueError(f"it has a key of type {kind.__name__} in a dict")
        target.update(zip(keys, items[1::2], strict=True))
        return at

    def binput(self, at: int) -> int:
        self.remember_again(self.data[at])
        return at + 1

    def memoize(self, at: int) -> int:
        self.memo.append(self.stack[-1])
        return at

    def long_binget(self, at: int) -> int:
        self.stack.append(self.memo[int.from_bytes(self.data[at : at + 4], "little")])
        return at + 4

    def global_(self, at: int) -> int:
        # No name is longer; and without a bound each of many could look through all the rest.
        lines = self.data[at : at + 1000].split(b"\n", 2)
        if len(lines) < 3:
            raise IndexError
        module, name, _ = lines
        self.push_named(module.decode("utf-8", "replace"), name.decode("utf-8", "replace"))
        return at + len(module) + len(name) + 2

    def stack_global(self, at: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_named(module, name)
        return at

    def push_named(self, module: object, name: object) -> None:
        full_name = f"{module}.{name}" if type(module) is type(name) is str else ""
        known = self.known.get(full_name)
        if known is None:
            label = full_name[:200] if full_name.isprintable() else shown(full_name)
            raise _RefusedNameError(
                f"holds a pickle of {label or 'what has no name'}, which is not loaded; use files "
                "that the trainer itself wrote"
            )
        if known.refusal is not None:
            raise _RefusedNameError(known.refusal)
        self.stack.append(known)

    def call(self, at: int) -> int:
        args = self.stack.pop()
        called = self.stack[-1]
        if type(called) is not Known or type(args) is not tuple:
            raise ValueError("it calls what is no class or function")
        self.stack[-1] = Made(called, args) if called.make is None else called.make(args)
        return at

    def build(self, at: int) -> int:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Made and target.state is None:
            target.state = state
        elif type(target) is not dict:  # attributes of an OrderedDict are left out
            raise ValueError("it gives a state to what has none")
        return at

    def binpersid(self, at: int) -> int:
        if self.persistent is None:
            raise ValueError("it points to something outside of it")
        self.stack[-1] = self.persistent(self.stack[-1])
        return at

    def unknown(self, at: int) -> NoReturn:
        code = self.data[at - 1 : at]
        raise ValueError(f"it has operation {shown(code)}, which no checkpoint needs")


_KEYS = {str, int, bool, type(None), Made}

_STOP, _LONG_BINPUT, _BINGET, _BININT1 = b".rhK"

_OPERATIONS: list[Callable[[_Machine, int], int]] = [_Machine.unknown] * 256
for _code, _operation in {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"N": _Machine.none,
    b"\x88": _Machine.newtrue,
    b"\x89": _Machine.newfalse,
    b"M": _Machine.binint2,
    b"J": _Machine.binint,
    b"\x8a": _Machine.long1,
    b"G": _Machine.binfloat,
    b"\x8c": _Machine.short_binunicode,
    b"X": _Machine.binunicode,
    b"\x8d": _Machine.binunicode8,
    b"C": _Machine.short_binbytes,
    b"B": _Machine.binbytes,
    b")": _Machine.empty_tuple,
    b"\x85": _Machine.tuple1,
    b"\x86": _Machine.tuple2,
    b"\x87": _Machine.tuple3,
    b"t": _Machine.tuple_,
    b"]": _Machine.empty_list,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"}": _Machine.empty_dict,
    b"s": _Machine.setitem,
    b"u": _Machine.setitems,
    b"q": _Machine.binput,
    b"\x94": _Machine.memoize,
    b"j": _Machine.long_binget,
    b"c": _Machine.global_,
    b"\x93": _Machine.stack_global,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.binpersid,
}.items():
    _OPERATIONS[_code[0]] = _operation
