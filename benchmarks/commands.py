"""How the benchmarks call relex-stream's commands, each as a whole process, and read its result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import click

from benchmarks.processes import (
    BenchmarkError,
    Measurement,
    Program,
    directory_bytes,
    measure,
)
from benchmarks.trajectory import PRESETS, Preset, preset_of_size
from relex_stream.cli.options import ByteSize

_MOST_SET_ASIDE_BYTES = 64 << 20

_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

MEMORY_LIMIT = ByteSize()
"""A size in bytes, as relex-stream itself reads it: ``512MiB``."""


def parse_weights(text: str) -> float:
    """Return a number of weights written like ``20M`` or ``8B``.

    >>> parse_weights("20M"), parse_weights("1.5b"), parse_weights("4096")
    (20000000.0, 1500000000.0, 4096.0)
    """
    factor = _SUFFIXES.get(text[-1:].lower(), 1.0)
    return float(text[:-1] if factor != 1 else text) * factor


class ModelSize(click.ParamType[Preset]):
    """A preset's name, or a number of weights such as ``320M``."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Preset:
        if isinstance(value, Preset):
            return value
        if value in PRESETS:
            return PRESETS[value]
        try:
            weights = parse_weights(value)
            if not 1e3 <= weights <= 1e14:
                raise ValueError
        except ValueError:
            self.fail(
                f"{value!r} is neither a number of weights such as 20M or 8B, nor one of "
                + ", ".join(PRESETS),
                param,
                ctx,
            )
        return preset_of_size(weights)


@contextmanager
def work_directory(parent: Path | None) -> Iterator[Path]:
    """Give a directory of its own to a benchmark, and delete it afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="relex-benchmark-", dir=parent) as directory:
        yield Path(directory)


def relex(*arguments: object) -> tuple[str, ...]:
    """Return the command line of a relex-stream command that reports in JSON."""
    words = tuple(str(argument) for argument in arguments)
    return (sys.executable, "-m", "relex_stream", *words, "--json", "--quiet")


def program(name: str, *arguments: object, output: Path | None = None) -> Program:
    """Return a command as a program whose `output` is out of the way before each run."""

    def prepare() -> None:
        if output is not None:
            set_aside(output)

    return Program(name, relex(*arguments), prepare)


def run(name: str, *arguments: object, output: Path | None = None) -> Measurement:
    """Run a command once, its `output` out of the way before."""
    made = program(name, *arguments, output=output)
    made.prepare()
    return measure(name, made.argv)


def document(measurement: Measurement) -> dict[str, Any]:
    """Return the JSON document that a command printed."""
    try:
        found: dict[str, Any] = json.loads(measurement.stdout)
    except ValueError as error:
        raise BenchmarkError(f"{measurement.name}: printed no JSON document") from error
    return found


def set_aside(directory: Path) -> None:
    """Rename a directory, if it is there, to a name beside it that nothing uses.

    Instead of deleting it before a timed run: for minutes after many files were deleted ext4 passes
    over their numbers one by one whenever it makes a file, and a store is many files. What takes
    more than 64 MiB, as models do in a few files, is deleted all the same: its memory is wanted.
    The rest goes with the benchmark's own directory.
    """
    if not directory.exists():
        return
    if directory_bytes(directory) > _MOST_SET_ASIDE_BYTES:
        remove(directory)
    else:
        directory.rename(mkdtemp(prefix=".earlier-", dir=directory.parent))


def remove(directory: Path) -> None:
    """Delete a directory if it is there."""
    if directory.exists():
        shutil.rmtree(directory)
