"""A device that is none, for commands that the tests run in their own process."""

from __future__ import annotations

import importlib

import pytest

from benchmarks.devices import pretend
from benchmarks.processes import Measurement
from relex_stream import devices


@pytest.fixture
def pretend_in_process(in_process, monkeypatch) -> list[tuple[str, ...]]:
    """Run commands here, also those that have a pretend device; return what was called."""
    commands = importlib.import_module("benchmarks.processes").measure
    there = devices.find_devices

    def find(name: str, argv, **options: object) -> Measurement:
        words = list(map(str, argv))
        if words[1] != "-c":
            return commands(name, words, **options)
        assert words[2] == pretend.PRETEND_PROGRAM
        monkeypatch.setattr(devices, "find_devices", lambda *_: (pretend.PRETEND,))
        try:
            return commands(name, [words[0], "-m", "relex_stream", *words[3:]], **options)
        finally:
            monkeypatch.setattr(devices, "find_devices", there)

    monkeypatch.setattr("benchmarks.processes.measure", find)
    return in_process
