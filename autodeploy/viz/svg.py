"""A step as an SVG file: what the page shows first, without the page.

All text is text, every name is escaped, and nothing is loaded from elsewhere; light or dark by the reader's setting.
Every rule of its style holds for this picture alone.
"""

from __future__ import annotations

from html import escape

from autodeploy.viz.difference import Difference
from autodeploy.viz.engine import picture, picture_style
from autodeploy.viz.history import History

WIDTH, HEIGHT = 880, 640  # of a window in which it can be read
_OPENING = '<svg class="ad-picture"'


def draw(shown: History | Difference, title: str = "") -> str:
    """The SVG as text."""
    style = f"{picture_style(dark=False)}@media (prefers-color-scheme: dark) {{{picture_style(dark=True)}}}"
    svg = picture(shown, WIDTH, HEIGHT).svg
    head = f"<title>{escape(title or repr(shown))}</title><style>{style}</style>"
    first, opening, rest = svg.partition(">")
    assert first.startswith(_OPENING)
    return f'{first} xmlns="http://www.w3.org/2000/svg"{opening}{head}{rest}\n'
