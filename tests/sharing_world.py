"""What generated programs stand on: inputs with odd strides, a module with buffers of all sorts, ops of our own."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from sharing_oracle import LOG
from sharing_program import Input
from torch import Tensor, fx, nn

ROLES = ("layout",) * 10 + ("constant", "tokens", "cache", "weight")
_SHAPES = ((), (3,), (4,), (2, 3), (4, 3), (1, 4), (3, 3), (2, 1, 3), (2, 3, 4), (1,), (0, 3))
_VALUES = (0.0, -0.0, 1.0, 2.0, -1.0, 0.5, 3.0, float("nan"), float("inf"), -2.5)
_TENSOR_TYPES = (torch.int64,) * 4 + (torch.float32,) * 4 + (torch.int32, torch.bool, torch.bool, torch.float64)
_TENSOR_TYPES += (torch.bfloat16, torch.complex64, torch.uint8)


def tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numel = max(1, torch.Size(shape).numel())
    if dtype is torch.int64 and rng.random() < 0.5:
        values: list[Any] = [rng.randrange(2) for _ in range(numel)]  # rows
    elif dtype.is_floating_point or dtype.is_complex:
        values = [rng.choice(_VALUES) for _ in range(numel)]
    else:
        values = [rng.randrange(0 if dtype is torch.uint8 else -3, 6) for _ in range(numel)]
    flat = torch.tensor(values, dtype=dtype)
    return flat[: torch.Size(shape).numel()].reshape(shape)


def strided(rng: random.Random, value: Tensor) -> Tensor:
    """The tensor, or a view: transposed, expanded, overlapping, inside of larger memory."""
    kind = rng.randrange(8)
    if kind == 0 and value.dim() > 1:
        return value.transpose(0, -1)
    if kind == 1:
        return value.expand(2, *value.shape)
    if kind == 2 and value.dim() == 1 and len(value) > 2:
        return value.as_strided((2, 2), (1, 1))
    if kind == 3 and value.dim() and len(value) > 1:
        return value[1:]
    if kind == 4 and value.dim() and len(value) > 1:
        return value[::2]
    return value


def inputs(rng: random.Random, may_share: bool) -> tuple[Input, ...]:
    found: list[Input] = []
    for _ in range(rng.randint(1, 4)):
        role = rng.choice(ROLES)
        if may_share and found and rng.random() < 0.5 and isinstance(found[-1].example, Tensor):
            found.append(Input(role, strided(rng, found[-1].example)))  # in the memory of the one before
        elif rng.random() < 0.1:
            found.append(Input(role, rng.choice((2, 3, 1, 0.5, True))))
        else:
            value = tensor(rng, rng.choice(_SHAPES), rng.choice(_TENSOR_TYPES))
            found.append(Input(role, strided(rng, value)))
    return tuple(found)


class Holder(nn.Module):
    """Gives its own buffer away."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Buffer(torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.kept


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(3, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


class Reader(nn.Module):
    """Reads a buffer without writing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Buffer(torch.zeros(3, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def body(function: Any, *rest: Any) -> fx.GraphModule:
    """A graph of one op, as higher-order ops take it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(function, (x, *rest)),))
    return fx.GraphModule(nn.Module(), graph)


def condition() -> fx.GraphModule:
    """The graph that says whether a loop goes on, which adds 1: as long as anything is just below 3."""
    graph = fx.Graph()
    near = graph.call_function(torch.isin, (graph.placeholder("x"), graph.get_attr("near")))
    graph.output(graph.call_function(torch.any, (near,)))
    return fx.GraphModule({"near": torch.arange(-3, 3)}, graph)


def writer() -> fx.GraphModule:
    """A graph that writes to its input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("add_", (x, 1))
    graph.output((x,))
    return fx.GraphModule(nn.Module(), graph)


def constant_body(value: float) -> fx.GraphModule:
    """A graph with a constant of its own."""
    root = nn.Module()
    root.register_buffer("c", torch.full((3,), value))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.add, (x, graph.get_attr("c"))),))
    return fx.GraphModule(root, graph)


@functools.cache
def world() -> nn.Module:
    """The one module that all programs use; whoever runs a program gives what it uses its first values again."""
    root = nn.Module()
    ones = torch.ones(3, dtype=torch.int64)
    root.register_buffer("bias_0", torch.zeros(3))
    root.register_buffer("bias_1", torch.zeros(3))  # equal bits, another owner
    root.register_buffer("minus_zero", -torch.zeros(3))
    root.register_buffer("count_0", ones.clone())
    root.register_buffer("count_1", ones.clone())
    root.register_buffer("tied_0", torch.arange(3))
    root.register_buffer("tied_1", root.tied_0)  # registered twice
    root.register_buffer("view", root.tied_0[1:])
    root.register_buffer("matrix", torch.arange(9.0).reshape(3, 3))
    root.register_buffer("transposed", torch.arange(9.0).reshape(3, 3).t())
    root.register_buffer("z_0", torch.tensor([0j, 1j, 0j]))
    root.register_buffer("z_1", torch.tensor([-0j, 1j, 0j]))
    root.register_buffer("whole", torch.tensor(2))
    root.register_buffer("real", torch.tensor(2.0))
    root.parameter = nn.Parameter(torch.arange(3.0), requires_grad=False)
    root.tied_parameter = root.parameter
    # As tracers keep literals: plain attributes.
    root._tensor_constant0 = ones.clone()
    root._tensor_constant1 = ones.clone()
    root._tensor_constant2 = torch.tensor([0.0, -0.0, float("nan")])
    root._tensor_constant3 = torch.tensor([0.0, 0.0, float("nan")])
    root._tensor_constant4 = torch.empty(3, device="meta", dtype=torch.int64)
    root.identity, root.relu_ = nn.Identity(), nn.ReLU(inplace=True)
    root.nested_relu_ = nn.Sequential(nn.ReLU(inplace=True))
    root.norm, root.norm_eval = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
    root.dropout, root.dropout_eval = nn.Dropout(0.5), nn.Dropout(0.5).eval()
    root.holder, root.counter, root.reader = Holder(), Counter(), Reader()
    root.table = nn.Embedding(6, 3, max_norm=1.0)
    with torch.no_grad():
        root.table.weight.copy_(torch.arange(18.0).reshape(6, 3))
    root.writer = writer()
    root.double_0, root.double_1 = body(torch.mul, 2), body(torch.mul, 2)
    root.double_float, root.halve = body(torch.mul, 2.0), body(torch.div, 2)
    root.plus_0, root.plus_1, root.plus_2 = constant_body(0.0), constant_body(0.0), constant_body(1.0)
    root.is_small, root.plus_one = condition(), body(torch.add, 1)
    root.noise = body(torch.rand_like)
    return root.requires_grad_(False)


ATTRIBUTES = (
    *("bias_0", "bias_1", "minus_zero", "count_0", "count_1", "tied_0", "tied_1", "view", "matrix", "transposed"),
    *("z_0", "z_1", "whole", "real", "parameter", "tied_parameter", "norm.running_mean", "norm.num_batches_tracked"),
    *("_tensor_constant0", "_tensor_constant1", "_tensor_constant2", "_tensor_constant3"),
    *("holder.kept", "counter.calls", "reader.offset", "table.weight"),
)
# Attributes that a careless key takes for one.
_FAMILIES = (
    ("bias_0", "bias_1", "minus_zero", "norm.running_mean"),
    ("count_0", "count_1", "_tensor_constant0", "_tensor_constant1"),
    ("_tensor_constant2", "_tensor_constant3"),
    ("tied_0", "tied_1", "view"),
    ("z_0", "z_1"),
    ("matrix", "transposed"),
    ("counter.calls", "reader.offset"),
)
TWINS = {name: family for family in _FAMILIES for name in family}
MODULES = (
    *("identity", "relu_", "nested_relu_", "norm", "norm_eval", "dropout", "dropout_eval", "holder", "counter"),
    *("reader", "table", "writer", "double_0", "noise", "plus_0"),
)
BODIES = ("double_0", "double_1", "double_float", "halve", "plus_0", "plus_1", "plus_2", "noise")


def remember(x: Tensor) -> Tensor:
    """Foreign code with an effect."""
    LOG.append(x.sum().item())
    return x


def bump(x: Tensor) -> Tensor:
    """Foreign code that writes."""
    return x.add_(1)


_LIBRARY = torch.library.Library("sharing", "DEF")
for _schema, (_function, _fake) in {
    "plus(Tensor x, int n=1) -> Tensor": (lambda x, n=1: x + n, lambda x, n=1: x + n),
    "two(Tensor x) -> (Tensor, Tensor)": (lambda x: (x + 1, x - 1), lambda x: (x + 1, x - 1)),
    "bump(Tensor(a!) x, int n) -> ()": (lambda x, n: x.add_(n) and None, lambda x, n: None),
    "log(Tensor x) -> ()": (lambda x: LOG.append(x.double().sum().item()), lambda x: None),
    "fill(Tensor x, *, Tensor(a!) out) -> Tensor(a!)": (lambda x, *, out: out.fill_(1), lambda x, *, out: out),
}.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(")[0], _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sharing::{_schema.split('(')[0]}", _fake, lib=_LIBRARY)
ops = torch.ops.sharing
