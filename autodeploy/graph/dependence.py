"""The one question behind sharing metadata: what depends on the batch's layout, sizes and constants alone?"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from autodeploy.graph.aliasing import Writes, mutated
from autodeploy.graph.edit import PREPARE, get_attribute, prepare_nodes
from autodeploy.graph.effects import RANDOM, autocast_change, changes_surroundings, impurity
from autodeploy.graph.meta import KEPT, ROLE
from autodeploy.graph.spelling import NUMBERS, attribute, is_arithmetic, is_measure, recorded_value

_SHARES_WRITTEN_STORAGE = "may share storage with a value that is written to"
_IN_AUTOCAST = "is inside an autocast region"
_SURROUNDINGS = "comes after a call that may change how ops compute"


@dataclass(frozen=True)
class Split:
    """The nodes of a graph by what they depend on.

    `known`: on the layout, sizes and constants alone. `scalars`: sizes and arithmetic on them, free at run time, some
    of them known, others measured of activations. `metadata`: the known tensor nodes that read the layout or sizes, in
    graph order; neither the call of prepare_metadata nor the unpacking of its outputs counts. `refused`: nodes that
    would be metadata but for the reason given.
    """

    known: set[fx.Node]
    scalars: set[fx.Node]
    metadata: list[fx.Node]
    refused: dict[fx.Node, str]

    def without(self, gone: set[fx.Node]) -> Split:
        """The same without nodes that have been erased since."""
        metadata = [node for node in self.metadata if node not in gone]
        return replace(self, known=self.known - gone, metadata=metadata)


def split(gm: fx.GraphModule) -> Split:
    """Split `gm` by dependence alone, in one sweep."""
    roles = input_roles(gm.graph)
    written = mutated(gm.graph)
    scalars = find_scalars(gm.graph, written)
    result = Split(set(), scalars, [], {})
    reads: set[fx.Node] = set()
    of_layout = _outputs_of_layout(gm)
    autocast_depth, is_changed = 0, False
    for node in gm.graph.nodes:
        autocast_depth += autocast_change(node)
        is_changed = is_changed or (node.op == "call_function" and changes_surroundings(node))
        if not _depends_on_known(node, roles, result):
            continue
        is_source = node.op == "placeholder" or is_prepare(node) or is_unpacking(node)
        depends = node not in scalars and any(arg in reads or arg in scalars for arg in node.all_input_nodes)
        if is_unpacking(node):
            depends = node.args[1] in of_layout
        is_layout = roles.get(node) == "layout"
        reason = _SHARES_WRITTEN_STORAGE if node in written.values else None
        if not is_source and node not in scalars:
            surroundings = _SURROUNDINGS if is_changed else _IN_AUTOCAST if autocast_depth else None
            reason = KEPT.get(node) or impurity(node) or surroundings or reason
        if reason is not None:
            if node.users and (depends or node.op in ("placeholder", "get_attr") or reason == RANDOM):
                result.refused[node] = reason
            continue
        result.known.add(node)
        if depends or is_layout:
            reads.add(node)
        if depends and not is_source:
            result.metadata.append(node)
    return result


def _outputs_of_layout(gm: fx.GraphModule) -> set[int]:
    """Which outputs of prepare_metadata depend on more than constants."""
    if not prepare_nodes(gm):
        return set()
    inner = get_attribute(gm, PREPARE)
    metadata = set(split(inner).metadata)
    return {index for index, node in enumerate(inner.graph.output_node().args[0]) if node in metadata}


def input_roles(graph: fx.Graph) -> dict[fx.Node, str | None]:
    """What each input of a graph is: "layout", "constant", or something that activations are made of.

    Where no input has been given a role, integers and booleans, tensors or not, are the layout: what depends on ids and
    masks but reads no weight is bookkeeping. Everything else is not.
    """
    inputs = graph.find_nodes(op="placeholder")
    has_roles = any(ROLE.on(node) for node in inputs)
    return {node: ROLE.get(node) or _role_of_value(node, has_roles) for node in inputs}


def _role_of_value(node: fx.Node, has_roles: bool) -> str | None:
    value = recorded_value(node)
    if isinstance(value, NUMBERS):
        return "layout"
    if has_roles or not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return None
    return None if value.dtype.is_floating_point or value.dtype.is_complex else "layout"


def find_scalars(graph: fx.Graph, written: Writes | None = None) -> set[fx.Node]:
    """Numbers: sizes, dtypes and the like of any tensor, and arithmetic on them; compile-time work, never a kernel.

    Left out is what is not the same wherever it is asked: numbers that are written to, as `n += 1` does, and sizes that
    are.
    """
    values, sizes = written or mutated(graph)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in values:
            continue
        if node.op == "placeholder":
            is_scalar = isinstance(recorded_value(node), NUMBERS)
        elif is_arithmetic(node):
            is_scalar = all(arg in found for arg in node.all_input_nodes)
        else:
            is_scalar = is_measure(node) and not any(arg in sizes for arg in node.all_input_nodes)
        if is_scalar:
            found.add(node)
    return found


def _depends_on_known(node: fx.Node, roles: dict[fx.Node, str | None], so_far: Split) -> bool:
    if node.op == "placeholder":
        return roles[node] in ("layout", "constant")
    if node.op == "get_attr":
        value = attribute(node)
        return not (isinstance(value, torch.Tensor) and (isinstance(value, torch.nn.Parameter) or value.requires_grad))
    if node in so_far.scalars and is_measure(node):
        source = node.all_input_nodes[0]
        return source.op == "placeholder" or source in so_far.known
    return all(arg in so_far.known for arg in node.all_input_nodes)


def is_prepare(node: fx.Node) -> bool:
    """Whether `node` is the call of prepare_metadata."""
    return node.op == "call_module" and node.target == PREPARE


def is_unpacking(node: fx.Node) -> bool:
    """Whether `node` takes one output of prepare_metadata."""
    return node.target is operator.getitem and is_prepare(node.all_input_nodes[0])
