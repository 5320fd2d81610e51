"""Which values of a graph are written to in place, and which share storage with them.

Not seen: two inputs of a graph that share storage.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.node import map_arg

from autodeploy.effects import HOST_READS, KEEPS_STATISTICS, body_impurity, impurity, is_asked_to_write
from autodeploy.spelling import (
    CASTS,
    attribute,
    base_name,
    is_in_place_operator,
    is_measure,
    is_number_function,
    is_python_operator,
    overloads,
    per_target,
)

# Results that may be an argument itself, or a view of it, though the schema does not say so (torch 2.13).
_MAY_ALIAS = frozenset(
    [
        "_unsafe_view",
        "alpha_dropout",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "cartesian_prod",
        "conj_physical",
        "dropout",
        "einsum",
        "feature_dropout",
        "lift_fresh",
        "meshgrid",
        "sum_to_size",
        "to_dense",
        "type_as",
        "unsafe_chunk",
        "unsafe_split",
    ]
)

# These write to copies, which they return.
_FUNCTIONALIZED = (torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)
_VIEWING_OPERATORS = (operator.getitem, operator.pos)


def mutated(graph: fx.Graph, numbers: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes that some node may write to, with everything that may share their storage (views up and down).

    `numbers` are nodes that are no tensors: `n += 1` writes to nothing.
    """
    written = [arg for node in graph.nodes if _may_write(node) and node not in numbers for arg in writes(node)]
    return sharing(written, _attributes_by_storage(graph)) if written else set()


def sharing(nodes: Iterable[fx.Node], attributes: Mapping[fx.Node, Iterable[fx.Node]] | None = None) -> set[fx.Node]:
    """`nodes` and everything that may share their storage; `attributes` says which get_attr nodes do so."""
    waiting = list(nodes)
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += aliased(node)
        waiting += [user for user in node.users if node in aliased(user)]
        waiting += (attributes or {}).get(node, ())
    return found


def returned(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a caller is given, or that share storage with what a caller is given."""
    outputs = [node.all_input_nodes for node in graph.find_nodes(op="output")]
    waiting = [node for nodes in outputs for node in nodes]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += aliased(node)
    return found


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that `node` may write to; for a foreign module its own attributes, too."""
    if node.op in ("placeholder", "output", "get_attr"):
        return []
    if node.op == "call_module":
        return _module_writes(node)
    if isinstance(node.target, HigherOrderOperator):
        return [] if impurity(node) is None else node.all_input_nodes
    return _pick(node, _argument_names(node).written)


def aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments that the result of `node` may share storage with."""
    if node.op in ("placeholder", "output", "get_attr") or is_measure(node):
        return []
    if node.target in _FUNCTIONALIZED:
        return []
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        return node.all_input_nodes
    return _pick(node, _argument_names(node).aliased)


@per_target
def _may_write(op: str, target: Any) -> bool:
    """Whether there is more to see than that a node's op writes to nothing: most ops of most graphs do not."""
    if op in ("placeholder", "output", "get_attr"):
        return False
    if not isinstance(target, OpOverload):
        return True
    return target._schema.is_mutable or base_name(target) in KEEPS_STATISTICS


class _Argument(NamedTuple):
    position: int
    name: str


class _ArgumentNames(NamedTuple):
    """Which arguments a target writes to and which its result may share storage with; None for all of them."""

    written: tuple[_Argument, ...] | None
    aliased: tuple[_Argument, ...] | None


_FIRST = (_Argument(0, "self"), _Argument(0, "input"))


def _pick(node: fx.Node, names: Iterable[_Argument] | None) -> list[fx.Node]:
    if names is None or is_asked_to_write(node):
        return node.all_input_nodes
    found: list[fx.Node] = []
    for position, name in names:
        map_arg(node.args[position] if position < len(node.args) else node.kwargs.get(name), found.append)
    if "out" in node.kwargs:
        map_arg(node.kwargs["out"], found.append)
    return list(dict.fromkeys(found)) if len(found) > 1 else found


@per_target
def _argument_names(op: str, target: Any) -> _ArgumentNames:
    if (op == "call_method" and target in CASTS) or target is getattr:
        return _ArgumentNames((), _FIRST)
    if is_python_operator(target):
        in_place = is_in_place_operator(target)
        return _ArgumentNames(_FIRST if in_place else (), _FIRST if in_place or target in _VIEWING_OPERATORS else ())
    if is_number_function(target) or (op == "call_method" and target in HOST_READS):
        return _ArgumentNames((), ())
    known = overloads(op, target)
    if not known:
        return _ArgumentNames(None, None)
    written, shared = _flagged(known, _is_written), _flagged(known, _is_shared)
    if any(base_name(overload) in _MAY_ALIAS for overload in known):
        shared = None
    # The arguments of a Python function are those of the op in an order of its own.
    is_function = inspect.isfunction(target)
    return _ArgumentNames(None if is_function and written else written, None if is_function and shared else shared)


def _flagged(
    known: tuple[OpOverload, ...], test: Callable[[OpOverload, torch.Argument], bool]
) -> tuple[_Argument, ...]:
    found = [
        _Argument(position, argument.name)
        for overload in known
        for position, argument in enumerate(overload._schema.arguments)
        if test(overload, argument)
    ]
    # Torch functions call `input` what ATen calls `self`.
    found += [_Argument(position, "input") for position, name in found if name == "self"]
    return tuple(dict.fromkeys(found))


def _is_written(overload: OpOverload, argument: torch.Argument) -> bool:
    if argument.name in ("running_mean", "running_var") and base_name(overload) in KEEPS_STATISTICS:
        return True
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_shared(overload: OpOverload, argument: torch.Argument) -> bool:
    return argument.alias_info is not None


def _module_writes(node: fx.Node) -> list[fx.Node]:
    module = node.graph.owning_module
    owner = module.get_submodule(str(node.target)) if module is not None else None
    if isinstance(owner, fx.GraphModule) and body_impurity(owner) is None:
        return []
    is_torchs = type(owner).__module__.startswith("torch.nn.modules.")
    written = [] if is_torchs and not getattr(owner, "inplace", False) else node.all_input_nodes
    own = f"{node.target}."
    return written + [each for each in node.graph.find_nodes(op="get_attr") if str(each.target).startswith(own)]


def _attributes_by_storage(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each attribute, the nodes that read the same storage, under whatever name."""
    nodes = graph.find_nodes(op="get_attr")
    storages = {node: _storage(node) for node in nodes}
    groups: dict[Any, list[fx.Node]] = {}
    for node, storage in storages.items():
        groups.setdefault(storage, []).append(node)
    return {node: groups[storage] for node, storage in storages.items()}


def _storage(node: fx.Node) -> Any:
    value = attribute(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node.target
