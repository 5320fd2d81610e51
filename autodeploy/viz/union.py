"""Both graphs of a diff as one networkx graph: a pair is one node, so that it shows what stayed and what went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx

from autodeploy.viz.classify import PAIRED
from autodeploy.viz.node import Node

if TYPE_CHECKING:
    from autodeploy.viz.classify import Entry
    from autodeploy.viz.difference import Difference
    from autodeploy.viz.snapshot import Snapshot

MAX_FAN_OUT = 8  # a tensor that more nodes read is drawn as a name at its readers, not as edges


def union(diff: Difference) -> networkx.MultiDiGraph:
    """Nodes `a7` for what is in `after` (with its id), `b7` for what only was in `before`.

    Attributes of nodes: kind, name, op, target, text, module, graph, value, changes, `block`, the index of the folded
    block, and `fan_out`. Edges are keyed by the argument's place and have kind "kept", "added", "removed", or "became"
    from a node to what stands for it now.
    """
    graph = networkx.MultiDiGraph()
    keys = _before_keys(diff)
    kinds: dict[str, Entry] = {}
    for entry in diff.entries:
        if entry.kind != "merged":
            kinds |= {f"a{id}": entry for id in entry.after}
        kinds |= {key: entry for id in entry.before if (key := keys[id]).startswith("b")}
    blocks = {id(diff.changed[line]): index for index, block in enumerate(diff.blocks) for line in _entries(block)}
    for node in diff.before.nodes:
        if (key := keys[node.id]).startswith("b"):
            graph.add_node(key, **_attributes(diff.before, node, kinds[key], blocks))
    for node in diff.after.nodes:
        graph.add_node(f"a{node.id}", **_attributes(diff.after, node, kinds[f"a{node.id}"], blocks))
    _add_edges(graph, diff, keys)
    return graph


def _entries(block: Any) -> list[int]:
    return [index for line in block.content for index in line.entries]


def _before_keys(diff: Difference) -> dict[int, str]:
    keys = {node.id: f"b{node.id}" for node in diff.before.nodes}
    for entry in diff.entries:
        if entry.kind in PAIRED:
            keys[entry.before[0]] = f"a{entry.after[0]}"
    return keys


def _attributes(snapshot: Snapshot, node: Node, entry: Entry, blocks: dict[int, int]) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": node.name,
        "op": node.op,
        "target": node.target,
        "text": node.short_target,
        "module": node.module,
        "graph": node.graph,
        "value": ", ".join(map(str, node.values)),
        "changes": "; ".join(map(str, entry.changes)) or _twins(entry),
        "block": blocks.get(id(entry), -1),
        "fan_out": len({user for _, user in snapshot.users[node.id]}),
    }


def _twins(entry: Entry) -> str:
    return f"1 of {len(entry.before)} duplicates" if entry.kind == "merged" else ""


def _add_edges(graph: networkx.MultiDiGraph, diff: Difference, keys: dict[int, str]) -> None:
    old = {(keys[source], keys[user], place) for user, args in diff.before.inputs.items() for place, source in args}
    new = {(f"a{source}", f"a{user}", place) for user, args in diff.after.inputs.items() for place, source in args}
    for source, user, place in sorted(old | new):
        edge = (source, user, place)
        kind = "kept" if edge in old and edge in new else "added" if edge in new else "removed"
        graph.add_edge(source, user, key=place, kind=kind)
    for entry in diff.entries:
        if entry.kind in ("merged", "replaced") and entry.before and entry.after:
            graph.add_edge(f"b{entry.before[-1]}", f"a{entry.after[-1]}", key="became", kind="became")
