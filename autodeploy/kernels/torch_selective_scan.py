"""The scan of Mamba from cached states in plain torch: single tokens of all sequences at once, others one by one.

States are kept as [N, C]: channels are many and side by side, so that all products run along them.

Shapes: S sequences, T packed tokens, C channels, N state size, L tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.backend import Backend
from autodeploy.ops.cache import Cache
from autodeploy.ops.kinds.linear_recurrence import run
from autodeploy.ops.kinds.selective_scan import (
    CachedSelectiveScan,
    SelectiveScanFacts,
    finish,
    result_dtype,
    step_sizes,
)
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# States that are made at once: larger ones leave a CPU's caches, and above 32 MiB glibc maps fresh memory each time.
_BYTES = 4 << 20

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_selective_scan(Tensor hidden, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate,"
    " Tensor? dt_bias, Tensor(a!) state_cache, Tensor state_slots, Tensor has_initial_state, Tensor cu_seqlens_q, *,"
    " bool dt_softplus=False, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "torch_selective_scan", "CompositeExplicitAutograd")
def _selective_scan(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    dt_softplus: bool = False,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """hidden [1, C, T] and so on as in the canonical op, state_cache [slots, N, C] float32 -> [1, C, T], noise for
    padding tokens. The int and bool tensors are fields.
    """
    dt = step_sizes(dt, dt_bias, dt_softplus)
    tokens = tuple(tensor[0].T.contiguous() for tensor in (hidden, dt, B, C))
    A_NC, out_TC = A.T.contiguous(), torch.zeros_like(tokens[0])
    lens_S = cu_seqlens_q.diff()
    slot_S = torch.where(lens_S > 0, state_slots, 0).long()  # slot 0 is scratch
    row_R = torch.arange(len(lens_S), device=A.device) if step_kind == DECODE else (lens_S == 1).nonzero()[:, 0]
    for row in row_R.split(_num_at_once(A)):
        # A copy: a stale state may hold NaN.
        state = state_cache[state_slots[row].long()].masked_fill_(~has_initial_state[row][:, None, None], 0)
        token = row if step_kind == DECODE else cu_seqlens_q[row]
        own = tuple(tensor[token] for tensor in tokens)
        decay, added = _discrete(*own[:3], A_NC=A_NC)
        out_TC[token] = _read(added.addcmul_(decay, state), own)
        state_cache[slot_S[row]] = added
    if step_kind == MIXED:
        rows = zip(slot_S.tolist(), has_initial_state.tolist(), cu_seqlens_q.tolist(), lens_S.tolist(), strict=False)
        for slot, goes_on, start, length in rows:
            if length > 1:
                own = tuple(tensor[start : start + length] for tensor in tokens)
                out_TC[start : start + length] = _run(own, A_NC, state_cache[slot], goes_on)
    return finish(out_TC.T[None], hidden, D, gate).mT.contiguous().mT


@torch.library.register_fake("autodeploy::torch_selective_scan", lib=_library)
def _(hidden, dt, A, B, C, D, *_, **__):
    # Token by token, as what comes next reads it.
    return hidden.new_empty(hidden.mT.shape, dtype=result_dtype(hidden, D)).mT


def _num_at_once(A: Tensor) -> int:
    """States of tokens or rows."""
    return max(1, _BYTES // (4 * A.numel()))


def _discrete(hidden_LC: Tensor, dt_LC: Tensor, B_LN: Tensor, A_NC: Tensor) -> tuple[Tensor, Tensor]:
    """What each token's state keeps of the one before, and what it takes in: [L, N, C] float32 each."""
    input_LC = dt_LC.float() * hidden_LC.float()
    return (dt_LC[:, None] * A_NC).exp_(), input_LC[:, None] * B_LN[..., None].float()


def _read(states_LNC: Tensor, own: tuple[Tensor, ...]) -> Tensor:
    """[L, C] in the dtype of the model."""
    return torch.bmm(own[3][:, None], states_LNC.to(own[0].dtype))[:, 0]


def _run(own: tuple[Tensor, ...], A_NC: Tensor, cached_NC: Tensor, goes_on: bool) -> Tensor:
    """All tokens of one sequence, from its state, which is moved on: [L, C]."""
    state_NC = cached_NC if goes_on else torch.zeros_like(cached_NC)
    parts = []
    for part in zip(*(tensor.split(_num_at_once(A_NC)) for tensor in own), strict=True):
        decay_LNC, states_LNC = _discrete(*part[:3], A_NC=A_NC)
        run(states_LNC.unbind(0), decay_LNC.unbind(0), state_NC)
        parts.append(_read(states_LNC, part))
        state_NC = states_LNC[-1]
    cached_NC.copy_(state_NC)
    return torch.cat(parts)


class TorchSelectiveScan(CachedSelectiveScan):
    name = "torch_selective_scan"
    meaning = "single tokens of all sequences at once, longer sequences one by one"

    def caches(self, site: Site[SelectiveScanFacts]) -> tuple[Cache, ...]:
        (state,) = super().caches(site)
        return (replace(state, shape=state.shape[::-1]),)

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.torch_selective_scan.default(
            *tensors, *caches, *metadata.values(), dt_softplus=site.facts.dt_softplus
        )


BACKENDS: tuple[Backend, ...] = (TorchSelectiveScan(),)
