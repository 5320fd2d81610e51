"""Graphs that others captured, in the one spelling that the passes read: ATen before dispatch, fake values in `val`.

Before, from Dynamo:                                After:
    x = l_x_.float()                                    to = aten.to.dtype(l_x_, torch.float32)
    y = torch.nn.functional.softmax(x, dim = -1)        softmax = aten.softmax.int(to, -1)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from autodeploy.errors import TraceError
from autodeploy.graph.meta import EXAMPLE_VALUE, VALUE


def from_dynamo(gm: fx.GraphModule) -> fx.GraphModule:
    """The ATen graph of what a torch.compile backend is given; inputs and outputs are the same, in the same order.

    Nodes keep module paths and source lines, inputs their names and roles; attributes are shared. Raises TraceError for
    a graph without the fake values that Dynamo leaves on it.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    values = [EXAMPLE_VALUE.get(node, VALUE.get(node)) for node in inputs]
    # Not that of the tracing context: Dynamo gives backends a fake mode other than the one it traced in.
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None or any(value is None for value in values):
        raise TraceError("a graph whose inputs have no fake values", fix="take it from a backend of torch.compile")
    with mode, torch.no_grad(), traceback.preserve_node_meta():
        traced = make_fx(fx.Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    for old, new in zip(inputs, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.name, new.target = old.name, old.target
        new.meta = {key: value for key, value in old.meta.items() if key != "example_value"} | {"val": VALUE.of(new)}
    traced.recompile()
    return traced


def functional(program: ExportedProgram) -> ExportedProgram:
    """`program` without ops that write over their arguments, where it has any; other ops stay as they are."""
    targets = (node.target for node in program.graph.nodes)
    if not any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets):
        return program
    with warnings.catch_warnings():
        # torch copies its own trees with a class that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return program.run_decompositions({})


def from_export(program: ExportedProgram, pick: Callable[[Any], Any] | None = None) -> fx.GraphModule:
    """The module of `program` as a graph of tensors in and one tensor out; other inputs, baked in anyway, are dropped.

    `pick` takes the output out of what the exported module returned; by default its `logits`, or its only tensor.
    Raises TraceError where that is no tensor.
    """
    module = functional(program).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    output = graph.output_node()
    leaves, spec = output.args[0], program.call_spec.out_spec
    assert isinstance(leaves, tuple | list)
    assert spec is not None
    returned = pytree.tree_unflatten(list(leaves), spec)
    picked = pick(returned) if pick else getattr(returned, "logits", leaves[0])
    if not isinstance(picked, fx.Node) or not isinstance(VALUE.of(picked), Tensor):
        raise TraceError(f"the exported module returns {type(returned).__name__}, not a tensor")
    output.args = (picked,)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and not isinstance(VALUE.of(node), Tensor):
            graph.erase_node(node)
    return fx.GraphModule(module, graph)
