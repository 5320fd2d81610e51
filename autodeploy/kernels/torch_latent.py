"""Latent attention from pages on a CPU: torch's fused attention over gathered latents, or over what they expand to.

Absorbed, a head's query is taken to the space of the latents, where all heads have the same keys, which are their
values, too: nothing is expanded, but each score is C long. Expanded, scores are N + P long. Whichever takes fewer
multiplications is done: few queries are absorbed, long prompts expanded.

Shapes: as in `autodeploy.ops.kinds.latent_attention`; T packed tokens, L gathered positions, Q query rows of one
sequence, p page size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels import torch_fields
from autodeploy.kernels.sdpa import GATHER_BYTES, gather, pages_seen, runs
from autodeploy.metadata import fields
from autodeploy.metadata.span import Span, span_of
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.latent_attention import PagedLatentAttention, expand
from autodeploy.ops.site import Site


class _Layer(NamedTuple):
    """What does not change from batch to batch: the up-projections, and how scores are made; `sinks` are [H]."""

    key_up: Tensor
    value_up: Tensor
    scale: float
    sinks: Tensor | None


_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_paged_latent_attention(Tensor query, Tensor shared_query, Tensor key_up, Tensor value_up, Tensor cache,"
    " Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, Tensor decode_pages, Tensor decode_mask,"
    " Tensor? sinks=None, *, float scale, str span='full') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_library.define(
    "torch_sparse_latent_attention(Tensor query, Tensor shared_query, Tensor key_up, Tensor value_up, Tensor cache,"
    " Tensor block_table, Tensor token_to_seq, Tensor position_ids, Tensor cu_seqlens_q, Tensor chosen,"
    " Tensor? sinks=None, *, float scale, str span='full') -> Tensor",
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
    sinks: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
) -> Tensor:
    """Attend, with new latents cached: runs of one-token rows together, longer rows one by one.

    query [1, H, T, N], shared_query [1, H, T, P], cache [pages, p, C] -> [1, T, H, E], zeros for padding tokens. The
    int and bool tensors are fields.
    """
    page_size, seen_by, layer = cache.shape[1], span_of(span), _Layer(key_up, value_up, scale, sinks)
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
        out_THE[tokens] = _absorbed(layer, own, shared, keys_RLC, mask_RL[:, None, None])[:, :, 0]
    for row, seq_len in enumerate(lens):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.stop - tokens.start > 1:
            own, shared = query[:, :, tokens], shared_query[:, :, tokens]
            out_1HQE = _prefill(layer, own, shared, cache, block_table[row], seq_len, seen_by)
            out_THE[tokens] = out_1HQE[0].transpose(0, 1)
    return out_THE[None]


@torch.library.register_fake("autodeploy::torch_paged_latent_attention", lib=_library)
def _(query, shared_query, key_up, value_up, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_up.shape[1])


@torch.library.impl(_library, "torch_sparse_latent_attention", "CompositeExplicitAutograd")
def _sparse_latent_attention(
    query: Tensor,
    shared_query: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    cache: Tensor,
    block_table: Tensor,
    token_to_seq: Tensor,
    position_ids: Tensor,
    cu_seqlens_q: Tensor,
    chosen: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
) -> Tensor:
    """Attend to the chosen latents alone, some tokens after others: each gathers its own.

    chosen [1, T, X] int; the rest is as above.
    """
    page_size, total, num_chosen = cache.shape[1], int(cu_seqlens_q[-1]), chosen.shape[2]
    layer = _Layer(key_up, value_up, scale, sinks)
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_up.shape[1])
    step = max(1, GATHER_BYTES // (num_chosen * cache.shape[2] * cache.itemsize))
    for start in range(0, total, step):
        tokens = slice(start, min(start + step, total))
        place_QX, position_Q1 = chosen[0, tokens].to(torch.int64), position_ids[tokens, None]
        seen_QX = (place_QX >= span_of(span).first_seen(position_Q1)) & (place_QX >= 0) & (place_QX <= position_Q1)
        place_QX = torch.where(seen_QX, place_QX, 0)
        page_QX = block_table[token_to_seq[tokens, None], place_QX // page_size]
        keys_QXC = cache.flatten(0, 1)[page_QX * page_size + place_QX % page_size]
        keys_QXC[torch.logical_not(seen_QX)] = 0
        own, shared = (part[0, :, tokens].transpose(0, 1)[:, :, None] for part in (query, shared_query))
        out_THE[tokens] = _absorbed(layer, own, shared, keys_QXC, seen_QX[:, None, None])[:, :, 0]
    return out_THE[None]


@torch.library.register_fake("autodeploy::torch_sparse_latent_attention", lib=_library)
def _(query, shared_query, key_up, value_up, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_up.shape[1])


def _prefill(
    layer: _Layer, query_1HQN: Tensor, shared_1HQP: Tensor, cache: Tensor, table_P: Tensor, seq_len: int, span: Span
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
    (_, own_dim, latent_dim), value_dim = layer.key_up.shape, layer.value_up.shape[1]
    shared_dim, num_keys = shared_1HQP.shape[3], seq_len - begin
    projected = latent_dim * (own_dim + value_dim)
    absorbed = num_queries * (projected + 2 * num_keys * (latent_dim + shared_dim))
    expanded = num_keys * (projected + 2 * num_queries * (own_dim + shared_dim))
    if absorbed <= expanded:
        return _absorbed(layer, query_1HQN, shared_1HQP, keys_1LC, mask_QL)
    keys, values = expand(keys_1LC[..., :latent_dim], keys_1LC[..., latent_dim:], layer.key_up, layer.value_up)
    queries_1HQD = torch.cat([query_1HQN, shared_1HQP], dim=-1)
    return _attend(layer, queries_1HQD, keys, values, mask_QL)


def _absorbed(layer: _Layer, query_BHQN: Tensor, shared_BHQP: Tensor, keys_BLC: Tensor, mask: Tensor) -> Tensor:
    """Attention in the space of the latents, where `mask`, broadcastable to [B, H, Q, L], is True: [B, H, Q, E]."""
    queries_BHQC = torch.cat([_per_head(query_BHQN, layer.key_up), shared_BHQP], dim=-1)
    # The fused kernel wants values as long as keys: the shared keys ride along.
    keys_B1LC = keys_BLC[:, None]
    out_BHQC = _attend(layer, queries_BHQC, keys_B1LC, keys_B1LC, mask)
    return _per_head(out_BHQC[..., : layer.key_up.shape[2]], layer.value_up.transpose(1, 2))


def _per_head(tensor_BHQX: Tensor, weight_HXY: Tensor) -> Tensor:
    """Each head's rows times its weight: [B, H, Q, Y]."""
    batch, _, num_queries, _ = tensor_BHQX.shape
    rows_HMX = tensor_BHQX.transpose(0, 1).flatten(1, 2)
    return torch.bmm(rows_HMX, weight_HXY).unflatten(1, (batch, num_queries)).transpose(0, 1)


def _attend(layer: _Layer, queries_BHQD: Tensor, keys_BKLD: Tensor, values_BKLE: Tensor, mask: Tensor) -> Tensor:
    """[B, H, Q, E]. The fused kernel wants values as long as keys: it takes half the time on padded ones."""
    missing = keys_BKLD.shape[3] - values_BKLE.shape[3]
    values = F.pad(values_BKLE, (0, missing)) if missing > 0 else values_BKLE
    if layer.sinks is not None:
        # One more key of zeros, whose score is what its mask adds, and which gives nothing.
        keys_BKLD, values = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (keys_BKLD, values))
        shape = torch.broadcast_shapes(mask.shape, (1, layer.sinks.shape[0], 1, 1))
        added = torch.zeros(shape, dtype=queries_BHQD.dtype).masked_fill(torch.logical_not(mask), -torch.inf)
        sinks = layer.sinks.to(added.dtype)[:, None, None].expand(*shape[:3], 1)
        mask = torch.cat([added, sinks], dim=-1)
    is_one_row = queries_BHQD.shape[2] == keys_BKLD.shape[1] == 1
    if is_one_row:  # heads become query rows of one head, so that keys are read once
        queries_BHQD, mask = queries_BHQD.transpose(1, 2), mask.transpose(-3, -2)
    out = F.scaled_dot_product_attention(queries_BHQD, keys_BKLD, values, mask, scale=layer.scale, enable_gqa=True)
    return (out.transpose(1, 2) if is_one_row else out)[..., : values_BKLE.shape[3]]


class TorchLatentAttention(PagedLatentAttention):
    name = "torch_latent"
    meaning = "gathers latents, absorbs the projections of few queries and expands for many; for CPUs"

    def why_not(self, site: Site) -> str | None:
        if site.device.type != "cpu":
            return f"made for cpu, not for {site.device.type}"
        return super().why_not(site)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        if site.facts.num_chosen is not None:
            return super().metadata(layout, num_tokens, site) | {
                "token_to_seq": fields.token_to_seq(layout, num_tokens),
                "position_ids": fields.position_ids(layout, num_tokens),
            }
        pages = (site.num_groups, site.page_size)
        return super().metadata(layout, num_tokens, site) | {
            "decode_pages": torch_fields.decode_pages(layout, site.group, *pages, 1, site.span.name),
            "decode_mask": torch_fields.decode_mask(layout, *pages, site.span.name),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, shared_query, _, _, key_up, value_up, chosen, sinks = tensors
        given = (query, shared_query, key_up, value_up, *caches)
        asked = {"scale": site.facts.scale, "span": site.span.name}
        if chosen is not None:
            rows = [metadata[name] for name in ("block_table", "token_to_seq", "position_ids", "cu_seqlens_q")]
            return torch.ops.autodeploy.torch_sparse_latent_attention.default(*given, *rows, chosen, sinks, **asked)
        names = ("block_table", "seq_lens", "cu_seqlens_q", "decode_pages", "decode_mask")
        return torch.ops.autodeploy.torch_paged_latent_attention.default(
            *given, *(metadata[name] for name in names), sinks, **asked
        )


BACKENDS: tuple[Backend, ...] = (TorchLatentAttention(),)
