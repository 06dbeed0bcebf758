"""Every kind of byte of a store, spoilt: refused, or as if it were whole."""

from __future__ import annotations

import pytest

from tests.corruption.spoiling import HOW, JOBS, make_case, parts_of, run


def check(counts, times: int) -> None:
    assert counts.lost == []
    assert counts.tried.total() == times
    assert counts.refused.total() + counts.harmless.total() == times


def test_a_sample_of_damage_is_refused_or_harmless(tmp_path):
    check(run(tmp_path, times=600, seed=1), 600)


@pytest.mark.slow
def test_damage_of_every_kind_is_refused_or_harmless(tmp_path):
    counts = run(tmp_path, times=12_000, seed=0)
    check(counts, 12_000)
    kinds = {what for what, _ in counts.tried}
    assert {how for _, how in counts.tried} == set(HOW)
    assert set(counts.jobs) == set(JOBS)
    assert kinds >= {
        "HEAD",
        "manifest",
        "zarr.json",
        "base weights",
        "frame: header",
        "frame: body",
    }
    assert kinds >= {f"commit: {column}" for column in ("header", "frame_bytes", "sketch")}
    # Neither all refused nor all harmless: the sweep tells them apart.
    assert counts.refused["frame: body"] > 100
    assert counts.harmless["commit: sketch"] + counts.harmless["zarr.json"] > 10


def test_the_parts_cover_every_byte(tmp_path):
    case = make_case(tmp_path)
    for store in case.stores:
        covered: dict[str, int] = {}
        for part in set(parts_of(store, case.run.base)):
            if part.path.is_relative_to(store):
                covered[part.path.name] = covered.get(part.path.name, 0) + part.high - part.low
        sizes: dict[str, int] = {}
        for path in store.rglob("*"):
            if path.is_file() and path.stat().st_size:
                sizes[path.name] = sizes.get(path.name, 0) + path.stat().st_size
        assert covered == sizes
