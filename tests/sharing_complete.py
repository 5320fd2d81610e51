"""Whether the pass left out what it could have moved, and whether equal graphs become equal graphs.

What depends on the layout is followed over the steps of the program, which know nothing of the package.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from sharing_check import state_of, text
from sharing_program import Program, build, execute, named, refs
from torch import Tensor, fx, nn

from autodeploy.compiler import pipeline
from autodeploy.graph.meta import NEAR_MISS
from passes import ShareMetadata


def shortcomings(program: Program) -> list[str]:
    """What is left outside though nothing speaks against it; and a second build that becomes another graph.

    Raises what eager raises.
    """
    root = program.root()
    state = state_of(program, root)
    try:
        values = program.make_inputs()
        with torch.no_grad():
            for step in program.steps:
                values.append(execute(step, values, root))
    finally:
        state.restore()
    gm, twin = build(program, root), build(program, root)
    names = [node.name for node in gm.graph.nodes]
    pipeline.run(gm, [ShareMetadata()])
    pipeline.run(twin, [ShareMetadata()])
    found = [] if text(gm) == text(twin) else [f"an equal graph became\n{text(twin)}\nnot\n{text(gm)}"]
    if program.has_roles and (left := _left_without_reason(program, gm, names, values)):
        found.append(f"left outside: {left} of\n{program}\n{text(gm)}")
    return found


def _left_without_reason(program: Program, gm: fx.GraphModule, names: list[str], values: list[Any]) -> list[str]:
    """Names of the nodes outside prepare_metadata that make a tensor of the layout and of nothing that was refused."""
    outside = {node.name: node for node in gm.graph.nodes}
    refused = {name for name, node in outside.items() if NEAR_MISS.on(node)}
    roles = [each.role if each.role in ("layout", "constant") else None for each in program.inputs]
    depends = [None if name in refused else role for name, role in zip(names, roles, strict=False)]
    left = []
    for step, name, value in zip(program.steps, names[len(depends) :], values[len(depends) :], strict=False):
        reads = [depends[ref.place] for ref in refs((step.args, step.kwargs))]
        if step.kind == "attribute":
            is_weight = isinstance(named(program.root(), step.target), nn.Parameter)
            depends.append(None if is_weight or name in refused else "constant")
        elif None in reads or step.kind == "module" or name in refused:
            depends.append(None)
        elif "layout" not in reads and name in outside and isinstance(value, Tensor):
            depends.append(None)  # a constant that stays: only for metadata is it moved, and is it said why it is not
        else:
            depends.append("layout" if "layout" in reads else "constant")
        node = outside.get(name)
        if node is None or depends[-1] != "layout" or not isinstance(value, Tensor) or not node.users:
            continue
        if node.op in ("call_function", "call_method") and node.target is not operator.getitem:
            left.append(name)
    return left
