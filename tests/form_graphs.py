"""Graphs of the same function in every spelling. A function takes q and c, int tensors [S], and x, a tensor [T]."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from autodeploy.effects import is_pure
from autodeploy.spelling import recorded_value

Function = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


class _Module(torch.nn.Module):
    """The function of one tensor [2, S] and x: two inputs that differ, whatever a tracer makes of their order."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, lengths: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return *self.function(lengths[0], lengths[1], x), torch.neg(x)  # x is an input in any case


def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([[5, 0, 3, 4], [3, 0, 8, 1]], dtype=dtype), torch.empty(12)


def _program(function: Function, dtype: torch.dtype) -> torch.export.ExportedProgram:
    sizes = ({1: Dim("S", min=3, max=9999)}, {0: Dim("T", min=2, max=9999)})
    return torch.export.export(_Module(function), _example(dtype), dynamic_shapes=sizes)


def exported(function: Function, dtype: torch.dtype) -> fx.GraphModule:
    return fx.GraphModule({}, _program(function, dtype).graph)


def decomposed(function: Function, dtype: torch.dtype) -> fx.GraphModule:
    program = _program(function, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own LeafSpec
        return fx.GraphModule({}, program.run_decompositions().graph)


def proxied(function: Function, dtype: torch.dtype) -> fx.GraphModule:
    return make_fx(_Module(function), tracing_mode="symbolic")(*_example(dtype))


def _compiled(function: Function, dtype: torch.dtype, backend: Any) -> None:
    torch.compiler.reset()
    lengths, x = _example(dtype)
    torch._dynamo.mark_dynamic(lengths, 1)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(_Module(function), backend=backend, fullgraph=True)(lengths, x)


def dynamo(function: Function, dtype: torch.dtype) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []
    _compiled(function, dtype, lambda gm, _: graphs.append(gm) or gm.forward)
    return graphs[0]


def post_aot(function: Function, dtype: torch.dtype) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    _compiled(function, dtype, aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table()))
    return graphs[0]


TRACERS = {tracer.__name__: tracer for tracer in (exported, decomposed, proxied, dynamo, post_aot)}


def run(gm: fx.GraphModule, lengths: Tensor, x: Tensor) -> list[Tensor]:
    """The outputs of a traced graph, whose other inputs are sizes of these two."""
    values = [recorded_value(node) for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [lengths if value.dim() == 2 else x for value in values if isinstance(value, Tensor)]
    shapes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    sizes = dict(zip(map(str, shapes), (size for tensor in tensors for size in tensor.shape), strict=True))
    given = iter(tensors)
    result = gm(*(next(given) if isinstance(value, Tensor) else sizes[str(value)] for value in values))
    return list(result)[:-1]


def computed(gm: fx.GraphModule) -> set[fx.Node]:
    """All that a graph computes without effects: what `known` would be, were x part of the layout."""
    return {node for node in gm.graph.nodes if node.op == "placeholder" or is_pure(node)}
