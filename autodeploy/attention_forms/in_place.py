"""Whether an attention can be computed at its last node: in-place writes may have changed its inputs until then."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autodeploy.attention_forms.evaluate import reads
from autodeploy.graph.aliasing import sharing, writes


def is_overtaken(output: fx.Node, inputs: Collection[fx.Node], written: set[fx.Node]) -> bool:
    """Whether anything that `output` is computed from, as far as `inputs`, is written to after it was first read.

    `written` are the nodes of the graph that some node writes to, with everything that shares storage with them.
    """
    region = _between(output, inputs)
    for node in region & written:
        if node is not output and _is_written(node, node, output):
            return True
    return any(
        _is_written(node, min(user for user in node.users if user in region), output)
        for node in inputs
        if node in written
    )


def _between(output: fx.Node, inputs: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that `output` is computed from, itself included and `inputs` not."""
    region: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node not in region and node not in inputs:
            region.add(node)
            waiting += reads(node)
    return region


def _is_written(node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether something that shares storage with `node` is written to between two nodes."""
    family = sharing([node])
    users = (user for member in family for user in member.users if first < user < last)
    return any(not family.isdisjoint(writes(user)) for user in users)
