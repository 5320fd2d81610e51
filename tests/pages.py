"""What the tests of the page look at: the passes on a tiny model, a pass that fails, hostile names, a large graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import fx
from traces import traced
from viz_graphs import Maker, aten, attention_layer, cached_layer, layers

from autodeploy.compiler import pipeline
from autodeploy.errors import PassError
from autodeploy.viz import GraphDiff, Recorder, Snapshot, Trace
from autodeploy.viz.arguments import Ref
from autodeploy.viz.node import Node
from passes import default

SCRIPT = "</script><script>globalThis.pwned = 1</script>"
IMAGE = '<img src="x" onerror="globalThis.pwned = 1">'


@cache
def pipeline_trace(num_layers: int = 4, model_type: str = "llama") -> Trace:
    """The default passes on a tiny model."""
    with Recorder() as recorder:
        pipeline.run(traced(model_type, num_layers), default(), [recorder])
    return recorder.trace()


@dataclass(frozen=True)
class FailHalfway:
    """Replaces the first attention, and then raises."""

    name: str = "fail_halfway"

    def apply(self, gm: fx.GraphModule) -> int:
        node = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[0]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(aten.neg.default, (node.args[0],))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        raise RuntimeError(f"halfway {IMAGE}")


def failed_trace() -> Trace:
    """A pass that raised in the middle."""
    with pytest.raises(PassError), Recorder() as recorder:
        pipeline.run(layers(3, attention_layer), [FailHalfway()], [recorder])
    return recorder.trace()


def hostile_diff() -> GraphDiff:
    """Every text of a graph tries to be markup."""

    def snapshot(op: str) -> Snapshot:
        plain = {"module": f"model.{SCRIPT}", "module_type": IMAGE, "source": f"x.py:1 in f: {SCRIPT}", "role": IMAGE}
        made = [Node(0, f"x{IMAGE}", "placeholder", SCRIPT)]
        made += [
            Node(1 + n, f"{n}{SCRIPT}", "call_function", op, (("a", Ref(n)), (IMAGE, SCRIPT)), **plain)
            for n in range(3)
        ]
        return Snapshot(tuple(made), SCRIPT)

    return GraphDiff.of(snapshot(f"a.{IMAGE}"), snapshot(f"b.{IMAGE}"))


def large_diff(num_nodes: int, activation: torch._ops.OpOverload = aten.gelu.default) -> GraphDiff:
    """Layers of 10 nodes, of which every seventh has another op in it."""

    def layer(index: int, make: Maker, x: fx.Node, op: torch._ops.OpOverload) -> fx.Node:
        for number in range(8):
            x = make.call(aten.mul.Tensor, x, number, at="mlp", value=torch.empty(2, 3, device="meta"))
        return make.call(op if index % 7 == 0 else aten.sin.default, make.call(aten.add.Tensor, x, x))

    sides = [
        layers(num_nodes // 10, lambda index, make, x, op=op: layer(index, make, x, op))
        for op in (aten.silu.default, activation)
    ]
    return GraphDiff.of(*sides)


def small_diff() -> GraphDiff:
    """Three layers whose attention became two matmuls."""
    return GraphDiff.of(layers(3, attention_layer), layers(3, cached_layer))
