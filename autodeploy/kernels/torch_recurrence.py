"""The linear recurrence from cached states in plain torch: single tokens of all sequences at once, others one by one.

A token of one sequence costs one fused multiplication and addition, which a CPU does not do faster in chunks.

Shapes: S sequences, T packed tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.linear_recurrence import CachedRecurrence, run
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_linear_recurrence(Tensor hidden, Tensor decay, Tensor(a!) state_cache, Tensor state_slots,"
    " Tensor has_initial_state, Tensor cu_seqlens_q, *, str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "torch_linear_recurrence", "CompositeExplicitAutograd")
def _linear_recurrence(
    hidden: Tensor,
    decay: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    *,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """hidden and decay [1, T, C], state_cache [slots, C] float32 -> [1, T, C], noise for padding tokens.

    The int and bool tensors are fields.
    """
    # Copies: a stale state may hold NaN.
    before_SC = torch.where(has_initial_state[:, None], state_cache[state_slots], 0)
    if step_kind == DECODE:
        states_SC = torch.addcmul(hidden[0].float(), decay[0].float(), before_SC)
        state_cache[state_slots] = states_SC
        return states_SC[None].to(hidden.dtype)
    states_TC = hidden[0].float().clone()
    lens_S, ends_S = cu_seqlens_q.diff(), cu_seqlens_q[1:]
    token_R, row_R = (ends_S - 1)[lens_S == 1], (lens_S == 1).nonzero()[:, 0]
    states_TC[token_R] = torch.addcmul(states_TC[token_R], decay[0, token_R].float(), before_SC[row_R])
    for row, (length, end) in enumerate(zip(lens_S.tolist(), ends_S.tolist(), strict=True)):
        if length > 1:
            tokens = slice(end - length, end)
            run(states_TC[tokens].unbind(0), decay[0, tokens].unbind(0), before_SC[row])
    row_R = (lens_S > 0).nonzero()[:, 0]
    state_cache[state_slots[row_R]] = states_TC[ends_S[row_R] - 1]
    return states_TC[None].to(hidden.dtype)


@torch.library.register_fake("autodeploy::torch_linear_recurrence", lib=_library)
def _(hidden, *_, **__):
    return torch.empty_like(hidden)


class TorchRecurrence(CachedRecurrence):
    name = "torch_recurrence"
    meaning = "single tokens of all sequences at once, longer sequences one by one"

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.torch_linear_recurrence.default(*tensors, *caches, **metadata)


BACKENDS: tuple[Backend, ...] = (TorchRecurrence(),)
