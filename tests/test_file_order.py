"""Every stage goes through files from front to back: what the system reads ahead is wanted next."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

import relex_stream as rs
from relex_stream import ingest
from relex_stream.sources import CheckpointReader, safetensors_file
from relex_stream.writer import Filler
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store

Places = list[tuple[str, int]]

# Dealt out to shards in turn, so that neither names nor sizes are in the order of the files.
SHAPES = {"m.weight": (40, 31), "z.weight": (50, 20), "b.weight": (70, 9), "k.bias": (7,)} | {
    f"{letter}.weight": (30, 11) for letter in "qcyfa"
}


@pytest.fixture
def run(tmp_path: Path) -> Trajectory:
    return make_trajectory(
        tmp_path, tensors=SHAPES, change_share=0.2, base_shards=3, checkpoint_shards=2
    )


def build_in_order(run: Trajectory, store: Path) -> None:
    options = {"workers": 1, "block_bytes": 400, "sketch_min_elements": 100}
    build_store(run.base, run.checkpoints, store, **options)


def assert_ascending(places: Places, least: int) -> None:
    assert len(places) >= least
    # The whole list is one pass: no file is left and taken up again.
    assert all(before < after for before, after in pairwise(places))


def test_a_build_reads_checkpoints_from_front_to_back(
    run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of = {path.stat().st_ino: str(path) for path in run.directories[1].iterdir()}
    places: Places = []
    scan_steps = ingest.scan_steps

    def spy(reads, *rest):  # type: ignore[no-untyped-def]
        path = path_of[os.fstat(reads.descriptors[0]).st_ino]
        steps = len(reads.is_cast)
        places.extend((path, offset) for offset in reads.offset[::steps].tolist())
        return scan_steps(reads, *rest)

    monkeypatch.setattr(ingest, "scan_steps", spy)
    build_in_order(run, tmp_path / "store")
    assert_ascending(places, 20)


def test_a_build_reads_every_byte_of_its_checkpoints_once(
    run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [path for step in run.steps for path in run.directories[step].iterdir()]
    weights = {path.stat().st_ino: path for path in files if path.suffix == ".safetensors"}
    ranges: dict[Path, list[tuple[int, int]]] = {path: [] for path in weights.values()}
    read_header, scan_steps = safetensors_file._read_header, ingest.scan_steps

    def spy_header(path):  # type: ignore[no-untyped-def]
        raw, status = read_header(path)
        if path in ranges:  # not the base's
            ranges[path].append((0, len(raw)))
        return raw, status

    def spy_scan(reads, done, *rest):  # type: ignore[no-untyped-def]
        assert done == 0
        for number, start, nbytes in zip(reads.file, reads.offset, reads.nbytes, strict=True):
            path = weights[os.fstat(reads.descriptors[number]).st_ino]
            ranges[path].append((int(start), int(start + nbytes)))
        return scan_steps(reads, done, *rest)

    monkeypatch.setattr(safetensors_file, "_read_header", spy_header)
    monkeypatch.setattr(ingest, "scan_steps", spy_scan)
    build_in_order(run, tmp_path / "store")
    for path, read in ranges.items():
        ends = [0, *(stop for _, stop in sorted(read))]
        assert [start for start, _ in sorted(read)] == ends[:-1], path
        assert ends[-1] == path.stat().st_size


@pytest.mark.parametrize("passes", [1, 2])
def test_extrapolation_reads_and_writes_from_front_to_back(
    run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    build_in_order(run, tmp_path / "store")
    reads: Places = []
    read = CheckpointReader.read

    def spy_read(self, path, offset, buffer):  # type: ignore[no-untyped-def]
        reads.append((path, offset))
        return read(self, path, offset, buffer)

    monkeypatch.setattr(CheckpointReader, "read", spy_read)
    writes = _spy_on_writes(monkeypatch)
    rs.extrapolate(
        tmp_path / "store", tmp_path / "out", target_steps=[9], power_iterations=passes, workers=1
    )
    assert_ascending(writes, 20)
    # One pass over the base for each power iteration, one to write.
    starts = [at for at in range(len(reads)) if at == 0 or reads[at] < reads[at - 1]]
    assert len(starts) == passes + 1
    for start, stop in pairwise([*starts, len(reads)]):
        assert_ascending(reads[start:stop], 20)


def test_export_writes_from_front_to_back(
    run: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_in_order(run, tmp_path / "store")
    writes = _spy_on_writes(monkeypatch)
    rs.export(tmp_path / "store", tmp_path / "out", step=run.steps[-1], workers=1)
    assert_ascending(writes, 20)


def _spy_on_writes(monkeypatch: pytest.MonkeyPatch) -> Places:
    """Return the places of blocks, in the order written; headers are written before all blocks."""
    writes: Places = []
    write = Filler.write

    def spy(self, relative_path, offset, data):  # type: ignore[no-untyped-def]
        if offset > 0:
            writes.append((relative_path, offset))
        return write(self, relative_path, offset, data)

    monkeypatch.setattr(Filler, "write", spy)
    return writes
