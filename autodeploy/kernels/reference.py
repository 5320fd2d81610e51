"""The oracle backends: one sequence at a time, by the arithmetic of the canonical ops, as simple as can be.

Shapes: S sequences, T packed tokens, H query heads, K key-value heads, D key size, E value size, p page size,
C channels, N taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels.paged import PagedAttention
from autodeploy.kernels.support import supports_dtype
from autodeploy.metadata import fields
from autodeploy.metadata.span import span_of
from autodeploy.ops.kinds.attention import attend
from autodeploy.ops.kinds.causal_conv1d import convolve
from autodeploy.ops.spec import Backend, CacheSpec, Site


@torch.library.custom_op("autodeploy::reference_paged_attention", mutates_args=("key_cache", "value_cache"))
def reference_paged_attention(
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
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    span: str = "full",
    softcap: float | None = None,
) -> Tensor:
    """Write the new keys and values to their slots, then attend each sequence to exactly the slots it sees.

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, E], caches [pages, p, K, D or E] -> [1, T, H, E], zeros for
    padding tokens. The int tensors are the fields of the same names.
    """
    key_cache.flatten(0, 1)[slot_mapping] = key[0].transpose(0, 1)
    value_cache.flatten(0, 1)[slot_mapping] = value[0].transpose(0, 1)
    out_THE = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
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
        out_1HQE = attend(
            query[:, :, start:stop],
            key_cache.flatten(0, 1)[slot_L].transpose(0, 1)[None],
            value_cache.flatten(0, 1)[slot_L].transpose(0, 1)[None],
            (seen_L <= query_Q1) & (seen_L >= span_of(span).first_seen(query_Q1)),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
        out_THE[start:stop] = out_1HQE[0].transpose(0, 1)
    return out_THE[None]


@reference_paged_attention.register_fake
def _(query, key, value, *_, **__):
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("autodeploy::reference_cached_causal_conv1d", mutates_args=("state_cache",))
def reference_cached_causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    activation: str | None = None,
) -> Tensor:
    """Convolve each sequence's cached inputs followed by its new ones, and cache the last N - 1 of them.

    hidden [1, C, T], weight [C, N], bias [C] or None, state_cache [slots, C, N - 1] -> [1, C, T], zeros for padding
    tokens. The int and bool tensors are the fields of the same names.
    """
    num_taps = weight.shape[1]
    out_CT = torch.zeros_like(hidden[0])
    starts = cu_seqlens_q.tolist()
    for row, (slot, goes_on) in enumerate(zip(state_slots.tolist(), has_initial_state.tolist(), strict=True)):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        old = state_cache[slot] if goes_on else torch.zeros_like(state_cache[slot])
        inputs_CL = torch.cat([old, hidden[0, :, start:stop]], dim=1)
        out_CT[:, start:stop] = convolve(inputs_CL.unfold(1, num_taps, 1)[None], weight, bias, activation)[0]
        state_cache[slot] = inputs_CL[:, stop - start :]
    return out_CT[None]


@reference_cached_causal_conv1d.register_fake
def _(hidden, *_, **__):
    return hidden.new_empty(hidden.shape)


class ReferenceAttention(PagedAttention):
    name = "reference"
    meaning = "the oracle: attends one sequence after another"
    op = torch.ops.autodeploy.reference_paged_attention.default

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        return {
            "slot_mapping": fields.slot_mapping(layout, num_tokens, site.group, site.num_groups, site.page_size),
            "block_table": fields.block_table(layout, site.group, site.num_groups),
            "seq_lens": fields.seq_lens(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }


class ReferenceCausalConv1d(Backend):
    name = "reference"
    kind = "causal_conv1d"
    meaning = "the oracle: convolves one sequence after another"

    def why_not(self, site: Site) -> str | None:
        return supports_dtype(site.dtype, site.device)

    def caches(self, site: Site) -> tuple[CacheSpec, ...]:
        return (conv_state_cache(site),)

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
        }

    def call(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.reference_cached_causal_conv1d.default(
            *tensors, *caches, **metadata, activation=site.params["activation"]
        )


def conv_state_cache(site: Site) -> CacheSpec:
    """The last N - 1 inputs of each sequence."""
    return CacheSpec("conv_state", "state", (site.params["channels"], site.params["kernel_size"] - 1), site.dtype)


BACKENDS: tuple[Backend, ...] = (ReferenceAttention(), ReferenceCausalConv1d())
