"""Attention of the rows with one new token: each row's keys are read once and shared among programs ("splits").

Where it is given the new keys and values, the program of the first split also writes them to their slots. It takes them
from the new tensors, and every program stops reading before that slot, so that no order among the programs is needed.

Shapes: S sequences, T packed tokens, H query heads, K key-value heads, G = H / K (at least 16 here, for the matrix
units), D key size, E value size, p page size, N keys of one block, R splits.
"""

# Triton's launches and its language have types of their own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.support import power_of_two
from autodeploy.kernels.triton_blocks import block_keys, num_splits, shared_bytes
from autodeploy.kernels.triton_softmax import (
    LOWEST,
    Scoring,
    attend_range,
    load_sinks,
    load_slopes,
    squash,
    store_heads,
)
from autodeploy.kernels.triton_span import first_seen


@triton.jit
def _append(
    new, cache, token, head, stride_h, stride_t, slot, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write one token of one head to its slot; returns [BLOCK] as the cache holds it, zeros from SIZE on."""
    column_B = tl.arange(0, BLOCK)
    new_B = tl.load(new + head * stride_h + token * stride_t + column_B, mask=column_B < SIZE, other=0.0)
    new_B = new_B.to(cache.dtype.element_ty)
    tl.store(cache + (slot * HEADS + head) * SIZE + column_B, new_B, mask=column_B < SIZE)
    return new_B.to(tl.float32)


@triton.jit
def _see_first(query_GD, key_D, value_E, sink_G, inner, multiplier, HAS_SOFTCAP: tl.constexpr):
    """The running softmax of each head once it has seen its sink, where there is one, and one key."""
    score_G = squash(tl.sum(query_GD.to(tl.float32) * key_D[None, :], 1), inner, HAS_SOFTCAP) * multiplier
    highest_G = tl.maximum(score_G, sink_G)
    weight_G = tl.exp2(score_G - highest_G)
    return highest_G, weight_G + tl.exp2(sink_G - highest_G), weight_G[:, None] * value_E[None, :]


@triton.jit
def _take_new(
    query_GD, key, value, key_cache, value_cache, token, head, key_stride_h, key_stride_t, value_stride_h,
    value_stride_t, table, last, sink_G, inner, multiplier, HEADS: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the new key and value of one head to their slot; the running softmax once it has seen them."""
    slot = tl.load(table + last // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + last % PAGE_SIZE
    key_D = _append(key, key_cache, token, head, key_stride_h, key_stride_t, slot, HEADS, KEY_SIZE, BLOCK_D)
    value_E = _append(value, value_cache, token, head, value_stride_h, value_stride_t, slot, HEADS, VALUE_SIZE, BLOCK_E)
    return _see_first(query_GD, key_D, value_E, sink_G, inner, multiplier, HAS_SOFTCAP)


_NOT_SPECIAL = ["block_table", "seq_lens", "cu_seqlens_q", "table_stride", "num_tokens", "num_rows"]


@triton.jit(do_not_specialize=_NOT_SPECIAL)
def decode_kernel(
    query, key, value, sinks, slopes, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, out,
    part, part_sums,
    query_stride_h, query_stride_t, key_stride_h, key_stride_t, value_stride_h, value_stride_t, table_stride,
    num_tokens, num_rows, inner, multiplier,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPAN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (key-value head, split, row) writes to `out` [T, H, E], or its part of the softmax if there are splits.

    `part` is [S, H, R, E] and `part_sums` [S, H, R, 2]. Rows without exactly one new token are left alone.
    Where token r is padding, row r has no token either, and its first program writes the zeros.
    """
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_G, real_G = head * GROUP + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_G) < GROUP
    column_D, column_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    mask_GE = real_G[:, None] & (column_E < VALUE_SIZE)[None, :]
    mixed_GE = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    token = tl.load(cu_seqlens_q + row).to(tl.int64)
    if tl.load(cu_seqlens_q + row + 1) != token + 1:
        if (split == 0) & (row < num_tokens) & (row >= tl.load(cu_seqlens_q + num_rows)):
            store_heads(out, row, head_G, mask_GE, mixed_GE, HEADS * GROUP, VALUE_SIZE, BLOCK_E)
        return
    table = block_table + row.to(tl.int64) * table_stride
    last = tl.load(seq_lens + row) - 1
    query_GD = tl.load(
        query + head_G[:, None] * query_stride_h + token * query_stride_t + column_D[None, :],
        mask=real_G[:, None] & (column_D < KEY_SIZE)[None, :],
        other=0.0,
    )
    highest_G = tl.where(split == 0, load_sinks(sinks, head_G, real_G), LOWEST)
    total_G = tl.where(highest_G > LOWEST, 1.0, 0.0)
    if key is not None:  # noqa: SIM102  (known when this is compiled)
        if split == 0:
            highest_G, total_G, mixed_GE = _take_new(
                query_GD, key, value, key_cache, value_cache, token, head, key_stride_h, key_stride_t,
                value_stride_h, value_stride_t, table, last, highest_G, inner, multiplier, HEADS, KEY_SIZE, VALUE_SIZE,
                PAGE_SIZE, HAS_SOFTCAP, BLOCK_D, BLOCK_E,
            )  # fmt: skip
    stop = last if key is not None else last + 1
    first = first_seen(last, SPAN)
    first_block = first // BLOCK_N
    share = tl.cdiv(tl.cdiv(stop, BLOCK_N) - first_block, SPLITS)
    begin = (first_block + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, stop)
    highest_G, total_G, mixed_GE = attend_range(
        query_GD, highest_G, total_G, mixed_GE, tl.full([BLOCK_G], last, tl.int32),
        load_slopes(slopes, head_G, real_G, multiplier), begin, end, first,
        key_cache, value_cache, table, head, inner, multiplier, slopes is not None, True,
        HEADS, KEY_SIZE, VALUE_SIZE, PAGE_SIZE, 0, HAS_SOFTCAP, BLOCK_D, BLOCK_E, BLOCK_N,
    )  # fmt: skip
    if SPLITS == 1:
        store_heads(out, token, head_G, mask_GE, mixed_GE / total_G[:, None], HEADS * GROUP, VALUE_SIZE, BLOCK_E)
    else:
        place_G = (row.to(tl.int64) * (HEADS * GROUP) + head_G) * SPLITS + split
        tl.store(part + place_G[:, None] * VALUE_SIZE + column_E[None, :], mixed_GE, mask=mask_GE)
        tl.store(part_sums + place_G * 2, highest_G, mask=real_G)
        tl.store(part_sums + place_G * 2 + 1, total_G, mask=real_G)


@triton.jit(do_not_specialize=["cu_seqlens_q"])
def combine_kernel(
    part,
    part_sums,
    cu_seqlens_q,
    out,
    NUM_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (query head, row) joins the parts of a row's splits; one that had no keys has total 0."""
    head, row = tl.program_id(0), tl.program_id(1)
    token = tl.load(cu_seqlens_q + row).to(tl.int64)
    if tl.load(cu_seqlens_q + row + 1) != token + 1:
        return
    split_R, column_E = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    place_R = (row.to(tl.int64) * NUM_HEADS + head) * SPLITS + split_R
    is_split_R = split_R < SPLITS
    mask_RE = is_split_R[:, None] & (column_E < VALUE_SIZE)[None, :]
    highest_R = tl.load(part_sums + place_R * 2, mask=is_split_R, other=LOWEST)
    total_R = tl.load(part_sums + place_R * 2 + 1, mask=is_split_R, other=0.0)
    mixed_RE = tl.load(part + place_R[:, None] * VALUE_SIZE + column_E[None, :], mask=mask_RE, other=0.0)
    weight_R = tl.exp2(highest_R - tl.max(highest_R, 0))
    mean_E = tl.sum(mixed_RE * weight_R[:, None], 0) / tl.sum(total_R * weight_R, 0)
    out_E = out + (token * NUM_HEADS + head) * VALUE_SIZE + column_E
    tl.store(out_E, mean_E.to(out.dtype.element_ty), mask=column_E < VALUE_SIZE)


def decode_blocks(
    group_size: int, head_dim: int, value_dim: int, cache_dtype: torch.dtype, shared_bytes: int
) -> dict[str, int]:
    """The kernel's block sizes and launch options on a GPU with `shared_bytes` for two programs."""
    block_d, block_e = power_of_two(head_dim), power_of_two(value_dim)
    block_n = block_keys(max(head_dim, value_dim), cache_dtype.itemsize)
    room = shared_bytes // 2 // (block_n * (block_d + block_e) * cache_dtype.itemsize)
    return {
        "BLOCK_G": max(16, power_of_two(group_size)),
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BLOCK_N": block_n,
        "num_warps": 4,
        # The block in use is in registers by the time that the next one is asked for: a buffer less than stages.
        "num_stages": min(3, 1 + max(1, room)),
    }


def decode(
    query_HTD: Tensor,
    key_KTD: Tensor | None,
    value_KTE: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    out_THE: Tensor,
    scoring: Scoring,
) -> None:
    """Write the attention of each row with exactly one token to `out`; append that token where keys are given.

    Caches are [pages, p, K, D or E], contiguous; the int32 tensors are fields.
    """
    num_heads, num_tokens, head_dim = query_HTD.shape
    _, page_size, num_kv_heads, value_dim = value_cache.shape
    num_rows, device = seq_lens.shape[0], query_HTD.device
    new_strides = [stride for new in (key_KTD, value_KTE) for stride in ((0, 0) if new is None else new.stride()[:2])]
    group_size = num_heads // num_kv_heads
    blocks = decode_blocks(group_size, head_dim, value_dim, key_cache.dtype, shared_bytes(device))
    longest = min(block_table.shape[1] * page_size, scoring.span.longest or sys.maxsize)
    splits = num_splits(num_rows * num_kv_heads, triton.cdiv(longest, blocks["BLOCK_N"]), device)
    part = part_sums = None
    if splits > 1:
        part = torch.empty(num_rows, num_heads, splits, value_dim, dtype=torch.float32, device=device)
        part_sums = torch.empty(num_rows, num_heads, splits, 2, dtype=torch.float32, device=device)
    decode_kernel[(num_kv_heads, splits, num_rows)](
        query_HTD, key_KTD, value_KTE, sinks, slopes, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q,
        out_THE, part, part_sums, *query_HTD.stride()[:2], *new_strides,
        block_table.stride(0), num_tokens, num_rows, scoring.inner, scoring.multiplier,
        HEADS=num_kv_heads, GROUP=group_size, KEY_SIZE=head_dim, VALUE_SIZE=value_dim, PAGE_SIZE=page_size,
        SPAN=scoring.span.code, HAS_SOFTCAP=scoring.inner != 0, SPLITS=splits, **blocks,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(num_heads, num_rows)](
            part,
            part_sums,
            cu_seqlens_q,
            out_THE,
            NUM_HEADS=num_heads,
            VALUE_SIZE=value_dim,
            SPLITS=splits,
            BLOCK_R=power_of_two(splits),
            BLOCK_E=blocks["BLOCK_E"],
            num_warps=4,
        )
