"""Arguments of a node as plain, hashable data: literals, references to nodes, and texts of what is neither."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx


@dataclass(frozen=True)
class Ref:
    """The value of the node with this id."""

    id: int


@dataclass(frozen=True)
class Text:
    """How something prints that JSON has no word for: a dtype, a device, a symbolic size."""

    text: str


@dataclass(frozen=True)
class Table:
    """Named items: a dict, or a slice as start, stop and step."""

    items: tuple[tuple[str, Argument], ...]


Argument: TypeAlias = bool | int | float | str | Ref | Text | Table | tuple["Argument", ...] | None
Arguments: TypeAlias = tuple[tuple[str, Argument], ...]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+|\b0x[0-9a-f]{6,}")
_LITERALS = (bool, int, float, str)


def read_argument(value: Any, id_of: Callable[[fx.Node], int]) -> Argument:
    """One argument of an FX node. Lists and tuples are the same; nothing is evaluated, so that symbols stay symbols."""
    if value is None or type(value) in _LITERALS:
        return value
    if isinstance(value, fx.Node):
        return Ref(id_of(value))
    if isinstance(value, slice):
        parts = {"start": value.start, "stop": value.stop, "step": value.step}
        return Table(tuple((key, read_argument(part, id_of)) for key, part in parts.items()))
    if isinstance(value, dict):
        return Table(tuple((str(key), read_argument(item, id_of)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(read_argument(item, id_of) for item in value)
    return Text(plain_text(value))


def plain_text(value: Any) -> str:
    """`str(value)` on one line, without memory addresses, which differ from run to run."""
    return _ADDRESS.sub("", " ".join(str(value).split()))


def leaves(argument: Argument, path: str) -> Iterator[tuple[str, Argument]]:
    """Every literal and reference in `argument` with its place, such as `("tensors[1]", Ref(7))`."""
    if isinstance(argument, tuple) and argument:
        for index, item in enumerate(argument):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(argument, Table) and argument.items:
        for key, item in argument.items:
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, argument


def format_argument(argument: Argument, name_of: Callable[[int], str]) -> str:
    """As a reader writes it in Python."""
    if isinstance(argument, Ref):
        return name_of(argument.id)
    if isinstance(argument, Text):
        return argument.text
    if isinstance(argument, Table):
        if [key for key, _ in argument.items] == ["start", "stop", "step"]:
            return _format_slice([format_argument(item, name_of) for _, item in argument.items])
        return "{" + ", ".join(f"{key}: {format_argument(item, name_of)}" for key, item in argument.items) + "}"
    if isinstance(argument, tuple):
        return "[" + ", ".join(format_argument(item, name_of) for item in argument) + "]"
    return repr(argument)


def _format_slice(parts: list[str]) -> str:
    start, stop, step = ("" if part == "None" else part for part in parts)
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


def argument_to_json(argument: Argument) -> Any:
    """Literals as they are, lists for sequences, and one-key objects for the rest."""
    if isinstance(argument, Ref):
        return {"node": argument.id}
    if isinstance(argument, Text):
        return {"text": argument.text}
    if isinstance(argument, Table):
        return {"table": [[key, argument_to_json(item)] for key, item in argument.items]}
    if isinstance(argument, tuple):
        return [argument_to_json(item) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    return argument


def argument_from_json(data: Any) -> Argument:
    """What `argument_to_json` wrote."""
    if isinstance(data, list):
        return tuple(argument_from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "node" and type(content) is int:
        return Ref(content)
    if kind == "text" and isinstance(content, str):
        return Text(content)
    if kind == "float":
        return float(content)
    if kind == "table":
        return Table(tuple((key, argument_from_json(item)) for key, item in content))
    raise ValueError(f"an argument of kind {kind!r}: {content!r:.60}")
