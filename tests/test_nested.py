"""Dampings that a history chooses, against the same computed from the weights; what is told."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relex_stream as rs
from relex_stream import nested
from relex_stream.fit import Fit
from relex_stream.skill import Setting
from relex_stream.store import SketchReader, Store
from tests import oracle
from tests.make_checkpoints import Trajectory, make_trajectory
from tests.make_stores import build_store
from tests.test_analyzing import KEPT, SHAPES
from tests.test_backtesting import STEPS, history, write_run
from tests.test_extrapolate import read_weights
from tests.test_models import assert_same_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    root = tmp_path_factory.mktemp("nested")
    return make_trajectory(root, steps=STEPS, tensors=SHAPES, change_share=0.03)


@pytest.fixture(scope="module")
def store(run: Trajectory) -> Path:
    """Sketches of the larger tensors; what is built in tests has none."""
    path = run.base.parent / "store"
    build_store(run.base, run.checkpoints, path, sketch_min_elements=KEPT)
    return path


def beside(made: Trajectory, names: list[str], last: int) -> oracle.History:
    """Decompose tensors side by side, up to a step."""
    steps = [step for step in STEPS if step <= last]

    def bits(step: int) -> np.ndarray:
        return np.concatenate([made.bits[step][name].reshape(-1) for name in names])

    return oracle.History(bits(0), "BF16", [bits(step) for step in steps], "BF16", steps)


def chosen_damping(
    made: Trajectory, groups: list[list[str]], last: int, target: int, rank: int = 1
) -> float:
    """Return what the mean skill of forecasts of the last step speaks for, from the weights."""
    horizon = target / last
    horizons = {h for h in (1.25, 1.5, 2, 3, 4, 6, 8) if h <= max(2, horizon)} | {horizon}
    ends = {sum(step <= last / h for step in STEPS) for h in horizons}
    ends = {rows for rows in ends if rows >= 3} or {3}
    figures = np.array(
        [nested_forecast(made, groups, STEPS[rows - 1], last, rank) for rows in ends]
    )
    squares, products, stayed = figures.T
    best = (products / stayed).sum() / (squares / stayed).sum()
    undamped = np.mean(1 - (stayed - 2 * products + squares) / stayed)
    best = min(1.0, max(0.0, best))
    return float(best + (1 - best) * min(1.0, max(0.0, 1 + undamped / 0.15)))


def nested_forecast(
    made: Trajectory, groups: list[list[str]], inner: int, last: int, rank: int
) -> tuple[float, float, float]:
    """Return ``a a``, ``a b`` and ``b b`` of a forecast a of the last step, from an inner one."""
    squares = products = stayed = 0.0
    for names in groups:
        seen, known = beside(made, names, inner), beside(made, names, last)
        forecast = seen.predict(last, rank).delta - seen.predict(inner, rank).delta
        came = known.deltas[-1] - seen.deltas[-1]
        squares += float(forecast @ forecast)
        products += float(forecast @ came)
        stayed += float(came @ came)
    return squares, products, stayed


def every(made: Trajectory) -> list[list[str]]:
    return [[name] for name in made.bits[0]]


@pytest.mark.parametrize(
    ("last", "target", "rank"), [(16, 40, 1), (30, 80, 1), (22, 60, 2), (40, 50, 1)]
)
def test_auto_is_what_the_nested_windows_speak_for(
    run: Trajectory,
    store: Path,
    tmp_path: Path,
    last: int,
    target: int,
    rank: int,
) -> None:
    # It holds later steps than the history's, which must not count.
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    summary = rs.extrapolate(
        tmp_path / "store",
        tmp_path / "out",
        target_steps=[target],
        history_steps=last,
        rank=rank,
        damping="auto",
        anchor="latest",
        svd="exact",
    )
    (output,) = summary.outputs
    expected = chosen_damping(run, every(run), last, target, rank)
    assert output.what["damping"] == "auto"
    assert output.what["damping_chosen"] == pytest.approx(expected, rel=1e-6)
    bits = {
        name: history(run, name, last).predict(target, rank, damping=expected, anchor="latest").bits
        for name in run.bits[0]
    }
    assert_same_model(read_weights(tmp_path / "out"), bits)
    record = json.loads((tmp_path / "out" / "relex_stream.json").read_text())
    assert record["damping_chosen"] == output.what["damping_chosen"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"times {expected:.4g}" in " ".join(card.split())


def test_auto_by_layer_is_that_of_the_layers_subspaces(
    run: Trajectory,
    tmp_path: Path,
) -> None:
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    layers: dict[str, list[str]] = {}
    for name in run.bits[0]:
        match = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(match[1] if match else name, []).append(name)
    summary = rs.extrapolate(
        tmp_path / "store",
        tmp_path / "out",
        target_steps=[80],
        group_by="layer",
        damping="auto",
        anchor="latest",
        exclude=["*embed*"],
    )
    names = [names for key, names in layers.items() if "embed" not in key]
    expected = chosen_damping(run, names, 40, 80)
    assert summary.outputs[0].what["damping_chosen"] == pytest.approx(expected, rel=1e-6)


def test_auto_beside_others_and_each_target_its_own(
    store: Path,
    tmp_path: Path,
) -> None:
    summary = rs.extrapolate(
        store,
        tmp_path / "out",
        target_steps=[60, 160],
        damping=["auto", 1.0],
        anchor="latest",
    )
    paths = [Path(output.path).relative_to(tmp_path / "out") for output in summary.outputs]
    assert [path.as_posix() for path in paths] == [
        "step_60/damping_auto",
        "step_60/damping_1",
        "step_160/damping_auto",
        "step_160/damping_1",
    ]
    chosen = [output.what.get("damping_chosen") for output in summary.outputs]
    assert chosen[1] is None
    assert chosen[0] != chosen[2]
    dry = rs.extrapolate(
        store, tmp_path / "x", target_steps=[160], damping="auto", anchor="latest", dry_run=True
    )
    assert dry.outputs[0].what["damping_chosen"] == pytest.approx(chosen[2], rel=1e-9)


def test_a_sketched_history_chooses_nearly_the_same(
    run: Trajectory,
    store: Path,
    tmp_path: Path,
) -> None:
    summary = rs.extrapolate(
        store, tmp_path / "out", target_steps=[80], damping="auto", anchor="latest", dry_run=True
    )
    expected = chosen_damping(run, every(run), 40, 80)
    assert summary.outputs[0].what["damping_chosen"] == pytest.approx(expected, rel=0.1)


def test_a_look_that_serves_several_sees_what_any_of_them_needs(
    store: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"damping": "auto", "anchor": "latest", "history_steps": 30}
    alone = rs.extrapolate(store, tmp_path / "a", target_steps=[80], dry_run=True, **asked)
    other = {"target_step": 80, "fit": "linear-origin", "history_steps": 30}
    grid = [other, {"target_step": 80, **asked}]
    both = rs.sweep(store, tmp_path / "b", grid=grid, dry_run=True)
    chosen = both.outputs[1].what["damping_chosen"]
    assert 0 < chosen < 1
    assert chosen == pytest.approx(alone.outputs[0].what["damping_chosen"], rel=1e-12)


def test_a_straight_run_is_not_damped(tmp_path: Path) -> None:
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    made = write_run(tmp_path, {step: drift * step for step in range(13)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", rs.ForecastWarning)
        rs.extrapolate(made, tmp_path / "plain", target_steps=[24])
        summary = rs.extrapolate(
            made, tmp_path / "auto", target_steps=[24], damping="auto", anchor="latest"
        )
    assert summary.outputs[0].what["damping_chosen"] == pytest.approx(1)


def test_inside_the_history_nothing_is_damped(
    store: Path,
    tmp_path: Path,
) -> None:
    with pytest.warns(rs.RelexStreamWarning, match="inside the history"):
        summary = rs.extrapolate(
            store, tmp_path / "out", target_steps=[30, 80], damping="auto", anchor="latest"
        )
    assert summary.outputs[0].what["damping_chosen"] == 1.0


# --- a short history -----------------------------------------------------------------------------


def test_too_short_a_history_goes_by_what_it_has_and_says_so(tmp_path: Path) -> None:
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    at = [0.0, 8.0, 16.0, 24.0, 27.0, 30.0, 32.0]  # a run that slows down
    made = write_run(tmp_path, {step: drift * place for step, place in enumerate(at)})
    # From step 3 to 6 is twice as far; ten times cannot be known.
    told = (
        r"too short to know how forecasts do as far ahead as step 60, 10.00 times as far: "
        r"--damping auto \(0.36\) goes by forecasts of step 6 from 3 and 4 \(up to 2.00 times"
    )
    with pytest.warns(rs.ForecastWarning, match=told):
        (output,) = rs.extrapolate(
            made, tmp_path / "out", target_steps=[60], damping="auto", anchor="latest"
        ).outputs
    shares = []
    for rows in (3, 4):
        slope = np.polyfit(range(1, rows + 1), at[1 : rows + 1], 1)[0]
        went, came = slope * (6 - rows), at[6] - at[rows]
        shares.append((went**2 / came**2, went / came))
    squares, products = np.mean(shares, axis=0)
    best = products / squares
    undamped = 2 * products - squares
    expected = best + (1 - best) * max(0, 1 + undamped / 0.15)
    assert output.what["damping_chosen"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("last", "options"), [(3, {}), (6, {"fit": "polynomial:4"})])
def test_a_history_that_can_tell_nothing_is_refused(
    store: Path,
    tmp_path: Path,
    last: int,
    options: dict[str, Any],
) -> None:
    with pytest.raises(rs.FitError, match="--damping auto needs a longer history"):
        rs.extrapolate(
            store,
            tmp_path / "out",
            target_steps=[60],
            history_steps=last,
            damping="auto",
            anchor="latest",
            **options,
        )
    assert not (tmp_path / "out").exists()


def test_auto_goes_with_the_latest_anchor(store: Path, tmp_path: Path) -> None:
    for anchor in ("base", ["base", "latest"]):
        with pytest.raises(rs.OptionError, match="--anchor latest alone"):
            rs.extrapolate(
                store, tmp_path / "out", target_steps=[60], damping="auto", anchor=anchor
            )


# --- what is told --------------------------------------------------------------------------------


def turning(tmp_path: Path) -> Path:
    """Return the store of a run that goes straight up to step 6 of 12, and back."""
    drift = np.random.default_rng(0).integers(-9, 9, (20, 30)).astype(np.float64)
    return write_run(
        tmp_path, {step: drift * (min(step, 6) - max(0, step - 6) / 2) for step in range(13)}
    )


def test_a_forecast_that_failed_as_far_ahead_is_told_of_with_its_skill(tmp_path: Path) -> None:
    made = turning(tmp_path)
    with pytest.warns(rs.ForecastWarning) as told:
        rs.extrapolate(made, tmp_path / "out", target_steps=[24], dry_run=True)
    (message,) = [str(each.message) for each in told]
    assert message.startswith(
        "forecasts of step 12 from 6, 8 and 9 (up to 2.00 times as far) with --anchor base "
        "--damping 1 had a mean skill of "
    )
    # The one from step 6 goes on to 12 drifts, and 3 came: missed by 9, where staying missed by 3.
    summary = rs.backtest(made, target_steps=[12], history_steps=[6, 8, 9], exact=True)
    skills = [row.skills[-1].skill for row in summary.forecasts if row.anchor == "base"]
    assert skills[0] == pytest.approx(1 - 9**2 / 3**2)
    assert f"had a mean skill of {np.mean(skills):.2f} (below 0" in message
    assert "--damping auto takes 0.00;" in message


def test_of_several_settings_the_worst_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = turning(tmp_path)
    looks: list[int] = []
    look = nested._look
    monkeypatch.setattr(nested, "_look", lambda *a: (looks.append(len(a[1])), look(*a)))
    grid = [{"target_step": 24, "fit": ["linear", "polynomial:2"], "damping": [0.5, 1]}]
    with pytest.warns(rs.ForecastWarning) as told:
        rs.sweep(made, tmp_path / "out", grid=grid, dry_run=True)
    (message,) = [str(each.message) for each in told]
    assert "with --anchor base --damping 1 had a mean skill of" in message
    assert "; 3 of 4 settings were below 0, and this most; see relex-stream backtest" in message
    assert looks == [2]  # one look at the Gram matrices for both


def test_a_setting_is_named_by_its_options() -> None:
    assert nested._options(Setting(1, Fit(), "base")) == "--anchor base"
    assert nested._options(Setting(2, Fit("polynomial:2", 5, 3), "latest")) == (
        "--rank 2 --fit polynomial:2 --window 5 --refit-every 3 --anchor latest"
    )


def test_nothing_is_told_of_what_had_skill_or_cannot_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = turning(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rs.ForecastWarning)
        # Up to its turn the run was straight.
        rs.extrapolate(made, tmp_path / "a", target_steps=[9], history_steps=6, dry_run=True)
        # Three checkpoints say nothing.
        rs.extrapolate(made, tmp_path / "b", target_steps=[9], history_steps=3, dry_run=True)
        rs.extrapolate(made, tmp_path / "c", target_steps=[24], damping=0.0, anchor="latest")

        def short_of_memory(*_: Any, **__: Any) -> Any:
            raise rs.MemoryLimitError("too little")

        monkeypatch.setattr(nested, "_look", short_of_memory)
        rs.extrapolate(made, tmp_path / "d", target_steps=[24], dry_run=True)
        with pytest.raises(rs.MemoryLimitError):
            rs.extrapolate(made, tmp_path / "e", target_steps=[24], damping="auto", anchor="latest")


def test_to_tell_only_tensors_with_a_sketch_are_looked_at(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("relex_stream.grams.exact_grams", refuse)
    rs.extrapolate(store, tmp_path / "out", target_steps=[80], dry_run=True)
    with pytest.raises(AssertionError, match="weights were read"):
        rs.extrapolate(store, tmp_path / "out", target_steps=[80], damping="auto", anchor="latest")


def test_no_later_step_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    before = SketchReader.__init__

    def count(self: SketchReader, opened: Store, rows: int) -> None:
        read.append(rows)
        before(self, opened, rows)

    monkeypatch.setattr(SketchReader, "__init__", count)
    rs.extrapolate(store, tmp_path / "out", target_steps=[40], history_steps=16, dry_run=True)
    assert read == [8]
