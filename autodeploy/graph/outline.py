"""Nodes into one submodule `prepare_metadata`, called right after the inputs, and back again."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.graph_module import _assign_attr, _has_attr

from autodeploy.graph.dependence import Split, input_roles, is_prepare
from autodeploy.graph.edit import PREPARE, get_attribute, placeholders
from autodeploy.graph.meta import ROLE, VALUE
from autodeploy.graph.spelling import attribute


def outline(gm: fx.GraphModule, parts: Split) -> None:
    """Move `parts.metadata`, and the constants that it reads, into a new prepare_metadata; what nobody reads goes.

    Numbers that need no tensor but the inputs go in front of its call, and are arguments of it where they are read.
    An attribute or a size that activations read too is read on both sides.
    """
    available = _hoist_scalars(gm, parts)
    region = needed(gm, parts)
    results = _results(region, parts)
    moved = _in_order(gm, _ancestors(results, available))
    if results:
        inside = set(moved)
        arguments = sorted({arg for node in moved for arg in node.all_input_nodes if arg not in inside})
        gm.add_submodule(PREPARE, _submodule(gm, moved, arguments, results))
        _call(gm, arguments, results)
    for node in reversed(region):
        if not node.users:
            gm.graph.erase_node(node)


def inline(gm: fx.GraphModule) -> None:
    """Put the nodes of prepare_metadata back in place of its call, if there is one; the submodule stays unused."""
    for call in [node for node in gm.graph.nodes if is_prepare(node)]:
        inner = get_attribute(gm, PREPARE).graph
        copies = dict(zip(inner.find_nodes(op="placeholder"), call.args, strict=True))
        with gm.graph.inserting_before(call):
            for node in inner.nodes:
                if node.op == "get_attr":
                    copies[node] = gm.graph.get_attr(_at_home(gm, str(node.target), attribute(node)))
                    copies[node].meta.update(node.meta)
                elif node.op not in ("placeholder", "output"):
                    copies[node] = gm.graph.node_copy(node, lambda arg, copies=copies: copies[arg])
        results = [copies[node] for node in inner.output_node().args[0]]
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)


def _at_home(gm: fx.GraphModule, name: str, value: Any) -> str:
    """The name by which `gm` itself has `value`, which prepare_metadata calls `name`; put there where it is missing."""
    path, number = name, 0
    while _has_attr(gm, path) and get_attribute(gm, path) is not value:
        number += 1
        path = f"{name}_{number}"  # somebody gave the name to another value since
    if not _has_attr(gm, path):
        _assign_attr(value, gm, path)
    return path


def hoist_scalars(gm: fx.GraphModule, scalars: Iterable[fx.Node]) -> set[fx.Node]:
    """Put those of `scalars` (in graph order) that need no tensor but the inputs right after the inputs."""
    hoisted: set[fx.Node] = set(placeholders(gm))
    last = _last_input(gm)
    for node in scalars:
        if node.op == "placeholder" or not all(arg in hoisted for arg in node.all_input_nodes):
            continue
        if last.next is not node:
            last.append(node)
        last = node
        hoisted.add(node)
    return hoisted


def _last_input(gm: fx.GraphModule) -> fx.Node:
    """The last input, or the root of the graph, which stands in front of everything, where there is none."""
    inputs = placeholders(gm)
    return inputs[-1] if inputs else gm.graph._root


def _hoist_scalars(gm: fx.GraphModule, parts: Split) -> set[fx.Node]:
    return hoist_scalars(gm, [node for node in gm.graph.nodes if node in parts.scalars and node in parts.known])


def needed(gm: fx.GraphModule, parts: Split) -> list[fx.Node]:
    """The metadata and the constants and numbers it is made of."""
    return _in_order(gm, _ancestors(parts.metadata, set(placeholders(gm))))


def _ancestors(nodes: Iterable[fx.Node], available: set[fx.Node]) -> set[fx.Node]:
    """`nodes` and all that they are computed from but what is `available`."""
    found = set(nodes)
    waiting = list(found)
    while waiting:
        for arg in waiting.pop().all_input_nodes:
            if arg not in found and arg not in available:
                found.add(arg)
                waiting.append(arg)
    return found


def _in_order(gm: fx.GraphModule, nodes: set[fx.Node]) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node in nodes]


def _results(region: list[fx.Node], parts: Split) -> list[fx.Node]:
    """What of `region` is read by what stays outside: activations, and sizes that they need."""
    inside = set(region)
    stays: set[fx.Node] = set()
    results = []
    for node in reversed(region):
        if not any(user not in inside or user in stays for user in node.users):
            continue
        if node.op == "get_attr" or node in parts.scalars:
            stays.add(node)
        else:
            results.append(node)
    return results[::-1]


def _submodule(
    gm: fx.GraphModule, region: list[fx.Node], arguments: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    roles = input_roles(gm.graph)
    for arg in arguments:
        copies[arg] = graph.placeholder(arg.name)
        copies[arg].meta.update(arg.meta)
        ROLE.set(copies[arg], roles.get(arg) or "layout")
    root: dict[str, Any] = {}
    for node in region:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        if node.op == "get_attr":
            root[str(node.target)] = attribute(node)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(root, graph)


def _call(gm: fx.GraphModule, arguments: list[fx.Node], results: list[fx.Node]) -> None:
    with gm.graph.inserting_after(max([*arguments, _last_input(gm)])):
        call = gm.graph.call_module(PREPARE, tuple(arguments))
    call.name = PREPARE
    if all(VALUE.on(node) for node in results):
        VALUE.set(call, tuple(VALUE.of(node) for node in results))
    last = call
    for index, node in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (call, index))
        last.meta.update(node.meta)
        node.replace_all_uses_with(last)
