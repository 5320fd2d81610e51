"""Heads that were repeated: what they were repeated from, and how often.

Heads 0, 0, 1, 1 are repeats of two heads: query heads of one group lie next to each other. Heads 0, 1, 0, 1 are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.graph.along import arguments_of
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)
Found = tuple[fx.Node, int] | None


def peel_heads(node: fx.Node, dim: int) -> Found:
    """What `node` repeats each entry of along `dim`, and how often."""
    rule = _RULES.get(node.target)
    source = node.all_input_nodes[0] if rule else None
    if rule is None or source is None or not _is_like(node, source, dim):
        return None
    heads, fewer = VALUE.of(node).shape[dim], VALUE.of(source).shape[dim]
    if not isinstance(heads, int) or not isinstance(fewer, int):
        return None
    return (source, heads // fewer) if rule(node, dim, fewer) else None


def peel_group(node: fx.Node, dim: int) -> Found:
    """What has no dimension `dim`, and is repeated along it in `node`."""
    groups = VALUE.of(node).shape[dim]
    if not isinstance(groups, int):
        return None
    if node.target is aten.stack.default:
        tensors = node.args[0]
        is_along = (node.args[1] if len(node.args) > 1 else 0) in (dim, dim - VALUE.of(node).dim())
        assert isinstance(tensors, list | tuple)
        first = tensors[0]
        return (first, groups) if is_along and isinstance(first, fx.Node) and set(tensors) == {first} else None
    if node.target is not aten.unsqueeze.default:
        found = peel_heads(node, dim)
        if found is None or not statically_known_true(VALUE.of(found[0]).shape[dim] == 1):
            return None
        node = skip_copies(found[0])
    if node.target is not aten.unsqueeze.default or node.args[1] not in (dim, dim - VALUE.of(node).dim()):
        return None
    return node.all_input_nodes[0], groups


def skip_copies(node: fx.Node) -> fx.Node:
    while node.target in _COPIES:
        node = node.all_input_nodes[0]
    return node


def _is_like(node: fx.Node, source: fx.Node, dim: int) -> bool:
    """Whether both have the same sizes in all dimensions but `dim`."""
    after, before = (list(VALUE.of(each).shape) for each in (node, source))
    if len(after) != len(before):
        return False
    return statically_known_true(sym_eq(after[:dim] + after[dim + 1 :], before[:dim] + before[dim + 1 :]))


def _interleaves(node: fx.Node, dim: int, fewer: int) -> bool:
    arguments = arguments_of(node)
    return isinstance(arguments["repeats"], int) and arguments["dim"] in (dim, dim - VALUE.of(node).dim())


def _expands(node: fx.Node, dim: int, fewer: int) -> bool:
    return fewer == 1


_RULES: dict[Any, Callable[[fx.Node, int, int], bool]] = {
    aten.repeat_interleave.self_int: _interleaves,
    aten.expand.default: _expands,
    aten.expand_as.default: _expands,
    aten.repeat.default: _expands,
}
