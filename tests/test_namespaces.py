"""Hosts made of network namespaces: joined with each other, with nothing else, and gone after."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import namespaces
from tests.namespaces import NETWORK, Host, NamespaceError, hosts, why_not

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""

CALL = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

# Connecting a datagram socket looks the route up and sends nothing.
ROUTE = """
import socket, sys
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect((sys.argv[1], 9))
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

CLIENT = """
import json, sys, time
from distributed import Client

def where(number):
    import os
    time.sleep(0.05)
    return os.uname().nodename, number * number

with Client(scheduler_file=sys.argv[1], timeout=15) as client:
    client.wait_for_workers(2, timeout=15)
    json.dump(client.gather(client.map(where, range(20), pure=False)), sys.stdout)
"""


@pytest.fixture(autouse=True)
def _allowed() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def refusal(host: Host, address: str, port: int = 5000, timeout: float = 5) -> str:
    """Say why `host` cannot connect; empty if it can."""
    call = [sys.executable, "-I", "-S", "-c", CALL, address, port, timeout]
    return host.run([str(word) for word in call], check=False).stderr.strip()


def serve(host: Host) -> subprocess.Popen[bytes]:
    process = host.popen([sys.executable, "-I", "-S", "-c", SERVER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"
    return process


def interfaces() -> set[str]:
    """The machine's interfaces, as far as they might be ours."""
    return {name for _, name in socket.if_nameindex() if name.startswith(("bridge", "port"))}


def network_of(host: Host) -> int:
    return os.stat(f"/proc/{host.pid}/ns/net").st_ino


def live_networks() -> set[int]:
    """Inodes of the network namespaces that any process is in."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.add((entry / "ns" / "net").stat().st_ino)
            except OSError:
                continue
    return found


def alive(made: list[Host]) -> list[int]:
    """Processes in the namespaces of `made`, found by host name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(f"TEST_HOST={host.name}".encode() in words for host in made):
                found.append(int(entry.name))
    return found


def test_hosts_reach_each_other_while_they_are_joined() -> None:
    with hosts(3) as (first, second, third):
        assert first.address == f"{NETWORK}.1"
        serve(first)
        assert refusal(first, first.address) == ""
        assert refusal(second, first.address) == ""

        second.cut()
        assert "timed out" in refusal(second, first.address, timeout=0.5)
        assert refusal(third, first.address) == ""
        second.join()
        assert refusal(second, first.address) == ""

        first.cut()
        assert "timed out" in refusal(second, first.address, timeout=0.5)
        first.join()
        assert refusal(second, first.address) == ""


def test_hosts_reach_nothing_else() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as outside,
        hosts(1) as (host,),
        hosts(1) as (other,),
    ):
        port = outside.getsockname()[1]
        assert "refused" in refusal(host, "127.0.0.1", port)
        # A documentation address, which belongs to nobody.
        for address in ("203.0.113.1", "10.84.0.1"):
            command = [sys.executable, "-I", "-S", "-c", ROUTE, address]
            assert "unreachable" in host.run(command, check=False).stderr
        serve(other)
        assert host.address == other.address
        assert "refused" in refusal(host, other.address)


def test_hosts_have_names_of_their_own_and_the_same_files(tmp_path: Path) -> None:
    before = os.uname().nodename
    with hosts(2) as made:
        names = [host.run(["uname", "-n"]).stdout.strip() for host in made]
        assert names == [host.name for host in made]
        assert len({*names, before}) == 3
        assert str(os.getpid()) in names[0]
        made[0].run(["sh", "-c", "echo here > file"], cwd=tmp_path)
        assert made[1].run(["cat", tmp_path / "file"]).stdout == "here\n"
    assert os.uname().nodename == before


def test_signals_reach_the_program_and_failures_tell() -> None:
    with hosts(1) as (host,):
        process = host.popen(["sleep", "60"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        with pytest.raises(subprocess.CalledProcessError) as caught:
            host.run(["sh", "-c", "echo reason >&2; exit 3"])
        assert caught.value.returncode == 3
        assert caught.value.__notes__ == ["reason\n"]
        with pytest.raises(subprocess.TimeoutExpired):
            host.run(["sleep", "60"], timeout=0.2)


def leave_processes(host: Host) -> None:
    """Start children that outlive their parents and leave their sessions."""
    script = "sleep 600 & setsid sleep 600 & echo started; (setsid sleep 600 &); sleep 600"
    process = host.popen(
        ["sh", "-c", script],
        env={**os.environ, "TEST_HOST": host.name},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"


def test_kill_ends_all_of_one_host() -> None:
    with hosts(2) as (first, second):
        leave_processes(first)
        leave_processes(second)
        assert alive([first])
        first.kill()
        assert not alive([first])
        assert alive([second])
        assert first.run(["echo", "still a host"]).stdout == "still a host\n"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left(error: type[BaseException] | None) -> None:
    before = interfaces()
    seen: list[Host] = []
    networks: set[int] = set()
    with nullcontext() if error is None else pytest.raises(error), hosts(2) as made:
        for host in made:
            seen.append(host)
            networks.add(network_of(host))
            leave_processes(host)
        assert networks <= live_networks()
        assert alive(seen)
        assert interfaces() == before
        if error is not None:
            raise error
    assert len(networks) == 2
    assert not alive(seen)
    assert not networks & live_networks()
    assert interfaces() == before


def test_a_half_made_network_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = set()

    def refuse(host: Host, *commands: str) -> None:
        networks.add(network_of(host))
        raise NamespaceError("refused")

    monkeypatch.setattr(Host, "ip", refuse)
    with pytest.raises(NamespaceError, match="refused"), hosts(2):
        pass
    assert networks
    assert not networks & live_networks()


@pytest.mark.parametrize("given", [False, True])
def test_a_keeper_outside_of_a_namespace_does_nothing(given: bool) -> None:
    script = 'sleep 60 >/dev/null 2>&1 & "$@" </dev/null; kill -0 $!; echo $?; kill $!'
    # Tried on a host of our own: what must not happen would end the processes of this one only.
    with hosts(1) as (host,):
        inside = [os.stat(f"/proc/{host.pid}/ns/{kind}").st_ino for kind in ("net", "uts")]
        command = [sys.executable, "-I", "-S", namespaces.__file__, "renamed"]
        words = [*command, *map(str, inside)] if given else command
        told = host.run(["sh", "-c", script, "sh", *words])
        assert told.stdout == "0\n"
        assert "not in namespaces of its own" in told.stderr
        assert host.run(["uname", "-n"]).stdout.strip() == host.name


def test_nothing_is_left_of_a_test_run_that_is_killed() -> None:
    script = (
        "import subprocess, sys\n"
        "from tests.namespaces import hosts\n"
        "with hosts(1) as made:\n"
        "    made[0].popen(['sleep', '600'])\n"
        "    made[0].popen(['sh', '-c', 'sleep 600 & echo $$; sleep 600'])\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        inside = int(process.stdout.readline())
        network = os.stat(f"/proc/{inside}/ns/net").st_ino
        process.kill()
    wait_until(lambda: network not in live_networks())


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dask_cluster_spans_hosts(tmp_path: Path) -> None:
    """A scheduler on the first host, a worker under its nanny on each of two others."""
    file = tmp_path / "scheduler.json"
    words = {
        "scheduler": [],
        "worker": ["--nthreads", "1", "--memory-limit", "0", "--death-timeout", "20"],
    }
    with hosts(3) as made:
        logs = [tmp_path / f"{host.name}.log" for host in made]
        for host, log, kind in zip(made, logs, ["scheduler", "worker", "worker"], strict=True):
            with log.open("wb") as output:
                common = ["--scheduler-file", file, "--host", host.address, "--no-dashboard"]
                host.popen(
                    [sys.executable, "-m", "dask", kind, *words[kind], *common],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=tmp_path,
                    env={**os.environ, "DASK_TEMPORARY_DIRECTORY": str(tmp_path / host.name)},
                )
        wait_until(file.exists, 15)
        client = made[0].run([sys.executable, "-c", CLIENT, file], check=False, cwd=tmp_path)
        told = "\n".join([client.stderr, *(log.read_text() for log in logs)])
        assert client.returncode == 0, told
        answers = json.loads(client.stdout)
    assert json.loads(file.read_text())["address"] == f"tcp://{NETWORK}.1:8786"
    assert [square for _, square in answers] == [number * number for number in range(20)]
    assert {name for name, _ in answers} == {host.name for host in made[1:]}
