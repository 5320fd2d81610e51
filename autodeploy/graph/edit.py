"""What a pass is, and what passes need of FX beyond FX itself: copies, inputs by role, recording of eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer, Proxy

from autodeploy.graph.meta import LOOKED_AT, NEAR_MISS, NEAR_MISSES, ROLE, VALUE, origin
from autodeploy.graph.values import record_values

PREPARE = "prepare_metadata"


@runtime_checkable
class Pass(Protocol):
    """One rewrite: a frozen dataclass whose fields are its options.

    It preserves every bit, unless it has a class attribute `may_round` that is True: the same arithmetic on tensors of
    another shape, where matmul kernels may round differently.
    """

    @property
    def name(self) -> str: ...

    def apply(self, gm: fx.GraphModule) -> int:
        """Rewrite `gm` in place and return the number of matches; 0 means that nothing changed."""
        ...


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
    NEAR_MISS.set(node, reason)
    if not NEAR_MISSES.on(gm):
        NEAR_MISSES.set(gm, [])
    NEAR_MISSES.of(gm).append((node, reason))


def take_near_misses(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """What was said with `near_miss` since the last call."""
    return NEAR_MISSES.take(gm, [])


def look_at(gm: fx.GraphModule, name: str) -> None:
    """Note that the value of the attribute `name` of `gm` decided something: with another value, another graph."""
    LOOKED_AT.set(gm, LOOKED_AT.get(gm, frozenset()) | {name})  # copies of `gm` share its meta


def placeholders(gm: fx.GraphModule, role: str | None = None) -> list[fx.Node]:
    """Graph inputs in order, or those of one role."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node for node in nodes if role is None or ROLE.get(node) == role]


def placeholder(gm: fx.GraphModule, role: str) -> fx.Node | None:
    """The one input of that role, if there is one."""
    return next(iter(placeholders(gm, role)), None)


def add_placeholder(gm: fx.GraphModule, name: str, role: str, value: Any) -> fx.Node:
    """A new graph input after those there are; `value` is its fake tensor."""
    last = placeholders(gm)
    with gm.graph.inserting_after(last[-1]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        node = gm.graph.placeholder(name)
    ROLE.set(node, role)
    VALUE.set(node, value)
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
        node.meta = origin(before)
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
