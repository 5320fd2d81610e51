"""Writes a step's new keys and values to their slots of a paged cache, in one launch.

Shapes: T packed tokens, H query heads, K key-value heads, G = H / K, D key size, E value size, p page size.
"""

# Triton's launches and its language have types of their own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.support import power_of_two

_TOKENS = 16


@triton.jit(do_not_specialize=["slot_mapping", "cu_seqlens_q", "num_tokens", "num_rows"])
def append_kernel(
    key,
    value,
    key_cache,
    value_cache,
    out,
    slot_mapping,
    cu_seqlens_q,
    num_tokens,
    num_rows,
    key_stride_h,
    key_stride_t,
    value_stride_h,
    value_stride_t,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (head, block of tokens): what is not a token is not written, and its rows of `out` become zeros."""
    head = tl.program_id(0)
    token_T = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D, column_E = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    total = tl.load(cu_seqlens_q + num_rows)
    is_token_T = token_T < total
    slot_T = tl.load(slot_mapping + token_T, mask=is_token_T, other=0)
    mask_TD = is_token_T[:, None] & (column_D < KEY_SIZE)[None, :]
    mask_TE = is_token_T[:, None] & (column_E < VALUE_SIZE)[None, :]
    key_TD = tl.load(key + head * key_stride_h + token_T[:, None] * key_stride_t + column_D[None, :], mask=mask_TD)
    value_TE = tl.load(
        value + head * value_stride_h + token_T[:, None] * value_stride_t + column_E[None, :], mask=mask_TE
    )
    place_T = slot_T * HEADS + head
    key_TD = key_TD.to(key_cache.dtype.element_ty)
    tl.store(key_cache + place_T[:, None] * KEY_SIZE + column_D[None, :], key_TD, mask=mask_TD)
    value_TE = value_TE.to(value_cache.dtype.element_ty)
    tl.store(value_cache + place_T[:, None] * VALUE_SIZE + column_E[None, :], value_TE, mask=mask_TE)
    if out is not None:  # noqa: SIM102  (what is None is known when this is compiled)
        if tl.program_id(1) * BLOCK_T + BLOCK_T > total:
            is_padding_TE = ((token_T >= total) & (token_T < num_tokens))[:, None] & (column_E < VALUE_SIZE)[None, :]
            for member in range(GROUP):
                row_T = token_T * (HEADS * GROUP) + head * GROUP + member
                zero_TE = tl.zeros([BLOCK_T, BLOCK_E], out.dtype.element_ty)
                tl.store(out + row_T[:, None] * VALUE_SIZE + column_E[None, :], zero_TE, mask=is_padding_TE)


def append(
    key_KTD: Tensor,
    value_KTE: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out_THE: Tensor | None,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
) -> None:
    """Write every token's keys and values to its slot, and zeros to the rows of `out`, if given, of no token.

    Caches are [pages, p, K, D or E], contiguous; `slot_mapping` [T] int64 and `cu_seqlens_q` [S + 1] int32 are fields.
    """
    num_kv_heads, num_tokens, head_dim = key_KTD.shape
    value_dim = value_KTE.shape[2]
    append_kernel[(num_kv_heads, triton.cdiv(num_tokens, _TOKENS))](
        key_KTD,
        value_KTE,
        key_cache,
        value_cache,
        out_THE,
        slot_mapping,
        cu_seqlens_q,
        num_tokens,
        cu_seqlens_q.shape[0] - 1,
        *key_KTD.stride()[:2],
        *value_KTE.stride()[:2],
        HEADS=num_kv_heads,
        GROUP=1 if out_THE is None else out_THE.shape[1] // num_kv_heads,
        KEY_SIZE=head_dim,
        VALUE_SIZE=value_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_E=power_of_two(value_dim),
        BLOCK_T=_TOKENS,
        num_warps=4,
    )


_library = torch.library.Library("autodeploy", "FRAGMENT")
_library.define(
    "triton_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping,"
    " Tensor cu_seqlens_q) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "triton_append", "CompositeExplicitAutograd")
def _append(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, cu_seqlens_q: Tensor
) -> None:
    """Write new keys [1, K, T, D] and values [1, K, T, E] to their slots."""
    append(in_rows(key[0]), in_rows(value[0]), key_cache, value_cache, None, slot_mapping, cu_seqlens_q)


append_op = torch.ops.autodeploy.triton_append.default


@torch.library.register_fake("autodeploy::triton_append", lib=_library)
def _(*_: Tensor) -> None:
    return None


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor with each head of each token in one run of memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
