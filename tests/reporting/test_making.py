"""Reports as files: the same each time, whole or absent, and of stores of any length."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import relex_stream as rs
from relex_stream.demo.run import TRAJECTORY
from relex_stream.reporting import charts, making
from relex_stream.reporting.sections import sections
from tests.make_checkpoints import make_trajectory, raw, round_to, write_model
from tests.reporting.conftest import Written, numbers_of


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_same_store_gives_the_same_bytes(shipped: Written, tmp_path: Path) -> None:
    again = rs.report(
        TRAJECTORY,
        tmp_path / "report.html",
        history_steps=40,
        target_steps=[60, 100],
        pictures=tmp_path / "pictures",
        picture_format=["png", "svg"],
        csv=tmp_path / "tables",
        workers=2,
    )
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == shipped.page
    assert again.verdict == shipped.summary.verdict
    for new, old in (("pictures", shipped.pictures), ("tables", shipped.tables)):
        assert left(tmp_path / new) == left(old)
        for path in old.iterdir():
            assert (tmp_path / new / path.name).read_bytes() == path.read_bytes(), path.name
    assert left(tmp_path) == {"report.html", "pictures", "tables"}


def test_the_summary_has_the_figures(shipped: Written) -> None:
    summary = shipped.summary
    analyzed = rs.analyze(TRAJECTORY, history_steps=40, rank=1)
    assert summary.explained_variance == pytest.approx(analyzed.model.explained_variance[0])
    assert summary.r2 == pytest.approx(analyzed.model.r2[0])
    assert summary.r2_elsewhere == pytest.approx(analyzed.model.r2_elsewhere[0])
    assert summary.recommendation == rs.backtest(TRAJECTORY).recommendation
    assert summary.page_bytes == len(shipped.page.encode())
    assert (summary.history, len(summary.steps)) == (tuple(range(1, 41)), 120)
    assert summary.page_bytes < 1_000_000


@pytest.mark.parametrize(
    ("steps", "asked", "charts", "said"),
    [
        ((5,), {}, {"storage", "memory"}, "There is one step, 5"),
        (
            (5, 6),
            {},
            {"coefficients", "explained_variance", "singular_values", "steps"},
            "There is no heat map of R2",
        ),
        ((1, 2, 3), {}, {"coefficients", "r2", "steps"}, "There is no band"),
        ((1, 2, 3), {"fit": "polynomial:5"}, {"coefficients"}, "the polynomial:5 fit takes 6"),
        ((1, 2, 3, 4, 5), {}, {"skill", "r2"}, "The band is what past forecasts were off by"),
        ((1, 2, 3, 4), {"history_steps": 1}, {"steps", "coefficients"}, "has too few checkpoints"),
    ],
)
def test_short_trajectories(
    tmp_path: Path, steps: tuple[int, ...], asked: dict[str, Any], charts: set[str], said: str
) -> None:
    run = make_trajectory(
        tmp_path, steps=steps, tensors={"a.0.w": (40, 50), "b": (30,)}, change_share=0.3
    )
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    summary = rs.report(tmp_path / "store", tmp_path / "report.html", **asked)
    assert charts | {"storage", "memory"} <= set(summary.charts)
    page = (tmp_path / "report.html").read_text()
    assert said in page
    assert "nan" not in page.replace("tenant", "")
    if len(steps) < 4:
        assert summary.recommendation is None
        assert summary.verdict.startswith("The store cannot say whether to extrapolate")


def test_weights_of_other_kinds_and_odd_steps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drift = rng.standard_normal((20, 30)).astype(np.float32)
    for step in (0, 1, 2, 3, 4, 5, 6):
        directory = tmp_path / (f"run/step_{step}" if step else "base")
        values = drift * np.float32(min(step, 5))
        write_model(directory, {"w": raw(round_to(values, "F32"), "F32")})
    with pytest.warns(rs.RelexStreamWarning, match="same weights"):
        rs.build_store(tmp_path / "base", tmp_path / "run", tmp_path / "store")
    summary = rs.report(tmp_path / "store", tmp_path / "report.html")
    assert summary.odd_steps == (6,)
    page = (tmp_path / "report.html").read_text()
    assert "has the weights of step 5" in page
    assert "none of them has a layer in its name" in page


def test_a_run_in_which_nothing_moved(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, steps=(1, 2), tensors={"w": (4, 4)})
    shutil.rmtree(run.directories[1])
    shutil.copytree(run.base, run.directories[1])
    with pytest.warns(rs.RelexStreamWarning):
        rs.build_store(run.base, run.checkpoints, tmp_path / "store", steps="1")
    with pytest.raises(rs.OptionError, match="changed any weight"):
        rs.report(tmp_path / "store", tmp_path / "report.html")
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    with pytest.raises(rs.OptionError, match="up to step 1 changed any weight; take a later"):
        rs.report(tmp_path / "store", tmp_path / "report.html", history_steps=1)


def test_a_base_that_is_gone_leaves_small_tensors_out(tmp_path: Path) -> None:
    run = make_trajectory(tmp_path, change_share=0.3)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    run.base.rename(tmp_path / "elsewhere")
    with pytest.warns(rs.RelexStreamWarning, match="are left out"):
        summary = rs.report(tmp_path / "store", tmp_path / "report.html")
    assert len(summary.left_out_tensors) == 3
    assert "3 small tensors without a sketch" in (tmp_path / "report.html").read_text()
    found = rs.report(tmp_path / "store", tmp_path / "whole.html", base=tmp_path / "elsewhere")
    assert not found.left_out_tensors


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    run = make_trajectory(tmp_path, tensors={"w": (40, 50)}, change_share=0.3)
    rs.build_store(run.base, run.checkpoints, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"history_steps": 0}, "is at step 0 or before"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"fit": "cubic"}, "--fit must be one of"),
        ({"window": 9}, "--window is 9 checkpoints, the history has 5"),
        ({"target_steps": [0]}, "--target-step must be at least 1"),
        ({"picture_format": "gif"}, "--picture-format must be one of png, svg"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"memory_limit": 1 << 20}, "raise --memory-limit"),
        ({"out": "store/report.html"}, "OUT store/report.html lies inside STORE"),
        ({"out": "base/report.html"}, "lies inside the base"),
        ({"pictures": "store/p"}, "--pictures store/p/coefficients.png lies inside STORE"),
        ({"csv": "store"}, "--csv store/summary.csv lies inside STORE"),
        ({"out": "nowhere/report.html"}, "there is no directory nowhere; make it first"),
        ({"out": "checkpoints"}, "checkpoints is a directory; name a file"),
        ({"out": "taken.html"}, "taken.html exists; name another file, or give --overwrite"),
        ({"pictures": "taken.html"}, "taken.html is not a directory; name another for --pictures"),
        ({"csv": "old"}, "old/steps.csv exists; name another file"),
        ({"out": "link.html", "overwrite": True}, "link.html is not a plain file"),
        ({"store": "base"}, "base"),
    ],
)
def test_what_is_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], message: str
) -> None:
    root = small.parent
    monkeypatch.chdir(root)
    (root / "taken.html").write_text("mine")
    (root / "link.html").symlink_to("taken.html")
    (root / "old").mkdir()
    (root / "old" / "steps.csv").write_text("mine")
    before = left(root)
    with pytest.raises(rs.RelexStreamError, match=message):
        rs.report(asked.pop("store", "store"), asked.pop("out", "report.html"), **asked)
    assert left(root) == before
    assert (root / "taken.html").read_text() == "mine"
    assert left(root / "old") == {"steps.csv"}


def test_overwriting_replaces_files_and_nothing_else(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The directory of the store is a fine place.
    monkeypatch.chdir(small.parent)
    for name in ("report.html", "steps.csv", "mine.csv"):
        Path(name).write_text("mine")
    rs.report("store", "report.html", csv=".", pictures=".", overwrite=True)
    assert Path("report.html").read_text().startswith("<!DOCTYPE html>")
    assert Path("steps.csv").read_text().startswith("step,")
    assert Path("mine.csv").read_text() == "mine"
    assert Path("skill.png").exists()


def test_an_error_on_the_way_leaves_no_page(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = left(small.parent)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(rs.OutputError, match=r"writing .*report.html failed: No space left"):
        rs.report(small, small.parent / "report.html")
    assert left(small.parent) == before


def test_settings_of_matplotlib_are_neither_used_nor_touched(small: Path) -> None:
    numbers = numbers_of(small)
    [storage] = [each for each in sections(numbers) if each.name == "storage"]
    before = dict(mpl.rcParams)
    found = []
    for size in (8, 30):
        with mpl.rc_context({"font.size": size, "svg.fonttype": "path", "axes.grid": True}):
            with charts.style():
                found.append([svg for _, _, svg in making.draw(numbers, [storage])])
            assert mpl.rcParams["font.size"] == size
    assert dict(mpl.rcParams) == before
    assert found[0] == found[1]


def test_other_commands_do_not_load_what_draws() -> None:
    probe = "import sys, relex_stream.api; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)
    assert making.PICTURE_FORMATS == ("png", "svg")
