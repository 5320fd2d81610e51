"""Orders of dimensions: of what a node permutes, and to what a tensor is to be permuted."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autodeploy.graph.meta import VALUE

aten = torch.ops.aten


def order_of(node: fx.Node) -> list[int] | None:
    """The input dimension that each dimension of `node` is; None where it is no permutation."""
    if node.target not in (aten.transpose.int, aten.permute.default, aten.mT.default, aten.t.default):
        return None
    ndim = VALUE.of(node).dim()
    if node.target is aten.permute.default:
        dims = node.args[1]
        return [dim % ndim for dim in dims if isinstance(dim, int)] if isinstance(dims, list | tuple) else None
    first, second = (dim for dim in (*node.args[1:3], -1, -2)[:2] if isinstance(dim, int))
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def permuted(tensor: Any, dims: str, wanted: str) -> Any:
    """A tensor or a proxy with dimensions `dims` in the order `wanted`."""
    order = [dims.index(name) for name in wanted]
    moved = [dim for dim, source in enumerate(order) if dim != source]
    if not moved:
        return tensor
    return aten.transpose.int(tensor, *moved) if len(moved) == 2 else aten.permute.default(tensor, order)
