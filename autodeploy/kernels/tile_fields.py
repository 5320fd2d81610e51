"""The field that tells a prefill kernel which tokens each of its programs computes.

Shapes: S sequences, T packed tokens (padding included).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.fields import cu_seqlens_q
from autodeploy.metadata.layout import QUERY_LEN


@field(shape="[S + T // block_size, 2] int32", depends="H", padding="(-1, 0)")
def query_tiles(layout: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """(row, first packed token) of each tile of up to `block_size` new tokens of one sequence with more than one."""
    query_S = layout[:, QUERY_LEN]
    tiles_S = torch.where(query_S > 1, (query_S + block_size - 1) // block_size, 0)
    ends_S = tiles_S.cumsum(0, dtype=torch.int32)
    # Each sequence has at most one tile that is not full, so that S + T // block_size places are enough.
    tile_M = torch.arange(layout.shape[0] + num_tokens // block_size, dtype=torch.int32, device=layout.device)
    row_M = torch.searchsorted(ends_S, tile_M, right=True, out_int32=True)
    used_M = row_M < layout.shape[0]
    at_M = row_M.clamp(max=layout.shape[0] - 1)
    first_M = cu_seqlens_q(layout)[at_M] + (tile_M - ends_S[at_M] + tiles_S[at_M]) * block_size
    return torch.stack([torch.where(used_M, row_M, -1), torch.where(used_M, first_M, 0)], dim=1)
