"""Recognise every attention and reduce it to the canonical op of its kind, with everything it needs.

Before:                                             After:
    scores = matmul(q, transpose(k, 2, 3)) * 0.125      attn = autodeploy.attention(q, k, v, scale=0.125,
    weights = softmax(where(mask, scores, -3e38))           causal=True).transpose(1, 2)
    attn = matmul(weights, v)

Known are scaled_dot_product_attention, the products and softmaxes that eager models write it in, and flex_attention
(`autodeploy.attention_forms`). A mask is asked what it shows. A row of the batch is one sequence: where the graph takes
positions, they count up along it. A traced model carries canonical nodes already (`autodeploy.trace` makes them); they
are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from autodeploy.attention_forms.check import check
from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.match import SDPA, SOFTMAXES, Matcher
from autodeploy.attention_forms.rewrite import rewrite
from autodeploy.errors import NoAttentionFound, node_location
from autodeploy.graph import near_miss, take_near_misses
from autodeploy.ops.registry import kind_of

CANONICAL = "autodeploy_canonical"
_HEARTS = (SDPA, *SOFTMAXES)
_CONVOLUTION = torch.ops.aten.conv1d.default


@dataclass(frozen=True)
class FindAttention:
    """Turn attention into canonical nodes; raises NoAttentionFound, with the near misses, where there is none."""

    name: str = "find_attention"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        hearts = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _HEARTS]
        matcher = Matcher(gm) if hearts else None
        for node in hearts:
            assert matcher is not None
            reason = _reduce(gm, node, matcher)
            if reason is not None:
                near_miss(gm, node, reason)
        for node in gm.graph.find_nodes(op="call_function", target=_CONVOLUTION):
            near_miss(gm, node, "mixes tokens outside the transformers interfaces")
        canonical = [node for node in gm.graph.nodes if kind_of(node.target) is not None]
        if not canonical:
            raise no_attention(gm)
        new = [node for node in canonical if CANONICAL not in node.meta]
        for node in new:
            node.meta[CANONICAL] = True
        return len(new)


def _reduce(gm: fx.GraphModule, node: fx.Node, matcher: Matcher) -> str | None:
    """Make the attention around `node` canonical, or say why not; None as well where it is no attention."""
    try:
        found = matcher.match(node)
        reason = check(gm, found, matcher.sizes) if found else None
    except Refused as refused:
        return str(refused)
    if found and reason is None:
        rewrite(found)
    return reason


def no_attention(gm: fx.GraphModule) -> NoAttentionFound:
    """The error for a graph without a canonical node, with the near misses in it."""
    misses = [f"{node_location(node)}: {reason}" for node, reason in take_near_misses(gm)]
    near = "; near misses: " + "; ".join(misses) if misses else "; nothing in it mixes tokens in a way we know"
    return NoAttentionFound(
        f"no attention node found in a graph of {len(gm.graph.nodes)} nodes{near}",
        where=type(gm).__name__,
        fix="trace a causal language model of transformers with autodeploy.trace(model)",
    )
