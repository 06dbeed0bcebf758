"""A device that is none, in a process of its own."""

from __future__ import annotations

import sys

import pytest

from benchmarks.devices.pretend import PRETEND, pretend_main
from relex_stream import devices


def test_a_pretend_program_has_a_pretend_device(monkeypatch, capsys):
    monkeypatch.setattr(devices, "find_devices", devices.find_devices)
    monkeypatch.setattr(sys, "argv", ["-c", "--version"])
    with pytest.raises(SystemExit):
        pretend_main()
    assert devices.find_devices(devices.parse_devices("cuda")) == (PRETEND,)
