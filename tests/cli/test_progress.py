from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

from relex_stream.cli.progress import BarProgress, LineProgress, QuietProgress, make_progress
from tests.cli.conftest import COMMAND_LINES, MIB, Run


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_lines_at_the_start_every_ten_seconds_and_at_the_end() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = LineProgress(lines.append, clock)
    progress.start("write outputs", 100 * MIB)
    for _ in range(25):
        clock.now_s += 1
        progress.advance(4 * MIB)
    progress.finish()
    assert lines == [
        "write outputs: 100 MiB to do",
        "write outputs: 40.0 MiB of 100 MiB (40 %), 4.00 MiB/s, 15.0 s left",
        "write outputs: 80.0 MiB of 100 MiB (80 %), 4.00 MiB/s, 5.00 s left",
        "write outputs: done, 100 MiB in 25.0 s, 4.00 MiB/s",
    ]


def test_stages_without_bytes_or_time_divide_by_nothing() -> None:
    lines: list[str] = []
    progress = LineProgress(lines.append, Clock())
    progress.start("check", 0)
    progress.advance(0)
    progress.finish()
    assert lines == ["check ...", "check: done in 0.00 s"]


def test_a_log_whose_reader_has_gone_stops_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = make_progress(quiet=False, stream=Gone())
    progress.start("read", 1)
    progress.finish()
    progress.close()


def test_the_stream_decides() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_progress(quiet=True, stream=Terminal()), QuietProgress)
    assert isinstance(make_progress(quiet=False, stream=io.StringIO()), LineProgress)


def test_commands_report_progress_on_stderr_only(run: Run) -> None:
    result = run(*COMMAND_LINES["extrapolate"], "--json")
    assert result.stderr.startswith("read checkpoints: 2.00 MiB to do\n")
    assert "read checkpoints: done, 2.00 MiB in" in result.stderr


def test_a_bar_on_a_terminal() -> None:
    from rich.console import Console

    screen = io.StringIO()
    clock = Clock()
    progress = BarProgress(Console(file=screen, force_terminal=True, width=100), clock)
    progress.start("read checkpoints", 4 * MIB)
    clock.now_s += 1
    progress.advance(MIB)
    progress.finish()
    progress.start("nothing", 0)
    progress.finish()
    progress.close()
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "1.00 MiB in 1.00 s" in text
    assert re.search(r"nothing\s.* in 0.00 s", text)


def test_warnings_go_above_the_bar_and_the_cursor_comes_back() -> None:
    probe = """
import sys
sys.path.insert(0, ".")
from tests.cli.conftest import FakeApi
from relex_stream.errors import StoreError
fake = sys.modules["relex_stream.api"] = FakeApi()
fake.warn("step 7 repeats step 6")
fake.raises = StoreError("damaged")
from relex_stream.cli.main import main
main()
"""
    screen, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe, *COMMAND_LINES["build-store"]],
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            check=False,
        )
        text = os.read(screen, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(screen)
    assert done.returncode == 2
    assert done.stdout == b""
    assert "warning: step 7 repeats step 6" in text
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.rindex(show) > text.rindex(hide)
    assert text.rstrip().endswith("error: damaged")
