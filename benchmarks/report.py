"""What a benchmark hands out: the machine it ran on, its rows, a table, a JSON file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import click
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.processes import Measurement

_PACKAGES = (
    "relex-stream",
    "numpy",
    "numba",
    "zarr",
    "dask",
    "numcodecs",
    "safetensors",
    "torch",
)

# An absolute path: its directories say where things lie on one machine and mean nothing elsewhere.
_DIRECTORIES = re.compile(r"(?<![\w.)\]}])/(?:[^\s/'\"=:,]+/)+")

Command = TypeVar("Command", bound=Callable[..., Any])


def median(values: Iterable[float]) -> float:
    """Return the middle value, or the mean of the two in the middle."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and largest."""
    return statistics.median(values), min(values), max(values)


def process_row(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the columns that a program's runs fill in every table.

    Memory is the largest of all runs, not the median: it is held against a limit.
    """
    wall_s, least_s, most_s = spread([one.wall_s for one in measurements])
    return {
        "wall_s": wall_s,
        "wall_min_s": least_s,
        "wall_max_s": most_s,
        "cpu_s": median(one.user_s + one.system_s for one in measurements),
        "peak_rss_bytes": max(one.peak_rss_bytes for one in measurements),
        "runs": len(measurements),
    }


def machine(directory: Path | None = None) -> dict[str, Any]:
    """Describe the machine and the versions, with nothing that names the machine or its owner.

    Parameters
    ----------
    directory : Path, optional
        Where the benchmark writes: the free space and kind of its file system are told.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {re.split(r'[-+]', platform.release())[0]}",
        "python": platform.python_version(),
    }
    if directory is not None:
        directory = directory.absolute()
        while not directory.exists():
            directory = directory.parent
        described["file_system"] = _file_system(directory)
        described["file_system_free_bytes"] = shutil.disk_usage(directory).free
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    described["versions"] = versions
    commit = _commit()
    if commit:
        described["commit"] = commit
    return described


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _file_system(directory: Path) -> str:
    """Return the kind of file system a directory is on, such as ext4."""
    holders = [
        partition
        for partition in psutil.disk_partitions(all=True)
        if directory.is_relative_to(partition.mountpoint)
    ]
    if not holders:
        return "unknown"
    kind: str = max(holders, key=lambda partition: len(partition.mountpoint)).fstype
    return kind


def _commit() -> str | None:
    """Return the commit of this checkout, with a mark if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changes else commit


class Report:
    """Rows of figures with the settings and the machine that they belong to.

    Parameters
    ----------
    title : str
        Heads the table.
    command : str
        The benchmark's name: `pictures` chooses the drawing by it.
    settings : mapping
        What the benchmark ran with. Paths are cut to their last part when they are published.
    machine : mapping, optional
        As `machine` describes it; asked for if not given.
    """

    def __init__(
        self,
        title: str,
        command: str,
        settings: Mapping[str, Any],
        *,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        self.title = title
        self.command = command
        self.settings = _publishable(dict(settings))
        self.machine = dict(_describe_machine() if machine is None else machine)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Names of columns end in their unit (``wall_s``, ``peak_rss_bytes``); values that are lists
        or mappings (such as samples over time) go into the file and not into the table.
        """
        self.rows.append(_publishable(dict(row)))

    def note(self, text: str) -> None:
        """Add a sentence that is printed below the table."""
        self.notes.append(_publishable(text))

    def as_json(self) -> dict[str, Any]:
        """Return what `write` writes."""
        return {
            "title": self.title,
            "command": self.command,
            "settings": self.settings,
            "machine": self.machine,
            "rows": self.rows,
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        report = cls(
            content["title"], content["command"], content["settings"], machine=content["machine"]
        )
        report.rows = content["rows"]
        report.notes = content["notes"]
        return report

    def columns(self) -> list[str]:
        """Return the names of the columns that a table can show, in order of appearance."""
        return list(
            dict.fromkeys(
                name
                for row in self.rows
                for name, value in row.items()
                if not isinstance(value, list | dict)
            )
        )

    def table(self) -> Table:
        """Return the rows for a terminal."""
        columns = self.columns()
        table = Table(title=self.title, title_justify="left")
        for name in columns:
            table.add_column(_heading(name), justify="left" if self._is_text(name) else "right")
        for row in self.rows:
            table.add_row(*(_cell(name, row.get(name)) for name in columns))
        return table

    def markdown(self) -> str:
        """Return the rows as a table for the documentation, notes below."""
        columns = self.columns()
        lines = [
            _markdown_row(_heading(name) for name in columns),
            _markdown_row("---" if self._is_text(name) else "---:" for name in columns),
        ]
        lines += [
            _markdown_row(_cell(name, row.get(name)) for name in columns) for row in self.rows
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def _is_text(self, name: str) -> bool:
        return any(isinstance(row.get(name), str) for row in self.rows)


def output_options(command: Command) -> Command:
    """Add ``--json`` and ``--markdown``, which every benchmark has."""
    for option in (
        click.option(
            "--markdown", is_flag=True, help="Print the table as Markdown, for the documentation."
        ),
        click.option(
            "--json",
            "json_path",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write all figures to this file; `pictures` draws it.",
        ),
    ):
        command = option(command)
    return command


def report_options(command: Command) -> Command:
    """Add ``--runs``, and what every benchmark has."""
    runs = click.option(
        "--runs", type=click.IntRange(min=1), default=5, help="Measured runs of each."
    )
    return runs(output_options(command))


def publish(report: Report, *, json_path: Path | None, markdown: bool) -> None:
    """Print a report's table and notes, and write its file if one is wanted."""
    if markdown:
        click.echo(report.markdown(), nl=False)
    else:
        # A pipe has no width; a table cut at 80 columns loses figures.
        console = Console(width=None if Console().is_terminal else 200)
        console.print(report.table())
        for note in report.notes:
            console.print(note, highlight=False, markup=False)
    if json_path is not None:
        report.write(json_path)


def _describe_machine() -> dict[str, Any]:
    return machine()


def _publishable(value: Any) -> Any:
    """Return plain JSON values, absolute paths cut to their last part."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        return _DIRECTORIES.sub("", value)
    if isinstance(value, Mapping):
        return {str(key): _publishable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    # numpy's numbers
    return value.item()


def _heading(name: str) -> str:
    """Return a column's heading, with the unit its values are shown in.

    >>> _heading("peak_rss_bytes"), _heading("wall_s"), _heading("runs")
    ('peak rss, MiB', 'wall, s', 'runs')
    """
    words, _, unit = name.rpartition("_")
    shown = {"s": "s", "bytes": "MiB", "share": "%"}.get(unit) if words else None
    return name.replace("_", " ") if shown is None else f"{words.replace('_', ' ')}, {shown}"


def _cell(name: str, value: Any) -> str:
    """Return a value as text: at least three digits, bytes as MiB, shares as percent.

    >>> _cell("peak_rss_bytes", 180_000_000), _cell("wall_s", 2.3456), _cell("weights", 40_500_000)
    ('172', '2.35', '40,500,000')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return _number(value / 2**20)
    if name.endswith("_share"):
        return _number(value * 100)
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _number(value: float) -> str:
    # So many decimals that three digits show, without the exponent that a %g would bring.
    for limit, decimals in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if abs(value) >= limit:
            return f"{value:,.{decimals}f}"
    return f"{value:.3g}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
