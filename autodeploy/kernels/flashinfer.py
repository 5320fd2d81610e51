"""FlashInfer's paged attention. Its plans are made once for each distinct key, whatever the number of layers.

A plan says which piece of which sequence each thread block computes. FlashInfer makes it on the host from lengths, so
that the plan is an op inside `prepare_metadata`, which waits for the device: it cannot be captured in a CUDA graph.
The op has no state: a plan is two tensors, and layers of equal keys come to share one as they share any metadata.

Shapes: S sequences, T packed tokens, H query heads, K key-value heads, D head size, p page size.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from autodeploy.errors import UnsupportedFeature
from autodeploy.kernels import flashinfer_fields, support
from autodeploy.kernels.triton_paged import TritonPagedAttention
from autodeploy.metadata import fields
from autodeploy.metadata.span import Chunk, span_of
from autodeploy.ops.backend import Backend
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# The wrappers' module-level functions, which take a plan as an argument, have the same parameters in these versions.
_FIRST_VERSION, _FIRST_UNKNOWN = (0, 6, 9), (0, 7, 0)
_HEAD_DIMS = (64, 128, 256)
# As FlashInfer's wrappers allocate them: tables of a plan; partial results of split sequences, the more the larger the
# groups of query heads.
_TABLE_BYTES, _PARTIAL_BYTES = 8 << 20, 256 << 20
# Numbers of a plan, after how many they are: 15 of FA2's and 9 of FA3's in these versions.
_SCHEDULE_SIZE = 32
_NHD_LAYOUT, _CAUSAL = 0, 1
# What a run may be told and this backend has no use for: other masks, biases and scales.
_UNUSED: dict[str, Any] = {
    "maybe_lse": None,
    "enable_pdl": False,
    "maybe_custom_mask": None,
    "maybe_mask_indptr": None,
    "maybe_alibi_slopes": None,
    "maybe_prefix_len_ptr": None,
    "maybe_token_pos_in_items_ptr": None,
    "maybe_max_item_len_ptr": None,
    "scale_q": None,
    "scale_k": None,
    "scale_v": None,
    "rope_scale": 1.0,
    "rope_theta": 1e4,
    "token_pos_in_items_len": 0,
}
_INSTALL = "pip install 'flashinfer-python>=0.6.9,<0.7'"

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "flashinfer_plan(Tensor cu_seqlens_q, Tensor page_indptr, Tensor last_page_len, *,"
    " int num_heads, int num_kv_heads, int head_dim, int page_size, ScalarType dtype, str span='full',"
    " bool has_softcap=False, str step_kind='mixed') -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "flashinfer_paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens_q,"
    " Tensor page_indptr, Tensor page_indices, Tensor last_page_len, Tensor schedule, Tensor tables, *, float scale,"
    " str span='full', float? softcap=None, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _module(step_kind: StepKind, head_dim: int, dtype: torch.dtype, span: str, cap: bool) -> Any:
    """FlashInfer's kernels, compiled when first asked for, and whether they are FA2."""
    from flashinfer.prefill import get_batch_prefill_module  # pyright: ignore[reportMissingImports]
    from flashinfer.utils import determine_attention_backend  # pyright: ignore[reportMissingImports]

    # FA3 does not split a long sequence among thread blocks, which a decode step lives by.
    device = torch.device("cuda", torch.cuda.current_device())
    name = "fa2" if step_kind == DECODE else determine_attention_backend(device, 0, False, False, dtype, dtype)
    types = (dtype, dtype, dtype, torch.int32)
    return get_batch_prefill_module(name, *types, head_dim, head_dim, 0, span != "full", cap, False), name == "fa2"


@torch.library.impl(_library, "flashinfer_plan", "CompositeExplicitAutograd")
def _plan(
    cu_seqlens_q: Tensor,
    page_indptr: Tensor,
    last_page_len: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    span: str = "full",
    has_softcap: bool = False,
    step_kind: StepKind = MIXED,
) -> tuple[Tensor, Tensor]:
    """The schedule [32] int64, on the CPU (how many numbers, the numbers, zeros), and its tables [N] uint8.

    The int tensors are fields. Copies them to the host and waits for it; raises UnsupportedFeature under capture.
    """
    device, num_rows = cu_seqlens_q.device, last_page_len.shape[0]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedFeature(
            "FlashInfer plans on the host, which a CUDA graph cannot repeat",
            fix="run without CUDA graphs, or choose another backend",
        )
    module, is_fa2 = _module(step_kind, head_dim, dtype, span, has_softcap)
    lengths = torch.cat([cu_seqlens_q, page_indptr, last_page_len]).cpu()
    starts, pages, last = lengths.split([num_rows + 1, num_rows + 1, num_rows])
    seen = torch.where(pages.diff() > 0, (pages.diff() - 1) * page_size + last, 0)
    tables = torch.empty(_TABLE_BYTES, dtype=torch.uint8, device=device)
    # The copy from here is queued, and this memory given back, before it has run. Whoever gets it next is another
    # plan, which first waits for its lengths, and so for the copy.
    pinned = torch.empty(_TABLE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    partial = torch.empty(_PARTIAL_BYTES, dtype=torch.uint8, device=device)
    sizes = (int(starts[-1]), num_rows, num_heads, num_kv_heads, page_size, False, head_dim, head_dim)
    splitting = (-1, False, 0) if is_fa2 else ()
    mask = (True, (span_of(span).longest or 0) - 1)
    numbers = list(module.plan(partial, tables, pinned, starts, pages, seen.int(), *sizes, *mask, *splitting))
    padding = [0] * (_SCHEDULE_SIZE - 1 - len(numbers))
    return torch.tensor([len(numbers), *numbers, *padding]), tables


@torch.library.register_fake("autodeploy::flashinfer_plan", lib=_library)
def _(cu_seqlens_q, *_, **__):
    schedule = torch.empty(_SCHEDULE_SIZE, dtype=torch.int64, device="cpu")
    return schedule, cu_seqlens_q.new_empty(_TABLE_BYTES, dtype=torch.uint8)


@torch.library.impl(_library, "flashinfer_paged_attention", "CompositeExplicitAutograd")
def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    page_indptr: Tensor,
    page_indices: Tensor,
    last_page_len: Tensor,
    schedule: Tensor,
    tables: Tensor,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Attend to the pages in place, as planned, with new keys and values cached.

    query [1, H, T, D], caches [pages, p, K, D] -> [1, T, H, D], zeros for padding tokens. The int tensors are fields
    and a plan.
    """
    _, num_heads, num_tokens, head_dim = query.shape
    out_THD = torch.zeros((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    module, _ = _module(step_kind, head_dim, query.dtype, span, softcap is not None)
    count, *numbers = schedule.tolist()
    partial = torch.empty(_PARTIAL_BYTES, dtype=torch.uint8, device=query.device)
    module.paged_run(
        float_workspace_buffer=partial,
        int_workspace_buffer=tables,
        plan_info_vec=numbers[:count],
        q=query[0].transpose(0, 1),
        paged_k_cache=key_cache,
        paged_v_cache=value_cache,
        qo_indptr=cu_seqlens_q,
        paged_kv_indptr=page_indptr,
        paged_kv_indices=page_indices,
        paged_kv_last_page_len=last_page_len,
        o=out_THD,
        mask_mode=_CAUSAL,
        layout=_NHD_LAYOUT,
        window_left=(span_of(span).longest or 0) - 1,
        logits_soft_cap=softcap or 0.0,
        sm_scale=scale,
        workspace_size=_PARTIAL_BYTES,
        **_UNUSED,
    )
    return out_THD[None]


@torch.library.register_fake("autodeploy::flashinfer_paged_attention", lib=_library)
def _(query, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


class FlashInferAttention(TritonPagedAttention):
    name = "flashinfer"
    meaning = "FlashInfer's paged kernels; plans on the host, so not in CUDA graphs"

    def why_not(self, site: Site) -> str | None:
        refused = super().why_not(site) or support.why_not(site.device) or _why_not_installed()
        if refused is not None:
            return refused
        f = site.facts
        if site.dtype not in (torch.float16, torch.bfloat16):
            return f"{site.dtype} is neither float16 nor bfloat16".replace("torch.", "")
        if isinstance(site.span, Chunk):
            return "chunks are not supported"
        if f.has_sinks:
            return "sinks are not supported"
        if f.has_alibi:
            return "ALiBi is not supported"
        if f.head_dim != f.value_dim or f.head_dim not in _HEAD_DIMS:
            return f"heads of {f.head_dim} and {f.value_dim} are not both one of 64, 128 and 256"
        return None

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        f, pages = site.facts, (site.group, site.num_groups, site.page_size)
        # A tile may begin before the window, where pages that were given back hold anything.
        if site.span.longest is None:
            page_indptr = fields.kv_page_indptr(layout, site.page_size)
            page_indices = flashinfer_fields.kv_page_indices(layout, *pages)
        else:
            page_indptr = flashinfer_fields.seen_page_indptr(layout, site.page_size, site.span.name)
            page_indices = flashinfer_fields.seen_page_indices(layout, *pages, site.span.name)
        lengths = {
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "page_indptr": page_indptr,
            "last_page_len": fields.last_page_len(layout, site.page_size),
        }
        key = {name: getattr(f, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
        key |= {"page_size": site.page_size, "dtype": site.dtype, "span": site.span.name}
        plan = torch.ops.autodeploy.flashinfer_plan.default(*lengths.values(), **key, has_softcap=f.softcap is not None)
        return lengths | {
            "slot_mapping": fields.slot_mapping(layout, num_tokens, *pages),
            "page_indices": page_indices,
            "schedule": plan[0],
            "tables": plan[1],
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        names = ("cu_seqlens_q", "page_indptr", "page_indices", "last_page_len", "schedule", "tables")
        return torch.ops.autodeploy.flashinfer_paged_attention.default(
            tensors[0], *caches, *(metadata[name] for name in names), **self.scoring(tensors, site)
        )


def _why_not_installed() -> str | None:
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return f"flashinfer is not installed: {_INSTALL}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return None if _FIRST_VERSION <= numbers < _FIRST_UNKNOWN else f"flashinfer {found} is not known here: {_INSTALL}"


BACKENDS: tuple[Backend, ...] = (FlashInferAttention(),)
