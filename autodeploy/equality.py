"""When two pure nodes compute the same: keys that are equal exactly where the values must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.aliasing import returned
from autodeploy.spelling import attribute, overloads, recorded_value

# Larger constants are the same only where they are the same tensor: comparing costs a copy to the host.
_MAX_COMPARED_BYTES = 1 << 16
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


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
        if not isinstance(value, _SYMBOLIC):
            continue
        first = seen.setdefault((type(value), value.node.expr), node)
        if first is not node and node.users:
            node.replace_all_uses_with(first)
            merged += 1
    return merged


def value_key(node: fx.Node) -> Any:
    """What makes two pure nodes compute the same: hashable, types of literals included (1, 1.0 and True differ).

    Arguments count alike by position, by name and by default; constants count by their bits.
    """
    if node.op == "get_attr":
        return ("get_attr", _constant_key(attribute(node)))
    special = _SPECIAL.get(node.target)
    if special is not None and (key := special(node)) is not None:
        return key
    signature = _signature(node.op, node.target)
    args, kwargs = node.args, node.kwargs
    if signature is None or len(args) > len(signature.names) or not kwargs.keys() <= signature.known:
        return (node.op, node.target, _freeze(args), _freeze(kwargs), _brackets(node))
    given = [_freeze(arg) for arg in args]
    rest = signature.names[len(args) :]
    given += [_freeze(kwargs[name]) if name in kwargs else default for name, default in rest]
    return (node.op, node.target, *given)


def _freeze(value: Any) -> Any:
    kind = type(value)
    if kind is fx.Node:
        return value
    if kind is float:
        return (float, value.hex())
    if isinstance(value, dict):
        return (dict, *((name, _freeze(value[name])) for name in sorted(value)))
    if isinstance(value, (list, tuple)):
        return tuple([_freeze(item) for item in value])
    if isinstance(value, slice):
        return (slice, _freeze((value.start, value.stop, value.step)))
    return (kind, value)


def _brackets(node: fx.Node) -> Any:
    """Which arguments are lists: to ATen they are as good as tuples, to an index in Python they are not."""
    if isinstance(node.target, OpOverload):
        return None
    return pytree.tree_structure((node.args, [node.kwargs[name] for name in sorted(node.kwargs)]))


class _Signature(NamedTuple):
    """(name, frozen default) of each argument in order."""

    names: Sequence[tuple[str, Any]]
    known: frozenset[str]


@cache
def _signature(op: str, target: Any) -> _Signature | None:
    """The arguments that all overloads which `target` may stand for agree on, or None."""
    schemas = [overload._schema.arguments for overload in overloads(op, target)]
    if not schemas:
        return None
    by_overload = {tuple((arg.name, _freeze(_default(arg))) for arg in schema) for schema in schemas}
    if len(by_overload) > 1:
        return None
    names = by_overload.pop()
    return _Signature(names, frozenset(name for name, _ in names))


def _default(argument: torch.Argument) -> Any:
    return argument.default_value if argument.has_default_value() else None


def _constant_key(value: Any) -> Any:
    """Tensors by their bits, graphs by their nodes, everything else by identity."""
    if isinstance(value, fx.GraphModule):
        return _graph_key(value)
    if type(value) is not torch.Tensor or value.is_sparse or value.is_quantized or value.is_conj() or value.is_neg():
        return (type(value), id(value))
    form = (value.dtype, value.device, tuple(value.shape), value.stride())
    if value.numel() * value.element_size() > _MAX_COMPARED_BYTES:
        return (*form, value.data_ptr())
    with _disable_current_modes(), torch.no_grad():
        return (*form, value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _graph_key(gm: fx.GraphModule) -> Any:
    """The graph with nodes named by their places."""
    places: dict[fx.Node, Any] = {}
    keys = []
    for index, node in enumerate(gm.graph.nodes):
        target = None if node.op == "placeholder" else node.target
        value = _constant_key(attribute(node)) if node.op == "get_attr" else target
        arguments: Any = fx.map_arg((node.args, node.kwargs), places.__getitem__)
        keys.append((node.op, value, _freeze(arguments)))
        places[node] = _Place(index)
    return tuple(keys)


@dataclass(frozen=True)
class _Place:
    """A reference to a node within its graph."""

    index: int


def _range_key(node: fx.Node) -> Any:
    """arange, however its start, step, dtype and device are given."""
    value = recorded_value(node)
    if not isinstance(value, torch.Tensor) or not 1 <= len(node.args) <= 3:
        return None
    start, end, step = (0, *node.args, 1) if len(node.args) == 1 else (*node.args, 1)[:3]
    return ("arange", _freeze(start), _freeze(end), _freeze(step), value.dtype, value.device)


def _fill_key(node: fx.Node) -> Any:
    """full, zeros and ones of the same size, value, dtype and device."""
    value = recorded_value(node)
    plain = {"dtype", "device", "pin_memory", "layout"}
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not node.kwargs.keys() <= plain:
        return None
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if len(node.args) != (2 if name == "full" else 1) or node.kwargs.get("pin_memory"):
        return None
    fill = node.args[1] if name == "full" else int(name == "ones")
    if isinstance(fill, (bool, int)) and value.dtype.is_floating_point:
        fill = float(fill)
    elif isinstance(fill, (bool, int)):
        fill = bool(fill) if value.dtype is torch.bool else int(fill)
    return ("full", _freeze(node.args[0]), _freeze(fill), value.dtype, value.device)


def _cast_key(node: fx.Node) -> Any:
    """A tensor in a dtype, on a device, whichever op casts it."""
    value, source = recorded_value(node), node.args[0]
    if not isinstance(value, torch.Tensor) or not isinstance(source, fx.Node):
        return None
    if node.kwargs.get("memory_format") is not None or node.kwargs.get("layout") is not None:
        return None
    if node.target is torch.ops.aten.to.dtype and len(node.args) > 4:
        return None
    return ("cast", source, value.dtype, value.device)


_aten = torch.ops.aten
_SPECIAL: dict[Any, Callable[[fx.Node], Any]] = {
    _aten.arange.default: _range_key,
    _aten.arange.start: _range_key,
    _aten.arange.start_step: _range_key,
    _aten.full.default: _fill_key,
    _aten.zeros.default: _fill_key,
    _aten.ones.default: _fill_key,
    _aten.to.dtype: _cast_key,
    _aten._to_copy.default: _cast_key,
    torch.ops.prims.convert_element_type.default: _cast_key,
}
