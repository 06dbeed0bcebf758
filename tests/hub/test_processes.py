"""Whole processes against a Hub: the environment they go by, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import relex_stream as rs
from tests.hub.server import FakeHub, Request, content_of, serving
from tests.hub.test_build import check_exports, used_bytes
from tests.make_checkpoints import Trajectory

# Small segments, so that a small file has many; and one after the other.
PROGRAM = """
from relex_stream.hub import download
download.SEGMENT_BYTES, download.CONNECTIONS = 8000, 1
from relex_stream.cli.main import main
main()
"""


def start(
    hub: FakeHub, home: Path, *arguments: object, **environment: str
) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("kills", [[23], pytest.param([9, 23, 31, 33], marks=pytest.mark.slow)])
def test_killed_in_mid_download_it_goes_on(
    run: Trajectory, tmp_path: Path, kills: list[int]
) -> None:
    one = used_bytes(run.directories[10])
    store, home = tmp_path / "store", tmp_path / "hf"
    most = [0]
    asked: list[tuple[str, str | None]] = []
    left = list(kills)
    with serving() as hub:
        repository = hub.add("org/run")
        repository.token = "hf_right"
        for step in run.steps[:3]:
            repository.commit(content_of(run.directories[step]), branch=f"step_{step}")
        process: subprocess.Popen[str] | None = None

        def watch(request: Request) -> None:
            most.append(used_bytes(tmp_path / "store.download"))
            if "/cdn/" in request.path:
                asked.append((request.path, request.range))
                if left and len(asked) == left[0] and process is not None:
                    left.pop(0)
                    process.kill()

        hub.before = watch
        call = ("build-store", run.base, "hf://org/run", store, "--json")
        while left:
            process = start(hub, home, *call, HF_TOKEN="hf_right")
            assert finish(process)[0] == -signal.SIGKILL
        process = start(hub, home, *call, HF_TOKEN="hf_right")
        status, out, err = finish(process)
    assert status == 0, err
    assert json.loads(out)["steps_total"] == 3
    check_exports(run, store, run.steps[:3])
    assert not (tmp_path / "store.download").exists()
    assert max(most) < 2.5 * one
    # Only what was under way is asked for twice.
    assert len(asked) <= len(set(asked)) + 2 * len(kills)
    # Checkpoints do not go through the Hub's cache.
    assert not [path for path in home.rglob("*") if path.stat().st_size > 10_000]


def test_the_environment_says_where_and_who(run: Trajectory, tmp_path: Path) -> None:
    with serving() as hub:
        hub.add("org/run").token = "hf_right"
        call = ("build-store", "hf://org/run", "hf://org/run", tmp_path / "store")
        runs = [
            start(hub, tmp_path / "hf", *call, HF_TOKEN="hf_wrong"),
            start(hub, tmp_path / "hf", *call, "--json", HF_HUB_OFFLINE="1"),
        ]
        (wrong, _, told), (offline, out, _) = map(finish, runs)
    assert (wrong, offline) == (2, 2)
    assert told.count("\n") == 1
    assert told.startswith("error: org/run: no such repository on http://127.0.0.1:")
    assert json.loads(out)["error"] == {
        "type": "HubError",
        "message": "org/run: cannot be asked for in offline mode; unset HF_HUB_OFFLINE",
    }
    assert not (tmp_path / "store").exists()


def test_other_places_of_commands_are_paths(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from relex_stream.cli.main import cli

    for call in (
        ("build-store", "base", "checkpoints", "hf://org/store"),
        ("info", "hf://org/store"),
        ("watch", "base", "hf://org/run", "run.store"),
        ("export", "run.store", "hf://org/out", "--step", "5"),
    ):
        result = CliRunner().invoke(cli, call)
        assert result.exit_code == 2
        assert "on the Hub; give a directory here" in result.stderr


@pytest.mark.parametrize("code", ["import relex_stream", "import relex_stream.api"])
def test_huggingface_hub_is_loaded_for_the_hub_alone(code: str) -> None:
    check = f"import sys; {code}; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(rs.MissingDependencyError, match=r"pip install 'relex-stream\[hub\]'"):
        rs.build_store("base", "hf://org/run", tmp_path / "store")
