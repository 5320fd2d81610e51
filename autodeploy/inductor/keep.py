"""`autodeploy::keep`: a value that Inductor computes once and stores, however many read it.

Inductor writes a pointwise value into every kernel that reads it, and computes it there again: each layer its own
cosines and sines. Where a value was made to be computed once, it has to be told.
"""

from __future__ import annotations

import operator
from functools import cache

import torch
from torch import Tensor, fx

from autodeploy.graph.aliasing import aliased
from autodeploy.graph.edit import PREPARE

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define("keep(Tensor value) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_library, "keep", "CompositeExplicitAutograd")
def _keep(value: Tensor) -> Tensor:
    """A copy, where it runs as an op; in Inductor's code it is the value itself."""
    return value.clone()


@torch.library.register_fake("autodeploy::keep", lib=_library)
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


KEEP = torch.ops.autodeploy.keep.default


def keep_metadata(gm: fx.GraphModule) -> None:
    """Have what the outputs of `prepare_metadata` are views of kept in the code that Inductor makes of `gm`."""
    prepare = getattr(gm, PREPARE, None)
    if not isinstance(prepare, fx.GraphModule):
        return
    _register_lowering()
    outputs = prepare.graph.output_node().all_input_nodes
    for made in dict.fromkeys(map(_viewed, outputs)):
        if made.op == "placeholder" or _is_unpacked(made):
            continue
        with prepare.graph.inserting_after(made):
            kept = prepare.graph.call_function(KEEP, (made,))
        made.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
    prepare.recompile()


def _viewed(node: fx.Node) -> fx.Node:
    """The node that owns the memory that `node` is a view of, or may be."""
    while sources := aliased(node):
        node = sources[0]
    return node


def _is_unpacked(node: fx.Node) -> bool:
    """Whether the value may be a list: what an op that is no part of Inductor's code returns."""
    return any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)


@cache
def _register_lowering() -> None:
    from torch._inductor.lowering import register_lowering

    def realize(value):
        value.realize()
        return value

    register_lowering(KEEP, type_promotion_kind=None)(realize)
