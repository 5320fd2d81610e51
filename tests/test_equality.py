"""Equal keys exactly where values must be equal."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from tensor_forms import on_another_device, plain
from torch import Tensor, fx
from torch.export import Dim
from torch.nn import functional as F

from autodeploy.graph.aliasing import storages
from autodeploy.graph.equality import mark_constants, merge_equal, merge_equal_numbers, value_key
from autodeploy.graph.meta import VALUE
from autodeploy.graph.spelling import recorded_value

aten = torch.ops.aten


class Body(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def exported(function: Callable[..., Any]) -> fx.GraphModule:
    """`function` of x [n, m] and y [m], both symbolic, as ATen with shapes."""
    inputs = (torch.zeros(3, 5), torch.zeros(5))
    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "y": {0: Dim.DYNAMIC}}
    body = Body(function)
    gm = torch.export.export(body, inputs, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    mark_constants(gm, set(storages(body)))
    return gm


def num_merged(gm: fx.GraphModule) -> int:
    numbers = [node for node in gm.graph.nodes if isinstance(recorded_value(node), torch.SymInt)]
    merge_equal_numbers(numbers)
    nodes = [node for node in gm.graph.nodes if node.op in ("call_function", "get_attr") and node not in numbers]
    merged = len(merge_equal(gm.graph, nodes))
    gm.graph.lint()
    return merged


EQUAL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "by position and by name": lambda x, y: aten.add.Tensor(x, 1) * aten.add.Tensor(x, other=1),
    "by default": lambda x, y: aten.add.Tensor(x, 1) * aten.add.Tensor(x, 1, alpha=1),
    "sizes of two tensors": lambda x, y: torch.arange(x.shape[1]) * torch.arange(y.shape[0]) * (x[0] + y),
    "sizes of a result": lambda x, y: torch.arange(x.sin().shape[0]) * torch.arange(x.shape[0]) + x.sum(),
    "lists": lambda x, y: x.max(dim=1).values * x.max(dim=1).values,
    "constants": lambda x, y: x * torch.tensor([1.0, 2.0]).sum() * torch.tensor([1.0, 2.0]).sum(),
    "branches": lambda x, y: _branch(x, torch.sin) * _branch(x, torch.sin),
}
DIFFERENT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "numbers of other types": lambda x, y: torch.full_like(x, 1) * torch.full_like(x, True),
    "zeros": lambda x, y: torch.full_like(x, 0.0) * torch.full_like(x, -0.0),
    "dtypes": lambda x, y: torch.arange(5) * torch.arange(5, dtype=torch.int32) * torch.arange(5.0),
    "fills of other dtypes": lambda x, y: torch.zeros(5) * torch.zeros(5, dtype=torch.int64),
    "sizes": lambda x, y: torch.arange(x.shape[1]).sum() * torch.arange(x.shape[0]).sum(),
    "constants": lambda x, y: x * torch.tensor([1.0, 0.0]).sum() * torch.tensor([1.0, -0.0]).sum(),
    "constants of other dtypes": lambda x, y: x * torch.tensor([1.0]) * torch.tensor([1], dtype=torch.int32),
    "branches": lambda x, y: _branch(x, torch.sin) * _branch(x, torch.cos),
    "arguments in branches": lambda x, y: _branch(x, lambda x: x + 1) * _branch(x, lambda x: x + 2),
    "places in branches": lambda x, y: _branch(x, lambda x: (x + 1) / x) * _branch(x, lambda x: x / (x + 1)),
    "dtypes in branches": lambda x, y: _branch(x, lambda x: x.to(torch.half) + x) * _branch(x, lambda x: x.int() + x),
}


def _branch(x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cond(x.sum() > 0, body, lambda x: x - 1, (x,))


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name: str) -> None:
    gm = exported(EQUAL[name])
    x, y = torch.randn(4, 7), torch.randn(7)
    want = gm(x, y)
    assert num_merged(gm)
    gm.recompile()
    assert torch.equal(gm(x, y), want)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name: str) -> None:
    gm = exported(DIFFERENT[name])
    ops = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    num_merged(gm)
    kept = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert set(kept) == ops
    assert max(map(kept.count, ops - {"aten.mul.Tensor"}), default=1) >= 2 or len(ops) > 2


def test_equal_sizes_are_read_from_the_first() -> None:
    gm = exported(lambda x, y: torch.arange(x.shape[0]) + x.sum())
    (size,) = (node for node in gm.graph.nodes if isinstance(recorded_value(node), torch.SymInt))
    (reader,) = size.users
    with gm.graph.inserting_after(size):
        again = gm.graph.node_copy(size)
    reader.replace_input_with(size, again)
    assert [merge_equal_numbers([size, again]) for _ in range(2)] == [1, 0]
    assert reader.all_input_nodes == [size]


def test_equal_conditions_are_read_from_the_first() -> None:
    gm = exported(lambda x, y: (x.sum(), y * 2))
    (size,) = (VALUE.of(node).shape[0] for node in gm.graph.find_nodes(op="placeholder")[:1])
    graph = fx.Graph()
    length = graph.placeholder("length")
    conditions = [graph.call_function(operator.eq, (length, 7)) for _ in range(2)]
    for node in conditions:
        VALUE.set(node, size == 7)
    graph.output(tuple(conditions))
    assert merge_equal_numbers(conditions) == 1
    assert graph.output_node().all_input_nodes == conditions[:1]


def test_other_spellings_are_compared_as_they_stand() -> None:
    """`F.embedding(ids, table)` is not `aten.embedding(table, ids)`: only a schema says which argument is which."""
    graph = fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    nodes = [
        graph.call_function(F.embedding, (x,), {"weight": y}),
        graph.call_function(F.embedding, (x,), {"weight": z}),
        graph.call_function(F.embedding, (x,), {"weight": y}),
        graph.call_method("clamp", (x, 0)),
        graph.call_method("clamp", (x, 0)),
        graph.call_method("clamp", (x, False)),
    ]
    graph.output(graph.call_function(torch.cat, (nodes,)))
    assert merge_equal(graph, nodes) == {nodes[2], nodes[4]}


LITERALS = [0, 1, True, False, 0.0, -0.0, 1.0, 0j, complex(0.0, -0.0), complex(-0.0, 0.0), 1 + 0j, None, "1", b"1"]
LITERALS += [..., slice(0, 1), slice(0, 1.0), [0], [0, 0], [], {"a": 0}, torch.int32, torch.int64, torch.strided]
LITERALS += [2**70, 0.1, "a word", b"a word", torch.device("cpu"), torch.device("meta"), torch.contiguous_format]
LITERALS += [torch.channels_last, torch.sparse_coo]


@pytest.mark.parametrize("target", [aten.add.Tensor, torch.add])
def test_no_two_literals_are_equal(target: Callable[..., Any]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    keys = [value_key(graph.call_function(target, (x, literal))) for literal in LITERALS]
    assert len(set(keys)) == len(LITERALS)
    again = [value_key(graph.call_function(target, (x, pickle.loads(pickle.dumps(each))))) for each in LITERALS]
    assert keys == again


def named(**tensors: Tensor) -> list[fx.Node]:
    """get_attr nodes of these tensors, one for each name."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        setattr(root, name, tensor)
    graph = fx.Graph()
    graph.output(graph.call_function(torch.cat, ([graph.create_node("get_attr", name) for name in tensors],)))
    return fx.GraphModule(root, graph).graph.find_nodes(op="get_attr")


def mark(nodes: list[fx.Node], owned: Collection[Any]) -> None:
    gm = nodes[0].graph.owning_module
    assert gm is not None
    mark_constants(gm, owned)


class Odd(torch.Tensor):
    pass


ZEROS = torch.zeros(4, 4)
NOT_THE_SAME: dict[str, tuple[Tensor, Tensor]] = {
    "buffers of equal bits": (torch.nn.Buffer(torch.zeros(3)), torch.nn.Buffer(torch.zeros(3))),
    "tensors of no memory": (torch.empty(3, device="meta"), torch.empty(3, device="meta")),
    "views from other places": (ZEROS[0], ZEROS[1]),
    "views of other strides": (ZEROS, ZEROS.t()),
    "views of other dtypes": (ZEROS, ZEROS.view(torch.int32)),
    "sparse tensors": (ZEROS.to_sparse(), ZEROS.to_sparse()),
    "lazily conjugated": ((ZEROS + 0j).conj(), (ZEROS + 0j).conj()),
    "lazily negated": (torch._neg_view(ZEROS + 0), torch._neg_view(ZEROS + 0)),
    "of a class that may hold more": (torch.zeros(3).as_subclass(Odd), torch.zeros(3).as_subclass(Odd)),
    "other shapes of one stride": (
        torch.zeros(2).as_strided((2, 1), (1, 1)),
        torch.zeros(2).as_strided((1, 2), (1, 1)),
    ),
}


@pytest.mark.parametrize("case", NOT_THE_SAME)
def test_tensors_of_the_model_are_equal_only_if_they_are_the_same(case: str) -> None:
    one, other = NOT_THE_SAME[case]
    nodes = named(one=one, other=other, again=one)
    mark(nodes, {*storages(one), *storages(other)})
    assert merge_equal(nodes[0].graph, nodes) == {nodes[2]}


UNKNOWN_BITS = [
    case for case in NOT_THE_SAME if case.startswith(("tensors of no", "sparse", "lazily", "of a", "other"))
]


@pytest.mark.parametrize("case", UNKNOWN_BITS)
def test_so_are_constants_of_tracing_whose_bits_do_not_say_all(case: str) -> None:
    one, other = NOT_THE_SAME[case]
    nodes = named(one=one, other=other, again=one)
    mark(nodes, ())
    assert merge_equal(nodes[0].graph, nodes) == {nodes[2]}


@pytest.mark.parametrize("value", [torch.tensor(1.5), torch.zeros(0), torch.full((2, 2), 3)[0:1].diagonal(0)])
def test_constants_of_tracing_are_equal_by_their_bits(value: Tensor) -> None:
    same = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    nodes = named(one=value, same=same, other=value.to(torch.complex64))
    mark(nodes, ())
    assert merge_equal(nodes[0].graph, nodes) == {nodes[1]}


def constant_key(value: Tensor) -> Any:
    (node,) = named(one=value)
    mark([node], ())
    return value_key(node)


def test_constants_are_told_apart_by_more_than_their_bytes() -> None:
    forms = plain("with a gradient", "parameter", "part of its memory", "another part")  # which make no other values
    assert len({constant_key(value) for value in forms.values()}) == len(forms)
    one, other = torch.zeros(2), torch.zeros(2)
    with on_another_device(other):
        assert constant_key(one) != constant_key(other)
    assert constant_key(one) == constant_key(other)


LEAF = torch.nn.Tanh()


def calling(leaf: torch.nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("leaf", (graph.placeholder("x"),)))
    return fx.GraphModule({"leaf": leaf}, graph)


def indexing(index: Any) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(operator.getitem, (graph.placeholder("x"), index)))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("make", "one", "other"), [(calling, LEAF, torch.nn.Sigmoid()), (indexing, [0, 1], (0, 1)), (indexing, 0, 1)]
)
def test_branches_are_equal_by_what_they_do(make: Callable[[Any], fx.GraphModule], one: Any, other: Any) -> None:
    root = torch.nn.ModuleDict({"one": make(one), "same": make(one), "other": make(other)})
    graph = fx.Graph()
    graph.output([graph.create_node("get_attr", name) for name in root])
    gm = fx.GraphModule(root, graph)
    keys = [value_key(node) for node in gm.graph.find_nodes(op="get_attr")]
    assert keys[0] == keys[1] != keys[2]


def test_two_values_that_a_caller_gets_stay_two() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    base = graph.call_function(aten.neg.default, (x,))
    view = graph.call_function(aten.t.default, (base,))
    same, third = (graph.call_function(aten.neg.default, (x,)) for _ in range(2))
    graph.output((view, same, graph.call_function(aten.sin.default, (third,))))
    assert merge_equal(graph, [base, view, same, third]) == {third}


def test_a_caller_may_get_one_of_them() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    inside, outside, other = (graph.call_function(aten.neg.default, (x,)) for _ in range(3))
    graph.output((outside, graph.call_function(aten.sin.default, (inside,)), other))
    assert merge_equal(graph, [inside, outside, other]) == {outside}


@pytest.mark.parametrize("first", [0, -1, 2**40])
def test_large_constants_are_compared_by_identity(first: int) -> None:
    root = torch.nn.Module()
    root.one = torch.nn.Buffer(torch.full((20_000,), first))  # more than 64 KiB, of fewer elements
    root.two, root.three = torch.nn.Buffer(root.one.clone()), torch.nn.Buffer(root.one)
    graph = fx.Graph()
    nodes = [graph.create_node("get_attr", name) for name in ("one", "two", "three")]
    graph.output(graph.call_function(torch.cat, (nodes,)))
    gm = fx.GraphModule(root, graph)
    nodes = gm.graph.find_nodes(op="get_attr")
    mark(nodes, ())
    assert merge_equal(gm.graph, nodes) == {nodes[2]}
