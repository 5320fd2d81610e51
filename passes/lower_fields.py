"""Lower the fields inside prepare_metadata: to one launch where a device has one, else each to its formula.

Before:                                       After, on a GPU:
    slots = slot_mapping(layout, T, 0, 1, 16)     arena = launch_fields(layout, T, "slot_mapping:0:1:16 cu_seqlens_q")
    starts = cu_seqlens_q(layout)                 slots = arena[0 : 2 * T].view(int64)
    table = block_table(layout, 0, 1)             starts = arena[...]
                                                  table = layout[:, 3:]

                                              After, on a CPU:
                                                  lens = layout[:, 0]
                                                  starts = pad(cumsum(lens), (1, 0))          # once, for both
                                                  slots = where(...)
                                                  table = layout[:, 3:]

What a launch does not compute, views of the layout and fields of third parties, is written out there, too. Equal parts
of formulas are merged; what is left is plain torch, which Inductor fuses into a handful of kernels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx

from autodeploy.graph.edit import PREPARE, prepare_nodes, record
from autodeploy.graph.effects import is_pure
from autodeploy.graph.equality import merge_equal
from autodeploy.graph.meta import SITE
from autodeploy.graph.values import replace_node, retype
from autodeploy.kernels.registry import field_launcher
from autodeploy.metadata.field import FieldLauncher, FieldRequest, is_field, of_op


@dataclass(frozen=True)
class LowerFields:
    """Launch or expand the fields of prepare_metadata; matches the number of fields."""

    name: str = "lower_fields"

    def apply(self, gm: fx.GraphModule) -> int:
        prepare = getattr(gm, PREPARE, None)
        if not isinstance(prepare, fx.GraphModule):
            return 0
        launcher = _launcher(gm)
        lowered, stale = 0, list[fx.Node]()
        while waiting := [node for node in _fields(prepare) if not _can_launch(node, launcher)]:
            lowered += len(waiting)
            for node in waiting:
                stale += _expand(node)
        if launcher and (together := _fields(prepare)):
            lowered += len(together)
            stale += _launch(prepare, launcher, together)
        if lowered:
            retype(prepare.graph, stale)
            merge_equal(prepare.graph, [node for node in prepare.graph.nodes if is_pure(node)])
            prepare.graph.eliminate_dead_code()
            prepare.recompile()
            retype(gm.graph, prepare_nodes(gm))
        return lowered


def _fields(prepare: fx.GraphModule) -> list[fx.Node]:
    return [node for node in prepare.graph.nodes if is_field(node.target)]


def _launcher(gm: fx.GraphModule) -> FieldLauncher | None:
    """What the device of the graph's caches, where the layout lies as well, has to launch fields with."""
    sites = (SITE.of(node) for node in gm.graph.nodes if SITE.on(node))
    site = next(sites, None)
    return field_launcher(site.device) if site else None


def _can_launch(node: fx.Node, launcher: FieldLauncher | None) -> bool:
    if launcher is None or any(arg.op != "placeholder" for arg in node.all_input_nodes):
        return False
    request = _request(node)
    return all(isinstance(value, int | str) for value in request.parameters) and launcher.supports(request)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a field's formula by name, in its order."""
    names = list(inspect.signature(of_op(node.target).formula).parameters)
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {name: given[name] for name in names}


def _request(node: fx.Node) -> FieldRequest:
    arguments = _arguments(node)
    parameters = (value for name, value in arguments.items() if name not in ("layout", "num_tokens"))
    return FieldRequest(of_op(node.target).name, tuple(parameters))


def _expand(node: fx.Node) -> list[fx.Node]:
    """Write `node` out; returns the nodes whose values are to be made again."""
    value = record(node, of_op(node.target).formula, *_arguments(node).values())
    stale = replace_node(node, value)
    node.graph.erase_node(node)
    return stale


def _launch(prepare: fx.GraphModule, launcher: FieldLauncher, together: list[fx.Node]) -> list[fx.Node]:
    """Compute fields of inputs right after the inputs, by one launch; returns what `_expand` does."""
    sizes = {tokens for node in together if (tokens := _arguments(node).get("num_tokens")) is not None}
    assert len(sizes) <= 1, "one packed stream has one length"
    layout = _arguments(together[0])["layout"]
    first = next(node for node in prepare.graph.nodes if node.op != "placeholder")
    requests = tuple(dict.fromkeys(map(_request, together)))
    values = record(first, launcher.launch, layout, sizes.pop() if sizes else 0, requests)
    value_of = dict(zip(requests, values, strict=True))
    stale: list[fx.Node] = []
    for node in together:
        stale += replace_node(node, value_of[_request(node)])
        prepare.graph.erase_node(node)
    return stale
