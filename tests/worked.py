"""Run the shell blocks of a document in order, and compare what they print with what it says.

A block of ``text`` right after one of ``sh`` is its output, on both streams. Each of its lines has
to be among those that were printed, in that order, with ``...`` for anything; numbers may differ in
the last places. Neither is looked at below a ``<!-- not-run: why -->``, as in `test_docs`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import click.testing

from relex_stream.cli.main import cli
from tests.test_docs import ROOT, Block, blocks_of

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
PRELUDE = f"""
relex-stream() {{ {shlex.quote(sys.executable)} -m relex_stream "$@"; }}
python() {{ {shlex.quote(sys.executable)} "$@"; }}
set -euo pipefail
"""


def run_document(text: str, place: Path) -> list[str]:
    """Run the blocks of a document in the working directory `place`; return what does not agree."""
    wrong: list[str] = []
    printed = ""
    blocks = [*blocks_of(text), Block("", 0, "", runs=False)]
    for block, following in pairwise(blocks):
        if block.language != "sh" or not block.runs:
            continue
        printed = "".join(run(command, place) for command in commands_of(block.text))
        if following.language == "text" and following.runs:
            wrong += [
                f"line {following.line}: nothing like {line!r} was printed, but:\n{printed}"
                for line in missing(following.text, printed)
            ]
    return wrong


def commands_of(text: str) -> Iterator[str]:
    """Yield the commands of a block: lines, with what is continued, and here-documents whole."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        command, end = line, re.search(r"<<'(\w+)'", line)
        while end and command.rpartition("\n")[2] != end[1]:
            command += "\n" + next(lines)
        if command.strip() and not command.startswith("#"):
            yield command


def run(command: str, place: Path) -> str:
    """Run a command in `place`, the working directory, and return what it printed.

    A call of ours, or of a program in Python, needs no process of its own, which saves its imports.
    """
    alone = re.search(r"[|<>;&()]", command) is None
    if alone and command.startswith("relex-stream "):
        arguments = shlex.split(command, comments=True)[1:]
        result = click.testing.CliRunner().invoke(cli, arguments, prog_name="relex-stream")
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return result.output
    environment = dict(os.environ, PYTHONPATH=str(ROOT), REPOSITORY=str(ROOT))
    if alone and command.startswith("python "):
        words = _bash(f"printf '%s\\n' {command}", place, environment).splitlines()[1:]
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            runpy.run_path(words[0], run_name="__main__")
        return printed.getvalue()
    return _bash(command, place, environment)


def _bash(command: str, place: Path, environment: dict[str, str]) -> str:
    shell = subprocess.run(
        ["bash", "-c", PRELUDE + command],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert shell.returncode == 0, f"{command}\n{shell.stdout}"
    return shell.stdout


def missing(expected: str, printed: str) -> list[str]:
    """Return the lines of `expected` that were not printed, or not in that order.

    Examples
    --------
    >>> missing("a   1.00 ...\\n...\\nc -2", "a 1.001 x\\nb\\nc -2\\n")
    []
    >>> missing("a 1\\nb", "b\\na 2\\n")
    ['a 1']
    """
    lost = []
    lines = printed.splitlines()
    for line in expected.splitlines():
        if line.strip() in {"", "..."}:
            continue
        at = next((i for i, other in enumerate(lines) if alike(line, other)), None)
        if at is None:
            lost.append(line)
        else:
            lines = lines[at + 1 :]
    return lost


def alike(expected: str, printed: str) -> bool:
    """Whether two lines agree, but for the last places of numbers and the width of columns.

    Examples
    --------
    >>> alike("R2   0.978 in 3 s ...", "R2 0.979 in 3 s  1 MiB"), alike("R2 0.978", "R2 0.95")
    (True, False)
    """
    pattern = ""
    for part in re.split(r"(\.\.\.|-{2,}|\s+|-?\d+(?:,\d{3})*(?:\.\d+)?)", expected.strip()):
        if part == "...":
            pattern += ".*"
        elif re.fullmatch(r"-{2,}", part):
            pattern += "-+"
        elif part.isspace():
            pattern += r"\s+"
        else:
            pattern += f"({NUMBER.pattern})" if NUMBER.fullmatch(part) else re.escape(part)
    match = re.fullmatch(pattern, printed.strip())
    return match is not None and all(
        math.isclose(_value(one), _value(other), rel_tol=0.02, abs_tol=0.003)
        for one, other in zip(NUMBER.findall(expected), match.groups(), strict=True)
    )


def _value(number: str) -> float:
    return float(number.replace(",", ""))
