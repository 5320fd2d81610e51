"""Which values of a graph are written to in place, and which share storage with them.

Tensors that come from outside, which are inputs without a role and attributes, may share storage where their dtypes do
not tell them apart. Inputs with a role are memory of their own: whoever gives roles promises that.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.node import map_arg

from autodeploy.graph.effects import HOST_READS, KEEPS_STATISTICS, body_impurity, impurity, is_asked_to_write
from autodeploy.graph.meta import CONSTANT, ROLE
from autodeploy.graph.spelling import (
    CASTS,
    NUMBERS,
    attribute,
    base_name,
    is_in_place_operator,
    is_measure,
    is_number_function,
    is_python_operator,
    overloads,
    per_target,
    recorded_value,
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
        "feature_alpha_dropout",
        "feature_dropout",
        "histogramdd",
        "lift_fresh",
        "meshgrid",
        "sum_to_size",
        "to_dense",
        "type_as",
        "unsafe_chunk",
        "unsafe_split",
    ]
)

_NO_CONTAINERS = (torch.Tensor, *NUMBERS)
# These write to copies, which they return.
_FUNCTIONALIZED = (torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)
_VIEWING_OPERATORS = (operator.getitem, operator.pos)
# Of lists, dicts and tuples these make another that holds what the arguments hold, or put one into another.
_CONTAINER_OPERATORS = frozenset(["add", "concat", "iadd", "iconcat", "imul", "ior", "mul", "or_", "setitem"])
# These make their first argument share the storage of another.
_SHARING = frozenset(["set", "set_", "set_data"])
# These write sizes, without torch's tag for it.
_RESHAPING = _SHARING | {"_resize_output_", "resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_"}


class Writes(NamedTuple):
    """What is written to in a graph: nodes whose values may change, and those whose sizes or strides may."""

    values: set[fx.Node]
    sizes: set[fx.Node]


def mutated(graph: fx.Graph) -> Writes:
    """Nodes that some node may write to, with everything that may share their storage (views up and down).

    Sizes are written by `t_`, `resize_`, `out=`, and by what is not known.
    """
    writers = [node for node in graph.nodes if _may_write(node)]
    if not writers:
        return Writes(set(), set())
    holders = _holders(graph)
    of_sizes = [node for node in writers if "out" in node.kwargs or _may_reshape(node)]
    return Writes(_written(graph, writers, holders), _written(graph, of_sizes, holders))


def _written(graph: fx.Graph, writers: Iterable[fx.Node], holders: _Holders) -> set[fx.Node]:
    written = ((node, arg) for node in writers for arg in writes(node))
    # Nothing writes to a number, but FX writes `n += 1` as it stands, for all who read n.
    found = sharing((arg for node, arg in written if is_in_place_operator(node.target) or not _is_number(arg)), holders)
    return sharing(found | _perhaps_the_same(graph, found), holders) if found else found


def _is_number(node: fx.Node) -> bool:
    return is_measure(node) or isinstance(recorded_value(node), NUMBERS)


def sharing(nodes: Iterable[fx.Node], holders: _Holders | None = None) -> set[fx.Node]:
    """`nodes` and everything that may share their storage; `holders` says which nodes hold it without an argument."""
    waiting = list(nodes)
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += aliased(node)
        waiting += [user for user in node.users if node in aliased(user)]
        if holders is None:
            continue
        for storage in holders.of_node.get(node, ()):
            waiting += [other for other in holders.of_storage[storage] if other not in found]
    return found


def returned(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a caller is given or may find somewhere, or that share storage with one of those."""
    waiting = [arg for node in graph.nodes if _may_keep(node) for arg in node.all_input_nodes]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += aliased(node)
    return found


def _may_keep(node: fx.Node) -> bool:
    """Whether `node` puts its arguments where they outlive the graph, as the output does: in a module, a global."""
    if node.op == "call_module":
        return bool(_module_writes(node))
    if isinstance(node.target, HigherOrderOperator):
        return False
    return _argument_names(node).written is None or (node.target is operator.setitem and _may_hold_arguments(node))


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that `node` may write to; a module that may write to its own tensors stands for them."""
    if node.op == "output":
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
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator) or _may_hold_arguments(node):
        return node.all_input_nodes
    return _pick(node, _argument_names(node).aliased)


def _may_hold_arguments(node: fx.Node) -> bool:
    """Whether `node` may put its arguments into a container, as `+` does with two lists."""
    if not _is_container_operator(node) or any(type(arg) in (float, complex) for arg in node.args):
        return False
    holder = node.args[0] if node.target is operator.setitem else node
    return not isinstance(holder, fx.Node) or not isinstance(recorded_value(holder), _NO_CONTAINERS)


@per_target
def _is_container_operator(op: str, target: Any) -> bool:
    is_operator = is_python_operator(target) or is_in_place_operator(target)
    return is_operator and target.__name__ in _CONTAINER_OPERATORS


@per_target
def _may_write(op: str, target: Any) -> bool:
    """Whether there is more to see than that a node's op writes to nothing: most ops of most graphs do not."""
    if op in ("placeholder", "output", "get_attr"):
        return False
    if not isinstance(target, OpOverload):
        return True
    return target._schema.is_mutable or base_name(target) in KEEPS_STATISTICS


@per_target
def _may_reshape(op: str, target: Any) -> bool:
    """Whether a node's op may change sizes or strides of what it writes to."""
    if op == "call_module" or isinstance(target, HigherOrderOperator):
        return True
    if is_in_place_operator(target):
        return False
    known = overloads(op, target)
    return not known or any(torch.Tag.inplace_view in each.tags or base_name(each) in _RESHAPING for each in known)


class _Holders(NamedTuple):
    """Storages by node, and nodes by storage."""

    of_node: dict[fx.Node, list[Any]]
    of_storage: dict[Any, list[fx.Node]]


class _Argument(NamedTuple):
    position: int
    name: str


class _ArgumentNames(NamedTuple):
    """Which arguments a target writes to and which its result may share storage with; None for all of them."""

    written: tuple[_Argument, ...] | None
    aliased: tuple[_Argument, ...] | None


_FIRST = (_Argument(0, "self"),)


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
    if is_in_place_operator(target):
        return _ArgumentNames(_FIRST, _FIRST)
    if is_python_operator(target):
        return _ArgumentNames((), _FIRST if target in _VIEWING_OPERATORS else ())
    if op == "call_method" and target in HOST_READS:
        return _ArgumentNames((), _FIRST if target == "numpy" else ())
    if is_number_function(target):
        return _ArgumentNames((), ())
    known = overloads(op, target)
    if not known:
        return _ArgumentNames(None, None)
    written, shared = _flagged(known, _is_written), _flagged(known, _is_shared)
    if any(base_name(overload) in _SHARING for overload in known):
        return _ArgumentNames(None, None)
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
    root = node.graph.owning_module
    module = root.get_submodule(str(node.target)) if root is not None else None
    if isinstance(module, fx.GraphModule) and body_impurity(module) is None:
        return []
    if module is None or not all(map(_only_computes, module.modules())):
        return [node, *node.all_input_nodes]
    return [node] if any(True for _ in module.buffers()) else []  # in training, statistics are written to


def _only_computes(module: torch.nn.Module) -> bool:
    """Whether `module` is torch's own, without hooks, and not asked to write to its inputs or parameters."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return (
        is_torchs and not has_hooks and not getattr(module, "inplace", False) and not getattr(module, "max_norm", None)
    )


def _holders(graph: fx.Graph) -> _Holders:
    """Who holds which tensors of the graph's module: the nodes that name them, and the submodules that own them."""
    root = graph.owning_module
    found = _Holders({}, {})
    for node in graph.find_nodes(op="get_attr") + graph.find_nodes(op="call_module"):
        value = attribute(node) if node.op == "get_attr" else root and root.get_submodule(str(node.target))
        found.of_node[node] = storages(value) if value is not None else [str(node.target)]
        for storage in found.of_node[node]:
            found.of_storage.setdefault(storage, []).append(node)
    return found


def storages(value: Any) -> list[Any]:
    """What names the memory of a tensor, or of all tensors that a module holds, registered or not."""
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()._cdata if value.layout is torch.strided else id(value)]
    if not isinstance(value, torch.nn.Module):
        return [id(value)]
    held = [each for part in value.modules() for each in vars(part).values() if isinstance(each, torch.Tensor)]
    return [storage for tensor in (*value.parameters(), *value.buffers(), *held) for storage in storages(tensor)]


def _perhaps_the_same(graph: fx.Graph, written: set[fx.Node]) -> set[fx.Node]:
    """Inputs without a role that may be a tensor of `written`, and attributes that such an input may be."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if not ROLE.on(node) and _may_be_tensor(node)]
    attributes = [node for node in graph.find_nodes(op="get_attr") if not CONSTANT.on(node)] if inputs else []
    dtypes_of_inputs = {_dtype(node) for node in inputs if node in written}
    dtypes = dtypes_of_inputs | {_dtype(node) for node in attributes if node in written}
    found = {node for node in inputs if _may_be_of(_dtype(node), dtypes)}
    return found | {node for node in attributes if _may_be_of(_dtype(node), dtypes_of_inputs)}


def _may_be_tensor(node: fx.Node) -> bool:
    value = recorded_value(node)
    return value is None or isinstance(value, torch.Tensor)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = attribute(node) if node.op == "get_attr" else recorded_value(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _may_be_of(dtype: torch.dtype | None, dtypes: set[torch.dtype | None]) -> bool:
    return bool(dtypes) and (dtype is None or dtype in dtypes or None in dtypes)
