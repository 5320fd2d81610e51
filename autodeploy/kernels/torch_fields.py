"""Fields that only the plain-torch backends read.

Shapes: S sequences, T packed tokens (padding included), P pages per sequence, p page size, K key-value heads,
N taps of a causal convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.fields import (
    block_table,
    cu_seqlens_q,
    has_initial_state,
    is_token,
    seq_lens,
    slot_mapping,
    token_to_seq,
)
from autodeploy.metadata.layout import NUM_FIXED_COLUMNS, QUERY_LEN
from autodeploy.metadata.span import span_of


@field(shape="[T, N] int64", depends="H", padding="the zero entry")
def conv_window_indices(layout: Tensor, num_tokens: int, kernel_size: int) -> Tensor:
    """Inputs of each token's convolution, in [T tokens | S * (N - 1) cached inputs | one zero]."""
    row_T = token_to_seq(layout, num_tokens)
    back_N = torch.arange(1 - kernel_size, 1, device=layout.device)
    token_TN = torch.arange(num_tokens, device=layout.device)[:, None] + back_N
    # Counted from the sequence's first new token; negative in the cached state.
    offset_TN = token_TN - cu_seqlens_q(layout)[row_T][:, None]
    cached_TN = num_tokens + (row_T[:, None] + 1) * (kernel_size - 1) + offset_TN
    zero = num_tokens + layout.shape[0] * (kernel_size - 1)
    before_TN = torch.where(has_initial_state(layout)[row_T][:, None], cached_TN, zero)
    return torch.where(is_token(layout, num_tokens)[:, None], torch.where(offset_TN < 0, before_TN, token_TN), zero)


@field(shape="[S, N - 1] int64", depends="H", padding="the zero entry")
def conv_state_indices(layout: Tensor, num_tokens: int, kernel_size: int) -> Tensor:
    """The last N - 1 inputs of each sequence, in [T tokens | S * (N - 1) cached inputs | one zero]."""
    row_S1 = torch.arange(layout.shape[0], device=layout.device)[:, None]
    offset_SN = layout[:, QUERY_LEN, None] + torch.arange(1 - kernel_size, 0, device=layout.device)
    cached_SN = num_tokens + (row_S1 + 1) * (kernel_size - 1) + offset_SN
    zero = num_tokens + layout.shape[0] * (kernel_size - 1)
    before_SN = torch.where(has_initial_state(layout)[:, None], cached_SN, zero)
    return torch.where(offset_SN < 0, before_SN, cu_seqlens_q(layout)[:-1, None] + offset_SN)


@field(shape="[T, K] int64", depends="G P H", padding="slots of scratch page 0")
def head_slots(
    layout: Tensor, num_tokens: int, group: int, num_groups: int, page_size: int, num_kv_heads: int
) -> Tensor:
    """(page * K + k) * p + offset: where each head's new keys are written when a page is [K, p, D]."""
    slot_T1 = slot_mapping(layout, num_tokens, group, num_groups, page_size)[:, None]
    head_page_TK = slot_T1 // page_size * num_kv_heads + torch.arange(num_kv_heads, device=layout.device)
    return head_page_TK * page_size + slot_T1 % page_size


@field(shape="[S, K, P] int32", depends="G P W H", padding="scratch page 0; past the table its last page")
def decode_pages(layout: Tensor, group: int, num_groups: int, page_size: int, num_kv_heads: int, span: str) -> Tensor:
    """page * K + k of the pages that each sequence's last token sees, in order, the first of them first."""
    table_SP = block_table(layout, group, num_groups)
    first_S = span_of(span).first_seen(seq_lens(layout) - 1).clamp(min=0) // page_size
    column_SP = first_S[:, None] + torch.arange(table_SP.shape[1], device=layout.device)
    page_SP = table_SP.gather(1, column_SP.clamp(max=table_SP.shape[1] - 1))
    head_K1 = torch.arange(num_kv_heads, dtype=torch.int32, device=layout.device)[:, None]
    return page_SP[:, None] * num_kv_heads + head_K1


@field(shape="[S, P * p] bool", depends="P W", padding="False")
def decode_mask(layout: Tensor, num_groups: int, page_size: int, span: str) -> Tensor:
    """Which positions of `decode_pages` each sequence's last token sees."""
    begin_S = span_of(span).first_seen(seq_lens(layout) - 1).clamp(min=0)
    pages = (layout.shape[1] - NUM_FIXED_COLUMNS) // num_groups
    position_L = torch.arange(pages * page_size, dtype=torch.int32, device=layout.device)
    position_SL = (begin_S // page_size * page_size)[:, None] + position_L
    return (position_SL >= begin_S[:, None]) & (position_SL < seq_lens(layout)[:, None])
