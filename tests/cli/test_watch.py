"""The watch command: lines, JSON lines, exit statuses, signals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relex_stream.cli.watch import describe_event
from relex_stream.summaries import WatchEvent
from tests.cli.conftest import WATCH, WATCH_EVENTS, FakeApi, Run
from tests.crash.runs import tiny_trajectory
from tests.make_checkpoints import Trajectory

ROOT = Path(__file__).parents[2]
STORED, DELETING, WAITING = WATCH_EVENTS


def test_every_option_is_passed_on(api: FakeApi, run: Run) -> None:
    result = run(
        *("watch", "base", "checkpoints", "run.store", "--pattern", "epoch-{step}", "--steps"),
        *("1:75:5", "--settle", "2.5", "--poll", "1", "--give-up", "60", "--delete-ingested"),
        *("--base-kept-elsewhere", "--keep-every", "10", "--keep-last", "0", "--until", "75"),
        *("--once", "--idle-exit", "600", "--on-commit", "notify 'a b' $HOME", "--dry-run"),
        *("--include-base", "--allow-nonfinite", "--seed", "7", "--memory-limit", "512MiB"),
        *("--workers", "3", "--source", "dcp", "--strip-prefix", "app.", "--map", "^a=b"),
        *("--as", "bf16"),
    )
    assert result.exit_code == 0, result.stderr
    ((name, arguments),) = api.calls
    assert arguments.pop("stop").is_set() is False
    assert callable(arguments.pop("on_event"))
    assert (name, arguments) == (
        "watch",
        {
            "base": Path("base"),
            "checkpoints": Path("checkpoints"),
            "store": Path("run.store"),
            "pattern": "epoch-{step}",
            "steps": "1:75:5",
            "settle_s": 2.5,
            "poll_s": 1.0,
            "give_up_s": 60.0,
            "delete_ingested": True,
            "base_kept_elsewhere": True,
            "keep_every": 10,
            "keep_last": 0,
            "until": 75,
            "once": True,
            "idle_exit_s": 600.0,
            "on_commit": ("notify", "a b", "$HOME"),
            "dry_run": True,
            "include_base": True,
            "allow_nonfinite": True,
            "seed": 7,
            "memory_limit": 512 << 20,
            "workers": 3,
            "source": "dcp",
            "strip_prefix": "app.",
            "map_names": (("^a", "b"),),
            "cast": "bf16",
        },
    )


LINE = ("watch", "base", "checkpoints", "run.store")


def test_a_line_is_printed_for_each_event(run: Run) -> None:
    lines = run(*LINE).stdout.splitlines()
    assert lines == [
        "2026-11-23T20:53:14+01:00 step 40: read 15.3 GiB, stored 55.3 MiB, 283x, 33.1 s, verified",
        "2026-11-23T20:53:14+01:00 step 30: deleting 2 files, 15.3 GiB",
        r"2026-11-23T20:53:14+01:00 step 50: waiting: runs/\x1b[2J/step_50 lacks .metadata",
        "stopped by a signal; 1 step stored, 1 verified, 1 deleted (15.3 GiB)",
    ]
    assert "  step_30/b.safetensors" in run(*LINE, "--verbose").stdout.splitlines()
    assert run(*LINE, "--quiet").stdout == ""


def test_each_document_is_a_line(run: Run) -> None:
    documents = [json.loads(line) for line in run(*LINE, "--json").stdout.splitlines()]
    assert documents[:3] == [
        json.loads(json.dumps(dataclasses.asdict(event))) for event in WATCH_EVENTS
    ]
    assert documents[3]["ended"] == "stopped"
    assert documents[3]["warnings"] == []


def test_differences_are_shown_and_an_exit_status(api: FakeApi, run: Run) -> None:
    problems = tuple(f"step 40: tensor w, block {block}: differs" for block in range(5))
    event = dataclasses.replace(STORED, verified=False, problems=problems)
    api.events = [event]
    api.results["watch"] = dataclasses.replace(WATCH, steps_differing=(40,))
    for options in ((), ("--quiet",)):
        result = run(*LINE, *options)
        assert result.exit_code == 1
        assert "DIFFERS from its source: 5 differences; the source stays" in result.stdout
        assert result.stdout.count("problem: step 40") == 3
    assert run(*LINE, "--verbose").stdout.count("problem: ") == 5
    assert "differing: 40" in run(*LINE).stdout


def test_a_step_given_up_is_an_exit_status(api: FakeApi, run: Run) -> None:
    api.events = [dataclasses.replace(WAITING, kind="given-up")]
    api.results["watch"] = dataclasses.replace(WATCH, steps_given_up=(50,))
    result = run(*LINE, "--quiet")
    assert result.exit_code == 1
    assert "step 50: given up: " in result.stdout
    assert "given up: 50" in run(*LINE).stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (WatchEvent("T", "verified", 5, elapsed_s=1.5, verified=True), "1.50 s, verified"),
        (WatchEvent("T", "stored", 5, message="not verified: gone"), "not verified: gone"),
        (WatchEvent("T", "would-store", 5), "would be stored and verified"),
        (WatchEvent("T", "would-delete", 5, files=("a",)), "would delete 1 file, 0 B"),
        (WatchEvent("T", "left-out", 5, message="late"), "left out: late"),
    ],
)
def test_other_events(event: WatchEvent, text: str) -> None:
    (line,) = describe_event(event, verbose=False)
    assert line.startswith("T step 5: ")
    assert line.endswith(text)


@pytest.mark.parametrize(("text", "message"), [("'", "No closing quotation"), (" ", "no program")])
def test_a_hook_that_is_none_is_refused(text: str, message: str, api: FakeApi, run: Run) -> None:
    result = run(*LINE, "--on-commit", text)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not api.calls


# --- real processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return tiny_trajectory(tmp_path_factory.mktemp("made"), range(1, 4))


def start(made: Trajectory, store: Path, code: str = "") -> subprocess.Popen[str]:
    program = f"{code}\nfrom relex_stream.cli.main import main\nmain()"
    options = ("--settle", "0", "--poll", "0.05", "--workers", "1")
    return subprocess.Popen(
        [sys.executable, "-c", program, "watch", made.base, made.checkpoints, store, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(made: Trajectory, tmp_path: Path, number: int) -> None:
    with start(made, tmp_path / "run.store") as process:
        assert process.stdout is not None
        for step in made.steps:
            assert f"step {step}: read" in process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out == "stopped by a signal; 3 steps stored, 3 verified, 0 deleted (0 B)\n"


STUCK = """
import time
from relex_stream import cli, watching
import relex_stream.cli.watch as command
command.GRACE_S = {grace}

def stuck(*arguments, **options):
    print("under way", flush=True)
    time.sleep(60)

watching.build = stuck
"""


@pytest.mark.parametrize(("grace", "signals"), [(0.3, 1), (60, 2)])
def test_what_takes_too_long_is_given_up(
    made: Trajectory, tmp_path: Path, grace: float, signals: int
) -> None:
    store = tmp_path / "run.store"
    with start(made, store, STUCK.format(grace=grace)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 15
    assert (process.returncode, err) == (0, "")
    assert out.startswith("stopped by a signal; 0 steps stored")
    assert not store.exists()


def test_handlers_are_as_before_afterwards(run: Run) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    run(*LINE)
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    assert after == before
