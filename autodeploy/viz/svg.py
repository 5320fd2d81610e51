"""The changed region of a diff as an SVG: one panel for each folded block, with what its nodes read and who reads them.

All text is text, every name is escaped, and nothing is loaded from elsewhere; light or dark by the reader's setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from autodeploy.viz.fold import GLYPHS, Block
from autodeploy.viz.layout import Box, place
from autodeploy.viz.palette import COLORS, DASHES
from autodeploy.viz.union import MAX_FAN_OUT

if TYPE_CHECKING:
    import networkx

    from autodeploy.viz.classify import Entry
    from autodeploy.viz.diff import GraphDiff

MAX_BOXES, MAX_PANEL = 150, 40
_CHAR, _LINE, _MARGIN, _GAP = 7.3, 14, 16, (14.0, 30.0)
_LONGEST = 44  # characters of a line in a box
_WIDEST = 1180.0


def draw(diff: GraphDiff) -> str:
    """The SVG as text. What does not fit into `MAX_BOXES` boxes is counted at the end."""
    graph = diff.to_networkx()
    parts: list[str] = []
    y, width, boxes, left_out = 56.0, 480.0, 0, 0
    for block in diff.blocks:
        keys = _panel_nodes(diff, graph, block)
        room = min(MAX_PANEL, MAX_BOXES - boxes)
        if room <= 0:
            left_out += 1
            continue
        drawn, right, bottom = _panel(graph, block, keys[:room], len(keys) - len(keys[:room]), y)
        parts += drawn
        boxes, width, y = boxes + len(keys[:room]), max(width, right), bottom + _MARGIN
    if left_out:
        parts.append(_text(_MARGIN, y + _LINE, f"... and {left_out} more blocks", "dim"))
        y += 2 * _LINE
    head = _text(_MARGIN, 24, f"{diff.before.title or 'before'} → {diff.after.title or 'after'}", "title")
    size = f"{width + _MARGIN:.0f} {max(y, 72.0):.0f}"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width + _MARGIN:.0f}">'
    return "\n".join(
        [opening, _style(), '<rect class="paper" width="100%" height="100%"/>', head, _legend(diff), *parts, "</svg>"]
    )


def _panel_nodes(diff: GraphDiff, graph: networkx.MultiDiGraph, block: Block) -> list[str]:
    """The nodes of the first module of a block, then their unchanged neighbours; not what only hands values on."""
    keys: dict[str, None] = {}
    with_context: dict[str, None] = {}
    for line in block.content:
        for index in line.entries[: line.count]:
            found = _entry_nodes(diff, diff.changed[index])
            keys |= found
            with_context |= found if diff.changed[index].kind != "merged" else {}
    near = (other for key in with_context for other in (*graph.predecessors(key), *_few_readers(graph, key)))
    return [*keys, *dict.fromkeys(other for other in near if other not in keys and _is_context(graph.nodes[other]))]


def _entry_nodes(diff: GraphDiff, entry: Entry) -> dict[str, None]:
    """Those of one difference; one duplicate stands for all."""
    paired = entry.kind in ("changed", "moved")
    ones = () if paired else entry.before[:1] if entry.kind == "merged" else entry.before
    return dict.fromkeys([f"b{id}" for id in ones] + [f"a{id}" for id in entry.after if id not in diff.after.source_of])


def _readers(graph: networkx.MultiDiGraph, key: str) -> dict[str, None]:
    """The nodes that read this one where it is: not those that have stopped to."""
    gone = ("became", "removed") if key.startswith("a") else ("became",)
    return dict.fromkeys(user for _, user, kind in graph.out_edges(key, data="kind") if kind not in gone)


def _few_readers(graph: networkx.MultiDiGraph, key: str) -> dict[str, None]:
    """The nodes that read this one, unless they are too many for edges."""
    readers = _readers(graph, key)
    return readers if len(readers) <= MAX_FAN_OUT else {}


def _is_context(data: dict[str, Any]) -> bool:
    """Whether an unchanged neighbour gets a box rather than a name."""
    named = data["op"] in ("placeholder", "get_attr", "output") or data["fan_out"] > MAX_FAN_OUT
    return data["kind"] == "unchanged" and not named


def _panel(
    graph: networkx.MultiDiGraph, block: Block, keys: list[str], left_out: int, top: float
) -> tuple[list[str], float, float]:
    """The parts of one panel, its right end and its bottom."""
    inside = set(keys)
    lines = {key: _box_lines(graph, key, inside) for key in keys}
    sizes = {key: (max(map(len, text)) * _CHAR + 16, len(text) * _LINE + 10.0) for key, text in lines.items()}
    edges = [(source, user, kind) for source, user, kind in graph.edges(keys, data="kind") if user in inside]
    boxes = place(sizes, [(source, user) for source, user, _ in edges], _GAP, _WIDEST)
    boxes = {key: Box(box.x + 2 * _MARGIN, box.y + top + 34, box.width, box.height) for key, box in boxes.items()}
    right = max((box.x + box.width for box in boxes.values()), default=0.0) + _MARGIN
    bottom = max((box.y + box.height for box in boxes.values()), default=top) + _MARGIN
    times = f"{len(block.modules)} x " if len(block.modules) > 1 else ""
    title = f"{times}{block.path or '(outside modules)'}" + (f"  (and {left_out} more nodes)" if left_out else "")
    right = max(right, len(title) * _CHAR + 3 * _MARGIN)
    frame = _rect("frame", Box(_MARGIN, top, right - _MARGIN, bottom - top), 6)
    parts = [frame, _text(_MARGIN + 10, top + 20, title, "name")]
    parts += [_edge(boxes[source], boxes[user], kind) for source, user, kind in edges]
    parts += [_box(boxes[key], lines[key], graph.nodes[key]) for key in keys]
    return parts, right, bottom


def _box_lines(graph: networkx.MultiDiGraph, key: str, inside: set[str]) -> list[str]:
    """Glyph and op; name and value; what changed; what it reads from far away, by name; how many read it there."""
    data = graph.nodes[key]
    far = (source for source, _, kind in graph.in_edges(key, data="kind") if source not in inside and kind != "became")
    ports = list(dict.fromkeys(graph.nodes[source]["name"] for source in far))
    lines = [f"{GLYPHS[data['kind']]} {data['text']}", f"{data['name']} {data['value']}", data["changes"]]
    lines += [f"◂ {', '.join(ports)}"] if ports else []
    readers = _readers(graph, key).keys() - inside
    lines += [f"▸ {len(readers)} readers"] if len(readers) > MAX_FAN_OUT else []
    return [_shortened(line.strip()) for line in lines if line]


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _box(box: Box, lines: list[str], data: dict[str, Any]) -> str:
    rows = [(line, "name" if row == 0 else "dim", box.y + (row + 1) * _LINE) for row, line in enumerate(lines)]
    texts = "".join(_text(box.x + 8, y, line, style) for line, style, y in rows)
    tip = f"<title>{escape(data['target'])} in {escape(data['module'] or data['graph'] or 'no module')}</title>"
    return f"<g>{tip}{_rect(data['kind'], box, 4, DASHES[data['kind']])}{texts}</g>"


def _rect(style: str, box: Box, radius: int, dash: str = "") -> str:
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius}"'
    return f'<rect class="{style}" {place}' + (f' stroke-dasharray="{dash}"/>' if dash else "/>")


def _edge(source: Box, user: Box, kind: str) -> str:
    x1, y1 = source.x + source.width / 2, source.y + source.height
    x2, y2 = user.x + user.width / 2, user.y
    middle = (y1 + y2) / 2
    path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="edge {kind}-edge" d="{path}"/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _legend(diff: GraphDiff) -> str:
    counts = diff.summary()["kinds"]
    words = [f"{GLYPHS[kind]} {number} {kind}".strip() for kind, number in counts.items() if number]
    return _text(_MARGIN, 42, " · ".join(words), "dim")


def _style() -> str:
    light = _colors((kind, color.fill, color.line) for kind, color in COLORS.items())
    dark = _colors((kind, color.dark_fill, color.dark_line) for kind, color in COLORS.items())
    return f"<style>{_LIGHT}{light}@media (prefers-color-scheme:dark){{{_DARK}{dark}}}</style>"


_LIGHT = (
    "text{font:12px ui-monospace,monospace;white-space:pre;fill:#111827}.title{font-weight:bold;font-size:15px}"
    ".name{font-weight:bold}.dim{fill:#4b5563;font-size:11px}.paper{fill:#fff}.frame{fill:none;stroke:#9ca3af}"
    ".edge{fill:none;stroke:#9ca3af;stroke-width:1.2}.added-edge{stroke:#007a5a;stroke-width:2}"
    ".removed-edge{stroke:#b23a00;stroke-dasharray:5 3}.became-edge{stroke:#c04f00;stroke-dasharray:1 3}"
)
_DARK = (
    "text{fill:#f3f4f6}.dim{fill:#c3c9d3}.paper{fill:#0d1117}.added-edge{stroke:#00c796}"
    ".removed-edge{stroke:#ff7f50}.became-edge{stroke:#e69f00}"
)


def _colors(colors: Iterable[tuple[str, str, str]]) -> str:
    return "".join(f"rect.{kind}{{fill:{fill};stroke:{line}}}" for kind, fill, line in colors)
