"""Compute the two linear layers of a gated MLP and the gate between them as one op on a GPU.

Before:                                     After:
    gate = linear(x, w_gate)                    y = autodeploy.gated_linear(x, w_gate, w_up)
    up = linear(x, w_up)
    y = silu(gate) * up
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from autodeploy.graph import get_attribute, near_miss
from autodeploy.ops import linear

_LINEAR = torch.ops.aten.linear.default
_SILU = torch.ops.aten.silu.default
_MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class FuseGatedLinear:
    """Replace gated pairs of linear layers in half precision whose weights are on a GPU."""

    name: str = "fuse_gated_linear"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        matches = 0
        for node in gm.graph.find_nodes(op="call_function", target=_MUL):
            pair = match(node)
            if pair is None:
                continue
            if reason := check(gm, *pair):
                near_miss(gm, node, reason)
                continue
            rewrite(node, *pair)
            matches += 1
        return matches


def match(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The layers whose product, one of them through silu, is `node`."""
    silu, up = node.args
    if not (isinstance(silu, fx.Node) and silu.target is _SILU):
        silu, up = up, silu
    if not (isinstance(silu, fx.Node) and silu.target is _SILU):
        return None
    gate = silu.args[0]
    if not (isinstance(gate, fx.Node) and isinstance(up, fx.Node) and gate.target is up.target is _LINEAR):
        return None
    return (gate, up) if gate.args[0] is up.args[0] else None


def check(gm: fx.GraphModule, gate: fx.Node, up: fx.Node) -> str | None:
    """None where the layers can be replaced, else why not."""
    if len(gate.args) > 2 or len(up.args) > 2:
        return "a gated layer has a bias"
    if any(len(node.users) > 1 for node in (gate, *gate.users, up)):
        return "a gated layer has other readers"
    weights = [layer.all_input_nodes[1] for layer in (gate, up)]
    if any(weight.op != "get_attr" for weight in weights):
        return "the weight of a gated layer is not a parameter"
    values = [get_attribute(gm, str(weight.target)) for weight in weights]
    if not all(linear.takes_siblings(value) and value.is_contiguous() for value in values):
        return "the weight of a gated layer is not in half precision on a GPU, or not contiguous"
    return None


def rewrite(node: fx.Node, gate: fx.Node, up: fx.Node) -> None:
    """Turn `node` into the op; what it read is dead."""
    node.target = linear.GATED_OP
    node.args = (gate.args[0], gate.args[1], up.args[1])
