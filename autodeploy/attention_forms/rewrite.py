"""Puts the canonical form in place of an attention that was found."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from autodeploy.attention_forms.found import Attention
from autodeploy.graph import get_attribute, record
from autodeploy.ops.registry import kind_of

FORM = "autodeploy_form"  # meta of a canonical node: the words of the forms it was found in


def rewrite(found: Attention, old: fx.Node) -> None:
    """Replace `old`, which is or equals the output of `found`; what only it used is left to dead code elimination."""
    before = old.prev
    inputs = [_constant(old, value) if isinstance(value, Tensor) else value for value in found.inputs]
    new = record(old, found.canonical, *inputs)
    for node in record_values(before, old):
        if kind_of(node.target) is not None:
            node.meta[FORM] = found.words
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _constant(before: fx.Node, value: Tensor) -> fx.Node:
    """A node for a new buffer of the graph's module."""
    gm = before.graph.owning_module
    assert gm is not None
    names = (f"alibi_slopes_{index}" for index in count())
    name = next(name for name in names if not hasattr(gm, name))
    gm.register_buffer(name, value, persistent=False)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)


def record_values(before: fx.Node, after: fx.Node) -> list[fx.Node]:
    """Note the fake values of the nodes between two; returns these nodes."""
    gm, nodes = after.graph.owning_module, []
    assert gm is not None
    while before.next is not after:
        before = before.next
        nodes.append(before)
    recorded = (node.meta.get("val") for node in after.graph.nodes)
    mode = next((value.fake_mode for value in recorded if isinstance(value, FakeTensor)), nullcontext())
    with mode:
        for node in nodes:
            if node.op == "get_attr":
                constant = get_attribute(gm, str(node.target))
                node.meta["val"] = torch.empty(constant.shape, dtype=constant.dtype, device=constant.device)
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
                assert callable(node.target)
                node.meta["val"] = node.target(*args, **kwargs)
    return nodes
