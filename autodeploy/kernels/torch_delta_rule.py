"""The gated delta rule from cached states in plain torch: all chunks of a ragged batch at once, then their states.

What a chunk does without a state is computed for all chunks together; then the first chunks of all sequences advance
their states, then the second ones. Sequences with one new token take the one-token form.

Shapes: S sequences, T packed tokens, C chunks of L tokens, H value heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels import chunk_fields
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.gated_delta_rule import CachedDeltaRule, Chunks, Inputs, chunks_of, prepare, run_token
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# States that advance by a token at once: then they stay in the processor's cache between the passes over them.
_STATE_BYTES = 4 << 20

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
    starts = cu_seqlens_q.tolist()
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    if short := [row for row, length in enumerate(lengths) if length == 1]:
        tokens = cu_seqlens_q[short]
        inputs = Inputs(*(tensor[tokens] for tensor in inputs_T))
        out_T1HV[tokens] = _run_tokens(inputs, state_cache, slots_S[short], has_initial_state[short])
    if long := [row for row, length in enumerate(lengths) if length > 1]:
        begin = cu_chunks.tolist()
        of_rows = [range(begin[row], begin[row + 1]) for row in long]
        tokens_CL = chunk_tokens[[chunk for chunks in of_rows for chunk in chunks]]
        chunks = chunks_of(Inputs(*(tensor[tokens_CL] for tensor in inputs_T1)))
        states_S = _states(state_cache, slots_S[long], has_initial_state[long])
        out_T1HV[tokens_CL] = _run_chunks(chunks, [len(chunks) for chunks in of_rows], states_S).transpose(1, 2)
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
    rows = max(1, _STATE_BYTES // state_cache[0].nbytes) if state_cache.device.type == "cpu" else len(slots_S)
    outs = []
    for *tensors, slots, goes_on in zip(*(tensor.split(rows) for tensor in (*inputs_S, slots_S, goes_on_S)), strict=True):
        out, state = run_token(Inputs(*tensors), _states(state_cache, slots, goes_on))
        state_cache[slots] = state
        outs.append(out)
    return torch.cat(outs)


def _run_chunks(chunks: Chunks, counts: list[int], states_S: Tensor) -> Tensor:
    """Advance `states_S` in place by `counts` chunks of each sequence, which lie end to end: [C, H, L, V]."""
    out = torch.empty_like(chunks.values)
    first = [sum(counts[:row]) for row in range(len(counts))]
    for index in range(max(counts)):
        rows = [row for row, count in enumerate(counts) if count > index]
        now = [first[row] + index for row in rows]
        out[now], states_S[rows] = Chunks(*(tensor[now] for tensor in chunks)).run(states_S[rows])
    return out


class TorchDeltaRule(CachedDeltaRule):
    name = "torch_delta_rule"
    meaning = "all chunks of the batch at once, then their states one after another"

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
