"""`autodeploy::latent_attention`: softmax attention whose keys and values come of one small vector per token.

Multi-head latent attention (MLA: DeepSeek-V2, arXiv 2405.04434): what is cached of a token is its latent and the part
of its key that all heads share. For few queries the up-projections are absorbed into query and result instead.

Shapes: B batch, H heads, S tokens, N size of a head's own part of keys, P of the shared part, R of the latent,
E value size, C = R + P what is cached per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autodeploy.metadata import fields
from autodeploy.metadata.span import span_of
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, Paged
from autodeploy.ops.kind import Kind
from autodeploy.ops.kinds import attention
from autodeploy.ops.site import Site, path_of, recorded

# As attention's, with one more product and its rounding on each side; absorbed projections sum in another order.
TOLERANCES = {
    torch.float32: (3e-5, 3e-5),
    torch.float64: (1e-6, 1e-6),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3.2e-2, 3.2e-2),
}


@torch.library.custom_op("autodeploy::latent_attention", mutates_args=())
def latent_attention(
    query: Tensor,
    shared_query: Tensor,
    latent: Tensor,
    shared_key: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    cu_seqlens: Tensor | None = None,
    chosen: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    span: str = "full",
) -> Tensor:
    """attention([query | shared_query], [key_up · latent | shared_key], value_up · latent), per head.

    query [B, H, S, N], shared_query [B, H, S, P], latent [B, S, R], shared_key [B, S, P], key_up [H, N, R],
    value_up [H, E, R] -> [B, S, H, E], in query's dtype. `chosen`, `sinks` and the
    rest are as in `autodeploy::attention`.
    """
    keys, values = expand(latent, shared_key, key_up, value_up)
    queries = torch.cat([query, shared_query], dim=-1)
    tensors = (queries, keys, values, sinks, None, cu_seqlens, None, chosen)
    return attention.attention(*tensors, scale=scale, causal=causal, span=span)


@latent_attention.register_fake
def _(query, shared_query, latent, shared_key, key_up, value_up, *_, **__):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_up.shape[1])


def expand(latent_BSR: Tensor, shared_BSP: Tensor, key_up_HNR: Tensor, value_up_HER: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, S, N + P] and values [B, H, S, E] of each head."""
    num_heads = key_up_HNR.shape[0]
    own_BHSN, values_BHSE = (
        F.linear(latent_BSR, up.flatten(0, 1)).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for up in (key_up_HNR, value_up_HER)
    )
    return torch.cat([own_BHSN, shared_BSP[:, None].expand(-1, num_heads, -1, -1)], dim=-1), values_BHSE


@dataclass(frozen=True)
class LatentFacts:
    """What a backend may ask about one latent attention beside its span: N, P, R and E of above."""

    num_heads: int
    own_dim: int
    shared_dim: int
    latent_dim: int
    value_dim: int
    scale: float
    causal: bool = True
    has_sinks: bool = False
    num_chosen: int | None = None  # how many keys are chosen for each query; None where it sees all


class LatentAttention(Kind[LatentFacts]):
    name = "latent_attention"
    meaning = "softmax attention over one latent vector per token (MLA)"
    op = torch.ops.autodeploy.latent_attention.default
    layer_types = attention.KIND.layer_types
    tolerances = TOLERANCES
    token_dims = (2, 2, 1, 1, None, None, 1, None)
    result_dim = 1

    @property
    def reference(self) -> Backend:
        return _REFERENCE

    def tensors(self, node: fx.Node) -> tuple[Any, ...]:
        """query, shared_query, latent, shared_key, key_up, value_up, chosen, sinks."""
        names = ("query", "shared_query", "latent", "shared_key", "key_up", "value_up", "cu_seqlens", "chosen", "sinks")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        return tuple(given.get(name) for name in names if name != "cu_seqlens")

    def describe(self, node: fx.Node) -> Site[LatentFacts]:
        *tensors, chosen, sinks = self.tensors(node)
        q, shared, latent, _, _, value_up = recorded(node, *tensors)
        span = span_of(str(node.kwargs.get("span", "full")))
        scale: Any = node.kwargs["scale"]
        facts = LatentFacts(
            num_heads=int(q.shape[1]),
            own_dim=int(q.shape[3]),
            shared_dim=int(shared.shape[3]),
            latent_dim=int(latent.shape[2]),
            value_dim=int(value_up.shape[1]),
            scale=scale,
            causal=bool(node.kwargs.get("causal", True)),
            has_sinks=sinks is not None,
            num_chosen=int(recorded(node, chosen)[0].shape[2]) if chosen is not None else None,
        )
        return Site(self.name, path_of(node), span.layer_type, q.dtype, q.device, facts, span)

    def example(self, dtype: torch.dtype, device: torch.device) -> Site[LatentFacts]:
        facts = LatentFacts(num_heads=4, own_dim=64, shared_dim=32, latent_dim=128, value_dim=64, scale=0.1)
        return Site(self.name, "plain layer", "full_attention", dtype, device, facts, page_size=16)

    def operands(self, site: Site[LatentFacts], num_tokens: int) -> tuple[Tensor | None, ...]:
        f = site.facts
        shapes = (
            (1, f.num_heads, num_tokens, f.own_dim),
            (1, f.num_heads, num_tokens, f.shared_dim),
            (1, num_tokens, f.latent_dim),
            (1, num_tokens, f.shared_dim),
            (f.num_heads, f.own_dim, f.latent_dim),
            (f.num_heads, f.value_dim, f.latent_dim),
        )
        scales = (1.0, 1.0, 1.0, 1.0, f.latent_dim**-0.5, f.latent_dim**-0.5)
        tensors = [
            (torch.randn(shape) * scale).to(site.device, site.dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        ]
        chosen = None if f.num_chosen is None else _random_choice(num_tokens, f.num_chosen).to(site.device)
        sinks = torch.randn(f.num_heads).to(site.device, site.dtype) if f.has_sinks else None
        return (*tensors, chosen, sinks)

    def run(self, tensors: tuple[Any, ...], site: Site[LatentFacts]) -> Tensor:
        asked = {"scale": site.facts.scale, "causal": site.facts.causal, "span": site.span.name}
        return latent_attention(*tensors[:6], None, *tensors[6:], **asked)

    def appended(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensors[2:4]


def _random_choice(num_tokens: int, count: int) -> Tensor:
    """[1, S, X] int32: for each query itself and others of its past, in any order, -1 for what is missing."""
    score_SS = torch.rand(num_tokens, num_tokens).tril(-1) + torch.eye(num_tokens)
    width = min(count, num_tokens)
    score_SX, place_SX = score_SS.topk(width, dim=1)
    place_SX = torch.where(score_SX > 0, place_SX, -1)
    return F.pad(place_SX, (0, count - width), value=-1)[None].to(torch.int32)


class PagedLatentAttention(Backend[LatentFacts]):
    """What all backends of latent attention have in common: a page holds the latents and shared keys of its tokens."""

    kind = "latent_attention"

    def why_not(self, site: Site[LatentFacts]) -> str | None:
        if not site.facts.causal:
            return "attention that is not causal cannot run from a cache"
        return why_not_dtype(site.dtype, site.device)

    def caches(self, site: Site[LatentFacts]) -> tuple[Cache, ...]:
        """One vector [C] for each token: its latent, then the key that its heads share."""
        return (Paged("latent", (site.facts.latent_dim + site.facts.shared_dim,), site.dtype, site.group),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[LatentFacts]) -> dict[str, Tensor]:
        """Where the tokens of each sequence are, and where the new ones go."""
        return {
            "block_table": fields.block_table(layout, site.group, site.num_groups),
            "seq_lens": fields.seq_lens(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "slot_mapping": fields.slot_mapping(layout, num_tokens, site.group, site.num_groups, site.page_size),
        }

    def append(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> None:
        torch.ops.autodeploy.latent_append.default(*tensors[2:4], *caches, metadata["slot_mapping"])


@torch.library.custom_op("autodeploy::latent_append", mutates_args=("cache",))
def latent_append(latent: Tensor, shared_key: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new latents [1, T, R] and shared keys [1, T, P] to their slots of a cache [pages, p, C]."""
    cache.flatten(0, 1)[slot_mapping] = torch.cat([latent[0], shared_key[0]], dim=-1)


@torch.library.custom_op("autodeploy::reference_paged_latent_attention", mutates_args=())
def reference_paged_latent_attention(
    query: Tensor,
    shared_query: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    chosen: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
) -> Tensor:
    """Expand the latents of each sequence, whose new ones are cached, and attend to exactly the slots it sees.

    query [1, H, T, N], shared_query [1, H, T, P], cache [pages, p, C] -> [1, T, H, E], zeros for padding tokens.
    """
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_up.shape[1])
    starts = cu_seqlens_q.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        context_len = seq_len - (stop - start)
        seen_L = torch.arange(max(0, span_of(span).first_seen(context_len)), seq_len, device=query.device)
        slot_L = block_table[row, seen_L // cache.shape[1]] * cache.shape[1] + seen_L % cache.shape[1]
        cached_1LC = cache.flatten(0, 1)[slot_L][None]
        latent_dim = key_up.shape[2]
        keys, values = expand(cached_1LC[..., :latent_dim], cached_1LC[..., latent_dim:], key_up, value_up)
        query_Q1 = torch.arange(context_len, seq_len, device=query.device)[:, None]
        mask_QL = (seen_L <= query_Q1) & (seen_L >= span_of(span).first_seen(query_Q1))
        if chosen is not None:
            mask_QL = mask_QL & (chosen[0, start:stop, :, None] == seen_L).any(1)
        out_1HQE = attention.attend(
            torch.cat([query, shared_query], dim=-1)[:, :, start:stop],
            keys,
            values,
            mask_QL,
            scale=scale,
            sinks=sinks,
        )
        out_THE[start:stop] = out_1HQE[0].transpose(0, 1)
    return out_THE[None]


@reference_paged_latent_attention.register_fake
def _(query, shared_query, key_up, value_up, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_up.shape[1])


class ReferenceLatentAttention(PagedLatentAttention):
    name = "reference"
    meaning = "the oracle: expands the latents of one sequence after another"

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        query, shared_query, _, _, key_up, value_up, *more = tensors
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q"))
        return torch.ops.autodeploy.reference_paged_latent_attention.default(
            query, shared_query, key_up, value_up, *caches, *rows, *more, scale=site.facts.scale, span=site.span.name
        )


_REFERENCE = ReferenceLatentAttention()
KIND = LatentAttention()
