"""Drawings and exports: well formed, escaped, within bounds, and nothing on top of anything."""

from __future__ import annotations

import json
from itertools import combinations
from xml.etree import ElementTree

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traces import traced
from viz_graphs import Maker, aten, attention_layer, cached_layer, graph_module, layers

from autodeploy.compiler import pipeline
from autodeploy.viz import GraphDiff, Recorder
from autodeploy.viz.export import to_dot, to_model_explorer
from autodeploy.viz.layout import Box, place
from autodeploy.viz.svg import MAX_BOXES, draw
from passes import default

SVG = "{http://www.w3.org/2000/svg}"
EDGES = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=30)


def pipeline_diff() -> GraphDiff:
    with Recorder() as recorder:
        pipeline.run(traced("llama"), default(), [recorder])
    return recorder.trace().diff()


def boxes(svg: str) -> list[Box]:
    """The boxes of nodes."""
    rects = (group.find(f"{SVG}rect") for group in ElementTree.fromstring(svg).iter(f"{SVG}g"))
    return [
        Box(*(float(rect.get(key) or 0) for key in ("x", "y", "width", "height"))) for rect in rects if rect is not None
    ]


def overlap(one: Box, other: Box) -> bool:
    apart_x = one.x + one.width <= other.x or other.x + other.width <= one.x
    return not (apart_x or one.y + one.height <= other.y or other.y + other.height <= one.y)


@settings(max_examples=60, deadline=None)
@given(EDGES, st.sampled_from([100.0, 400.0, float("inf")]))
def test_layout(edges: list[tuple[int, int]], max_width: float) -> None:
    sizes = {str(key): (20.0 + 7 * key, 10.0 + key) for key in range(15)}
    placed = place(sizes, [(str(a), str(b)) for a, b in edges], (5, 5), max_width)
    assert placed.keys() == sizes.keys()
    assert not [pair for pair in combinations(placed.values(), 2) if overlap(*pair)]
    graph = networkx.DiGraph(edges)
    if networkx.is_directed_acyclic_graph(graph):
        assert all(placed[str(a)].y < placed[str(b)].y for a, b in edges)


def test_svg_of_a_pipeline() -> None:
    svg = draw(pipeline_diff())
    drawn = boxes(svg)
    assert 20 < len(drawn) <= MAX_BOXES
    assert not [pair for pair in combinations(drawn, 2) if overlap(*pair)]
    texts = [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert any("sdpa_paged_attention" in (text or "") for text in texts)
    assert "4 x model.layers.*" in texts
    assert len(svg) < 200_000


def test_svg_of_nothing() -> None:
    gm = layers(2, attention_layer)
    assert boxes(draw(GraphDiff.of(gm, gm))) == []


def test_svg_has_a_limit() -> None:
    """Differences that cannot be folded are counted where there is no room for them."""

    def layer(index: int, make: Maker, x: fx.Node) -> fx.Node:
        for _ in range(index + 1):
            x = make.call(aten.neg.default, x)
        return make.call(aten.sin.default, x)

    plain = layers(40, lambda index, make, x: make.call(aten.sin.default, x))
    svg = draw(GraphDiff.of(plain, layers(40, layer)))
    assert len(boxes(svg)) <= MAX_BOXES
    assert "more blocks" in svg


NASTY = '<script>alert("x")</script>&\\"'


def test_names_are_escaped() -> None:
    def build(op: object):
        def nasty(make: Maker, x: fx.Node) -> fx.Node:
            return Maker(make.graph, NASTY).call(op, x)

        return graph_module(nasty)

    diff = GraphDiff.of(build(aten.sin.default), build(aten.cos.default))
    svg = draw(diff)
    assert "<script" not in svg
    assert any(NASTY in (node.text or "") for node in ElementTree.fromstring(svg).iter(f"{SVG}text"))
    dot = to_dot(diff)
    label = next(line for line in dot.splitlines() if "script" in line).strip()
    assert label == f"label={json.dumps(NASTY)};"


def test_notebooks_show_the_drawing() -> None:
    diff = GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))
    assert diff._repr_html_() == draw(diff)


def test_networkx() -> None:
    diff = GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))
    graph = diff.to_networkx()
    kinds = networkx.get_node_attributes(graph, "kind")
    assert sorted(kinds.values()) == ["replaced"] * 8 + ["unchanged"] * 8
    assert {kind for *_, kind in graph.edges(data="kind")} == {"kept", "added", "removed", "became"}
    kept = graph.edge_subgraph((*edge[:3],) for edge in graph.edges(keys=True, data="kind") if edge[3] != "became")
    assert networkx.is_directed_acyclic_graph(kept)
    assert graph.nodes["a0"]["name"] == "x"


def test_dot() -> None:
    dot = to_dot(GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer)))
    assert dot.startswith("digraph diff {")
    assert dot.count("{") == dot.count("}")
    assert dot.count("subgraph") == 9
    assert '"- scaled' not in dot
    assert "± scaled_dot_product_attention" in dot


@pytest.mark.parametrize(
    "make", [pipeline_diff, lambda: GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))]
)
def test_model_explorer(make) -> None:
    diff = make()
    data = json.loads(json.dumps(to_model_explorer(diff)))
    (graph,) = data["graphs"]
    ids = {node["id"] for node in graph["nodes"]}
    assert len(ids) == len(graph["nodes"]) >= len(diff.after.nodes)
    for node in graph["nodes"]:
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= ids
        assert all(isinstance(item["value"], str) for item in node["attrs"])
        assert not node["namespace"].endswith("/")
    assert any("/" in node["namespace"] for node in graph["nodes"])
