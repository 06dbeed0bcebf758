"""Rounds of programs, and how their outputs differ."""

from __future__ import annotations

import time

import pytest
import safetensors.torch
import torch

from benchmarks.devices.rounds import Deadline, difference, digest_of, measure_rounds
from benchmarks.processes import BenchmarkError, Program

PATIENCE_S = 30


def test_differences_are_counted_in_ulp(tmp_path):
    values = torch.arange(1, 101).to(torch.bfloat16)
    moved = values.clone().view(torch.int16)
    moved[3] += 1
    moved[7] -= 5
    for name, tensor in (("one", values), ("two", moved.view(torch.bfloat16))):
        (tmp_path / name).mkdir()
        plain = {"a": tensor.reshape(10, 10), "b": torch.tensor([-0.0, 1.5])}
        safetensors.torch.save_file(plain, tmp_path / name / "model.safetensors")
    one, two = tmp_path / "one", tmp_path / "two"
    assert difference(one, two) == (2 / 102, 5)
    assert difference(one, one) == (0.0, 0)
    assert digest_of(one) == digest_of(one) != digest_of(two)
    (tmp_path / "none").mkdir()
    with pytest.raises(BenchmarkError, match="other tensors"):
        difference(one, tmp_path / "none")


def test_no_round_begins_that_would_end_too_late(monkeypatch):
    def alternate(programs, **_: object):
        time.sleep(0.05)
        return {each.name: [object()] for each in programs}

    monkeypatch.setattr("benchmarks.devices.rounds.alternate", alternate)
    programs = [Program("a", ["a"]), Program("b", ["b"])]
    for left_s, rounds in ((PATIENCE_S, 4), (-1, 1)):
        called = []
        found = measure_rounds(
            programs,
            {},
            runs=3,
            deadline=Deadline(time.monotonic() + left_s),
            after_first=lambda called=called: called.append(1),
        )
        assert called == [1]
        assert [len(each) for each in found.by_name.values()] == [rounds, rounds]
