"""Errors, warnings, exit statuses, JSON, and what start-up imports."""

from __future__ import annotations

import dataclasses
import errno
import math
import subprocess
import sys
import warnings

import click
import pytest

from relex_stream import __version__, errors
from relex_stream.cli.main import COMMANDS, LazyGroup, cli, main
from tests.cli import conftest
from tests.cli.conftest import COMMAND_LINES, FakeApi, Run, document

LEAVES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.RelexStreamError)
]


def test_help_and_completion_load_nothing_heavy() -> None:
    # A fresh interpreter, since this one has everything loaded. Not by time: machines differ.
    probe = """
import sys
from relex_stream.cli.main import cli
heavy = {"numpy", "torch", "dask", "zarr", "numba", "numcodecs", "safetensors", "rich"}
for arguments in (["--help"], ["--version"], ["build-store", "--help"], ["info"]):
    try:
        cli.main(arguments, prog_name="relex-stream")
    except SystemExit:
        pass
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "relex_stream.cli.extrapolate" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)


def test_importing_the_package_loads_nothing_heavy() -> None:
    probe = """
import sys
import relex_stream
relex_stream.SourceError
assert "relex_stream.api" not in sys.modules
heavy = {"numpy", "torch", "dask", "zarr", "numba", "click"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)


def test_python_dash_m_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relex_stream", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"relex-stream {__version__}\n"


def test_main_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["relex-stream", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_common_options(name: str) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert COMMANDS[name].short_help.endswith(".")
    flags = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--debug", "-q", "--quiet", "-v", "--verbose"} <= flags
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


def test_a_command_without_table_entry_is_unknown(run: Run) -> None:
    result = run("build")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: No such command 'build'")
    assert isinstance(cli, LazyGroup)


def test_no_arguments_show_the_help(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "build-store" in result.stderr


def test_completion_offers_commands(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("_RELEX_STREAM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "relex-stream ex")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().stdout.split() == ["plain,extrapolate", "plain,export"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_errors_of_the_library_are_one_line(leaf: type[Exception], api: FakeApi, run: Run) -> None:
    api.raises = leaf("step 3: model.norm is\nmissing; train \x1b[1mmore")
    result = run("info", "run.store")
    assert result.exit_code == 2
    assert result.stderr == "error: step 3: model.norm is missing; train \\x1b[1mmore\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyError("x"), 1, "unexpected KeyError: 'x'; run again with --debug for the traceback"),
        (EOFError("short"), 1, "unexpected EOFError: short; run again with --debug for the trac"),
        (ZeroDivisionError(), 1, "unexpected ZeroDivisionError; run again with --debug"),
        (OSError("no errno"), 1, "unexpected OSError: no errno; run again with --debug"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "Permission denied: a/b"),
        (OSError(errno.EIO, "Input/output error", 7), 2, "Input/output error\n"),
        (MemoryError(), 2, "out of memory; give a smaller --memory-limit or fewer --workers"),
    ],
)
def test_other_errors(error: Exception, status: int, line: str, api: FakeApi, run: Run) -> None:
    api.raises = error
    result = run("info", "run.store")
    assert result.exit_code == status
    # Before EOFError, click writes an empty line.
    assert result.stderr.lstrip().startswith(f"error: {line}")
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("arguments", [("--debug", "info", "s"), ("info", "s", "--debug")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...], api: FakeApi, run: Run) -> None:
    api.raises = errors.StoreError("damaged")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: damaged\n")


def test_interruption(api: FakeApi, run: Run) -> None:
    api.raises = KeyboardInterrupt()
    result = run(*COMMAND_LINES["build-store"])
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; nothing committed is lost\n")
    assert document(run(*COMMAND_LINES["build-store"], "--json"))["error"]["type"] == "Interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info"], "Missing argument 'STORE'; see 'relex-stream info --help'"),
        (["extrapolate", "s", "o"], "Missing option '--target-step'; see"),
        (["extrapolate", "s", "o", "--target-step", "0"], "Invalid value for '--target-step'"),
        (["info", "s", "--memory"], "No such option"),
        (["info", "s", "-q", "-v"], "--quiet and --verbose exclude each other"),
        (["build-store", "b", "c", "s", "--memory-limit", "lots"], "Invalid value for '--memory-l"),
    ],
)
def test_wrong_usage_is_one_line_and_json(arguments: list[str], message: str, run: Run) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    result = run(*arguments, "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["message"].startswith(message)


def test_warnings_are_lines_and_in_the_document(api: FakeApi, run: Run) -> None:
    api.warn("step 7 repeats step 6")
    api.warn("step 8 repeats step 6")
    result = run(*COMMAND_LINES["build-store"], "-q")
    assert result.stderr == "warning: step 7 repeats step 6\nwarning: step 8 repeats step 6\n"
    result = run(*COMMAND_LINES["build-store"], "-q", "--json")
    assert document(result)["warnings"] == ["step 7 repeats step 6", "step 8 repeats step 6"]
    api.raises = errors.SourceError("gone")
    result = run(*COMMAND_LINES["build-store"], "-q", "--json")
    assert document(result) == {
        "error": {"type": "SourceError", "message": "gone"},
        "warnings": ["step 7 repeats step 6", "step 8 repeats step 6"],
    }


@pytest.mark.filterwarnings("default")
def test_warnings_of_others_need_debug(api: FakeApi, run: Run) -> None:
    api.warns.append(RuntimeWarning("overflow"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("info", "s").stderr == ""
        result = run("info", "s", "--debug", "--json")
    assert "RuntimeWarning: overflow" in result.stderr
    assert document(result)["warnings"] == []


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_json_is_one_document_with_every_field(name: str, api: FakeApi, run: Run) -> None:
    api.events.clear()  # of a watch each is a document more
    result = run(*COMMAND_LINES[name], "--json")
    assert result.exit_code == 0
    summary = api.results[name.replace("-", "_")]
    fields = {field.name for field in dataclasses.fields(summary)}
    assert set(document(result)) == fields | {"warnings"}


def test_json_has_null_for_what_it_cannot_express(api: FakeApi, run: Run) -> None:
    assert math.isnan(conftest.EXTRAPOLATE.median_r2 or 0.0)
    content = document(run(*COMMAND_LINES["extrapolate"], "--json"))
    assert content["median_r2"] is None
    assert content["outputs"][0] == {
        "path": "out/step-600",
        "what": {"target_step": 600, "rank": 1, "damping": 0.5, "anchor": "base"},
        "inside_history": False,
    }
    assert content["figures"][0]["singular_values"] == [0.25, 0.01]


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "--target-step", "x"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    probe = """
import sys
sys.path.insert(0, ".")
from tests.cli.conftest import FakeApi
sys.modules["relex_stream.api"] = FakeApi()
from relex_stream.cli.main import main
main()
"""
    line = ["-c", probe, *COMMAND_LINES["extrapolate"], *arguments]
    with subprocess.Popen(
        [sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        messages = process.stderr.read()
    assert "Traceback" not in messages
    assert "Broken" not in messages
    assert process.returncode in (1, 2)
