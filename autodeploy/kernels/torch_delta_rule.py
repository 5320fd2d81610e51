"""The gated delta rule from cached states in plain torch, over all sequences of a ragged batch at once.

The first chunks of all sequences advance their states, then the second ones, and so on: what is computed at once stays
small. Sequences with one new token take the one-token form.

Shapes: S sequences, T packed tokens, L tokens of a chunk, H value heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels import chunk_fields
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.gated_delta_rule import CachedDeltaRule, Inputs, prepare, run_chunk, run_token
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# Bytes of a state from which on a CPU advances one after another, as its cache holds one but not all of them: 16 of
# 1 MiB took 3 ms instead of 20.
_LARGE_STATE = 128 << 10

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor(a!) state_cache,"
    " Tensor state_slots, Tensor has_initial_state, Tensor cu_seqlens_q, Tensor chunk_tokens, Tensor cu_chunks, *,"
    " bool normalize, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "torch_gated_delta_rule", "CompositeExplicitAutograd")
def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    chunk_tokens: Tensor,
    cu_chunks: Tensor,
    *,
    normalize: bool,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Advance each sequence's state by its new tokens.

    Tensors as in the canonical op with B = 1, state_cache [slots, H, K, V] float32 -> [1, T, H, V], zeros for padding
    tokens of a mixed step. The int and bool tensors are fields.
    """
    inputs_T = Inputs(*(tensor[0] for tensor in prepare((query, key, value, decay, beta), normalize)))
    slots_S = state_slots.to(torch.int64)
    if step_kind == DECODE:
        return _run_tokens(inputs_T, state_cache, slots_S, has_initial_state)[None].to(query.dtype)
    # One place more than there are tokens: chunks read zeros there, and write what nobody reads.
    inputs_T1 = Inputs(*(torch.cat([tensor, torch.zeros_like(tensor[:1])]) for tensor in inputs_T))
    out_T1HV = torch.zeros_like(inputs_T1.value)
    lengths = cu_seqlens_q.diff().tolist()
    if short := [row for row, length in enumerate(lengths) if length == 1]:
        tokens, goes_on = cu_seqlens_q[short], has_initial_state[short]
        out_T1HV[tokens] = _run_tokens(inputs_T.at(tokens), state_cache, slots_S[short], goes_on)
    if long := [row for row, length in enumerate(lengths) if length > 1]:
        states_S = _states(state_cache, slots_S[long], has_initial_state[long])
        begin = cu_chunks.tolist()
        for chunk in range(max(begin[row + 1] - begin[row] for row in long)):
            now = [index for index, row in enumerate(long) if chunk < begin[row + 1] - begin[row]]
            tokens_RL = chunk_tokens[[begin[long[index]] + chunk for index in now]]
            out_T1HV[tokens_RL], states_S[now] = run_chunk(inputs_T1.at(tokens_RL), states_S[now])
        state_cache[slots_S[long]] = states_S
    return out_T1HV[None, :-1].to(query.dtype)


@torch.library.register_fake("autodeploy::torch_gated_delta_rule", lib=_library)
def _(query, key, value, *_, **__):
    return query.new_empty(value.shape)


def _states(state_cache: Tensor, slots_S: Tensor, goes_on_S: Tensor) -> Tensor:
    """The state [S, H, K, V] that each sequence begins with; a stale one may hold NaN."""
    return torch.where(goes_on_S[:, None, None, None], state_cache[slots_S], 0)


def _run_tokens(inputs_S: Inputs, state_cache: Tensor, slots_S: Tensor, goes_on_S: Tensor) -> Tensor:
    """Advance each state by one token: [S, H, V]."""
    if state_cache.device.type != "cpu" or state_cache[0].nbytes < _LARGE_STATE:
        out, state_cache[slots_S] = run_token(inputs_S, _states(state_cache, slots_S, goes_on_S))
        return out
    outs = []
    for row, (slot, goes_on) in enumerate(zip(slots_S.tolist(), goes_on_S.tolist(), strict=True)):
        state = state_cache[slot : slot + 1] if goes_on else torch.zeros_like(state_cache[:1])
        out, state_cache[slot : slot + 1] = run_token(inputs_S.at(slice(row, row + 1)), state)
        outs.append(out)
    return torch.cat(outs)


class TorchDeltaRule(CachedDeltaRule):
    name = "torch_delta_rule"
    meaning = "chunks of all sequences at once; one token of each in a decode step"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        size = site.facts.chunk_size
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "chunk_tokens": chunk_fields.chunk_tokens(layout, num_tokens, size),
            "cu_chunks": chunk_fields.cu_chunks(layout, size),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.torch_gated_delta_rule.default(
            *tensors, *caches, **metadata, normalize=site.facts.normalize
        )


BACKENDS: tuple[Backend, ...] = (TorchDeltaRule(),)
