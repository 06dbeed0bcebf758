"""Analyses of stores against the deltas of their checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import relex_stream as rs
from relex_stream import grams
from relex_stream.analysis import Describer
from relex_stream.fit import Fit
from relex_stream.summaries import GroupAnalysis
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.mlp.weight": (200, 131),
    "model.layers.0.mlp.bias": (1009,),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.weight": (180, 131),
    "model.layers.1.mlp.bias": (500,),
}
STEPS = (1, 2, 4, 7, 11, 16, 17, 25, 40, 41)
KEPT = 15_000
"""Tensors with fewer weights keep no sketch here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("analyzing")
    return make_trajectory(root, steps=STEPS, tensors=SHAPES, change_share=0.05)


@pytest.fixture(scope="module")
def store(run: Trajectory) -> Path:
    path = run.base.parent / "store"
    build_store(run.base, run.checkpoints, path, sketch_min_elements=KEPT)
    return path


def deltas_of(run: Trajectory, names: Sequence[str]) -> np.ndarray:
    def values(step: int, name: str) -> np.ndarray:
        return oracle.values(run.bits[step][name], "BF16").reshape(-1)

    return np.concatenate(
        [np.stack([values(step, name) - values(0, name) for step in STEPS]) for name in names],
        axis=1,
    )


GROUPS: dict[str, dict[str, list[str]]] = {
    "layers": {
        "model.embed_tokens.weight": ["model.embed_tokens.weight"],
        "model.layers.0": ["model.layers.0.mlp.weight", "model.layers.0.mlp.bias"],
        "model.layers.1": ["model.layers.1.mlp.weight", "model.layers.1.mlp.bias"],
    },
    "modules": {
        "model.embed_tokens": ["model.embed_tokens.weight"],
        "model.layers.*.mlp": [name for name in SHAPES if ".mlp." in name],
    },
    "tensors": {name: [name] for name in SHAPES if "norm" not in name},
}


def numbers(group: GroupAnalysis) -> np.ndarray:
    return np.array(
        [
            *group.singular_values,
            *group.explained_variance,
            *group.r2,
            *group.r2_elsewhere,
            group.bend,
        ]
    )


def expected_numbers(run: Trajectory, names: Sequence[str], rows: int, rank: int) -> np.ndarray:
    deltas = deltas_of(run, names)
    return Describer(STEPS, rows, rank, Fit()).describe(deltas @ deltas.T).figures.packed()


@pytest.mark.parametrize("last", [16, None])
def test_exact_figures_are_those_of_the_deltas(
    run: Trajectory, store: Path, last: int | None
) -> None:
    rank, rows = 2, 6 if last else len(STEPS)
    summary = rs.analyze(store, history_steps=last, rank=rank, exact=True)
    assert summary.exact
    assert summary.history == STEPS[:rows]
    for grouping, groups in GROUPS.items():
        found = {group.name: group for group in getattr(summary, grouping)}
        assert found.keys() == groups.keys()
        for name, names in groups.items():
            group = found[name]
            expected = expected_numbers(run, names, rows, rank)
            np.testing.assert_allclose(numbers(group), expected, rtol=1e-6)
            assert (group.r2_error, group.bend_error) == (None, None)
            norm = np.linalg.norm(deltas_of(run, names)[rows - 1])
            assert group.delta_norm == pytest.approx(norm)
            assert (group.tensors, group.weights) == (
                len(names),
                sum(math.prod(SHAPES[each]) for each in names),
            )
    names = list(GROUPS["tensors"])
    np.testing.assert_allclose(
        numbers(summary.model), expected_numbers(run, names, rows, rank), rtol=1e-6
    )
    assert summary.unchanged_tensors == 1


def test_estimates_are_within_their_errors(run: Trajectory, store: Path) -> None:
    summary = rs.analyze(store, history_steps=16, rank=2)
    assert not summary.exact
    for group in (summary.model, *summary.layers, *summary.modules, *summary.tensors):
        names = {**GROUPS["layers"], **GROUPS["modules"], **GROUPS["tensors"]}
        names["model"] = list(GROUPS["tensors"])
        expected = expected_numbers(run, names[group.name], 6, 2)
        if all(math.prod(SHAPES[name]) < KEPT for name in names[group.name]):
            # Small tensors are looked up.
            assert group.explained_variance_error is None
            np.testing.assert_allclose(numbers(group), expected, rtol=1e-6)
            continue
        assert group.explained_variance_error is not None
        assert group.bend_error is not None
        for component in range(2):
            error = group.explained_variance_error[component]
            assert 0 < error < 0.1
            assert abs(group.explained_variance[component] - expected[2 + component]) < 6 * error
        assert abs(group.r2[0] - expected[4]) < 6 * (group.r2_error or (0.0,))[0] + 1e-6


def test_steps_have_their_shares_norms_and_oddities(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=range(1, 9), tensors=SHAPES, change_share=0.05)
    shutil.rmtree(run.directories[6])
    shutil.copytree(run.directories[5], run.directories[6])
    with pytest.warns(rs.RelexStreamWarning, match="same weights"):
        rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    summary = rs.analyze(tmp_path / "store", rank=1)
    assert [each.step for each in summary.steps] == list(range(1, 9))
    notes = {each.step: each.note for each in summary.steps if each.note}
    assert notes == {6: "has the weights of step 5"}
    info = rs.info(tmp_path / "store")
    assert [each.changed_share for each in summary.steps] == pytest.approx(
        [each.changed_share for each in info.steps]
    )
    opened = rs.open_store(tmp_path / "store")
    for each in summary.steps:
        squares = sum(float((opened.delta(name, each.step) ** 2).sum()) for name in SHAPES)
        assert each.delta_norm == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_without_the_base_small_tensors_are_left_out(store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "store"
    shutil.copytree(store, moved)
    with pytest.warns(rs.RelexStreamWarning, match="2 small tensors, which have no sketch"):
        summary = rs.analyze(moved)
    assert summary.left_out_tensors == ("model.layers.0.mlp.bias", "model.layers.1.mlp.bias")
    assert {group.name for group in summary.tensors} == {
        name for name in GROUPS["tensors"] if not name.endswith("bias")
    }
    with pytest.raises(rs.SourceError):
        rs.analyze(moved, exact=True)


def test_few_gram_matrices_at_a_time_give_the_same(store: Path) -> None:
    summaries = []
    for size in (1, 64 << 20):
        with mock.patch.object(grams, "GRAMS_BYTES", size):
            summaries.append(rs.analyze(store, exact=True))
    for one, other in zip(summaries[0].tensors, summaries[1].tensors, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(numbers(one), numbers(other))


def test_a_window_is_the_fits_alone(run: Trajectory, store: Path) -> None:
    summary = rs.analyze(store, window=4, rank=1, exact=True)
    deltas = deltas_of(run, list(GROUPS["tensors"]))
    found = Describer(STEPS, 10, 1, Fit(window=4)).describe(deltas @ deltas.T).figures
    assert summary.model.r2[0] == pytest.approx(found.r2[0])
    assert summary.model.r2_elsewhere[0] == pytest.approx(found.r2_elsewhere[0])
    assert summary.model.singular_values == rs.analyze(store, exact=True).model.singular_values[:1]


def test_where_memory_is_short_errors_are_left_out(store: Path) -> None:
    plain = rs.analyze(store)
    assert plain.model.r2_error is not None
    with mock.patch("relex_stream.analyzing.REPLICATES", 1 << 24):
        summary = rs.analyze(store)
    assert summary.model.r2_error is None
    assert summary.model.r2 == plain.model.r2
    assert summary.tensors[0].r2_error is not None
    with pytest.raises(rs.MemoryLimitError, match="Gram matrices"):
        rs.analyze(store, memory_limit=50 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 11}, "--rank must be from 1 to"),
        ({"rank": 0}, "--rank must be from 1 to"),
        ({"fit": "cubic"}, "--fit must be one of"),
        ({"window": 11}, "--window is 11 checkpoints, the history has 10"),
        ({"history_steps": 1}, "needs at least 2 checkpoints"),
    ],
)
def test_what_cannot_be_analyzed(store: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(rs.RelexStreamError, match=message):
        rs.analyze(store, **{"rank": 1, **options})


def test_a_run_in_which_nothing_moved(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2), tensors={"w": (4, 4)})
    for step in (1, 2):
        shutil.rmtree(run.directories[step])
        shutil.copytree(run.base, run.directories[step])
    with pytest.warns(rs.RelexStreamWarning):
        rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    with pytest.raises(rs.OptionError, match="changed any weight"):
        rs.analyze(tmp_path / "store", rank=1)


@pytest.mark.parametrize("look", [rs.analyze, rs.backtest])
def test_where_all_tensors_are_small_the_base_is_asked_for(tmp_path: Path, look: Any) -> None:
    made = make_trajectory(tmp_path, steps=range(1, 6), tensors={"w": (20, 30)}, change_share=0.5)
    rs.build_store(made.base, made.checkpoints, tmp_path / "store")
    made.base.rename(tmp_path / "elsewhere")
    with (
        pytest.warns(rs.RelexStreamWarning, match="1 small tensors"),
        pytest.raises(rs.OptionError, match="takes the base: say with --base where it is"),
    ):
        look(tmp_path / "store")
    look(tmp_path / "store", base=tmp_path / "elsewhere")
