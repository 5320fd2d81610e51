"""`share_metadata`: all that depends on the layout alone goes into one node, once, and nothing else does."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_graphs import OPS, Build, Draw, call, example, module, random_module, run
from tiny_models import MODEL_TYPES, tokens
from torch import fx, nn
from traces import apply, before, text

from autodeploy.compiler import pipeline
from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.dependence import input_roles, split
from autodeploy.graph.edit import PREPARE, prepare_nodes
from autodeploy.graph.meta import CONSTANT, ROLE, VALUE
from passes import NestInputs, ShareMetadata

aten = torch.ops.aten


def share(gm: fx.GraphModule) -> list[str]:
    """Share, check what the pass owes, and give the names of the ops inside prepare_metadata."""
    want = run(gm)
    pipeline.run(gm, [ShareMetadata()])
    assert all(map(torch.equal, want, run(gm)))
    done = text(gm)
    assert ShareMetadata().apply(gm) == 0
    assert text(gm) == done
    inner = getattr(gm, PREPARE).graph.nodes if prepare_nodes(gm) else ()
    return [node.target.__name__.split(".")[0] for node in inner if node.op == "call_function"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_models_get_one_node(model_type: str) -> None:
    gm = before("share_metadata", model_type)
    naive = len(split(gm).metadata)
    assert apply(ShareMetadata(), gm) == naive
    assert len(prepare_nodes(gm)) == 1
    assert len(split(getattr(gm, PREPARE)).metadata) < naive


def test_layout_moves_and_activations_stay() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        inner = call(aten.cumsum.default, call(aten.neg.default, layout), 0)
        return call(aten.mul.Tensor, call(aten.sin.default, x), inner)

    gm = module(build)
    assert share(gm) == ["neg", "cumsum"]
    assert [node.target.__name__.split(".")[0] for node in _calls(gm)] == ["sin", "mul"]


def test_equal_values_are_computed_once_however_arguments_are_given() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        by_place, by_name = call(aten.add.Tensor, layout, 1), call(aten.add.Tensor, layout, other=1)
        by_default = call(aten.add.Tensor, layout, 1, alpha=1)
        by_everything = graph.call_function(aten.add.Tensor, (), {"other": 1, "self": layout})
        return tuple(call(aten.mul.Tensor, x, node) for node in (by_place, by_name, by_default, by_everything))

    assert share(module(build)) == ["add"]


def test_numbers_of_other_types_differ() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        numbers = [call(aten.full_like.default, layout, n, dtype=None) for n in (1, 1.0, True, 0.0, -0.0)]
        return tuple(call(aten.atan2.default, x, node) for node in numbers)

    assert share(module(build)) == ["full_like"] * 5


def test_random_numbers_are_neither_moved_nor_merged() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        size = call(aten.sym_size.int, layout, 0)
        noise = [graph.call_function(aten.rand.default, ([size],)) for _ in range(2)]
        noisy = [call(aten.bernoulli.default, layout) for _ in range(2)]
        return (*noise, *noisy, call(aten.add.Tensor, x, call(aten.neg.default, layout)))

    gm = module(build)
    pipeline.run(gm, [ShareMetadata()])
    assert sum(node.target in (aten.rand.default, aten.bernoulli.default) for node in gm.graph.nodes) == 4
    assert len(_calls(getattr(gm, PREPARE))) == 1


WRITTEN: dict[str, tuple[Build, list[str]]] = {
    "a value": (lambda g, layout, x: (y := call(aten.neg.default, layout), call(aten.add_.Tensor, y, x))[0], []),
    "through a view": (
        lambda g, layout, x: (
            y := call(aten.neg.default, layout),
            row := call(aten.select.int, y, 0, 1),
            call(aten.copy_.default, row, call(aten.select.int, x, 0, 0)),
            call(aten.add.Tensor, y, x),
        )[-1],
        [],
    ),
    "under an earlier view": (
        lambda g, layout, x: (
            y := call(aten.neg.default, layout),
            row := call(aten.select.int, y, 0, 1),
            call(aten.add_.Tensor, y, 1),
            call(aten.add.Tensor, x, row),
        )[-1],
        [],
    ),
    "the layout": (
        lambda g, layout, x: (
            call(aten.add_.Tensor, layout, 1),
            call(aten.add.Tensor, x, call(aten.neg.default, layout)),
        )[1],
        [],
    ),
    "a buffer": (
        lambda g, layout, x: (
            early := call(aten.add.Tensor, layout, g.get_attr("buffer")),
            call(aten.add_.Tensor, g.get_attr("buffer"), 1),
            late := call(aten.add.Tensor, layout, g.get_attr("buffer")),
            call(aten.sub.Tensor, early, late),
        )[-1],
        [],
    ),
    "a copy, not the value": (
        lambda g, layout, x: (
            y := call(aten.neg.default, layout),
            z := call(aten.add.Tensor, y, x),
            call(aten.add_.Tensor, z, y),
        )[-1],
        ["neg"],
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_to_stays_where_it_is(case: str) -> None:
    build, moved = WRITTEN[case]
    assert share(module(build)) == moved


def test_buffers_move_and_parameters_stay() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        sums = [call(aten.add.Tensor, layout, graph.get_attr(name)) for name in ("buffer", "parameter")]
        return tuple(call(aten.mul.Tensor, x, node) for node in sums)

    gm = module(build)
    assert share(gm) == ["add"]
    assert [str(node.target) for node in gm.graph.find_nodes(op="get_attr")] == ["parameter"]
    assert getattr(gm, PREPARE).buffer is gm.buffer


def test_a_buffer_that_both_sides_read_is_not_copied() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        table = graph.get_attr("buffer")
        return call(aten.mul.Tensor, call(aten.add.Tensor, x, table), call(aten.add.Tensor, layout, table))

    gm = module(build)
    assert share(gm) == ["add"]
    assert getattr(gm, PREPARE).buffer is gm.buffer


def test_only_what_is_read_outside_comes_out() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        first = call(aten.neg.default, layout)
        second = call(aten.cumsum.default, call(aten.abs.default, first), 0)
        return call(aten.mul.Tensor, call(aten.add.Tensor, x, first), second)

    gm = module(build)
    share(gm)
    outputs = getattr(gm, PREPARE).graph.output_node().args[0]
    assert [node.target for node in outputs] == [aten.neg.default, aten.cumsum.default]


def test_sizes_stay_free_and_go_in() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        early = call(aten.sin.default, x)
        size = call(operator.mul, call(aten.sym_size.int, x, 1), 2)
        places = graph.call_function(aten.arange.default, (size,))
        return call(aten.add.Tensor, early, call(aten.slice.Tensor, places, 0, 0, 6))

    gm = module(build)
    assert share(gm) == ["arange", "slice"]
    (prepare,) = prepare_nodes(gm)
    assert [arg.target for arg in prepare.all_input_nodes] == [operator.mul]


def test_a_size_of_metadata_that_both_sides_read() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        size = call(aten.sym_size.int, call(aten.neg.default, layout), 0)
        return call(aten.add.Tensor, layout, size), call(aten.add.Tensor, x, size)

    assert share(module(build)) == ["neg", "sym_size", "add"]


def test_lists_move_with_their_items() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        halves = [call(aten.split.Tensor, layout, 3, 1) for _ in range(2)]
        items = [call(operator.getitem, half, 1) for half in halves]
        both = call(operator.getitem, call(aten.chunk.default, layout, 2, 1), 0)
        return tuple(
            call(aten.add.Tensor, call(aten.select.int, x, 1, 0), call(aten.sum.dim_IntList, y, [1]))
            for y in (*items, both)
        )

    assert share(module(build)) == ["split", "getitem", "chunk", "getitem", "sum", "sum"]


def test_what_comes_later_is_absorbed() -> None:
    gm = module(lambda graph, layout, x: call(aten.add.Tensor, x, call(aten.neg.default, layout)))
    share(gm)
    gm.buffer = torch.nn.Buffer(example(2))
    output = gm.graph.output_node()
    layout, before_output = gm.graph.find_nodes(op="placeholder")[1], output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        again = call(aten.add.Tensor, call(aten.neg.default, layout), gm.graph.get_attr("buffer"))
        output.args = (call(aten.mul.Tensor, before_output, again),)
    assert share(gm) == ["neg", "add"]
    assert len(prepare_nodes(gm)) == 1


def test_what_is_made_of_sizes_is_absorbed_later() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        sizes = [call(aten.sym_size.int, x, dim) for dim in (0, 1)]
        filled = graph.call_function(aten.full.default, (sizes, 2))
        return call(aten.add.Tensor, x, call(aten.mul.Tensor, filled, graph.get_attr("buffer")))

    gm = module(build)
    share(gm)
    output = gm.graph.output_node()
    (made,) = gm.graph.find_nodes(op="call_function", target=operator.getitem)
    with gm.graph.inserting_before(output):
        output.args = (call(aten.mul.Tensor, output.all_input_nodes[0], call(aten.neg.default, made)),)
    assert share(gm) == ["full", "mul", "neg"]
    assert dict(getattr(gm, PREPARE).named_buffers()) == {"buffer": gm.buffer}


def test_values_may_be_recorded_of_some_nodes_only() -> None:
    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        made = [call(op, layout) for op in (aten.neg.default, aten.abs.default)]
        VALUE.set(made[0], example(4))
        return tuple(call(aten.add.Tensor, x, node) for node in made)

    assert share(module(build)) == ["neg", "abs"]


def test_modules_of_others_stay() -> None:
    gm = module(lambda graph, layout, x: call(aten.sin.default, x))
    gm.leaf = nn.Tanh()
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        made = gm.graph.call_module("leaf", (gm.graph.find_nodes(op="placeholder")[1],))
        output.args = (call(aten.add.Tensor, output.all_input_nodes[0], call(aten.neg.default, made)),)
    assert share(gm) == []


def test_constants_of_one_name_stay_two() -> None:
    """What is inside keeps its constant where somebody has given its name to another since."""
    gm = module(
        lambda graph, layout, x: call(aten.add.Tensor, x, call(aten.add.Tensor, layout, graph.get_attr("buffer")))
    )
    share(gm)
    inside = gm.buffer
    gm.buffer = torch.nn.Buffer(example(2) * 4)
    output = gm.graph.output_node()
    layout, before_output = gm.graph.find_nodes(op="placeholder")[1], output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        again = call(aten.add.Tensor, layout, gm.graph.get_attr("buffer"))
        output.args = ((before_output, call(aten.mul.Tensor, before_output, again)),)
    x, layout = example(3), example(4)
    gm.recompile()
    want = gm(x, layout)
    for _ in range(2):
        pipeline.run(gm, [ShareMetadata()])
        assert all(map(torch.equal, want, gm(x, layout)))
    assert torch.equal(want[0], x + (layout + inside))
    assert {id(constant) for constant in getattr(gm, PREPARE).buffers()} == {id(inside), id(gm.buffer)}


def test_constants_that_metadata_does_not_need_stay() -> None:
    """A number that both read is computed inside and read outside; weights made with it are not made at the start."""

    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        scale = call(aten.sum.default, graph.get_attr("buffer"))
        weight = call(aten.mul.Tensor, graph.get_attr("buffer"), scale)
        return call(aten.add.Tensor, x, weight), call(aten.add.Tensor, x, call(aten.mul.Tensor, layout, scale))

    gm = module(build)
    assert share(gm) == ["sum", "mul"]
    assert [node.target.__name__.split(".")[0] for node in _calls(gm)] == ["mul", "add", "add"]


def test_sizes_are_read_where_they_are_asked() -> None:
    """Before and after a write that changes them; `n += 1` changes n for all who read it."""

    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        first = graph.call_method("size", (x, 0))
        more = graph.call_function(operator.iadd, (graph.call_method("size", (x, 0)), 5))
        graph.call_method("t_", (x,))
        last = graph.call_method("size", (x, 0))
        return tuple(call(aten.full_like.default, layout, size) for size in (first, more, last))

    gm = module(build)
    pipeline.run(gm, [ShareMetadata()])
    assert [int(value[0, 0]) for value in gm(example(3), example(4))] == [4, 9, 6]


def test_what_is_metadata_no_longer_comes_out_again() -> None:
    """A number that prepare_metadata reads is changed by what has come since."""

    def build(graph: fx.Graph, layout: fx.Node, x: fx.Node) -> fx.Node:
        return call(aten.add.Tensor, x, call(aten.mul.Tensor, layout, graph.call_method("size", (layout, 1))))

    gm = module(build)
    share(gm)
    output, size = gm.graph.output_node(), gm.graph.find_nodes(op="call_method", target="size")[0]
    with gm.graph.inserting_before(output):
        more = call(aten.mul.Tensor, output.args[0], gm.graph.call_function(operator.iadd, (size, 1)))
        output.args = ((more, call(aten.mul.Tensor, output.args[0], size)),)
    x, layout = example(3), example(4)
    gm.recompile()
    want = gm(x, layout)
    pipeline.run(gm, [ShareMetadata()])
    assert not prepare_nodes(gm)
    assert all(map(torch.equal, want, gm(x, layout)))


def test_constants_that_may_reach_the_caller_stay_two_the_second_time() -> None:
    """`+` may be that of lists, which hold what they join; then the caller is given the constant."""
    root = torch.nn.Module()
    root.one, root.same = torch.nn.Buffer(torch.ones(4, 6)), torch.nn.Buffer(torch.ones(4, 6))
    graph = fx.Graph()
    layout = graph.placeholder("layout")
    ROLE.set(layout, "layout")
    same, one = graph.create_node("get_attr", "same"), graph.create_node("get_attr", "one")
    CONSTANT.set(one, True)
    CONSTANT.set(same, True)
    joined = call(operator.add, call(aten.sin.default, layout), one)
    graph.output((call(aten.neg.default, one), call(aten.clone.default, same), joined))
    gm = fx.GraphModule(root, graph)
    pipeline.run(gm, [ShareMetadata()])
    done = text(gm)
    assert ShareMetadata().apply(gm) == 0
    assert text(gm) == done


def test_a_graph_without_roles_is_shared_by_the_dtypes_of_its_inputs() -> None:
    gm = before("nest_inputs")
    want = gm(**tokens(2, 9))
    assert pipeline.run(gm, [ShareMetadata()])[0].matches
    assert torch.equal(gm(**tokens(2, 9)), want)
    assert ShareMetadata().apply(gm) == 0
    with pytest.raises(UnsupportedFeature, match="shared already"):
        NestInputs().apply(gm)


@pytest.mark.parametrize(
    ("value", "role"),
    [
        (torch.zeros(2, dtype=torch.int64), "layout"),
        (torch.ones(2) > 0, "layout"),
        (3, "layout"),
        (True, "layout"),
        (1.5, "layout"),
        (torch.zeros(2), None),
        (torch.zeros(2) * 1j, None),
        (nn.Parameter(torch.ones(2) > 0, False), None),
        (None, None),
    ],
)
def test_inputs_without_a_role_are_judged_by_their_values(value: object, role: str | None) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    VALUE.set(node, value)
    assert input_roles(graph) == {node: role}
    ROLE.set(graph.placeholder("layout"), "layout")
    assert (input_roles(graph)[node] == "layout") == isinstance(value, int | float), "others have been given a role"


def test_where_nothing_moves_what_was_merged_is_counted() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = (graph.call_function(aten.arange.default, (4,)) for _ in range(2))
    graph.output(call(aten.add.Tensor, call(aten.mul.Tensor, x, first), second))
    gm = fx.GraphModule(nn.Module(), graph)
    assert [ShareMetadata().apply(gm) for _ in range(2)] == [1, 0]


def test_a_graph_without_metadata_is_left_alone() -> None:
    gm = fx.symbolic_trace(torch.nn.Linear(3, 4))
    graph = text(gm)
    assert ShareMetadata().apply(gm) == 0
    assert text(gm) == graph


DRAWS = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 30), st.integers(0, 30), st.integers(0, 3)), max_size=24
)


@settings(max_examples=100, deadline=None)
@given(DRAWS)
def test_random_graphs(draws: list[Draw]) -> None:
    share(random_module(draws))


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
