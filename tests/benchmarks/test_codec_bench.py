"""The `codec` benchmark at tiny size."""

from __future__ import annotations

import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import codec
from benchmarks.__main__ import cli
from benchmarks.processes import BenchmarkError


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_so_many_weights_change(dtype, share):
    pair = codec.make_pair(dtype, 1 << 18, share, seed=1)
    assert pair.changed == np.count_nonzero(pair.before != pair.after)
    assert pair.changed / pair.after.size == pytest.approx(share, rel=0.2)
    assert pair.after.itemsize == {"bf16": 2, "fp32": 4}[dtype]
    # Small moves: most are a few of the smallest steps in bf16, and none is wild.
    ordered = np.abs(pair.after.astype(np.int64) - pair.before.astype(np.int64))
    moved = ordered[pair.before != pair.after]
    assert np.median(moved) <= (4 if dtype == "bf16" else 1000)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("share", [0.005, 0.3])
def test_every_codec_gives_the_checkpoint_back(dtype, share, monkeypatch):
    # Several blocks, the last one odd.
    monkeypatch.setattr(codec, "BLOCK_BYTES", 1 << 16)
    pair = codec.make_pair(dtype, 100_003, share, seed=2)
    contenders = codec.codecs(pair)
    rows = codec.compare(pair, contenders, runs=1)
    assert [row["codec"] for row in rows] == [one.name for one in contenders]
    assert len({row["codec"] for row in rows}) == len(rows)
    bits = {row["codec"]: row["bits per changed weight"] for row in rows}
    assert bits["relex-stream"] < min(bits[name] for name in bits if name != "relex-stream")
    assert bits["copy (the limit)"] == pytest.approx(8 * pair.after.nbytes / pair.changed)
    for row in rows:
        assert row["encode GB/s"] > 0
        assert row["decode GB/s"] > 0


def test_a_checkpoint_without_changes_is_restored_too():
    pair = codec.make_pair("bf16", 4096, 0.5, seed=3)
    same = codec.Pair("bf16", pair.before, pair.before.copy(), 0)
    rows = codec.compare(same, codec.codecs(same), runs=1)
    assert rows[0]["codec"] == "relex-stream"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_differences_are_undone_for_any_bits(itemsize):
    generator = np.random.default_rng(4)
    before, after = (
        generator.integers(0, 1 << 8 * itemsize, 1000, np.uint64).astype(f"u{itemsize}")
        for _ in range(2)
    )
    for kind in ("xor", "difference"):
        delta = codec._Delta(kind, 1000, itemsize)
        out = np.empty_like(after)
        delta.undo(before, delta.form(before, after).copy(), out)
        assert np.array_equal(out, after)


def test_a_codec_that_loses_something_is_an_error():
    pair = codec.make_pair("bf16", 4096, 0.1, seed=5)
    forgetful = codec.Codec(
        "forgetful",
        lambda before, after: [b""],
        lambda before, encoded, out: np.copyto(out, before),
    )
    with pytest.raises(BenchmarkError, match="forgetful"):
        codec.compare(pair, [forgetful], runs=1)


def test_the_entropy_is_that_of_a_coin_and_of_the_sizes():
    # A quarter changes, by one of four differences that are equally likely.
    before = np.zeros(4000, np.uint16)
    after = before.copy()
    after[::4] = np.arange(1000) % 4 + 1
    pair = codec.Pair("bf16", before, after, 1000)
    coin = 0.25 * np.log2(4) + 0.75 * np.log2(4 / 3)
    assert codec.entropy_bits(pair) == pytest.approx(coin / 0.25 + 2)


def run_command(path: Path) -> dict[str, Any]:
    arguments = ["codec", "--elements", 20_000, "--runs", 1, "--json", path]
    arguments += ["--change-share", 0.005, "--change-share", 0.5]
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "bits per changed weight" in result.output
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_the_command_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zipnn", None)
    path = tmp_path / "codec.json"
    report = run_command(path)
    assert {row["dtype"] for row in report["rows"]} == {"bf16", "fp32"}
    assert any("zipnn is not installed" in note for note in report["notes"])
    pytest.importorskip("matplotlib")
    picture = tmp_path / "codec.png"
    result = CliRunner().invoke(cli, ["pictures", str(path), str(picture)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000


def test_zipnn_takes_part_where_it_is_installed(tmp_path, monkeypatch):
    class ZipNN:
        def __init__(self, *, input_format: str, bytearray_dtype: str, threads: int) -> None:
            assert (input_format, threads) == ("byte", 1)
            assert bytearray_dtype in {"bfloat16", "float32"}

        def compress(self, content: bytes) -> bytes:
            return zlib.compress(content)

        def decompress(self, content: bytes) -> bytes:
            return zlib.decompress(content)

    package = types.ModuleType("zipnn")
    package.ZipNN = ZipNN
    monkeypatch.setitem(sys.modules, "zipnn", package)
    report = run_command(tmp_path / "codec.json")
    assert {"zipnn, file", "zipnn, xor"} <= {row["codec"] for row in report["rows"]}
    assert not any("not installed" in note for note in report["notes"])
