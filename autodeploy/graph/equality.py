"""When two pure nodes compute the same: keys that are equal exactly where the values must be.

Tensors that belong to the model are equal only where they are the same tensor: their values may change, and another
checkpoint has others. Bits decide for constants that tracing made, which are marked CONSTANT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.graph.aliasing import returned, storages
from autodeploy.graph.meta import CONSTANT
from autodeploy.graph.spelling import SYMBOLIC, attribute, per_target, recorded_value

# Larger constants are the same only where they are the same tensor: comparing costs a copy to the host.
_MAX_COMPARED_BYTES = 1 << 16
_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Literals that are equal where `==` says so, once their type is the same. Everything else is equal to itself alone, as
# None, True and torch.float32 are, of which there is one each.
_PLAIN = frozenset([int, str, bytes, torch.device])


def mark_constants(gm: fx.GraphModule, owned: Collection[Any]) -> None:
    """Mark the tensors of `gm` that tracing made: all but those in the storages `owned` of who was traced."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute(node)
        if isinstance(value, torch.Tensor) and not any(storage in owned for storage in storages(value)):
            CONSTANT.set(node, True)


def merge_equal(graph: fx.Graph, candidates: Iterable[fx.Node]) -> set[fx.Node]:
    """Replace each of `candidates` (in graph order, pure) that repeats an earlier one; returns those replaced.

    Two values that both reach the caller stay two: the caller may write to one of them.
    """
    given_away = returned(graph)
    seen: dict[Any, fx.Node] = {}
    merged: set[fx.Node] = set()
    for node in candidates:
        first = seen.setdefault(value_key(node), node)
        if first is node or not _can_be_one(node, first, given_away):
            continue
        if node in given_away:
            given_away.add(first)
        node.replace_all_uses_with(first)
        graph.erase_node(node)
        merged.add(node)
    return merged


def _can_be_one(node: fx.Node, other: fx.Node, given_away: set[fx.Node]) -> bool:
    """Whether no caller can tell that two equal nodes are one."""
    if node.op == "get_attr":
        return attribute(node) is attribute(other) or not (node in given_away or other in given_away)
    return not (node in given_away and other in given_away)


def merge_equal_numbers(scalars: Iterable[fx.Node]) -> int:
    """Read each of `scalars` (in graph order) whose symbolic value an earlier one has from there; returns how many.

    A tracer's guards make sizes of one symbolic value equal, whichever tensor they are measured of.
    """
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in scalars:
        value = recorded_value(node)
        if not isinstance(value, SYMBOLIC):
            continue
        first = seen.setdefault((type(value), value.node.expr), node)
        if first is not node and node.users:
            node.replace_all_uses_with(first)
            merged += 1
    return merged


def value_key(node: fx.Node) -> Any:
    """What makes two pure nodes compute the same: hashable, types of literals included (1, 1.0 and True differ).

    To ATen, arguments count alike by position, by name and by default, and lists are as good as tuples.
    """
    if node.op == "get_attr":
        return ("get_attr", _attribute_key(node))
    if not isinstance(node.target, OpOverload):
        brackets = pytree.tree_structure((node.args, [node.kwargs[name] for name in sorted(node.kwargs)]))
        return (node.op, _freeze(node.target), _freeze(node.args), _freeze(node.kwargs), brackets)
    signature = _signature(node)
    given = [_freeze(arg) for arg in node.args]
    rest = signature[len(given) :]
    return (node.target, *given, *(_freeze(node.kwargs[name]) if name in node.kwargs else old for name, old in rest))


def _freeze(value: Any) -> Any:
    kind = type(value)
    if kind is fx.Node:
        return value
    if kind is float:
        return (float, value.hex())
    if kind is complex:
        return (complex, value.real.hex(), value.imag.hex())
    if isinstance(value, dict):
        return (dict, *((name, _freeze(value[name])) for name in sorted(value)))
    if isinstance(value, (list, tuple)):
        return tuple([_freeze(item) for item in value])
    if kind is slice:
        return (slice, _freeze((value.start, value.stop, value.step)))
    return (kind, value) if kind in _PLAIN or kind is _Place else (kind, _Itself(value))


class _Itself:
    """Equal to the wrapper of the same object alone; keeps the object, and so its id, alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Argument(NamedTuple):
    name: str
    default: Any


@per_target
def _signature(op: str, target: OpOverload) -> Sequence[_Argument]:
    """The arguments of `target` in order, with their frozen defaults."""
    arguments = target._schema.arguments
    return [_Argument(arg.name, _freeze(arg.default_value if arg.has_default_value() else None)) for arg in arguments]


def _attribute_key(node: fx.Node) -> Any:
    """Constants of tracing by their bits, tensors by their memory, graphs by their nodes, the rest by identity."""
    value = attribute(node)
    if isinstance(value, fx.GraphModule):
        return _graph_key(value)
    if not _has_bits(value):
        return _Itself(value)
    is_small = value.numel() * value.element_size() <= _MAX_COMPARED_BYTES
    return _bits(value) if CONSTANT.on(node) and is_small else _memory(value)


def _memory(value: torch.Tensor) -> Any:
    return (value.untyped_storage()._cdata, value.storage_offset(), value.dtype, tuple(value.shape), value.stride())


def _bits(value: torch.Tensor) -> Any:
    with _disable_current_modes(), torch.no_grad():
        # Not `contiguous`, which leaves a single element its stride.
        copy = value.cpu().clone(memory_format=torch.contiguous_format)
        bits = copy.reshape(-1).view(torch.uint8).numpy().tobytes()
    return (value.dtype, value.device, tuple(value.shape), value.stride(), bits)


def _has_bits(value: Any) -> bool:
    """Whether the memory of `value` says all about it: no sparse, quantized, meta or lazily conjugated tensor does."""
    if type(value) not in _TENSORS or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return False
    return not value.is_conj() and not value.is_neg()


def _graph_key(gm: fx.GraphModule) -> Any:
    """The graph with nodes named by their places, and submodules that it calls by identity."""
    places: dict[fx.Node, Any] = {}
    keys = []
    for index, node in enumerate(gm.graph.nodes):
        value = None if node.op == "placeholder" else _freeze(node.target)
        if node.op == "get_attr":
            value = _attribute_key(node)
        elif node.op == "call_module":
            value = _Itself(gm.get_submodule(str(node.target)))
        arguments: Any = fx.map_arg((node.args, node.kwargs), places.__getitem__)
        brackets = pytree.tree_structure((arguments, sorted(node.kwargs)))
        keys.append((node.op, value, _freeze(arguments), brackets))
        places[node] = _Place(index)
    return tuple(keys)


@dataclass(frozen=True)
class _Place:
    """A reference to a node within its graph."""

    index: int
