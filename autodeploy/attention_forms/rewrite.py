"""Puts the canonical form in place of an attention that was found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor, fx

from autodeploy.attention_forms.found import Attention
from autodeploy.graph.edit import between, record
from autodeploy.graph.meta import FORM, NEAR_MISS
from autodeploy.graph.values import record_values, replace_node
from autodeploy.ops.kinds import kind_of


def rewrite(found: Attention, old: fx.Node) -> list[fx.Node]:
    """Replace `old`, which is or equals the output of `found`; what only it used is left to dead code elimination.

    Returns the nodes whose values are to be made again.
    """
    before = old.prev
    inputs = with_constants(old, found.inputs, "alibi_slopes")
    new = record(old, found.canonical, *inputs)
    for node in between(before, old):
        if kind_of(node.target) is not None:
            FORM.set(node, found.words)
            if found.bias:  # no pass can pack what depends on places in the row, as such a bias mostly does
                NEAR_MISS.set(node, "adds a bias that is neither a mask that there are words for nor ALiBi")
    stale = replace_node(old, new)
    old.graph.erase_node(old)
    return stale


def with_constants(before: fx.Node, inputs: Sequence[Any], name: str) -> list[Any]:
    """`inputs` with a node in front of `before` for each tensor: a new buffer of the graph's module, called so."""
    return [_constant(before, value, name) if isinstance(value, Tensor) else value for value in inputs]


def _constant(before: fx.Node, value: Tensor, name: str) -> fx.Node:
    gm = before.graph.owning_module
    assert gm is not None
    names = (f"{name}_{index}" for index in count())
    name = next(name for name in names if not hasattr(gm, name))
    gm.register_buffer(name, value, persistent=False)
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    record_values([node])
    return node
