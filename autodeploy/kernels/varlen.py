"""torch's own variable-length flash attention over a paged cache: `torch.nn.attention.varlen`.

Shapes: S sequences, P pages per sequence, T packed tokens, H query heads, K key-value heads, D head size, p page size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels import support
from autodeploy.kernels.triton_paged import TritonPagedAttention
from autodeploy.metadata.span import Chunk, span_of
from autodeploy.ops.backend import Backend
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

_PAGE_MULTIPLE = 256
_MAX_HEAD_DIM = 256

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "varlen_paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor cu_seqlens_q, *, float scale, str span='full', float? softcap=None, str step_kind='mixed')"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "varlen_paged_attention", "CompositeExplicitAutograd")
def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Attend to the pages in place, with new keys and values cached.

    query [1, H, T, D], caches [pages, p, K, D] -> [1, T, H, D], zeros for padding tokens. The int tensors are the
    fields of the same names. `softcap` is None: `why_not` refuses others.
    """
    from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

    assert softcap is None
    query_THD = query[0].transpose(0, 1)
    out_THD = torch.zeros(query_THD.shape, dtype=query.dtype, device=query.device)
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": ((span_of(span).longest or 0) - 1, 0),
        "enable_gqa": True,
        "seqused_k": seq_lens,
        "block_table": block_table,
    }
    # How many keys a row has is said by seqused_k. FA2 asks for cu_seq_k all the same, and FA3 refuses it.
    cu_seq_k = None if _is_fa3() else cu_seqlens_q
    max_k = block_table.shape[1] * key_cache.shape[1]
    if step_kind == DECODE:
        # Of one token per row FA2 packs the query heads of a group together, and gives a tensor of its own with zeros
        # for rows that have no keys.
        out = varlen_attn(query_THD, key_cache, value_cache, cu_seqlens_q, cu_seq_k, 1, max_k, **options)
        assert isinstance(out, Tensor)
        return out[None]
    # Rows of `out_THD` that belong to no sequence keep their zeros.
    max_q = max(2, query.shape[2])
    varlen_attn_out(out_THD, query_THD, key_cache, value_cache, cu_seqlens_q, cu_seq_k, max_q, max_k, **options)
    return out_THD[None]


@torch.library.register_fake("autodeploy::varlen_paged_attention", lib=_library)
def _(query, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


def _is_fa3() -> bool:
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl() == "FA3"


def _has_block_tables() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "block_table" in inspect.signature(varlen_attn).parameters


class VarlenAttention(TritonPagedAttention):
    name = "varlen"
    meaning = "torch.nn.attention.varlen over block tables"

    def why_not(self, site: Site) -> str | None:
        refused = super().why_not(site) or support.why_not(site.device) or _why_not_here(site)
        return refused or _why_not_kernel(site)

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        rows = (metadata[name] for name in ("block_table", "seq_lens", "cu_seqlens_q"))
        return torch.ops.autodeploy.varlen_paged_attention.default(
            tensors[0], *caches, *rows, **self.scoring(tensors, site)
        )


def _why_not_here(site: Site) -> str | None:
    """What this torch and this device lack."""
    if not _has_block_tables():
        return f"varlen_attn of torch {torch.__version__} takes no block table"
    if site.device.type == "cuda" and torch.cuda.get_device_capability(site.device) < (8, 0):
        return "flash attention needs compute capability 8.0 or later"
    if site.page_size % _PAGE_MULTIPLE and not _is_fa3():
        return f"pages of {site.page_size} tokens: FA2 needs a multiple of {_PAGE_MULTIPLE}, FA3 is not activated"
    return None


def _why_not_kernel(site: Site) -> str | None:
    """What flash attention lacks for this layer."""
    f = site.facts
    if isinstance(site.span, Chunk):
        return "varlen_attn has no chunks"
    if site.dtype not in (torch.float16, torch.bfloat16):
        return f"{site.dtype} is neither float16 nor bfloat16".replace("torch.", "")
    if f.softcap is not None:
        return "varlen_attn has no soft cap"
    if f.has_sinks:
        return "varlen_attn has no sinks"
    if f.has_alibi:
        return "varlen_attn has no ALiBi"
    if f.head_dim != f.value_dim:
        return f"values of {f.value_dim} and keys of {f.head_dim} must be of one size"
    if f.head_dim % 8 or f.head_dim > _MAX_HEAD_DIM:
        return f"heads of {f.head_dim} are not a multiple of 8 up to {_MAX_HEAD_DIM}"
    return None


BACKENDS: tuple[Backend, ...] = (VarlenAttention(),)
