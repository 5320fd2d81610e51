"""Recognise attention whose keys and values are products of one vector per token, and cache that vector instead.

Before:                                             After:
    kv = linear(latent, w).view(B, S, H, N + E)         y = autodeploy.latent_attention(q[..., :N], q[..., N:],
    k = cat([kv[..., :N], shared.expand(H)], -1)            latent, shared, w[:, :N], w[:, N:], scale=...)
    y = autodeploy.attention(q, k, kv[..., N:], ...)

Multi-head latent attention (DeepSeek-V2 and what came of it) is written so in all its models. `attention_forms.latent`
says how it is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from autodeploy.attention_forms.evaluate import Refused
from autodeploy.attention_forms.latent import find_latent, rewrite
from autodeploy.graph.edit import near_miss
from autodeploy.graph.values import retype
from autodeploy.ops.kinds import attention


@dataclass(frozen=True)
class FindLatentAttention:
    """Turn canonical attention into latent attention where that makes what is cached smaller."""

    name: str = "find_latent_attention"
    may_round: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> int:
        num_found = 0
        for node in gm.graph.find_nodes(op="call_function", target=attention.KIND.op):
            try:
                found = find_latent(gm, node)
            except Refused as reason:
                near_miss(gm, node, str(reason))
                continue
            if found is not None:
                retype(gm.graph, rewrite(found))
                num_found += 1
        return num_found
