"""Move everything layout-only into one prepare_metadata node after the inputs, and merge what is equal in it.

Before (per layer):                         After:
    slots = slot_mapping(layout, T, 0)          prepare = prepare_metadata(layout, T)
    y = attention_0(q, ..., slots)              slots, mask = prepare[0], prepare[1]
    mask = dense_mask(layout, T, 0)             y = attention_0(q, ..., slots)
    slots_1 = slot_mapping(layout, T, 0)        z = attention_1(q_1, ..., slots, mask)
    z = attention_1(q_1, ..., slots_1, mask)

It knows no backend: what depends on the layout, sizes and constants alone is moved, whoever wrote it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from autodeploy.graph import (
    PREPARE,
    get_attribute,
    is_scalar,
    layout_only,
    merge_equal,
    metadata_nodes,
    placeholder,
    placeholders,
    prepare_nodes,
    users_outside,
)


@dataclass(frozen=True)
class ShareMetadata:
    """Outline the layout-only part of the graph; matches the number of nodes moved."""

    name: str = "share_metadata"

    def apply(self, gm: fx.GraphModule) -> int:
        if placeholder(gm, "layout") is None:
            return 0
        known = layout_only(gm)
        if not metadata_nodes(gm, known):
            return 0
        if calls := prepare_nodes(gm):
            _inline(gm, calls[0])
            known = layout_only(gm)
        moved = len(metadata_nodes(gm, known))
        merged = merge_equal(gm.graph, [node for node in gm.graph.nodes if node in known and _can_merge(node)])
        known -= merged
        _outline(gm, known, _hoist_scalars(gm))
        return moved


def _can_merge(node: fx.Node) -> bool:
    return node.op in ("call_function", "get_attr")


def _region(gm: fx.GraphModule, known: set[fx.Node], metadata: set[fx.Node], available: set[fx.Node]) -> list[fx.Node]:
    """The metadata nodes and what they read of constants and their sizes, in graph order."""
    wanted = set(metadata)
    for node in reversed(gm.graph.nodes):
        if node in wanted:
            wanted |= {arg for arg in node.all_input_nodes if arg in known and arg not in available}
    return [node for node in gm.graph.nodes if node in wanted]


def _hoist_scalars(gm: fx.GraphModule) -> set[fx.Node]:
    """Put sizes of inputs, and arithmetic on them, right after the inputs, where the new node can read them.

    Returns them and the inputs.
    """
    inputs = placeholders(gm)
    hoisted: set[fx.Node] = set(inputs)
    last = inputs[-1]
    for node in list(gm.graph.nodes):
        if is_scalar(node) and all(arg in hoisted for arg in node.all_input_nodes):
            last.append(node)
            last = node
            hoisted.add(node)
    return hoisted


def _outline(gm: fx.GraphModule, known: set[fx.Node], available: set[fx.Node]) -> None:
    metadata = set(metadata_nodes(gm, known))
    region = _region(gm, known, metadata, available)
    inner = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(region)
    arguments = [arg for node in region for arg in node.all_input_nodes if arg not in inside]
    arguments = sorted(dict.fromkeys(arguments))
    for arg in arguments:
        copies[arg] = inner.placeholder(arg.name)
        copies[arg].meta.update(arg.meta)
        copies[arg].meta.setdefault("autodeploy_role", "layout")
    root: dict[str, Any] = {}
    for node in region:
        copies[node] = inner.node_copy(node, lambda arg: copies[arg])
        if node.op == "get_attr":
            name = str(node.target).removeprefix(f"{PREPARE}.")  # it was inside before
            root[name] = get_attribute(gm, str(node.target))
            copies[node].target = name
    # A constant or a size that activations read too is computed on both sides.
    private = region
    while both := {node for node in users_outside(private) if node not in metadata}:
        private = [node for node in private if node not in both]
    results = users_outside(private)
    inner.output(tuple(copies[node] for node in results))
    module = fx.GraphModule(root, inner, class_name="PrepareMetadata")
    gm.add_submodule(PREPARE, module)
    _call(gm, region, results, arguments)


def _call(gm: fx.GraphModule, region: list[fx.Node], results: list[fx.Node], arguments: list[fx.Node]) -> None:
    after = placeholders(gm)[-1]
    while is_scalar(after.next):
        after = after.next
    with gm.graph.inserting_after(after):
        call = gm.graph.call_module(PREPARE, tuple(arguments))
    call.name = PREPARE
    last = call
    for index, node in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (call, index))
        last.meta.update(node.meta)
        node.replace_all_uses_with(last)
    for node in reversed(region):
        if not node.users:
            gm.graph.erase_node(node)


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    """Undo `_outline`, so that an existing prepare_metadata and what came since are shared together."""
    module = getattr(gm, PREPARE)
    inner = module.graph
    copies = dict(zip(inner.find_nodes(op="placeholder"), call.all_input_nodes, strict=True))
    with gm.graph.inserting_before(call):
        for node in inner.nodes:
            if node.op == "get_attr":
                copies[node] = gm.graph.get_attr(f"{PREPARE}.{node.target}")
            elif node.op not in ("placeholder", "output"):
                copies[node] = gm.graph.node_copy(node, lambda arg: copies[arg])
    results = [copies[node] for node in inner.output_node().args[0]]  # type: ignore[union-attr]
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
