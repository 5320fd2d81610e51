"""Random graphs as torch's tracers write them down: the same programs with symbolic sizes in `meta["val"]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fx_fuzz_root import INPUTS
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from autodeploy.graph.meta import ROLE

MakeInputs = Callable[[int], list[Any]]


def make_inputs(gm: fx.GraphModule) -> MakeInputs:
    """Inputs of a graph that was built by hand, for a size n; equal ones every time."""
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    return lambda size: [
        INPUTS[name][1](size, torch.Generator().manual_seed(index)) for index, name in enumerate(names)
    ]


def with_make_fx(gm: fx.GraphModule, size: int) -> tuple[fx.GraphModule, MakeInputs]:
    """ATen with mutation and views as they are."""
    make = make_inputs(gm)
    with torch.no_grad():
        traced = make_fx(gm, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*make(size))
    _give_roles(traced, _roles(gm))
    return traced, make


def with_aot(gm: fx.GraphModule, size: int) -> tuple[fx.GraphModule, MakeInputs]:
    """Functional ATen, where parameters, buffers and new values of what was written to are inputs and outputs."""
    make, module = make_inputs(gm), _Flat(gm)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in make(size)]
    with torch.no_grad(), mode:
        traced, signature = aot_export_module(module, inputs, trace_joint=False)
    names = [signature.inputs_to_parameters[name] for name in signature.inputs_to_parameters]
    names += [signature.inputs_to_buffers[name] for name in signature.inputs_to_buffers]
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    first = {name: state[name].clone() for name in names}
    _give_roles(traced, ["weight"] * len(signature.parameters) + ["constant"] * len(signature.buffers) + _roles(gm))
    return traced, lambda size: [*(value.clone() for value in first.values()), *make(size)]


class _Flat(nn.Module):
    """Returns the leaves of what a graph returns, as AOTAutograd asks."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return tuple(pytree.tree_leaves(self.gm.forward(*inputs)))


def with_export(gm: fx.GraphModule, size: int) -> tuple[fx.GraphModule, MakeInputs]:
    """A module of torch.export, before decomposition."""
    make = make_inputs(gm)
    values = make(size)
    dims = [
        {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() == 2 and len(value) == size else None
        for value in values
    ]
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        shapes = dict(zip(names, dims, strict=True))
        exported = torch.export.export(gm, tuple(values), dynamic_shapes=shapes, strict=False)
    traced = exported.module(check_guards=False)
    _give_roles(traced, _roles(gm))
    return traced, make


TRACERS = {"make_fx": with_make_fx, "aot": with_aot, "export": with_export}


def _roles(gm: fx.GraphModule) -> list[str]:
    return [ROLE.of(node) for node in gm.graph.find_nodes(op="placeholder")]


def _give_roles(gm: fx.GraphModule, roles: list[str]) -> None:
    gm.meta.clear()  # export passes on what is known of the graph that was traced
    for node, role in zip(gm.graph.find_nodes(op="placeholder"), roles, strict=True):
        ROLE.set(node, role)
