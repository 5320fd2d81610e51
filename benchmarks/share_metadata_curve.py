"""Microseconds per node of `share_metadata`, from 1,000 to 100,000 nodes, and the curve as a picture.

    python benchmarks/share_metadata_curve.py [--nodes 1000 10000 100000] [--layers 4 16 64] [--profile 10000]

Synthetic graphs are one traced decoder layer repeated, its mask and rotary tables in each copy. Real ones are the ATen
graphs of a tiny Gemma 3 as Inductor hands them to our backend. `pass` is ShareMetadata alone; `run` adds what the
runner does around it: counting before and after, dropping dead code, checking the invariants. The aim is 10 us a node.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import math
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention, silu

from autodeploy.compiler import pipeline
from autodeploy.graph.edit import copy_module
from autodeploy.graph.meta import DESCRIPTION, ROLE
from autodeploy.viz.table import table as align
from passes import ShareMetadata

_PICTURE = Path(__file__).parents[1] / "docs" / "share_metadata_curve.svg"
_AIM = 10.0  # us a node
_REPEATS = 5
_SIZE = torch.ops.aten.sym_size.int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 3000, 10000, 30000, 100000])
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 16, 64], help="of the real graphs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "share_metadata_curve.json")
    parser.add_argument("--picture", type=Path, default=_PICTURE)
    parser.add_argument("--profile", type=int, metavar="NODES", help="show where the time goes, and do nothing else")
    args = parser.parse_args()
    if args.profile:
        _profile(args.profile)
        return
    points = [_point("synthetic", synthetic(nodes)) for nodes in args.nodes]
    points += [_point(f"gemma3_text, {layers} layers", real(layers)) for layers in args.layers]
    print("\n".join(align(_table(points), right=True)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": describe_machine(), "points": points}, indent=1) + "\n")
    args.picture.write_text("\n".join(_draw(points)) + "\n")


def layer(x_BTD: Tensor, weight_DD: Tensor, frequencies_H: Tensor, lengths_B: Tensor) -> Tensor:
    """A decoder layer of one head and two linear maps that makes its own mask and rotary tables."""
    length = x_BTD.shape[1]
    positions = torch.arange(length)
    causal = positions[None, :] <= positions[:, None]
    seen = causal[None] & (positions[None, None, :] < lengths_B[:, None, None])
    angles = positions[:, None].float() * frequencies_H[None, :]
    cos, sin = torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()
    normed = x_BTD * torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + 1e-6)
    query, key = normed @ weight_DD, normed @ weight_DD
    first, second = query.chunk(2, dim=-1)
    query = query * cos + torch.cat([-second, first], dim=-1) * sin
    attended = scaled_dot_product_attention(query[:, None], key[:, None], normed[:, None], seen[:, None])[:, 0]
    return x_BTD + silu(attended @ weight_DD) * normed


def synthetic(num_nodes: int) -> fx.GraphModule:
    """`layer` traced with symbolic sizes and repeated up to about `num_nodes` nodes; sizes of inputs are read once."""
    values = (torch.randn(2, 32, 16), torch.randn(16, 16), torch.randn(8), torch.tensor([32, 20]))
    one = make_fx(layer, tracing_mode="symbolic")(*values)
    inputs = one.graph.find_nodes(op="placeholder")
    sizes = [node for node in one.graph.find_nodes(op="call_function", target=_SIZE) if node.args[0] in inputs]
    body = [node for node in one.graph.nodes if node.op not in ("placeholder", "output") and node not in sizes]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, role in zip(inputs, ("tokens", "weight", "constant", "layout"), strict=True):
        copies[node] = graph.node_copy(node)
        ROLE.set(copies[node], role)
    for node in sizes:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    for _ in range(max(1, num_nodes // len(body))):
        for node in body:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        copies[inputs[0]] = copies[_result(one.graph)]
    graph.output(copies[inputs[0]])
    return fx.GraphModule(one, graph)


def _result(graph: fx.Graph) -> fx.Node:
    value = graph.output_node().args[0]
    assert isinstance(value, fx.Node)
    return value


class _Captured(Exception):
    pass


class _Capture(CustomGraphPass):
    """Keeps the graph and ends the compilation."""

    def __init__(self) -> None:
        self.gm: fx.GraphModule | None = None

    def __call__(self, graph: fx.Graph) -> None:
        self.gm = graph.owning_module
        raise _Captured

    def uuid(self) -> None:
        return None


def real(num_layers: int) -> fx.GraphModule:
    """The ATen graph of a tiny Gemma 3 with dynamic length, its inputs given the roles that our backend gives them."""
    from zoo import tiny

    print(f"tracing gemma3_text with {num_layers} layers", file=sys.stderr, flush=True)
    model = tiny("gemma3_text", num_layers, "sdpa")
    ids = torch.randint(5, 100, (2, 64))
    torch._dynamo.mark_dynamic(ids, 1)
    capture = _Capture()
    roles: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        roles[:] = map(_role, example_inputs)
        return torch._dynamo.lookup_backend("inductor")(gm, example_inputs)

    torch._dynamo.reset()
    with inductor_config.patch(post_grad_custom_pre_pass=capture), torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True)(input_ids=ids, use_cache=False)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Captured):
                raise
    assert capture.gm is not None
    for node in capture.gm.graph.find_nodes(op="placeholder"):
        ROLE.set(node, roles[DESCRIPTION.of(node).idx])
    return capture.gm


def _role(value: Any) -> str:
    if isinstance(value, torch.nn.Parameter):
        return "weight"
    return "constant" if isinstance(value, Tensor) and value.is_floating_point() else "layout"


def _point(name: str, gm: fx.GraphModule) -> dict[str, Any]:
    """Medians of several runs, each on a fresh copy, in seconds of the processor and without garbage collections."""
    nodes = len(gm.graph.nodes)
    print(f"{name}: {nodes} nodes", file=sys.stderr, flush=True)
    repeats = _REPEATS if nodes < 50_000 else 3
    alone = _micros(lambda copy: ShareMetadata().apply(copy), gm, repeats)
    whole = _micros(lambda copy: pipeline.run(copy, [ShareMetadata()]), gm, repeats)
    (record,) = pipeline.run(gm, [ShareMetadata()])
    return {
        "name": name,
        "nodes": nodes,
        "nodes_after": record.after.nodes,
        "metadata_nodes": record.before.metadata_nodes,
        "metadata_nodes_after": record.after.metadata_nodes,
        "pass_us_per_node": round(alone / nodes, 2),
        "run_us_per_node": round(whole / nodes, 2),
    }


def _micros(run: Callable[[fx.GraphModule], object], gm: fx.GraphModule, repeats: int) -> float:
    found = []
    for _ in range(repeats):
        copy = copy_module(gm)
        gc.collect()
        gc.disable()
        start = time.process_time()
        run(copy)
        found.append(1e6 * (time.process_time() - start))
        gc.enable()
    return statistics.median(found)


def _profile(num_nodes: int) -> None:
    gm = synthetic(num_nodes)
    profile = cProfile.Profile()
    profile.runcall(ShareMetadata().apply, gm)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _table(points: list[dict[str, Any]]) -> list[list[str]]:
    header = ["graph", "nodes", "layout-only nodes", "pass, us/node", "run, us/node"]
    return [header] + [
        [
            point["name"],
            str(point["nodes"]),
            f"{point['metadata_nodes']} -> {point['metadata_nodes_after']}",
            f"{point['pass_us_per_node']:.1f}",
            f"{point['run_us_per_node']:.1f}",
        ]
        for point in points
    ]


_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 640, 360, 56, 48, 544, 248
_TEXT, _LINE = "#1f2937", "#6b7280"
_COLORS = {"synthetic": "#2563eb", "gemma3_text": "#d97706"}


def _draw(points: list[dict[str, Any]]) -> list[str]:
    """The pass alone, over the number of nodes on a logarithmic axis."""
    highest = 5 * math.ceil(1.2 * max(_AIM, *(point["pass_us_per_node"] for point in points)) / 5)
    decades = [math.log10(point["nodes"]) for point in points]
    low, high = math.floor(min(decades)), math.ceil(max(decades))

    def place(nodes: float, micros: float) -> tuple[float, float]:
        x = _LEFT + _PLOT_WIDTH * (math.log10(nodes) - low) / (high - low)
        return round(x, 1), round(_TOP + _PLOT_HEIGHT * (1 - micros / highest), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="{_TEXT}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">share_metadata: microseconds per node (dashed: the aim)</text>',
    ]
    for micros in range(0, highest + 1, 5):
        x, y = place(10**low, micros)
        dashes = ' stroke-dasharray="5 4"' if micros == _AIM else ""
        parts.append(f'<path d="M {x} {y} h {_PLOT_WIDTH}" stroke="{_LINE}" stroke-width="0.5"{dashes}/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{micros}</text>')
    for decade in range(low, high + 1):
        x, y = place(10**decade, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{10**decade:,}</text>')
    parts.append(
        f'<text x="{_LEFT + _PLOT_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">nodes of the graph</text>'
    )
    for index, (name, color) in enumerate(_COLORS.items()):
        places = [place(p["nodes"], p["pass_us_per_node"]) for p in points if p["name"].startswith(name)]
        parts += [*_series(places, color), _legend(index, name, color)]
    return [*parts, "</svg>"]


def _series(places: Iterable[tuple[float, float]], color: str) -> list[str]:
    places = sorted(places)
    line = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in places]
    return [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>', *dots]


def _legend(index: int, name: str, color: str) -> str:
    x, y = _LEFT + _PLOT_WIDTH - 130, _TOP + 16 + 18 * index
    return f'<circle cx="{x}" cy="{y - 4}" r="3.5" fill="{color}"/><text x="{x + 10}" y="{y}">{name}</text>'


if __name__ == "__main__":
    main()
