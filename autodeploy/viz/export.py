"""A diff in the formats of other tools: Graphviz DOT, and the JSON of Google's Model Explorer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from autodeploy.viz.fold import GLYPHS
from autodeploy.viz.palette import COLORS, DASHES

if TYPE_CHECKING:
    import networkx

    from autodeploy.viz.diff import GraphDiff


def to_dot(diff: GraphDiff) -> str:
    """Both graphs in one, a cluster for each module; what was read by nodes that are gone is dashed."""
    graph = diff.to_networkx()
    lines = ["digraph diff {", "  node [shape=box, style=filled, fontname=monospace];"]
    for number, (module, keys) in enumerate(_by_module(graph).items()):
        lines.append(f"  subgraph cluster_{number} {{")
        lines.append(f"    label={_quoted(module or '(outside modules)')};")
        lines += [f"    {key} {_dot_node(graph.nodes[key])};" for key in keys]
        lines.append("  }")
    styles = {"kept": "", "added": " [penwidth=2]", "removed": " [style=dashed]", "became": " [style=dotted]"}
    lines += [f"  {source} -> {user}{styles[kind]};" for source, user, kind in graph.edges(data="kind")]
    return "\n".join([*lines, "}"]) + "\n"


def _by_module(graph: networkx.MultiDiGraph) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for key, data in graph.nodes(data=True):
        modules.setdefault(".".join(part for part in (data["graph"], data["module"]) if part), []).append(key)
    return modules


def _dot_node(data: dict[str, Any]) -> str:
    label = "\n".join(part for part in (f"{GLYPHS[data['kind']]} {data['text']}", data["name"], data["value"]) if part)
    style = "filled,dashed" if DASHES[data["kind"]] else "filled"
    return f'[label={_quoted(label)}, style="{style}", fillcolor="{COLORS[data["kind"]].fill}"]'


def _quoted(text: str) -> str:
    """A DOT string; its escapes are those of JSON, as far as they are used here."""
    return json.dumps(text, ensure_ascii=False)


def to_model_explorer(diff: GraphDiff) -> dict[str, Any]:
    """One graph, nodes named and coloured by what became of them, in the module hierarchy.

    Format: https://github.com/google-ai-edge/model-explorer, input_graph.ts.
    """
    graph = diff.to_networkx()
    return {"label": "diff", "graphs": [{"id": "diff", "nodes": [_explorer_node(graph, key) for key in graph]}]}


def _explorer_node(graph: networkx.MultiDiGraph, key: str) -> dict[str, Any]:
    data = graph.nodes[key]
    hierarchy = [part for part in (data["graph"], data["module"].replace(".", "/")) if part]
    color = COLORS[data["kind"]]
    incoming = [
        {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
        for source, _, place, kind in graph.in_edges(key, keys=True, data="kind")
        if kind != "became"
    ]
    return {
        "id": key,
        "label": f"{GLYPHS[data['kind']]} {data['text']}".strip(),
        "namespace": "/".join(hierarchy),
        "attrs": [{"key": name, "value": data[name]} for name in ("kind", "name", "target", "changes") if data[name]],
        "incomingEdges": incoming,
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "value", "value": data["value"]}]}] if data["value"] else [],
        "style": {"backgroundColor": color.fill, "borderColor": color.line, "textColor": "#1f2937"},
    }
