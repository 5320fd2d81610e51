"""`autodeploy::attention`: softmax attention with everything a layer can ask of it.

Shapes: B batch, H query heads, K key-value heads, S tokens, D key size, E value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from autodeploy.metadata import fields
from autodeploy.metadata.span import SORTS, Span, span_of
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, Paged
from autodeploy.ops.kind import Kind
from autodeploy.ops.site import Site, path_of, recorded

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
    chosen: Tensor | None = None,
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
    `chosen` [B, S, X] int holds the positions, in its own sequence, that each query sees of those; other numbers are
    none (sparse attention: DeepSeek-V3.2).
    """
    mask_QS = _mask(query.shape[2], causal, span_of(span), cu_seqlens, query.device)
    if chosen is not None:
        is_chosen_BHQS = _is_chosen(chosen, query.shape[2], cu_seqlens)[:, None]
        mask_QS = is_chosen_BHQS if mask_QS is None else mask_QS & is_chosen_BHQS
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


def _is_chosen(chosen_BSX: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """[B, S, S] bool, True where key j is among the `chosen` of query i."""
    place_BSX = chosen_BSX.to(torch.int64)
    is_none, index_S = place_BSX < 0, torch.arange(num_tokens, device=chosen_BSX.device)
    if cu_seqlens is not None:
        row_S = torch.searchsorted(cu_seqlens, index_S.to(cu_seqlens.dtype), right=True) - 1
        place_BSX = place_BSX + cu_seqlens[row_S][:, None]
    # Padding tokens see themselves, whatever was chosen for them.
    seen = torch.zeros(*place_BSX.shape[:2], num_tokens + 1, dtype=torch.bool, device=chosen_BSX.device)
    place_BSX = torch.where(is_none | (place_BSX >= num_tokens), num_tokens, place_BSX)
    seen = seen.scatter(2, place_BSX, True)[..., :num_tokens]
    return seen if cu_seqlens is None else seen | (index_S >= cu_seqlens[-1])[:, None]


@dataclass(frozen=True)
class AttentionFacts:
    """What a backend may ask about one attention beside its span."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = True
    softcap: float | None = None
    has_sinks: bool = False
    has_bias: bool = False
    has_alibi: bool = False
    has_chosen: bool = False


class Attention(Kind[AttentionFacts]):
    name = "attention"
    meaning = "softmax attention: MHA, MQA, GQA; full, sliding or chunked; softcap, sinks, bias, ALiBi"
    op = torch.ops.autodeploy.attention.default
    layer_types = tuple(sort.layer_type for sort in SORTS)
    tolerances = TOLERANCES
    token_dims = (2, 2, 2, None, None, None, 1)
    result_dim = 1

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, key, value, sinks, bias, alibi_slopes, chosen."""
        names = ("query", "key", "value", "sinks", "bias", "cu_seqlens", "alibi_slopes", "chosen")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        return tuple(given.get(name) for name in names if name != "cu_seqlens")

    def describe(self, node: fx.Node) -> Site[AttentionFacts]:
        query, key, value, sinks, bias, alibi_slopes, chosen = self.tensors(node)
        q, k, v = recorded(node, query, key, value)
        span = span_of(str(node.kwargs.get("span", "full")))
        asked: dict[str, Any] = {name: node.kwargs.get(name) for name in ("scale", "softcap")}
        facts = AttentionFacts(
            num_heads=int(q.shape[1]),
            num_kv_heads=int(k.shape[1]),
            head_dim=int(k.shape[3]),
            value_dim=int(v.shape[3]),
            causal=bool(node.kwargs.get("causal", True)),
            has_sinks=sinks is not None,
            has_bias=bias is not None,
            has_alibi=alibi_slopes is not None,
            has_chosen=chosen is not None,
            **asked,
        )
        return Site(self.name, path_of(node), span.layer_type, q.dtype, q.device, facts, span)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[AttentionFacts]:
        facts = AttentionFacts(num_heads=4, num_kv_heads=2, head_dim=64, value_dim=64, scale=0.125)
        return Site(self.name, "plain layer", "full_attention", dtype, device, facts, page_size=16)

    def operands(self, site: Site[AttentionFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        sizes = ((f.num_heads, f.head_dim), (f.num_kv_heads, f.head_dim), (f.num_kv_heads, f.value_dim))
        query, key, value = (torch.randn(1, heads, num_tokens, size) for heads, size in sizes)
        tensors = [query, key, value, torch.randn(f.num_heads) if f.has_sinks else None, None]
        moved = [None if tensor is None else tensor.to(site.device, site.dtype) for tensor in tensors]
        return (*moved, torch.rand(f.num_heads, device=site.device) / 8 if f.has_alibi else None, None)

    def run(self, tensors: tuple[Any, ...], site: Site[AttentionFacts]) -> Tensor:
        *per_token, sinks, bias, alibi_slopes, chosen = tensors
        asked = {"scale": site.facts.scale, "causal": site.facts.causal, "softcap": site.facts.softcap}
        return attention(*per_token, sinks, bias, None, alibi_slopes, chosen, span=site.span.name, **asked)

    def appended(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensors[1:3]


class PagedAttention(Backend[AttentionFacts]):
    """What all backends of softmax attention over a paged cache have in common.

    `takes_chosen` tells those that attend to chosen keys alone.
    """

    kind = "attention"
    takes_chosen: ClassVar[bool] = False

    def why_not(self, site: Site[AttentionFacts]) -> str | None:
        if not site.facts.causal:
            return "attention that is not causal cannot run from a cache"
        if site.facts.has_bias:
            return "an additive bias is not supported with a paged cache"
        if site.facts.has_chosen and not self.takes_chosen:
            return "no sparse attention"
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[AttentionFacts]) -> tuple[Cache, ...]:
        """One paged cache for keys [K, D] and one for values [K, E]."""
        f = site.facts
        key = Paged("key", (f.num_kv_heads, f.head_dim), site.dtype, site.group)
        return key, Paged("value", (f.num_kv_heads, f.value_dim), site.dtype, site.group)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[AttentionFacts]) -> dict[str, Tensor]:
        """Where the tokens of each sequence are."""
        return {
            "block_table": fields.block_table(layout, site.group, site.num_groups),
            "seq_lens": fields.seq_lens(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def scoring(self, tensors: tuple[Any, ...], site: Site[AttentionFacts]) -> dict[str, Any]:
        """What ops take by name beside tensors: how scores are made, and `alibi_slopes` where the layer has them."""
        asked = {"scale": site.facts.scale, "span": site.span.name, "softcap": site.facts.softcap}
        return asked if tensors[5] is None else asked | {"alibi_slopes": tensors[5]}


@torch.library.custom_op("autodeploy::reference_append", mutates_args=("cache",))
def reference_append(new: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys or values [1, K, T, D] to their slots of a cache [pages, p, K, D]; padding goes to page 0."""
    cache.flatten(0, 1)[slot_mapping] = new[0].transpose(0, 1)


@torch.library.custom_op("autodeploy::reference_paged_attention", mutates_args=())
def reference_paged_attention(
    query: Tensor,
    sinks: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    alibi_slopes: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
) -> Tensor:
    """Attend each sequence, whose new keys and values are cached, to exactly the slots it sees.

    query [1, H, T, D], caches [pages, p, K, D or E] -> [1, T, H, E], zeros for padding tokens. The int tensors are the
    fields of the same names.
    """
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_cache.shape[3])
    starts = cu_seqlens_q.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        context_len = seq_len - (stop - start)
        first = max(0, span_of(span).first_seen(context_len))
        seen_L = torch.arange(first, seq_len, device=query.device)
        slot_L = block_table[row, seen_L // key_cache.shape[1]] * key_cache.shape[1] + seen_L % key_cache.shape[1]
        query_Q1 = torch.arange(context_len, seq_len, device=query.device)[:, None]
        mask_QL = (seen_L <= query_Q1) & (seen_L >= span_of(span).first_seen(query_Q1))
        if chosen is not None:
            mask_QL &= (chosen[0, start:stop, :, None] == seen_L).any(1)
        out_1HQE = attend(
            query[:, :, start:stop],
            key_cache.flatten(0, 1)[slot_L].transpose(0, 1)[None],
            value_cache.flatten(0, 1)[slot_L].transpose(0, 1)[None],
            mask_QL,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
        out_THE[start:stop] = out_1HQE[0].transpose(0, 1)
    return out_THE[None]


@reference_paged_attention.register_fake
def _(query, sinks, key_cache, value_cache, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_cache.shape[3])


class ReferenceAttention(PagedAttention):
    name = "reference"
    meaning = "the oracle: attends one sequence after another"
    takes_chosen = True

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[AttentionFacts]) -> dict[str, Tensor]:
        slots = fields.slot_mapping(layout, num_tokens, site.group, site.num_groups, site.page_size)
        return super().metadata(layout, num_tokens, site) | {"slot_mapping": slots}

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        for new, cache in zip(tensors[1:3], caches, strict=True):
            torch.ops.autodeploy.reference_append.default(new, cache, metadata["slot_mapping"])

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q"))
        return torch.ops.autodeploy.reference_paged_attention.default(
            tensors[0], tensors[3], *caches, *rows, chosen=tensors[6], **self.scoring(tensors, site)
        )


_REFERENCE = ReferenceAttention()
KIND = Attention()
