"""The kinds of attention node: each file of this folder is one, complete; others come by entry points.

Importing this defines the ops of ours, so that graphs that hold them can be made and loaded.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from autodeploy.ops.spec import Kind

_OURS = tuple(import_module(f"{__name__}.{module.name}").KIND for module in iter_modules(__path__))


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind of attention node: ours by name, then those of the entry points `autodeploy.kinds`."""
    return (*_OURS, *(point.load() for point in entry_points(group="autodeploy.kinds")))


def kind_of(target: object) -> Kind | None:
    """The kind whose canonical op is `target`."""
    return next((kind for kind in kinds() if kind.op is target), None)
