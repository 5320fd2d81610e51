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

from torch import fx

from autodeploy.attention_forms.find import find
from autodeploy.graph.meta import CANONICAL


@dataclass(frozen=True)
class FindAttention:
    """Turn attention into canonical nodes; raises NoAttentionFound, with the near misses, where there is none."""

    name: str = "find_attention"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        new = [node for node in find(gm) if not CANONICAL.on(node)]
        for node in new:
            CANONICAL.set(node, True)
        return len(new)
