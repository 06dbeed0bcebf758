"""Sums, skills and a few forecasts of the ablations, measured by a stand-in for the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import relex_stream as rs
from benchmarks import ablations, rewards
from benchmarks.__main__ import cli
from benchmarks.ablations import (
    ABLATIONS,
    PLAIN,
    Outcome,
    Skills,
    cells_of,
    measure,
    notes_on,
    reconstructions,
    summarize,
    told,
)
from benchmarks.coefficients import coefficients, exact_grams, kept_of
from benchmarks.report import Report
from benchmarks.rewards import Rewards
from benchmarks.rlvr.runs import Run, load_run
from relex_stream.skill import Cell

NAMES = {one.name: one for one in ABLATIONS}


@pytest.fixture
def run() -> Run:
    return load_run("product")  # every 4th of 160 steps


@pytest.fixture(scope="module")
def grams() -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    return exact_grams(load_run("product").store)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "accuracy", fake_accuracy)


def fake_accuracy(directory: Path | str, task: str, problems: int) -> np.ndarray:
    """Solve as many problems as the end of the weights says; the same for the same bits."""
    data = (Path(directory) / "model.safetensors").read_bytes()
    return np.random.default_rng(list(data[-64:])).random(problems) < 0.5


def outcome(name: str, last: int, target: int, gain: float, **figures: float) -> Outcome:
    """Make an outcome with a gain on 100 problems; its standard error is at most 0.05."""
    solved = round(100 * abs(gain))
    gains = np.sign(gain) * (np.arange(100) < solved)
    known = {"skill": 0.0, "nested_skill": None, "explained": 0.8, "r2": 0.9} | figures
    return Outcome(name, last, target, 0.5, gains, np.zeros(100), **known)  # type: ignore[arg-type]


def test_cells_lie_ahead_and_are_stored() -> None:
    assert cells_of(range(1, 121))[:4] == [(20, 60), (20, 80), (20, 100), (20, 120)]
    for last, target in cells_of(range(4, 164, 4)):
        assert last % 4 == target % 4 == 0
        assert last < target <= 160


def test_a_row_has_means_and_counts_losses() -> None:
    made = [
        outcome("plain RELEX", 20, 60, 0.10),
        outcome("plain RELEX", 20, 80, -0.30),
        outcome("plain RELEX", 40, 80, 0.02),
        outcome("cubic", 20, 60, -0.40, skill=-3.0),
        outcome("cubic", 40, 80, 0.02, skill=-1.0),
    ]
    true, plain, cubic = summarize(made)
    assert (true["setting"], true["all"]) == ("true checkpoints", "+0.000 +- 0.000")
    assert (plain["from 20"], plain["from 40"]) == ("-0.100 (1)", "+0.020")
    assert plain["gains, losses"] == "1, 1 of 3"
    assert plain["worst"] == "-0.300 (20 to 80)"
    assert plain["all"].startswith("-0.060 +-")
    assert "to plain RELEX" not in plain
    # Over the two forecasts that both made: -0.5 and 0.
    assert cubic["to plain RELEX"].startswith("-0.250 +-")
    assert cubic["skill, median"] == "-2.00"
    assert set(true) == set(cubic)  # so that the columns are in this order


def test_the_error_of_a_difference_is_paired() -> None:
    rows = summarize([outcome("plain RELEX", 20, 60, 0.3), outcome("same", 20, 60, 0.3)])
    assert rows[2]["all"] == "+0.300 +- 0.046"
    assert rows[2]["to plain RELEX"] == "+0.000 +- 0.000"


def test_what_is_told_leaves_out_repeats_and_what_is_not_known() -> None:
    made = [outcome("a", 20, 40 + n, n / 10 - 0.1, skill=float(n), r2=-float(n)) for n in range(4)]
    made.append(outcome("b", 20, 60, -0.9, skill=9.0, nested_skill=1.0, repeats=True))
    found = told(made)
    assert [found["skill"].correlation, found["R2"].correlation] == pytest.approx([1.0, -1.0])
    assert [found["skill"].losses_lower, found["R2"].losses_lower] == [1.0, 0.0]
    assert found["horizon"].forecasts == 4
    assert "nested skill" not in found
    assert "explained variance" not in found  # all the same
    assert notes_on(made)[0] == (
        "all settings, skill 0 to inf: 4 forecasts, 2 gains, 1 losses, mean 0.050"
    )


def test_ties_tell_half_and_no_loss_tells_nothing() -> None:
    made = [outcome("a", 20, 40, -0.3, r2=0.5), outcome("a", 20, 50, 0.3, r2=0.5)]
    made.append(outcome("a", 20, 60, 0.2, r2=0.9))
    assert told(made)["R2"].losses_lower == 0.75
    assert np.isnan(told(made[1:])["R2"].losses_lower)


def test_gains_and_skills_are_those_measured_independently(
    run: Run, grams: Any, tmp_path: Path
) -> None:
    some = [PLAIN, NAMES["anchor latest"], NAMES["rank 2"], NAMES["sinusoid"], NAMES["window 20"]]
    skills = Skills(*grams)
    found = measure(run, Rewards(run, tmp_path, 50), tmp_path, skills, 80, [120, 160], some)
    assert [one.name for one in found[::2]] == [one.name for one in some]
    rs.export(run.store, tmp_path / "observed", step=80)
    observed = fake_accuracy(tmp_path / "observed", "", 50).astype(float)
    rs.extrapolate(
        run.store, tmp_path / "two", target_steps=[160], history_steps=80, rank=2, svd="exact"
    )
    two = fake_accuracy(tmp_path / "two", "", 50)
    (rank_two,) = [one for one in found if (one.name, one.target) == ("rank 2", 160)]
    assert rank_two.gain == pytest.approx(two.mean() - observed.mean())
    assert rank_two.observed == observed.mean()
    # Only the whole history is a window of 20 here.
    plain = found[:2]
    assert [one.repeats for one in found[-2:]] == [True, True]
    assert [one.gain for one in found[-2:]] == [one.gain for one in plain]
    for one in some[:4]:
        told_by_backtest = rs.backtest(
            run.store,
            history_steps=[80],
            target_steps=[120, 160],
            rank=one.rank,
            fit=one.fit.curve,
            anchor=one.anchor,
            damping=1.0,
            exact=True,
        ).forecasts
        assert [each.skill for each in found if each.name == one.name] == pytest.approx(
            [forecast.skills[0].skill for forecast in told_by_backtest]
        )
    # From 80 to 160 is twice as far: what is known is the forecast from 40 to 80.
    assert found[1].nested_skill == pytest.approx(skills.of(PLAIN, [Cell(10, 19)])[0])
    assert found[-1].nested_skill is None  # 20 checkpoints of 10
    model = rs.analyze(run.store, history_steps=80, rank=2, exact=True).model
    assert rank_two.explained == pytest.approx(model.explained_variance[1])
    assert rank_two.r2 == pytest.approx(model.r2[0])


def test_refits_have_a_skill_too(grams: Any) -> None:
    skills = Skills(*grams)
    plain, refit = (skills.of(one, [Cell(20, 30)])[0] for one in (PLAIN, NAMES["refit every 10"]))
    assert plain != refit
    assert np.isfinite(refit)


def test_reconstructions_are_held_against_true_steps(
    run: Run, grams: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "RECONSTRUCTED_SHARES", (0.5, 1.0))
    monkeypatch.setattr(ablations, "RECONSTRUCTED_RANKS", (1, 2))
    steps, by_tensor = grams
    rows = reconstructions(run, Rewards(run, tmp_path, 50), tmp_path, by_tensor)
    assert [(row["step"], row["rank"]) for row in rows] == [(80, 1), (80, 2), (160, 1), (160, 2)]
    rs.export(run.store, tmp_path / "true", step=160)
    true = fake_accuracy(tmp_path / "true", "", 50).mean()
    projected = fake_accuracy(tmp_path / "projected" / "step_160" / "rank_1", "", 50).mean()
    assert rows[2]["difference"].startswith(f"{projected - true:+.3f} +-")
    shares = [kept_of(by_tensor, len(steps) - 1, rank).share for rank in (1, 2, 40)]
    assert 0 < shares[0] < shares[1] < shares[2] == pytest.approx(1.0)
    assert rows[2]["of the squared delta"] == f"{shares[0]:.0%}"


def test_coefficients_are_those_of_projections() -> None:
    deltas = np.random.default_rng(3).normal(size=(6, 30)).cumsum(axis=0)
    found = coefficients(deltas @ deltas.T, 4, 2)
    _, _, right = np.linalg.svd(deltas[:4], full_matrices=False)
    expected = deltas @ right[:2].T
    assert np.allclose(np.abs(found), np.abs(expected))
    assert (found[3] > 0).all()


def test_the_report_has_every_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "HISTORY_SHARES", (0.5,))
    monkeypatch.setattr(ablations, "TARGET_SHARES", (0.5, 1.0))
    monkeypatch.setattr(ablations, "ABLATIONS", (PLAIN, NAMES["rank 2"]))
    monkeypatch.setattr(ablations, "RECONSTRUCTED_SHARES", (1.0,))
    file = tmp_path / "ablations.json"
    arguments = ["ablations", "--run", "product", "--problems", "20", "--markdown"]
    result = CliRunner().invoke(
        cli, [*arguments, "--work", str(tmp_path), "--json", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = Report.read(file)
    names = ["true checkpoints", "plain RELEX", "rank 2"]
    assert [row["setting"] for row in report.rows] == names
    assert [(one["from"], one["to"]) for one in report.settings["forecasts"]] == [(80, 160)] * 2
    assert len(report.settings["reconstructions"]) == 3
    assert "| projected |" in result.output


class TestPicture:
    def test_of_coefficients(self, run: Run, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        out = tmp_path / "coefficients.png"
        arguments = ["pictures", "--coefficients", "80", str(run.store), str(out)]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert out.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("last", [8, 160])
    def test_needs_steps_on_both_sides(self, run: Run, last: int) -> None:
        pytest.importorskip("matplotlib")
        from benchmarks.pictures import draw_coefficients
        from benchmarks.processes import BenchmarkError

        with pytest.raises(BenchmarkError, match=f"steps are up to {last}"):
            draw_coefficients(run.store, last)
