"""Use products that suit a decode step's few rows in linear layers; those that share an input become one on a GPU.

Before:                                     After, on a CPU in float32:
    q = linear(x, w_q)                          q = autodeploy.linear(x, w_q)
    k = linear(x, w_k)                          k = autodeploy.linear(x, w_k)
    y = linear(z, w, bias)                      y = autodeploy.linear(z, w, bias)

                                            After, on a GPU in half precision:
                                                both = autodeploy.linears(x, [w_q, w_k])
                                                q, k = both[0], both[1]
                                                y = autodeploy.linear(z, w, bias)

Weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from autodeploy.graph.edit import get_attribute, near_miss, record
from autodeploy.graph.values import retype
from autodeploy.kernels.registry import load_linear
from autodeploy.ops import linear

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class LowerLinear:
    """Replace linear layers whose weights are parameters; matches the number of layers."""

    name: str = "lower_linear"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        load_linear()
        changed: list[fx.Node] = []
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=_LINEAR):
            if reason := check(gm, node):
                near_miss(gm, node, reason)
                continue
            changed.append(node)
            node.target = linear.OP
            provider, _ = linear.choose(get_attribute(gm, str(node.args[1].target)))
            if len(node.args) == 2 and provider is not None and provider.takes_siblings:
                by_input.setdefault(node.args[0], []).append(node)
        retype(gm.graph, changed)
        for nodes in by_input.values():
            for start in range(0, len(nodes), linear.MAX_SIBLINGS):
                _merge(nodes[start : start + linear.MAX_SIBLINGS])
        return len(changed)


def check(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """None where `node` can be replaced, else why not."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is not a parameter"
    provider, reason = linear.choose(get_attribute(gm, str(weight.target)))
    return None if provider else reason


def _merge(nodes: Sequence[fx.Node]) -> None:
    """Compute layers of one input where the first of them stands."""
    first = nodes[0]
    if len(nodes) == 1:
        return
    weights = [node.all_input_nodes[1] for node in nodes]
    for weight in weights:
        if first < weight:
            first.prepend(weight)
    outputs = record(first, _call, first.args[0], weights)
    for node, output in zip(nodes, outputs, strict=True):
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        node.graph.erase_node(node)


def _call(input: Any, weights: list[Any]) -> list[Any]:
    outputs = linear.SIBLINGS_OP(input, weights)
    return [outputs[index] for index in range(len(weights))]
