"""Use the product that suits a decode step's few rows in linear layers on a CPU.

Before:                                     After:
    y = linear(x, weight, bias)                 y = autodeploy.linear(x, weight, bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from autodeploy.graph import get_attribute, near_miss
from autodeploy.ops import linear

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class LowerLinear:
    """Replace float32 linear layers whose weights lie on the CPU."""

    name: str = "lower_linear"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        matches = 0
        for node in gm.graph.find_nodes(op="call_function", target=_LINEAR):
            if reason := check(gm, node):
                near_miss(gm, node, reason)
                continue
            node.target = linear.OP
            matches += 1
        return matches


def check(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """None where `node` can be replaced, else why not."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is not a parameter"
    value = get_attribute(gm, str(weight.target))
    if value.device.type != "cpu":
        return f"its weight is on {value.device.type}, where libraries handle few rows well"
    if value.dtype is not torch.float32:
        return f"its weight is {value.dtype}, not torch.float32"
    return None
