"""From a store to the files of a report: all checked before the work, each whole or absent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relex_stream import machine
from relex_stream._version import __version__
from relex_stream.base_weights import base_directory
from relex_stream.errors import OptionError
from relex_stream.paths import refuse_inside
from relex_stream.reporting import charts, sections
from relex_stream.reporting.gather import gather
from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.reporting.page import render
from relex_stream.reporting.tables import csv_tables
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
    store_path: Path,
    outputs: Outputs,
    *,
    base: Path | None,
    progress: Progress | None,
    **asked: Any,
) -> ReportSummary:
    """Report; `relex_stream.api.report` says what the arguments are."""
    started = time.monotonic()
    progress = progress or NoProgress()
    _check_places(store_path, base, outputs)
    numbers = gather(store_path, base=base, progress=progress, **asked)
    found = sections.sections(numbers)
    drawn: dict[str, str] = {}
    files = _Files(outputs)
    every = list(sections.every_chart(found))
    tables = csv_tables(numbers) if outputs.tables is not None else {}
    with charts.style():
        for chart in every:
            figure = chart.draw(numbers)
            svg = write_svg(figure, chart.name, title=chart.title, description=chart.caption)
            drawn[chart.name] = svg
            if outputs.pictures is not None:
                for kind in dict.fromkeys(outputs.picture_formats):
                    data = write_png(figure) if kind == "png" else standalone(svg)
                    files.add(outputs.pictures / f"{chart.name}.{kind}", data)
    pictures = files.names
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
        charts=tuple(chart.name for chart in every),
        pictures=pictures,
        tables=tuple(str(outputs.tables / name) for name in tables) if outputs.tables else (),
        elapsed_s=time.monotonic() - started,
    )


def _check_places(store_path: Path, base: Path | None, outputs: Outputs) -> None:
    for kind in outputs.picture_formats:
        if kind not in PICTURE_FORMATS:
            raise OptionError(
                f"--picture-format must be one of {', '.join(PICTURE_FORMATS)}, not {kind!r}"
            )
    store = Store(store_path)
    directory = base_directory(store, base)
    for what, place in (
        ("OUT", outputs.page),
        ("--pictures", outputs.pictures),
        ("--csv", outputs.tables),
    ):
        if place is None:
            continue
        # A file in it stands for a directory, which may well be that of the store itself.
        file = place if place == outputs.page else place / "any"
        refuse_inside(file, store.path, what, "STORE")
        if directory is not None:
            refuse_inside(file, directory, what, "the base")
    check_file(outputs.page, overwrite=outputs.overwrite)


class _Files:
    """Files to write: all checked before the first."""

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
        for path in self._data:
            check_file(path, overwrite=outputs.overwrite)
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
        verdict=sections.verdict(numbers)[1],
        recommendation=None if backtest is None else backtest.recommendation,
        left_out_tensors=analysis.left_out_tensors,
        bytes_read=analysis.bytes_read,
        peak_memory_bytes=machine.peak_bytes(),
        elapsed_s=elapsed_s,
    )
