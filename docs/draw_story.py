"""Draws docs/story.svg: the metadata of a real graph before and after `share_metadata`.

    python docs/draw_story.py

The model is a Gemma 3 of four small layers with random weights, three with a sliding window and one with full
attention: what is drawn are the nodes that `insert_cached_attention` and `share_metadata` left in its graph.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch
from autodeploy.metadata.fields_torch import NO_WINDOW
from torch import fx
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import autodeploy as ad
from autodeploy.graph import SITE, get_attribute
from autodeploy.metadata.fields import is_field

OUTPUT = Path(__file__).with_name("story.svg")
LAYER_TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
UNTIL_CACHED = ["canonicalize", "find_attention", "nest_inputs", "gather_logits", "insert_cached_attention"]
FIELD, ATTENTION, TEXT, LINE = "#dbeafe", "#fde68a", "#1f2937", "#6b7280"
BOX_WIDTH, BOX_HEIGHT, GAP, LEFT, TOP = 112, 22, 6, 16, 64


def graphs() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with a copy of the metadata for each layer, and with one for all."""
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=512,
        layer_types=LAYER_TYPES,
    )
    gm = ad.trace(AutoModelForCausalLM.from_config(config).eval())
    naive = ad.apply(gm, passes=UNTIL_CACHED)
    shared = ad.apply(gm, passes=[*UNTIL_CACHED, "share_metadata"])
    return naive.module, shared.module


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The cached attention nodes in order."""
    return [node for node in gm.graph.nodes if SITE in node.meta]


def label(node: fx.Node) -> str:
    """The op of a field or attention node, without its namespace."""
    return str(node.target).split(".")[1]


def box(x: float, y: float, text: str, color: str, width: float = BOX_WIDTH) -> str:
    middle = f'x="{x + width / 2}" y="{y + BOX_HEIGHT / 2 + 4}"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="4" fill="{color}" stroke="{LINE}"/>'
        f'<text {middle} text-anchor="middle">{escape(text)}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (x1 + x2) / 2
    path = f"M {x1} {y1} C {middle} {y1}, {middle} {y2}, {x2} {y2}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" marker-end="url(#tip)"/>'


def attention_box(node: fx.Node, x: float, y: float) -> str:
    site = node.meta[SITE]
    window = "full" if site.window is None else f"window {site.window}"
    return box(x, y, f"{label(node)}, {window}", ATTENTION, 230)


def draw_naive(gm: fx.GraphModule) -> tuple[list[str], float]:
    """One row of fields per layer, three to a line, in front of its attention node; and the bottom."""
    parts, y = [], float(TOP)
    for node in attention_nodes(gm):
        fields = [arg for arg in node.all_input_nodes if is_field(arg.target)]
        for index, field in enumerate(fields):
            row, column = divmod(index, 3)
            place = (LEFT + column * (BOX_WIDTH + GAP), y + row * (BOX_HEIGHT + GAP))
            parts.append(box(*place, label(field), FIELD))
        right = LEFT + 3 * (BOX_WIDTH + GAP)
        height = -(-len(fields) // 3) * (BOX_HEIGHT + GAP)
        middle = y + (height - GAP) / 2
        parts += [arrow(right, middle, right + 34, middle), attention_box(node, right + 40, middle - BOX_HEIGHT / 2)]
        y += height + 3 * GAP
    return parts, y


def draw_shared(gm: fx.GraphModule, x: float) -> tuple[list[str], float]:
    """One prepare_metadata box with its fields, read by all attention nodes; and the bottom."""
    inner = get_attribute(gm, "prepare_metadata").graph
    windows = gm.meta["autodeploy_layout_spec"].windows
    names = [f"{label(node)}{_for_whom(node, windows)}" for node in inner.nodes if is_field(node.target)]
    width, height = 200, (len(names) + 1) * (BOX_HEIGHT + GAP) + GAP
    frame = f'<rect x="{x}" y="{TOP}" width="{width}" height="{height}" rx="6" fill="none" stroke="{TEXT}"/>'
    title = f'<text x="{x + width / 2}" y="{TOP + 18}" text-anchor="middle" font-weight="bold">prepare_metadata</text>'
    parts, y = [frame, title], float(TOP)
    for name in names:
        y += BOX_HEIGHT + GAP
        parts.append(box(x + 8, y, name, FIELD, width - 16))
    nodes = attention_nodes(gm)
    for index, node in enumerate(nodes):
        middle = TOP + height * (index + 0.5) / len(nodes)
        parts.append(arrow(x + width, TOP + height / 2, x + width + 54, middle))
        parts.append(attention_box(node, x + width + 60, middle - BOX_HEIGHT / 2))
    return parts, TOP + float(height)


def _for_whom(node: fx.Node, windows: tuple[int | None, ...]) -> str:
    """Which layers a field is for, where it is not for all of them."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    named = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    window = windows[named["group"]] if "group" in named else named.get("window")
    if window is None:
        return ", full" if "group" in named else ""
    return ", full" if window == NO_WINDOW else f", window {window}"


def main() -> None:
    naive, shared = graphs()
    left, left_bottom = draw_naive(naive)
    right, right_bottom = draw_shared(shared, 680)
    width, height = 1180, max(left_bottom, right_bottom) + 16
    style = f'font-family="sans-serif" font-size="12" fill="{TEXT}"'
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head = f'<defs>{tip}<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    titles = [
        f'<text x="{LEFT}" y="30" font-size="16">insert_cached_attention: metadata for each layer alone</text>',
        '<text x="680" y="30" font-size="16">share_metadata: once for all layers</text>',
    ]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>', head, paper, *titles]
    OUTPUT.write_text("\n".join([*parts, *left, *right, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
