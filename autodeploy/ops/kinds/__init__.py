"""The kinds of attention node: each file of this folder is one, complete; others come by entry points.

Importing this defines the ops of ours, so that graphs that hold them can be made and loaded.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from autodeploy.ops.kind import Kind

_added: list[Kind] = []
_OURS = tuple(import_module(f"{__name__}.{module.name}").KIND for module in iter_modules(__path__))


def kinds() -> tuple[Kind, ...]:
    """Every kind of attention node: ours by name, those of entry points, then those registered by hand."""
    return (*_installed(), *_added)


@cache
def _installed() -> tuple[Kind, ...]:
    return (*_OURS, *(point.load() for point in entry_points(group="autodeploy.kinds")))


def register_kind(kind: Kind) -> Kind:
    """Add a kind by hand (a package would use the entry-point group `autodeploy.kinds`)."""
    _added[:] = [each for each in _added if each.name != kind.name] + [kind]
    return kind


def kind_of(target: object) -> Kind | None:
    """The kind whose canonical op is `target`."""
    return next((kind for kind in kinds() if kind.op is target), None)
