"""A diff in the formats of other tools: Graphviz DOT, and the JSON of Google's Model Explorer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from autodeploy.viz.difference import Difference
from autodeploy.viz.engine import Picture, picture
from autodeploy.viz.fold import GLYPHS
from autodeploy.viz.palette import COLORS, DASHES
from autodeploy.viz.snapshot import Snapshot

_SIZE = 1600  # of the picture whose boxes are those of a DOT file
_ENDS = {"kept": "", "added": " [penwidth=2]", "removed": " [style=dashed]", "fate": " [style=dotted]"}


def to_dot(diff: Difference) -> str:
    """What the page shows first: a cluster for each open module, a box for each closed one."""
    shown = picture(diff, _SIZE, _SIZE)
    inside = {box["key"] for box in shown.boxes}
    lines = ["digraph diff {", "  compound=true;", "  node [shape=box, style=filled, fontname=monospace];"]
    lines += _dot_items(shown, next((box["parent"] for box in shown.boxes if box["parent"] not in inside), ""), "  ")
    for link in shown.links:
        lines.append(f"  {link['from']} -> {link['to']}{_ENDS[link['kind']]};")
    return "\n".join([*lines, "}"]) + "\n"


def _dot_items(shown: Picture, parent: str, indent: str) -> Iterator[str]:
    for box in shown.boxes:
        if box["parent"] != parent:
            continue
        if box["isFrame"]:
            yield f"{indent}subgraph cluster_{box['key']} {{"
            yield f"{indent}  label={_quoted(box['lines'][0])};"
            # What an edge of the whole cluster can begin and end at.
            yield f'{indent}  {box["key"]} [shape=point, style=invis, label=""];'
            yield from _dot_items(shown, box["key"], f"{indent}  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}{box['key']} {_dot_node(box)};"


def _dot_node(box: dict[str, Any]) -> str:
    label = "\n".join(line for line in box["lines"] if line)
    style = "filled,dashed" if DASHES[box["kind"]] else "filled"
    text = f"{GLYPHS[box['kind']]} {label}".strip()
    return f'[label={_quoted(text)}, style="{style}", fillcolor="{COLORS[box["kind"]].fill}"]'


def _quoted(text: str) -> str:
    """A DOT string; its escapes are those of JSON, as far as they are used here."""
    return json.dumps(text, ensure_ascii=False)


def to_model_explorer(diff: Difference) -> str:
    """Both graphs in the module hierarchy, nodes coloured by what became of them: to be opened side by side.

    Format: https://github.com/google-ai-edge/model-explorer, input_graph.ts.
    """
    kinds: list[dict[int, str]] = [{}, {}]
    for entry in diff.entries:
        for side, ids in enumerate((entry.before, () if entry.kind == "merged" else entry.after)):
            kinds[side] |= dict.fromkeys(ids, entry.kind)
    sides = zip(("before", "after"), (diff.before, diff.after), kinds, strict=True)
    graphs = [
        {"id": name, "nodes": [_explorer_node(side, node.id, found) for node in side.nodes]}
        for name, side, found in sides
    ]
    return json.dumps({"label": diff.headline(), "graphs": graphs}, indent=1) + "\n"


def to_sync_navigation(diff: Difference) -> str:
    """Which node of `before` is which of `after`, for Model Explorer's "mapping from computer" (sync_navigation.ts)."""
    found: dict[tuple[int, ...], list[int]] = {}
    for entry in diff.entries:
        if entry.before and entry.after:
            found.setdefault(entry.after, []).extend(entry.before)
    entries = [
        {"leftNodeIds": list(map(str, ones)), "rightNodeIds": list(map(str, new))} for new, ones in found.items()
    ]
    data = {"type": "sync_navigation", "mappingEntries": entries, "disableMappingFallback": True}
    return json.dumps(data, indent=1) + "\n"


def _explorer_node(side: Snapshot, id: int, kinds: dict[int, str]) -> dict[str, Any]:
    node, kind = side.by_id[id], kinds[id]
    color = COLORS[kind]
    value = ", ".join(map(str, node.values))
    texts = {"kind": kind, "name": node.name, "target": node.target, "source": node.source}
    return {
        "id": str(id),
        "label": f"{GLYPHS[kind]} {node.short_target}".strip(),
        "namespace": "/".join(part for part in (node.graph, node.module.replace(".", "/")) if part),
        "attrs": [{"key": key, "value": text} for key, text in texts.items() if text],
        "incomingEdges": [
            {"sourceNodeId": str(source), "sourceNodeOutputId": "0", "targetNodeInputId": place}
            for place, source in side.inputs[id]
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "value", "value": value}]}] if value else [],
        "style": {"backgroundColor": color.fill, "borderColor": color.line, "textColor": "#1f2937"},
    }
