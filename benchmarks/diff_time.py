"""How long a diff takes: two copies of a deep graph, one with an op replaced in every layer, matched without history.

    python benchmarks/diff_time.py [--nodes 1000 10000 50000] [--output benchmarks/results/diff_time.json]

Columns, in CPU seconds: reading both graphs, matching their nodes, sorting them into what happened, folding, the text,
and all but the reading.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import describe_machine
from torch import fx

from autodeploy.graph.meta import MODULE_STACK
from autodeploy.viz.classify import classify
from autodeploy.viz.diff import GraphDiff
from autodeploy.viz.infer import infer_fates
from autodeploy.viz.match import match
from autodeploy.viz.snapshot import Snapshot
from autodeploy.viz.table import table as align

T = TypeVar("T")
aten = torch.ops.aten
NODES_PER_LAYER = 21
_REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "diff_time.json")
    args = parser.parse_args()
    _measure(100)  # imports
    measured = [_measure(nodes) for nodes in args.nodes]
    columns = list(measured[0])
    print("\n".join(align([columns, *([f"{row[name]:.4g}" for name in columns] for row in measured)], right=True)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": describe_machine(), "graphs": measured}, indent=1) + "\n")


def decoder(num_nodes: int, activation: torch._ops.OpOverload) -> fx.GraphModule:
    """A graph of about that many nodes: layers of attention, normalisation and a gated MLP, with module paths."""
    graph = fx.Graph()
    x, cos = graph.placeholder("x"), graph.placeholder("cos")
    for layer in range(num_nodes // NODES_PER_LAYER):
        x = _layer(graph, f"model.layers.{layer}", x, cos, activation)
    graph.output((x,))
    return fx.GraphModule(torch.nn.Module(), graph)


def _layer(graph: fx.Graph, path: str, x: fx.Node, cos: fx.Node, activation: torch._ops.OpOverload) -> fx.Node:
    def call(module: str, op: torch._ops.OpOverload, *args: Any) -> fx.Node:
        node = graph.call_function(op, args)
        full = f"{path}.{module}"
        MODULE_STACK.set(node, {full: (full, "Module")})
        return node

    square = call("norm", aten.mean.dim, call("norm", aten.pow.Tensor_Scalar, x, 2), [-1], True)
    normed = call(
        "norm", aten.mul.Tensor, x, call("norm", aten.rsqrt.default, call("norm", aten.add.Tensor, square, 1e-6))
    )
    q, k, v = (call(f"attn.{name}", aten.mul.Tensor, normed, scale) for name, scale in (("q", 2), ("k", 3), ("v", 4)))
    q, k = call("attn", aten.mul.Tensor, q, cos), call("attn", aten.mul.Tensor, k, cos)
    scores = call("attn", aten.softmax.int, call("attn", aten.matmul.default, q, k), -1)
    attended = call("attn", aten.matmul.default, scores, v)
    x = call("attn", aten.add.Tensor, x, attended)
    gate = call("mlp.act", activation, call("mlp.gate", aten.mul.Tensor, x, 5))
    up = call("mlp.up", aten.mul.Tensor, x, 6)
    return call("", aten.add.Tensor, x, call("mlp", aten.tanh.default, call("mlp", aten.mul.Tensor, gate, up)))


def _measure(num_nodes: int) -> dict[str, float]:
    graphs = [decoder(num_nodes, op) for op in (aten.silu.default, aten.gelu.default)]
    read, (before, after) = _timed(lambda: [Snapshot.of(gm) for gm in graphs])
    seconds = {"nodes": len(before.nodes), "read": read}
    seconds["match"], links = _timed(lambda: match(Snapshot(before.nodes), Snapshot(after.nodes)))
    infer_fates(before, after, links)
    seconds["classify"], entries = _timed(lambda: classify(before, after, links))
    diff = GraphDiff(before, after, entries)
    seconds["fold"], _ = _timed(lambda: GraphDiff(before, after, entries).blocks)
    seconds["text"], _ = _timed(lambda: str(diff))
    seconds["all"], _ = _timed(lambda: str(GraphDiff.of(Snapshot(before.nodes), Snapshot(after.nodes))))
    return seconds


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """The fastest of a few runs in CPU seconds, which other processes disturb less, and the last result."""
    fastest = float("inf")
    for _ in range(_REPEATS):
        start = time.process_time()
        result = call()
        fastest = min(fastest, time.process_time() - start)
    return fastest, result


if __name__ == "__main__":
    main()
