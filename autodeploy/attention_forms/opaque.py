"""Ops that may be an attention as a whole, and that nothing is known of."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autodeploy.graph.along import worked_dims
from autodeploy.graph.meta import VALUE
from autodeploy.ops.kinds import kind_of

_OURS = "autodeploy"
_FEWEST = 3  # queries, keys and values


def may_be_attention(node: fx.Node) -> bool:
    """Whether `node` is an op that is not known and takes three tensors or more of three dimensions or more."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == _OURS or kind_of(target) is not None:
        return False
    values = [VALUE.get(arg) for arg in node.all_input_nodes]
    given = [value for value in values if isinstance(value, Tensor) and value.dim() > 2 and value.is_floating_point()]
    return len(given) >= _FEWEST and worked_dims(node, given[0], given[0]) is None
