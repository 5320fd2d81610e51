"""Looks through the borders of called graphs, so that outlining a part of a graph does not look like a rewrite of it.

    y = f(x)          prepare = prepare_metadata(x)     with prepare_metadata(x_1): y_1 = f(x_1); return (y_1,)
    z = g(y)          y = prepare[0]; z = g(y)

On the right, `x_1` only hands on `x`, and `y` and `prepare` only hand on `y_1`.
"""

from __future__ import annotations

from collections.abc import Sequence

from autodeploy.viz.arguments import Argument, Ref
from autodeploy.viz.node import Node


def see_through(nodes: Sequence[Node]) -> dict[int, int]:
    """For each node that only hands on a value, the id of the node that made it.

    These are the inputs of a graph that one `call_module` calls, the elements of that call's result, and, where the
    graph returns one value, the call itself.
    """
    by_id = {node.id: node for node in nodes}
    called = calls(nodes)
    inner: dict[str, list[Node]] = {path: [] for path in called}
    for node in nodes:
        if node.graph in inner:
            inner[node.graph].append(node)
    step: dict[int, int] = {}
    results: dict[int, Argument] = {}
    for path, call in called.items():
        passed = [argument for name, argument in call.arguments if name != "module"]
        inputs = [node for node in inner[path] if node.op == "placeholder"]
        step |= {node.id: arg.id for node, arg in zip(inputs, passed, strict=False) if isinstance(arg, Ref)}
        for node in inner[path]:
            if node.op == "output" and node.arguments:
                results[call.id] = node.arguments[0][1]
    step |= {call: result.id for call, result in results.items() if isinstance(result, Ref)}
    for node in nodes:
        if node.target == "operator.getitem":
            step |= _element(node, results)
    return {id: source for id in step if (source := _follow(id, step)) in by_id}


def calls(nodes: Sequence[Node]) -> dict[str, Node]:
    """The one `call_module` of each called graph; a graph that is called twice has no single source for its inputs."""
    graphs = {node.graph for node in nodes}
    calls: dict[str, list[Node]] = {}
    for node in nodes:
        path = f"{node.graph}.{node.target}".lstrip(".")
        if node.op == "call_module" and path in graphs:
            calls.setdefault(path, []).append(node)
    return {path: found[0] for path, found in calls.items() if len(found) == 1}


def _element(node: Node, results: dict[int, Argument]) -> dict[int, int]:
    (_, source), (_, index), *_ = node.arguments
    if not isinstance(source, Ref) or not isinstance(index, int):
        return {}
    elements = results.get(source.id)
    if not isinstance(elements, tuple) or not -len(elements) <= index < len(elements):
        return {}
    element = elements[index]
    return {node.id: element.id} if isinstance(element, Ref) else {}


def _follow(id: int, step: dict[int, int]) -> int:
    seen = set()
    while id in step and id not in seen:
        seen.add(id)
        id = step[id]
    return id
