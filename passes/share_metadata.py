"""Move everything layout-only into one prepare_metadata node after the inputs, and merge what is equal in it.

Before (per layer):                         After:
    slots = slot_mapping(layout, T, 0)          prepare = prepare_metadata(layout, T)
    y = attention_0(q, ..., slots)              slots, mask = prepare[0], prepare[1]
    mask = dense_mask(layout, T, 0)             y = attention_0(q, ..., slots)
    slots_1 = slot_mapping(layout, T, 0)        z = attention_1(q_1, ..., slots, mask)
    z = attention_1(q_1, ..., slots_1, mask)

It knows no backend and no model: what depends on the layout, sizes and constants alone is moved, whoever wrote it. In a
graph whose inputs have no roles, integers and booleans are the layout (`dependence.input_roles`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autodeploy.graph.dependence import Split, split
from autodeploy.graph.edit import near_miss, prepare_nodes
from autodeploy.graph.effects import HOST, UNBACKED
from autodeploy.graph.equality import merge_equal, merge_equal_numbers
from autodeploy.graph.memory import TOO_LARGE, too_large_to_hoist
from autodeploy.graph.meta import KEPT
from autodeploy.graph.outline import hoist_scalars, inline, needed, outline
from autodeploy.graph.spelling import spelled


@dataclass(frozen=True)
class ShareMetadata:
    """Outline the layout-only part of the graph; matches the number of nodes moved or merged.

    What must stay is a near miss: random numbers, writes, effects, sizes known only at run time, and values so large
    that computing them at the start would raise peak memory (`autodeploy.graph.memory` states the bound).
    """

    name: str = "share_metadata"

    def apply(self, gm: fx.GraphModule) -> int:
        parts = split(gm)
        matches = 0
        # Where all is shared and nothing has come since, the graph is as this pass left it.
        if parts.metadata or not prepare_nodes(gm) or not parts.known.issuperset(prepare_nodes(gm)):
            matches, parts = _share(gm, parts)
        for node, reason in parts.refused.items():
            near_miss(gm, node, f"{spelled(node)} {reason}")
        return matches


def _share(gm: fx.GraphModule, parts: Split) -> tuple[int, Split]:
    """The number of nodes moved or, where none was, merged; and what the graph was made of before it moved."""
    if parts.metadata or prepare_nodes(gm):
        parts = _collect(gm, parts)
    moved, num_known = len(parts.metadata), len(parts.known)
    parts = _merge(gm, parts)
    merged = num_known - len(parts.known)
    if moved:
        left = len(parts.metadata)
        parts = _keep_large(gm, parts)
        moved -= left - len(parts.metadata)
        outline(gm, parts)
    return moved or merged, parts


def _collect(gm: fx.GraphModule, parts: Split) -> Split:
    """Bring what was shared before and what came since together; returns what is to be shared now."""
    if prepare_nodes(gm):
        inline(gm)
        parts = split(gm)
    return split(gm) if _share_numbers(gm, parts) else parts


def _keep_large(gm: fx.GraphModule, parts: Split) -> Split:
    """Leave where it is, merged, what would raise peak memory at the front; returns what is left to move."""
    too_large = too_large_to_hoist(gm.graph, needed(gm, parts))
    for node in too_large:
        KEPT.set(node, TOO_LARGE)
    return split(gm) if too_large else parts


def _share_numbers(gm: fx.GraphModule, parts: Split) -> int:
    """One node for each number: sizes of activations are read off the inputs where they are the same symbol."""
    hoist_scalars(gm, [node for node in gm.graph.nodes if node in parts.scalars])
    return merge_equal_numbers([node for node in gm.graph.nodes if node in parts.scalars])


def _merge(gm: fx.GraphModule, parts: Split) -> Split:
    """Merge what is equal in the layout-only part; returns what is left of it."""
    return parts.without(merge_equal(gm.graph, [node for node in gm.graph.nodes if _can_merge(node, parts)]))


def _can_merge(node: fx.Node, parts: Split) -> bool:
    # Where two ops make up a size of one tensor, tracing them again gives both the same symbol, which Inductor refuses.
    makes_size = any(parts.refused.get(user) in (UNBACKED, HOST) for user in node.users)
    return node in parts.known and not makes_size and node.op in ("call_function", "call_method", "get_attr")
