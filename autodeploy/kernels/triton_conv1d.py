"""Causal convolution from a cached state, in Triton: one launch for a decode step, two where rows may be longer.

The longer step needs two because the outputs read the old states of all rows, and only then may a state be replaced.

Shapes: S sequences, T packed tokens, C channels, N taps.
"""

# Triton's launches and its language have types of their own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels import support
from autodeploy.kernels.support import power_of_two
from autodeploy.metadata import fields
from autodeploy.ops.backend import Backend
from autodeploy.ops.kinds.causal_conv1d import CachedConv1d
from autodeploy.ops.site import Site
from autodeploy.ops.step_kind import DECODE, MIXED, StepKind

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_TAPS = 8
# 128 channels of bf16 are 256 bytes of a token, and 2,048 channels of one sequence still give 16 programs.
_BLOCK_C, _BLOCK_T = 128, 8

_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "triton_causal_conv1d(Tensor hidden, Tensor weight, Tensor? bias, Tensor(a!) state_cache, Tensor state_slots,"
    " Tensor has_initial_state, Tensor cu_seqlens_q, Tensor token_to_seq, *, str? activation=None,"
    " str step_kind='mixed') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@triton.jit(do_not_specialize=["stride_slot"])
def decode_kernel(
    hidden_CT,
    weight_CN,
    bias_C,
    states,
    slot_S,
    goes_on_S,
    start_S1,
    out_TC,
    channels,
    stride_c,
    stride_t,
    stride_slot,
    NUM_TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per row and block of channels: convolve the row's token, and shift it into the row's state."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, BLOCK_N)[None, :]
    inside = channel < channels
    # A row that does not go on reads zeros for its state, and one without a token leaves it alone.
    cached = channel < tl.where(tl.load(goes_on_S + row) != 0, channels, 0)
    written = channel < tl.where(tl.load(start_S1 + row + 1) > tl.load(start_S1 + row), channels, 0)
    slot = tl.load(slot_S + row * stride_slot).to(tl.int64)
    state = states + (slot * channels + channel)[:, None] * (NUM_TAPS - 1) + tap
    here = hidden_CT + row * stride_t + channel[:, None] * stride_c + tl.zeros_like(tap)
    inputs = tl.load(state, mask=cached[:, None] & (tap < NUM_TAPS - 1), other=0.0)
    inputs += tl.load(here, mask=inside[:, None] & (tap == NUM_TAPS - 1), other=0.0)
    taps = weight_CN + channel[:, None] * NUM_TAPS + tap
    weight = tl.load(taps, mask=inside[:, None] & (tap < NUM_TAPS), other=0.0)
    acc = tl.sum(inputs.to(tl.float32) * weight.to(tl.float32), axis=1)
    if bias_C is not None:
        acc += tl.load(bias_C + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        acc = acc * tl.sigmoid(acc)
    tl.store(out_TC + row * channels + channel, acc, mask=inside)
    # Another thread may still have to read what this one overwrites.
    tl.debug_barrier()
    tl.store(state - 1, inputs, mask=written[:, None] & (tap > 0) & (tap < NUM_TAPS))


@triton.jit(do_not_specialize=["num_tokens", "stride_slot"])
def output_kernel(
    hidden_CT,
    weight_CN,
    bias_C,
    states,
    slot_S,
    goes_on_S,
    start_S1,
    row_T,
    out_TC,
    num_tokens,
    channels,
    stride_c,
    stride_t,
    stride_slot,
    NUM_TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per block of tokens, of whatever rows, and block of channels: outputs alone."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_place = token < num_tokens
    inside = channel < channels
    row = tl.load(row_T + token, mask=is_place, other=0)
    start = tl.load(start_S1 + row, mask=is_place, other=0)
    goes_on = tl.load(goes_on_S + row, mask=is_place, other=0) != 0
    slot = tl.load(slot_S + row * stride_slot, mask=is_place, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    if bias_C is not None:
        acc += tl.load(bias_C + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(NUM_TAPS):
        source = token + (k - NUM_TAPS + 1)
        is_new = is_place & (source >= start)
        here = hidden_CT + source[:, None] * stride_t + channel[None, :] * stride_c
        taps = tl.load(here, mask=is_new[:, None] & inside[None, :], other=0.0)
        # Counted from the row's first new token, the state ends at -1 with its entry NUM_TAPS - 2.
        entry = source - start + (NUM_TAPS - 1)
        is_old = is_place & (source < start) & goes_on
        cached = states + (slot[:, None] * channels + channel[None, :]) * (NUM_TAPS - 1) + entry[:, None]
        taps += tl.load(cached, mask=is_old[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_CN + channel * NUM_TAPS + k, mask=inside, other=0.0)
        acc += taps.to(tl.float32) * weight.to(tl.float32)[None, :]
    if SILU:
        acc = acc * tl.sigmoid(acc)
    place = out_TC + token[:, None] * channels + channel[None, :]
    tl.store(place, acc, mask=is_place[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["stride_slot"])
def state_kernel(
    hidden_CT,
    states,
    slot_S,
    goes_on_S,
    start_S1,
    channels,
    stride_c,
    stride_t,
    stride_slot,
    NUM_TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per row and block of channels: the last inputs of the row become its state."""
    row = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    entry = tl.arange(0, BLOCK_N)[None, :]
    start = tl.load(start_S1 + row).to(tl.int64)
    length = tl.load(start_S1 + row + 1) - start
    slot = tl.load(slot_S + row * stride_slot).to(tl.int64)
    cached = channel < tl.where(tl.load(goes_on_S + row) != 0, channels, 0)
    written = (channel < tl.where(length > 0, channels, 0))[:, None] & (entry < NUM_TAPS - 1)
    # Counted from the row's first new token; before that lie the old entries.
    source = length - (NUM_TAPS - 1) + entry
    here = hidden_CT + (start + source) * stride_t + channel[:, None] * stride_c
    state = states + (slot * channels + channel)[:, None] * (NUM_TAPS - 1) + entry
    inputs = tl.load(here, mask=written & (source >= 0), other=0.0)
    inputs += tl.load(state + length, mask=written & (source < 0) & cached[:, None], other=0.0)
    # Another thread may still have to read what this one overwrites.
    tl.debug_barrier()
    tl.store(state, inputs, mask=written)


@torch.library.impl(_library, "triton_causal_conv1d", "CompositeExplicitAutograd")
def _causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_cache: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    cu_seqlens_q: Tensor,
    token_to_seq: Tensor,
    *,
    activation: str | None = None,
    step_kind: StepKind = MIXED,
) -> Tensor:
    """Convolve each sequence's cached inputs followed by its new ones, and cache the last N - 1 of them.

    hidden [1, C, T] of any strides, weight [C, N], bias [C] or None, state_cache [slots, C, N - 1], contiguous ->
    [1, C, T] with neighbouring channels side by side. The int and bool tensors are the fields of the same names.
    """
    _, channels, num_tokens = hidden.shape
    num_rows = state_slots.shape[0]
    out_1TC = torch.empty((1, num_tokens, channels), dtype=hidden.dtype, device=hidden.device)
    tensors = (hidden, weight.contiguous(), bias, state_cache)
    rows = (state_slots, has_initial_state, cu_seqlens_q)
    # The plain formula of state_slots is a column of the layout.
    sizes = (channels, hidden.stride(1), hidden.stride(2), state_slots.stride(0), weight.shape[1])
    blocks = triton.cdiv(channels, _BLOCK_C)
    silu, block_n = activation is not None, power_of_two(weight.shape[1])
    if step_kind == DECODE:
        decode_kernel[(blocks, num_rows)](*tensors, *rows, out_1TC, *sizes, silu, block_n, _BLOCK_C, num_warps=1)
        return out_1TC.transpose(1, 2)
    grid = (triton.cdiv(num_tokens, _BLOCK_T), blocks)
    output_kernel[grid](*tensors, *rows, token_to_seq, out_1TC, num_tokens, *sizes, silu, _BLOCK_T, _BLOCK_C)
    state_kernel[(blocks, num_rows)](hidden, state_cache, *rows, *sizes, block_n, _BLOCK_C, num_warps=1)
    return out_1TC.transpose(1, 2)


@torch.library.register_fake("autodeploy::triton_causal_conv1d", lib=_library)
def _(hidden, *_, **__):
    return hidden.new_empty(1, hidden.shape[2], hidden.shape[1]).transpose(1, 2)


class TritonCausalConv1d(CachedConv1d):
    name = "triton_conv1d"
    meaning = "Triton kernels: one launch for a decode step, two for longer rows"

    def why_not(self, site: Site) -> str | None:
        if reason := support.why_not(site.device):
            return reason
        if site.dtype not in _DTYPES:
            return f"{site.dtype} is not among float16, bfloat16 and float32".replace("torch.", "")
        taps = site.facts.kernel_size
        return None if 2 <= taps <= _MAX_TAPS else f"{taps} taps are not among 2 to {_MAX_TAPS}"

    def metadata(self, layout: Tensor, num_tokens: int, site: Site) -> dict[str, Tensor]:
        return {
            "state_slots": fields.state_slots(layout),
            "has_initial_state": fields.has_initial_state(layout),
            "cu_seqlens_q": fields.cu_seqlens_q(layout),
            "token_to_seq": fields.token_to_seq(layout, num_tokens),
        }

    def attend(
        self, tensors: tuple[Any, ...], caches: tuple[Tensor, ...], metadata: dict[str, Tensor], site: Site
    ) -> Tensor:
        return torch.ops.autodeploy.triton_causal_conv1d.default(
            *tensors, *caches, **metadata, activation=site.facts.activation
        )


BACKENDS: tuple[Backend, ...] = (TritonCausalConv1d(),)
