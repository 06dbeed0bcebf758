"""Stand-ins that keep the benchmarks' own tests short."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import processes
from benchmarks.processes import BenchmarkError, Measurement
from relex_stream.cli.main import cli

MIB = 1 << 20


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Run relex-stream's commands here instead of as processes; return what was called."""
    called: list[tuple[str, ...]] = []
    run_process = processes.measure

    def measure(name: str, argv: Sequence[str | Path], **options: object) -> Measurement:
        words = tuple(map(str, argv))
        if words[1:3] != ("-m", "relex_stream"):
            return run_process(name, argv)
        assert words[1:3] == ("-m", "relex_stream")
        called.append(words[3:])
        started = time.perf_counter()
        result = CliRunner().invoke(cli, words[3:])
        wall_s = time.perf_counter() - started
        if result.exit_code:
            raise BenchmarkError(f"{name}: {result.stderr}")
        return Measurement(
            name=name,
            argv=words,
            exit_status=0,
            wall_s=wall_s,
            user_s=wall_s,
            system_s=0.0,
            peak_rss_bytes=100 * MIB,
            samples=((0.0, MIB), (wall_s, 100 * MIB)),
            stdout=result.stdout,
            stderr_tail=result.stderr,
        )

    # Plans count what the process holds; one that has run other tests holds any amount.
    monkeypatch.setattr("relex_stream.machine.resident_bytes", lambda: 150 * MIB)
    # `alternate` calls the one, the benchmarks the other.
    monkeypatch.setattr("benchmarks.processes.measure", measure)
    monkeypatch.setattr("benchmarks.commands.measure", measure)
    return called
