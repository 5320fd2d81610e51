"""The kinds of attention node: each file of this folder is one, complete; others come by entry points."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from autodeploy.ops.spec import Kind


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind of attention node: ours by name, then those of the entry points `autodeploy.kinds`."""
    ours = [import_module(f"autodeploy.ops.kinds.{module.name}").KIND for module in iter_modules(__path__)]
    return (*ours, *(point.load() for point in entry_points(group="autodeploy.kinds")))


def kind_of(target: object) -> Kind | None:
    """The kind whose canonical op is `target`."""
    return next((kind for kind in kinds() if kind.op is target), None)
