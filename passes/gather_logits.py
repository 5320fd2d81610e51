"""Compute logits only for the rows somebody wants: the last `num_logits` tokens of each sequence.

Before:                                     After:
    logits = linear(hidden, lm_head)            rows = index_select(hidden, 1, logits_indices(layout))
    return logits          # [1, T, V]          return linear(rows, lm_head).squeeze(0)          # [R, V]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from autodeploy.graph.edit import near_miss, placeholder, record
from autodeploy.graph.values import replace_node, retype
from autodeploy.metadata import fields

_aten = torch.ops.aten
# Ops that treat each row of their first argument [1, T, ...] alone, whatever their other (non-tensor) arguments.
_UNARY_ROWWISE = (
    _aten.to.dtype,
    _aten.tanh.default,
    _aten.neg.default,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.add.Tensor,
)
_SELECT = _aten.index_select.default


@dataclass(frozen=True)
class GatherLogits:
    """Select the wanted rows as early as every op between there and the output treats rows alone."""

    name: str = "gather_logits"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        layout = placeholder(gm, "layout")
        output = next(iter(gm.graph.find_nodes(op="output")))
        logits = output.args[0]
        if layout is None or not isinstance(logits, fx.Node):
            near_miss(gm, output, "the graph has no packed inputs; nest_inputs comes first")
            return 0
        place = logits
        while _treats_rows_alone(place):
            place = place.all_input_nodes[0]
        if place.target is _SELECT or logits.target is _aten.squeeze.dim:
            return 0
        user = place.next
        rows = record(user, _select, place, layout)
        retype(gm.graph, replace_node(place, rows))
        output.args = (record(output, _aten.squeeze.dim, output.args[0], 0),)
        return 1


def _select(hidden: Tensor, layout: Tensor) -> Tensor:
    return _SELECT(hidden, 1, fields.logits_indices(layout))


def _treats_rows_alone(node: fx.Node) -> bool:
    """Whether row t of `node` depends on row t of its only row-carrying input, and nobody else reads that input."""
    if node.target is _aten.linear.default or (node.target in _UNARY_ROWWISE and len(node.all_input_nodes) == 1):
        source = node.args[0]
    else:
        return False
    return isinstance(source, fx.Node) and len(source.users) == 1
