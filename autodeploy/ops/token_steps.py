"""Recurrences that are computed token by token: all sequences of a ragged batch take their next token together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# One token of each of N sequences and their states, all [N, ...] -> the results [N, ...] and the next states.
Step = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


def run_steps(
    step: Step,
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor,
    step_kind: StepKind = MIXED,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The result of each packed token, zeros for padding, and the states behind the last token of each sequence.

    tokens [T, ...], states [S, ...] before the first token, cu_seqlens [S + 1] int32. In a decode step nothing is read
    on the host.
    """
    if step_kind == DECODE:
        return step(tokens, states)
    lengths = cu_seqlens.diff()
    order = lengths.argsort(descending=True)
    longest_first = lengths[order].tolist()
    begin, running = cu_seqlens[:-1][order], [state[order] for state in states]
    empty, _ = step([tensor[:0] for tensor in tokens], [state[:0] for state in states])
    out = empty.new_zeros(len(tokens[0]), *empty.shape[1:])
    for index in range(longest_first[0]):
        count = sum(length > index for length in longest_first)
        token = begin[:count] + index
        out[token], after = step([tensor[token] for tensor in tokens], [state[:count] for state in running])
        for state, new in zip(running, after, strict=True):
            state[:count] = new
    return out, [state[order.argsort()] for state in running]


def run_rows(step: Step, tokens: Sequence[Tensor], empty: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
    """The results [B, S, ...] for tokens [B, S, ...] of sequences that begin with the states `empty`, each [...].

    A row is one sequence, or with `cu_seqlens` the only row is cut there.
    """
    batch, length = tokens[0].shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (batch + 1) * length, max(1, length), dtype=torch.int32)[: batch + 1]
    states = [state.expand(len(cu_seqlens) - 1, *state.shape).clone() for state in empty]
    out, _ = run_steps(step, [tensor.flatten(0, 1) for tensor in tokens], states, cu_seqlens.to(tokens[0].device))
    return out.unflatten(0, (batch, length))


def load_states(
    caches: Sequence[Tensor], empty: Sequence[Tensor], state_slots: Tensor, has_initial_state: Tensor
) -> list[Tensor]:
    """The states [S, ...] that sequences go on from, `empty` where they begin; stale ones may hold NaN."""
    loaded = zip(caches, empty, strict=True)
    goes_on = [has_initial_state.view(-1, *[1] * state.dim()) for state in empty]
    return [
        torch.where(on, cache[state_slots], state.to(cache.dtype))
        for (cache, state), on in zip(loaded, goes_on, strict=True)
    ]
