"""Puts the canonical form in place of an attention that was found."""

from __future__ import annotations

from contextlib import nullcontext

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from autodeploy.attention_forms.found import Attention
from autodeploy.graph import record
from autodeploy.ops.registry import kind_of

FORM = "autodeploy_form"  # meta of a canonical node: the words of the forms it was found in


def rewrite(found: Attention, old: fx.Node) -> None:
    """Replace `old`, which is or equals the output of `found`; what only it used is left to dead code elimination."""
    before = old.prev
    new = record(old, found.canonical, *found.inputs)
    for node in record_values(before, old):
        if kind_of(node.target) is not None:
            node.meta[FORM] = found.words
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def record_values(before: fx.Node, after: fx.Node) -> list[fx.Node]:
    """Note the fake values of the nodes between two; returns these nodes."""
    nodes = []
    while before.next is not after:
        before = before.next
        nodes.append(before)
    recorded = (node.meta.get("val") for node in after.graph.nodes)
    mode = next((value.fake_mode for value in recorded if isinstance(value, FakeTensor)), nullcontext())
    with mode:
        for node in nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
                assert callable(node.target)
                node.meta["val"] = node.target(*args, **kwargs)
    return nodes
