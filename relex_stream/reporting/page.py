"""The page: HTML that needs nothing but itself."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from relex_stream.reporting.numbers import ReportNumbers
from relex_stream.reporting.sections import CAVEATS, Section, Table, facts, verdict
from relex_stream.wording import printable

_OPTION = re.compile(r"--[a-z]+ \S*[^\s:.,;]")

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.25rem 3rem; background: #fff;
  color: #1c2b33; font: 16px/1.5 Verdana, "DejaVu Sans", Arial, Helvetica, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; border-top: 1px solid #c9d3d8;
  padding-top: 1rem; }
p, figcaption, table, dl, nav { font-size: 0.875rem; }
p, figcaption { max-width: 50rem; }
nav a { margin-right: 1rem; color: #1f5a75; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; }
dt { color: #4a5a63; }
dd { margin: 0; overflow-wrap: anywhere; }
.verdict { border-left: 0.35rem solid #7a7a7a; background: #f3f6f7; padding: 0.6rem 1rem; }
.verdict p { margin: 0.3rem 0; }
.verdict .main { font-size: 1rem; }
code { white-space: nowrap; background: #e6ecef; padding: 0 0.2em; font-size: 0.9em;
  font-family: "DejaVu Sans Mono", Consolas, Menlo, monospace; }
.for { border-color: #5b8c5a; } .weakly { border-color: #c58b2a; }
.against { border-color: #b04a3a; }
figure { margin: 1rem 0 1.5rem; }
figcaption { color: #3b4b54; }
.chart { overflow-x: auto; }
.chart svg { display: block; width: 100%; min-width: 40rem; height: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
th, td { text-align: left; padding: 0.15rem 1.25rem 0.15rem 0; border-bottom: 1px solid #dde4e7; }
footer { margin-top: 3rem; font-size: 0.8rem; color: #4a5a63; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  .chart svg { min-width: 0; } figure, table, .verdict { break-inside: avoid; }
  h2 { break-after: avoid; } }
""".strip()


def _text(text: str) -> str:
    """Return a text as HTML in which no part of it is obeyed, by no parser and no terminal."""
    return html.escape(printable(text))


def render(
    numbers: ReportNumbers, sections: Sequence[Section], drawn: Mapping[str, str], *, version: str
) -> str:
    """Return the page.

    Parameters
    ----------
    numbers : ReportNumbers
    sections : sequence of Section
    drawn : mapping of str to str
        An ``svg`` element by the name of its chart.
    version : str
        Of this package.
    """
    title = _text(numbers.title)
    word, sentence = verdict(numbers)
    links = "\n".join(
        f'<a href="#{section.name}">{_text(section.heading)}</a>' for section in sections
    )
    listed = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in facts(numbers).items()
    )
    caveats = "\n".join(f"<p>{_text(caveat)}</p>" for caveat in CAVEATS)
    body = "\n".join(_section(section, drawn) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<div class="verdict {word}">
<p class="main">{_with_options(sentence)}</p>
{caveats}
</div>
<dl>
{listed}
</dl>
<nav aria-label="Sections">
{links}
</nav>
</header>
<main>
{body}
</main>
<footer>Made by relex-stream {_text(version)}. Components of the model are those of its
tensors side by side; RELEX has a subspace for each tensor.</footer>
</body>
</html>
"""


def _with_options(sentence: str) -> str:
    return _OPTION.sub(r"<code>\g<0></code>", _text(sentence))


def _section(section: Section, drawn: Mapping[str, str]) -> str:
    parts = [f'<section id="{section.name}">', f"<h2>{_text(section.heading)}</h2>"]
    parts += [f"<p>{_text(text)}</p>" for text in section.paragraphs]
    for chart in section.charts:
        parts += [
            "<figure>",
            f'<div class="chart">{drawn[chart.name]}</div>',
            f"<figcaption>{_text(chart.caption)}</figcaption>",
            "</figure>",
        ]
    parts += [_table(table) for table in section.tables]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_text(title)}</th>' for title in table.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
