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

from autodeploy.viz.difference import Difference
from autodeploy.viz.engine import DRAWING, picture_style, static
from autodeploy.viz.history import History
from autodeploy.viz.page_data import page_data
from autodeploy.viz.palette import COLORS, DASHES, declarations

# In the order in which they are read.
SCRIPTS = (*DRAWING, "outline", "details", "panels", "moves", "main", "input")


def render_page(shown: History | Difference, title: str = "") -> str:
    """The page as text."""
    data = gzip.compress(json.dumps(page_data(shown), separators=(",", ":")).encode(), mtime=0)
    scripts = "\n".join(static(f"{name}.js") for name in SCRIPTS)
    parts = {
        "title": escape(title or _title(shown)),
        "style": f"{_palette()}\n{static('page.css')}\n{picture_style()}",
        "script": f'"use strict";\n(() => {{\n{scripts}\n}})();',
        "data": base64.b64encode(data).decode(),
    }
    parts["policy"] = (
        f"default-src 'none'; script-src '{_hash(parts['script'])}'; style-src '{_hash(parts['style'])}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Split first, so that nothing put in can be taken for a place to put something in.
    pieces = static("page.html").split("@@")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def render_frame(shown: History | Difference) -> str:
    """The page as an element of another one, such as a notebook."""
    attributes = 'sandbox="allow-scripts" width="100%" height="720" frameborder="0"'
    return f'<iframe srcdoc="{escape(render_page(shown))}" {attributes}></iframe>'


def _title(shown: History | Difference) -> str:
    if isinstance(shown, Difference):
        return f"{shown.before.title or 'before'} → {shown.after.title or 'after'}"
    return "what the passes did"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _palette() -> str:
    """All colours as CSS variables, and those of the kinds of difference as classes."""
    classes = "".join(
        f".{kind}{{--fill:var(--{kind}-fill);--line:var(--{kind}-line);--dash:{DASHES[kind] or 'none'}}}"
        for kind in COLORS
    )
    light, dark = (f"color-scheme:{name};{declarations(name == 'dark')}" for name in ("light", "dark"))
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}{classes}"
    )
