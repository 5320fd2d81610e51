"""Results that share memory with an argument: what torch's own operators do, asked by running them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from sharing_sweep import op_db, samples
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from autodeploy.graph.aliasing import aliased, storages

aten = torch.ops.aten
X = torch.ones(2, 2)
# Calls that give an argument back, of which op_db has no sample.
CALLS: list[tuple[OpOverload, tuple[Any, ...]]] = [
    (aten._unsafe_view.default, (X, [4])),
    (aten.einsum.default, ("ij->ij", [X])),
    (aten.lift_fresh.default, (X,)),
    (aten.sum_to_size.default, (X, [2, 2])),
    (aten.to_dense.default, (X,)),
    (aten.type_as.default, (X, X)),
]


def memory(value: Any) -> set[Any]:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
    return {storage for leaf in leaves for storage in storages(leaf)}


class Denials(fx.Interpreter):
    """Runs a graph and notes nodes that share memory with an argument, which the package denies."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: set[str] = set()
        self.num_seen = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(n.target, OpOverload):
            shared = {arg for arg in n.all_input_nodes if memory(self.env[arg]) & memory(result)}
            self.num_seen += bool(shared)
            if not shared <= set(aliased(n)):
                self.found.add(str(n.target))
        return result


def denials(function: Any, *arguments: Any) -> Denials:
    """Of the ops of ATen that a call of `function` consists of, as export records them."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]

    def call(*given: Tensor) -> Any:
        left = iter(given)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(left), arguments)
        return function(*args, **kwargs)

    with torch.no_grad():
        run = Denials(make_fx(call, pre_dispatch=True)(*tensors))
        run.run(*tensors)
    return run


def shared_samples() -> Iterator[tuple[Any, Any]]:
    """Calls of op_db whose results share memory with an argument though no schema of their op says so."""
    for op in op_db():
        packet = getattr(aten, op.aten_name, None)
        overloads = [getattr(packet, name) for name in packet.overloads()] if packet else []
        is_view = any(result.alias_info for overload in overloads[:1] for result in overload._schema.returns)
        for sample in samples(op, torch.float32, 4) if torch.float32 in op.dtypes and not is_view else ():
            arguments = ((sample.input, *sample.args), sample.kwargs)
            with torch.no_grad(), suppress(AssertionError):  # of what runs on a GPU alone
                if memory(op.get_op()(*arguments[0], **arguments[1])) & memory(arguments):
                    yield op.get_op(), arguments


@pytest.mark.filterwarnings("ignore")
def test_operators_that_give_an_argument_back() -> None:
    """As a dropout does that drops nothing."""
    runs = [denials(op, *arguments) for op, arguments in shared_samples()]
    assert not set().union(*(run.found for run in runs))
    assert sum(run.num_seen for run in runs) > 50


@pytest.mark.parametrize(("target", "args"), CALLS, ids=lambda value: str(value) if callable(value) else "")
def test_calls_that_give_an_argument_back(target: OpOverload, args: tuple[Any, ...]) -> None:
    assert memory(target(*args)) & memory(args)
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert aliased(graph.call_function(target, pytree.tree_map_only(Tensor, lambda _: x, args))) == [x]
