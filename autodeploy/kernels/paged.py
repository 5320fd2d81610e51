"""What all backends of softmax attention over a paged cache have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels.support import supports_dtype
from autodeploy.ops.spec import Backend, CacheSpec, Site


class PagedAttention(Backend):
    """Calls one op per layer: `op(query, key, value, sinks, key_cache, value_cache, **metadata, scale=, span=,
    softcap=)` with query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E], writing to both caches.
    An op is given `alibi_slopes=` where the layer has them.
    """

    kind = "attention"
    op: torch._ops.OpOverload

    def why_not(self, site: Site) -> str | None:
        if not site.params["causal"]:
            return "attention that is not causal cannot run from a cache"
        if site.params["has_bias"]:
            return "an additive bias is not supported with a paged cache"
        return supports_dtype(site.dtype, site.device)

    def caches(self, site: Site) -> tuple[CacheSpec, ...]:
        """One paged cache for keys [K, D] and one for values [K, E]."""
        heads = site.params["num_kv_heads"]
        key = CacheSpec("key", "paged", (heads, site.params["head_dim"]), site.dtype, site.group)
        value = CacheSpec("value", "paged", (heads, site.params["value_dim"]), site.dtype, site.group)
        return key, value

    def call(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, key, value, sinks, _, alibi_slopes = tensors
        scoring = {"scale": site.params["scale"], "span": site.span.name, "softcap": site.params["softcap"]}
        if alibi_slopes is not None:
            scoring["alibi_slopes"] = alibi_slopes
        return self.op(query, key, value, sinks, *caches, **metadata, **scoring)
