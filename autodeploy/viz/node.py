"""One node of a snapshot, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autodeploy.viz.arguments import Argument, Arguments, Ref, argument_from_json, argument_to_json, leaves
from autodeploy.viz.values import Value


@dataclass(frozen=True)
class Node:
    """One node. `id` is its own within the snapshot; in a trace, a node keeps it from pass to pass.

    `arguments` are named by the op's schema where it has one, and leave out those that are at their default.
    `graph` is the path of the graph it lies in, empty for the outermost; `module` that of the model's module that made
    it; `role` what an input or attribute is for ("layout", "weight", ...); `free` whether it launches nothing;
    `content` a hash of the values of the weights that it names.
    """

    id: int
    name: str
    op: str
    target: str
    arguments: Arguments = ()
    values: tuple[Value, ...] = ()
    graph: str = ""
    module: str = ""
    module_type: str = ""
    source: str = ""
    role: str = ""
    free: bool = False
    content: str = ""

    @cached_property
    def leaves(self) -> tuple[tuple[str, Argument], ...]:
        """(place, literal or reference) of everything in the arguments, in order."""
        return tuple(leaf for name, argument in self.arguments for leaf in leaves(argument, name))

    @cached_property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """(place, node id) of every node that it reads."""
        return tuple((place, leaf.id) for place, leaf in self.leaves if isinstance(leaf, Ref))

    @cached_property
    def label(self) -> tuple[object, ...]:
        """What it does to its inputs, whatever they are: op, target and literals, 1, 1.0 and True told apart."""
        literals = ((place, "" if isinstance(leaf, Ref) else repr(leaf)) for place, leaf in self.leaves)
        return (self.op, self.target, *literals)

    @property
    def is_overload(self) -> bool:
        """Whether the target is written namespace.op.overload."""
        return self.op == "call_function" and self.target.count(".") == 2 and not self.target.startswith("torch.")

    @property
    def short_target(self) -> str:
        """The op without its library and overload: `scaled_dot_product_attention`."""
        if self.op != "call_function":
            return self.target
        parts = self.target.split(".")
        return parts[1] if self.is_overload else parts[-1]


_PLAIN = ("graph", "module", "module_type", "source", "role", "free", "content")
_TYPES: dict[str, type] = {"id": int, "arguments": list, "values": list, "free": bool}
_TYPES |= dict.fromkeys(("name", "op", "target", "graph", "module", "module_type", "source", "role", "content"), str)
_VALUE_TYPES: dict[str, type] = {"dtype": str, "shape": list, "device": str, "text": str}


def node_to_json(node: Node) -> dict[str, Any]:
    """Keys in the order of the fields, those at their default left out."""
    data: dict[str, Any] = {"id": node.id, "name": node.name, "op": node.op, "target": node.target}
    if node.arguments:
        data["arguments"] = [[name, argument_to_json(argument)] for name, argument in node.arguments]
    if node.values:
        data["values"] = [_value_to_json(value) for value in node.values]
    return data | {key: content for key in _PLAIN if (content := getattr(node, key))}


def node_from_json(data: dict[str, Any]) -> Node:
    """What `node_to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    check_types(data, _TYPES, required=("id", "name", "op", "target"))
    return Node(
        id=data["id"],
        name=data["name"],
        op=data["op"],
        target=data["target"],
        arguments=tuple((_text(name), argument_from_json(item)) for name, item in data.get("arguments", ())),
        values=tuple(map(_value_from_json, data.get("values", ()))),
        **{key: data[key] for key in _PLAIN if key in data},
    )


def check_types(data: dict[str, Any], types: dict[str, type], required: tuple[str, ...]) -> None:
    """Raise KeyError where `data` lacks something, TypeError where a value is not of its type, or has none."""
    for key in required:
        if key not in data:
            raise KeyError(key)
    for key, value in data.items():
        if type(value) is not types.get(key):
            raise TypeError(f"{key} is {value!r:.60}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is {value!r:.60}")
    return value


def _value_to_json(value: Value) -> dict[str, Any]:
    data: dict[str, Any] = {"dtype": value.dtype}
    if value.shape is not None:
        data["shape"] = list(value.shape)
    return data | {key: content for key in ("device", "text") if (content := getattr(value, key))}


def _value_from_json(data: dict[str, Any]) -> Value:
    check_types(data, _VALUE_TYPES, required=("dtype",))
    shape = tuple(data["shape"]) if "shape" in data else None
    if shape and not all(type(size) in (int, str) for size in shape):
        raise TypeError(f"a shape is {shape!r:.60}")
    return Value(data["dtype"], shape, data.get("device", ""), data.get("text", ""))
