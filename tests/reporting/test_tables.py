"""Tables read back as the numbers they were made of."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from relex_stream.reporting.tables import TABLES, csv_tables, write_csv
from tests.reporting.conftest import HISTORY, STEPS, Written, numbers_of

Rows = list[dict[str, str]]


def read(data: bytes) -> Rows:
    assert b"\r\n" in data
    assert b"\n" not in data.replace(b"\r\n", b"")
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def test_tables_have_every_number_in_full(store: Path) -> None:
    numbers = numbers_of(store, history_steps=HISTORY, rank=3)
    tables = {name: read(data) for name, data in csv_tables(numbers).items()}
    for row, step in zip(tables["steps.csv"], numbers.analysis.steps, strict=True):
        assert int(row["step"]) == step.step
        assert float(row["changed_share"]) == step.changed_share
        assert float(row["change_norm"]) == step.change_norm
        assert row["in_history"] == str(int(step.step <= HISTORY))
    for name in ("layers", "modules", "tensors"):
        for row, group in zip(tables[f"{name}.csv"], getattr(numbers.analysis, name), strict=True):
            assert row["name"] == group.name
            for figure in ("singular_values", "explained_variance", "r2", "r2_elsewhere"):
                for place, value in enumerate(getattr(group, figure), 1):
                    cell = row[f"{figure}_{place}"]
                    assert (cell == "") if math.isnan(value) else (float(cell) == value)
                error = getattr(group, f"{figure}_error")
                assert (row[f"{figure}_error_1"] == "") == (error is None)
    [model] = tables["model.csv"]
    assert float(model["bend"]) == numbers.analysis.model.bend
    observed = [
        float(row["coefficient"])
        for row in tables["coefficients.csv"]
        if (row["name"], row["component"]) == ("model", "1")
    ]
    assert tuple(observed) == numbers.coefficients[0].values
    targets = [row for row in tables["curves.csv"] if row["is_target"] == "1"]
    assert len(targets) == 2 * len(numbers.coefficients)
    assert float(targets[0]["fitted"]) == numbers.coefficients[0].forecasts[0].value
    assert numbers.backtest is not None
    plain = [row for row in tables["skill.csv"] if row["choice"] == "asked"]
    skills = [each.skill for row in numbers.backtest.forecasts for each in row.skills]
    assert [float(row["skill"]) for row in plain] == skills
    assert len(tables["tensor_skill.csv"]) == len(numbers.backtest.groups)
    assert int(tables["storage.csv"][-1]["checkpoint_bytes_so_far"]) == numbers.info.bytes_in
    assert len(tables["storage.csv"]) == len(STEPS)
    assert len(tables["memory.csv"]) == len(numbers.memory.stages)
    assert len(tables["heatmap.csv"]) == len(numbers.analysis.tensors)
    summary = {row["name"]: row["value"] for row in tables["summary.csv"]}
    assert float(summary["ratio"]) == numbers.info.ratio


def test_names_are_quoted_and_left_as_they_are() -> None:
    names = ['a,"b"', "=1+1", "line\nbreak", "é\ud800"]
    data = write_csv(("name",), [(name,) for name in names])
    found = list(csv.reader(io.StringIO(data.decode(), newline="")))
    assert [row[0] for row in found[1:]] == [*names[:3], "é\\ud800"]


def test_files_are_the_tables(shipped: Written) -> None:
    names = {Path(path).name for path in shipped.summary.tables}
    assert names == {path.name for path in shipped.tables.iterdir()}
    assert names == set(TABLES)
