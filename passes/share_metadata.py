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

import torch
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
        outside = metadata_nodes(gm)
        if not outside or placeholder(gm, "layout") is None:
            return 0
        for call in prepare_nodes(gm):
            _inline(gm, call)
        moved = len(metadata_nodes(gm))
        known = layout_only(gm)
        merge_equal(gm.graph, [node for node in gm.graph.nodes if node in known and _can_merge(node)])
        _hoist_scalars(gm)
        _outline(gm, _region(gm))
        return moved


def _can_merge(node: fx.Node) -> bool:
    return node.op in ("call_function", "get_attr")


def _region(gm: fx.GraphModule) -> list[fx.Node]:
    """The metadata nodes and the constants that they read, in graph order."""
    known = layout_only(gm)
    wanted = set(metadata_nodes(gm))
    for node in reversed(gm.graph.nodes):
        if node in wanted:
            wanted |= {
                arg for arg in node.all_input_nodes if arg in known and arg.op != "placeholder" and not is_scalar(arg)
            }
    return [node for node in gm.graph.nodes if node in wanted]


def _hoist_scalars(gm: fx.GraphModule) -> None:
    """Put sizes of inputs, and arithmetic on them, right after the inputs, where the new node can read them."""
    inputs = placeholders(gm)
    hoisted: set[fx.Node] = set(inputs)
    last = inputs[-1]
    for node in list(gm.graph.nodes):
        if is_scalar(node) and all(arg in hoisted for arg in node.all_input_nodes):
            last.append(node)
            last = node
            hoisted.add(node)


def _outline(gm: fx.GraphModule, region: list[fx.Node]) -> None:
    inner = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(region)
    arguments = [arg for node in region for arg in node.all_input_nodes if arg not in inside]
    arguments = sorted(dict.fromkeys(arguments))
    for arg in arguments:
        copies[arg] = inner.placeholder(arg.name)
        copies[arg].meta.update(arg.meta)
        copies[arg].meta.setdefault("autodeploy_role", "layout")
    for node in region:
        copies[node] = inner.node_copy(node, lambda arg: copies[arg])
    metadata = set(metadata_nodes(gm))
    results = [node for node in users_outside(region) if node in metadata]
    inner.output(tuple(copies[node] for node in results))
    root = {str(node.target): get_attribute(gm, str(node.target)) for node in region if node.op == "get_attr"}
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
    # A constant that activations read too stays where it is; prepare_metadata has its own.
    for node in reversed(region):
        if not node.users:
            gm.graph.erase_node(node)


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    """Undo `_outline`, so that an existing prepare_metadata and what came since are shared together."""
    module = getattr(gm, PREPARE)
    assert isinstance(module, fx.GraphModule)
    inner_inputs = module.graph.find_nodes(op="placeholder")
    copies = dict(zip(inner_inputs, call.all_input_nodes, strict=True))
    results: tuple[fx.Node, ...] = ()
    with gm.graph.inserting_before(call):
        for node in module.graph.nodes:
            if node.op == "output":
                results = tuple(copies[arg] for arg in node.args[0])
            elif node.op != "placeholder":
                if node.op == "get_attr":
                    _adopt(gm, module, str(node.target))
                copies[node] = gm.graph.node_copy(node, lambda arg: copies[arg])
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _adopt(gm: fx.GraphModule, module: fx.GraphModule, target: str) -> None:
    value = getattr(module, target) if "." not in target else get_attribute(module, target)
    if "." not in target and not hasattr(gm, target):
        gm.register_buffer(target, value) if isinstance(value, torch.Tensor) else setattr(gm, target, value)
