"""What sharing metadata does to peak memory, estimated from recorded shapes, and what is better left where it is.

The estimate adds up the intermediate tensors that are alive between their first and last use, views with their base,
at the sizes that a symbolic shape was traced with. It knows neither the allocator nor what a later compiler fuses, so
it is an upper bound on both sides of the comparison. Nodes without recorded shapes weigh nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from autodeploy.aliasing import aliased
from autodeploy.equality import repeated
from autodeploy.spelling import recorded_value

# Sharing may raise the estimated peak by this share of it, or by this many bytes where that is more.
PEAK_SHARE, PEAK_BYTES = 0.1, 1 << 20
TOO_LARGE = f"would raise peak memory by more than {PEAK_SHARE:.0%} if it were kept from the start"


def too_large_to_share(graph: fx.Graph, known: Collection[fx.Node], metadata: Sequence[fx.Node]) -> list[fx.Node]:
    """The fewest largest of `metadata` that must stay where they are for the peak to keep within its bound."""
    if sum(map(num_bytes, metadata)) <= PEAK_BYTES:
        return []
    nodes = list(graph.nodes)
    sizes = {node: num_bytes(node) for node in nodes}
    before = _peak_bytes(nodes, sizes, {})
    bound = before + max(PEAK_BYTES, int(PEAK_SHARE * before))
    limits = sorted({sizes[node] for node in metadata}, reverse=True)
    low, high = 0, len(limits)  # the largest limit that keeps the bound is at or after `low`
    while low < high:
        middle = (low + high) // 2
        if _peak_when_shared(nodes, sizes, known, limits[middle]) <= bound:
            high = middle
        else:
            low = middle + 1
    limit = limits[low] if low < len(limits) else 0
    return [node for node in metadata if sizes[node] > limit]


def num_bytes(node: fx.Node) -> int:
    """Bytes of the tensors that `node` makes; 0 for a view and where no shape is recorded."""
    value = recorded_value(node)
    if value is None or node.op in ("placeholder", "get_attr", "output") or aliased(node):
        return 0
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(math.prod(map(_hint, tensor.shape)) * tensor.element_size() for tensor in tensors)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else 0


def _peak_when_shared(
    nodes: Sequence[fx.Node], sizes: Mapping[fx.Node, int], known: Collection[fx.Node], limit: int
) -> int:
    """The peak once all of `known` that is not larger than `limit`, nor needs what is, is shared at the front."""
    front: dict[fx.Node, None] = {}
    for node in nodes:
        fits = sizes[node] <= limit and node in known
        if fits and all(arg in front or arg.op == "placeholder" for arg in node.all_input_nodes):
            front[node] = None
    return _peak_bytes([*front, *(node for node in nodes if node not in front)], sizes, repeated(front))


def _peak_bytes(order: Sequence[fx.Node], sizes: Mapping[fx.Node, int], same_as: Mapping[fx.Node, fx.Node]) -> int:
    """Most bytes of intermediates alive at once when nodes run in `order`.

    A node that is a key of `same_as` does not run; its readers read what it is mapped to.
    """
    last_use: dict[fx.Node, int] = {}
    bases: dict[fx.Node, list[fx.Node]] = {}
    for place, node in enumerate(order):
        if node in same_as:
            continue
        views = [same_as.get(arg, arg) for arg in aliased(node)]
        bases[node] = [base for arg in views for base in bases[arg]] or [node]
        for arg in node.all_input_nodes:
            last_use.update(dict.fromkeys(bases[same_as.get(arg, arg)], place))
    freed = [0] * len(order)
    alive = highest = 0
    for place, node in enumerate(order):
        if node in last_use:
            alive += sizes[node]
            freed[last_use[node]] += sizes[node]
        highest = max(highest, alive)
        alive -= freed[place]
    return highest
