"""Queries, keys and values as [B, H, S, D], from whatever a matrix product was given.

Peeling takes away what the canonical op does itself: factors, a transposition, heads merged with the batch, and
repeats of key-value heads. What cannot be peeled stays in the graph, and is right all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.scores import keeps_rows
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Operand:
    """A factor of a matrix product. It is `scale` times `node`, transposed in its last two dimensions or not.

    `repeats` is how often each head of `node` is repeated to give the heads of the product.
    """

    node: fx.Node
    scale: float = 1.0
    is_transposed: bool = False
    repeats: int = 1

    @property
    def shape(self) -> torch.Size:
        return VALUE.of(self.node).shape


def peel(operand: Operand, number: Callable[[Any], float | None], *, repeats: bool = True) -> Operand:
    """`operand` without everything that the canonical op does itself; `number` tells constants from tensors."""
    while True:
        inner = _peel_factor(operand, number) or _peel_view(operand)
        if inner is None and repeats:
            inner = _peel_repeat(operand)
        if inner is None:
            return operand
        operand = inner


def to_heads(tensor: Any, ndim: int, is_transposed: bool, num_heads: int) -> Any:
    """[B * H, S, D], [B, K, G, S, D] or [B, H, S, D], a tensor or a proxy, as [B, H, S, D]; or [.., D, S] as that."""
    if is_transposed:
        tensor = aten.transpose.int(tensor, -1, -2)
    if ndim == 3:
        return aten.unflatten.int(tensor, 0, [-1, num_heads])
    return aten.flatten.using_ints(tensor, 1, 2) if ndim == 5 else tensor


def from_heads(tensor: Any, ndim: int, groups: tuple[int, int]) -> Any:
    """[B, H, S, E] in the dimensions of the product it stands for; `groups` is K, G of [B, K, G, S, E]."""
    if ndim == 3:
        return aten.flatten.using_ints(tensor, 0, 1)
    return aten.unflatten.int(tensor, 1, list(groups)) if ndim == 5 else tensor


def num_heads(operand: Operand, known: int | None = None) -> int:
    """How many heads `operand` has, where `known` is what another operand told. Raises Refused where nothing tells."""
    shape = operand.shape
    if len(shape) == 4:
        heads = shape[1]
    elif len(shape) == 5:
        heads = shape[1] * shape[2]
    else:
        # Heads that were merged with the batch show as a multiple of its symbol.
        heads = known if known is not None else _heads_of_batch(shape[0])
    if not isinstance(heads, int):
        raise Refused("has heads that cannot be told from its batch")
    return heads


def _heads_of_batch(size: Any) -> int | None:
    expr = size.node.expr if isinstance(size, torch.SymInt) else None
    return 1 if expr is not None and expr.is_Symbol else None


def _peel_factor(operand: Operand, number: Callable[[Any], float | None]) -> Operand | None:
    node = operand.node
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        first, second = node.args
        factor, inner = (number(second), first) if number(second) is not None else (number(first), second)
    elif node.target in (aten.div.Tensor, aten.div.Scalar):
        divisor, inner = number(node.args[1]), node.args[0]
        factor = 1 / divisor if divisor else None
    else:
        return None
    if factor is None or factor <= 0 or not isinstance(inner, fx.Node):
        return None
    if VALUE.of(inner).dtype != VALUE.of(node).dtype:
        return None
    return replace(operand, node=inner, scale=operand.scale * factor)


def _peel_view(operand: Operand) -> Operand | None:
    node = operand.node
    if node.target in _COPIES:
        return replace(operand, node=node.all_input_nodes[0])
    if _swaps_last_two(node):
        return replace(operand, node=node.all_input_nodes[0], is_transposed=not operand.is_transposed)
    if not keeps_rows(node) or len(operand.shape) != 3:
        return None
    before = node.all_input_nodes[0]
    return replace(operand, node=before) if VALUE.of(before).dim() == 4 else None


def _swaps_last_two(node: fx.Node) -> bool:
    ndim = VALUE.of(node).dim()
    if node.target is aten.transpose.int:
        return {dim % ndim for dim in node.args[1:3] if isinstance(dim, int)} == {ndim - 2, ndim - 1}
    if node.target is not aten.permute.default or not isinstance(node.args[1], list):
        return node.target is aten.mT.default
    order = [dim % ndim for dim in node.args[1] if isinstance(dim, int)]
    return order == [*range(ndim - 2), ndim - 1, ndim - 2]


def _peel_repeat(operand: Operand) -> Operand | None:
    """Heads repeated one after another: repeat_interleave, or unsqueeze, expand, reshape."""
    node = operand.node
    if len(operand.shape) == 5:
        return _peel_group(operand)
    if len(operand.shape) != 4:
        return None
    if node.target is aten.repeat_interleave.self_int and len(node.args) == 3 and node.args[2] in (1, -3):
        return _repeated(operand, node.all_input_nodes[0])
    if node.target is aten.expand.default and VALUE.of(node.all_input_nodes[0]).dim() == 4:
        source = node.all_input_nodes[0]
        rest = [dim for dim in range(4) if dim != 1]
        same = all(statically_known_true(VALUE.of(source).shape[dim] == operand.shape[dim]) for dim in rest)
        return _repeated(operand, source) if same and VALUE.of(source).shape[1] == 1 else None
    if node.target not in _RESHAPES or not keeps_rows(node):
        return None
    grouped = _skip_copies(node.all_input_nodes[0])
    inner = _peel_group(replace(operand, node=grouped)) if VALUE.of(grouped).dim() == 5 else None
    # Both leading dimensions of the repeats have to be merged, and nothing else.
    return inner if inner and statically_known_true(operand.shape[1] == inner.repeats * inner.shape[1]) else None


def _peel_group(operand: Operand) -> Operand | None:
    """[B, K, G, S, D] that is [B, K, S, D] with a group dimension."""
    node = _skip_copies(operand.node)
    groups = operand.shape[2]
    if node.target is aten.expand.default:
        before = node.all_input_nodes[0]
        if VALUE.of(before).dim() != 5 or not statically_known_true(VALUE.of(before).shape[2] == 1):
            return None
        same = sym_eq([*VALUE.of(before).shape[:2]], [*VALUE.of(node).shape[:2]])
        if not statically_known_true(same):
            return None
        node = before
    if node.target is not aten.unsqueeze.default or node.args[1] not in (2, -3) or not isinstance(groups, int):
        return None
    return replace(operand, node=node.all_input_nodes[0], repeats=operand.repeats * groups)


def _repeated(operand: Operand, source: fx.Node) -> Operand | None:
    heads, fewer = operand.shape[1], VALUE.of(source).shape[1]
    if not isinstance(heads, int) or not isinstance(fewer, int):
        return None
    return replace(operand, node=source, repeats=operand.repeats * (heads // fewer))


def _skip_copies(node: fx.Node) -> fx.Node:
    while node.target in _COPIES:
        node = node.all_input_nodes[0]
    return node
