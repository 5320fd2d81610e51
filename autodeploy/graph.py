"""What the passes need of FX beyond FX itself: recording eager code into a graph, and the layout-only question."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate, map_arg
from torch.fx.proxy import GraphAppendingTracer, Proxy

PREPARE = "prepare_metadata"
ROLE = "autodeploy_role"  # meta of placeholders: "tokens", "layout" or "cache"
SITE = "autodeploy_site"  # meta of cached attention nodes: the Site they came from
NEAR_MISS = "autodeploy_near_miss"  # meta of a node that a pass left alone: why
_NEAR_MISSES = "autodeploy_near_misses"

_SYMBOLIC = frozenset(
    getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
) | {torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite}
_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same parameters, buffers and submodules; node meta is copied one level deep."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph, class_name=gm.__class__.__name__)
    copy.meta.update(gm.meta)
    prepare = getattr(gm, PREPARE, None)
    if isinstance(prepare, fx.GraphModule):
        setattr(copy, PREPARE, copy_module(prepare))
    return copy


def near_miss(gm: fx.GraphModule, node: fx.Node, reason: str) -> None:
    """Say that the running pass came near to `node` and why it left it alone."""
    node.meta[NEAR_MISS] = reason
    gm.meta.setdefault(_NEAR_MISSES, []).append((node, reason))


def take_near_misses(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """What was said with `near_miss` since the last call."""
    return gm.meta.pop(_NEAR_MISSES, [])


def placeholders(gm: fx.GraphModule, role: str | None = None) -> list[fx.Node]:
    """Graph inputs in order, or those of one role."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node for node in nodes if role is None or node.meta.get(ROLE) == role]


def placeholder(gm: fx.GraphModule, role: str) -> fx.Node | None:
    """The one input of that role, if there is one."""
    return next(iter(placeholders(gm, role)), None)


def add_placeholder(gm: fx.GraphModule, name: str, role: str) -> fx.Node:
    """A new graph input after those there are."""
    last = placeholders(gm)
    with gm.graph.inserting_after(last[-1]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.placeholder(name)
    node.meta[ROLE] = role
    return node


def record(before: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` on proxies and put the nodes it makes in front of `before`; fx.Nodes in, fx.Nodes out.

    New nodes are given the module path and source line of `before`.
    """
    graph = before.graph
    tracer = GraphAppendingTracer(graph)
    previous = before.prev

    def to_proxy(arg: Any) -> Any:
        return Proxy(arg, tracer) if isinstance(arg, fx.Node) else arg

    def to_node(value: Any) -> Any:
        return value.node if isinstance(value, Proxy) else value

    with graph.inserting_before(before):
        result = function(*map_aggregate(args, to_proxy))
    node = previous.next
    while node is not before:
        node.meta = {key: before.meta[key] for key in ("nn_module_stack", "stack_trace") if key in before.meta}
        node = node.next
    return map_aggregate(result, to_node)


def is_size(node: fx.Node) -> bool:
    """Whether `node` is the size of something: free, and known without reading any tensor's values."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return node.target in _SIZES or _is_shape(node)


def _is_shape(node: fx.Node) -> bool:
    """`x.shape` or `x.device`, as recorded from plain Python."""
    return node.target is getattr and node.args[1] in ("shape", "device")


def is_scalar(node: fx.Node) -> bool:
    """Whether `node` is a size or arithmetic on sizes: compile-time work, never a kernel."""
    if is_size(node):
        return True
    return (
        node.op == "call_function" and node.target in _SYMBOLIC and all(is_scalar(arg) for arg in node.all_input_nodes)
    )


def is_pure(node: fx.Node) -> bool:
    """Whether computing `node` once instead of twice, or earlier, cannot be noticed."""
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        return _is_pure_packet(getattr(torch.ops.aten, str(node.target), None))
    if node.op != "call_function":
        return False
    target = node.target
    if target is getattr or target in _SYMBOLIC or target is operator.getitem:
        return True
    if isinstance(target, torch._ops.OpOverload):
        return _is_pure_overload(target)
    # A torch function recorded from plain Python (torch.where, F.pad): judged by the ATen op of that name.
    return _is_pure_packet(getattr(torch.ops.aten, getattr(target, "__name__", ""), None))


@cache
def _is_pure_overload(op: torch._ops.OpOverload) -> bool:
    """Whether `op` neither writes to its arguments, nor draws random numbers, nor has effects beside its result."""
    # FX knows which ops have effects, but only of nodes.
    return not fx.Graph().call_function(op).is_impure() and torch.Tag.nondeterministic_seeded not in op.tags


@cache
def _is_pure_packet(packet: torch._ops.OpOverloadPacket | None) -> bool:
    if packet is None:
        return False
    overloads = [getattr(packet, name) for name in packet.overloads() if "out" not in name]
    return bool(overloads) and all(_is_pure_overload(op) for op in overloads)


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an in-place op may write to, with everything that may share their storage (views up and down)."""
    written = [arg for node in graph.nodes for arg in _aliased_args(node, only_written=True)]
    found: set[fx.Node] = set()
    while written:
        node = written.pop()
        if node in found:
            continue
        found.add(node)
        written += _aliased_args(node)
        written += [user for user in node.users if node in _aliased_args(user)]
        if node.op == "get_attr":
            written += [other for other in graph.find_nodes(op="get_attr") if other.target == node.target]
    return found


def _aliased_args(node: fx.Node, *, only_written: bool = False) -> list[fx.Node]:
    """The arguments that `node` writes to, and unless `only_written` those that its result may share storage with."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return [] if only_written or is_scalar(node) else node.all_input_nodes
    names = _aliased_names(node.target, only_written)
    if not names:
        return []
    schema = node.target._schema.arguments
    named = dict(zip((arg.name for arg in schema), node.args, strict=False)) | node.kwargs
    found: list[fx.Node] = []
    map_arg([named.get(name) for name in names], found.append)
    return found


@cache
def _aliased_names(op: torch._ops.OpOverload, only_written: bool) -> tuple[str, ...]:
    infos = [(arg.name, arg.alias_info) for arg in op._schema.arguments]
    return tuple(name for name, info in infos if info is not None and (info.is_write or not only_written))


def layout_only(gm: fx.GraphModule) -> set[fx.Node]:
    """Every node that depends on nothing but the layout, sizes and constants: neither tokens, caches nor weights."""
    found: set[fx.Node] = set()
    written = mutated(gm.graph)
    for node in gm.graph.nodes:
        if _is_layout_only(gm, node, found) and node not in written:
            found.add(node)
    return found


def _is_layout_only(gm: fx.GraphModule, node: fx.Node, found: set[fx.Node]) -> bool:
    if node.op == "placeholder":
        return node.meta.get(ROLE) == "layout"
    if node.op == "get_attr":
        return not isinstance(get_attribute(gm, str(node.target)), torch.nn.Parameter)
    if is_size(node):
        source = node.all_input_nodes[0]
        return source.op == "placeholder" or source in found
    if node.op == "call_module" and node.target == PREPARE:
        return True
    return all(arg in found for arg in node.all_input_nodes) and is_pure(node)


def metadata_nodes(gm: fx.GraphModule, known: set[fx.Node] | None = None) -> list[fx.Node]:
    """The tensor computations in `known`, by default `layout_only(gm)`, that read the layout or sizes, in graph order.

    Neither the call of prepare_metadata nor the unpacking of its outputs counts.
    """
    found = layout_only(gm) if known is None else known
    reads: set[fx.Node] = set(placeholders(gm, "layout"))
    result = []
    for node in gm.graph.nodes:
        if node not in found or is_scalar(node) or node.op != "call_function":
            continue
        if node.target is operator.getitem and _is_prepare(node.all_input_nodes[0]):
            continue
        if any(arg in reads or is_scalar(arg) for arg in node.all_input_nodes):
            reads.add(node)
            result.append(node)
    return result


def _is_prepare(node: fx.Node) -> bool:
    return node.op == "call_module" and node.target == PREPARE


def prepare_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of `prepare_metadata`: none before `share_metadata`, one after."""
    return [node for node in gm.graph.nodes if _is_prepare(node)]


def get_attribute(gm: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or constant that a get_attr node names."""
    *path, name = target.split(".")
    return getattr(gm.get_submodule(".".join(path)), name)


def merge_equal(graph: fx.Graph, candidates: Iterable[fx.Node]) -> set[fx.Node]:
    """Replace each of `candidates` (in graph order, pure) that repeats an earlier one; returns those replaced.

    Two nodes are equal when op, target and arguments are, with arguments given by position or by name alike.
    """
    seen: dict[Any, fx.Node] = {}
    merged: set[fx.Node] = set()
    for node in candidates:
        key = value_key(node)
        first = seen.setdefault(key, node)
        if first is node:
            continue
        node.replace_all_uses_with(first)
        graph.erase_node(node)
        merged.add(node)
    return merged


def value_key(node: fx.Node) -> Any:
    """What makes two pure nodes compute the same: hashable, types of literals included (1, 1.0 and True differ)."""
    args, kwargs = node.args, dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        named = dict(zip((arg.name for arg in arguments), args, strict=False)) | kwargs
        defaults = {arg.name: arg.default_value for arg in arguments if arg.has_default_value()}
        args, kwargs = (), defaults | named
    return (node.op, node.target, _freeze(args), _freeze(kwargs))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _freeze(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    if isinstance(value, float):
        return (float, value.hex())
    return value if isinstance(value, fx.Node) else (type(value), value)


def users_outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of `nodes` whose value is used by a node that is not among them."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]
