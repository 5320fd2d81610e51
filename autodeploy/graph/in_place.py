"""Pointwise ops that write over their argument become those that make a new tensor, where nobody could tell.

Before:                                             After:
    scores = matmul(q, k)                               scores = matmul(q, k)
    scaled = div_(scores, 8.0)                          scaled = div(scores, 8.0)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.graph.aliasing import sharing
from autodeploy.graph.meta import VALUE
from autodeploy.graph.values import mode_of

aten = torch.ops.aten


def out_of_place(gm: fx.GraphModule) -> int:
    """Rewrite `gm` where values are recorded; returns how many ops were changed."""
    mode = mode_of(gm.graph)
    num_changed = 0
    for node in gm.graph.nodes:
        op = _counterpart(node)
        is_recorded = all(map(VALUE.on, (node, *node.all_input_nodes)))
        if mode is None or op is None or not is_recorded or not _is_the_last_to_read(node):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), VALUE.of)
        with mode:
            made = op(*args, **kwargs)
        if _are_alike(made, VALUE.of(node)):
            node.target = op
            num_changed += 1
    return num_changed


def _counterpart(node: fx.Node) -> OpOverload | None:
    """The op that makes a new tensor of what `node`, which is pointwise, writes over its first argument."""
    target = node.target
    if not isinstance(target, OpOverload) or not target._schema.is_mutable or not target._opname.endswith("_"):
        return None
    found = getattr(getattr(aten, target._opname[:-1], None), target._overloadname, None)
    return found if found is not None and torch.Tag.pointwise in found.tags else None


def _is_the_last_to_read(node: fx.Node) -> bool:
    """Whether what `node` writes to was made in the graph, and is read through `node` alone from there on."""
    earlier = {other for other in sharing(node.all_input_nodes[:1]) if other < node}
    later = (user for other in earlier for user in other.users if user > node)
    return all(other.op == "call_function" for other in earlier) and next(later, None) is None


def _are_alike(made: Tensor, recorded: Tensor) -> bool:
    if (made.dtype, made.device) != (recorded.dtype, recorded.device):
        return False
    return statically_known_true(sym_eq((*made.shape, *made.stride()), (*recorded.shape, *recorded.stride())))
