"""What hoisting metadata does to peak memory, estimated from recorded shapes, and what is better left where it is.

The estimate adds up the intermediate tensors that are alive between their first and last use, views with their base,
at the sizes that a symbolic shape was traced with. It knows neither the allocator nor what a later compiler fuses, so
it is an upper bound on both sides of the comparison. Metadata without recorded shapes is taken to be as large as the
largest constant that it is computed from; other nodes without shapes weigh nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from autodeploy.graph.aliasing import aliased
from autodeploy.graph.sizes import num_bytes
from autodeploy.graph.spelling import attribute, recorded_value

# Hoisting may raise the estimated peak by this share of it, or by this many bytes where that is more.
PEAK_SHARE, PEAK_BYTES = 0.1, 1 << 20
TOO_LARGE = f"would raise peak memory by more than {PEAK_SHARE:.0%} if it were computed at the start"


def too_large_to_hoist(graph: fx.Graph, metadata: Sequence[fx.Node]) -> list[fx.Node]:
    """The fewest largest of `metadata`, in graph order, that must stay for the peak to keep within its bound."""
    guesses = _guesses(graph, [node for node in metadata if recorded_value(node) is None])
    if sum(guesses.get(node) or _num_bytes(node) for node in metadata) <= PEAK_BYTES:
        return []
    tensors = _Tensors.of(graph, guesses)
    before = tensors.peak(tensors.nodes)
    bound = before + max(PEAK_BYTES, PEAK_SHARE * before)
    limits = [math.inf, *sorted({tensors.sizes[node] for node in metadata}, reverse=True)]
    low, high = 0, len(limits) - 1  # the largest limit that keeps the bound is at or after `low`
    while low < high:
        middle = (low + high) // 2 if low else 0  # everything first: it mostly fits
        if tensors.peak(_hoisted(tensors, metadata, limits[middle])) <= bound:
            high = middle
        else:
            low = middle + 1
    return [node for node in metadata if tensors.sizes[node] > limits[low]]


@dataclass(frozen=True)
class _Tensors:
    """The nodes of a graph in order, the bytes that each allocates, and what its value lies in: itself or others."""

    nodes: list[fx.Node]
    sizes: dict[fx.Node, int]
    bases: dict[fx.Node, list[fx.Node]]

    @staticmethod
    def of(graph: fx.Graph, guesses: Mapping[fx.Node, int]) -> _Tensors:
        nodes = list(graph.nodes)
        bases: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            bases[node] = list(dict.fromkeys(base for arg in aliased(node) for base in bases[arg])) or [node]
        return _Tensors(nodes, {node: guesses.get(node) or _num_bytes(node) for node in nodes}, bases)

    def peak(self, order: Sequence[fx.Node]) -> int:
        """Most bytes of intermediates alive at once when nodes run in `order`."""
        last_use: dict[fx.Node, int] = {}
        for place, node in enumerate(order):
            for arg in node.all_input_nodes:
                last_use.update(dict.fromkeys(self.bases[arg], place))
        freed = [0] * len(order)
        alive = highest = 0
        for place, node in enumerate(order):
            if node in last_use:
                alive += self.sizes[node]
                freed[last_use[node]] += self.sizes[node]
            highest = max(highest, alive)
            alive -= freed[place]
        return highest


def _guesses(graph: fx.Graph, unknown: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Bytes of nodes without recorded shapes: as many elements, of 4 bytes, as the largest constant that they read."""
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes if unknown else ():
        value = attribute(node) if node.op == "get_attr" else None
        own = value.numel() if isinstance(value, torch.Tensor) else 0
        sizes[node] = max([own, *(sizes[arg] for arg in node.all_input_nodes)])
    return {node: 4 * sizes[node] for node in unknown if not aliased(node)}


def _hoisted(tensors: _Tensors, metadata: Sequence[fx.Node], limit: float) -> list[fx.Node]:
    """The nodes with all of `metadata` in front that is not larger than `limit`, nor computed from what is."""
    stays: set[fx.Node] = set()
    for node in metadata:
        if tensors.sizes[node] > limit or any(arg in stays for arg in node.all_input_nodes):
            stays.add(node)
    front = {node: None for node in metadata if node not in stays}
    return [*front, *(node for node in tensors.nodes if node not in front)]


def written(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that `node` makes; none for a view and where no shape is recorded."""
    value = recorded_value(node)
    if value is None or node.op in ("placeholder", "get_attr", "output") or aliased(node):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _num_bytes(node: fx.Node) -> int:
    return sum(map(num_bytes, written(node)))
