"""A stand-in for `relex_stream.api`: it records its calls and returns made-up summaries."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest

from relex_stream.cli.main import cli
from relex_stream.errors import RelexStreamWarning
from relex_stream.specs import Progress
from relex_stream.summaries import (
    AnalyzeSummary,
    BacktestGroup,
    BacktestSummary,
    BuildSummary,
    CastSavings,
    DropSummary,
    ExportedFile,
    ExportsSummary,
    ExportSummary,
    ForecastSkill,
    GroupAnalysis,
    ModelsSummary,
    Output,
    Plan,
    Recommendation,
    ReportSummary,
    SkillOfDamping,
    StagePlan,
    StepAnalysis,
    StepInfo,
    StoreInfo,
    SubspaceFigures,
    VerifySummary,
    WatchEvent,
    WatchSummary,
)

MIB = 1 << 20

PLAN = Plan(
    processes=1,
    workers=2,
    memory_limit_bytes=768 * MIB,
    reserved_bytes=200 * MIB,
    shared_bytes=10 * MIB,
    projected_bytes=290 * MIB,
    stages=(
        StagePlan("statistics pass 1", 1200, 18 * MIB, 0, 40 * MIB),
        StagePlan("write outputs", 1200, 99 * MIB, 81 * MIB, 30 * MIB),
    ),
)

BUILD = BuildSummary(
    store="run.store",
    layout="global_step_N",
    steps_added=tuple(range(10, 510, 10)),
    steps_skipped=(1, 2),
    steps_total=52,
    bytes_in=4050 * MIB,
    bytes_stored=17 * MIB,
    base_bytes_stored=0,
    store_bytes=18 * MIB,
    ratio=238.2,
    changed_weights=9_720_000,
    bits_per_changed_weight=14.67,
    skipped_files=tuple(f"optimizer_{rank}.pt" for rank in range(30)),
    cast_savings=CastSavings(f32_step_bytes=1100 * MIB, bf16_step_bytes=9 * MIB),
    peak_memory_bytes=250 * MIB,
    elapsed_s=12.34,
    plan=PLAN,
)

SUBSPACE_SETTINGS = {
    "fit": "linear",
    "window": None,
    "svd": "randomized",
    "power_iterations": 1,
    "group_by": "tensor",
}

EXTRAPOLATE = ModelsSummary(
    store="run.store",
    dry_run=False,
    outputs=tuple(
        Output(
            f"out/step-{step}",
            {"target_step": step, "rank": 1, "damping": 0.5, "anchor": "base"},
            inside_history=step < 500,
        )
        for step in (600, 300)
    ),
    history=tuple(range(10, 510, 10)),
    settings={"method": "RELEX", **SUBSPACE_SETTINGS, "refit_every": None},
    tensors=290,
    unchanged_tensors=12,
    excluded_tensors=0,
    median_explained_variance=0.871,
    median_r2=float("nan"),
    bytes_read=99 * MIB,
    bytes_written=162 * MIB,
    peak_memory_bytes=260 * MIB,
    elapsed_s=1.5,
    plan=PLAN,
    figures=(SubspaceFigures("model.embed.weight", (0.25, 0.01), (0.85, 0.9), (0.97,)),),
)

RECONSTRUCT = dataclasses.replace(
    EXTRAPOLATE,
    outputs=(Output("out", {"step": 10, "rank": 1}),),
    settings={"method": "projection", **SUBSPACE_SETTINGS, "fit": None, "fitted": False},
    median_r2=None,
)

COMBINE = dataclasses.replace(
    EXTRAPOLATE,
    outputs=(
        Output(
            "out",
            {
                "recipe": "ema:decay=0.5",
                "source": "exponential moving average",
                "weights": {"base": 0.5**50, **{10 * age: 0.5**age for age in range(1, 51)}},
            },
        ),
    ),
    settings={
        "method": "linear combination",
        "include": [],
        "exclude": ["*norm*"],
        "excluded_from": "latest",
    },
    excluded_tensors=3,
    median_explained_variance=None,
    median_r2=None,
    figures=(),
)


SWEEP = dataclasses.replace(
    EXTRAPOLATE,
    outputs=(
        Output(
            "out/method_extrapolate/fit_linear",
            {
                "method": "RELEX",
                "fit": "linear",
                "window": None,
                "target_step": 600,
                "rank": 1,
                "damping": 1.0,
                "anchor": "base",
            },
        ),
        Output(
            "out/method_extrapolate/fit_polynomial-2",
            {
                "method": "RELEX",
                "fit": "polynomial:2",
                "window": 20,
                "target_step": 600,
                "rank": 1,
                "damping": "auto",
                "damping_chosen": 0.25,
                "anchor": "base",
            },
        ),
        Output("out/method_reconstruct", {"method": "projection", "step": 40, "rank": 1}),
    ),
    settings={"group_by": "tensor", "svd": "exact"},
    median_explained_variance=None,
    median_r2=None,
    figures=(),
)


def group_analysis(name: str, *, estimated: bool) -> GroupAnalysis:
    """Return figures of two components, the second of which is not there."""

    def errors(size: float) -> tuple[float, ...] | None:
        return (size, float("nan")) if estimated else None

    return GroupAnalysis(
        name=name,
        tensors=3,
        weights=81_000,
        delta_norm=0.125,
        singular_values=(2.0, float("nan")),
        singular_values_error=errors(0.1),
        explained_variance=(0.875, 0.875),
        explained_variance_error=(0.015, 0.0) if estimated else None,
        r2=(0.987, float("nan")),
        r2_error=errors(0.004),
        r2_elsewhere=(-11.25, float("nan")),
        r2_elsewhere_error=errors(0.5),
        bend=-0.0625,
        bend_error=0.03 if estimated else None,
    )


ANALYZE = AnalyzeSummary(
    store="run.store",
    history=tuple(range(10, 510, 10)),
    rank=2,
    fit="linear",
    window=None,
    exact=False,
    steps=(
        StepAnalysis(10, 0.0048, 0.01, 0.01, ""),
        StepAnalysis(20, 0.0, 0.0, 0.01, "has the weights of step 10"),
    ),
    model=group_analysis("model", estimated=True),
    layers=(group_analysis("model.layers.0", estimated=True),),
    modules=(group_analysis("model.layers.*.norm", estimated=False),),
    tensors=(group_analysis("a\x1b[2J", estimated=False),),
    unchanged_tensors=12,
    left_out_tensors=(),
    bytes_read=0,
    peak_memory_bytes=170 * MIB,
    elapsed_s=1.5,
)

FORECAST = ForecastSkill(
    history_step=40,
    target_step=80,
    horizon=2.0,
    rank=1,
    fit="linear",
    window=None,
    anchor="latest",
    moved=0.25,
    skills=(
        SkillOfDamping(0.3, 0.0581, 0.004, 0.2),
        SkillOfDamping(1.0, -0.125, None, 0.3),
    ),
    best=SkillOfDamping(0.37, 0.06, 0.005, 0.2),
    auto=None,
)

BACKTEST = BacktestSummary(
    store="run.store",
    steps=tuple(range(10, 510, 10)),
    exact=False,
    forecasts=(FORECAST,),
    recommendation=Recommendation(
        rank=1,
        fit="linear",
        window=None,
        anchor="latest",
        damping="auto",
        mean_skill=0.05,
        least_skill=0.01,
        forecasts=12,
        reach=4.0,
        reach_is_known=False,
    ),
    group_by="tensor",
    groups=tuple(
        BacktestGroup(f"tensor {number}", 0.1 - 0.01 * number, 0.35, 0.125) for number in range(7)
    ),
    left_out_tensors=(),
    bytes_read=0,
    peak_memory_bytes=170 * MIB,
    elapsed_s=1.5,
)

REPORT = ReportSummary(
    store="run.store",
    path="report.html",
    page_bytes=400 << 10,
    charts=("coefficients", "skill"),
    pictures=(),
    tables=(),
    steps=ANALYZE.history,
    history=ANALYZE.history,
    exact=False,
    explained_variance=0.875,
    r2=0.987,
    r2_elsewhere=float("nan"),
    odd_steps=(20,),
    verdict="The store speaks weakly for extrapolating.",
    recommendation=BACKTEST.recommendation,
    left_out_tensors=(),
    bytes_read=0,
    peak_memory_bytes=240 * MIB,
    elapsed_s=4.5,
)

EXPORT = ExportSummary(
    store="run.store",
    step=10,
    path="out",
    file_format="ingested",
    files=(ExportedFile("config.json", 700, "ab" * 32), ExportedFile("w\x1b[2J", 3, "cd" * 32)),
    bytes_written=81 * MIB,
    peak_memory_bytes=222 * MIB,
    elapsed_s=0.5,
)

EXPORTS = ExportsSummary(
    store="run.store",
    path="out",
    exports=(EXPORT, dataclasses.replace(EXPORT, step=20, path="out/step_20", file_format="hf")),
    bytes_written=162 * MIB,
    peak_memory_bytes=222 * MIB,
    elapsed_s=1.0,
)

INFO = StoreInfo(
    store="run.store",
    format_version=1,
    steps=tuple(StepInfo(step, 190_000, 0.0048, 350_000, 9_000, 81 * MIB) for step in range(1, 51)),
    tensors=290,
    weights=40_500_000,
    dtypes={"BF16": (289, 40_499_000), "F32": (1, 1000)},
    constant_tensors=3,
    seed=0,
    base="../base",
    base_included=False,
    bytes_in=4050 * MIB,
    store_bytes=18 * MIB,
    base_bytes_stored=0,
    ratio=225.0,
    bits_per_changed_weight=14.7,
)

VERIFY = VerifySummary("run.store", 50, 1950, 50, 6, 18 * MIB, (), 0.1)

DROP = DropSummary("run.store", (40, 50), (10, 20, 30), 2 * MIB)


WATCH = WatchSummary(
    store="run.store",
    ended="stopped",
    steps_added=(40,),
    steps_verified=(40,),
    steps_differing=(),
    steps_deleted=(30,),
    steps_given_up=(),
    bytes_in=16_400_000_000,
    bytes_stored=58_000_000,
    bytes_deleted=16_400_000_000,
    elapsed_s=33.5,
)

WATCH_TIME = "2026-11-23T20:53:14+01:00"
WATCH_EVENTS = (
    WatchEvent(
        WATCH_TIME,
        "stored",
        40,
        bytes_in=16_400_000_000,
        bytes_stored=58_000_000,
        ratio=282.8,
        elapsed_s=33.1,
        verified=True,
    ),
    WatchEvent(
        WATCH_TIME,
        "deleting",
        30,
        files=("step_30/a.safetensors", "step_30/b.safetensors"),
        bytes_deleted=16_400_000_000,
    ),
    WatchEvent(WATCH_TIME, "waiting", 50, "runs/\x1b[2J/step_50 lacks .metadata"),
)


class FakeApi(types.ModuleType):
    """What `relex_stream.api` has; `test_commands.py` holds its calls against the real one."""

    def __init__(self) -> None:
        super().__init__("relex_stream.api")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[str, Any] = {
            "build_store": BUILD,
            "analyze": ANALYZE,
            "backtest": BACKTEST,
            "report": REPORT,
            "extrapolate": EXTRAPOLATE,
            "reconstruct": RECONSTRUCT,
            "combine": COMBINE,
            "sweep": SWEEP,
            "export": EXPORT,
            "export_steps": EXPORTS,
            "info": INFO,
            "verify": VERIFY,
            "drop": DROP,
            "watch": WATCH,
        }
        self.events = list(WATCH_EVENTS)
        self.raises: BaseException | None = None
        self.warns: list[Warning] = []

    def _run(self, name: str, arguments: dict[str, Any]) -> Any:
        arguments.pop("self")
        progress = arguments.pop("progress", None)
        self.calls.append((name, arguments))
        if progress is not None:
            progress.start("read checkpoints", 2 * MIB)
            progress.advance(MIB)
        for warning in self.warns:
            warnings.warn(warning, stacklevel=2)
        if self.raises is not None:
            raise self.raises
        if progress is not None:
            progress.advance(MIB)
            progress.finish()
        return self.results[name]

    def build_store(self, base: Path, checkpoints: Path, store: Path, **asked: Any) -> BuildSummary:
        places = {"base": base, "checkpoints": checkpoints, "store": store}
        return self._run("build_store", {"self": self, **places, **asked})

    def analyze(self, store: Path, **asked: Any) -> AnalyzeSummary:
        return self._run("analyze", {"self": self, "store": store, **asked})

    def backtest(self, store: Path, **asked: Any) -> BacktestSummary:
        return self._run("backtest", {"self": self, "store": store, **asked})

    def report(self, store: Path, out: Path, **asked: Any) -> ReportSummary:
        return self._run("report", {"self": self, "store": store, "out": out, **asked})

    def extrapolate(self, store: Path, out: Path, **asked: Any) -> ModelsSummary:
        return self._run("extrapolate", {"self": self, "store": store, "out": out, **asked})

    def reconstruct(self, store: Path, out: Path, **asked: Any) -> ModelsSummary:
        return self._run("reconstruct", {"self": self, "store": store, "out": out, **asked})

    def combine(self, store: Path, out: Path, **asked: Any) -> ModelsSummary:
        return self._run("combine", {"self": self, "store": store, "out": out, **asked})

    def sweep(self, store: Path, out: Path, **asked: Any) -> ModelsSummary:
        return self._run("sweep", {"self": self, "store": store, "out": out, **asked})

    def export(
        self,
        store: str | Path,
        out: str | Path,
        *,
        step: int,
        file_format: str | None = None,
        cast: str | None = None,
        base: str | Path | None = None,
        memory_limit: int | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> ExportSummary:
        return self._run("export", locals())

    def export_steps(self, store: Path, out: Path, **asked: Any) -> ExportsSummary:
        return self._run("export_steps", {"self": self, "store": store, "out": out, **asked})

    def info(self, store: str | Path) -> StoreInfo:
        return self._run("info", locals())

    def verify(
        self,
        store: str | Path,
        *,
        progress: Progress | None = None,
        **asked: Any,
    ) -> VerifySummary:
        return self._run("verify", {"self": self, "store": store, "progress": progress, **asked})

    def drop(self, store: str | Path, *, after: int) -> DropSummary:
        return self._run("drop", locals())

    def watch(self, base: Path, checkpoints: Path, store: Path, **asked: Any) -> WatchSummary:
        for event in self.events:
            asked["on_event"](event)
        places = {"base": base, "checkpoints": checkpoints, "store": store}
        return self._run("watch", {"self": self, **places, **asked})

    def warn(self, text: str) -> None:
        """Let the next call warn."""
        self.warns.append(RelexStreamWarning(text))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """The fake, in the place of the real module."""
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "relex_stream.api", fake)
    return fake


Run = Callable[..., click.testing.Result]


@pytest.fixture
def run(api: FakeApi) -> Run:
    """Run the command line with these arguments, against the fake."""

    def run(*arguments: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli, arguments, prog_name="relex-stream")

    return run


COMMAND_LINES = {
    "build-store": ("build-store", "base", "checkpoints", "run.store"),
    "analyze": ("analyze", "run.store"),
    "backtest": ("backtest", "run.store"),
    "report": ("report", "run.store", "-o", "report.html"),
    "extrapolate": ("extrapolate", "run.store", "out", "--target-step", "600"),
    "reconstruct": ("reconstruct", "run.store", "out", "--step", "10"),
    "combine": ("combine", "run.store", "out", "--recipe", "ema:decay=0.5"),
    "sweep": ("sweep", "run.store", "out", "--grid", "grid.yaml"),
    "export": ("export", "run.store", "out", "--step", "10"),
    "info": ("info", "run.store"),
    "verify": ("verify", "run.store"),
    "drop": ("drop", "run.store", "--after", "30"),
    "watch": ("watch", "base", "checkpoints", "run.store"),
}
"""A shortest valid line for each command of the library."""


def document(result: click.testing.Result) -> Any:
    """Return the one JSON document on stdout; fails if there is anything else."""
    return json.loads(result.stdout)
