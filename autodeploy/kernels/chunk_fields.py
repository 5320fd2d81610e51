"""Fields of kinds that compute in chunks: where each sequence's new tokens are cut.

Chunks of `chunk_size` tokens begin at each sequence's first new token; the last one of a sequence may be shorter.

Shapes: S sequences, T packed tokens (padding included), L tokens of a chunk, C = S + T // L chunks, enough for every
batch, since a sequence has at most one chunk that is not full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.fields import cu_seqlens_q, is_token, query_lens, token_to_seq


@field(shape="[S + 1] int32", depends="H", padding="the last sequence's end")
def cu_chunks(layout: Tensor, chunk_size: int) -> Tensor:
    """Where each sequence's chunks begin, and where the last one's end."""
    chunks_S = (query_lens(layout) + chunk_size - 1) // chunk_size
    return torch.nn.functional.pad(chunks_S.cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[S + T // L] int32", depends="H", padding="the last row")
def chunk_to_seq(layout: Tensor, num_tokens: int, chunk_size: int) -> Tensor:
    """Which sequence each chunk belongs to."""
    chunk_C = torch.arange(layout.shape[0] + num_tokens // chunk_size, dtype=torch.int32, device=layout.device)
    row_C = torch.searchsorted(cu_chunks(layout, chunk_size)[1:], chunk_C, right=True, out_int32=True)
    return row_C.clamp(max=layout.shape[0] - 1)


@field(shape="[S + T // L, L] int64", depends="H", padding="T")
def chunk_tokens(layout: Tensor, num_tokens: int, chunk_size: int) -> Tensor:
    """The packed token in each place of each chunk, T where there is none."""
    row_C = chunk_to_seq(layout, num_tokens, chunk_size)
    chunk_C = torch.arange(row_C.shape[0], dtype=torch.int32, device=layout.device)
    begin_C = cu_seqlens_q(layout)[row_C] + (chunk_C - cu_chunks(layout, chunk_size)[row_C]) * chunk_size
    token_CL = begin_C[:, None] + torch.arange(chunk_size, dtype=torch.int32, device=layout.device)
    return torch.where(token_CL < cu_seqlens_q(layout)[row_C + 1][:, None], token_CL, num_tokens).to(torch.int64)


@field(shape="[T] int64", depends="H", padding="0")
def chunk_places(layout: Tensor, num_tokens: int, chunk_size: int) -> Tensor:
    """Where each token stands among the C * L places of all chunks."""
    row_T = token_to_seq(layout, num_tokens)
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    place_T = cu_chunks(layout, chunk_size)[row_T] * chunk_size + token_T - cu_seqlens_q(layout)[row_T]
    return torch.where(is_token(layout, num_tokens), place_T, 0).to(torch.int64)
