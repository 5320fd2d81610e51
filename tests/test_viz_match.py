"""The matcher against pairs of graphs whose matching nodes are known, and stage by stage on small ones."""

from __future__ import annotations

import sys

import pytest
from match_truth import CASES, Score, score
from torch import fx
from viz_graphs import Maker, aten, attention_layer, cached_layer, graph_module, layers

from autodeploy.errors import OptionError
from autodeploy.viz.match import match
from autodeploy.viz.snapshot import Snapshot

# insert_cached_attention drops cu_seqlens_q and makes an equal one; nest_inputs does so with a size. The matcher says
# that they are the same, the history that they are not.
PRECISION = {
    "nest_inputs, qwen3": 0.99,
    "insert_cached_attention, gemma3 (two layer types)": 0.99,
    "all passes, llama": 0.99,
    "all passes, mixtral (experts)": 0.99,
    "all passes, lfm2 (convolution and attention)": 0.99,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from torch.export
def test_precision_and_recall(name: str) -> None:
    found: Score = score(CASES[name]())
    assert found.precision >= PRECISION.get(name, 1.0)
    assert found.recall == 1.0
    assert found.merged_right == found.merged


def stages(before: fx.GraphModule, after: fx.GraphModule, **manual: str) -> dict[tuple[str, str], str]:
    """The stage of each pair of names."""
    one, other = Snapshot.of(before), Snapshot.of(after)
    links = match(one, other, manual)
    return {(one.name_of(a), other.name_of(b)): links.stages[a] for a, b in links.pairs.items()}


def test_equal_graphs_are_matched_by_hash() -> None:
    found = stages(layers(3, attention_layer), layers(3, attention_layer))
    assert set(found.values()) == {"merkle"}
    assert all(one == other for one, other in found)


def test_a_replaced_op_leaves_the_rest_matched() -> None:
    before, after = layers(3, attention_layer), layers(3, cached_layer)
    found = stages(before, after)
    missing = {node.name for node in before.graph.nodes} - {one for one, _ in found}
    assert missing == {
        "scaled_dot_product_attention_default",
        *(f"scaled_dot_product_attention_default_{n}" for n in (1, 2)),
    }
    assert all(one == other for one, other in found)


def test_manual_pairs_come_first() -> None:
    def build(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(aten.add.Tensor, make.call(aten.sin.default, x), make.call(aten.cos.default, x))

    found = stages(graph_module(build), graph_module(build), sin_default="cos_default")
    assert found["sin_default", "cos_default"] == "manual"
    assert found["x", "x"] == "merkle"


@pytest.mark.parametrize(("manual", "side"), [({"nothing": "x"}, "before"), ({"x": "nothing"}, "after")])
def test_unknown_manual_names_are_refused(manual: dict[str, str], side: str) -> None:
    gm = layers(1, attention_layer)
    with pytest.raises(OptionError, match=f"'nothing' in the graph {side}"):
        match(Snapshot.of(gm), Snapshot.of(gm), manual)


def test_other_literals_are_similar() -> None:
    def build(scale: float):
        return layers(3, lambda index, make, x: make.call(aten.mul.Tensor, x, scale if index == 1 else 2.0))

    found = stages(build(2.0), build(3.0))
    assert found["mul_tensor_1", "mul_tensor_1"] == "similar"
    assert len(found) == 5


def test_interchangeable_nodes_are_matched_in_order() -> None:
    def build(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(aten.cat.default, [make.call(aten.sin.default, x) for _ in range(4)])

    found = stages(graph_module(build), graph_module(build))
    assert all(one == other for one, other in found)


def test_renamed_inputs_are_found_by_their_users() -> None:
    def build(make: Maker, x: fx.Node) -> fx.Node:
        return make.call(aten.mul.Tensor, make.call(aten.sin.default, x), 2)

    found = stages(graph_module(build), graph_module(build, inputs=["tokens"]))
    assert ("x", "tokens") in found


def test_nothing_in_common() -> None:
    before = graph_module(lambda make, x: make.call(aten.sin.default, x))
    after = graph_module(lambda make, x: make.call(aten.cat.default, [x, x]), inputs=["y"])
    found = stages(before, after)
    assert ("sin_default", "cat_default") not in found


def test_depth_is_not_limited() -> None:
    def deep(op: object) -> fx.GraphModule:
        def build(make: Maker, x: fx.Node) -> fx.Node:
            for index in range(3 * sys.getrecursionlimit()):
                x = make.call(op if index == 5 else aten.sin.default, x)
            return x

        return graph_module(build)

    before, after = Snapshot.of(deep(aten.cos.default)), Snapshot.of(deep(aten.tan.default))
    links = match(before, after)
    assert len(links.pairs) == len(before.nodes) - 1
