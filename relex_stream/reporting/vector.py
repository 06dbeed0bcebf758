"""Figures as bytes: SVG that can stand in a page beside others, and PNG."""

from __future__ import annotations

import html
import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

_TAG = re.compile(r"<[^<>]*>")
_OWN_NAME = re.compile(r"""(\sid="|href="#|url\(#)""")
_FONTS = "'DejaVu Sans', Verdana, Arial, Helvetica, sans-serif"

PNG_DPI = 150


def write_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def write_svg(figure: Figure, name: str, *, title: str, description: str) -> str:
    """Return a figure as an ``svg`` element, the same each time.

    Parameters
    ----------
    figure : Figure
    name : str
        Every id in it begins with that, so that pages may hold several.
    title, description : str
        For those who do not see it.
    """
    file = io.StringIO()
    # Names of clip paths are hashes: without a salt, of a random number.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            file,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # In tags alone: what is between them are names from checkpoints.
    text = _TAG.sub(lambda tag: _OWN_NAME.sub(rf"\g<1>{name}-", tag[0]), text)
    text = _TAG.sub(lambda tag: tag[0].replace("'DejaVu Sans', sans-serif", _FONTS), text)
    # A style element would hold for the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    return (
        f'{opening} style="stroke-linejoin: round; stroke-linecap: butt" '
        f'role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>{rest}'
    ).rstrip("\n")


def standalone(svg: str) -> bytes:
    """Return an ``svg`` element as a file of its own."""
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'.encode()
