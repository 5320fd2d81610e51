"""What the benchmarks look at in a compilation: the kernels that Inductor makes, and what is computed twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import fx
from torch._inductor import compile_fx, metrics
from torch._inductor.graph import GraphLowering
from torch.fx.node import map_aggregate

from autodeploy.graph.meta import VALUE

_CALL = re.compile(r"^ +cpp_\w+\(", re.MULTILINE)
_TORCH_CALL = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops)\.[\w.]+\(", re.MULTILINE)


@dataclass
class Watched:
    """Graphs as Inductor lowers them, after all passes on FX graphs, and the wrappers that it writes."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    wrappers: list[str] = field(default_factory=list)
    generated: int = 0

    def num_kernels(self) -> dict[str, int]:
        """`generated` is Inductor's own count of what it generates, one for each loop nest.

        On a CPU it puts those between two of torch's own kernels into one C++ function: `calls` of these and
        `torch_calls` are what a step does, `functions` what the C++ compiler gets.
        """
        code = "\n".join(self.wrappers)
        return {
            "generated": self.generated,
            "calls": len(_CALL.findall(code)),
            "torch_calls": len(_TORCH_CALL.findall(code)),
            "functions": code.count("async_compile.cpp_pybinding("),
        }


@contextmanager
def watch_inductor() -> Iterator[Watched]:
    """What Inductor compiles inside the block. With caches on, a graph that is found there is not seen."""
    watched = Watched()
    run_passes = compile_fx._recursive_post_grad_passes

    def run_and_keep(gm: fx.GraphModule, is_inference: bool = False) -> None:
        run_passes(gm, is_inference)
        watched.graphs.append(gm)

    with (
        mock.patch.object(compile_fx, "_recursive_post_grad_passes", run_and_keep),
        mock.patch.object(GraphLowering, "save_output_code", watched.wrappers.append),
    ):
        before = metrics.generated_kernel_count
        yield watched
        watched.generated = metrics.generated_kernel_count - before


def count_layout_only(graph: fx.Graph, weights: set[int]) -> tuple[int, int]:
    """Tensor nodes that depend on no input at one of the places `weights`, and how many of them differ.

    Two nodes are the same where op and literals are and their inputs are the same; sizes, where their expressions are.
    This knows nothing of the passes and is written without their code, to check them.
    """
    classes: dict[str, int] = {}
    members: dict[fx.Node, int] = {}
    found: list[int] = []
    inputs = graph.find_nodes(op="placeholder")
    excluded = {node for place, node in enumerate(inputs) if place in weights}
    for node in graph.nodes:
        name = None if node in excluded else _name(node, members)
        if name is None:
            continue
        members[node] = classes.setdefault(name, len(classes))
        if node.op == "call_function" and not isinstance(VALUE.get(node), torch.SymInt | int):
            found.append(members[node])
    return len(found), len(set(found))


def _name(node: fx.Node, members: Mapping[fx.Node, int]) -> str | None:
    """Equal for nodes that compute the same; None where `node` is not layout-only, or draws, writes or has effects."""
    value = VALUE.get(node)
    if isinstance(value, torch.SymInt):
        return f"size {value.node.expr}"
    if node.op == "placeholder":
        return f"input {node.target}"
    if node.op == "get_attr":
        return f"constant {_constant(node)}"
    if node.op != "call_function" or any(arg not in members for arg in node.all_input_nodes) or node.is_impure():
        return None
    args, kwargs = node.args, dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        arguments = node.target._schema.arguments
        defaults = {arg.name: arg.default_value for arg in arguments if arg.has_default_value()}
        args, kwargs = (), defaults | dict(zip((arg.name for arg in arguments), args, strict=False)) | kwargs
    named = map_aggregate(
        (args, tuple(sorted(kwargs.items()))), lambda arg: f"%{members[arg]}" if isinstance(arg, fx.Node) else arg
    )
    return f"{node.target} {named!r}"


def _constant(node: fx.Node) -> str:
    """A tensor by dtype, shape and values; anything else, such as the subgraph of a higher-order op, by its name."""
    value = getattr(node.graph.owning_module, str(node.target))
    if not isinstance(value, torch.Tensor):
        return str(node.target)
    return f"{value.dtype} {tuple(value.shape)} {value.tolist()}"
