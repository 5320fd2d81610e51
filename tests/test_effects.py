"""What a node may do besides giving its value, in every spelling of FX."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from autodeploy.graph.aliasing import aliased, mutated, returned, writes
from autodeploy.graph.dependence import find_scalars, input_roles
from autodeploy.graph.effects import (
    EFFECTS,
    HOST,
    RANDOM,
    UNBACKED,
    UNKNOWN,
    WRITES,
    autocast_change,
    changes_surroundings,
    impurity,
    is_needed,
    is_pure,
)
from autodeploy.graph.meta import CONSTANT, ROLE, VALUE

aten = torch.ops.aten
Make = Callable[[fx.Graph, fx.Node], fx.Node]


def function(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Make:
    return lambda graph, x: graph.call_function(target, (x, *args), kwargs)


def method(name: str, *args: Any, **kwargs: Any) -> Make:
    return lambda graph, x: graph.call_method(name, (x, *args), kwargs)


def one(make: Make) -> tuple[fx.Node, fx.Node]:
    """An input and the node that `make` puts behind it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    return x, make(graph, x)


PURE: dict[str, Make] = {
    "an overload": function(aten.clamp.default, 0),
    "a torch function": function(torch.clamp, min=0),
    "a functional": function(F.softmax, dim=-1),
    "a method": method("clamp", min=0),
    "a cast": method("float"),
    "a size": method("size", 0),
    "an operator": function(operator.add, 1),
    "an index": function(operator.getitem, 0),
    "mathematics": function(math.sqrt),
    "symbolic mathematics": function(torch.sym_max, 2),
    "a shape": function(getattr, "shape"),
    "a view": function(getattr, "mT"),
    "not in place": function(F.relu, inplace=False),
    "no norm": function(F.embedding, 0, max_norm=None),
}
IMPURE: dict[str, tuple[Make, str]] = {
    "a random overload": (function(aten.bernoulli.default), RANDOM),
    "a random function": (function(torch.rand_like), RANDOM),
    "a random method": (method("bernoulli"), RANDOM),
    "an overload that writes": (function(aten.add_.Tensor, 1), WRITES),
    "a method that writes": (method("add_", 1), WRITES),
    "an operator that writes": (function(operator.iadd, 1), WRITES),
    "an assignment": (function(operator.setitem, 0, 1), WRITES),
    "out": (lambda graph, x: graph.call_function(torch.neg, (x,), {"out": x}), WRITES),
    "in place by name": (function(F.relu, inplace=True), WRITES),
    "in place by position": (function(F.relu, True), WRITES),
    "in place by a value": (lambda graph, x: graph.call_function(F.relu, (x,), {"inplace": x}), WRITES),
    "a norm of zero": (function(F.embedding, 0, max_norm=0), WRITES),
    "statistics": (function(aten.batch_norm.default), WRITES),
    "a check": (function(aten._assert_async.default), EFFECTS),
    "an item": (method("item"), HOST),
    "a list": (method("tolist"), HOST),
    "an array": (method("numpy"), HOST),
    "an overload's item": (function(aten._local_scalar_dense.default), HOST),
    "a foreign function of an op's name": (function(lambda x: x), UNKNOWN),
    "printing": (function(print), UNKNOWN),
    "an unknown higher-order op": (function(torch.ops.higher_order.run_with_rng_state), UNKNOWN),
    "a gradient": (function(getattr, "grad"), UNKNOWN),
    "identity": (function(operator.is_, None), UNKNOWN),
    "a call of anything": (function(operator.call), UNKNOWN),
    "a function that does more than its op": (function(F.fractional_max_pool2d, 2, output_size=1), UNKNOWN),
    "a method of an op's name that is none": (method("resize", 4), UNKNOWN),
}


@pytest.mark.parametrize("name", PURE)
def test_pure(name: str) -> None:
    _, node = one(PURE[name])
    assert impurity(node) is None
    assert is_pure(node)
    assert writes(node) == []
    assert not is_needed(node)


@pytest.mark.parametrize("name", IMPURE)
def test_impure(name: str) -> None:
    make, reason = IMPURE[name]
    x, node = one(make)
    assert impurity(node) == reason
    assert not is_pure(node)
    assert is_needed(node) == (reason != HOST)
    if reason == WRITES and name != "statistics":
        assert set(writes(node)) == {x}
        assert x in mutated(node.graph).values


VIEWS: dict[str, Make] = {
    "an overload": function(aten.view.default, [4]),
    "a method": method("reshape", 4),
    "a torch function": function(torch.transpose, 0, 1),
    "a torch function by name": lambda graph, x: graph.call_function(torch.t, (), {"input": x}),
    "an operator": function(operator.getitem, 0),
    "a cast that may give the same": method("float"),
    "an attribute": function(getattr, "T"),
    "an op whose schema says nothing": function(aten.type_as.default, 0),
    "an unknown function": function(print),
    "a list twice over": function(operator.mul, 2),
    "a list and a list": lambda graph, x: graph.call_function(operator.add, (x, x)),
    "an array of its memory": method("numpy"),
    "a product of one": lambda graph, x: graph.call_function(torch.cartesian_prod, (x,)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_storage(name: str) -> None:
    x, node = one(VIEWS[name])
    assert aliased(node) == [x]
    node.graph.call_method("zero_", (node,))
    node.graph.output(())
    assert mutated(node.graph).values >= {x, node}


def test_statistics_are_written_to_and_nothing_else() -> None:
    x, _, _, mean, var = nodes = inputs(*[torch.zeros(2)] * 5)
    node = x.graph.call_function(aten.batch_norm.default, (*nodes, True, 0.1, 1e-5, False))
    assert writes(node) == [mean, var]
    x.graph.output(node)
    assert mutated(x.graph).values >= {mean, var}


@pytest.mark.parametrize(
    "make",
    [
        function(aten.add.Tensor, 1),
        function(operator.mul, 2.0),
        function(operator.mul, 2j),
        function(F.softmax, dim=-1),
        method("clone"),
    ],
)
def test_new_values_share_nothing(make: Make) -> None:
    _, node = one(make)
    assert aliased(node) == []
    node.graph.output(node)
    assert returned(node.graph) == {node}


def test_what_is_returned_is_returned_with_its_base() -> None:
    x, base = one(function(aten.neg.default))
    view = base.graph.call_function(aten.t.default, (base,))
    base.graph.output((view, {"x": x}))
    assert returned(base.graph) == {x, base, view}


def test_a_size_made_up_by_tracing() -> None:
    class Nonzero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero() * 2

    graph = torch.export.export(Nonzero(), (torch.arange(4),)).graph
    made, doubled = (node for node in graph.nodes if node.target in (aten.nonzero.default, aten.mul.Tensor))
    assert (impurity(made), is_needed(made)) == (UNBACKED, False)
    assert impurity(doubled) is None
    doubled.target = torch.ops.prims.mul.default
    assert impurity(doubled) is None


class Branches(torch.nn.Module):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.body, lambda x: x - 1, (x,))


@pytest.mark.parametrize(("body", "reason"), [(torch.sin, None), (torch.bernoulli, RANDOM)])
def test_a_branch_is_as_pure_as_its_bodies(body: Callable[..., Any], reason: str | None) -> None:
    program = torch.export.export(Branches(body), (torch.ones(3),))
    nodes = program.module(check_guards=False).graph.nodes
    assert [impurity(node) for node in nodes if node.target is torch.ops.higher_order.cond] == [reason]


def _running(region: str, body: Callable[..., Any], is_named: bool) -> fx.Node:
    """A node that runs the graph of a call of `body`, given by position or by name."""
    _, inner = one(function(body))
    inner.graph.output(inner)
    root, graph = {"body": fx.GraphModule({}, inner.graph)}, fx.Graph()
    named = {"x": graph.placeholder("x"), "body": graph.create_node("get_attr", "body")}
    target = getattr(torch.ops.higher_order, region)
    graph.output(graph.call_function(target, () if is_named else tuple(named.values()), named if is_named else {}))
    return fx.GraphModule(root, graph).graph.output_node().all_input_nodes[0]


REGIONS = ["cond", "while_loop", "scan", "associative_scan", "map_impl", "flex_attention", "invoke_subgraph"]
REGIONS += ["wrap_with_autocast", "wrap_with_set_grad_enabled"]


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_as_pure_as_its_body(region: str, is_named: bool) -> None:
    bodies = {torch.sin: None, torch.bernoulli: RANDOM, print: UNKNOWN, torch.relu_: WRITES}
    assert {body: impurity(_running(region, body, is_named)) for body in bodies} == bodies


@pytest.mark.parametrize(("op", "reason"), [(aten.mm.default, None), (aten.bernoulli.default, RANDOM)])
def test_an_op_in_another_dtype_is_as_pure_as_it_is(op: Callable[..., Any], reason: str | None) -> None:
    (x,) = inputs(torch.zeros(2, 2))
    assert impurity(x.graph.call_function(torch.ops.higher_order.out_dtype, (op, torch.int32, x, x))) == reason


@torch.compiler.nested_compile_region
def _region(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


class Regions(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _region(x) + _region(x)


def test_a_called_region_is_pure() -> None:
    found: list[str | None] = []

    def look(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        target = torch.ops.higher_order.invoke_subgraph
        found.extend(impurity(node) for node in gm.graph.find_nodes(op="call_function", target=target))
        return gm

    torch.compile(Regions(), backend=look)(torch.ones(3))
    assert found == [None, None]


@pytest.mark.parametrize("version", ["auto_functionalized", "auto_functionalized_v2"])
def test_what_was_made_functional_writes_to_copies(version: str) -> None:
    target = getattr(torch.ops.higher_order, version)
    x = inputs(torch.zeros(2))[0]
    node = x.graph.call_function(target, (aten.relu_.default,), {"self": x})
    assert (impurity(node), writes(node), aliased(node)) == (None, [], [])


PLAIN = [torch.meshgrid, torch.einsum, torch.cartesian_prod, torch.norm, torch.split, torch.tensordot, torch.block_diag]
PLAIN += [torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, torch.broadcast_tensors, F.pad, F.embedding]


@pytest.mark.parametrize("target", PLAIN)
def test_functions_written_in_python_that_only_compute(target: Callable[..., Any]) -> None:
    x = inputs(torch.zeros(2))[0]
    assert impurity(x.graph.call_function(target, (x, x))) is None


def test_a_size_is_no_number_where_any_of_what_it_is_measured_of_changes_size() -> None:
    x, y = inputs(torch.zeros(2), torch.zeros(2))
    for node in (x, y):
        ROLE.set(node, "tokens")
    number = x.graph.call_method("size", (y, 0))
    size = x.graph.call_method("size", (x, number))
    x.graph.call_method("t_", (x,))
    x.graph.output((size,))
    assert find_scalars(x.graph) == {number}


def test_a_region_that_nobody_knows_is_not_pure() -> None:
    root = torch.nn.Module()
    root.body = fx.symbolic_trace(torch.nn.Tanh())
    graph = fx.Graph()
    x, body = graph.placeholder("x"), graph.create_node("get_attr", "body")
    node = graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (body, x))
    graph.output(node)
    assert impurity(fx.GraphModule(root, graph).graph.output_node().all_input_nodes[0]) == UNKNOWN


def test_what_is_no_tensor_is_held_by_all_who_name_it() -> None:
    root = torch.nn.Module()
    root.one = root.other = object()
    graph = fx.Graph()
    one, other = graph.create_node("get_attr", "one"), graph.create_node("get_attr", "other")
    graph.output((one, graph.call_function(print, (other,))))
    gm = fx.GraphModule(root, graph)
    assert mutated(gm.graph).values >= set(gm.graph.find_nodes(op="get_attr"))


def test_names_of_one_storage() -> None:
    root = torch.nn.Module()
    root.whole = torch.nn.Buffer(torch.zeros(4))
    root.part = torch.nn.Buffer(root.whole[:2])
    graph = fx.Graph()
    whole, part = graph.create_node("get_attr", "whole"), graph.create_node("get_attr", "part")
    graph.output((whole, graph.call_method("add_", (part, 1))))
    gm = fx.GraphModule(root, graph)
    assert mutated(gm.graph).values >= set(gm.graph.find_nodes(op="get_attr"))


class Foreign(torch.nn.Module):
    """Nobody knows what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.nn.Buffer(torch.zeros(2))


def hooked(leaf: torch.nn.Module, kind: str = "forward_pre") -> torch.nn.Module:
    getattr(leaf, f"register_{kind}_hook")(lambda module, args, *result: args[0].zero_())
    return leaf


@pytest.mark.parametrize(
    ("leaf", "is_written"),
    [
        (torch.nn.Tanh(), False),
        (torch.nn.ReLU(inplace=True), True),
        (Foreign(), True),
        (torch.nn.Sequential(torch.nn.Tanh()), False),
        (torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU(inplace=True))), True),
        (torch.nn.Sequential(Foreign()), True),
        (hooked(torch.nn.Tanh()), True),
        (hooked(torch.nn.Tanh(), "forward"), True),
        (torch.nn.Sequential(hooked(torch.nn.Tanh())), True),
        (torch.nn.Embedding(4, 2, max_norm=1.0), True),
        (torch.nn.Embedding(4, 2), False),
    ],
)
def test_modules(leaf: torch.nn.Module, is_written: bool) -> None:
    root = torch.nn.Module()
    root.leaf = leaf
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("leaf", (x,)))
    gm = fx.GraphModule(root, graph)
    inputs = gm.graph.find_nodes(op="placeholder")
    assert mutated(gm.graph).values.issuperset(inputs) == is_written
    assert is_needed(gm.graph.find_nodes(op="call_module")[0])


@pytest.mark.parametrize("leaf", [torch.nn.BatchNorm1d(2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)), Foreign()])
def test_a_module_writes_to_its_tensors_under_any_name(leaf: torch.nn.Module) -> None:
    root = torch.nn.Module()
    root.leaf, root.alias = leaf, next(leaf.buffers())
    root.other = torch.nn.Buffer(torch.zeros(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    ROLE.set(x, "tokens")
    graph.call_module("leaf", (x,))
    graph.output([graph.create_node("get_attr", name) for name in ("alias", "other")])
    gm = fx.GraphModule(root, graph)
    alias, other = gm.graph.find_nodes(op="get_attr")
    assert alias in mutated(gm.graph).values
    assert other not in mutated(gm.graph).values


def test_modules_share_tensors_and_not_settings() -> None:
    root = torch.nn.ModuleDict({"norm": torch.nn.BatchNorm1d(2), "tanh": torch.nn.Tanh()})
    x, y = inputs(None, None)
    for node in (x, y):
        ROLE.set(node, "tokens")
    x.graph.output((x.graph.call_module("norm", (x,)), x.graph.call_module("tanh", (y,))))
    gm = fx.GraphModule(root, x.graph)
    assert [node in mutated(gm.graph).values for node in gm.graph.find_nodes(op="call_module")] == [True, False]


def test_what_a_module_returns_may_be_its_own() -> None:
    """Each call of it may give the same buffer, which is then written to."""
    root = torch.nn.Module()
    root.leaf = Foreign()
    root.alias = root.leaf.state
    graph = fx.Graph()
    graph.placeholder("x")
    first, second = graph.call_module("leaf"), graph.call_module("leaf")
    graph.output((graph.call_method("add_", (first, 1)), second, graph.create_node("get_attr", "alias")))
    gm = fx.GraphModule(root, graph)
    assert mutated(gm.graph).values >= {*gm.graph.find_nodes(op="call_module"), *gm.graph.find_nodes(op="get_attr")}


def inputs(*values: torch.Tensor | None) -> list[fx.Node]:
    """Inputs of a graph, with what a tracer has recorded of them."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta |= {} if value is None else {"val": value}
    return nodes


def test_a_write_is_seen_through_every_view_and_no_other_value() -> None:
    x, base = one(function(aten.neg.default))
    graph = base.graph
    view = graph.call_function(aten.t.default, (base,))
    part = graph.call_function(aten.select.int, (view, 0, 0))
    copy = graph.call_function(aten.clone.default, (view,))
    graph.call_function(aten.fill_.Scalar, (graph.call_function(aten.select.int, (base, 0, 1)), 0))
    graph.output(())
    assert mutated(graph).values >= {base, view, part}
    assert not mutated(graph).values & {x, copy}


def test_an_input_without_a_role_may_be_an_attribute() -> None:
    (written,) = inputs(torch.zeros(2))
    graph, root = written.graph, torch.nn.Module()
    for name, dtype in [("same", torch.float32), ("other", torch.int64), ("made", torch.float32)]:
        root.register_buffer(name, torch.zeros(2, dtype=dtype))
    same, other, made = (graph.create_node("get_attr", name) for name in ("same", "other", "made"))
    CONSTANT.set(made, True)
    graph.output((graph.call_method("add_", (written, 1)), same, other, made))
    gm = fx.GraphModule(root, graph)
    found = mutated(gm.graph).values
    assert [node in found for node in gm.graph.find_nodes(op="get_attr")] == [True, False, False]


def test_an_attribute_that_is_written_to_may_be_an_input_without_a_role() -> None:
    same, other = inputs(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    graph, root = same.graph, torch.nn.Module()
    root.register_buffer("state", torch.zeros(2))
    graph.output((graph.call_method("add_", (graph.create_node("get_attr", "state"), 1)), same, other))
    gm = fx.GraphModule(root, graph)
    found = mutated(gm.graph).values
    assert [node in found for node in gm.graph.find_nodes(op="placeholder")] == [True, False]


@torch.library.custom_op("test_effects::pick", mutates_args=())
def pick(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@pick.register_fake
def _(x):
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


class Picks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.test_effects.pick(x) * 2


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._higher_order_ops.map(lambda row: row.sin(), x)


def test_ops_of_others_may_make_up_sizes() -> None:
    graph = torch.export.export(Picks(), (torch.ones(4),)).graph
    assert [impurity(node) for node in graph.nodes if "pick" in str(node.target)] == [UNBACKED]


def test_a_mapped_body_is_pure() -> None:
    graph = torch.export.export(Maps(), (torch.ones(4, 2),)).module(check_guards=False).graph
    assert [impurity(node) for node in graph.nodes if "map_impl" in str(node.target)] == [None]


@pytest.mark.parametrize(("value", "is_kept"), [(torch.zeros(2), False), (None, True)])
def test_a_list_keeps_what_is_assigned_to_it_and_a_tensor_copies_it(value: torch.Tensor | None, is_kept: bool) -> None:
    holder, item = inputs(value, torch.zeros(2))
    holder.graph.call_function(operator.setitem, (holder, 0, item))
    holder.graph.output(())
    assert (item in returned(holder.graph)) == is_kept


def test_a_list_that_is_written_out_keeps_what_is_assigned_to_it() -> None:
    first, item = inputs(torch.zeros(2), torch.zeros(2))
    item.graph.call_function(operator.setitem, ([first], 0, item))
    item.graph.output(())
    assert returned(item.graph) == {first, item}


NAMES = {name.removeprefix("aten::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
RESIZING = sorted(name for name in NAMES if "resize" in name and name.endswith("_") and "::" not in name)
RESHAPING = [function(getattr(aten, name)) for name in [*RESIZING, "t_", "squeeze_", "transpose_", "set_"]]


@pytest.mark.parametrize("make", [*RESHAPING, method("t_"), IMPURE["out"][0], function(print)])
def test_what_writes_sizes(make: Make) -> None:
    x, _ = one(make)
    x.graph.output(())
    assert x in mutated(x.graph).sizes


@pytest.mark.parametrize("name", ["add_", "copy_", "index_put_"])
def test_what_writes_values_only(name: str) -> None:
    x, _ = one(function(getattr(aten, name)))
    x.graph.output(())
    assert x in mutated(x.graph).values
    assert x not in mutated(x.graph).sizes


def test_inputs_may_be_one_another() -> None:
    ints, floats = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    written, same, unknown, other = inputs(ints, ints, None, floats)
    written.graph.output(written.graph.call_method("add_", (written, 1)))
    assert mutated(written.graph).values >= {written, same, unknown}
    assert other not in mutated(written.graph).values
    ROLE.set(same, "layout")
    assert same not in mutated(written.graph).values


def test_numbers_are_written_to_by_operators_alone() -> None:
    (x,) = inputs(torch.zeros(2))
    first, second = (x.graph.call_method("size", (x, 0)) for _ in range(2))
    x.graph.call_function(print, (first,))
    x.graph.call_function(operator.iadd, (second, 1))
    written = mutated(x.graph).values
    assert second in written
    assert first not in written


def test_inputs_that_are_numbers_are_known_to_be() -> None:
    shape_env = ShapeEnv()
    size = shape_env.create_symintnode(shape_env.create_symbol(7, ConstantSource("n")), hint=7)
    numbers = [7, 1.5, True, size, torch.sym_float(size), size == 7]
    graph = fx.Graph()
    nodes = [graph.placeholder(f"n{index}") for index in range(len(numbers))]
    for node, number in zip(nodes, numbers, strict=True):
        VALUE.set(node, number)
    assert find_scalars(graph) == set(nodes)
    assert set(input_roles(graph).values()) == {"layout"}


@pytest.mark.parametrize("target", [aten.set_.source_Tensor, aten.set_data.default])
def test_what_is_made_to_share_storage_does(target: Callable[..., Any]) -> None:
    x, y = inputs(torch.zeros(2), torch.zeros(2))
    for node in (x, y):
        ROLE.set(node, "tokens")
    x.graph.call_function(target, (x, y))
    x.graph.output(())
    assert mutated(x.graph).values >= {x, y}


def test_autocast_regions_open_and_close() -> None:
    graph = fx.Graph()
    mode = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    graph.call_function(torch.ones, (1,))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
    assert [autocast_change(node) for node in graph.nodes] == [1, 0, -1]


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (torch.set_default_dtype, True),
        (torch.manual_seed, True),
        (torch._C._set_grad_enabled, False),
        (functools.partial(torch.manual_seed), True),
        (torch.ones, False),
    ],
)
def test_what_changes_how_others_compute(target: Callable[..., Any], changes: bool) -> None:
    graph = fx.Graph()
    assert changes_surroundings(graph.create_node("call_function", target, (1,), name="call")) == changes
    of_a_value = graph.create_node("call_function", target, (graph.placeholder("x"),), name="call")
    assert not changes_surroundings(of_a_value)
