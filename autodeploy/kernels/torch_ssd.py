"""State-space scan of Mamba2 from a cached state in plain torch: chunks of all sequences at once, single tokens too.

Shapes: S sequences, T packed tokens, H heads, P head size, G groups of heads, N state size, K chunks, L tokens of a
chunk, R rows of one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autodeploy.kernels import chunk_fields
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.ssd import CachedSsd, Scan, SsdFacts, prepare, segment_sum
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

# The model's chunks, often of 256 tokens, are cut: what is computed within one grows with the square of its length, and
# all sums are float32 in either case.
_MAX_CHUNK = 64
# States that a CPU moves on at once: larger ones leave its caches, and above 32 MiB glibc maps fresh memory each time.
_STEP_BYTES = 4 << 20

# Defined by hand: a call of a `torch.library.custom_op` that mutates costs some 70 us on a CPU, this one 6.
_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "torch_ssd(Tensor hidden, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias,"
    " Tensor(a!) state_cache, Tensor state_slots, Tensor has_initial_state, Tensor cu_seqlens_q, Tensor chunk_to_seq,"
    " Tensor chunk_tokens, *, bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, str step_kind='mixed')"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "torch_ssd", "CompositeExplicitAutograd")
def _torch_ssd(
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    chunk_to_seq: Tensor,
    chunk_tokens: Tensor,
    *,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """hidden [1, T, H, P] and so on as in the canonical op, state_cache [slots, H, P, N] float32 -> [1, T, H, P]
    float32, zeros or noise for padding tokens. The int and bool tensors are fields.
    """
    scan = prepare(hidden, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max)
    num_tokens = hidden.shape[1]
    out_THP = torch.zeros_like(F.pad(scan.hidden[0], (0, 0, 0, 0, 0, 1)))  # at T stands what fills up chunks
    # Slot 0 is scratch.
    slot_S = torch.where(cu_seqlens_q.diff() > 0, state_slots, 0).long()
    (row_R, token_R), chosen_K = _split(step_kind, cu_seqlens_q, chunk_to_seq, chunk_tokens)
    row_K, token_KL = chunk_to_seq[chosen_K], chunk_tokens[chosen_K]
    initial = partial(_initial, state_cache, state_slots, has_initial_state)
    size = max(1, _STEP_BYTES // state_cache[0].nbytes) if hidden.device.type == "cpu" else len(row_R)
    for first in range(0, len(row_R), size):
        row, token = row_R[first : first + size], token_R[first : first + size]
        out_THP[token], state_cache[slot_S[row]] = _steps(scan, token, initial(row))
    if len(row_K):
        out_THP[token_KL], state_KHPN = _chunks(scan, token_KL, row_K, initial(row_K))
        is_last_K = F.pad(row_K[1:] != row_K[:-1], (0, 1), value=True)
        state_cache[torch.where(is_last_K, slot_S[row_K], 0)] = state_KHPN
    out_THP = out_THP[:num_tokens]
    return (out_THP if scan.D is None else out_THP + scan.D[:, None] * scan.hidden[0])[None]


@torch.library.register_fake("autodeploy::torch_ssd", lib=_library)
def _(hidden, *_, **__):
    return hidden.new_empty(hidden.shape, dtype=torch.float32)


def _split(
    step_kind: StepKind, cu_seqlens_q: Tensor, chunk_to_seq: Tensor, chunk_tokens: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The rows that take a step with their tokens, [R] each, and the chunks that the others are cut into.

    A chunk costs the same however few tokens it has. But which rows have one is known in a decode step, or on a CPU;
    a GPU would make the host wait for the answer.
    """
    none, lens_S = cu_seqlens_q[:0], cu_seqlens_q.diff()
    if step_kind == DECODE:
        row_S = torch.arange(len(lens_S), device=lens_S.device)
        return (row_S, row_S), none
    if lens_S.device.type != "cpu":
        return (none, none), torch.arange(len(chunk_to_seq), device=lens_S.device)
    row_R = (lens_S == 1).nonzero()[:, 0]
    is_used_K = chunk_tokens[:, 0] < cu_seqlens_q[-1]
    return (row_R, cu_seqlens_q[row_R]), ((lens_S[chunk_to_seq] > 1) & is_used_K).nonzero()[:, 0]


def _initial(state_cache: Tensor, state_slots: Tensor, has_initial_state: Tensor, row: Tensor) -> Tensor:
    """The states that rows begin with, copied; what a row that does not go on finds in its slot may be NaN."""
    return state_cache[state_slots[row].long()].masked_fill_(~has_initial_state[row][:, None, None, None], 0)


def _steps(scan: Scan, token_R: Tensor, state_RHPN: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row, from its state, which is moved on in place: [R, H, P] and the states.

    Heads of a group are multiplied as one, and groups of all rows stand side by side: M = R * G, I = H / G * P.
    """
    hidden_RHP, dt_RH, B_RGN, C_RGN = (tensor[0, token_R] for tensor in (scan.hidden, scan.dt, scan.B, scan.C))
    state_RHPN.mul_((dt_RH * scan.A).exp()[..., None, None])
    B_M1N, C_MN1 = B_RGN.flatten(0, 1)[:, None], C_RGN.flatten(0, 1)[..., None]
    state_MIN = state_RHPN.view(len(B_M1N), -1, C_MN1.shape[1])
    state_MIN.baddbmm_((dt_RH[..., None] * hidden_RHP).view(len(B_M1N), -1, 1), B_M1N)
    return (state_MIN @ C_MN1).view_as(hidden_RHP), state_RHPN


def _chunks(scan: Scan, token_KL: Tensor, row_K: Tensor, initial_KHPN: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks of rows, each row's in order, from the states that rows begin with: [K, L, H, P] and the states behind.

    Heads of a group are multiplied as one: I = H / G * P.
    """
    per_token = (scan.hidden * scan.dt[..., None], scan.dt * scan.A, scan.B, scan.C)
    padded = (torch.cat([tensor[0], torch.zeros_like(tensor[0, :1])]) for tensor in per_token)
    hidden_KLHP, decay_KLH, B_KLGN, C_KLGN = (tensor[token_KL] for tensor in padded)
    B_KGLN, C_KGLN = B_KLGN.transpose(1, 2), C_KLGN.transpose(1, 2)
    num_groups = B_KGLN.shape[1]
    decay_KHL = decay_KLH.transpose(1, 2)
    sums_KHLL = segment_sum(decay_KHL)
    weights_KGJLL = sums_KHLL.exp().unflatten(1, (num_groups, -1)) * (C_KGLN @ B_KGLN.mT)[:, :, None]
    inside_KHLP = weights_KGJLL.flatten(1, 2) @ hidden_KLHP.transpose(1, 2)
    to_end_KLH1 = sums_KHLL[:, :, -1].exp().mT[..., None]
    added_KGIN = (hidden_KLHP * to_end_KLH1).flatten(2).mT.unflatten(1, (num_groups, -1)) @ B_KGLN
    added_KHPN = added_KGIN.reshape(initial_KHPN.shape)
    begin_KHPN, behind_KHPN = _carry(added_KHPN, decay_KHL.sum(-1).exp(), row_K, initial_KHPN)
    before_KLGI = (C_KGLN @ begin_KHPN.reshape(added_KGIN.shape).mT).transpose(1, 2)
    before_KLHP = before_KLGI.reshape(hidden_KLHP.shape) * decay_KLH.cumsum(1).exp()[..., None]
    return inside_KHLP.transpose(1, 2) + before_KLHP, behind_KHPN


def _carry(added_KHPN: Tensor, decay_KH: Tensor, row_K: Tensor, initial_KHPN: Tensor) -> tuple[Tensor, Tensor]:
    """The states in front of chunks and behind them, one chunk after another.

    No sum over chunks that leaves others' out by a weight of zero: one sequence's NaN would reach all.
    """
    begin_KHPN, behind_KHPN = torch.empty_like(added_KHPN), torch.empty_like(added_KHPN)
    is_first_K = F.pad(row_K[1:] != row_K[:-1], (1, 0), value=True)
    for index, is_first in enumerate(is_first_K):
        torch.where(is_first, initial_KHPN[index], behind_KHPN[index - 1], out=begin_KHPN[index])
        decay_H11 = decay_KH[index, :, None, None]
        torch.addcmul(added_KHPN[index], begin_KHPN[index], decay_H11, out=behind_KHPN[index])
    return begin_KHPN, behind_KHPN


class TorchSsd(CachedSsd):
    name = "torch_ssd"
    meaning = "chunks of all sequences at once in plain torch, and one-token rows by themselves"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site[SsdFacts]) -> dict[str, Tensor]:
        chunk_size = min(site.facts.chunk_size, _MAX_CHUNK)
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "chunk_to_seq": chunk_fields.chunk_to_seq(layout, num_tokens, chunk_size),
            "chunk_tokens": chunk_fields.chunk_tokens(layout, num_tokens, chunk_size),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site[SsdFacts]
    ) -> Tensor:
        return torch.ops.autodeploy.torch_ssd.default(*tensors, *caches, *metadata.values(), **site.facts.options)


BACKENDS: tuple[Backend, ...] = (TorchSsd(),)
