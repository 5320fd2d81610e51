"""Checks of what users give: each returns the value in the type that the rest relies on, or raises OptionError."""

from __future__ import annotations

import math
import operator
import reprlib
from numbers import Real
from typing import Any

from autodeploy.errors import OptionError


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
