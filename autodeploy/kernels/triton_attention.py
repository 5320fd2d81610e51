"""Attention over a paged cache in Triton: one launch for a decode step, or two; three for any other step.

Shapes: S sequences, T packed tokens, H query heads, K key-value heads, D key size, E value size, p page size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels import support, tile_fields
from autodeploy.kernels.triton_append import append, in_rows
from autodeploy.kernels.triton_decode import decode
from autodeploy.kernels.triton_paged import TritonPagedAttention
from autodeploy.kernels.triton_prefill import prefill, tile_tokens
from autodeploy.kernels.triton_softmax import Scoring
from autodeploy.ops.cache import Cache
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_SIZE = 256

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "triton_paged_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor(a!) key_cache,"
    " Tensor(b!) value_cache, Tensor slot_mapping, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q,"
    " Tensor query_tiles, Tensor? alibi_slopes=None, *, float scale, str span='full', float? softcap=None,"
    " str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "triton_paged_attention", "CompositeExplicitAutograd")
def _paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    query_tiles: Tensor,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Write the new keys and values to their slots, and attend each row to what it sees.

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, E], sinks and slopes [H], caches [N, p, K, D or E],
    contiguous -> [1, T, H, E], zeros for padding tokens. The int tensors are fields. In a decode step the decode
    kernel does everything.
    """
    query_HTD, key_KTD, value_KTE = (in_rows(tensor[0]) for tensor in (query, key, value))
    out_THE = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    scoring = Scoring.of(scale, span, softcap)
    new, caches, rows = (key_KTD, value_KTE), (key_cache, value_cache), (block_table, seq_lens, cu_seqlens_q)
    per_head = (sinks, alibi_slopes)
    if step_kind != DECODE:
        append(*new, *caches, out_THE, slot_mapping, cu_seqlens_q)
    decode(query_HTD, *new, *per_head, *caches, *rows, out_THE, scoring)
    if step_kind != DECODE:
        prefill(query_HTD, *per_head, *caches, *rows, query_tiles, out_THE, scoring)
    return out_THE[None]


@torch.library.register_fake("autodeploy::triton_paged_attention", lib=_library)
def _(query, key, value, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_library.define(
    "triton_attend(Tensor query, Tensor? sinks, Tensor key_cache, Tensor value_cache, Tensor block_table,"
    " Tensor seq_lens, Tensor cu_seqlens_q, Tensor query_tiles, Tensor? alibi_slopes=None, *, float scale,"
    " str span='full', float? softcap=None, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "triton_attend", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    sinks: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    query_tiles: Tensor,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """The same for a layer whose keys and values another layer has written."""
    query_HTD = in_rows(query[0])
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value_cache.shape[3])
    scoring = Scoring.of(scale, span, softcap)
    shared = (sinks, alibi_slopes, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q)
    decode(query_HTD, None, None, *shared, out_THE, scoring)
    if step_kind != DECODE:
        prefill(query_HTD, *shared, query_tiles, out_THE, scoring)
    return out_THE[None]


@torch.library.register_fake("autodeploy::triton_attend", lib=_library)
def _(query, sinks, key_cache, value_cache, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value_cache.shape[3])


class TritonAttention(TritonPagedAttention):
    """`cache_dtype` None caches in the model's dtype; float8_e4m3fn halves the cache of a 16-bit model."""

    meaning = "split-KV decode and tiled prefill in Triton"

    def __init__(self, name: str = "triton", cache_dtype: torch.dtype | None = None) -> None:
        self.name, self.cache_dtype = name, cache_dtype
        if cache_dtype is not None:
            self.meaning = f"{self.meaning}, over a cache in {cache_dtype}".replace("torch.", "")

    def why_not(self, site: Site) -> str | None:
        refused = super().why_not(site) or support.why_not(site.device)
        if refused is not None:
            return refused
        if site.dtype not in _DTYPES:
            return f"{site.dtype} is not supported by the Triton kernels".replace("torch.", "")
        size = max(site.facts.head_dim, site.facts.value_dim)
        if size > _MAX_HEAD_SIZE:
            return f"heads of {size} are larger than {_MAX_HEAD_SIZE}"
        if self.cache_dtype is not None and site.device.type == "cuda" and _lacks_float8(site.device):
            return "an 8-bit cache needs compute capability 8.9 or later"
        return None

    def caches(self, site: Site) -> tuple[Cache, ...]:
        dtype = self.cache_dtype or site.dtype
        return tuple(replace(cache, dtype=dtype) for cache in super().caches(site))

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        group_size = site.facts.num_heads // site.facts.num_kv_heads
        tiles = tile_fields.query_tiles(layout, num_tokens, tile_tokens(group_size, site.dtype))
        return super().metadata(layout, num_tokens, site) | {"query_tiles": tiles}

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q", "query_tiles"))
        return torch.ops.autodeploy.triton_attend.default(
            tensors[0], tensors[3], *caches, *rows, **self.scoring(tensors, site)
        )

    def append_and_attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        """In one launch for a decode step."""
        return torch.ops.autodeploy.triton_paged_attention.default(
            *tensors[:4], *caches, **metadata, **self.scoring(tensors, site)
        )


def _lacks_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) < (8, 9)


BACKENDS: tuple[TritonAttention, ...] = (
    TritonAttention(),
    TritonAttention("triton_fp8", cache_dtype=torch.float8_e4m3fn),
)
