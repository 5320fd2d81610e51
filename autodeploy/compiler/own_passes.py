"""The package `passes` that comes with this one, and no other module of that name."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from autodeploy.errors import NameTaken

_OURS = Path(__file__).parents[2] / "passes" / "__init__.py"


def own_passes() -> ModuleType:
    """The package. Raises NameTaken where a module of that name, such as a script's neighbour, is found before it."""
    found = _origin()
    if found is None or Path(found).resolve() != _OURS.resolve():
        raise NameTaken(
            "another module named 'passes' hides the passes of autodeploy",
            where=found or "sys.modules",
            fix="rename it, or start Python in another folder",
        )
    return importlib.import_module("passes")


def _origin() -> str | None:
    try:
        spec = find_spec("passes")
    except ValueError:  # somebody put a module without a spec into sys.modules
        return None
    return spec.origin if spec else None
