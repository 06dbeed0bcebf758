"""Separate hosts for tests: network namespaces on this machine, all with its file system.

`hosts` makes namespaces of its own and a bridge between them, in one more namespace. The machine's
interfaces, routes and firewall are neither used nor changed: a host reaches the other hosts and
itself, nothing else. Each has its own host name too, as `os.uname` gives it.

A namespace is kept by a process of its own (this file, run as a script), which waits for the end of
its standard input, kills every process in the namespace, and exits. When the process that called
`hosts` is killed, that pipe closes as well; nothing is left behind in any case, and nothing is
mounted.

As root this needs CAP_SYS_ADMIN and CAP_NET_ADMIN, else a kernel that lets users make user
namespaces. `why_not` says what is missing.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

NETWORK = "10.83.0"
"""The /24 of every `hosts`: networks that are not joined may have the same addresses."""

TOOLS = ("ip", "nsenter", "unshare")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ROOTLESS = os.name == "posix" and os.geteuid() != 0
SECONDS = 20
"""Limit for what the helpers do themselves."""

_serial = itertools.count()


class NamespaceError(OSError):
    """The machine refused a namespace or what belongs to it; the text is the tool's."""


@functools.cache
def why_not() -> str | None:
    """Say why this machine has no `hosts`; None if it has."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        with hosts(1):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces are refused: {error}"


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make `count` hosts on a network of their own; afterwards they and their processes are gone.

    Raises
    ------
    NamespaceError
        If the machine does not allow it; see `why_not`.
    """
    assert 1 <= count <= 254
    prefix = f"relex-{os.getpid()}-{next(_serial)}"
    with ExitStack() as stack:
        switch = _Namespace(f"{prefix}-switch", None)
        stack.callback(switch.close)
        made = []
        for index in range(count):
            host = Host(f"{prefix}-host{index}", f"{NETWORK}.{index + 1}", switch)
            stack.callback(host.close)
            made.append(host)
        switch.ip("link add bridge type bridge", "link set bridge up")
        for host in made:
            # The far end is born inside the host: it is never seen among the machine's interfaces.
            switch.ip(
                f"link add {host.port} type veth peer name eth0 netns {host.pid}",
                f"link set {host.port} master bridge",
                f"link set {host.port} up",
            )
            host.ip(
                "link set lo up",
                f"address add {host.address}/24 dev eth0",
                "link set eth0 up",
            )
        yield made


class _Namespace:
    """A network with a host name, kept by a process that runs `_keep`."""

    def __init__(self, name: str, beside: _Namespace | None) -> None:
        self.name = name
        if not ROOTLESS:
            outer = []
        elif beside is None:
            outer = ["unshare", "--user", "--map-root-user", "--"]
        else:
            # One user namespace owns all: a link may only be laid between networks of one owner.
            outer = [*beside._enter("--user", "--preserve-credentials")]
        # In a session of its own: Ctrl-C is for the test, whose clean-up ends this process.
        here = [str(number) for number in _inside()]
        keep = [sys.executable, "-I", "-S", os.path.abspath(__file__), name, *here]
        self._keeper = subprocess.Popen(
            [*outer, "unshare", "--net", "--uts", "--", *keep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PATH": PATH},
        )
        try:
            self._expect("ready")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The keeping process: everything before it on its command line was replaced by exec."""
        return self._keeper.pid

    def ip(self, *commands: str) -> None:
        """Run commands of the program ip in this namespace."""
        done = subprocess.run(
            [*self.prefix(), "ip", "-batch", "-"],
            check=False,
            input="\n".join(commands) + "\n",
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "PATH": PATH},
        )
        if done.returncode:
            raise NamespaceError(done.stderr.strip() or f"ip ended with {done.returncode}")

    def prefix(self) -> list[str]:
        """Words in front of a command that make it run here; it keeps its process id."""
        user = ["--user", "--preserve-credentials"] if ROOTLESS else []
        return self._enter(*user, "--net", "--uts")

    def _enter(self, *kinds: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *kinds, "--"]

    def _expect(self, answer: str) -> None:
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        if line.strip() != answer:
            _, errors = self._keeper.communicate(timeout=SECONDS)
            raise NamespaceError((line + errors).strip() or "the keeping process ended")

    def kill(self) -> None:
        """Kill every process here (SIGKILL); return when they are gone."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.write("kill\n")
        self._keeper.stdin.flush()
        self._expect("killed")

    def close(self) -> None:
        """Kill every process here and give the namespace up."""
        try:
            self._keeper.communicate(timeout=SECONDS)
        finally:
            self._keeper.kill()
            self._keeper.wait()
            _close_pipes(self._keeper)


class Host(_Namespace):
    """One host: `address` is what the others reach it by, `name` its host name."""

    def __init__(self, name: str, address: str, switch: _Namespace) -> None:
        self.address = address
        self.port = "port" + address.rpartition(".")[2]
        self._switch = switch
        self._started: list[subprocess.Popen[Any]] = []
        super().__init__(name, switch)

    def popen(self, args: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a process here, with the options of `subprocess.Popen`.

        The process is the program itself, so signals reach it. It is in a session of its own. What
        it leaves running is killed with the host, and its pipes are closed.
        """
        options.setdefault("start_new_session", True)
        process = subprocess.Popen([*self.prefix(), *map(str, args)], **options)
        self._started.append(process)
        return process

    def run(
        self, args: Sequence[str | Path], *, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end and return what it wrote, as text.

        Raises
        ------
        subprocess.CalledProcessError
            If it fails, unless `check` is False; its errors are in the message's notes.
        subprocess.TimeoutExpired
            If it takes longer than `timeout` seconds; it is killed.
        """
        options = {"check": True, "capture_output": True, "text": True, **options}
        command = [*self.prefix(), *map(str, args)]
        try:
            return subprocess.run(command, timeout=timeout, start_new_session=True, **options)  # noqa: PLW1510
        except subprocess.CalledProcessError as error:
            if error.stderr:
                error.add_note(str(error.stderr))
            raise

    def cut(self) -> None:
        """Pull the cable: packets are lost in both directions, and nobody is told."""
        self._switch.ip(f"link set {self.port} down")

    def join(self) -> None:
        """Plug the cable in again."""
        self._switch.ip(f"link set {self.port} up")

    def kill(self) -> None:
        """Kill every process here; others see connections close, unless `cut` came before."""
        # One that has not got as far as entering the namespace is known by its number only.
        for process in self._started:
            process.kill()
        super().kill()
        for process in self._started:
            process.wait(SECONDS)

    def close(self) -> None:
        for process in self._started:
            process.kill()
        try:
            super().close()
        finally:
            for process in self._started:
                process.wait(SECONDS)
                _close_pipes(process)


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            # Nobody reads what is still to be written there.
            with suppress(BrokenPipeError):
                pipe.close()


# --- the process that keeps a namespace ----------------------------------------------------------


def _inside() -> tuple[int, int]:
    """Inodes of the namespaces of network and host name that this process is in."""
    return os.stat("/proc/self/ns/net").st_ino, os.stat("/proc/self/ns/uts").st_ino


def _keep(name: str, *outside: int) -> None:
    # What follows renames the host, and kills all its processes: never where the caller is.
    if len(outside) != 2 or any(a == b for a, b in zip(outside, _inside(), strict=True)):
        raise SystemExit("not in namespaces of its own: this is started by hosts() only")
    socket.sethostname(name)
    _say("ready")
    for line in sys.stdin:
        assert line == "kill\n"
        _kill_others()
        _say("killed")
    _kill_others()


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def _kill_others() -> None:
    """Kill all other processes of this namespace, and those that they start meanwhile."""
    deadline = time.monotonic() + SECONDS / 2
    while others := _others():
        if time.monotonic() > deadline:
            raise SystemExit(f"processes do not end: {others}")
        for pid in others:
            # Gone by itself, or another process has the number now: of this namespace or not.
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def _others() -> list[int]:
    mine, _ = _inside()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if os.stat(f"/proc/{entry.name}/ns/net").st_ino == mine:
                found.append(int(entry.name))
        except OSError:  # ended, or another user's, who cannot be in here
            continue
    return found


if __name__ == "__main__":
    _keep(sys.argv[1], *map(int, sys.argv[2:]))
