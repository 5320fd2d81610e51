"""`autodeploy::attention`: softmax attention with everything a layer can ask of it.

Shapes: B batch, H query heads, K key-value heads, S tokens, D key size, E value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.location import module_path, node_location
from autodeploy.graph.meta import VALUE
from autodeploy.metadata.span import SORTS, Span, span_of
from autodeploy.ops.spec import Kind, Site

# (atol, rtol) of a backend against the canonical op, by the dtype of its cache. float32 and float64: another order of
# summation, and a softmax that is float32 here in any case; float16 and bfloat16: weights and result are each rounded
# to 11 and 8 bits; float8_e4m3fn: as bfloat16, once the canonical op's keys and values are rounded as the cache rounds
# them, to 4 bits (which by itself moves results by tenths).
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-6, 1e-6),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
    torch.float8_e4m3fn: (1.6e-2, 1.6e-2),
}


@torch.library.custom_op("autodeploy::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    span: str = "full",
    softcap: float | None = None,
) -> Tensor:
    """softmax(softcap(Q Kᵀ · scale) + bias + alibi + mask) V, in the arithmetic of transformers' eager attention.

    query [B, H, S, D], key [B, K, S, D], value [B, K, S, E] -> [B, S, H, E], in query's dtype; H is a multiple of K.
    A query sees no key after it if `causal`, and only keys of its `span` (by name); where it is not `causal`, it also
    has to be in theirs.
    `softcap` c squashes scores to c·tanh(score / c) (Gemma 2). `sinks` [H] is one more logit per head that takes
    probability and gives nothing (gpt-oss). `bias` is added to the scores, broadcastable to [B, H, S, S].
    `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other; tokens after
    the last sequence are padding and see only themselves. `alibi_slopes` [H] float32 adds slope · (j - i) to the score
    of key j (ALiBi: Press et al., arXiv 2108.12409), in float32 or more; without sinks slope · j gives the same.
    """
    mask_QS = _mask(query.shape[2], causal, span_of(span), cu_seqlens, query.device)
    out_BHSE = attend(
        query, key, value, mask_QS, scale=scale, softcap=softcap, sinks=sinks, bias=bias, alibi_slopes=alibi_slopes
    )
    return out_BHSE.transpose(1, 2).contiguous()


@attention.register_fake
def _(query, key, value, *_, **__):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def attend(
    query_BHQD: Tensor,
    key_BKSD: Tensor,
    value_BKSE: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The arithmetic shared by the canonical op and the oracle backend; `mask` is True where a key is seen.

    Returns [B, H, Q, E]. The last query stands at the last key.
    """
    group_size = query_BHQD.shape[1] // key_BKSD.shape[1]
    key_BHSD = key_BKSD.repeat_interleave(group_size, dim=1)
    value_BHSE = value_BKSE.repeat_interleave(group_size, dim=1)
    scores_BHQS = torch.matmul(query_BHQD, key_BHSD.transpose(2, 3)) * scale
    if softcap is not None:
        scores_BHQS = torch.tanh(scores_BHQS / softcap) * softcap
    if bias is not None:
        scores_BHQS = scores_BHQS + bias
    if alibi_slopes is not None:
        index_S = torch.arange(key_BKSD.shape[2], device=key_BKSD.device)
        index_Q = index_S[key_BKSD.shape[2] - query_BHQD.shape[2] :]
        scores_BHQS = scores_BHQS + alibi_slopes[:, None, None] * (index_S - index_Q[:, None])
    if mask is not None:
        scores_BHQS = scores_BHQS.masked_fill(~mask, torch.finfo(scores_BHQS.dtype).min)
    if sinks is None:
        weights_BHQS = torch.softmax(scores_BHQS, dim=-1, dtype=torch.float32).to(query_BHQD.dtype)
    else:
        sinks_BHQ1 = sinks.reshape(1, -1, 1, 1).expand(scores_BHQS.shape[0], -1, scores_BHQS.shape[2], -1)
        logits = torch.cat([scores_BHQS, sinks_BHQ1], dim=-1)
        logits = logits - logits.max(dim=-1, keepdim=True).values
        weights_BHQS = torch.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1].to(value_BHSE.dtype)
    return torch.matmul(weights_BHQS, value_BHSE)


def _mask(num_tokens: int, causal: bool, span: Span, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """[S, S] bool, True where query i sees key j, or None where everything is seen."""
    if not causal and span.longest is None and cu_seqlens is None:
        return None
    index_S = torch.arange(num_tokens, device=device)
    key_S, query_S1 = index_S, index_S[:, None]
    sequence_S = first_S = torch.zeros_like(index_S)
    if cu_seqlens is not None:
        sequence_S = torch.searchsorted(cu_seqlens, index_S.to(cu_seqlens.dtype), right=True)
        first_S = cu_seqlens[sequence_S - 1].to(index_S.dtype)
    # Where each one's span begins in the packed row.
    begin_S = span.first_seen(index_S - first_S) + first_S
    seen_SS = (key_S >= begin_S[:, None]) & (query_S1 >= begin_S)
    if causal:
        seen_SS = seen_SS & (query_S1 >= key_S)
    if cu_seqlens is not None:
        seen_SS = seen_SS & (sequence_S[:, None] == sequence_S)
        seen_SS = torch.where((index_S >= cu_seqlens[-1])[:, None], query_S1 == key_S, seen_SS)
    return seen_SS


def _tensors(node: fx.Node) -> tuple[Any, ...]:
    """query, key, value, sinks, bias, alibi_slopes of an attention node."""
    names = ("query", "key", "value", "sinks", "bias", "cu_seqlens", "alibi_slopes")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given.get(name) for name in names if name != "cu_seqlens")


def _describe(node: fx.Node) -> Site:
    query, key, value, sinks, bias, alibi_slopes = _tensors(node)
    if not all(isinstance(arg, fx.Node) and VALUE.on(arg) for arg in (query, key, value)):
        raise UnsupportedFeature("an attention node whose inputs have no recorded shapes", where=node_location(node))
    q, k, v = (VALUE.of(arg) for arg in (query, key, value))
    span = span_of(str(node.kwargs.get("span", "full")))
    return Site(
        kind="attention",
        path=module_path(node) or node.name,
        layer_type=span.layer_type,
        dtype=q.dtype,
        device=q.device,
        span=span,
        params={
            "num_heads": int(q.shape[1]),
            "num_kv_heads": int(k.shape[1]),
            "head_dim": int(k.shape[3]),
            "value_dim": int(v.shape[3]),
            "scale": node.kwargs["scale"],
            "causal": node.kwargs.get("causal", True),
            "softcap": node.kwargs.get("softcap"),
            "has_sinks": sinks is not None,
            "has_bias": bias is not None,
            "has_alibi": alibi_slopes is not None,
        },
    )


KIND = Kind(
    name="attention",
    op=torch.ops.autodeploy.attention.default,
    describe=_describe,
    tensors=_tensors,
    layer_types=tuple(sort.layer_type for sort in SORTS),
    meaning="softmax attention: MHA, MQA, GQA; full, sliding or chunked; softcap, sinks, bias, ALiBi",
)
