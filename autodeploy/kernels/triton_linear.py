"""Linear layers for the few rows of a decode step on a GPU: one launch for up to four layers that share their input.

With few rows a linear layer only reads its weights. A program owns `block_n` output features, multiplies their weights
[block_n, block_k] by the input's [block_k, rows] on the matrix units, and keeps many tiles of weights on the way at a
time: 3 TB/s at a latency of about a microsecond want 3 MB in flight. No sum crosses programs, so that equal inputs give
equal bits.

Shapes: M rows, K input features, N output features of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels import support
from autodeploy.kernels.support import power_of_two
from autodeploy.ops.linear import Provider

# Above, libraries do as well: the input, which every program reads, is then no longer small beside the weights.
MAX_ROWS = 64
_MAX_LAYERS = 4
_DTYPES = (torch.float16, torch.bfloat16)
_MIN_ROWS = 16 if torch.version.hip else 8  # what matrix units take at least
_MOST_STAGES = 6


class Config(NamedTuple):
    """How a launch is cut: `block_n` weight rows per program, `num_stages` tiles of `block_k` columns on the way."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(num_rows: int, num_features: int, input_size: int, shared_bytes: int) -> Config:
    """The launch for `num_rows` rows and `num_features` output features of all layers together.

    `shared_bytes` is the shared memory that a program may take.
    Set by `benchmarks/gpu_linear.py` on an H100: within 4 % of the best of 15 ways for each layer of Llama-3-8B.
    """
    block_n = 64
    if num_rows <= 8 and num_features <= 4096:
        block_n = 32  # so that there are enough programs
    elif num_rows > 32 and num_features > 8192:
        block_n = 128
    block_k = min(max(128, 8192 // block_n), max(16, power_of_two(input_size)))
    tile_rows = block_n + max(_MIN_ROWS, power_of_two(num_rows))
    num_stages = max(1, min(_MOST_STAGES, shared_bytes // (2 * tile_rows * block_k)))
    return Config(block_n, block_k, num_warps=4, num_stages=num_stages)


def launch(
    input: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None, config: Config | None = None
) -> list[Tensor]:
    """input Wᵀ of each W, accumulated in float32; `bias` [N] is added where there is one layer.

    input [..., K] of M rows, weights [N_i, K], contiguous, all in one half precision -> [..., N_i], contiguous.
    """
    rows_MK = input.reshape(-1, input.shape[-1]).contiguous()
    num_rows, input_size = rows_MK.shape
    sizes = [weight.shape[0] for weight in weights]
    assert bias is None or len(weights) == 1
    cut = config or choose_config(num_rows, sum(sizes), input_size, _shared_bytes(input.device))
    outputs = [input.new_empty(*input.shape[:-1], size) for size in sizes]
    absent = [None] * (_MAX_LAYERS - len(weights))
    layers = [*weights, *absent, *outputs, *absent, *sizes, *absent]
    grid = (sum(triton.cdiv(size, cut.block_n) for size in sizes),)
    blocks, options = _blocks(num_rows, cut)
    args: list[Any] = [rows_MK, *layers, bias, num_rows, input_size, *blocks]
    linears_kernel[grid](*args, **options)
    return outputs


def _shared_bytes(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted
        return 64 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _blocks(num_rows: int, cut: Config) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The last parameters of both kernels, and the options of their launch."""
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return (max(_MIN_ROWS, power_of_two(num_rows)), cut.block_n, cut.block_k), options


@triton.jit(do_not_specialize=["M"])
def linears_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    w3_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    N0,
    N1,
    N2,
    N3,
    bias_ptr,
    M,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per BLOCK_N features of one layer; layers that are not there are None."""
    tile = tl.program_id(0)
    w_ptr, out_ptr, N, first = w0_ptr, out0_ptr, N0, 0
    end = tl.cdiv(N0, BLOCK_N)
    if w1_ptr is not None:
        if tile >= end:
            w_ptr, out_ptr, N, first = w1_ptr, out1_ptr, N1, end
        end += tl.cdiv(N1, BLOCK_N)
    if w2_ptr is not None:
        if tile >= end:
            w_ptr, out_ptr, N, first = w2_ptr, out2_ptr, N2, end
        end += tl.cdiv(N2, BLOCK_N)
    if w3_ptr is not None:
        is_last = tile >= end
        if is_last:
            w_ptr, out_ptr, N, first = w3_ptr, out3_ptr, N3, end
    n = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(n, N, K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        w = load_weights(w_ptr + offsets, start + k, K, BLOCK_K)
        acc = tl.dot(w, load_inputs(x_ptr, m, start + k, M, K, BLOCK_K), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
    store(out_ptr, acc, m, n, M, N)


@triton.jit
def row_offsets(n, N, K: tl.constexpr):
    """Where the weights of features `n` begin. A tile beyond the last reads that again; what comes of it is dropped."""
    return tl.minimum(n, N - 1).to(tl.int64)[:, None] * K


@triton.jit
def load_weights(ptrs, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    if K % BLOCK_K == 0:
        w = tl.load(ptrs + k[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(ptrs + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
    return w


@triton.jit
def load_inputs(x_ptr, m, k, M, K: tl.constexpr, BLOCK_K: tl.constexpr):
    inside = m[None, :] < M
    if K % BLOCK_K != 0:
        inside = inside & (k[:, None] < K)
    return tl.load(x_ptr + m[None, :] * K + k[:, None], mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def store(out_ptr, acc, m, n, M, N):
    inside = (m[None, :] < M) & (n[:, None] < N)
    tl.store(out_ptr + m[None, :] * N + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside)


class TritonLinear:
    name = "triton"
    takes_siblings = True

    def why_not(self, weight: Tensor) -> str | None:
        if weight.dtype not in _DTYPES:
            return f"its weight is {weight.dtype}, not half precision"
        return support.why_not(weight.device) or (None if weight.is_contiguous() else "its weight is not contiguous")

    def takes(self, input: Tensor) -> bool:
        if input.dtype not in _DTYPES or support.why_not(input.device):
            return False
        return 0 < input.shape[:-1].numel() <= MAX_ROWS

    def run(self, input: Tensor, weights: list[Tensor], bias: Tensor | None = None) -> list[Tensor]:
        return launch(input, weights, bias)


PROVIDERS: tuple[Provider, ...] = (TritonLinear(),)
