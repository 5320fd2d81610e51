"""The arithmetic that the paged attention kernels share: one block of keys into a running softmax.

The softmax runs in powers of two. Per query row it is three things: `highest` score so far, `total` weight, and the
weighted sum of values `mixed`, both relative to 2**highest.

Shapes: M query rows of one program, N keys of one block, D key size, E value size (both rounded up to powers of two).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from autodeploy.kernels.triton_span import first_seen
from autodeploy.metadata.span import Span, span_of

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, and finite so that a row that has seen nothing subtracts to 0 and not to NaN.
LOWEST = tl.constexpr(-1e30)


class Scoring(NamedTuple):
    """From Q Kᵀ to a score: tanh(x * inner), where `inner` is not 0, and then times `multiplier`, to powers of two."""

    inner: float
    multiplier: float
    span: Span

    @staticmethod
    def of(scale: float, span: str, softcap: float | None) -> Scoring:
        """`scale` and `softcap` as in the canonical op, both positive."""
        if softcap is None:
            return Scoring(0.0, scale * math.log2(math.e), span_of(span))
        return Scoring(scale / softcap, softcap * math.log2(math.e), span_of(span))


@triton.jit
def load_sinks(sinks, head_M, real_M):
    """[M] scores of each row's sink, in powers of two; the lowest where there are none."""
    if sinks is None:
        sink_M = tl.full(head_M.shape, LOWEST, tl.float32)
    else:
        sink_M = tl.load(sinks + head_M, mask=real_M, other=0.0).to(tl.float32) * LOG2E
    return sink_M


@triton.jit
def load_slopes(slopes, head_M, real_M, multiplier):
    """[M] what a score, before it is times `multiplier`, loses per position of distance (ALiBi); 0 for no slopes."""
    if slopes is None:
        slope_M = tl.zeros(head_M.shape, tl.float32)
    else:
        slope_M = tl.load(slopes + head_M, mask=real_M, other=0.0) * (LOG2E / multiplier)
    return slope_M


@triton.jit
def store_heads(
    out, token, head_M, mask_ME, value_ME, NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write [M, BLOCK] to the rows (token, head) of `out` [T, NUM_HEADS, SIZE]; `token` is one or [M]."""
    row_M = token.to(tl.int64) * NUM_HEADS + head_M
    address_ME = out + row_M[:, None] * SIZE + tl.arange(0, BLOCK)[None, :]
    tl.store(address_ME, value_ME.to(out.dtype.element_ty), mask=mask_ME)


@triton.jit
def squash(scores, inner, HAS_SOFTCAP: tl.constexpr):
    """tanh(scores * inner) where there is a soft cap, whose size is in the multiplier that follows."""
    if HAS_SOFTCAP:
        scores = 2 * tl.sigmoid(2 * inner * scores) - 1
    return scores


@triton.jit
def _load_block(
    cache, slot_N, head, mask_N, MASKED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """[N, BLOCK] of one head of a cache [slots, HEADS, SIZE]; zeros where `mask_N` is False, and from SIZE on.

    Zeros, and not what lies there, because a weight of zero does not silence NaN.
    """
    column_B = tl.arange(0, BLOCK)
    address_NB = cache + (slot_N * HEADS + head)[:, None] * SIZE + column_B[None, :]
    if MASKED and SIZE != BLOCK:
        block_NB = tl.load(address_NB, mask=mask_N[:, None] & (column_B < SIZE)[None, :], other=0.0)
    elif MASKED:
        block_NB = tl.load(address_NB, mask=mask_N[:, None], other=0.0)
    elif SIZE != BLOCK:
        block_NB = tl.load(address_NB, mask=(column_B < SIZE)[None, :], other=0.0)
    else:
        block_NB = tl.load(address_NB)
    return block_NB


@triton.jit
def _take_block(scores_MN, value_NE, highest_M, total_M, mixed_ME, multiplier):
    """The running softmax once it has seen a block with these scores, each times `multiplier` in powers of two."""
    higher_M = tl.maximum(highest_M, tl.max(scores_MN, 1) * multiplier)
    weights_MN = tl.exp2(scores_MN * multiplier - higher_M[:, None])
    faded_M = tl.exp2(highest_M - higher_M)
    mixed_ME = tl.dot(weights_MN.to(value_NE.dtype), value_NE, mixed_ME * faded_M[:, None], input_precision="ieee")
    return higher_M, total_M * faded_M + tl.sum(weights_MN, 1), mixed_ME


@triton.jit
def attend_range(
    query_MD, highest_M, total_M, mixed_ME, position_M, slope_M, begin, end, first,
    key_cache, value_cache, table, head, inner, multiplier, HAS_SLOPES: tl.constexpr, MASKED: tl.constexpr,
    HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SPAN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running softmax once it has seen the keys from `begin`, a multiple of BLOCK_N, to `end`; none before `first`.

    Of these a row sees those up to its own position. Without MASKED it sees all, and `end` is a multiple of BLOCK_N.
    """
    at_N = begin + tl.arange(0, BLOCK_N)
    page_N = tl.load(table + at_N // PAGE_SIZE, mask=at_N < end, other=0)
    for _ in range(begin, end, BLOCK_N):
        slot_N = page_N.to(tl.int64) * PAGE_SIZE + at_N % PAGE_SIZE
        own_N = (at_N >= first) & (at_N < end)
        key_ND = _load_block(key_cache, slot_N, head, own_N, MASKED, HEADS, KEY_SIZE, BLOCK_D).to(query_MD.dtype)
        value_NE = _load_block(value_cache, slot_N, head, own_N, MASKED, HEADS, VALUE_SIZE, BLOCK_E).to(query_MD.dtype)
        score_MN = squash(tl.dot(query_MD, tl.trans(key_ND), input_precision="ieee"), inner, HAS_SOFTCAP)
        if HAS_SLOPES:
            score_MN -= slope_M[:, None] * (position_M[:, None] - at_N[None, :])
        if MASKED:
            seen_MN = own_N[None, :] & (at_N[None, :] <= position_M[:, None])
            if SPAN != 0:
                seen_MN &= at_N[None, :] >= first_seen(position_M, SPAN)[:, None]
            score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        # One block ahead, so that the loads above never wait for a page number.
        at_N += BLOCK_N
        page_N = tl.load(table + at_N // PAGE_SIZE, mask=at_N < end, other=0)
        highest_M, total_M, mixed_ME = _take_block(score_MN, value_NE, highest_M, total_M, mixed_ME, multiplier)
    return highest_M, total_M, mixed_ME
