"""Write each field inside prepare_metadata out as its formula, and merge what the formulas have in common.

Before:                                       After:
    slots = slot_mapping(layout, T, 0, 1, 16)     lens = layout[:, 0]
    starts = cu_seqlens_q(layout)                 starts = pad(cumsum(lens), (1, 0))          # once, for both
                                                  slots = where(...)

What is left is plain torch, which Inductor fuses into a handful of kernels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import fx

from autodeploy.effects import is_pure
from autodeploy.equality import merge_equal
from autodeploy.graph import PREPARE, record
from autodeploy.metadata import fields


@dataclass(frozen=True)
class LowerFields:
    """Expand the fields of prepare_metadata; matches the number of fields."""

    name: str = "lower_fields"

    def apply(self, gm: fx.GraphModule) -> int:
        prepare = getattr(gm, PREPARE, None)
        if not isinstance(prepare, fx.GraphModule):
            return 0
        lowered = 0
        while waiting := [node for node in prepare.graph.nodes if fields.is_field(node.target)]:
            lowered += len(waiting)
            for node in waiting:
                _expand(node)
        if lowered:
            merge_equal(prepare.graph, [node for node in prepare.graph.nodes if is_pure(node)])
            prepare.graph.eliminate_dead_code()
            prepare.recompile()
        return lowered


def _expand(node: fx.Node) -> None:
    formula = fields.of_op(node.target).formula
    names = list(inspect.signature(formula).parameters)
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    value = record(node, formula, *(arguments[name] for name in names))
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
