"""Recognise every attention node and reduce it to the canonical op of its kind, with everything it needs.

Before:                                             After:
    attn = scaled_dot_product_attention(q, k, v,        attn = autodeploy.attention(q, k, v, scale=0.125,
        is_causal=True, scale=0.125)                        causal=True).transpose(1, 2)

A traced model already carries canonical nodes (`autodeploy.trace` makes them); they are checked and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from autodeploy.errors import NoAttentionFound, node_location
from autodeploy.graph import near_miss, record, take_near_misses
from autodeploy.ops.registry import kind_of

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_MIXERS = (_SDPA, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default, torch.ops.aten.conv1d.default)
CANONICAL = "autodeploy_canonical"


@dataclass(frozen=True)
class FindAttention:
    """Turn attention into canonical nodes; raises NoAttentionFound, with the near misses, where there is none."""

    name: str = "find_attention"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.find_nodes(op="call_function", target=_SDPA):
            if check(gm, node) is None:
                rewrite(node)
        found = 0
        canonical = 0
        for node in gm.graph.nodes:
            if kind_of(node.target) is not None:
                canonical += 1
                found += CANONICAL not in node.meta
                node.meta[CANONICAL] = True
            elif node.op == "call_function" and node.target in _MIXERS and (reason := check(gm, node)):
                near_miss(gm, node, reason)
        if canonical == 0:
            raise no_attention(gm)
        return found


def check(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """None where `node` can become a canonical attention node, else why not."""
    if node.target is not _SDPA:
        return "mixes tokens outside the transformers attention interface" if _mixes_tokens(node) else None
    arguments = _arguments(node)
    if arguments["attn_mask"] is not None:
        return "has a mask that is not known to be causal or a window"
    if not arguments["is_causal"]:
        return "is not causal"
    if arguments["dropout_p"]:
        return "has dropout; call model.eval() before tracing"
    query, key = (arguments[name] for name in ("query", "key"))
    if not all(isinstance(arg, fx.Node) and "val" in arg.meta for arg in (query, key)):
        return "has inputs without recorded shapes"
    return None


def rewrite(node: fx.Node) -> None:
    """Replace one scaled_dot_product_attention by its canonical form."""
    arguments = _arguments(node)
    query = arguments["query"]
    scale = arguments["scale"] or query.meta["val"].shape[-1] ** -0.5

    def canonical(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = torch.ops.autodeploy.attention.default
        return torch.ops.aten.transpose.int(attention(query, key, value, scale=scale, causal=True), 1, 2)

    replacement = record(node, canonical, query, arguments["key"], arguments["value"])
    replacement.meta["val"] = node.meta["val"]
    replacement.all_input_nodes[0].meta["val"] = node.meta["val"].transpose(1, 2)
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def no_attention(gm: fx.GraphModule) -> NoAttentionFound:
    """The error for a graph without a canonical node, with the near misses in it."""
    misses = [f"{node_location(node)}: {reason}" for node, reason in take_near_misses(gm)]
    near = "; near misses: " + "; ".join(misses) if misses else "; nothing in it mixes tokens in a way we know"
    return NoAttentionFound(
        f"no attention node found in a graph of {len(gm.graph.nodes)} nodes{near}",
        where=type(gm).__name__,
        fix="trace a causal language model of transformers with autodeploy.trace(model)",
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    schema = target._schema.arguments
    defaults = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return defaults | dict(zip((arg.name for arg in schema), node.args, strict=False)) | node.kwargs


def _mixes_tokens(node: fx.Node) -> bool:
    """Whether a softmax or convolution looks like attention: a softmax whose result is multiplied as a matrix."""
    if node.target is torch.ops.aten.conv1d.default:
        return True
    users = list(node.users)
    while users:
        user = users.pop()
        if user.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default):
            return True
        if user.target in (torch.ops.aten.to.dtype, torch.ops.aten.dropout.default, torch.ops.aten.slice.Tensor):
            users += list(user.users)
    return False
