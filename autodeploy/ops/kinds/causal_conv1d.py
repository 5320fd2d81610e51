"""`autodeploy::causal_conv1d`: depthwise convolution over time that sees only the past (LFM2, Mamba, delta rule).

Shapes: B batch, C channels, S tokens, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.location import module_path, node_location
from autodeploy.graph.meta import VALUE
from autodeploy.ops.spec import Kind, Site

ACTIVATIONS = (None, "silu", "swish")

# (atol, rtol) of a backend against the canonical op: another order of summation; float16 keeps 11 bits of the result
# and bfloat16 8.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@torch.library.custom_op("autodeploy::causal_conv1d", mutates_args=())
def causal_conv1d(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """out[b, c, t] = act(bias[c] + Σ_k weight[c, k] · hidden[b, c, t - (K - 1) + k]), zeros before the start.

    hidden [B, C, S], weight [C, K], bias [C] or None -> [B, C, S], in hidden's dtype. `activation` is None, "silu" or
    "swish". `cu_seqlens` [N + 1] int32 cuts one packed row (B = 1) into N sequences that do not see each other.
    """
    num_taps = weight.shape[1]
    if cu_seqlens is None:
        windows_BCSK = F.pad(hidden, (num_taps - 1, 0)).unfold(-1, num_taps, 1)
    else:
        windows_BCSK = _ragged_windows(hidden, num_taps, cu_seqlens)
    return convolve(windows_BCSK, weight, bias, activation).to(hidden.dtype).contiguous()


@causal_conv1d.register_fake
def _(hidden, weight, bias=None, cu_seqlens=None, *, activation=None):
    return hidden.new_empty(hidden.shape)


def convolve(windows: Tensor, weight_CK: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    """The arithmetic shared with the cached backends: windows [B, C, S, K] -> [B, C, S]."""
    batch, channels, tokens, num_taps = windows.shape
    # One conv1d over the stacked windows, so that each output is the same K-term dot product as in the model.
    stacked = windows.permute(0, 2, 1, 3).reshape(batch * tokens, channels, num_taps)
    out = F.conv1d(stacked.to(weight_CK.dtype), weight_CK.unsqueeze(1), bias_C, groups=channels)
    out = out.reshape(batch, tokens, channels).transpose(1, 2)
    return F.silu(out) if activation in ("silu", "swish") else out


def _ragged_windows(hidden_BCS: Tensor, num_taps: int, cu_seqlens: Tensor) -> Tensor:
    index_S = torch.arange(hidden_BCS.shape[-1], device=hidden_BCS.device)
    row_S = torch.searchsorted(cu_seqlens, index_S.to(cu_seqlens.dtype), right=True) - 1
    start_S = cu_seqlens[row_S]
    source_SK = index_S[:, None] - torch.arange(num_taps - 1, -1, -1, device=hidden_BCS.device)
    inside_SK = source_SK >= start_S[:, None]
    windows = hidden_BCS[:, :, source_SK.clamp(min=0)]
    return torch.where(inside_SK, windows, torch.zeros((), dtype=windows.dtype, device=windows.device))


def _tensors(node: fx.Node) -> tuple[Any, ...]:
    """hidden, weight, bias of a convolution node."""
    padded = (*node.args, None)[:3]
    return tuple(node.kwargs.get(name, arg) for name, arg in zip(("hidden", "weight", "bias"), padded, strict=True))


def _describe(node: fx.Node) -> Site:
    hidden, weight, bias = _tensors(node)
    if not all(isinstance(arg, fx.Node) and VALUE.on(arg) for arg in (hidden, weight)):
        raise UnsupportedFeature("a convolution node whose inputs have no recorded shapes", where=node_location(node))
    activation = node.kwargs.get("activation")
    if activation not in ACTIVATIONS:
        raise UnsupportedFeature(f"causal_conv1d with activation {activation!r}", where=node_location(node))
    x, w = VALUE.of(hidden), VALUE.of(weight)
    return Site(
        kind="causal_conv1d",
        path=module_path(node) or node.name,
        layer_type="conv",
        dtype=x.dtype,
        device=x.device,
        params={
            "channels": int(w.shape[0]),
            "kernel_size": int(w.shape[1]),
            "has_bias": bias is not None,
            "activation": activation,
        },
    )


KIND = Kind(
    name="causal_conv1d",
    op=torch.ops.autodeploy.causal_conv1d.default,
    describe=_describe,
    tensors=_tensors,
    layer_types=("conv",),
    meaning="depthwise causal convolution with a rolling state",
)
