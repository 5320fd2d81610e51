"""What the passes need of FX beyond FX itself: copies, inputs by role, recording eager code into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer, Proxy

from autodeploy.values import VALUE, record_values

PREPARE = "prepare_metadata"
ROLE = "autodeploy_role"  # meta of placeholders: "layout", "constant", "tokens", "cache" or "weight"
CONSTANT = "autodeploy_constant"  # meta of get_attr nodes: tracing made this tensor, it is nobody's to change
SITE = "autodeploy_site"  # meta of cached attention nodes: the Site they came from
NEAR_MISS = "autodeploy_near_miss"  # meta of a node that a pass left alone: why
NUM_POSITIONS = "autodeploy_num_positions"  # meta of a graph: how many positions its model is made for, if it says so
LOOKED_AT = "autodeploy_looked_at"  # meta of a graph: names of the tensors whose values decided what it became
_NEAR_MISSES = "autodeploy_near_misses"


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same parameters, buffers and submodules; node meta is copied one level deep."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    module = fx.GraphModule(gm, graph, class_name=gm.__class__.__name__)
    module.meta.update(gm.meta)
    prepare = getattr(gm, PREPARE, None)
    if isinstance(prepare, fx.GraphModule):
        setattr(module, PREPARE, copy_module(prepare))
    return module


def near_miss(gm: fx.GraphModule, node: fx.Node, reason: str) -> None:
    """Say that the running pass came near to `node` and why it left it alone."""
    node.meta[NEAR_MISS] = reason
    gm.meta.setdefault(_NEAR_MISSES, []).append((node, reason))


def take_near_misses(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """What was said with `near_miss` since the last call."""
    return gm.meta.pop(_NEAR_MISSES, [])


def look_at(gm: fx.GraphModule, name: str) -> None:
    """Note that the value of the attribute `name` of `gm` decided something: with another value, another graph."""
    gm.meta[LOOKED_AT] = gm.meta.get(LOOKED_AT, frozenset()) | {name}  # copies of `gm` share its meta


def placeholders(gm: fx.GraphModule, role: str | None = None) -> list[fx.Node]:
    """Graph inputs in order, or those of one role."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node for node in nodes if role is None or node.meta.get(ROLE) == role]


def placeholder(gm: fx.GraphModule, role: str) -> fx.Node | None:
    """The one input of that role, if there is one."""
    return next(iter(placeholders(gm, role)), None)


def add_placeholder(gm: fx.GraphModule, name: str, role: str, value: Any) -> fx.Node:
    """A new graph input after those there are; `value` is its fake tensor."""
    last = placeholders(gm)
    with gm.graph.inserting_after(last[-1]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.placeholder(name)
    node.meta |= {ROLE: role, VALUE: value}
    return node


def record(before: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` on proxies and put the nodes it makes in front of `before`; fx.Nodes in, fx.Nodes out.

    New nodes are given their values, and the module path and source line of `before`.
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
    nodes = between(previous, before)
    for node in nodes:
        node.meta = {key: before.meta[key] for key in ("nn_module_stack", "stack_trace") if key in before.meta}
    record_values(nodes)
    return map_aggregate(result, to_node)


def between(previous: fx.Node, before: fx.Node) -> list[fx.Node]:
    """The nodes after `previous` and in front of `before`."""
    nodes = []
    while previous.next is not before:
        previous = previous.next
        nodes.append(previous)
    return nodes


def prepare_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of `prepare_metadata`: none before `share_metadata`, one after."""
    return gm.graph.find_nodes(op="call_module", target=PREPARE)


def get_attribute(gm: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or constant that a get_attr node names."""
    *path, name = target.split(".")
    return getattr(gm.get_submodule(".".join(path)), name)


def is_same_tensor(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two are the same tensor: the same elements of the same memory, read in the same way."""
    if one is None or one is other:
        return one is other
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata and _form(one) == _form(other)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
