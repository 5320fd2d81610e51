"""Puts the canonical form in place of an attention that was found."""

from __future__ import annotations

from torch import fx
from torch.fx.node import map_arg

from autodeploy.attention_forms.found import Attention
from autodeploy.graph import record
from autodeploy.ops.registry import kind_of

FORM = "autodeploy_form"  # meta of a canonical node: the words of the forms it was found in


def rewrite(found: Attention) -> None:
    """Replace the output of `found`; what only it used is left to dead code elimination."""
    old = found.output
    first = old.prev
    new = record(old, found.canonical, *found.inputs)
    node = first.next
    while node is not old:
        record_value(node)
        if kind_of(node.target) is not None:
            node.meta[FORM] = found.words
        node = node.next
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def record_value(node: fx.Node) -> None:
    """Note the fake value of a node from those of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    assert callable(node.target)
    node.meta["val"] = node.target(*args, **kwargs)
