"""Fields that the package causal-conv1d reads.

Its convolution of a long row takes one sequence, or several that all begin with zeros. So each sequence's new tokens
are laid out behind the N - 1 inputs before them, all sequences end to end: then no tap reaches into another sequence.

Shapes: S sequences, T packed tokens (padding included), N taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.metadata.field import field
from autodeploy.metadata.fields import cu_seqlens_q, has_initial_state, query_lens, state_slots, token_to_seq


@field(shape="[S] int32", padding="-1")
def updated_slots(layout: Tensor) -> Tensor:
    """The state slot of each sequence with new tokens, -1 for the rest."""
    return torch.where(query_lens(layout) > 0, state_slots(layout), -1)


@field(shape="[S] int64", padding="scratch slot 0")
def fresh_slots(layout: Tensor) -> Tensor:
    """The state slot of each sequence that starts in this step, scratch slot 0 for the rest."""
    return torch.where(has_initial_state(layout), 0, state_slots(layout)).to(torch.int64)


@field(shape="[T + S * (N - 1)] int64", depends="H", padding="padding tokens")
def conv_stream_indices(layout: Tensor, num_tokens: int, kernel_size: int) -> Tensor:
    """What stands in each place of the stream, in [T tokens | S * (N - 1) cached inputs | one zero]."""
    taps, rows = kernel_size - 1, layout.shape[0]
    row_S = torch.arange(rows, dtype=torch.int32, device=layout.device)
    begin_S = cu_seqlens_q(layout)[:-1] + row_S * taps
    place_M = torch.arange(num_tokens + rows * taps, dtype=torch.int32, device=layout.device)
    row_M = torch.searchsorted(begin_S, place_M, right=True) - 1
    # Counted from the sequence's first new token; negative in the cached state.
    offset_M = place_M - begin_S[row_M] - taps
    cached_M = num_tokens + (row_M + 1) * taps + offset_M
    before_M = torch.where(has_initial_state(layout)[row_M], cached_M, num_tokens + rows * taps)
    return torch.where(offset_M < 0, before_M, cu_seqlens_q(layout)[row_M] + offset_M)


@field(shape="[T] int32", depends="H", padding="the last sequence's places")
def conv_stream_places(layout: Tensor, num_tokens: int, kernel_size: int) -> Tensor:
    """Where each token stands in the stream."""
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=layout.device)
    return token_T + (token_to_seq(layout, num_tokens) + 1) * (kernel_size - 1)
