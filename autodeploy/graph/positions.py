"""Nodes that count the places of a row, 0, 1, 2, ..., or read a table at them, and what they are of positions instead.

In a padded batch place i of a row is position i of its sequence. In a packed one it is not, so that what was counted
has to be made from the positions of the tokens.

Before:                                             After:
    arange(2, S + 2)                                    positions + 2
    slice(table, 0, 0, S)                               index_select(table, 0, positions)
    cumsum(ones(B, S), 1)                               (positions + 1)[None]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.graph.along import arguments_of, name_of
from autodeploy.graph.meta import VALUE

aten = torch.ops.aten
_SAME_ENTRIES = {"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "expand", "view", "reshape"}
_ONES = {"ones", "ones_like", "new_ones"}


def counts_positions(node: fx.Node, lengths: Collection[Any], written: Collection[fx.Node]) -> bool:
    """Whether `node` is one of the three above.

    `lengths` are the symbols that the length of a row may have, `written` the nodes that may be written to in place.
    """
    value = VALUE.get(node)
    if not isinstance(value, Tensor) or node.op != "call_function":
        return False
    dims = [dim for dim, size in enumerate(value.shape) if _expr(size) in lengths]
    rule = _RULES.get(name_of(node))
    return len(dims) == 1 and rule is not None and rule(node, dims[0], written)


def of_positions(node: fx.Node, positions: Any, table: Any) -> Any:
    """What `node` is, made of `positions` [T] int32 instead, and of the `table` that a slice cuts; on proxies."""
    arguments, value = arguments_of(node), VALUE.of(node)
    start = 1 if name_of(node) == "cumsum" else arguments.get("start") or 0
    if start:
        positions = aten.add.Scalar(positions, start)
    if name_of(node) == "slice":
        return aten.index_select.default(table, arguments["dim"] % value.dim(), positions)
    positions = aten.to.dtype(positions, value.dtype)
    return positions if value.dim() == 1 else aten.unsqueeze.default(positions, 0)


def _is_counting(node: fx.Node, dim: int, written: Collection[fx.Node]) -> bool:
    arguments = arguments_of(node)
    # Positions are int32: a cast to that is no copy, and nobody may write to them.
    is_copy = node not in written or VALUE.of(node).dtype is not torch.int32
    return is_copy and isinstance(arguments.get("start", 0), int) and arguments.get("step", 1) == 1


def _is_cut(node: fx.Node, dim: int, written: Collection[fx.Node]) -> bool:
    """Whether `node` is the first entries of a table, or those behind its first few."""
    arguments, table = arguments_of(node), VALUE.get(node.all_input_nodes[0])
    start = arguments["start"] or 0
    if not isinstance(table, Tensor) or not isinstance(start, int) or start < 0 or node in written:
        return False
    is_fixed = all(isinstance(size, int) for size in table.shape)
    return is_fixed and arguments["step"] == 1 and arguments["dim"] % table.dim() == dim


def _is_running_sum(node: fx.Node, dim: int, written: Collection[fx.Node]) -> bool:
    """Whether `node` sums up ones along each row of a batch."""
    value = VALUE.of(node)
    is_row = value.dim() == 1 or (value.dim() == 2 and (value.shape[0] == 1 or not isinstance(value.shape[0], int)))
    along = arguments_of(node)["dim"] % value.dim() == dim == value.dim() - 1
    ones = node.all_input_nodes[0]
    while ones not in written and name_of(ones) in _SAME_ENTRIES:
        ones = ones.all_input_nodes[0]
    is_one = name_of(ones) in _ONES or arguments_of(ones).get("fill_value") == 1
    return is_row and along and is_one and not {ones, node} & set(written)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


_RULES: dict[str, Callable[[fx.Node, int, Collection[fx.Node]], bool]] = {
    "arange": _is_counting,
    "slice": _is_cut,
    "cumsum": _is_running_sum,
}
