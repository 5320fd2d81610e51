"""Fields that only the plain-torch backends read.

Shapes: S sequences, T packed tokens (padding included), N taps of a causal convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.fields import cu_seqlens_q, field, has_initial_state, is_token, token_to_seq
from autodeploy.metadata.layout import QUERY_LEN


@field(shape="[T, N] int64", depends="K", padding="the zero entry")
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


@field(shape="[S, N - 1] int64", depends="K", padding="the zero entry")
def conv_state_indices(layout: Tensor, num_tokens: int, kernel_size: int) -> Tensor:
    """The last N - 1 inputs of each sequence, in [T tokens | S * (N - 1) cached inputs | one zero]."""
    row_S1 = torch.arange(layout.shape[0], device=layout.device)[:, None]
    offset_SN = layout[:, QUERY_LEN, None] + torch.arange(1 - kernel_size, 0, device=layout.device)
    cached_SN = num_tokens + (row_S1 + 1) * (kernel_size - 1) + offset_SN
    zero = num_tokens + layout.shape[0] * (kernel_size - 1)
    before_SN = torch.where(has_initial_state(layout)[:, None], cached_SN, zero)
    return torch.where(offset_SN < 0, before_SN, cu_seqlens_q(layout)[:-1, None] + offset_SN)
