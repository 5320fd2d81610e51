"""The paged CPU backend: torch's fused scaled dot product attention over gathered pages.

A page of this backend is [K, p, D]: one copy per page and head gives each head's keys as one contiguous run, which
the fused kernel reads up to twice as fast as the [p, K, D] order (benchmarks/cpu_attention.py).

Shapes: N pages, S sequences, P pages per sequence, T packed tokens, H query heads, K key-value heads, G = H / K,
D key size, E value size, p page size, L gathered positions, Q query rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels import torch_fields
from autodeploy.metadata.span import Span, span_of
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.attention import PagedAttention
from autodeploy.ops.site import Site

# Keys and values that are gathered at once. Between 1 and 16 MiB the speed is the same; above 32 MiB glibc maps fresh
# memory for each gather, whose page faults cost more than the copy.
GATHER_BYTES = 4 << 20


class Scoring(NamedTuple):
    """What a layer does to its scores beyond masking; `sinks` and `alibi_slopes` are [H]."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None and self.alibi_slopes is None


# Defined by hand: a call of a `torch.library.custom_op` that mutates costs some 70 us on a CPU, this one 6.
_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "sdpa_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor head_slots) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sdpa_paged_attention(Tensor query, Tensor? sinks, Tensor key_cache, Tensor value_cache, Tensor block_table,"
    " Tensor seq_lens, Tensor cu_seqlens_q, Tensor decode_pages, Tensor decode_mask, Tensor? alibi_slopes=None, *,"
    " float scale, str span='full', float? softcap=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "sdpa_append", "CompositeExplicitAutograd")
def _append(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, head_slots: Tensor) -> None:
    """Write new keys and values [1, K, T, D or E] to their places of the caches [N, p, K, D or E], in pages [K, p]."""
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, cache.shape[-1]).index_put_((head_slots,), new[0].transpose(0, 1))


@torch.library.register_fake("autodeploy::sdpa_append", lib=_library)
def _(*_: Tensor) -> None:
    return None


@torch.library.impl(_library, "sdpa_paged_attention", "CompositeExplicitAutograd")
def _paged_attention(
    query: Tensor,
    sinks: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    decode_pages: Tensor,
    decode_mask: Tensor,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
) -> Tensor:
    """Attend, with new keys and values cached: runs of one-token rows together, longer rows one by one.

    query [1, H, T, D], sinks and slopes [H], caches [N, p, K, D or E] (each page used as [K, p, D or E])
    -> [1, T, H, E], zeros for padding tokens. The int and bool tensors are fields.
    """
    num_pages, page_size, num_kv_heads, _ = key_cache.shape
    caches = tuple(cache.view(num_pages * num_kv_heads, page_size, -1) for cache in (key_cache, value_cache))
    scoring, seen_by = Scoring(scale, softcap, sinks, alibi_slopes), span_of(span)
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_cache.shape[3])
    query_THD = query[0].transpose(0, 1)
    lens, starts = seq_lens.tolist(), cu_seqlens_q.tolist()
    page_bytes = (key_cache.nbytes + value_cache.nbytes) // num_pages
    counts = [pages_seen(seq_len, page_size, seen_by) for seq_len in lens]
    for first, last in runs(starts, counts, GATHER_BYTES // page_bytes):
        tokens, width = slice(starts[first], starts[last]), max(counts[first:last])
        index_CKP, mask_CL = decode_pages[first:last, :, :width], decode_mask[first:last, : width * page_size]
        out_THE[tokens] = _decode(query_THD[tokens], caches, index_CKP, mask_CL, scoring)
    for row, seq_len in enumerate(lens):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.stop - tokens.start > 1:
            table_KP = block_table[row] * num_kv_heads + torch.arange(num_kv_heads, dtype=torch.int32)[:, None]
            out_THE[tokens] = _prefill(query[:, :, tokens], caches, table_KP, seq_len, seen_by, scoring)
    return out_THE[None]


@torch.library.register_fake("autodeploy::sdpa_paged_attention", lib=_library)
def _(query, sinks, key_cache, value_cache, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_cache.shape[3])


def pages_seen(seq_len: int, page_size: int, span: Span) -> int:
    """How many pages the last token of a sequence sees."""
    return (seq_len - 1) // page_size - max(0, span.first_seen(seq_len - 1)) // page_size + 1


def runs(starts: list[int], counts: list[int], max_pages: int) -> Iterator[tuple[int, int]]:
    """Neighbouring one-token rows [first, last) that together gather at most `max_pages`, or one row if it has more."""
    first, width = 0, 0
    for row, count in enumerate(counts):
        is_decode = starts[row + 1] - starts[row] == 1
        width = max(width, count)
        if first < row and (not is_decode or (row + 1 - first) * width > max_pages):
            yield first, row
            first, width = row, count
        if not is_decode:
            first, width = row + 1, 0
    if first < len(counts):
        yield first, len(counts)


def _decode(
    query_CHD: Tensor, caches: tuple[Tensor, ...], index_CKP: Tensor, mask_CL: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of one token of each of C sequences to the positions of its gathered pages in `mask_CL`: [C, H, E]."""
    keys_CKLD, values_CKLE = (gather(cache, index_CKP) for cache in caches)
    # What no sequence owns may be NaN, which even a weight of zero lets through.
    row, position = torch.logical_not(mask_CL).nonzero(as_tuple=True)
    for gathered in (keys_CKLD, values_CKLE):
        gathered[row, :, position] = 0
    mask_CKQL = mask_CL[:, None, None]
    if not scoring.is_plain:
        return _attend(query_CHD[:, :, None], keys_CKLD, values_CKLE, mask_CKQL, scoring)[:, :, 0]
    # The query heads of a group become query rows, so that its keys are read once.
    query_CKGD = query_CHD.reshape(*index_CKP.shape[:2], -1, query_CHD.shape[2])
    out_CKGE = F.scaled_dot_product_attention(query_CKGD, keys_CKLD, values_CKLE, mask_CKQL, scale=scoring.scale)
    return out_CKGE.flatten(1, 2)


def _prefill(
    query_1HQD: Tensor,
    caches: tuple[Tensor, ...],
    table_KP: Tensor,
    seq_len: int,
    span: Span,
    scoring: Scoring,
) -> Tensor:
    """Attention of one sequence's last Q tokens to exactly the positions they see: [Q, H, E]."""
    page_size = caches[0].shape[1]
    context_len = seq_len - query_1HQD.shape[2]
    begin = max(0, span.first_seen(context_len))
    first_page, end_page = begin // page_size, (seq_len - 1) // page_size + 1
    seen = slice(begin - first_page * page_size, seq_len - first_page * page_size)
    keys, values = (gather(cache, table_KP[None, :, first_page:end_page])[:, :, seen] for cache in caches)
    if scoring.is_plain and context_len == 0 and span.first_seen(seq_len - 1) <= 0:
        out_1HQE = F.scaled_dot_product_attention(
            query_1HQD, keys, values, is_causal=True, scale=scoring.scale, enable_gqa=True
        )
        return out_1HQE[0].transpose(0, 1)
    query_Q1, key_L = torch.arange(context_len, seq_len)[:, None], torch.arange(begin, seq_len)
    mask_QL = (key_L <= query_Q1) & (key_L >= span.first_seen(query_Q1))
    return _attend(query_1HQD, keys, values, mask_QL, scoring)[0].transpose(0, 1)


def gather(cache: Tensor, index_CKP: Tensor) -> Tensor:
    """The pages at `index_CKP` of a cache [N * K, p, D] as [C, K, L, D]."""
    return cache.index_select(0, index_CKP.flatten()).view(*index_CKP.shape[:2], -1, cache.shape[-1])


def _attend(query_BHQD: Tensor, keys_BKLD: Tensor, values_BKLE: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention where `mask`, broadcastable to [B, H, Q, L], is True, up to the query's own position: [B, H, Q, E]."""
    if scoring.is_plain:
        return F.scaled_dot_product_attention(
            query_BHQD, keys_BKLD, values_BKLE, mask, scale=scoring.scale, enable_gqa=True
        )
    # The fused kernel knows neither soft caps, nor sinks, nor slopes.
    shape_BHQ = query_BHQD.shape[:3]
    query_BKRD = query_BHQD.reshape(keys_BKLD.shape[0], keys_BKLD.shape[1], -1, keys_BKLD.shape[3])
    scores_BKRL = torch.matmul(query_BKRD, keys_BKLD.transpose(2, 3))
    precise = torch.promote_types(scores_BKRL.dtype, torch.float32)
    scores_BHQL = scores_BKRL.to(precise).view(*shape_BHQ, -1) * scoring.scale
    if scoring.softcap is not None:
        scores_BHQL = torch.tanh(scores_BHQL / scoring.softcap) * scoring.softcap
    if scoring.alibi_slopes is not None:
        index_L = torch.arange(keys_BKLD.shape[2])
        own = (index_L * mask).amax(-1, keepdim=True)
        scores_BHQL = scores_BHQL + scoring.alibi_slopes[:, None, None] * (index_L - own)
    scores_BHQL = scores_BHQL.masked_fill(~mask, -torch.inf)
    if scoring.sinks is not None:
        sinks_BHQ1 = scoring.sinks.to(precise).view(1, -1, 1, 1).expand(*shape_BHQ, 1)
        scores_BHQL = torch.cat([scores_BHQL, sinks_BHQ1], dim=-1)
    weights_BHQL = torch.softmax(scores_BHQL, dim=-1)[..., : keys_BKLD.shape[2]].to(values_BKLE.dtype)
    weights_BKRL = weights_BHQL.reshape(*query_BKRD.shape[:3], -1)
    return torch.matmul(weights_BKRL, values_BKLE).view(*shape_BHQ, -1)


class SdpaAttention(PagedAttention):
    name = "sdpa"
    meaning = "gathers pages and calls torch's fused attention; for CPUs"

    def why_not(self, site: Site) -> str | None:
        if site.device.type != "cpu":
            return f"made for cpu, not for {site.device.type}"
        return super().why_not(site)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        heads, span = site.facts.num_kv_heads, site.span.name
        pages = (site.group, site.num_groups, site.page_size)
        return super().metadata(layout, num_tokens, site) | {
            "head_slots": torch_fields.head_slots(layout, num_tokens, *pages, heads),
            "decode_pages": torch_fields.decode_pages(layout, *pages, heads, span),
            "decode_mask": torch_fields.decode_mask(layout, *pages[1:], span),
        }

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        torch.ops.autodeploy.sdpa_append.default(*tensors[1:3], *caches, metadata["head_slots"])

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q", "decode_pages", "decode_mask"))
        return torch.ops.autodeploy.sdpa_paged_attention.default(
            tensors[0], tensors[3], *caches, *rows, **self.scoring(tensors, site)
        )


BACKENDS: tuple[Backend, ...] = (SdpaAttention(),)
