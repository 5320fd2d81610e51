"""Snapshots: what is read of a graph, what is left out, and that it survives JSON."""

from __future__ import annotations

import json
import operator
import sys

import pytest
import torch
from layout_graphs import call, module
from torch import fx, nn
from traces import before, traced
from viz_graphs import Maker, aten, graph_module, layers

from autodeploy.errors import OptionError
from autodeploy.graph.edit import PREPARE
from autodeploy.viz.arguments import Ref, Table, Text, argument_from_json, argument_to_json, read_argument
from autodeploy.viz.node import Node
from autodeploy.viz.snapshot import Snapshot


def named(snapshot: Snapshot, name: str) -> Node:
    (node,) = (node for node in snapshot.nodes if node.name == name)
    return node


def text(snapshot: Snapshot, name: str) -> str:
    return snapshot.format_node(named(snapshot, name))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "lfm2"])
def test_json_round_trip(model_type: str) -> None:
    snapshot = Snapshot.of(traced(model_type, 2), model_type)
    data = json.loads(json.dumps(snapshot.to_json()))
    assert Snapshot.from_json(data) == snapshot
    assert json.dumps(Snapshot.from_json(data).to_json()) == json.dumps(data)


def test_traced_model() -> None:
    snapshot = Snapshot.of(traced("llama", 2))
    linear = named(snapshot, "linear_1")
    assert (linear.module, linear.module_type) == ("model.layers.0.self_attn.k_proj", "Linear")
    assert linear.source.startswith("modeling_llama.py:")
    assert "key_states = self.k_proj(hidden_states)" in linear.source
    assert linear.short_target == "linear"
    weight = named(snapshot, "lm_head_weight")
    assert (weight.role, weight.module, str(weight.values[0]), weight.free) == (
        "weight",
        "lm_head",
        "f32[128, 64]",
        True,
    )


def test_symbolic_sizes_stay_symbols() -> None:
    tokens, *_ = (node for node in Snapshot.of(traced("llama", 2)).nodes if node.name == "input_ids")
    batch, length = tokens.values[0].shape
    assert isinstance(batch, str)
    assert isinstance(length, str)
    assert tokens.values[0].dtype == "int64"


def test_unbacked_sizes_are_not_evaluated() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero() * 2

    program = torch.export.export(Nonzero(), (torch.ones(3),))
    values = {node.target: node.values for node in Snapshot.of(program.module(check_guards=False)).nodes}
    assert values["aten.mul.Tensor"][0].shape == ("u0", 1)


def test_called_graphs_are_nested_and_seen_through() -> None:
    gm = before("lower_fields")
    snapshot = Snapshot.of(gm)
    inner = [node for node in snapshot.nodes if node.graph == PREPARE]
    assert len(inner) == len(gm.get_submodule(PREPARE).graph.nodes)  # type: ignore[union-attr]
    attention = next(node for node in snapshot.nodes if "paged_attention" in node.target)
    read = {snapshot.by_id[id].target for _, id in snapshot.inputs[attention.id]}
    assert "autodeploy_field.block_table.default" in read
    assert "operator.getitem" not in read
    field = next(node for node in inner if node.target == "autodeploy_field.block_table.default")
    assert len(snapshot.users[field.id]) > 1
    layouts = [node for node in snapshot.nodes if node.name == "layout" and not node.graph]
    assert {id for _, id in snapshot.inputs[field.id]} == {layouts[0].id}


def test_a_graph_that_is_called_twice_is_not_seen_through() -> None:
    inner = graph_module(lambda make, x: (make.call(aten.neg.default, x),))
    root = nn.Module()
    root.inner = inner
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = [graph.call_module("inner", (x,)) for _ in range(2)]
    graph.output(tuple(graph.call_function(operator.getitem, (node, 0)) for node in calls))
    snapshot = Snapshot.of(fx.GraphModule(root, graph))
    assert snapshot.source_of == {}
    assert [node.graph for node in snapshot.nodes].count("inner") == 3


def test_branches_are_nested() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    gm = torch.export.export(Branch(), (torch.ones(3),)).module(check_guards=False)
    assert {node.graph for node in Snapshot.of(gm).nodes} == {"", "true_graph_0", "false_graph_0"}


def test_defaults_and_keywords_do_not_show() -> None:
    def build(make: Maker, x: fx.Node) -> list[fx.Node]:
        return [make.call(aten.add.Tensor, x, x, alpha=1), make.call(aten.add.Tensor, x, other=x)]

    one, other = Snapshot.of(graph_module(build)).nodes[1:3]
    assert one.arguments == other.arguments == (("self", Ref(0)), ("other", Ref(0)))


def test_arguments_as_text() -> None:
    def build(make: Maker, x: fx.Node) -> list[fx.Node]:
        rows = make.graph.call_function(operator.getitem, (x, (slice(None, None), slice(1, None, 2), None)))
        typed = make.call(aten.to.dtype, rows, torch.float16)
        summed = make.graph.call_method("sum", (typed,), {"dim": -1})
        return [make.call(aten.cat.default, [summed, typed], 1), make.graph.call_function(torch.where, (x, x, 0.5))]

    snapshot = Snapshot.of(graph_module(build))
    assert text(snapshot, "getitem") == "getitem = operator.getitem(x, [:, 1::2, None])"
    assert text(snapshot, "to_dtype") == "to_dtype = aten.to.dtype(getitem, dtype=torch.float16)"
    assert text(snapshot, "sum_1") == "sum_1 = sum(to_dtype, dim=-1)"
    assert text(snapshot, "cat_default") == "cat_default = aten.cat.default(tensors=[sum_1, to_dtype], dim=1)"
    assert text(snapshot, "where") == "where = torch.where(x, x, 0.5)"


def test_modules_are_described_by_their_options() -> None:
    texts = [text(Snapshot.of(fx.symbolic_trace(nn.Sequential(nn.Linear(4, size)))), "_0") for size in (4, 8)]
    assert "out_features=4" in texts[0]
    assert "out_features=8" in texts[1]


@pytest.mark.parametrize(
    "argument",
    [None, True, 1, 1.0, float("inf"), "x", Ref(3), Text("torch.int64"), (1, (Ref(2), ())), Table((("start", 1),))],
)
def test_arguments_survive_json(argument: object) -> None:
    data = json.loads(json.dumps(argument_to_json(argument)))  # type: ignore[arg-type]
    assert repr(argument_from_json(data)) == repr(argument)


def test_addresses_are_left_out() -> None:
    assert read_argument(object(), id) == Text("<object object>")


def test_nodes_without_anything() -> None:
    snapshot = Snapshot.of(graph_module(lambda make, x: make.graph.call_function(len, (x,))))
    node = snapshot.nodes[1]
    assert (node.target, node.values, node.module, node.source) == ("builtins.len", (), "", "")


def test_launches() -> None:
    def build(make: Maker, x: fx.Node) -> object:
        size = make.call(aten.sym_size.int, x, 0)
        twice = make.graph.call_function(operator.mul, (size, 2))
        return [make.call(aten.view.default, x, [twice]), make.call(aten.add.Tensor, x, 1)]

    nodes = Snapshot.of(graph_module(build)).nodes
    assert [node.name for node in nodes if not node.free] == ["add_tensor"]


def test_depth_is_not_limited() -> None:
    def build(make: Maker, x: fx.Node) -> fx.Node:
        for _ in range(5 * sys.getrecursionlimit()):
            x = make.graph.call_function(operator.add, (x, 1))
        return x

    snapshot = Snapshot.of(graph_module(build))
    assert Snapshot.from_json(json.loads(json.dumps(snapshot.to_json()))) == snapshot


def test_ids_are_the_callers(tmp_path) -> None:
    gm = layers(2, lambda index, make, x: make.call(aten.add.Tensor, x, index))
    numbers = {node: 10 * index for index, node in enumerate(gm.graph.nodes)}
    snapshot = Snapshot.of(gm, id_of=numbers.__getitem__)
    assert [node.id for node in snapshot.nodes] == [0, 10, 20, 30]
    assert snapshot.by_id[20].inputs == (("self", 10),)


def test_constants_and_layout_roles() -> None:
    gm = module(lambda graph, layout, x: call(aten.add.Tensor, layout, graph.get_attr("buffer")))
    assert {node.name: node.role for node in Snapshot.of(gm).nodes if node.role} == {
        "x": "tokens",
        "layout": "layout",
        "buffer": "constant",
    }


@pytest.mark.parametrize("data", [None, [], {}, {"schema": "autodeploy.snapshot/99"}])
def test_other_data_is_refused(data: object) -> None:
    with pytest.raises(OptionError, match=r"expected data of schema 'autodeploy\.snapshot/1'"):
        Snapshot.from_json(data)  # type: ignore[arg-type]
