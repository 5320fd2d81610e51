"""Latent attention from pages on a CPU: torch's fused attention over gathered latents, or over what they expand to.

Absorbed, a head's query is taken to the space of the latents, where all heads have the same keys, which are their
values, too: nothing is expanded, but each score is C long. Expanded, scores are N + P long. Whichever takes fewer
multiplications is done: few queries are absorbed, long prompts expanded.

Shapes: as in `autodeploy.ops.kinds.latent_attention`; T packed tokens, L gathered positions, Q query rows of one
sequence, p page size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels import torch_fields
from autodeploy.kernels.sdpa import GATHER_BYTES, gather, pages_seen, runs
from autodeploy.metadata.span import Span, span_of
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.latent_attention import PagedLatentAttention, expand
from autodeploy.ops.site import Site

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_paged_latent_attention(Tensor query, Tensor shared_query, Tensor key_up, Tensor value_up, Tensor cache,"
    " Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, Tensor decode_pages, Tensor decode_mask, *,"
    " float scale, str span='full') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "torch_paged_latent_attention", "CompositeExplicitAutograd")
def _paged_latent_attention(
    query: Tensor,
    shared_query: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    decode_pages: Tensor,
    decode_mask: Tensor,
    *,
    scale: float,
    span: str = "full",
) -> Tensor:
    """Attend, with new latents cached: runs of one-token rows together, longer rows one by one.

    query [1, H, T, N], shared_query [1, H, T, P], cache [pages, p, C] -> [1, T, H, E], zeros for padding tokens. The
    int and bool tensors are fields.
    """
    page_size, seen_by = cache.shape[1], span_of(span)
    lens, starts = seq_lens.tolist(), cu_seqlens_q.tolist()
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_up.shape[1])
    counts = [pages_seen(seq_len, page_size, seen_by) for seq_len in lens]
    for first, last in runs(starts, counts, GATHER_BYTES // (cache.nbytes // cache.shape[0])):
        tokens, width = slice(starts[first], starts[last]), max(counts[first:last])
        mask_RL = decode_mask[first:last, : width * page_size]
        keys_RLC = gather(cache, decode_pages[first:last, :, :width])[:, 0]
        keys_RLC[torch.logical_not(mask_RL)] = 0  # what no sequence owns may be NaN
        # Rows of one token each: [rows, H, 1, .].
        own, shared = (part[0, :, tokens].transpose(0, 1)[:, :, None] for part in (query, shared_query))
        out_THE[tokens] = _absorbed(own, shared, key_up, value_up, keys_RLC, mask_RL[:, None, None], scale)[:, :, 0]
    for row, seq_len in enumerate(lens):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.stop - tokens.start > 1:
            own, shared = query[:, :, tokens], shared_query[:, :, tokens]
            out_THE[tokens] = _prefill(own, shared, key_up, value_up, cache, block_table[row], seq_len, seen_by, scale)[
                0
            ].transpose(0, 1)
    return out_THE[None]


@torch.library.register_fake("autodeploy::torch_paged_latent_attention", lib=_library)
def _(query, shared_query, key_up, value_up, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_up.shape[1])


def _prefill(
    query_1HQN: Tensor,
    shared_1HQP: Tensor,
    key_up_HNR: Tensor,
    value_up_HER: Tensor,
    cache: Tensor,
    table_P: Tensor,
    seq_len: int,
    span: Span,
    scale: float,
) -> Tensor:
    """Attention of one sequence's last Q tokens to exactly the positions they see: [1, H, Q, E]."""
    page_size, num_queries = cache.shape[1], query_1HQN.shape[2]
    context_len = seq_len - num_queries
    begin = max(0, span.first_seen(context_len))
    first_page, end_page = begin // page_size, (seq_len - 1) // page_size + 1
    seen = slice(begin - first_page * page_size, seq_len - first_page * page_size)
    keys_1LC = gather(cache, table_P[None, None, first_page:end_page])[:, 0, seen]
    query_Q1, key_L = torch.arange(context_len, seq_len)[:, None], torch.arange(begin, seq_len)
    mask_QL = (key_L <= query_Q1) & (key_L >= span.first_seen(query_Q1))
    (_, own_dim, latent_dim), value_dim = key_up_HNR.shape, value_up_HER.shape[1]
    shared_dim, num_keys = shared_1HQP.shape[3], seq_len - begin
    projected = latent_dim * (own_dim + value_dim)
    absorbed = num_queries * (projected + 2 * num_keys * (latent_dim + shared_dim))
    expanded = num_keys * (projected + 2 * num_queries * (own_dim + shared_dim))
    if absorbed <= expanded:
        return _absorbed(query_1HQN, shared_1HQP, key_up_HNR, value_up_HER, keys_1LC, mask_QL, scale)
    keys, values = expand(keys_1LC[..., :latent_dim], keys_1LC[..., latent_dim:], key_up_HNR, value_up_HER)
    queries_1HQD = torch.cat([query_1HQN, shared_1HQP], dim=-1)
    return _attend(queries_1HQD, keys, values, mask_QL, scale)


def _absorbed(
    query_BHQN: Tensor,
    shared_BHQP: Tensor,
    key_up_HNR: Tensor,
    value_up_HER: Tensor,
    keys_BLC: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Attention in the space of the latents, where `mask`, broadcastable to [B, H, Q, L], is True: [B, H, Q, E]."""
    num_queries, latent_dim = query_BHQN.shape[2], key_up_HNR.shape[2]
    queries_BHQC = torch.cat([_per_head(query_BHQN, key_up_HNR), shared_BHQP], dim=-1)
    if num_queries == 1:
        # Heads become query rows of one head, so that keys are read once.
        queries_BHQC = queries_BHQC.transpose(1, 2)
    # The fused kernel wants values as long as keys: the shared keys ride along.
    out_BHQC = F.scaled_dot_product_attention(
        queries_BHQC, keys_BLC[:, None], keys_BLC[:, None], mask, scale=scale, enable_gqa=True
    )
    if num_queries == 1:
        out_BHQC = out_BHQC.transpose(1, 2)
    return _per_head(out_BHQC[..., :latent_dim], value_up_HER.transpose(1, 2))


def _per_head(tensor_BHQX: Tensor, weight_HXY: Tensor) -> Tensor:
    """Each head's rows times its weight: [B, H, Q, Y]."""
    batch, _, num_queries, _ = tensor_BHQX.shape
    rows_HMX = tensor_BHQX.transpose(0, 1).flatten(1, 2)
    return torch.bmm(rows_HMX, weight_HXY).unflatten(1, (batch, num_queries)).transpose(0, 1)


def _attend(queries_BHQD: Tensor, keys_BHLD: Tensor, values_BHLE: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[B, H, Q, E]. The fused kernel wants values as long as keys: it takes half the time on padded ones."""
    missing = keys_BHLD.shape[3] - values_BHLE.shape[3]
    values = F.pad(values_BHLE, (0, missing)) if missing > 0 else values_BHLE
    out = F.scaled_dot_product_attention(queries_BHQD, keys_BHLD, values, mask, scale=scale)
    return out[..., : values_BHLE.shape[3]]


class TorchLatentAttention(PagedLatentAttention):
    name = "torch_latent"
    meaning = "gathers latents, absorbs the projections of few queries and expands for many; for CPUs"

    def why_not(self, site: Site) -> str | None:
        if site.device.type != "cpu":
            return f"made for cpu, not for {site.device.type}"
        return super().why_not(site)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        pages = (site.num_groups, site.page_size)
        return super().metadata(layout, num_tokens, site) | {
            "decode_pages": torch_fields.decode_pages(layout, site.group, *pages, 1, site.span.name),
            "decode_mask": torch_fields.decode_mask(layout, *pages, site.span.name),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, shared_query, _, _, key_up, value_up = tensors
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q", "decode_pages", "decode_mask"))
        return torch.ops.autodeploy.torch_paged_latent_attention.default(
            query, shared_query, key_up, value_up, *caches, *rows, scale=site.facts.scale, span=site.span.name
        )


BACKENDS: tuple[Backend, ...] = (TorchLatentAttention(),)
