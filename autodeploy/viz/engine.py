"""Draws a step outside of a browser, by the scripts of the page: one layout for all pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from autodeploy.errors import MissingDependency
from autodeploy.viz.difference import Difference
from autodeploy.viz.history import History
from autodeploy.viz.page_data import page_data
from autodeploy.viz.palette import kind_rules, variables

# What draws, in the order in which it is read.
DRAWING = ("data", "step", "boxes", "rows", "layout", "routes", "draw")


@dataclass(frozen=True)
class Picture:
    """One step as it is drawn: an SVG without its style; and the `boxes`, frames among them, and `links` in it."""

    svg: str
    boxes: list[dict[str, Any]]
    links: list[dict[str, Any]]


def picture(shown: History | Difference, width: int, height: int) -> Picture:
    """The step that shares metadata, of a history where there is one, else all passes; opened as far as it fits.

    Raises MissingDependency.
    """
    try:
        from py_mini_racer import MiniRacer
    except ModuleNotFoundError as error:
        fix = "pip install 'autodeploy-fx[svg]', or save the page (.html), which a browser draws"
        raise MissingDependency("drawing outside a browser needs the mini-racer package", fix=fix) from error

    data = page_data(shown)
    index = next((index for index, step in enumerate(data["steps"]) if step["story"]), 0)
    with MiniRacer() as engine:
        engine.eval(script())
        return Picture(**json.loads(engine.call("drawStep", json.dumps(data), index, width, height)))


@cache
def static(name: str) -> str:
    """A file of the page."""
    return (files("autodeploy.viz") / "static" / name).read_text(encoding="utf-8")


def script() -> str:
    """All that it takes to draw where there is no document."""
    return "\n".join(static(f"{name}.js") for name in (*DRAWING, "paper"))


def picture_style(dark: bool | None = None) -> str:
    """The style of a picture, with colours as variables, or as they are on white or on black."""
    style = f"{static('picture.css')}{kind_rules()}"
    if dark is None:
        return style
    for name, value in variables(dark).items():
        style = style.replace(f"var(--{name})", value)
    return style
