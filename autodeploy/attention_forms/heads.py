"""Queries, keys and values as [B, H, S, D], from whatever a product was given.

Peeling takes away what the canonical op does itself: factors, another order of dimensions, heads merged with the batch,
and repeats of key-value heads, made before or after the heads are transposed. What cannot be peeled stays in the graph,
and is right all the same.

A letter names a dimension: `b` the row of the batch, `h` the head, `g` the head of a group of `h`, `n` rows and heads
merged, `s` the place in the sequence, `d` the feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.permuted import order_of, permuted
from autodeploy.attention_forms.repeats import peel_group, peel_heads, skip_copies
from autodeploy.attention_forms.scores import keeps_rows
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_ORDERS = {"nsd", "bhsd", "bhgsd"}  # those of a matrix product


@dataclass(frozen=True)
class Operand:
    """A factor of a product. It is `scale` times `node`, whose dimensions are `dims`.

    `repeats` is how often each head of `node` is repeated to give the heads of the product.
    """

    node: fx.Node
    dims: str
    scale: float = 1.0
    repeats: int = 1

    @property
    def shape(self) -> torch.Size:
        return VALUE.of(self.node).shape

    @property
    def length(self) -> Any:
        return self.shape[self.dims.index("s")]

    @property
    def num_heads(self) -> Any:
        """How many heads it has; None where they are merged with the batch."""
        heads = (size for size, name in zip(self.shape, self.dims, strict=True) if name in "hg")
        return None if "n" in self.dims else math.prod(heads)


def peel(operand: Operand, number: Callable[[Any], float | None], *, repeats: bool = True) -> Operand:
    """`operand` without everything that the canonical op does itself; `number` tells constants from tensors."""
    best = operand
    while True:
        inner = _peel_factor(operand, number) or _peel_merge(operand)
        if inner is None and repeats:
            inner = _peel_repeat(operand)
        if inner is not None:
            best = operand = inner
            continue
        inner = _peel_order(operand)
        if inner is None:
            return best
        operand = inner
        # Another order is worth nothing by itself: only what lies beneath it is.
        if operand.dims in _ORDERS:
            best = operand


def to_heads(tensor: Any, dims: str, num_heads: int) -> Any:
    """A tensor or a proxy whose dimensions are `dims` as [B, H, S, D]."""
    if "n" in dims:
        tensor = permuted(tensor, dims, "nsd")
        return aten.unflatten.int(tensor, 0, [-1, num_heads])
    wanted = "".join(name for name in "bhgsd" if name in dims)
    tensor = permuted(tensor, dims, wanted)
    if "h" not in dims:
        return aten.unsqueeze.default(tensor, 1)
    return aten.flatten.using_ints(tensor, 1, 2) if "g" in dims else tensor


def from_heads(tensor: Any, dims: str, shape: torch.Size) -> Any:
    """[B, S, H, E] with dimensions `dims`, of a `shape` recorded elsewhere."""
    made = "bshd"
    if "g" in dims:
        groups = [shape[dims.index(name)] for name in "hg"]
        tensor, made = aten.unflatten.int(tensor, 2, groups), "bshgd"
    tensor = permuted(tensor, made, dims.replace("n", "bh"))
    return aten.flatten.using_ints(tensor, 0, 1) if "n" in dims else tensor


def num_heads(operand: Operand, known: int | None = None) -> int:
    """How many heads `operand` has, where `known` is what another operand told. Raises Refused where nothing tells."""
    heads = operand.num_heads
    if heads is None:
        # Heads that were merged with the batch show as a multiple of its symbol.
        heads = known if known is not None else _heads_of_batch(operand.shape[0])
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
    if VALUE.of(inner).dtype != VALUE.of(node).dtype or VALUE.of(inner).dim() != VALUE.of(node).dim():
        return None
    return replace(operand, node=inner, scale=operand.scale * factor)


def _peel_merge(operand: Operand) -> Operand | None:
    """Rows and heads that a view merged."""
    node = operand.node
    if operand.dims[0] != "n" or not keeps_rows(node):
        return None
    before = node.all_input_nodes[0]
    leading = {4: "bh", 5: "bhg"}.get(VALUE.of(before).dim())
    return replace(operand, node=before, dims=leading + operand.dims[1:]) if leading else None


def _peel_order(operand: Operand) -> Operand | None:
    """Copies, and dimensions in another order."""
    node = skip_copies(operand.node)
    order = order_of(node)
    if order is None:
        return None if node is operand.node else replace(operand, node=node)
    before = dict(zip(order, operand.dims, strict=True))
    dims = "".join(before[dim] for dim in range(len(order)))
    return replace(operand, node=node.all_input_nodes[0], dims=dims)


def _peel_repeat(operand: Operand) -> Operand | None:
    """Heads repeated one after another."""
    if "n" in operand.dims or "h" not in operand.dims:
        return None
    node, dim = skip_copies(operand.node), operand.dims.index("h")
    if "g" in operand.dims:
        return _with_repeats(operand, peel_group(node, operand.dims.index("g")), operand.dims.replace("g", ""))
    return _with_repeats(operand, peel_heads(node, dim) or _peel_joined(node, dim), operand.dims)


def _peel_joined(node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """A group dimension that was merged into the heads [.., K, G, ..] and nothing else."""
    if node.target not in _RESHAPES:
        return None
    grouped = skip_copies(node.all_input_nodes[0])
    after, before = VALUE.of(node).shape, VALUE.of(grouped).shape
    if len(before) != len(after) + 1:
        return None
    merged = [*before[:dim], before[dim] * before[dim + 1], *before[dim + 2 :]]
    return peel_group(grouped, dim + 1) if statically_known_true(sym_eq([*after], merged)) else None


def _with_repeats(operand: Operand, found: tuple[fx.Node, int] | None, dims: str) -> Operand | None:
    return found and replace(operand, node=found[0], dims=dims, repeats=operand.repeats * found[1])
