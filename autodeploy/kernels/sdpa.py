"""The paged CPU backend: torch's fused scaled dot product attention over gathered pages.

A page of this backend is [K, p, D]: one copy per page and head gives each head's keys as one contiguous run, which
the fused kernel reads up to twice as fast as the [p, K, D] order (benchmarks/cpu_attention.py).

Shapes: N pages, S sequences, P pages per sequence, T packed tokens, H query heads, K key-value heads, G = H / K,
D key size, E value size, p page size, L gathered positions, Q query rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels.reference import key_value_caches, refuse_attention
from autodeploy.metadata import fields, fields_torch
from autodeploy.metadata.fields_torch import NO_WINDOW
from autodeploy.ops.spec import Backend, CacheSpec, Site

# Gathered keys and values of one round of decoding: what stays in a core's cache between the copy and its use.
_GATHER_BYTES = 2 << 20

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "sdpa_paged_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, *, Tensor head_slots, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q,"
    " Tensor decode_pages, Tensor decode_mask, float scale, int? window=None, float? softcap=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "sdpa_paged_attention", "CompositeExplicitAutograd")
def _paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    head_slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    decode_pages: Tensor,
    decode_mask: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Write the new keys and values, then attend: runs of one-token rows together, longer rows one by one.

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, E], sinks [H], caches [N, p, K, D or E] (each page used as
    [K, p, D or E]) -> [1, T, H, E], zeros for padding tokens. The int and bool tensors are fields.
    """
    num_pages, page_size, num_heads, _ = key_cache.shape
    caches = (
        key_cache.view(num_pages * num_heads, page_size, -1),
        value_cache.view(num_pages * num_heads, page_size, -1),
    )
    for cache, new in zip(caches, (key, value), strict=True):
        cache.flatten(0, 1)[head_slots] = new[0].transpose(0, 1)
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    query_THD = query[0].transpose(0, 1)
    lens, starts = seq_lens.tolist(), cu_seqlens_q.tolist()
    page_bytes = (key_cache[0].numel() + value_cache[0].numel()) * key_cache.element_size()
    spans = [_pages_seen(seq_len, page_size, window) for seq_len in lens]
    for first, last in _runs(starts, spans, _GATHER_BYTES // page_bytes):
        width = max(spans[first:last])
        index_CKP, mask_CL = decode_pages[first:last, :, :width], decode_mask[first:last, : width * page_size]
        keys, values = (_gather(cache, index_CKP, mask_CL) for cache in caches)
        tokens = slice(starts[first], starts[last])
        out_CH1E = _attend(query_THD[tokens, :, None], keys, values, mask_CL[:, None], sinks, scale, softcap)
        out_THE[tokens] = out_CH1E[:, :, 0]
    for row, seq_len in enumerate(lens):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.stop - tokens.start > 1:
            query_1HQD = query[:, :, tokens]
            out_THE[tokens] = _prefill(
                query_1HQD, caches, block_table[row], seq_len, num_heads, sinks, scale, window, softcap
            )
    return out_THE[None]


@torch.library.register_fake("autodeploy::sdpa_paged_attention", lib=_library)
def _(query, key, value, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _pages_seen(seq_len: int, page_size: int, window: int | None) -> int:
    """How many pages the last token of a sequence sees."""
    first = 0 if window is None else max(0, seq_len - window)
    return (seq_len - 1) // page_size - first // page_size + 1


def _runs(starts: list[int], spans: list[int], max_pages: int) -> Iterator[tuple[int, int]]:
    """Neighbouring one-token rows [first, last) that together gather at most `max_pages`, or one row if it has more."""
    first, width = 0, 0
    for row, span in enumerate(spans):
        is_decode = starts[row + 1] - starts[row] == 1
        width = max(width, span)
        if first < row and (not is_decode or (row + 1 - first) * width > max_pages):
            yield first, row
            first, width = row, span
        if not is_decode:
            first, width = row + 1, 0
    if first < len(spans):
        yield first, len(spans)


def _gather(cache: Tensor, index_CKP: Tensor, mask_CL: Tensor) -> Tensor:
    """The pages at `index_CKP` as [C, K, L, D], zeros where `mask_CL` is False: what is there may be NaN."""
    pages = cache.index_select(0, index_CKP.flatten())
    gathered_CKLD = pages.view(*index_CKP.shape[:2], -1, cache.shape[-1])
    row, position = torch.logical_not(mask_CL).nonzero(as_tuple=True)
    gathered_CKLD[row, :, position] = 0
    return gathered_CKLD


def _prefill(
    query_1HQD: Tensor,
    caches: tuple[Tensor, Tensor],
    table_P: Tensor,
    seq_len: int,
    num_kv_heads: int,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one sequence's last Q tokens to exactly the positions they see: [Q, H, E]."""
    num_queries, page_size = query_1HQD.shape[2], caches[0].shape[1]
    context_len = seq_len - num_queries
    begin = 0 if window is None else max(0, context_len + 1 - window)
    first_page = begin // page_size
    pages_P = table_P[first_page : (seq_len - 1) // page_size + 1]
    index_KP = pages_P * num_kv_heads + torch.arange(num_kv_heads, dtype=torch.int32)[:, None]
    seen = slice(begin - first_page * page_size, seq_len - first_page * page_size)
    keys, values = (
        cache.index_select(0, index_KP.flatten()).view(1, num_kv_heads, -1, cache.shape[-1])[:, :, seen]
        for cache in caches
    )
    distance_QL = torch.arange(context_len, seq_len)[:, None] - torch.arange(begin, seq_len)
    mask_QL = (distance_QL >= 0) & (distance_QL < (window or NO_WINDOW))
    return _attend(query_1HQD, keys, values, mask_QL[None], sinks, scale, softcap)[0].transpose(0, 1)


def _attend(
    query_BHQD: Tensor,
    keys_BKLD: Tensor,
    values_BKLE: Tensor,
    mask_BQL: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of grouped heads without repeating keys; `mask_BQL` is True where a position is seen: [B, H, Q, E]."""
    num_groups = keys_BKLD.shape[1]
    num_queries = query_BHQD.shape[2]
    query_BKRD = query_BHQD.unflatten(1, (num_groups, -1)).flatten(2, 3)
    if softcap is None and sinks_H is None:
        mask = mask_BQL if num_queries == 1 else mask_BQL.repeat(1, query_BKRD.shape[2] // num_queries, 1)
        out_BKRE = F.scaled_dot_product_attention(query_BKRD, keys_BKLD, values_BKLE, mask[:, None], scale=scale)
        return out_BKRE.unflatten(2, (-1, num_queries)).flatten(1, 2)
    scores_BKRL = torch.matmul(query_BKRD, keys_BKLD.transpose(2, 3)).float() * scale
    scores_BHQL = scores_BKRL.unflatten(2, (-1, num_queries)).flatten(1, 2)
    if softcap is not None:
        scores_BHQL = torch.tanh(scores_BHQL / softcap) * softcap
    scores_BHQL = scores_BHQL.masked_fill(~mask_BQL[:, None], -torch.inf)
    if sinks_H is not None:
        sinks_BHQ1 = sinks_H.float().view(1, -1, 1, 1).expand(*scores_BHQL.shape[:3], 1)
        scores_BHQL = torch.cat([scores_BHQL, sinks_BHQ1], dim=-1)
    weights_BHQL = torch.softmax(scores_BHQL, dim=-1)[..., : keys_BKLD.shape[2]].to(values_BKLE.dtype)
    weights_BKRL = weights_BHQL.unflatten(1, (num_groups, -1)).flatten(2, 3)
    return torch.matmul(weights_BKRL, values_BKLE).unflatten(2, (-1, num_queries)).flatten(1, 2)


class SdpaAttention(Backend):
    name = "sdpa"
    kind = "attention"
    meaning = "gathers pages and calls torch's fused attention; for CPUs"

    def why_not(self, site: Site) -> str | None:
        if site.device.type != "cpu":
            return f"made for cpu, not for {site.device.type}"
        return refuse_attention(site)

    def caches(self, site: Site) -> tuple[CacheSpec, ...]:
        return key_value_caches(site)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        heads, window = site.params["num_kv_heads"], site.window or NO_WINDOW
        pages = (site.group, site.num_groups, site.page_size)
        return {
            "head_slots": fields_torch.head_slots(layout, num_tokens, *pages, heads),
            "block_table": fields.block_table(layout, site.group, site.num_groups),
            "seq_lens": fields.seq_lens(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "decode_pages": fields_torch.decode_pages(layout, *pages, heads, window),
            "decode_mask": fields_torch.decode_mask(layout, *pages[1:], window),
        }

    def call(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, key, value, sinks, _ = tensors
        return torch.ops.autodeploy.sdpa_paged_attention.default(
            query,
            key,
            value,
            sinks,
            *caches,
            **metadata,
            scale=site.params["scale"],
            window=site.window,
            softcap=site.params["softcap"],
        )


BACKENDS: tuple[Backend, ...] = (SdpaAttention(),)
