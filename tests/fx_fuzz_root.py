"""What random graphs stand on: their inputs, the module that holds their attributes, and ops of this test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, fx, nn

COLUMNS = 6
LOG: list[tuple[str, list[float]]] = []  # what ops with effects saw, in order


def _integers(n: int, generator: Generator) -> Tensor:
    return torch.randint(-4, 6, (n, COLUMNS), generator=generator)


def _floats(n: int, generator: Generator) -> Tensor:
    return _integers(n, generator) / 2


# Name of the placeholder: its role, and how to make it for a size n.
INPUTS: dict[str, tuple[str, Callable[[int, Generator], Any]]] = {
    "layout": ("layout", _integers),
    "positions": ("layout", _floats),
    "mask": ("layout", lambda n, generator: _integers(n, generator) > 0),
    "size": ("layout", lambda n, generator: n),
    "x": ("tokens", _floats),
    "ids": ("tokens", _integers),
    "cache": ("cache", _floats),
    "weight": ("weight", lambda n, generator: _floats(COLUMNS, generator)),
    "table": ("constant", lambda n, generator: _floats(1, generator)[0]),
    "alpha": ("constant", lambda n, generator: 0.5),
}

_ROW = torch.arange(COLUMNS) / 2 - 1
_ATTRIBUTES = {
    "buffer": _ROW,
    "twin": _ROW,  # equal to buffer, under another name
    "buffer64": _ROW.double(),
    "counter": torch.arange(COLUMNS),
    "zero": torch.zeros(COLUMNS),
    "minus_zero": -torch.zeros(COLUMNS),
    "nan": torch.full((COLUMNS,), float("nan")),
    "twin_nan": torch.full((COLUMNS,), float("nan")),
    "matrix": torch.arange(COLUMNS**2).reshape(COLUMNS, COLUMNS) / 4,
    "twisted": torch.arange(COLUMNS**2).reshape(COLUMNS, COLUMNS).t() / 4,
    "scalar": torch.tensor(2.0),
}
ATTRIBUTES = [*_ATTRIBUTES, "parameter", "view", "twisted_view", "inner.offset", "norm.running_mean"]
MODULES = ("identity", "relu_", "norm", "norm_eval", "dropout", "linear", "counting")


class Counting(nn.Module):
    """Adds to a buffer of its own at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(COLUMNS))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def body(function: Callable[..., Any], num_inputs: int = 1) -> fx.GraphModule:
    """A graph for a higher-order op to run: a tuple of one result."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"a{index}") for index in range(num_inputs)]
    graph.output((graph.call_function(function, (*inputs, 2)[:2]),))
    return fx.GraphModule(nn.Module(), graph)


def make_root() -> nn.Module:
    """A module with all attributes and submodules that a graph may name."""
    root = nn.Module()
    for name, value in _ATTRIBUTES.items():
        setattr(root, name, nn.Buffer(value.clone()))
    root.view = root.buffer[:]  # shares its storage
    root.twisted_view = root.matrix.t()
    root.parameter = nn.Parameter(_ROW.clone(), requires_grad=False)
    root.inner = nn.Module()
    root.inner.offset = nn.Buffer(_ROW + 1)
    root.identity, root.relu_ = nn.Identity(), nn.ReLU(inplace=True)
    root.norm, root.norm_eval = nn.BatchNorm1d(COLUMNS), nn.BatchNorm1d(COLUMNS).eval()
    root.dropout, root.counting = nn.Dropout(0.5), Counting()
    root.linear = nn.Linear(COLUMNS, COLUMNS, bias=False)
    root.linear.weight.data.copy_(torch.eye(COLUMNS))
    root.twice, root.twice_again = body(torch.ops.aten.mul.Tensor), body(torch.ops.aten.mul.Tensor)
    root.less = body(torch.ops.aten.sub.Tensor)
    root.times_row = body(torch.ops.aten.mul.Tensor, 2)
    return root.requires_grad_(False)


def state(root: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a graph over `root` may write to, by name."""
    return dict(root.named_parameters()) | dict(root.named_buffers())


def restore(root: nn.Module, values: dict[str, Tensor]) -> None:
    """Give each tensor of `root` its first values again, and the tensors that are views with it."""
    for name, tensor in state(root).items():
        tensor.copy_(values[name])
    LOG.clear()


def _log(name: str, x: Tensor) -> None:
    LOG.append((name, x.double().flatten().tolist()))


def remember(x: Tensor) -> Tensor:
    """A Python function with an effect, as a graph holds it that was recorded from foreign code."""
    _log("remember", x)
    return x.clone()


def _bump(x: Tensor, n: int) -> None:
    x.add_(n)


def _cumsum_into(x: Tensor, out: Tensor) -> Tensor:
    return out.copy_(x.cumsum(0))


def _noise(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape)


_LIBRARY = torch.library.Library("fx_fuzz", "DEF")  # the ops live as long as it does
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "opaque(Tensor x, int n=1) -> Tensor": (lambda x, n=1: x * n + 1, lambda x, n=1: x * n),
    "pair(Tensor x) -> (Tensor, Tensor)": (lambda x: (x + 1, x - 1), lambda x: (x + 1, x - 1)),
    "parts(Tensor x) -> Tensor[]": (lambda x: [x + 1, x * 2], lambda x: [x + 1, x * 2]),
    "bump(Tensor(a!) x, int n) -> ()": (_bump, lambda x, n: None),
    "cumsum_into(Tensor x, *, Tensor(a!) out) -> Tensor(a!)": (_cumsum_into, lambda x, *, out: out),
    "log(Tensor x) -> ()": (lambda x: _log("log", x), lambda x: None),
    "noise(Tensor x) -> Tensor": (_noise, lambda x: x + 0.5),
}
for _schema, (_function, _fake) in _OPS.items():
    _name = _schema.split("(")[0]
    _tags = (torch.Tag.nondeterministic_seeded,) if _name == "noise" else ()
    _LIBRARY.define(_schema, tags=_tags)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fx_fuzz::{_name}", _fake, lib=_LIBRARY)
ops = torch.ops.fx_fuzz
torch.fx.node.has_side_effect(ops.log.default)
