"""Hand-made FX graphs of a layout and an activation, both [4, 6] float64, with one parameter and one buffer like them.

Values stay small integers times powers of two, so that equal means equal bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.graph.edit import PREPARE
from autodeploy.graph.meta import ROLE

aten = torch.ops.aten
SHAPE = (4, 6)
Build = Callable[[fx.Graph, fx.Node, fx.Node], Any]
Draw = tuple[str, int, int, int]


def example(seed: int) -> Tensor:
    return torch.randint(-8, 8, SHAPE, generator=torch.Generator().manual_seed(seed)).double()


def module(build: Build) -> fx.GraphModule:
    """The graph that `build(graph, layout, x)` makes; it returns what is output."""
    root = torch.nn.Module()
    root.parameter = torch.nn.Parameter(example(1), requires_grad=False)
    root.buffer = torch.nn.Buffer(example(2))
    graph = fx.Graph()
    x, layout = graph.placeholder("x"), graph.placeholder("layout")
    ROLE.set(x, "tokens")
    ROLE.set(layout, "layout")
    graph.output(build(graph, layout, x))
    return fx.GraphModule(root, graph)


def run(gm: fx.GraphModule, seed: int = 0) -> list[Tensor]:
    """The outputs of `gm` on random inputs, from its first parameters and buffers each time."""
    gm.recompile()
    for name, value in (("parameter", example(1)), ("buffer", example(2))):
        for holder in (gm, getattr(gm, PREPARE, gm)):
            if hasattr(holder, name):
                getattr(holder, name).copy_(value)
    result = gm(example(seed + 3), example(seed + 4))
    return [result] if isinstance(result, Tensor) else list(result)


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call_function node in the graph of the first node among `args`."""
    graph = next(arg for arg in [*args, *kwargs.values()] if isinstance(arg, fx.Node)).graph
    return graph.call_function(target, args, kwargs)


# Each takes (a, b, n): two nodes of values [4, 6] and a small number; gives a node of the same shape.
OPS: dict[str, Callable[[fx.Node, fx.Node, int], fx.Node]] = {
    "add": lambda a, b, n: call(aten.add.Tensor, a, b),
    "add by keyword": lambda a, b, n: call(aten.add.Tensor, a, other=b),
    "add a number": lambda a, b, n: call(aten.add.Tensor, a, (1, 1.0, True, 2)[n % 4]),
    "add a size": lambda a, b, n: call(aten.add.Tensor, a, call(aten.sym_size.int, b, n % 2)),
    "add a sum of sizes": lambda a, b, n: call(
        aten.add.Tensor, a, call(operator.add, call(aten.sym_size.int, b, 0), n % 2)
    ),
    "maximum": lambda a, b, n: call(aten.maximum.default, a, b),
    "cumsum": lambda a, b, n: call(aten.cumsum.default, a, n % 2),
    "clone": lambda a, b, n: call(aten.clone.default, a),
    "where": lambda a, b, n: call(aten.where.self, call(aten.gt.Scalar, a, n), a, b),
    "slice": lambda a, b, n: call(aten.slice.Tensor, a, n % 2, 0, 9),
    "transpose": lambda a, b, n: call(aten.transpose.int, call(aten.transpose.int, a, 0, 1), 0, 1),
    "view": lambda a, b, n: call(aten.reshape.default, call(aten.reshape.default, a, [24]), [4, 6]),
    "split": lambda a, b, n: _split(a, n),
    "arange": lambda a, b, n: call(aten.add.Tensor, a, a.graph.call_function(aten.arange.default, (6,))),
    "add_": lambda a, b, n: call(aten.add_.Tensor, a, n % 4),
    "add_ to a row": lambda a, b, n: call(aten.add_.Tensor, call(aten.select.int, a, 0, n % 4), 1),
    "copy_": lambda a, b, n: call(aten.copy_.default, a, b),
}
_WRITES = ("add_", "add_ to a row", "copy_")


def _split(a: fx.Node, n: int) -> fx.Node:
    parts = call(aten.split.Tensor, a, 3, 1)
    halves = [call(operator.getitem, parts, index) for index in (n % 2, 1)]
    return a.graph.call_function(aten.cat.default, (halves, 1))


def random_module(draws: Sequence[Draw]) -> fx.GraphModule:
    """The graph of one op per (name in OPS, which a, which b, number); outputs the last few values."""

    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        values = [layout, x, *map(graph.get_attr, ("parameter", "buffer", "buffer"))]
        for name, a, b, number in draws:
            made = OPS[name](values[a % len(values)], values[b % len(values)], number)
            if name not in _WRITES or name == "copy_":
                values.append(made)
        return tuple(values[-6:])

    return module(build)
