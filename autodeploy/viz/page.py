"""One HTML file that shows a trace or a diff: opened from disk, it needs no network, no server and no other file.

Scripts and styles are those of `static/`, allowed by their hashes and nothing else is. The data comes compressed and
reaches the document as text only.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from html import escape
from importlib.resources import files

from autodeploy.viz.diff import GraphDiff
from autodeploy.viz.page_data import page_data
from autodeploy.viz.palette import COLORS, DASHES
from autodeploy.viz.trace import Trace

# In the order in which they are read.
SCRIPTS = (
    "data",
    "step",
    "boxes",
    "rows",
    "layout",
    "routes",
    "draw",
    "outline",
    "details",
    "panels",
    "moves",
    "main",
    "input",
)


def render_page(shown: Trace | GraphDiff, title: str = "") -> str:
    """The page as text."""
    static = files("autodeploy.viz") / "static"
    data = gzip.compress(json.dumps(page_data(shown), separators=(",", ":")).encode(), mtime=0)
    scripts = "\n".join((static / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": escape(title or _title(shown)),
        "style": f"{_palette()}\n{(static / 'page.css').read_text(encoding='utf-8')}",
        "script": f'"use strict";\n(() => {{\n{scripts}\n}})();',
        "data": base64.b64encode(data).decode(),
    }
    parts["policy"] = (
        f"default-src 'none'; script-src '{_hash(parts['script'])}'; style-src '{_hash(parts['style'])}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (static / "page.html").read_text(encoding="utf-8")
    # Split first, so that nothing put in can be taken for a place to put something in.
    pieces = page.split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def render_frame(shown: Trace | GraphDiff) -> str:
    """The page as an element of another one, such as a notebook."""
    attributes = 'sandbox="allow-scripts" width="100%" height="720" frameborder="0"'
    return f'<iframe srcdoc="{escape(render_page(shown))}" {attributes}></iframe>'


def _title(shown: Trace | GraphDiff) -> str:
    if isinstance(shown, GraphDiff):
        return f"{shown.before.title or 'before'} → {shown.after.title or 'after'}"
    return "what the passes did"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _palette() -> str:
    """The colours of the kinds of difference as CSS variables and classes."""
    light = "".join(f"--{kind}-fill:{color.fill};--{kind}-line:{color.line};" for kind, color in COLORS.items())
    dark = "".join(
        f"--{kind}-fill:{color.dark_fill};--{kind}-line:{color.dark_line};" for kind, color in COLORS.items()
    )
    classes = "".join(
        f".{kind}{{--fill:var(--{kind}-fill);--line:var(--{kind}-line);--dash:{DASHES[kind] or 'none'}}}"
        for kind in COLORS
    )
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}{classes}"
    )
