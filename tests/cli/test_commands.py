"""What each command hands to the library and prints for people."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from relex_stream import api as real_api
from relex_stream.models import RunOptions
from relex_stream.summaries import Output, SkillOfDamping
from tests.cli import conftest
from tests.cli.conftest import COMMAND_LINES, FakeApi, Run


def test_build_store_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("build-store", "base", "checkpoints", "run.store", "--pattern", "epoch-{step}"),
        *("--steps", "1:75:5,80", "--memory-limit", "512MiB", "--workers", "3"),
        *("--include-base", "--allow-nonfinite", "--seed", "7", "--as", "bf16"),
        *("--replace-from", "40", "--source", "dcp", "--strip-prefix", "app.model."),
        *("--map", "^a=b", "--map", "c=d=e"),
        *("--step-offset", "3", "--then", "second", "200", "--then", "third", "300"),
        *("--scheduler", "tcp://host:8786", "--local-cluster", "4"),
        *("--download-dir", "through"),
    )
    assert result.exit_code == 0, result.stderr
    assert api.calls == [
        (
            "build_store",
            {
                "base": Path("base"),
                "checkpoints": Path("checkpoints"),
                "store": Path("run.store"),
                "pattern": "epoch-{step}",
                "steps": "1:75:5,80",
                "memory_limit": 512 << 20,
                "workers": 3,
                "include_base": True,
                "allow_nonfinite": True,
                "seed": 7,
                "cast": "bf16",
                "replace_from": 40,
                "source": "dcp",
                "strip_prefix": "app.model.",
                "map_names": (("^a", "b"), ("c=d", "e")),
                "step_offset": 3,
                "then": ((Path("second"), 200), (Path("third"), 300)),
                "scheduler": "tcp://host:8786",
                "local_cluster": 4,
                "download_dir": Path("through"),
            },
        )
    ]


def test_places_on_the_hub_stay_text(api: FakeApi, run: Run) -> None:
    run("build-store", "hf://org/base@v1", "hf://org/run", "run.store")
    run("verify", "run.store", "--base", "hf://org/base")
    run("watch", "hf://org/base", "checkpoints", "run.store")
    arguments = [call[1] for call in api.calls]
    assert [arguments[0][name] for name in ("base", "checkpoints", "store")] == [
        "hf://org/base@v1",
        "hf://org/run",
        Path("run.store"),
    ]
    assert arguments[1]["base"] == arguments[2]["base"] == "hf://org/base"


RUN = (
    *("--base", "elsewhere", "--memory-limit", "8GB", "--workers", "1", "--overwrite"),
    *("--dry-run", "--scheduler", "scheduler.json", "--local-cluster", "2"),
    *("--devices", "cuda:1", "--device-memory-limit", "20GB"),
)
RUN_ARGUMENTS = {
    "base": Path("elsewhere"),
    "memory_limit": 8_000_000_000,
    "workers": 1,
    "overwrite": True,
    "dry_run": True,
    "scheduler": "scheduler.json",
    "local_cluster": 2,
    "devices": "cuda:1",
    "device_memory_limit": 20_000_000_000,
}
SELECTION = ("--include", "*.a", "--include", "*.b", "--exclude", "x", "--excluded-from", "latest")
SELECTION_ARGUMENTS = {
    "include": ("*.a", "*.b"),
    "exclude": ("x",),
    "excluded_from": "latest",
}
SUBSPACE = (
    *("--history-steps", "40", "--rank", "2", "--rank", "5", "--svd", "exact"),
    *("--power-iterations", "2", "--fit", "polynomial:3", "--window", "7", "--group-by", "layer"),
)
SUBSPACE_ARGUMENTS = {
    "history_steps": 40,
    "rank": (2, 5),
    "svd": "exact",
    "power_iterations": 2,
    "fit": "polynomial:3",
    "window": 7,
    "group_by": "layer",
}
PATHS = {"store": Path("run.store"), "out": Path("out")}


def test_extrapolate_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("extrapolate", "run.store", "out", "--target-step", "600", "--target-step", "300"),
        *("--refit-every", "9", "--damping", "0.3", "--damping", "1", "--anchor", "latest"),
        *("--anchor", "base", "--compat", "relex", "--step-scale", "2", *SUBSPACE, *SELECTION),
        *RUN,
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "target_steps": (600, 300),
        "refit_every": 9,
        "damping": (0.3, 1.0),
        "anchor": ("latest", "base"),
        "compat": "relex",
        "step_scale": 2.0,
        **PATHS,
        **SUBSPACE_ARGUMENTS,
        **SELECTION_ARGUMENTS,
        **RUN_ARGUMENTS,
    }
    assert api.calls == [("extrapolate", expected)]


def test_reconstruct_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("reconstruct", "run.store", "out", "--step", "10", "--step", "20", "--fitted"),
        *(*SUBSPACE, *SELECTION, *RUN),
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "steps": (10, 20),
        "fitted": True,
        **PATHS,
        **SUBSPACE_ARGUMENTS,
        **SELECTION_ARGUMENTS,
        **RUN_ARGUMENTS,
    }
    assert api.calls == [("reconstruct", expected)]


def test_combine_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("combine", "run.store", "out", "--recipe", "lawa:last=2", "--recipe", "expo:alpha=1"),
        *("--weights", "10=0.5", "--history-steps", "40", *SELECTION, *RUN),
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "recipes": ("lawa:last=2", "expo:alpha=1"),
        "weights": ("10=0.5",),
        "history_steps": 40,
        **PATHS,
        **SELECTION_ARGUMENTS,
        **RUN_ARGUMENTS,
    }
    assert api.calls == [("combine", expected)]


def test_sweep_passes_its_file(api: FakeApi, run: Run) -> None:
    result = run("sweep", "run.store", "out", "--grid", "grid.yaml", *RUN)
    assert result.exit_code == 0, result.stderr
    assert api.calls == [("sweep", {"grid": Path("grid.yaml"), **PATHS, **RUN_ARGUMENTS})]


def test_sweep_makes_entries_of_its_options(api: FakeApi, run: Run) -> None:
    result = run(
        *("sweep", "run.store", "out", "--target-step", "600", "--step", "10", "--step", "20"),
        *("--recipe", "lawa:last=2", "--weights", "10=1", "--history-steps", "40"),
        *("--history-steps", "all", "--rank", "2", "--fit", "linear", "--fit", "sinusoid"),
        *("--window", "all", "--window", "7", "--refit-every", "never", "--damping", "auto"),
        *("--damping", "1", "--anchor", "latest", "--group-by", "layer", "--svd", "exact"),
        *("--power-iterations", "2", *SELECTION),
    )
    assert result.exit_code == 0, result.stderr
    ((_, arguments),) = api.calls
    subspace = {
        "history_steps": (40, None),
        "rank": (2,),
        "fit": ("linear", "sinusoid"),
        "window": (None, 7),
        "group_by": ("layer",),
        "svd": "exact",
        "power_iterations": 2,
        **SELECTION_ARGUMENTS,
    }
    assert arguments["grid"] == [
        {
            "method": "extrapolate",
            "target_step": (600,),
            "refit_every": (None,),
            "damping": ("auto", 1.0),
            "anchor": ("latest",),
            **subspace,
        },
        {"method": "reconstruct", "step": (10, 20), **subspace},
        {
            "method": "combine",
            "recipe": ("lawa:last=2",),
            "weights": ("10=1",),
            "history_steps": (40, None),
            **SELECTION_ARGUMENTS,
        },
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name a --grid, or a --target-step"),
        (("--include", "*.a"), "name a --grid, or a --target-step"),
        (("--rank", "2"), "name a --grid, or a --target-step"),
        (("--grid", "g.yaml", "--history-steps", "3"), "--grid has all settings"),
        (("--step", "3", "--damping", "1"), "--damping changes nothing of what is asked for"),
        (("--grid", "g.yaml", "--step", "3"), "--grid has all settings: leave the others out"),
        (("--target-step", "3", "--window", "0"), "neither a number of 1 or more nor all"),
    ],
)
def test_sweep_says_what_it_is_not_asked(
    options: tuple[str, ...], message: str, api: FakeApi, run: Run
) -> None:
    result = run("sweep", "run.store", "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not api.calls


def test_sweep_summary(run: Run) -> None:
    output = run(*COMMAND_LINES["sweep"]).stdout
    assert "models       3 in out, told apart below\n" in output
    assert "\nmethod_extrapolate/fit_polynomial-2  damping 0.250 chosen\n" in output
    assert "\nmethod_reconstruct\n" in output
    assert "RELEX; projection\n" in output


def test_analyze_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("analyze", "run.store", "--history-steps", "40", "--rank", "2", "--fit", "polynomial:2"),
        *("--window", "7", "--exact", "--by", "tensor", "--base", "b", "--memory-limit", "8GB"),
        *("--workers", "2"),
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "store": Path("run.store"),
        "history_steps": 40,
        "rank": 2,
        "fit": "polynomial:2",
        "window": 7,
        "exact": True,
        "base": Path("b"),
        "memory_limit": 8_000_000_000,
        "workers": 2,
    }
    assert api.calls == [("analyze", expected)]


def test_backtest_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("backtest", "run.store", "--history-steps", "40", "--history-steps", "60", "--rank", "2"),
        *("--rank", "3", "--target-step", "80", "--target-step", "90", "--fit", "polynomial:2"),
        *("--fit", "linear", "--window", "7", "--window", "9", "--anchor", "latest", "--exact"),
        *("--damping", "0.2", "--damping", "1", "--base", "b", "--memory-limit", "8GB"),
        *("--workers", "2", "--group-by", "layer"),
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "store": Path("run.store"),
        "group_by": "layer",
        "history_steps": (40, 60),
        "target_steps": (80, 90),
        "rank": (2, 3),
        "fit": ("polynomial:2", "linear"),
        "window": (7, 9),
        "anchor": ("latest",),
        "damping": (0.2, 1.0),
        "exact": True,
        "base": Path("b"),
        "memory_limit": 8_000_000_000,
        "workers": 2,
    }
    assert api.calls == [("backtest", expected)]


def test_report_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("report", "run.store", "--out", "report.html", "--history-steps", "40", "--rank", "4"),
        *("--target-step", "80", "--target-step", "90", "--fit", "polynomial:2", "--window", "7"),
        *("--exact", "--title", "A run", "--pictures", "p", "--picture-format", "svg"),
        *("--picture-format", "png", "--csv", "c", "--overwrite", "--base", "b"),
        *("--memory-limit", "8GB", "--workers", "2"),
    )
    assert result.exit_code == 0, result.stderr
    expected = {
        "store": Path("run.store"),
        "out": Path("report.html"),
        "history_steps": 40,
        "target_steps": (80, 90),
        "rank": 4,
        "fit": "polynomial:2",
        "window": 7,
        "exact": True,
        "title": "A run",
        "pictures": Path("p"),
        "picture_format": ("svg", "png"),
        "csv": Path("c"),
        "overwrite": True,
        "base": Path("b"),
        "memory_limit": 8_000_000_000,
        "workers": 2,
    }
    assert api.calls == [("report", expected)]


def test_report_prints_what_was_written_and_the_verdict(api: FakeApi, run: Run) -> None:
    output = run(*COMMAND_LINES["report"]).stdout
    assert "page         report.html, 400 KiB\n" in output
    assert output.endswith("\n\nThe store speaks weakly for extrapolating.\n")
    assert "pictures" not in output
    api.results["report"] = dataclasses.replace(
        conftest.REPORT, pictures=("p/a.png",), tables=("c/a.csv", "c/b.csv")
    )
    output = run(*COMMAND_LINES["report"]).stdout
    assert "pictures     1 file\n" in output
    assert "tables       2 files\n" in output


EXPORT_OPTIONS = (
    *("--base", "b", "--format", "hf", "--as", "bf16"),
    *("--memory-limit", "1073741824", "--workers", "2"),
)
EXPORT_ARGUMENTS = {
    "store": Path("run.store"),
    "out": Path("out"),
    "file_format": "hf",
    "cast": "bf16",
    "base": Path("b"),
    "memory_limit": 1 << 30,
    "workers": 2,
}


def test_export_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run(
        *("export", "run.store", "out", "--step", "0", *EXPORT_OPTIONS),
    )
    assert result.exit_code == 0, result.stderr
    assert api.calls == [("export", {**EXPORT_ARGUMENTS, "step": 0})]


def test_export_of_several_steps_passes_every_option(api: FakeApi, run: Run) -> None:
    result = run("export", "run.store", "out", "--steps", "10:100:10", *EXPORT_OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert api.calls == [("export_steps", {**EXPORT_ARGUMENTS, "steps": "10:100:10"})]
    first, *_ = result.stdout.splitlines()
    assert first.endswith("  step_10/config.json")
    assert "step 20 as a model like the base: 2 files" in result.stderr


@pytest.mark.parametrize("steps", [(), ("--step", "1", "--steps", "1:2")])
def test_export_takes_one_step_or_several(api: FakeApi, run: Run, steps: tuple[str, ...]) -> None:
    result = run("export", "run.store", "out", *steps)
    assert result.exit_code == 2
    assert "give one of --step and --steps" in result.stderr
    assert api.calls == []


def test_verify_info_and_drop_pass_every_option(api: FakeApi, run: Run) -> None:
    run(
        *("verify", "run.store", "--base", "b", "--against", "c", "--repair", "--dry-run"),
        *("--pattern", "epoch-{step}", "--source", "dcp", "--strip-prefix", "model."),
        *("--map", "^a[.]=b.", "--as", "bf16", "--step-offset", "20", "--then", "d", "40"),
        *("--memory-limit", "512MiB", "--workers", "2"),
    )
    run("info", "run.store")
    run("drop", "run.store", "--after", "0")
    assert api.calls == [
        (
            "verify",
            {
                "store": Path("run.store"),
                "base": Path("b"),
                "against": Path("c"),
                "repair": True,
                "dry_run": True,
                "pattern": "epoch-{step}",
                "source": "dcp",
                "strip_prefix": "model.",
                "map_names": (("^a[.]", "b."),),
                "cast": "bf16",
                "step_offset": 20,
                "then": ((Path("d"), 40),),
                "memory_limit": 512 << 20,
                "workers": 2,
            },
        ),
        ("info", {"store": Path("run.store")}),
        ("drop", {"store": Path("run.store"), "after": 0}),
    ]


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_calls_and_defaults_are_those_of_the_library(name: str, api: FakeApi, run: Run) -> None:
    assert run(*COMMAND_LINES[name]).exit_code == 0
    function, arguments = api.calls[0]
    signature = inspect.signature(getattr(real_api, function))
    signature.bind(**arguments)
    accepted = set(signature.parameters) | set(real_api.RunArguments.__annotations__)
    assert set(arguments) <= accepted
    defaults = {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    }
    if "run" in signature.parameters:
        options = dataclasses.fields(RunOptions)
        defaults |= {each.name: each.default for each in options if each.name != "entry_capacity"}
    # What the command itself brings.
    for key in ("progress", "on_event", "stop"):
        defaults.pop(key, None)
    for key in defaults.keys() - {"recipes"}:  # named in the command line above
        # What may be given several times is a tuple here; one value by itself will do there.
        assert arguments[key] in (defaults[key], (defaults[key],)), key


def test_build_store_summary(run: Run) -> None:
    output = run(*COMMAND_LINES["build-store"]).stdout
    assert "steps added              10, 20, 30, ..., 500 (50 steps)\n" in output
    assert "steps skipped            1, 2, in the store already\n" in output
    assert "read                     3.96 GiB\n" in output
    assert "stored                   17.0 MiB\n" in output
    assert "ratio                    238x\n" in output
    assert "bits per changed weight  14.67\n" in output
    assert "peak memory              250 MiB\n" in output
    assert "elapsed                  12.3 s\n" in output
    assert "30 files left out:\n  optimizer_0.pt\n" in output
    assert "... and 10 more (--verbose lists all)" in output
    assert "statistics pass 1" not in output


def test_build_store_summary_without_new_steps(api: FakeApi, run: Run) -> None:
    api.results["build_store"] = dataclasses.replace(
        conftest.BUILD,
        steps_added=(),
        skipped_files=(),
        base_bytes_stored=81 << 20,
        ratio=float("nan"),
        bits_per_changed_weight=float("nan"),
    )
    output = run(*COMMAND_LINES["build-store"]).stdout
    assert "steps added    none\n" in output
    assert "base weights   81.0 MiB\n" in output
    assert "nan" not in output
    assert "left out" not in output


def test_verbose_lists_everything_and_the_plan(run: Run) -> None:
    output = run(*COMMAND_LINES["build-store"], "-v").stdout
    assert "10, 20, 30, 40, 50" in output
    assert "optimizer_29.pt" in output
    assert "statistics pass 1" in output
    output = run(*COMMAND_LINES["extrapolate"], "--verbose").stdout
    assert "write outputs" in output
    assert "model.embed.weight        0.25 0.01              90.0 %  0.970" in output
    output = run(*COMMAND_LINES["info"], "-v").stdout
    assert "more" not in output


def test_extrapolate_summary(run: Run) -> None:
    output = run(*COMMAND_LINES["extrapolate"]).stdout
    assert "step 600            out/step-600\n" in output
    assert "step 300            out/step-300 (inside the history)\n" in output
    assert "rank 1, randomized SVD with 1 power iteration, linear fit" in output
    assert "290, of which 12 never changed" in output
    assert "explained variance  87.1 %, median\n" in output
    assert "R2 of the fit       -, median\n" in output


def test_analyze_prints_figures_with_their_errors(run: Run) -> None:
    output = run(*COMMAND_LINES["analyze"]).stdout
    assert "rank 1        explains 87.5 % +- 1.5 of all movement\n" in output
    assert "R2            0.987 +- 0.004, linear fit of the first component\n" in output
    assert "R2 elsewhere  -11.250 +- 0.500, at stored steps" in output
    assert "bend          -0.062 +- 0.030: the movement speeds up\n" in output
    assert "  20  has the weights of step 10\n" in output
    module, layer = output.partition("module ")[2].split("layer ")
    assert "87.5 % 87.5 %" in module
    assert "+-" not in module
    assert "87.5 % +- 1.5 87.5 % +- 0.0" in layer
    assert "tensor  " not in output
    assert "nan" not in output


def test_analyze_lists_what_is_asked_for(run: Run) -> None:
    output = run(*COMMAND_LINES["analyze"], "--by", "tensor", "--by", "tensor").stdout
    assert output.count("a\\x1b[2J") == 1
    assert "module" not in output
    assert "0.48 %" not in output
    verbose = run(*COMMAND_LINES["analyze"], "-v").stdout
    assert "  10   0.48 %         0.01           0.01\n" in verbose


def test_backtest_prints_skills_and_advice(api: FakeApi, run: Run) -> None:
    output = run(*COMMAND_LINES["backtest"]).stdout
    assert (
        "from  to  horizon  anchor           x 0.3     x 1  auto          best\n"
        "----  --  -------  ------  --------------  ------  ----  ------------\n"
        "  40  80     2.00  latest  0.058 +- 0.004  -0.125     -  0.060 (0.37)\n"
    ) in output
    assert "most skill  --rank 1 --fit linear --anchor latest --damping auto\n" in output
    said = "mean skill  0.050 over 12 forecasts, least 0.010: hardly nearer than staying"
    assert f"{said}\n" in output
    assert "above 0     up to 4.00 times the history, the furthest that could be tested\n" in output
    # The five tensors with least skill.
    assert "tensor 6" in output
    assert "tensor 1" not in output
    assert "tensor 1" in run(*COMMAND_LINES["backtest"], "-v").stdout
    advice = conftest.BACKTEST.recommendation
    assert advice is not None
    other = dataclasses.replace(
        conftest.BACKTEST,
        recommendation=dataclasses.replace(advice, damping=0.25, window=9, reach_is_known=True),
        forecasts=(
            conftest.FORECAST,
            dataclasses.replace(
                conftest.FORECAST, window=9, auto=SkillOfDamping(0.5, -0.25, None, 1.0)
            ),
        ),
    )
    api.results["backtest"] = other
    output = run(*COMMAND_LINES["backtest"]).stdout
    assert "--fit linear --window 9 --anchor latest --damping 0.25\n" in output
    assert "above 0     up to 4.00 times the history\n" in output
    assert "  40  80     2.00     all  latest" in output
    assert "-0.250 (0.50)" in output
    api.results["backtest"] = dataclasses.replace(other, recommendation=None)
    assert "do not extrapolate" in run(*COMMAND_LINES["backtest"]).stdout


def test_what_models_are_told_apart_by_is_named(api: FakeApi, run: Run) -> None:
    other = {"target_step": 600, "rank": 3, "damping": 1.0, "anchor": "latest"}
    outputs = (conftest.EXTRAPOLATE.outputs[0], Output("out/other", other))
    changed = {"group_by": "layer", "window": 5, "refit_every": 2, "compat": "relex"}
    settings = conftest.EXTRAPOLATE.settings | changed
    summary = dataclasses.replace(conftest.EXTRAPOLATE, outputs=outputs, settings=settings)
    api.results["extrapolate"] = summary
    output = run(*COMMAND_LINES["extrapolate"]).stdout
    assert "step 600, rank 1, damping 0.5, anchor base  out/step-600\n" in output
    assert "step 600, rank 3, damping 1, anchor latest  out/other\n" in output
    assert (
        "rank 1, 3 of each layer, randomized SVD with 1 power iteration, "
        "linear fit of the last 5 checkpoints, again every 2 steps, as the scripts of RELEX's "
        "authors\n"
    ) in output
    api.results["extrapolate"] = dataclasses.replace(summary, outputs=outputs[:1] * 30)
    assert "and 10 more (--verbose lists all)" in run(*COMMAND_LINES["extrapolate"]).stdout
    assert "and 10 more" not in run(*COMMAND_LINES["extrapolate"], "-v").stdout


def test_reconstruct_summary(run: Run) -> None:
    output = run(*COMMAND_LINES["reconstruct"]).stdout
    assert "step 10             out\n" in output
    assert "method              rank 1, randomized SVD with 1 power iteration\n" in output
    assert "R2" not in output


def test_combine_prints_the_effective_weights(run: Run) -> None:
    output = run(*COMMAND_LINES["combine"]).stdout
    assert "left out       3 tensors, copied from the last checkpoint\n" in output
    rows = [line.split("  ") for line in output.splitlines() if line.startswith("ema:decay=0.5")]
    weights = {row[1]: float(row[-1]) for row in rows[1:]}
    # The base, the eight that weigh most, and the rest together.
    assert len(weights) == 10
    assert weights["base"] == pytest.approx(0.5**50)
    assert (weights["step 10"], weights["step 80"]) == (0.5, pytest.approx(0.5**8))
    assert weights["42 others"] == pytest.approx(0.5**8)
    assert "step 500" in run(*COMMAND_LINES["combine"], "--verbose").stdout


def test_dry_run_prints_the_plan_even_when_quiet(api: FakeApi, run: Run) -> None:
    api.results["extrapolate"] = dataclasses.replace(conftest.EXTRAPOLATE, dry_run=True)
    output = run(*COMMAND_LINES["extrapolate"], "--dry-run", "--quiet").stdout
    assert output.startswith("dry run: nothing was written\n")
    assert (
        "stage              tasks      read     write  memory per worker\n"
        "-----------------  -----  --------  --------  -----------------\n"
        "statistics pass 1  1,200  18.0 MiB       0 B           40.0 MiB\n"
        "write outputs      1,200  99.0 MiB  81.0 MiB           30.0 MiB\n"
        "\n"
        "projected memory 290 MiB of 768 MiB allowed: 200 MiB before the work, 10.0 MiB shared, "
        "2 workers of 40.0 MiB\n"
    ) in output


def test_export_lists_checksums_alone_on_stdout(run: Run) -> None:
    result = run(*COMMAND_LINES["export"])
    # The second name would clear the screen; sha256sum --check reads the first line as it is.
    assert result.stdout == f"{'ab' * 32}  config.json\n{'cd' * 32}  w\\x1b[2J\n"
    assert "step 10: 2 files, 81.0 MiB written to out in 0.50 s" in result.stderr


def test_info_leaves_the_middle_of_a_long_run_out(run: Run) -> None:
    lines = run("info", "run.store").stdout.splitlines()
    rows = lines[lines.index("") + 3 :]
    assert len(rows) == 21
    assert rows[0].split()[0] == "1"
    assert rows[10] == "  ... 30 more (--verbose lists all)"
    assert rows[-1].split()[0] == "50"
    assert "190,000  0.48 %" in rows[0]


def test_info_of_an_empty_store_and_one_with_its_base(api: FakeApi, run: Run) -> None:
    api.results["info"] = dataclasses.replace(
        conftest.INFO, steps=(), base_included=True, base_bytes_stored=5 << 20
    )
    output = run("info", "run.store", "-q").stdout
    assert "steps                    none\n" in output
    assert "(in the store)" in output
    assert "base weights             5.00 MiB\n" in output
    assert "BF16: 289 tensors, 40,499,000 weights; F32: 1 tensor, 1,000 weights" in output


def test_verify_of_an_intact_store(run: Run) -> None:
    result = run("verify", "run.store")
    assert result.exit_code == 0
    assert result.stdout == (
        "run.store: intact; 50 steps, 1,950 frames, 50 records and 6 blobs checked, "
        "18.0 MiB in 0.10 s\n"
    )


def test_verify_names_problems_and_fails(api: FakeApi, run: Run) -> None:
    api.results["verify"] = dataclasses.replace(
        conftest.VERIFY, problems=("step 4: chunk c/0/1 is missing", "step 5: record damaged")
    )
    result = run("verify", "run.store")
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "problem: step 4: chunk c/0/1 is missing\nproblem: step 5: record damaged\n"
        "run.store: 2 problems; "
    )
    quiet = run("verify", "run.store", "-q")
    assert quiet.exit_code == 1
    assert quiet.stdout.count("\n") == 2
    assert conftest.document(run("verify", "run.store", "--json"))["problems"] == [
        "step 4: chunk c/0/1 is missing",
        "step 5: record damaged",
    ]


def test_verify_says_what_was_compared_and_rebuilt(api: FakeApi, run: Run) -> None:
    api.results["verify"] = dataclasses.replace(
        conftest.VERIFY,
        repaired=("deltas/w/c.0.1", "zarr.json"),
        compared=(1, 2),
        not_compared=(3,),
        compared_bytes=3 << 20,
        notes=("the checkpoint of step 3 is left out: cut short",),
    )
    result = run("verify", "run.store", "--against", "checkpoints", "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:-1] == [
        "rebuilt: deltas/w/c.0.1",
        "rebuilt: zarr.json",
        "note: the checkpoint of step 3 is left out: cut short",
        "compared with checkpoints: 1, 2, 3.00 MiB; not there: 3",
    ]
    dry = run("verify", "run.store", "--repair", "--dry-run", "-q")
    assert dry.stdout == "would be rebuilt: deltas/w/c.0.1\nwould be rebuilt: zarr.json\n"


def test_drop_says_which_steps_went(api: FakeApi, run: Run) -> None:
    assert run("drop", "run.store", "--after", "30").stdout == (
        "dropped: 40, 50; 2.00 MiB freed\nleft: 10, 20, 30\n"
    )
    api.results["drop"] = dataclasses.replace(conftest.DROP, steps_dropped=(), bytes_freed=0)
    assert run("drop", "run.store", "--after", "30").stdout == (
        "nothing to drop: no step later than 30\nleft: 10, 20, 30\n"
    )


@pytest.mark.parametrize(
    "name",
    ["build-store", "report", "extrapolate", "reconstruct", "combine", "sweep", "export", "drop"],
)
def test_quiet_says_nothing_on_success(name: str, run: Run) -> None:
    result = run(*COMMAND_LINES[name], "--quiet")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "", 0)
