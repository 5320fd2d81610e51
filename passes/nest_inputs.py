"""Replace the padded [batch, seq] inputs by one packed token stream and the layout of its sequences.

Before:                                          After:
    input_ids: [B, S]; position_ids: [B, S]          input_ids: [T] int32; layout: [R, C] int32
    x = embedding(w, input_ids)                      x = embedding(w, input_ids[None])
    cos = f(position_ids)                            cos = f(position_ids(layout, T)[None])
    attention(q, k, v)                               attention(q, k, v, cu_seqlens=cu_seqlens_q(layout))

The packed stream is the model's batch of one; attention keeps the R sequences apart.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.edit import add_placeholder, near_miss, placeholder, placeholders, prepare_nodes, record
from autodeploy.graph.location import node_location
from autodeploy.graph.meta import NEAR_MISS, ROLE, VALUE
from autodeploy.graph.positions import of_positions
from autodeploy.graph.tokens import token_flow
from autodeploy.graph.values import new_mode, new_size, retype, use_mode
from autodeploy.metadata import fields
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS, SIZES
from autodeploy.ops.kinds import kind_of, kinds

_SIZE = torch.ops.aten.sym_size.int
_KNOWN_INPUTS = ("input_ids", "position_ids")


@dataclass(frozen=True)
class NestInputs:
    """Pack the inputs; matches once, on a graph with [batch, seq] inputs.

    Raises UnsupportedFeature for what would go wrong in silence: other inputs, tokens mixed outside attention, where
    nothing would keep the packed sequences apart, and positions that the graph counts itself, from one sequence on to
    the next.
    """

    name: str = "nest_inputs"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        if placeholder(gm, "layout") is not None:
            return 0
        old = {node.name: node for node in placeholders(gm)}
        if "input_ids" not in old:
            for node in old.values():
                near_miss(gm, node, "is not called input_ids")
            return 0
        check_not_shared(gm)
        check_inputs(old)
        output = check_output(gm)
        _rewrite(gm, old, check_tokens(gm))
        # From here on tensors go in by their place and one comes out, whatever the graph's caller knew before.
        gm.graph.output_node().args = (output,)
        gm.graph.set_codegen(CodeGen())
        return 1


def check_not_shared(gm: fx.GraphModule) -> None:
    """Raise where metadata of the padded inputs lies in a prepare_metadata already."""
    for node in prepare_nodes(gm):
        raise UnsupportedFeature(
            "a graph whose metadata is shared already", where=node_location(node), fix="run nest_inputs first"
        )


def check_inputs(inputs: dict[str, fx.Node]) -> None:
    """Raise where an input that is used has no packed form."""
    for name, node in inputs.items():
        if name not in _KNOWN_INPUTS and node.users:
            raise UnsupportedFeature(
                f"a graph input {name!r} that cannot be packed",
                where=node_location(node),
                fix=f"trace with {' and '.join(_KNOWN_INPUTS)} only",
            )


def check_output(gm: fx.GraphModule) -> fx.Node:
    """The one tensor that the graph gives. Raises where there are more."""
    given = gm.graph.output_node().all_input_nodes
    if len(given) != 1:
        raise UnsupportedFeature(
            f"a graph that returns {len(given)} tensors", where=type(gm).__name__, fix="return the logits alone"
        )
    return given[0]


def check_tokens(gm: fx.GraphModule) -> Collection[fx.Node]:
    """Raise where a token's value depends on others outside attention, or on a place that the graph counted.

    Returns the nodes that count positions, where tokens read these entry by entry.
    """
    attention = {node for node in gm.graph.nodes if kind_of(node.target) is not None}
    flow = token_flow(gm, attention)
    if flow.places:
        with_positions = token_flow(gm, attention, takes_positions=True)
        flow = flow if with_positions.places or with_positions.mixing else with_positions
    for node, why in flow.mixing:
        raise UnsupportedFeature(
            f"an op outside attention that mixes tokens: it {NEAR_MISS.get(node, why)}",
            where=node_location(node),
            fix=f"what is cached: {', '.join(kind.name for kind in kinds())}",
        )
    for node, why in flow.places:
        raise UnsupportedFeature(
            f"an op that {NEAR_MISS.get(node, why)}",
            where=node_location(node),
            fix="the model must take position_ids and use them wherever it needs positions",
        )
    return flow.positions


def _rewrite(gm: fx.GraphModule, old: dict[str, fx.Node], counted: Collection[fx.Node]) -> None:
    tokens, positions = old["input_ids"], old.get("position_ids")
    ids, rows = _values(gm.graph, VALUE.of(tokens).device)
    layout = add_placeholder(gm, "layout", "layout", rows)
    tokens.meta = {}
    ROLE.set(tokens, "tokens")
    VALUE.set(tokens, ids)
    num_tokens = record(layout.next, _SIZE, tokens, 0)
    for node in old.values():
        _replace_sizes(node, num_tokens)
    first = num_tokens.next
    batch = record(first, _as_batch, tokens)
    tokens.replace_all_uses_with(batch, delete_user_cb=lambda user: user not in (num_tokens, batch.all_input_nodes[0]))
    per_token = record(first, fields.position_ids, layout, num_tokens) if positions or counted else None
    if positions is not None:
        positions.replace_all_uses_with(record(first, _as_batch, per_token))
    for node in counted:
        table = next(iter(node.all_input_nodes), None)
        if table is not None:
            VALUE.take(table)  # of the padded batch's sizes; all values are made again below
        node.replace_all_uses_with(record(node, partial(of_positions, node), per_token, table))
        gm.graph.erase_node(node)
    for name, node in old.items():
        if name != "input_ids":
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if kind_of(node.target) is not None:
            _keep_apart(node, record(node, fields.cu_seqlens_q, layout))
    retype(gm.graph, list(gm.graph.nodes))


def _keep_apart(node: fx.Node, cu_seqlens: fx.Node) -> None:
    """Tell a canonical node where sequences begin, in the place where it takes that."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    place = names.index("cu_seqlens")
    if place < len(node.args):
        node.update_arg(place, cu_seqlens)
    else:
        node.update_kwarg("cu_seqlens", cu_seqlens)


def _values(graph: fx.Graph, device: torch.device) -> tuple[Tensor, Tensor]:
    """The packed tokens [T] and the layout [S, C] as fake tensors of a mode that knows no padded sizes."""
    mode = new_mode()
    use_mode(graph, mode)
    num_tokens, num_rows, num_pages = (new_size(mode, *size) for size in SIZES)
    with mode:
        ids = torch.empty(num_tokens, dtype=torch.int32, device=device)
        return ids, torch.empty(num_rows, NUM_FIXED_COLUMNS + num_pages, dtype=torch.int32, device=device)


def _as_batch(input_ids: Tensor) -> Tensor:
    return torch.ops.aten.to.dtype(torch.ops.aten.unsqueeze.default(input_ids, 0), torch.int64)


def _replace_sizes(node: fx.Node, num_tokens: fx.Node) -> None:
    """B becomes 1 and S becomes T wherever the graph asks for the size of an input."""
    for size in [user for user in node.users if user.target is _SIZE and user is not num_tokens]:
        value = 1 if size.args[1] == 0 else num_tokens
        for user in list(size.users):
            user.args = map_arg(user.args, lambda arg, size=size, value=value: value if arg is size else arg)
            user.kwargs = map_arg(user.kwargs, lambda arg, size=size, value=value: value if arg is size else arg)
        size.graph.erase_node(size)
