"""Small graphs with module paths for the tests of the viewer: layers of a few ATen ops, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from autodeploy.graph.meta import MODULE_STACK, VALUE

aten = torch.ops.aten
Layer = Callable[[int, "Maker", fx.Node], fx.Node]


class Maker:
    """Adds nodes to a graph as those of one module."""

    def __init__(self, graph: fx.Graph, path: str) -> None:
        self.graph, self.path = graph, path

    def call(self, op: Any, *args: Any, at: str = "", value: torch.Tensor | None = None, **kwargs: Any) -> fx.Node:
        """A call_function node of the module `at` below this one, with a value if one is given."""
        node = self.graph.call_function(op, args, kwargs)
        path = ".".join(part for part in (self.path, at) if part)
        MODULE_STACK.set(node, {path: (path, "torch.nn.Module")})
        if value is not None:
            VALUE.set(node, value)
        return node


def graph_module(build: Callable[[Maker, fx.Node], Any], *, inputs: Iterable[str] = ("x",)) -> fx.GraphModule:
    """The graph that `build(maker, first input)` makes; it returns what is output."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in inputs]
    graph.output(build(Maker(graph, ""), nodes[0]))
    return fx.GraphModule(torch.nn.Module(), graph)


def layers(number: int, layer: Layer) -> fx.GraphModule:
    """`layer(index, maker, x)` after each other, in modules layers.0, layers.1, ..."""

    def build(maker: Maker, x: fx.Node) -> fx.Node:
        for index in range(number):
            x = layer(index, Maker(maker.graph, f"layers.{index}"), x)
        return x

    return graph_module(build)


def attention_layer(index: int, maker: Maker, x: fx.Node) -> fx.Node:
    """Attention on two projections, and a residual."""
    q, k = (maker.call(aten.mul.Tensor, x, number, at=f"attn.{name}") for name, number in (("q", 2), ("k", 3)))
    mixed = maker.call(aten.scaled_dot_product_attention.default, q, k, k, at="attn")
    return maker.call(aten.add.Tensor, x, mixed)


def cached_layer(index: int, maker: Maker, x: fx.Node) -> fx.Node:
    """The same with its attention in two ops."""
    q, k = (maker.call(aten.mul.Tensor, x, number, at=f"attn.{name}") for name, number in (("q", 2), ("k", 3)))
    scores = maker.call(aten.softmax.int, maker.call(aten.matmul.default, q, k, at="attn"), -1, at="attn")
    mixed = maker.call(aten.matmul.default, scores, k, at="attn")
    return maker.call(aten.add.Tensor, x, mixed)
