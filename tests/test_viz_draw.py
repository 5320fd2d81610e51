"""Drawings and exports: well formed, escaped, within bounds, and nothing on top of anything."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import networkx
import pytest
import torch
from pictures import behind, overlaps
from torch import fx
from traces import traced
from viz_graphs import Maker, aten, attention_layer, cached_layer, graph_module, layers

import autodeploy as ad
from autodeploy.compiler import pipeline
from autodeploy.errors import MissingDependency
from autodeploy.viz import GraphDiff, Recorder, Snapshot
from autodeploy.viz.engine import picture
from autodeploy.viz.export import to_dot, to_model_explorer, to_sync_navigation
from autodeploy.viz.history import History
from autodeploy.viz.page import render_frame
from autodeploy.viz.svg import draw
from passes import default

SVG = "{http://www.w3.org/2000/svg}"
MAX_BOXES = 150


def pipeline_diff() -> GraphDiff:
    with Recorder() as recorder:
        pipeline.run(traced("llama"), default(), [recorder])
    return recorder.trace().diff()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "lfm2"])
def test_pictures(model_type: str) -> None:
    """Nothing lies on top of anything, no edge runs behind a box, and every edge is one of the graphs."""
    with Recorder() as recorder:
        pipeline.run(traced(model_type), default(), [recorder])
    trace = recorder.trace()
    for first, second in [(0, len(trace.stages) - 1), *pairwise(range(len(trace.stages)))]:
        shown = History((trace.stages[first], trace.stages[second]))
        drawn = picture(shown, 1300, 1000)
        assert len(drawn.boxes) <= MAX_BOXES
        assert overlaps(drawn) == []
        assert behind(drawn) == []
        sides = [stage.snapshot for stage in shown.stages]
        old, new = ({(s, id) for id, reads in side.inputs.items() for _, s in reads} for side in sides)
        kinds = {"kept": old & new, "added": new - old, "removed": old - new}
        for link in drawn.links:
            if link["kind"] in ("added", "removed"):
                # A node that moved reads what it did, in another place.
                moved = {id for side in sides for id in side.by_id if _graphs(sides, id) > 1}
                ends = {tuple(end) for end in link["ends"]}
                assert ends <= kinds[link["kind"]] | {end for end in old | new if set(end) & moved}


def _graphs(sides: list[Snapshot], id: int) -> int:
    nodes = [side.by_id[id] for side in sides if id in side.by_id]
    return len({(node.graph, node.module) for node in nodes})


def test_edges_that_close_a_circle_go_up() -> None:
    """Two modules that read each other: neither edge runs behind a box."""

    def build(order: list[str]):
        def nodes(make: Maker, x: fx.Node) -> fx.Node:
            for place in order:
                for _ in range(2):
                    x = make.call(aten.neg.default, x, at=place)
            return x

        return graph_module(nodes)

    drawn = picture(GraphDiff.of(build(["a", "b"]), build(["a", "b", "a", "b"])), 200, 200)
    assert {(link["from"], link["to"]) for link in drawn.links} >= {("g1", "g2"), ("g2", "g1")}
    assert behind(drawn) == []


def test_the_style_holds_for_the_picture_alone() -> None:
    """An SVG inside a page must not restyle others in it."""
    svg = ElementTree.fromstring(draw(pipeline_diff()))
    assert svg.get("class") == "ad-picture"
    style = svg.findtext(f"{SVG}style") or ""
    selectors = re.findall(r"([^{}]+)\{[^{}]*:", style)
    assert len(selectors) > 50
    for selector in ",".join(selectors).split(","):
        name = selector.strip()
        assert name.startswith(".ad-picture"), name
    assert "var(" not in style


def test_svg_of_a_pipeline() -> None:
    svg = draw(pipeline_diff())
    texts = [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert any("sdpa_paged_attention" in text or "layers.0" in text for text in texts)
    assert len(svg) < 200_000


def test_svg_of_a_trace_is_the_step_that_shares() -> None:
    with Recorder() as recorder:
        pipeline.run(traced("llama"), default(), [recorder])
    trace = recorder.trace()
    index = trace.index("share_metadata")
    drawn = draw(trace)
    assert "before, layer by layer" in drawn
    assert drawn.count("▾ prepare_metadata") == 1
    assert len(picture(trace, 1300, 1000).boxes) == len(picture(trace.diff(index - 1, index), 1300, 1000).boxes)


def test_svg_of_nothing() -> None:
    gm = layers(2, attention_layer)
    assert "removed" not in picture(GraphDiff.of(gm, gm), 900, 900).svg


def test_pictures_have_a_limit() -> None:
    """Differences that cannot be folded are left in closed boxes where there is no room for them."""

    def layer(index: int, make: Maker, x: fx.Node) -> fx.Node:
        for _ in range(index + 1):
            x = make.call(aten.neg.default, x)
        return make.call(aten.sin.default, x)

    plain = layers(40, lambda index, make, x: make.call(aten.sin.default, x))
    assert 10 < len(picture(GraphDiff.of(plain, layers(40, layer)), 1300, 1000).boxes) <= MAX_BOXES


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


def test_notebooks_show_the_page() -> None:
    diff = GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))
    assert diff._repr_html_() == render_frame(diff)


def test_networkx() -> None:
    diff = GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))
    graph = diff.to_networkx()
    kinds = networkx.get_node_attributes(graph, "kind")
    assert sorted(kinds.values()) == ["replaced"] * 8 + ["unchanged"] * 8
    assert {kind for *_, kind in graph.edges(data="kind")} == {"kept", "added", "removed", "became"}
    kept = graph.edge_subgraph((*edge[:3],) for edge in graph.edges(keys=True, data="kind") if edge[3] != "became")
    assert networkx.is_directed_acyclic_graph(kept)
    assert graph.nodes["a0"]["name"] == "x"


def test_dot_is_folded() -> None:
    """Layers that are alike are one box, as in the page."""
    dot = to_dot(GraphDiff.of(layers(30, attention_layer), layers(30, cached_layer)))
    assert dot.startswith("digraph diff {")
    assert dot.count("{") == dot.count("}")
    assert dot.count("subgraph") == 2  # layers.0 and its attention
    assert "layers.1 … layers.29" in dot
    assert '"± scaled_dot_product_attention' in dot
    names = set(re.findall(r"^ *([gp]\d+) \[", dot, re.MULTILINE))
    assert {end for edge in re.findall(r"([gp]\d+) -> ([gp]\d+)", dot) for end in edge} <= names


@pytest.mark.parametrize(
    "make", [pipeline_diff, lambda: GraphDiff.of(layers(2, attention_layer), layers(2, cached_layer))]
)
def test_model_explorer(make) -> None:
    """Two graphs, and which node is which."""
    diff = make()
    graphs = json.loads(to_model_explorer(diff))["graphs"]
    assert [graph["id"] for graph in graphs] == ["before", "after"]
    ids = [{node["id"] for node in graph["nodes"]} for graph in graphs]
    for graph, known, side in zip(graphs, ids, (diff.before, diff.after), strict=True):
        assert len(known) == len(side.nodes)
        for node in graph["nodes"]:
            assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= known
            assert all(isinstance(item["value"], str) for item in node["attrs"])
            assert not node["namespace"].endswith("/")
    mapping = json.loads(to_sync_navigation(diff))
    assert mapping["type"] == "sync_navigation"
    for side, key in enumerate(("leftNodeIds", "rightNodeIds")):
        found = [id for entry in mapping["mappingEntries"] for id in entry[key]]
        assert len(found) == len(set(found))
        assert set(found) <= ids[side]


def test_without_the_extra_a_picture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "py_mini_racer", None)
    one, other = (fx.symbolic_trace(each) for each in (torch.nn.ReLU(), torch.nn.GELU()))
    with pytest.raises(MissingDependency, match=r"pip install 'autodeploy-fx\[svg\]'"):
        ad.diff(one, other).save(tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()
