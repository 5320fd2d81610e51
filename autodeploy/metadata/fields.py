"""The fields of the batch, which any backend may read.

Shapes: S sequences, T packed tokens (padding included), P pages per sequence, p page size, L = P * p.
Padding rows have query_len = context_len = 0; padding tokens are those from cu_seqlens_q[S] on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.layout import CONTEXT_LEN, NUM_FIXED_COLUMNS, NUM_LOGITS, QUERY_LEN, STATE_SLOT
from autodeploy.metadata.span import span_of


@field(shape="[S] int32", padding="0")
def query_lens(layout: Tensor) -> Tensor:
    """q: new tokens of each sequence in this step."""
    return layout[:, QUERY_LEN]


@field(shape="[S] int32", padding="0")
def context_lens(layout: Tensor) -> Tensor:
    """c: tokens of each sequence that are cached already."""
    return layout[:, CONTEXT_LEN]


@field(shape="[S] int32", padding="0")
def seq_lens(layout: Tensor) -> Tensor:
    """s = c + q: tokens of each sequence once this step is written."""
    return layout[:, CONTEXT_LEN] + layout[:, QUERY_LEN]


@field(shape="[S + 1] int32", padding="the total")
def cu_seqlens_q(layout: Tensor) -> Tensor:
    """[0, cumsum q]: where each sequence starts in the packed stream."""
    return torch.nn.functional.pad(layout[:, QUERY_LEN].cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[T] int32", padding="the last row")
def token_to_seq(layout: Tensor, num_tokens: int) -> Tensor:
    """Which sequence each packed token belongs to: searchsorted(cu_seqlens_q, t, right) - 1."""
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    row_T = torch.searchsorted(cu_seqlens_q(layout), token_T, right=True, out_int32=True) - 1
    return row_T.clamp(max=layout.shape[0] - 1)


@field(shape="[T] bool", padding="False")
def is_token(layout: Tensor, num_tokens: int) -> Tensor:
    """Whether a place of the packed stream holds a token, not padding."""
    return torch.arange(num_tokens, dtype=torch.int32, device=layout.device) < cu_seqlens_q(layout)[-1]


@field(shape="[T] int32", padding="0")
def position_ids(layout: Tensor, num_tokens: int) -> Tensor:
    """c_r + (t - start_r): each token's place in its own sequence."""
    row_T = token_to_seq(layout, num_tokens)
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    offset_S = layout[:, CONTEXT_LEN] - cu_seqlens_q(layout)[:-1]
    return torch.where(is_token(layout, num_tokens), token_T + offset_S[row_T], 0)


@field(shape="[S, P] int32", depends="G", padding="scratch page 0")
def block_table(layout: Tensor, group: int, num_groups: int) -> Tensor:
    """Each sequence's pages in order, for one KV group."""
    pages = (layout.shape[1] - NUM_FIXED_COLUMNS) // num_groups
    return layout[:, NUM_FIXED_COLUMNS + group * pages : NUM_FIXED_COLUMNS + (group + 1) * pages]


@field(shape="[T] int64", depends="G P", padding="slot 0 of scratch page 0")
def slot_mapping(layout: Tensor, num_tokens: int, group: int, num_groups: int, page_size: int) -> Tensor:
    """table[r, pos // p] * p + pos % p: where each new token is written."""
    position_T = position_ids(layout, num_tokens)
    page_T = block_table(layout, group, num_groups)[token_to_seq(layout, num_tokens), position_T // page_size]
    slot_T = page_T.to(torch.int64) * page_size + position_T % page_size
    return torch.where(is_token(layout, num_tokens), slot_T, 0)


@field(shape="[S] int32", padding="scratch slot 0")
def state_slots(layout: Tensor) -> Tensor:
    """Each sequence's place in the recurrent and convolution state caches."""
    return layout[:, STATE_SLOT]


@field(shape="[S] bool", padding="False")
def has_initial_state(layout: Tensor) -> Tensor:
    """c > 0: whether a sequence goes on from a cached state."""
    return layout[:, CONTEXT_LEN] > 0


@field(shape="[S] int64", padding="the last token, at least 0")
def logits_indices(layout: Tensor) -> Tensor:
    """The tokens whose logits are wanted, one after another: the last `num_logits` of each sequence."""
    start_S1, num_rows = cu_seqlens_q(layout), layout.shape[0]
    end_S = layout[:, NUM_LOGITS].cumsum(0, dtype=torch.int32)
    place_S = torch.arange(num_rows, dtype=torch.int32, device=layout.device)
    row_S = torch.searchsorted(end_S, place_S, right=True, out_int32=True).clamp(max=num_rows - 1)
    token_S = place_S + (start_S1[1:] - end_S)[row_S]
    return torch.minimum(token_S, start_S1[-1] - 1).clamp(min=0).to(torch.int64)


@field(shape="[S + 1] int32", depends="P", padding="the total")
def kv_page_indptr(layout: Tensor, page_size: int) -> Tensor:
    """[0, cumsum ceil(s / p)]: where each sequence's pages start in a concatenated page list."""
    pages_S = (seq_lens(layout) + page_size - 1) // page_size
    return torch.nn.functional.pad(pages_S.cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[S] int32", depends="P", padding="p (no page in use)")
def last_page_len(layout: Tensor, page_size: int) -> Tensor:
    """(s - 1) % p + 1: tokens in each sequence's last page."""
    return (seq_lens(layout) - 1) % page_size + 1


@field(shape="[S] int32", depends="W", padding="0")
def first_seen(layout: Tensor, span: str) -> Tensor:
    """The first position that the first new token of each sequence still sees: 0, c + 1 - w, or c // w * w."""
    return span_of(span).first_seen(layout[:, CONTEXT_LEN]).clamp(min=0)
