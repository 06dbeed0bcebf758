"""The notes of a watch: kept whatever happens, and believed only when they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relex_stream.errors import StoreBusyError, StoreError
from relex_stream.watch_ledger import Ledger, Verified, VerifiedFile

SOME = Verified("commits/1.safetensors", (VerifiedFile("step_1/a", 5, 10**18 + 1),))


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    return tmp_path / "run.store", tmp_path / "checkpoints"


names = st.text("abc é/", min_size=1).filter(
    lambda text: not any(part in ("", ".", "..") for part in text.split("/"))
)
entries = st.builds(
    Verified,
    record=st.text(max_size=9),
    files=st.lists(
        st.builds(VerifiedFile, names, st.integers(0, 2**62), st.integers(0, 2**62)), max_size=3
    ).map(tuple),
    deleting=st.booleans(),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noted=st.dictionaries(st.integers(1, 2**53), entries, max_size=4))
def test_what_is_noted_is_there_the_next_time(places, noted):
    with Ledger(*places) as ledger:
        for step in ledger.steps:
            ledger.strike(step)
        for step, verified in noted.items():
            ledger.note(step, verified)
    with Ledger(*places) as ledger:
        assert ledger.steps == noted


def test_it_is_on_the_disk_at_once(places):
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
        ledger.note(2, SOME)
        ledger.strike(1)
        ledger.strike(7)
        document = json.loads(ledger.path.read_text())
    assert list(document["steps"]) == ["2"]
    assert ledger.path == places[0].with_name("run.store.watch")


def test_it_is_synced_before_anything_is_deleted(places, monkeypatch):
    synced = []

    def note(descriptor):
        assert os.fstat(descriptor).st_ino == ledger.path.stat().st_ino
        synced.append(list(json.loads(ledger.path.read_text())["steps"]))

    monkeypatch.setattr(os, "fsync", note)
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
        ledger.note(2, SOME)
        ledger.strike(1)
    assert synced == [["1"], ["1", "2"], ["2"]]


def test_a_second_one_is_refused(places):
    linked = places[0].with_name("linked")
    linked.symlink_to(places[0])
    busy = pytest.raises(StoreBusyError, match=r"another watch of this store.* end it first")
    with Ledger(*places), busy, Ledger(linked, places[1]):
        pass
    with Ledger(*places):
        pass


def test_notes_of_other_checkpoints_are_left_aside(places):
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
    with Ledger(places[0], places[1].with_name("phase-2")) as ledger:
        assert ledger.steps == {}


def test_notes_that_are_cut_short_are_not_believed(places):
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
    data = ledger.path.read_bytes()
    for size in range(len(data) - 1):
        ledger.path.write_bytes(data[:size])
        with Ledger(*places) as again:
            assert again.steps == {}


@pytest.mark.parametrize(
    "document",
    [
        *(None, [], 5, {}, {"checkpoints": 1}),
        *({"steps": steps} for steps in ([], None, {"x": {}}, {"1": None}, {"1": {"files": []}})),
        {"steps": {"1": {"record": "x", "files": [["a", 5]], "deleting": False}}},
        {"steps": {"1": {"record": "x", "files": [["a", "x", 5]], "deleting": False}}},
    ],
)
def test_notes_of_another_form_are_not_believed(places, document):
    if isinstance(document, dict) and "steps" in document:
        document["checkpoints"] = str(places[1])
    places[0].with_name("run.store.watch").write_text(json.dumps(document))
    with Ledger(*places) as ledger:
        assert ledger.steps == {}


@pytest.mark.parametrize("deleting", ["false", 1, None])
def test_a_deletion_has_begun_only_where_that_is_said(places, deleting):
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
    document = json.loads(ledger.path.read_text())
    document["steps"]["1"]["deleting"] = deleting
    ledger.path.write_text(json.dumps(document))
    with Ledger(*places) as ledger:
        assert ledger.steps == {1: SOME}


def test_the_same_checkpoints_under_another_name_are_the_same(places):
    places[1].mkdir()
    places[1].with_name("linked").symlink_to(places[1])
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
    with Ledger(places[0], places[1].with_name("linked")) as ledger:
        assert ledger.steps == {1: SOME}


def test_the_place_of_the_store_is_made(tmp_path):
    with Ledger(tmp_path / "deep" / "run.store", tmp_path) as ledger:
        ledger.note(1, SOME)
    assert ledger.path.parent == tmp_path / "deep"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", 5, None])
def test_paths_that_lead_out_are_not_believed(places, path):
    with Ledger(*places) as ledger:
        ledger.note(1, SOME)
    document = json.loads(ledger.path.read_text())
    document["steps"]["1"]["files"][0][0] = path
    ledger.path.write_text(json.dumps(document))
    with Ledger(*places) as ledger:
        assert ledger.steps == {}


def test_a_link_in_its_place_is_not_followed(places, tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    places[0].with_name("run.store.watch").symlink_to(target)
    with pytest.raises(StoreError, match=r"run\.store\.watch cannot be opened"), Ledger(*places):
        pass
    assert target.read_text() == "precious"
