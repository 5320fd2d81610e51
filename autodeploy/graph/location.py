"""Where a node comes from, as a reader finds it."""

from __future__ import annotations

from torch import fx

from autodeploy.graph.meta import MODULE_STACK, STACK_TRACE


def node_location(node: fx.Node) -> str:
    """`node` as a reader finds it: name, owning module path, and the line of the model's source it came from."""
    parts = [f"node {node.name}"]
    if path := module_path(node):
        parts.append(f"module {path}")
    if trace := STACK_TRACE.get(node):
        lines = [line.strip() for line in str(trace).strip().splitlines()]
        frames = [line for line in lines if line.startswith("File ")]
        if frames:
            parts.append(frames[-1])
    return ", ".join(parts)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module of the traced model that made `node`, or an empty string."""
    stack = MODULE_STACK.get(node) or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""
