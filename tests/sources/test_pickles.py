import contextlib
import gc
import pickle
import pickletools
import time
from collections import OrderedDict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relex_stream.errors import SourceError
from relex_stream.sources import pickles
from relex_stream.sources.pickles import ORDERED_DICT, Known, Made, load_pickle
from tests.torch_writers.by_hand import Call, Name, dumps

POINT = Known("Point")
KNOWN = {
    "collections.OrderedDict": ORDERED_DICT,
    "shapes.Point": POINT,
    "shapes.Old": Known("Old", refusal="holds Old shapes; draw them anew"),
}


def load(data, known=KNOWN, persistent=None):
    return load_pickle(data, "file.pt", known, persistent)


def refused(data, **arguments):
    with pytest.raises(SourceError) as caught:
        load(data, **arguments)
    message = str(caught.value)
    assert message.startswith("file.pt: ")
    return message.removeprefix("file.pt: ")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**63), 2**63 - 1) | st.none(), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(plain, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_come_back(value, protocol):
    data = pickle.dumps(value, protocol)
    assume(not any(name in data for name in (b"_codecs", b"__builtin__")))  # bytes in protocol 2
    again = load(data)
    assert again == value
    assert repr(again) == repr(value)  # True is no 1


def test_long_values_and_many_come_back():
    value = {
        "text": "x" * 70_000,
        "items": list(range(3000)),
        "keys": {str(n): n for n in range(3000)},
    }
    value["again"] = value["items"]
    for protocol in (2, 4):
        again = load(pickle.dumps(value, protocol))
        assert again == value
        assert again["again"] is again["items"]


def test_what_is_called_is_noted_and_not_called():
    origin = Call(Name("shapes", "Point"), (0, 0))
    filled = Call(Name("shapes", "Point"), (), {"x": origin, "y": [origin]}, new=True)
    made = load(dumps((filled, filled)))
    assert made[0] is made[1]
    assert isinstance(made[0], Made)
    assert (made[0].by, made[0].args) == (POINT, ())
    assert made[0].get("x") is made[0].get("y")[0]
    assert (made[0].get("x").args, made[0].get("x").state, made[0].get("z")) == ((0, 0), None, None)
    assert repr(made[0]) == "<Point>"


def test_an_ordered_dict_is_a_dict_and_its_attributes_are_left_out():
    value = OrderedDict(a=1)
    value._metadata = OrderedDict(version=1)
    for protocol in (2, 4):
        assert load(pickle.dumps(value, protocol)) == {"a": 1}


def test_an_object_may_hold_itself():
    value = []
    value.append(value)
    again = load(pickle.dumps(value))
    assert again[0] is again


def test_a_callable_stands_for_a_class_and_for_what_is_outside():
    known = {"shapes.Point": Known("Point", make=sum)}
    assert load(dumps(Call(Name("shapes", "Point"), (1, 2))), known) == 3
    data = b"\x80\x02X\x01\x00\x00\x00aQ."
    assert load(data, persistent=lambda identity: identity * 2) == "aa"
    assert "points to something outside" in refused(data)

    def deny(_):
        raise ValueError("it points nowhere")

    assert "bad pickle: it points nowhere; copy" in refused(data, persistent=deny)


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_refused_and_never_called(protocol, capsys):
    message = refused(pickle.dumps({"a": [Evil()]}, protocol))
    assert message == (
        f"holds a pickle of {'__builtin__' if protocol == 2 else 'builtins'}.print, which is not "
        "loaded; use files that the trainer itself wrote"
    )
    assert capsys.readouterr().out == ""


def test_names_that_are_refused_say_why():
    assert refused(dumps(Name("shapes", "Old"))) == "holds Old shapes; draw them anew"
    assert "holds a pickle of os.system" in refused(b"cos\nsystem\n.")
    # Not an attribute of something known, and not what only prints like it.
    assert "shapes.Point.__init__" in refused(pickle_of_name("shapes", "Point.__init__"))
    assert "shapes\\nPoint" in refused(pickle_of_name("shapes\nPoint", "x"))
    assert "what has no name" in refused(b"\x80\x04K\x01K\x02\x93.")


def pickle_of_name(module, name):
    pieces = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(pieces) + b"\x93."


def test_no_operation_can_do_more_than_a_checkpoint_needs():
    # What is left out: text of protocol 0, copies of the stack's top, instances built the old way,
    # extension codes, keyword arguments, long integers, sets, and buffers from outside.
    left_out = set(b"012FILPSTUVdgilop\x82\x83\x84\x8b\x8e\x8f\x90\x91\x92\x96\x97\x98")
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    assert {code for code in known if pickles._OPERATIONS[code] is pickles._Machine.unknown} == (
        left_out | set(b".rhK")  # and these four come before the table
    )
    for code in left_out:
        body = b"\x80\x02NNN" + bytes([code]) + b"\x01\x01\x01\x01."
        assert "which no checkpoint needs" in refused(body)


def test_damage_of_every_kind_ends_in_one_error():
    point = Call(Name("shapes", "Point"), (1,), {"x": [None, True]})
    data = dumps({"a": point, "b": (1, "text", point), "c": [1, {"d": -1}]})
    for end in range(len(data)):
        refused(data[:end])
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with contextlib.suppress(SourceError):
                load(damaged)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(data):
    for start in (b"", b"\x80\x02", b"\x80\x04}("):
        with contextlib.suppress(SourceError):
            load(start + data + b".", persistent=lambda identity: identity)


def test_trailing_bytes_and_leftovers_are_refused():
    assert "it ends at byte 4, but not all" in refused(b"\x80\x02N.N")
    assert "it ends at byte 5, but not all" in refused(b"\x80\x02NN.")
    assert "it ends at byte 5, but not all" in refused(b"\x80\x02(N.")
    assert "protocol 9" in refused(b"\x80\x09N.")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"K\x01K\x02a.", "appends to what is no list"),
        (b"K\x01K\x02K\x03s.", "sets items of what is no dict"),
        (b"}(K\x01u.", "sets items of what is no dict"),
        (b"K\x01}b.", "gives a state to what has none"),
        (b"K\x01)R.", "calls what is no class or function"),
        (b"cshapes\nPoint\nK\x01R.", "calls what is no class or function"),
        (b"cshapes\nPoint\n)R}b}b.", "gives a state to what has none"),
        (b"\x8a\x0a" + b"\x01" * 10 + b".", "an integer of 10 bytes"),
        (b"X\x01\x00\x00\x00\xff.", "text that is not UTF-8"),
        (b"ccollections\nOrderedDict\n(]tR.", "an OrderedDict in an old form"),
        (b"Nr\xff\xff\xff\x7f.", "its memo has gaps"),
        (b"Nq\x01.", "its memo has gaps"),
        (b"h\x00.", "cut off or damaged"),
        (b"X\xff\xff\xff\xffabc.", "cut off or damaged"),
        (b"\x8d" + b"\xff" * 8 + b"abc.", "cut off or damaged"),
        (b"c" + b"x" * 2000 + b"\ny\n.", "cut off or damaged"),
        (b"t.", "cut off or damaged"),
    ],
)
def test_programs_that_make_no_sense(body, problem):
    message = refused(b"\x80\x02" + body)
    assert problem in message
    assert message.startswith("bad pickle: ")
    assert message.endswith("; copy the file again or save it anew")


def test_keys_whose_hash_could_take_for_ever_are_refused():
    # A tuple of itself twice, doubled 60 times over: 2**60 steps to hash, and to compare.
    doubled = b")" + b"q\x00h\x00\x86" * 60
    start = time.perf_counter()
    assert load(b"\x80\x02" + doubled + b".")[0]
    for body in (b"}" + doubled + b"Ns.", b"}(" + doubled + b"Nu."):
        assert "a key of type tuple" in refused(b"\x80\x02" + body)
    assert "a key of type float" in refused(b"\x80\x02}G" + b"\0" * 8 + b"Ns.")
    assert "a key of type list" in refused(b"\x80\x02}]Ns.")
    assert "which is no" not in str(load(b"\x80\x02}cshapes\nPoint\n)RNs."))
    assert time.perf_counter() - start < 5


def test_size_depth_and_work_are_bounded(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    assert refused(b"\x80\x02" + b" " * 100).startswith("its pickle has 102 bytes, more than 100")
    monkeypatch.undo()
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    value = load(deep)  # nothing here recurses
    while value:
        value = value.pop()
    monkeypatch.setattr(pickles, "_BATCH", 100)
    monkeypatch.setattr(pickles, "_MAX_STACK", 1000)
    assert "more than a checkpoint needs" in refused(b"\x80\x02" + b"}" * 2000)
    assert "more than a checkpoint needs" in refused(b"\x80\x02" + b"(" * 2000)
    monkeypatch.undo()
    monkeypatch.setattr(pickles, "_BATCH", 100)
    assert "more than a checkpoint needs" in refused(b"\x80\x02]" + b"}a" * 8000 + b".")


def test_the_collector_of_cycles_is_paused_and_goes_on():
    assert gc.isenabled()
    seen = []
    known = {"shapes.Point": Known("Point", make=lambda _: seen.append(gc.isenabled()))}
    load(dumps(Call(Name("shapes", "Point"))), known)
    refused(b"")
    assert (seen, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        load(b"\x80\x02N.")
        assert not gc.isenabled()  # who paused it before goes on so
    finally:
        gc.enable()
