"""Attention of the rows with more than one new token, tile by tile, from the paged cache (FlashAttention-2).

A tile is some new tokens of one sequence with all query heads of one key-value head, so that short chunks fill it too.
Keys that every row of the tile sees are taken without masks; only the ends of the range are masked.

Shapes: S sequences, T packed tokens, H query heads, K key-value heads, G = H / K, D key size, E value size,
p page size, M (token, head) rows of one tile, N keys of one block.
"""

# Triton's launches and its language have types of their own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.support import power_of_two
from autodeploy.kernels.triton_blocks import block_keys, shared_bytes
from autodeploy.kernels.triton_softmax import LOWEST, Scoring, attend_range, load_sinks, load_slopes, store_heads
from autodeploy.kernels.triton_span import first_seen


def tile_tokens(group_size: int, dtype: torch.dtype) -> int:
    """Tokens of one tile, for the field `query_tiles`."""
    return max(1, _rows(group_size, dtype) // group_size)


def _rows(group_size: int, dtype: torch.dtype) -> int:
    """Rows of a tile: two warpgroups' worth for the matrix units; few for float32, which needs registers instead."""
    return max(32 if dtype is torch.float32 else 128, power_of_two(group_size))


@triton.jit(do_not_specialize=["block_table", "seq_lens", "cu_seqlens_q", "query_tiles", "table_stride"])
def prefill_kernel(
    query, sinks, slopes, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, query_tiles, out,
    query_stride_h, query_stride_t, table_stride, inner, multiplier,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPAN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (key-value head, tile) writes the tile's rows of `out` [T, H, E]; later tiles see more, and go first."""
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.load(query_tiles + tile * 2)
    if row < 0:
        return
    begin_token = tl.load(query_tiles + tile * 2 + 1)
    row_end = tl.load(cu_seqlens_q + row + 1)
    end_token = tl.minimum(begin_token + TOKENS, row_end)
    # From a place in the packed stream to a position in the sequence.
    shift = tl.load(seq_lens + row) - row_end
    table = block_table + row.to(tl.int64) * table_stride
    member_M, column_D, column_E = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    token_M = begin_token + member_M // GROUP
    head_M = head * GROUP + member_M % GROUP
    real_M = token_M < end_token
    query_MD = tl.load(
        query + head_M[:, None] * query_stride_h + token_M.to(tl.int64)[:, None] * query_stride_t + column_D[None, :],
        mask=real_M[:, None] & (column_D < KEY_SIZE)[None, :],
        other=0.0,
    )
    highest_M = load_sinks(sinks, head_M, real_M)
    total_M = tl.where(highest_M > LOWEST, 1.0, 0.0)
    mixed_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # Rows beyond the tile's last token stand where it does, so that they too see something.
    position_M = tl.minimum(token_M, end_token - 1) + shift
    slope_M = load_slopes(slopes, head_M, real_M, multiplier)
    first, end = 0, end_token + shift
    whole_begin, whole_end = 0, (begin_token + shift + 1) // BLOCK_N * BLOCK_N
    if SPAN != 0:
        first = first_seen(begin_token + shift, SPAN)
        whole_begin = tl.minimum(tl.cdiv(first_seen(end - 1, SPAN), BLOCK_N) * BLOCK_N, whole_end)
        highest_M, total_M, mixed_ME = attend_range(
            query_MD, highest_M, total_M, mixed_ME, position_M, slope_M, first // BLOCK_N * BLOCK_N, whole_begin, first,
            key_cache, value_cache, table, head, inner, multiplier, slopes is not None, True,
            HEADS, KEY_SIZE, VALUE_SIZE, PAGE_SIZE, SPAN, HAS_SOFTCAP, BLOCK_D, BLOCK_E, BLOCK_N,
        )  # fmt: skip
    highest_M, total_M, mixed_ME = attend_range(
        query_MD, highest_M, total_M, mixed_ME, position_M, slope_M, whole_begin, whole_end, first,
        key_cache, value_cache, table, head, inner, multiplier, slopes is not None, False,
        HEADS, KEY_SIZE, VALUE_SIZE, PAGE_SIZE, SPAN, HAS_SOFTCAP, BLOCK_D, BLOCK_E, BLOCK_N,
    )  # fmt: skip
    highest_M, total_M, mixed_ME = attend_range(
        query_MD, highest_M, total_M, mixed_ME, position_M, slope_M, whole_end, end, first,
        key_cache, value_cache, table, head, inner, multiplier, slopes is not None, True,
        HEADS, KEY_SIZE, VALUE_SIZE, PAGE_SIZE, SPAN, HAS_SOFTCAP, BLOCK_D, BLOCK_E, BLOCK_N,
    )  # fmt: skip
    mask_ME = real_M[:, None] & (column_E < VALUE_SIZE)[None, :]
    store_heads(out, token_M, head_M, mask_ME, mixed_ME / total_M[:, None], HEADS * GROUP, VALUE_SIZE, BLOCK_E)


def prefill_blocks(
    group_size: int, head_dim: int, value_dim: int, dtype: torch.dtype, shared_bytes: int
) -> dict[str, int]:
    """The kernel's block sizes and launch options on a GPU with `shared_bytes` for one program."""
    block_d, block_e = power_of_two(head_dim), power_of_two(value_dim)
    block_m = _rows(group_size, dtype)
    block_n = 16 if dtype is torch.float32 else block_keys(max(head_dim, value_dim), dtype.itemsize)
    room = shared_bytes - block_m * block_d * dtype.itemsize
    return {
        "TOKENS": tile_tokens(group_size, dtype),
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BLOCK_N": block_n,
        "num_warps": 8,
        "num_stages": min(3, max(1, room // (block_n * (block_d + block_e) * dtype.itemsize))),
    }


def prefill(
    query_HTD: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    query_tiles: Tensor,
    out_THE: Tensor,
    scoring: Scoring,
) -> None:
    """Write the attention of each row with more than one new token, all of them in the cache already, to `out`.

    Caches are [pages, p, K, D or E], contiguous; the int32 tensors are fields.
    """
    num_heads, _, head_dim = query_HTD.shape
    _, page_size, num_kv_heads, value_dim = value_cache.shape
    group_size = num_heads // num_kv_heads
    blocks = prefill_blocks(group_size, head_dim, value_dim, query_HTD.dtype, shared_bytes(query_HTD.device))
    prefill_kernel[(num_kv_heads, query_tiles.shape[0])](
        query_HTD, sinks, slopes, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, query_tiles, out_THE,
        *query_HTD.stride()[:2], block_table.stride(0), scoring.inner, scoring.multiplier,
        HEADS=num_kv_heads, GROUP=group_size, KEY_SIZE=head_dim, VALUE_SIZE=value_dim, PAGE_SIZE=page_size,
        SPAN=scoring.span.code, HAS_SOFTCAP=scoring.inner != 0, **blocks,
    )  # fmt: skip
