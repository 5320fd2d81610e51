"""Fields that FlashInfer reads: the pages of all sequences end to end, or those that are still seen.

Shapes: S sequences, P pages per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.fields import block_table, first_seen, kv_page_indptr, seq_lens


@field(shape="[S * P] int32", depends="G P", padding="scratch page 0")
def kv_page_indices(layout: Tensor, group: int, num_groups: int, page_size: int) -> Tensor:
    """The pages in use of all sequences, end to end: those of sequence r from kv_page_indptr[r] on."""
    table_SP = block_table(layout, group, num_groups)
    return _end_to_end(table_SP, kv_page_indptr(layout, page_size), torch.zeros_like(table_SP[:, 0]))


@field(shape="[S + 1] int32", depends="P W", padding="the total")
def seen_page_indptr(layout: Tensor, page_size: int, span: str) -> Tensor:
    """[0, cumsum of the pages that are seen]: where each sequence's pages start in `seen_page_indices`."""
    end_S = (seq_lens(layout) + page_size - 1) // page_size
    # A row without new tokens may end before the page that its next token would see first.
    pages_S = (end_S - first_seen(layout, span) // page_size).clamp(min=0)
    return torch.nn.functional.pad(pages_S.cumsum(0, dtype=torch.int32), (1, 0))


@field(shape="[S * P] int32", depends="G P W", padding="scratch page 0")
def seen_page_indices(layout: Tensor, group: int, num_groups: int, page_size: int, span: str) -> Tensor:
    """The pages that the new tokens of each sequence see, of all sequences end to end."""
    starts_S1 = seen_page_indptr(layout, page_size, span)
    first_S = first_seen(layout, span) // page_size
    return _end_to_end(block_table(layout, group, num_groups), starts_S1, first_S)


def _end_to_end(table_SP: Tensor, starts_S1: Tensor, first_S: Tensor) -> Tensor:
    """starts[r + 1] - starts[r] entries of each row r of the table, from first[r] on; then zeros: [S * P] int32."""
    place_I = torch.arange(table_SP.shape[0] * table_SP.shape[1], dtype=torch.int32, device=table_SP.device)
    row_I = (torch.searchsorted(starts_S1, place_I, right=True, out_int32=True) - 1).clamp(max=table_SP.shape[0] - 1)
    column_I = (place_I - starts_S1[row_I] + first_S[row_I]).clamp(max=table_SP.shape[1] - 1)
    return torch.where(place_I < starts_S1[-1], table_SP[row_I, column_I], 0)
