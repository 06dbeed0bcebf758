"""The page: valid, complete, needs nothing from elsewhere, and obeys no name in a store."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

from relex_stream.reporting import charts
from relex_stream.reporting.making import draw
from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.reporting.page import render
from relex_stream.reporting.sections import CHARTS, Section, facts, sections, verdict
from tests.reporting.conftest import HISTORY, Written, numbers_of

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements of a page in order, with their attributes and text; fails where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(numbers: ReportNumbers) -> str:
    found = sections(numbers)
    with charts.style():
        drawn = {chart.name: svg for chart, _, svg in draw(numbers, found)}
    return render(numbers, found, drawn, version="1.0")


def test_every_chart_is_there_and_is_told_of(shipped: Written) -> None:
    page = Page(shipped.page)
    names = CHARTS
    assert shipped.summary.charts == names
    assert [svg["aria-labelledby"] for svg in page.all("svg")] == [
        f"{name}-title {name}-description" for name in names
    ]
    assert all(svg["role"] == "img" and svg["viewbox"] for svg in page.all("svg"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(names)
    assert all(len(text.split(". ")) >= 2 for text in page.text["figcaption"])
    assert len(page.all("desc")) == len(names)
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert page.all("meta")[1]["name"] == "viewport"
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == 6
    assert shipped.page.startswith("<!DOCTYPE html>\n")


def test_ids_are_unique_and_references_resolve(shipped: Written) -> None:
    page = Page(shipped.page)
    ids = Counter(attrs["id"] for _, attrs in page.elements if "id" in attrs)
    assert {name for name, count in ids.items() if count > 1} == set()
    used = set(re.findall(r"url\(#([^)]+)\)", shipped.page))
    for _, attributes in page.elements:
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            if target is not None:
                assert target.startswith("#")
                used.add(target[1:])
    assert used <= set(ids)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(shipped: Written) -> None:
    page = Page(shipped.page)
    assert not {tag for tag, _ in page.elements} & {
        *("script", "link", "iframe", "object", "embed", "img", "image", "base", "form", "audio"),
        *("video", "source", "foreignobject", "animate", "set"),
    }
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"src", "srcset", "action", "data", "background"} & set(attributes)
        for name, value in attributes.items():
            if not name.startswith("xmlns"):
                assert "//" not in (value or "")
                assert "javascript:" not in (value or "")
    for style in page.text["style"]:
        assert "@import" not in style
        assert "url(" not in style
        assert "//" not in style
    assert set(re.findall(r"url\((.)", shipped.page)) == {"#"}


def test_pictures_are_valid_files(shipped: Written) -> None:
    assert len(shipped.summary.pictures) == 16
    for path in map(Path, shipped.summary.pictures):
        assert path.parent == shipped.pictures
        if path.suffix == ".svg":
            root = ET.parse(path).getroot()
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_text_of_charts_is_text(shipped: Written) -> None:
    texts = set(Page(shipped.page).text["text"])
    assert {"Model, first component", "self_attn.q_proj", "nearer than staying", "skill"} <= texts


def test_names_are_text_and_nothing_else(store: Path) -> None:
    numbers = numbers_of(store, history_steps=HISTORY)
    nasty = '<script>alert(1)</script><b id="x"> & $a$ \x1b[2J \ud800'
    tensors = tuple(
        dataclasses.replace(each, name=f"model.layers.0.{nasty}{number}.weight")
        for number, each in enumerate(numbers.analysis.tensors)
    )
    analysis = dataclasses.replace(
        numbers.analysis,
        tensors=tensors,
        steps=tuple(dataclasses.replace(each, note=nasty) for each in numbers.analysis.steps),
    )
    from relex_stream.reporting.modules import module_grid

    changed = dataclasses.replace(
        numbers,
        title=nasty,
        info=dataclasses.replace(numbers.info, store=f"{nasty}/store"),
        analysis=analysis,
        backtest=None,
        backtest_reason=nasty,
        grid=module_grid(tensors),
        coefficients=tuple(dataclasses.replace(each, name=nasty) for each in numbers.coefficients),
    )
    text = rendered(changed)
    page = Page(text)
    assert not page.all("script")
    assert not page.all("b")
    assert "x" not in {attributes.get("id") for _, attributes in page.elements}
    assert page.text["title"][0].startswith("<script>alert(1)</script>")
    assert "\x1b" not in text
    # Whatever a file system takes for a name can be written.
    text.encode("utf-8")


# --- what is said --------------------------------------------------------------------------------


def test_facts_are_the_figures(store: Path) -> None:
    numbers = numbers_of(store, history_steps=HISTORY)
    found = facts(numbers)
    model = numbers.analysis.model
    assert f"{100 * model.explained_variance[0]:.1f} %" in found["explained variance"]
    assert found["explained variance"].count("+-") == 3
    assert found["R2"].startswith(f"{model.r2[0]:.3f} +- ")
    assert found["R2 elsewhere"].startswith(f"{model.r2_elsewhere[0]:.3f} +- ")
    assert found["history"].startswith("1, 2, 4, ")
    assert found["steps"].endswith("(10 steps)")
    exact = facts(numbers_of(store, exact=True, window=5))
    assert "+-" not in "".join(exact.values())
    assert exact["R2"].endswith("through the last 5 checkpoints")
    assert "R2 elsewhere" in exact


def advised(numbers: ReportNumbers, **changes: object) -> ReportNumbers:
    backtest = numbers.backtest
    assert backtest is not None
    advice = backtest.recommendation
    assert advice is not None
    changed = dataclasses.replace(advice, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(
        numbers, backtest=dataclasses.replace(backtest, recommendation=changed)
    )


def test_the_verdict_is_that_of_the_backtest(store: Path) -> None:
    numbers = numbers_of(store)
    good = {"mean_skill": 0.4, "least_skill": 0.2, "forecasts": 8, "reach": 2.5}
    word, text = verdict(advised(numbers, **good, reach_is_known=True, damping=0.3))
    assert word == "for"
    assert text.startswith("The store speaks for extrapolating with --rank 1 --fit linear")
    assert "--damping 0.3: " in text
    assert "were 40.0 % nearer to what came" in text
    assert text.endswith("All were nearer up to 2.50 times the history.")
    assert (
        "furthest that could be tested"
        in verdict(advised(numbers, **good, reach_is_known=False))[1]
    )
    for weak in ({"mean_skill": 0.03}, {"least_skill": -0.1}, {"forecasts": 2}):
        assert verdict(advised(numbers, **(good | weak)))[0] == "weakly"
    assert verdict(advised(numbers, **(good | {"reach": 0.0})))[1].endswith(
        "not even all of the nearest forecasts were nearer than staying."
    )
    assert numbers.backtest is not None
    nothing = dataclasses.replace(numbers.backtest, recommendation=None)
    word, text = verdict(dataclasses.replace(numbers, backtest=nothing))
    assert word == "against"
    assert text.startswith("The store speaks against extrapolating")


def test_options_are_set_apart_and_caveats_there(shipped: Written) -> None:
    page = Page(shipped.page)
    assert page.text["code"] == [
        *("--rank 1", "--fit linear", "--anchor latest", "--damping 0.3"),
    ]
    assert "High explained variance and R2 do not say that an extrapolation helps" in shipped.page
    assert "weights are not rewards" in shipped.page


def by_name(numbers: ReportNumbers) -> dict[str, Section]:
    return {section.name: section for section in sections(numbers)}


def test_what_is_left_out_of_a_large_model_is_said(store: Path) -> None:
    numbers = numbers_of(store)
    tensor = numbers.analysis.tensors[0]
    from relex_stream.reporting.modules import module_grid

    tensors = [
        dataclasses.replace(tensor, name=f"m.layers.{layer}.block{module}.weight")
        for layer in range(94)
        for module in range(130)
        if (layer, module) != (3, 100)
    ] + [dataclasses.replace(tensor, name=f"outside{number}") for number in range(20)]
    large = dataclasses.replace(numbers, grid=module_grid(tensors))
    caption = by_name(large)["modules"].charts[0].caption
    assert "98 rows that moved least are left out" in caption
    modules, outside = charts.shown_modules(large)
    assert (len(modules), len(outside)) == (charts.MOST_MODULES, charts.MOST_OUTSIDE)
    with charts.style():
        figure = charts.draw_explained_variance(large)
    width, height = figure.get_size_inches()
    assert height < 2 * width


def test_odd_steps_are_listed_but_not_without_end(store: Path) -> None:
    numbers = numbers_of(store)
    assert not by_name(numbers)["steps"].tables
    steps = tuple(
        dataclasses.replace(numbers.analysis.steps[0], step=step, note="odd")
        for step in range(1, 60)
    )
    odd = dataclasses.replace(numbers, analysis=dataclasses.replace(numbers.analysis, steps=steps))
    section = by_name(odd)["steps"]
    assert len(section.tables[0].rows) == 40
    assert section.paragraphs == ["Of 59 odd steps the first 40 are listed."]
    assert (
        facts(odd)["odd steps"] == "59 of 10, listed below"
        or "listed below" in facts(odd)["odd steps"]
    )
