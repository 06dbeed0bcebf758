"""How the report is shown: a table as soon as its rows are there, and a file kept up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.report import Report, publish

SECTIONS = ("peaks", "stages", "streams", "memory", "bits", "cpu", "commands", "constants")
"""Each is a table; `part` in the rows of the report."""

_NOT_SHOWN = {"part", "kind", "itemsize", "dense", "wall_min_s", "wall_max_s", "cpu_s"}
"""Columns that the file has and tables leave out."""


class Publisher:
    """Prints a table as soon as its rows are there, and keeps the file up to date."""

    def __init__(self, report: Report, json_path: Path | None, *, markdown: bool) -> None:
        self.report = report
        self._json_path = json_path
        self._markdown = markdown

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.report.add(row)
        self.save()

    def save(self) -> None:
        if self._json_path is not None:
            self.report.write(self._json_path)

    def show(self, section: str) -> None:
        rows = [row for row in self.report.rows if row["part"] == section]
        if not rows:
            return
        # As short as this, or a narrow table would cut it in lines.
        title = f"PRETEND: {section}" if self.report.settings["pretend"] else section
        shown = Report(title, "devices", {}, machine=self.report.machine)
        shown.rows = [{name: row[name] for name in row if name not in _NOT_SHOWN} for row in rows]
        if self._markdown:
            click.echo(f"\n{title}\n")
        publish(shown, json_path=None, markdown=self._markdown)
