"""What users set: environment variables, which nothing else reads, and arguments, checked.

Each check returns the value in the type that the rest relies on, or raises OptionError.
"""

from __future__ import annotations

import math
import operator
import os
import re
import reprlib
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from autodeploy.errors import OptionError

_LIBRARY_SETTING = re.compile(r"ATEN_CPU_CAPABILITY$|(TRANSFORMERS|USE|KERNELS)_(?!CACHE|OFFLINE|VERBOSITY)")


@dataclass(frozen=True)
class Options:
    """Settings of the machine rather than of one call.

    `cache_dir` holds downloaded and converted models, and compiled steps; `color` is whether terminals may be coloured.
    `library_settings` are the variables by which torch and transformers choose code. `record` is whether torch.compile
    keeps what our passes did to each graph, `pages` the folder that it then writes a page into for each.
    """

    cache_dir: Path
    color: bool
    library_settings: tuple[tuple[str, str], ...] = ()
    record: bool = False
    pages: Path | None = None


def from_environment() -> Options:
    """Options as set by AUTODEPLOY_CACHE (default ~/.cache/autodeploy), NO_COLOR (https://no-color.org), and
    AUTODEPLOY_RECORD: 1, or a folder for pages.
    """
    cache = os.environ.get("AUTODEPLOY_CACHE") or "~/.cache/autodeploy"
    settings = tuple(sorted(item for item in os.environ.items() if _LIBRARY_SETTING.match(item[0])))
    record = os.environ.get("AUTODEPLOY_RECORD", "")
    pages = None if record in ("", "0", "1") else Path(os.path.expanduser(record)).absolute()
    folder = Path(os.path.expanduser(cache)).absolute()
    return Options(folder, not os.environ.get("NO_COLOR"), settings, record not in ("", "0"), pages)


def integer(name: str, value: Any, *, least: int, where: str = "", end: int | None = None, also: str = "") -> int:
    """`value`, from `least` to below `end`: anything that Python takes as an index, numpy's integers too, no bool."""
    rule = f"{also}an integer " + (f">= {least}" if end is None else f"in [{least}, {end})")
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least or (end is not None and found >= end):
        raise refusal(name, value, rule, where)
    return found


def number(name: str, value: Any, *, where: str = "") -> float:
    """`value` as a finite float."""
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.nan
    if not math.isfinite(found):
        raise refusal(name, value, "a finite number", where)
    return found


def flag(name: str, value: Any, *, where: str = "") -> bool:
    """`value`, True or False; a number or a word would be taken for True."""
    if not isinstance(value, bool):
        raise refusal(name, value, "True or False", where)
    return value


def refusal(name: str, value: Any, rule: str, where: str = "") -> OptionError:
    """The error for an option that breaks `rule`."""
    return OptionError(f"{name} is {reprlib.repr(value)}", where=where, fix=f"it must be {rule}")
