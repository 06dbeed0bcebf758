"""Numbers of reports against those of the commands that have them, and against the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import relex_stream as rs
from relex_stream import grams
from relex_stream.reporting import charts, gather
from relex_stream.reporting.sections import sections
from tests import oracle
from tests.make_checkpoints import Trajectory
from tests.reporting.conftest import HISTORY, SHAPES, STEPS, numbers_of

NOT_COMPARED = {"elapsed_s": 0.0, "peak_memory_bytes": 0}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("asked", [{}, {"history_steps": HISTORY, "fit": "polynomial:2"}])
def test_numbers_are_those_of_analyze_and_backtest(
    store: Path, asked: dict[str, object], exact: bool
) -> None:
    numbers = numbers_of(store, exact=exact, rank=3, **asked)
    analyzed = rs.analyze(store, exact=exact, rank=3, **asked)  # type: ignore[arg-type]
    np.testing.assert_equal(
        dataclasses.asdict(dataclasses.replace(numbers.analysis, **NOT_COMPARED)),
        dataclasses.asdict(dataclasses.replace(analyzed, **NOT_COMPARED)),
    )
    tested = rs.backtest(store, exact=exact, fit=str(asked.get("fit", "linear")))
    assert numbers.backtest is not None
    np.testing.assert_equal(
        dataclasses.asdict(dataclasses.replace(numbers.backtest, **NOT_COMPARED)),
        dataclasses.asdict(dataclasses.replace(tested, **NOT_COMPARED)),
    )
    assert numbers.info == rs.info(store)


def test_coefficients_are_those_of_the_weights(run: Trajectory, store: Path) -> None:
    numbers = numbers_of(store, exact=True, history_steps=HISTORY, target_steps=[30, 20])
    rows = STEPS.index(HISTORY) + 1

    def deltas(name: str) -> np.ndarray:
        values = [oracle.values(run.bits[step][name], "BF16").ravel() for step in (0, *STEPS)]
        return np.stack(values[1:]) - values[0]

    every = {name: deltas(name) for name in SHAPES}
    model = np.concatenate(list(every.values()), axis=1)
    moved = sorted(every, key=lambda name: -float(np.linalg.norm(every[name][rows - 1])))
    found = [(each.name, each.component) for each in numbers.coefficients]
    assert found == [("model", 1), ("model", 2), *((name, 1) for name in moved[:3])]
    for each in numbers.coefficients:
        moves = model if each.name == "model" else every[each.name]
        vectors = np.linalg.svd(moves[:rows], full_matrices=False)[2]
        expected = moves @ vectors[each.component - 1]
        expected *= np.sign(expected[:rows][np.abs(expected[:rows]).argmax()])
        np.testing.assert_allclose(each.values, expected, rtol=1e-6, atol=1e-9)
        assert each.history == rows
        line = np.polyfit(STEPS[:rows], expected[:rows], 1)
        assert [point.step for point in each.forecasts] == [20, 30]
        for point in each.forecasts:
            assert point.value == pytest.approx(np.polyval(line, point.step), rel=1e-5)


def test_cells_are_the_tensors_figures(store: Path) -> None:
    numbers = numbers_of(store)
    tensors = {each.name: each for each in numbers.analysis.tensors}
    assert numbers.grid.modules == ("mlp.bias", "mlp")
    for layer in (0, 1):
        for module, name in (("mlp", "mlp.weight"), ("mlp.bias", "mlp.bias")):
            tensor = tensors[f"model.layers.{layer}.{name}"]
            cell = numbers.grid.cells[module, layer]
            assert cell.explained_variance == pytest.approx(tensor.explained_variance[0])
            assert cell.r2 == pytest.approx(tensor.r2[0])
    assert list(numbers.grid.outside) == ["model.embed_tokens"]


def test_bytes_add_up_to_those_of_the_store(store: Path) -> None:
    numbers = numbers_of(store)
    info = numbers.info
    assert numbers.checkpoint_bytes[-1] == info.bytes_in
    assert numbers.stored_bytes[-1] == info.store_bytes - info.base_bytes_stored
    assert list(numbers.stored_bytes) == sorted(numbers.stored_bytes)


def test_memory_is_that_of_extrapolate(store: Path, tmp_path: Path) -> None:
    numbers = numbers_of(store, memory_limit=8 << 30)
    plan = rs.extrapolate(
        store, tmp_path / "out", target_steps=[82], dry_run=True, workers=2, memory_limit=8 << 30
    ).plan
    assert numbers.memory.stages == plan.stages
    assert (numbers.memory.shared_bytes, numbers.memory.workers) == (plan.shared_bytes, 2)
    assert numbers.memory_fits


def test_memory_that_does_not_fit_is_told_of(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "NOMINAL_PROCESS_BYTES", 2 << 30)
    numbers = numbers_of(store, workers=None)
    assert not numbers.memory_fits
    assert numbers.memory.workers == 1
    storage = sections(numbers)[-1]
    assert "with one worker, more than its limit, to read" in storage.paragraphs[0]
    with charts.style():
        charts.draw_memory(numbers)


def test_one_look_at_the_weights_is_enough(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    read = grams.exact_grams
    monkeypatch.setattr(
        grams, "exact_grams", lambda *args, **kwargs: (looks.append(1), read(*args, **kwargs))[1]
    )
    numbers_of(store, exact=True)
    assert len(looks) == 1
