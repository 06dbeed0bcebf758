"""From a store to the files of a report: all checked before the work, each whole or absent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from relex_stream import machine
from relex_stream._version import __version__
from relex_stream.base_weights import base_directory
from relex_stream.errors import OptionError, OutputError
from relex_stream.locations import Location
from relex_stream.paths import refuse_inside
from relex_stream.reporting import charts
from relex_stream.reporting.gather import gather
from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.reporting.page import render
from relex_stream.reporting.sections import CHARTS, Chart, Section, every_chart, sections, verdict
from relex_stream.reporting.tables import TABLES, csv_tables
from relex_stream.reporting.vector import standalone, write_png, write_svg
from relex_stream.specs import NoProgress, Progress
from relex_stream.store import Store
from relex_stream.summaries import ReportSummary
from relex_stream.writer import check_file, naming, write_file

PICTURE_FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Outputs:
    """What is to be written.

    Attributes
    ----------
    page : Path
    pictures : Path, optional
        Directory of pictures.
    picture_formats : sequence of str
        Of `PICTURE_FORMATS`.
    tables : Path, optional
        Directory of tables.
    overwrite : bool
        Whether files that are there may be replaced.
    """

    page: Path
    pictures: Path | None
    picture_formats: Sequence[str]
    tables: Path | None
    overwrite: bool


def make_report(
    store_path: Location,
    outputs: Outputs,
    *,
    base: Location | None,
    progress: Progress | None,
    **asked: Any,
) -> ReportSummary:
    """Report; `relex_stream.api.report` says what the arguments are."""
    started = time.monotonic()
    progress = progress or NoProgress()
    _check_places(store_path, base, outputs)
    numbers = gather(store_path, base=base, progress=progress, **asked)
    found = sections(numbers)
    drawn: dict[str, str] = {}
    files = _Files(outputs)
    with charts.style():
        for chart, figure, svg in draw(numbers, found):
            drawn[chart.name] = svg
            if outputs.pictures is not None:
                for kind in dict.fromkeys(outputs.picture_formats):
                    data = write_png(figure) if kind == "png" else standalone(svg)
                    files.add(outputs.pictures / f"{chart.name}.{kind}", data)
    pictures = files.names
    tables = csv_tables(numbers) if outputs.tables is not None else {}
    for name, data in tables.items():
        assert outputs.tables is not None
        files.add(outputs.tables / name, data)
    page = render(numbers, found, drawn, version=__version__).encode("utf-8", "backslashreplace")
    # Last: where it is, all is.
    files.add(outputs.page, page)
    files.write()
    return _summary(
        numbers,
        outputs.page,
        page_bytes=len(page),
        charts=tuple(drawn),
        pictures=pictures,
        tables=tuple(str(outputs.tables / name) for name in tables) if outputs.tables else (),
        elapsed_s=time.monotonic() - started,
    )


def draw(numbers: ReportNumbers, found: Sequence[Section]) -> Iterator[tuple[Chart, Figure, str]]:
    """Yield each chart of some sections, drawn, and as an ``svg`` element; in `charts.style`."""
    for chart in every_chart(found):
        figure = chart.draw(numbers)
        svg = write_svg(figure, chart.name, title=chart.title, description=chart.caption)
        yield chart, figure, svg


def _check_places(store_path: Location, base: Location | None, outputs: Outputs) -> None:
    """Refuse before any work what may not be written."""
    for kind in outputs.picture_formats:
        if kind not in PICTURE_FORMATS:
            raise OptionError(
                f"--picture-format must be one of {', '.join(PICTURE_FORMATS)}, not {kind!r}"
            )
    store = Store(store_path)
    kept = {"STORE": store.path, "the base": base_directory(store, base)}
    pictures = [f"{name}.{kind}" for name in CHARTS for kind in outputs.picture_formats]
    check_file(outputs.page, overwrite=outputs.overwrite)
    for what, directory, names in (
        ("OUT", outputs.page.parent, [outputs.page.name]),
        ("--pictures", outputs.pictures, pictures),
        ("--csv", outputs.tables, TABLES),
    ):
        if directory is None:
            continue
        # Of a file, not of the directory, which may well be that of the store.
        for of, other in kept.items():
            if other is not None:
                refuse_inside(directory / names[0], other, what, of)
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is not a directory; name another for {what}")
        for path in (directory / name for name in names):
            if os.path.lexists(path):
                check_file(path, overwrite=outputs.overwrite)


class _Files:
    """Files to write, in order."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._data: dict[Path, bytes] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(path) for path in self._data)

    def add(self, path: Path, data: bytes) -> None:
        self._data[path] = data

    def write(self) -> None:
        outputs = self._outputs
        for directory in (outputs.pictures, outputs.tables):
            if directory is not None:
                with naming(f"making {directory}"):
                    directory.mkdir(parents=True, exist_ok=True)
        for path, data in self._data.items():
            write_file(path, data, overwrite=outputs.overwrite)


def _summary(
    numbers: ReportNumbers,
    page: Path,
    *,
    page_bytes: int,
    charts: tuple[str, ...],
    pictures: tuple[str, ...],
    tables: tuple[str, ...],
    elapsed_s: float,
) -> ReportSummary:
    analysis, model = numbers.analysis, numbers.analysis.model
    backtest = numbers.backtest
    return ReportSummary(
        store=analysis.store,
        path=str(page),
        page_bytes=page_bytes,
        charts=charts,
        pictures=pictures,
        tables=tables,
        steps=tuple(each.step for each in numbers.info.steps),
        history=analysis.history,
        exact=analysis.exact,
        explained_variance=model.explained_variance[0],
        r2=model.r2[0],
        r2_elsewhere=model.r2_elsewhere[0],
        odd_steps=tuple(each.step for each in analysis.steps if each.note),
        verdict=verdict(numbers)[1],
        recommendation=None if backtest is None else backtest.recommendation,
        left_out_tensors=analysis.left_out_tensors,
        bytes_read=analysis.bytes_read,
        peak_memory_bytes=machine.peak_bytes(),
        elapsed_s=elapsed_s,
    )
